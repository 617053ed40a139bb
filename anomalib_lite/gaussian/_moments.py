"""Running sums of rows, and the shrinkage of the covariance computed from them.

References
----------
.. [1] Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
   variances", 1979.
"""

from __future__ import annotations

import copy

import numpy as np

__all__ = ["Moments", "shrinkage_of"]

# Number of values whose float64 copies are in memory at once.
_BLOCK_VALUES = 1 << 22


class Moments:
    """Count, mean, scatter and higher sums of rows that arrive in blocks.

    The higher sums are those of Ledoit and Wolf's shrinkage.

    Parameters
    ----------
    n_features : int
        Number of features D.

    Attributes
    ----------
    n : int
        Number of rows seen.
    mean : ndarray of shape (D,), float64
        Mean of the rows.
    scatter : ndarray of shape (D, D), float64
        Sum of ``y y^T`` with ``y = x - mean``.
    cubic : ndarray of shape (D,), float64
        Sum of ``|y|^2 y``.
    quartic : float
        Sum of ``|y|^4``.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(60, 3))
    >>> moments = Moments(3)
    >>> for block in np.split(X, 4):
    ...     moments.add(block)
    >>> bool(np.allclose(moments.scatter / 60, np.cov(X.T, bias=True)))
    True
    """

    def __init__(self, n_features: int) -> None:
        self.n = 0
        self.mean = np.zeros(n_features)
        self.scatter = np.zeros((n_features, n_features))
        self.cubic = np.zeros(n_features)
        self.quartic = 0.0

    def add(self, X: np.ndarray) -> None:
        """Add rows (n, D) of any float type; they are copied to float64 block by block."""
        step = max(1, _BLOCK_VALUES // X.shape[1])
        for start in range(0, len(X), step):
            self._add_block(X[start : start + step].astype(np.float64))

    def _add_block(self, x: np.ndarray) -> None:
        mean = x.mean(axis=0)
        x -= mean
        sq_norms = np.einsum("nd,nd->n", x, x)
        block = Moments.__new__(Moments)
        block.n, block.mean, block.scatter = len(x), mean, x.T @ x
        block.cubic, block.quartic = sq_norms @ x, float(sq_norms @ sq_norms)
        self.merge(block)

    def merge(self, other: Moments) -> None:
        """Add the rows that ``other`` has seen; equal, up to rounding, to :meth:`add` ([1]_)."""
        n = self.n + other.n
        if n == 0:
            return
        mean = self.mean + (other.mean - self.mean) * (other.n / n)
        self._move_to(mean)
        moved = other._moved_to(mean)
        self.n = n
        self.scatter += moved.scatter
        self.cubic += moved.cubic
        self.quartic += moved.quartic

    def merged_with(self, other: Moments) -> Moments:
        """Return new moments of the rows of both."""
        both = Moments(len(self.mean))
        both.merge(self)
        both.merge(other)
        return both

    def without(self, other: Moments) -> Moments:
        """Return new moments without the rows that ``other`` has seen; some must remain."""
        rest, n = self._moved_to(self.mean), self.n - other.n
        mean = self.mean + (self.mean - other.mean) * (other.n / n)
        rest._move_to(mean)
        moved = other._moved_to(mean)
        rest.n = n
        rest.scatter -= moved.scatter
        rest.cubic -= moved.cubic
        rest.quartic -= moved.quartic
        return rest

    def _moved_to(self, mean: np.ndarray) -> Moments:
        copied = copy.copy(self)
        copied.scatter, copied.cubic = self.scatter.copy(), self.cubic.copy()
        copied._move_to(mean)
        return copied

    def _move_to(self, mean: np.ndarray) -> None:
        """Take all sums about another point: each ``y`` becomes ``y + d``; the y sum to 0."""
        d = self.mean - mean
        sq, trace, along = float(d @ d), float(self.scatter.trace()), self.scatter @ d
        self.quartic += 4 * float(d @ along) + self.n * sq**2
        self.quartic += 4 * float(d @ self.cubic) + 2 * sq * trace
        self.cubic += 2 * along + (trace + self.n * sq) * d
        self.scatter += self.n * np.outer(d, d)
        self.mean = mean


def shrinkage_of(moments: Moments, how: str | float) -> float:
    """Return the weight, 0 to 1, of the multiple of the identity in the shrunk covariance."""
    if not isinstance(how, str):
        return float(how)
    n, p = moments.n, len(moments.mean)
    covariance = moments.scatter / n
    mu, sq_sum = covariance.trace() / p, float((covariance**2).sum())
    if how == "oas":  # Chen et al., with n + 1 as in scikit-learn
        numerator, spread = sq_sum / p**2 + mu**2, (n + 1) * (sq_sum / p**2 - mu**2 / p)
        return 1.0 if spread <= 0 else float(min(numerator / spread, 1.0))
    distance = (sq_sum - p * mu**2) / p  # squared, from the covariance to mu I
    noise = min((moments.quartic / n - sq_sum) / (n * p), distance)  # error of the covariance
    return 0.0 if noise <= 0 else float(noise / distance)
