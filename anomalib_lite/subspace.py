"""The linear subspace in which normal embeddings vary, and the distance of others from it.

It is fitted from running moments, so embeddings may arrive in blocks of any size.

References
----------
.. [1] Jackson and Mudholkar, "Control Procedures for Residuals Associated With Principal Component
   Analysis", Technometrics 21, 1979.
.. [2] Lendering, Akdag and Bondarev, "SubspaceAD: Training-Free Few-Shot Anomaly Detection via
   Subspace Modeling", 2026, arXiv:2602.23013.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np

from anomalib_lite._validation import check_int, check_number
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.gaussian import Moments, MomentsEstimator

__all__ = ["Subspace", "check_components"]

# Number of values whose centred copies are in memory at once.
_BLOCK_VALUES = 1 << 22


def check_components(n_components: object, where: str) -> None:
    """Raise unless ``n_components`` is a number or a share that :class:`Subspace` accepts."""
    if isinstance(n_components, numbers.Integral):
        check_int("n_components", n_components, where, low=1)
    elif isinstance(n_components, numbers.Real):
        check_number("n_components", n_components, where, "(0, 1)")
    else:
        raise InvalidValueError(
            f"{where}: n_components must be a whole number of at least 1, or a share of the "
            f"variance in (0, 1), got {n_components!r}."
        )


class Subspace(MomentsEstimator):
    """Principal components of normal embeddings; embeddings far from their span are anomalous.

    Parameters
    ----------
    n_components : int or float in (0, 1), default=0.99
        Number of components, or the share of the variance that they hold: as few as hold at least
        so much.

    Attributes
    ----------
    mean_ : ndarray of shape (D,), float64
        Mean of the rows.
    components_ : ndarray of shape (k, D), float64
        Orthonormal directions of the largest variance, the largest first. The largest number of
        each is positive.
    explained_variance_ : ndarray of shape (k,), float64
        Variance along each of them, with ``N - 1`` in the denominator.
    explained_variance_ratio_ : ndarray of shape (k,), float64
        The same as a share of the variance of all directions.
    n_components_ : int
        Number of components k; 0 if all rows are equal.
    n_samples_seen_ : int
        Number of rows N.
    n_features_in_ : int
        Number of features D.

    Notes
    -----
    With the mean m and the components V, the squared residual of x is
    :math:`|(I - V^T V)(x - m)|^2`, the Q statistic of [1]_; SubspaceAD [2]_ scores patches by it.
    It is computed as a sum of squares, so it is never negative, and a small residual of a long
    vector keeps its digits.

    The components are eigenvectors of the scatter around the current mean, both in float64 and
    computed block by block. So a float32 array is never copied as a whole, a mean far from zero
    costs no digits, and there may be fewer rows than features. Memory is a few times D x D numbers.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 8)) + 3
    >>> subspace = Subspace().fit(X)
    >>> subspace.components_.shape
    (2, 8)
    >>> away = X[:1].copy()
    >>> away[0, 0] += 5
    >>> subspace.residual(np.concatenate([X[:1], away])).round(1).tolist()
    [0.0, 3.5]
    """

    def __init__(self, n_components: int | float = 0.99) -> None:
        self.n_components = n_components

    def residual(self, X: Any) -> np.ndarray:
        """Return the distance of each row from the subspace.

        Parameters
        ----------
        X : array of shape (N, D)
            Embeddings.

        Returns
        -------
        ndarray of shape (N,), float64
            Rooted, in the units of the features.

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        InvalidValueError
            If D differs from that of :meth:`fit`, or rows are not finite.
        """
        return np.asarray(np.sqrt(self.sq_residual(X)))

    def sq_residual(self, X: Any) -> np.ndarray:
        """Return the squares of :meth:`residual`, the Q statistic of each row.

        Parameters
        ----------
        X : array of shape (N, D)
            Embeddings.

        Returns
        -------
        ndarray of shape (N,), float64
            :math:`|(I - V^T V)(x - m)|^2`, in squares of the features' units, at least 0.

        Raises
        ------
        NotFittedError, InvalidValueError
            As :meth:`residual`.

        Examples
        --------
        >>> import numpy as np
        >>> line = Subspace(1).fit(np.float32([[0, 0], [1, 0], [2, 0]]))
        >>> line.sq_residual(np.float32([[9, 0], [9, 3]]))
        array([0., 9.])
        """
        axes = self._axes()
        X = self._validated(X, reset=False)
        step = max(1, _BLOCK_VALUES // X.shape[1])
        blocks = [axes.sq_distances(X[i : i + step] - self.mean_) for i in range(0, len(X), step)]
        return np.concatenate(blocks)

    @property
    def components_(self) -> np.ndarray:
        """Orthonormal directions (k, D) of the largest variance."""
        return self._axes().components

    @property
    def explained_variance_(self) -> np.ndarray:
        """Variance (k,) along each component."""
        axes = self._axes()
        return axes.sq_lengths[: len(axes.components)] / max(self.moments_.n - 1, 1)

    @property
    def explained_variance_ratio_(self) -> np.ndarray:
        """Share (k,) of the variance that each component holds."""
        axes = self._axes()
        total = axes.sq_lengths.sum()  # not 0 if there is a component
        return axes.sq_lengths[: len(axes.components)] / (total or 1.0)

    @property
    def n_components_(self) -> int:
        """Number of components k."""
        return len(self._axes().components)

    @property
    def n_samples_seen_(self) -> int:
        """Number of rows N."""
        self._check_fitted()
        return self.moments_.n

    def _learn(self, moments: Moments) -> None:
        check_components(self.n_components, "Subspace")
        self.n_features_in_ = len(moments.mean)
        self.moments_, self.mean_ = moments, moments.mean
        self._found: _Axes | None = None

    def _solve(self) -> None:
        self._axes()

    def _axes(self) -> _Axes:
        """Return the components.

        They are computed when they are first needed, because that takes long, and because after a
        first small block there may not be enough directions yet.
        """
        self._check_fitted()
        if self._found is None:
            self._found = _find_axes(self.moments_, self.n_components)
        return self._found


@dataclass(frozen=True)
class _Axes:
    """Orthonormal directions: those of the subspace, and those across it."""

    components: np.ndarray  # (k, D)
    across: np.ndarray  # (D - k, D)
    sq_lengths: np.ndarray  # (D,), sum of squares along each direction, the largest first

    def sq_distances(self, y: np.ndarray) -> np.ndarray:
        """Return the squared distances (n,) of centred rows (n, D) from the subspace."""
        if len(self.across) <= 2 * len(self.components):  # whichever is fewer products
            rest = y @ self.across.T
        else:
            rest = y - (y @ self.components.T) @ self.components
        return np.asarray(np.einsum("nd,nd->n", rest, rest))


def _find_axes(moments: Moments, n_components: int | float) -> _Axes:
    values, vectors = np.linalg.eigh(moments.scatter)
    values, directions = np.maximum(values[::-1], 0), vectors.T[::-1]
    rank = int(np.sum(values > len(values) * np.finfo(np.float64).eps * values[0]))
    if isinstance(n_components, numbers.Integral):
        k = int(n_components)
        if k > rank:
            raise InvalidValueError(
                f"Subspace: n_components={k} is more than the {rank} directions in which "
                f"{moments.n} rows of {len(values)} features vary. Give more rows that differ, or "
                "lower n_components."
            )
    else:
        held = np.cumsum(values[:rank])
        k = int(np.searchsorted(held, n_components * held[-1])) + 1 if rank else 0
        k = min(k, rank)  # rounding alone could exceed it
    components = np.ascontiguousarray(directions[:k])
    largest = np.abs(components).argmax(axis=1)[:, None]
    components *= np.sign(np.take_along_axis(components, largest, axis=1))
    return _Axes(components, np.ascontiguousarray(directions[k:]), values)
