"""Gaussian models of normal embeddings: one, or one for each position of a grid.

Both are fitted from running moments, so embeddings may pass by in blocks of any size. Distances
are Mahalanobis's, rooted, by the Cholesky factor of the covariance: with ``covariance = L L^T``
and ``W = L^-1`` the distance is ``|W (x - mean)|``.

References
----------
.. [1] Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
   Journal of Multivariate Analysis 88, 2004.
.. [2] Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE
   Transactions on Signal Processing 58, 2010.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from scipy.linalg.lapack import dtrtri
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from anomalib_lite._threads import workers
from anomalib_lite._validation import check_choice, check_number, check_values
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, NotFittedError
from anomalib_lite.gaussian._moments import Moments, shrinkage_of

__all__ = ["Gaussian", "GaussianGrid", "check_shrinkage"]

SHRINKAGES = ("ledoit_wolf", "oas")

# Values of rows that are whitened at once.
_BLOCK_VALUES = 1 << 22
# Positions that one thread factors or scores at a time.
_BLOCK_POSITIONS = 32


def check_shrinkage(shrinkage: object, where: str) -> None:
    """Raise unless it is a name or a number that :class:`Gaussian` takes."""
    if isinstance(shrinkage, numbers.Real):
        check_number("shrinkage", shrinkage, where, "[0, 1]")
    else:
        check_choice("shrinkage", shrinkage, SHRINKAGES, where)


class Gaussian(BaseEstimator):
    """One Gaussian of normal embeddings; what is far from its mean is anomalous.

    Parameters
    ----------
    shrinkage : {"ledoit_wolf", "oas"} or float in [0, 1], default="ledoit_wolf"
        How much of the covariance is replaced by a multiple of the identity of the same trace:
        the share that Ledoit and Wolf [1]_ or the oracle approximating formula [2]_ give, as in
        scikit-learn, or a constant.

    Attributes
    ----------
    location_ : ndarray of shape (D,), float64
    covariance_ : ndarray of shape (D, D), float64
        ``(1 - s) S / n + s tr(S / n) / D I`` with the scatter S and the shrinkage s.
    precision_ : ndarray of shape (D, D), float64
        Inverse of the covariance.
    whitening_ : ndarray of shape (D, D), float64
        Lower Cholesky factor of the precision: ``(X - location_) @ whitening_`` has a covariance
        of I, and rows of a length that :meth:`mahalanobis` gives.
    shrinkage_ : float
        The s that was used.
    n_features_in_ : int
        D.

    Notes
    -----
    The sums are kept in float64 and gathered in blocks, so an array of float32 is never copied
    as a whole.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(500, 8)).astype("float32")
    >>> gaussian = Gaussian().fit(X)
    >>> distances = gaussian.mahalanobis(np.stack([gaussian.location_, np.full(8, 3.0)]))
    >>> distances.round(1).tolist()
    [0.0, 8.5]
    """

    def __init__(self, shrinkage: str | float = "ledoit_wolf") -> None:
        self.shrinkage = shrinkage

    def fit(self, X: Any, y: object = None) -> Self:
        """Estimate mean and covariance.

        Parameters
        ----------
        X : array of shape (N, D), any float type
        y : ignored

        Returns
        -------
        Gaussian
            Itself.

        Raises
        ------
        InvalidValueError
            For an unknown shrinkage, rows that are not finite, or so few or so equal that the
            covariance has no inverse.
        """
        before = self.__dict__.copy()
        try:
            X = self._validated(X, reset=True, at_least=2)
            moments = Moments(X.shape[1])
            moments.add(X)
            self.fit_moments(moments)
        except Exception:  # what was there stays
            self.__dict__ = before
            raise
        return self

    def partial_fit(self, X: Any, y: object = None) -> Self:
        """Go on with further rows (N, D): the same, up to rounding, as to fit on all at once."""
        known = getattr(self, "moments_", None)
        X = self._validated(X, reset=known is None)
        moments = Moments(X.shape[1])
        if known is not None:
            moments.merge(known)
        moments.add(X)
        return self._learn(moments)

    def mahalanobis(self, X: Any) -> np.ndarray:
        """Distance of each row from the mean, in standard deviations along its direction.

        Parameters
        ----------
        X : array of shape (N, D)

        Returns
        -------
        ndarray of shape (N,), float64
            Rooted: ``sqrt((x - mean)^T precision (x - mean))``. scikit-learn's covariance
            estimators give its square.

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        InvalidValueError
            If D differs or rows are not finite.
        """
        try:
            check_is_fitted(self, "moments_")
        except ValueError as error:
            raise NotFittedError("Gaussian: not fitted yet. Call fit(X) first.") from error
        X = self._validated(X, reset=False)
        step, whitening = max(1, _BLOCK_VALUES // X.shape[1]), self._factors()
        parts = [
            np.linalg.norm((X[i : i + step] - self.location_) @ whitening.T, axis=1)
            for i in range(0, len(X), step)
        ]
        return np.concatenate(parts)

    @property
    def precision_(self) -> np.ndarray:
        """Inverse of ``covariance_``."""
        factor = self._factors()
        return np.asarray(factor.T @ factor)

    @property
    def whitening_(self) -> np.ndarray:
        """Lower Cholesky factor of ``precision_``: it turns the covariance into the identity.

        The norms of ``(X - location_) @ whitening_`` are the distances of :meth:`mahalanobis`.
        """
        return np.linalg.cholesky(self.precision_)

    def fit_moments(self, moments: Moments) -> Self:
        """:meth:`fit` on rows that are gone, from what is known of them."""
        self._learn(moments)._factors()
        return self

    def _learn(self, moments: Moments) -> Self:
        check_shrinkage(self.shrinkage, "Gaussian")
        shrinkage = shrinkage_of(moments, self.shrinkage)
        covariance = moments.scatter / moments.n
        mean_variance = covariance.trace() / len(covariance)
        covariance *= 1 - shrinkage
        covariance.flat[:: len(covariance) + 1] += shrinkage * mean_variance
        self.n_features_in_ = len(covariance)
        self.moments_, self.location_ = moments, moments.mean
        self.shrinkage_, self.covariance_ = shrinkage, covariance
        self._factor: np.ndarray | None = None
        return self

    def _factors(self) -> np.ndarray:
        """Inverse Cholesky factor (D, D) of the covariance, made when it is first needed: after
        a first small block there may be none yet.
        """
        if self._factor is None:
            try:
                self._factor = _inverse_factors(self.covariance_)
            except np.linalg.LinAlgError as error:
                raise InvalidValueError(
                    f"Gaussian: the covariance of {self.moments_.n} rows in "
                    f"{len(self.covariance_)} dimensions with shrinkage {self.shrinkage_:.3g} has "
                    "no inverse. Give more rows that differ, or a larger shrinkage."
                ) from error
        return self._factor

    def _validated(self, X: Any, *, reset: bool, at_least: int = 1) -> np.ndarray:
        try:
            X = validate_data(
                self,
                X,
                dtype=[np.float64, np.float32],
                reset=reset,
                ensure_min_samples=at_least,
            )
        except TypeError as error:
            raise InvalidTypeError(f"Gaussian: {error}") from error
        except ValueError as error:
            raise InvalidValueError(f"Gaussian: {error}") from error
        check_values("X", X, "Gaussian")
        return np.asarray(X)


class GaussianGrid:
    """One Gaussian for each position of a grid, as PaDiM has them.

    Parameters
    ----------
    shape : (h, w, D)
        The grid, and the length of an embedding.
    ridge : float, default=0.01
        Added to the diagonal of each covariance: epsilon of PaDiM, Equation 2.

    Attributes
    ----------
    n : int
        Images seen.
    mean : ndarray of shape (P, D), float32, P = h w
    whitening : ndarray of shape (P, D, D), float32, or None
        Inverse Cholesky factors, transposed (``W^T``, upper triangles: rows of patches are
        multiplied by them in half the time), once :meth:`factor` was called. They take the place
        of the scatter: at no time is there more than one array of this size.

    Examples
    --------
    >>> import numpy as np
    >>> E = np.random.default_rng(0).normal(size=(50, 4, 6, 5)).astype("float32")
    >>> grid = GaussianGrid((4, 6, 5))
    >>> grid.add(E[:20])
    >>> grid.add(E[20:])
    >>> grid.factor()
    >>> grid.mahalanobis(E).shape
    (50, 4, 6)
    """

    def __init__(self, shape: tuple[int, int, int], ridge: float = 0.01) -> None:
        self.shape, self.ridge, self.n = shape, ridge, 0
        n_positions, n_features = shape[0] * shape[1], shape[2]
        self.mean = np.zeros((n_positions, n_features), np.float32)
        self.whitening: np.ndarray | None = None
        self._scatter: np.ndarray | None = np.zeros(
            (n_positions, n_features, n_features), np.float32
        )

    def add(self, E: np.ndarray) -> None:
        """Take in the embeddings of some images, (B, h, w, D) float32."""
        scatter = self._unfactored()
        n_new, n = len(E), self.n + len(E)
        x = E.reshape(n_new, *self.mean.shape)  # (B, P, D)

        def work(block: slice) -> None:
            mean = x[:, block].mean(axis=0)
            step = mean - self.mean[block]
            # The step of the mean is one more row, so that the scatter is gone through once.
            y = np.empty((len(mean), n_new + 1, self.shape[2]), np.float32)
            np.subtract(x[:, block].transpose(1, 0, 2), mean[:, None], out=y[:, :-1])
            np.multiply(step, np.float32((self.n * n_new / n) ** 0.5), out=y[:, -1])
            scatter[block] += y.transpose(0, 2, 1) @ y
            self.mean[block] += step * np.float32(n_new / n)

        self._in_blocks(work)
        self.n = n

    def factor(self) -> None:
        """Turn scatters into inverse factors of ``scatter / (n - 1) + ridge I``, in place."""
        scatter = self._unfactored()

        def work(block: slice) -> None:
            scatter[block] = self._factors(scatter[block], self._freedom)

        self._in_blocks(work)
        self.whitening, self._scatter = scatter, None

    def mahalanobis(self, E: np.ndarray) -> np.ndarray:
        """Rooted distance of each patch from its position's mean.

        (B, h, w, D) float32 -> (B, h, w) float32.
        """
        assert self.whitening is not None
        whitening = self.whitening
        x = E.reshape(len(E), *self.mean.shape)
        out = np.empty((len(self.mean), len(E)), np.float32)

        def work(block: slice) -> None:
            np.sqrt(self._squared(x, block, whitening[block]), out=out[block])

        self._in_blocks(work)
        return np.ascontiguousarray(out.T).reshape(len(E), *self.shape[:2])

    def left_out(self, E: Sequence[np.ndarray]) -> np.ndarray:
        """:meth:`mahalanobis` for images that were taken in, each as if it had not been.

        Arrays (B, h, w, D) float32 -> (N, h, w) float32, in their order. Before :meth:`factor`.

        Notes
        -----
        The n - 1 others have n - 2 degrees of freedom. Their scatter is that of all but
        ``n / (n - 1) y y^T``, their mean is farther from x by ``n / (n - 1)``, and the inverse
        follows by Sherman and Morrison: with q the squared distance from all, by n - 2 degrees,
        ``(n / (n - 1))^2 q / (1 - n q / ((n - 1) (n - 2)))``.
        """
        scatter, ratio = self._unfactored(), self.n / (self.n - 1)
        X = [x.reshape(len(x), *self.mean.shape) for x in E]
        out = np.empty((len(self.mean), sum(map(len, X))), np.float32)

        def work(block: slice) -> None:
            whitening = self._factors(scatter[block], self.n - 2).astype(np.float32)
            q = np.concatenate([self._squared(x, block, whitening) for x in X], axis=1)
            rest = np.maximum(1 - ratio / (self.n - 2) * q.astype(np.float64), 1e-9)
            out[block] = ratio * np.sqrt(q / rest)  # a rest of 0 could come from rounding alone

        self._in_blocks(work)
        return np.ascontiguousarray(out.T).reshape(-1, *self.shape[:2])

    def packed(self) -> np.ndarray:
        """W without the zeros above its diagonals: (P, D (D + 1) / 2), float32."""
        assert self.whitening is not None
        rows, columns = np.tril_indices(self.shape[2])
        return self.whitening[:, columns, rows]

    def restore(self, n: int, mean: np.ndarray, packed: np.ndarray) -> None:
        """Become what has seen ``n`` images, from the arrays that it had; ValueError if they are
        of another shape.
        """
        scatter = self._unfactored()
        self.n = n
        if mean.shape != self.mean.shape:
            raise ValueError(f"mean has shape {mean.shape}, not {self.mean.shape}")
        self.mean = mean
        rows, columns = np.tril_indices(self.shape[2])
        scatter[:, columns, rows] = packed
        self.whitening, self._scatter = scatter, None

    @property
    def _freedom(self) -> int:
        return max(self.n - 1, 1)

    def _factors(self, scatter: np.ndarray, freedom: int) -> np.ndarray:
        """Scatters (p, D, D) -> W^T, float64."""
        covariance = scatter.astype(np.float64) / freedom
        covariance += self.ridge * np.eye(self.shape[2])
        return _inverse_factors(covariance).transpose(0, 2, 1)

    def _squared(self, x: np.ndarray, block: slice, whitening: np.ndarray) -> np.ndarray:
        """Squared distances (p, B) at some positions of images (B, P, D)."""
        y = np.empty((len(whitening), len(x), self.shape[2]), np.float32)
        np.subtract(x[:, block].transpose(1, 0, 2), self.mean[block, None], out=y)
        z = y @ whitening
        return np.asarray(np.einsum("pbd,pbd->pb", z, z))

    def _unfactored(self) -> np.ndarray:
        """The scatters (P, D, D); from the factors again, if there are only these."""
        if self._scatter is None:
            assert self.whitening is not None
            scatter = self.whitening

            def work(block: slice) -> None:
                factor = np.stack([_inverse(w.T) for w in scatter[block].astype(np.float64)])
                covariance = factor @ factor.transpose(0, 2, 1)
                scatter[block] = (covariance - self.ridge * np.eye(self.shape[2])) * self._freedom

            self._in_blocks(work)
            self._scatter, self.whitening = scatter, None
        return self._scatter

    def _in_blocks(self, work: Any) -> None:
        starts = range(0, len(self.mean), _BLOCK_POSITIONS)
        with workers() as executor:
            list(executor.map(work, [slice(i, i + _BLOCK_POSITIONS) for i in starts]))


def _inverse_factors(covariance: np.ndarray) -> np.ndarray:
    """Inverse lower Cholesky factors of (D, D) or (p, D, D), float64."""
    factors = np.linalg.cholesky(covariance)
    if factors.ndim == 2:
        return _inverse(factors)
    return np.stack([_inverse(factor) for factor in factors])


def _inverse(triangle: np.ndarray) -> np.ndarray:
    """Of a lower triangle (D, D), float64."""
    # LAPACK goes down columns: so the transpose is in order, and need not be copied.
    inverse, failed = dtrtri(triangle.T, lower=0)
    if failed or not np.isfinite(inverse).all():
        raise np.linalg.LinAlgError("singular")
    return np.asarray(inverse.T)
