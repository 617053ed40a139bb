"""A Gaussian model of normal embeddings.

It is fitted from running moments, so embeddings may arrive in blocks of any size. Mahalanobis
distances are rooted and use the Cholesky factor of the covariance: with ``covariance = L L^T`` and
``W = L^-1`` the distance is ``|W (x - mean)|``.

References
----------
.. [1] Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
   Journal of Multivariate Analysis 88, 2004.
.. [2] Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE
   Transactions on Signal Processing 58, 2010.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from scipy.linalg.lapack import dtrtri

from anomalib_lite._validation import check_choice, check_number
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.gaussian._estimator import MomentsEstimator
from anomalib_lite.gaussian._moments import Moments, shrinkage_of

__all__ = ["Gaussian", "check_shrinkage", "inverse_factors", "invert_lower"]

SHRINKAGES = ("ledoit_wolf", "oas")

# Number of values whose whitened copies are in memory at once.
_BLOCK_VALUES = 1 << 22


def check_shrinkage(shrinkage: object, where: str) -> None:
    """Raise unless ``shrinkage`` is a name or a number that :class:`Gaussian` accepts."""
    if isinstance(shrinkage, numbers.Real):
        check_number("shrinkage", shrinkage, where, "[0, 1]")
    else:
        check_choice("shrinkage", shrinkage, SHRINKAGES, where)


class Gaussian(MomentsEstimator):
    """One Gaussian of normal embeddings; embeddings far from its mean are anomalous.

    Parameters
    ----------
    shrinkage : {"ledoit_wolf", "oas"} or float in [0, 1], default="ledoit_wolf"
        Share of the covariance that is replaced by a multiple of the identity with the same
        trace: computed by the formula of Ledoit and Wolf [1]_ or by oracle approximating
        shrinkage [2]_, as in scikit-learn, or a constant.

    Attributes
    ----------
    location_ : ndarray of shape (D,), float64
        Mean of the rows.
    covariance_ : ndarray of shape (D, D), float64
        ``(1 - s) S / n + s tr(S / n) / D I`` with the scatter S and the shrinkage s.
    precision_ : ndarray of shape (D, D), float64
        Inverse of ``covariance_``.
    whitening_ : ndarray of shape (D, D), float64
        Lower Cholesky factor of the precision: ``(X - location_) @ whitening_`` has the identity
        as covariance, and :meth:`mahalanobis` gives the lengths of its rows.
    shrinkage_ : float
        Shrinkage s that was used.
    n_features_in_ : int
        Number of features D.

    Notes
    -----
    The sums are float64 and are computed block by block, so a float32 array is never copied as a
    whole.

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

    def mahalanobis(self, X: Any) -> np.ndarray:
        """Return how far each row is from the mean, in standard deviations along its direction.

        Parameters
        ----------
        X : array of shape (N, D)
            Embeddings.

        Returns
        -------
        ndarray of shape (N,), float64
            Rooted: ``sqrt((x - mean)^T precision (x - mean))``. scikit-learn's covariance
            estimators return the square.

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        InvalidValueError
            If D differs from that of :meth:`fit`, or rows are not finite.
        """
        self._check_fitted()
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

    def _learn(self, moments: Moments) -> None:
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

    def _solve(self) -> None:
        self._factors()

    def _factors(self) -> np.ndarray:
        """Return the inverse Cholesky factor (D, D) of the covariance.

        It is computed when it is first needed, because after a first small block the covariance
        may have no inverse yet.
        """
        if self._factor is None:
            try:
                self._factor = inverse_factors(self.covariance_)
            except np.linalg.LinAlgError as error:
                raise InvalidValueError(
                    f"Gaussian: the covariance of {self.moments_.n} rows in "
                    f"{len(self.covariance_)} dimensions with shrinkage {self.shrinkage_:.3g} has "
                    "no inverse. Give more rows that differ, or a larger shrinkage."
                ) from error
        return self._factor


def inverse_factors(covariance: np.ndarray) -> np.ndarray:
    """Return the inverse lower Cholesky factors of covariances (D, D) or (p, D, D), float64."""
    factors = np.linalg.cholesky(covariance)
    if factors.ndim == 2:
        return invert_lower(factors)
    return np.stack([invert_lower(factor) for factor in factors])


def invert_lower(triangle: np.ndarray) -> np.ndarray:
    """Invert a lower triangular matrix (D, D), float64."""
    # LAPACK stores columns one after the other, so the transpose needs no copy.
    inverse, failed = dtrtri(triangle.T, lower=0)
    if failed or not np.isfinite(inverse).all():
        raise np.linalg.LinAlgError("singular")
    return np.asarray(inverse.T)
