"""Gaussian models of normal embeddings, one for each position of a grid.

They are fitted from running moments. Distances use Cholesky factors, as in
:class:`~anomalib_lite.gaussian.Gaussian`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from anomalib_lite._threads import workers
from anomalib_lite.gaussian._gaussian import inverse_factors, invert_lower

__all__ = ["GaussianGrid"]

# Number of positions that one thread factorizes or scores at a time.
_BLOCK_POSITIONS = 32


class GaussianGrid:
    """One Gaussian for each position of a grid, as in PaDiM.

    Parameters
    ----------
    shape : (h, w, D)
        Size of the grid, and length of an embedding.
    ridge : float, default=0.01
        Number added to the diagonal of each covariance: epsilon of PaDiM, Equation 2.

    Attributes
    ----------
    n : int
        Number of images seen.
    mean : ndarray of shape (P, D), float32, P = h w
        Mean embedding of each position.
    whitening : ndarray of shape (P, D, D), float32, or None
        Inverse Cholesky factors, transposed (``W^T``, upper triangles: rows of patches are
        multiplied by them in half the time); None before :meth:`factorize`. They overwrite the
        scatter, so one object has one array of this size.

    Examples
    --------
    >>> import numpy as np
    >>> E = np.random.default_rng(0).normal(size=(50, 4, 6, 5)).astype("float32")
    >>> grid = GaussianGrid((4, 6, 5))
    >>> grid.add(E[:20])
    >>> grid.add(E[20:])
    >>> grid.factorize()
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
        """Add the embeddings (B, h, w, D) float32 of some images."""
        scatter = self._scatters()
        n_new, n = len(E), self.n + len(E)
        x = E.reshape(n_new, *self.mean.shape)  # (B, P, D)

        def work(block: slice) -> None:
            mean = x[:, block].mean(axis=0)
            step = mean - self.mean[block]
            # The step of the mean is one more row, so that the scatter is read and written once.
            y = np.empty((len(mean), n_new + 1, self.shape[2]), np.float32)
            np.subtract(x[:, block].transpose(1, 0, 2), mean[:, None], out=y[:, :-1])
            np.multiply(step, np.float32((self.n * n_new / n) ** 0.5), out=y[:, -1])
            scatter[block] += y.transpose(0, 2, 1) @ y
            self.mean[block] += step * np.float32(n_new / n)

        self._in_blocks(work)
        self.n = n

    def factorize(self) -> None:
        """Replace the scatters by inverse factors of ``scatter / (n - 1) + ridge I``, in place."""
        scatter = self._scatters()

        def work(block: slice) -> None:
            scatter[block] = self._factors(scatter[block], self._freedom)

        self._in_blocks(work)
        self.whitening, self._scatter = scatter, None

    def mahalanobis(self, E: np.ndarray) -> np.ndarray:
        """Return the rooted distance of each patch from the mean of its position.

        (B, h, w, D) float32 -> (B, h, w) float32. Needs :meth:`factorize` first.
        """
        assert self.whitening is not None
        whitening = self.whitening
        x = E.reshape(len(E), *self.mean.shape)
        out = np.empty((len(self.mean), len(E)), np.float32)

        def work(block: slice) -> None:
            np.sqrt(self._squared(x, block, whitening[block]), out=out[block])

        self._in_blocks(work)
        return np.ascontiguousarray(out.T).reshape(len(E), *self.shape[:2])

    def leave_one_out(self, E: Sequence[np.ndarray]) -> np.ndarray:
        """Return the distances of images that were added, each measured without itself.

        Arrays (B, h, w, D) float32 -> (N, h, w) float32, in the same order. Call it before
        :meth:`factorize`.

        Notes
        -----
        The n - 1 other images have n - 2 degrees of freedom. Their scatter is the scatter of all
        images minus ``n / (n - 1) y y^T``, their mean is farther from x by the factor
        ``n / (n - 1)``, and the inverse follows from the Sherman-Morrison formula. With q the
        squared distance from all images, computed with n - 2 degrees of freedom, the squared
        distance is ``(n / (n - 1))^2 q / (1 - n q / ((n - 1) (n - 2)))``.
        """
        scatter, ratio = self._scatters(), self.n / (self.n - 1)
        X = [x.reshape(len(x), *self.mean.shape) for x in E]
        out = np.empty((len(self.mean), sum(map(len, X))), np.float32)

        def work(block: slice) -> None:
            whitening = self._factors(scatter[block], self.n - 2).astype(np.float32)
            q = np.concatenate([self._squared(x, block, whitening) for x in X], axis=1)
            rest = np.maximum(1 - ratio / (self.n - 2) * q.astype(np.float64), 1e-9)
            out[block] = ratio * np.sqrt(q / rest)  # rounding alone could give 0

        self._in_blocks(work)
        return np.ascontiguousarray(out.T).reshape(-1, *self.shape[:2])

    def without(self, E: np.ndarray) -> Self:
        """Return factorized Gaussians of all images but these, which were added; 2 must remain.

        The embeddings are (B, h, w, D) float32. Call it before :meth:`factorize`.

        Notes
        -----
        With B of n images left out, whose mean is m' and whose scatter about it is S', the scatter
        of the others about their mean m is that of all minus
        ``S' + B n / (n - B) (m' - mean)(m' - mean)^T``, where ``mean`` is that of all.
        """
        scatter, n, n_left_out = self._scatters(), self.n, len(E)
        x = E.reshape(n_left_out, *self.mean.shape)
        rest = type(self)(self.shape, self.ridge)
        rest.n, factors = n - n_left_out, rest._scatters()

        def work(block: slice) -> None:
            mean = x[:, block].mean(axis=0)
            step = self.mean[block] - mean
            y = np.empty((len(mean), n_left_out + 1, self.shape[2]), np.float32)
            np.subtract(x[:, block].transpose(1, 0, 2), mean[:, None], out=y[:, :-1])
            np.multiply(step, np.float32((n_left_out * n / rest.n) ** 0.5), out=y[:, -1])
            rest.mean[block] = self.mean[block] + step * np.float32(n_left_out / rest.n)
            others = scatter[block] - y.transpose(0, 2, 1) @ y
            factors[block] = self._factors(others, max(rest.n - 1, 1))

        self._in_blocks(work)
        rest.whitening, rest._scatter = factors, None
        return rest

    def packed(self) -> np.ndarray:
        """Return W without the zeros above its diagonals: (P, D (D + 1) / 2), float32."""
        assert self.whitening is not None
        rows, columns = np.tril_indices(self.shape[2])
        return self.whitening[:, columns, rows]

    def restore(self, n: int, mean: np.ndarray, packed: np.ndarray) -> None:
        """Restore the state after ``n`` images from its arrays.

        ValueError if the arrays have another shape.
        """
        scatter = self._scatters()
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
        """Factorize scatters (p, D, D) -> W^T, float64."""
        covariance = scatter.astype(np.float64) / freedom
        covariance += self.ridge * np.eye(self.shape[2])
        return inverse_factors(covariance).transpose(0, 2, 1)

    def _squared(self, x: np.ndarray, block: slice, whitening: np.ndarray) -> np.ndarray:
        """Return the squared distances (p, B) at the positions ``block`` of images (B, P, D)."""
        y = np.empty((len(whitening), len(x), self.shape[2]), np.float32)
        np.subtract(x[:, block].transpose(1, 0, 2), self.mean[block, None], out=y)
        z = y @ whitening
        return np.asarray(np.einsum("pbd,pbd->pb", z, z))

    def _scatters(self) -> np.ndarray:
        """Return the scatters (P, D, D), computed back from the factors if need be."""
        if self._scatter is None:
            assert self.whitening is not None
            scatter = self.whitening

            def work(block: slice) -> None:
                factor = np.stack([invert_lower(w.T) for w in scatter[block].astype(np.float64)])
                covariance = factor @ factor.transpose(0, 2, 1)
                scatter[block] = (covariance - self.ridge * np.eye(self.shape[2])) * self._freedom

            self._in_blocks(work)
            self._scatter, self.whitening = scatter, None
        return self._scatter

    def _in_blocks(self, work: Any) -> None:
        starts = range(0, len(self.mean), _BLOCK_POSITIONS)
        with workers() as executor:
            list(executor.map(work, [slice(i, i + _BLOCK_POSITIONS) for i in starts]))
