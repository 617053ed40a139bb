"""A bank that may know where in the image its patches lie, and then searches near a place alone.

References
----------
.. [1] RAD and DINOSaur (arXiv:2605.24251) compare a patch with normal ones of its neighbourhood.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np

from anomalib_lite._threads import one_blas_thread
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.images.embeddings import Embeddings
from anomalib_lite.memory_bank import MemoryBank

__all__ = ["PatchBank", "check_position_window", "patch_cells", "window_reach"]

# Queries from squares of so many cells a side share the rows that they are compared with.
_SQUARE = 4
# Rows of the bank, and distances to them, that are in memory at once.
_BLOCK_ROWS, _VALUES = 1 << 14, 1 << 22


def check_position_window(where: str, index: str, image_score: str, augment: Any) -> None:
    """Raise InvalidValueError for parameters that cannot go with a window."""
    if index != "flat":
        raise InvalidValueError(
            f"{where}: position_window has a search of its own, which is exact: it needs "
            f"index='flat', got {index!r}."
        )
    if image_score == "reweighted":
        raise InvalidValueError(
            f"{where}: image_score='reweighted' compares with the neighbours of a bank patch "
            "wherever they lie, which no position_window bounds. Set another image_score."
        )
    moving = {"rotations", "flips"} & set([augment] if isinstance(augment, str) else augment or ())
    if moving:
        raise InvalidValueError(
            f"{where}: augment={augment!r} moves patches to other places, so position_window would "
            "compare with what never lies there. Use augment='brightness', or no position_window."
        )


def patch_cells(E: Embeddings, grid: tuple[int, int]) -> np.ndarray:
    """Return the cell of ``grid`` in which each patch lies, in the order of ``patch_rows``.

    Parameters
    ----------
    E : array of shape (N, h, w, D), or list of N arrays (h, w, D)
    grid : (h0, w0)
        Rows and columns of the grid. A patch of an image with as many patches lies in its own
        cell; of others, in the cell in which its centre lies.

    Returns
    -------
    ndarray of shape (n,), int32
        ``row * w0 + column`` of each patch that is not ignored (NaN).

    Examples
    --------
    >>> patch_cells(np.zeros((1, 2, 3, 1)), (2, 3)).tolist()
    [0, 1, 2, 3, 4, 5]
    >>> patch_cells(np.zeros((1, 1, 6, 1)), (2, 3)).tolist()
    [3, 3, 4, 4, 5, 5]
    """
    found = []
    for block in [E] if isinstance(E, np.ndarray) else [one[None] for one in E]:
        n, height, width = block.shape[:3]
        rows = (2 * np.arange(height) + 1) * grid[0] // (2 * height)
        columns = (2 * np.arange(width) + 1) * grid[1] // (2 * width)
        cells = (rows[:, None] * grid[1] + columns).astype(np.int32)
        found.append(np.broadcast_to(cells, (n, height, width))[~np.isnan(block[..., 0])])
    return np.concatenate(found)


def window_reach(cells: np.ndarray, grid: tuple[int, int], window: int, least: int) -> np.ndarray:
    """Return how far each cell must look to meet at least ``least`` patches.

    Parameters
    ----------
    cells : ndarray of shape (M,), int32
        Cells of the patches; at least ``least`` of them.
    grid : (h, w)
    window : int
        Cells to look away in row and in column.
    least : int

    Returns
    -------
    ndarray of shape (h, w), int32
        ``window``, or where too few patches are that near, as much more as is needed.

    Examples
    --------
    >>> window_reach(np.array([0, 4], np.int32), (1, 5), 1, 1)
    array([[1, 1, 2, 1, 1]], dtype=int32)
    """
    height, width = grid
    total = np.zeros((height + 1, width + 1), np.int64)  # of all cells above and to the left
    counts = np.bincount(cells, minlength=height * width).reshape(grid)
    total[1:, 1:] = counts.cumsum(axis=0).cumsum(axis=1)
    reach = np.full(grid, -1, np.int32)
    window = min(window, np.iinfo(np.int16).max)  # no place has a larger number
    row, column = np.arange(height), np.arange(width)
    for r in range(window, window + max(grid) + 1):
        above, below = np.maximum(row - r, 0), np.minimum(row + r + 1, height)
        left, right = np.maximum(column - r, 0), np.minimum(column + r + 1, width)
        n = total[below][:, right] - total[above][:, right]
        n += total[above][:, left] - total[below][:, left]
        reach[(reach < 0) & (n >= least)] = r
        if (reach >= 0).all():
            break
    return reach


class PatchBank(MemoryBank):
    """A memory bank whose patches may have a place, and are then found by those near to it alone.

    Attributes
    ----------
    cells_ : ndarray of shape (M,), int32, or None
        Cell of each row of ``embeddings_``: ``row * w + column``. None if they have no place.
    reach_ : ndarray of shape (h, w), int32
        How many cells away, in row and in column, a patch of each cell looks. It stays when rows
        are added, so that each patch is compared with more and more rows, and no distance rises.

    Notes
    -----
    ``kneighbors`` and ``search`` compare with all rows, as those of any bank.
    """

    cells_: np.ndarray | None = None
    reach_: np.ndarray
    _places: tuple[np.ndarray, np.ndarray]  # rows and columns of the cells
    _lookup: tuple[np.ndarray, np.ndarray] | None = None

    def place(self, cells: np.ndarray, reach: np.ndarray) -> Self:
        """Say where the rows lie; return itself.

        Raises
        ------
        ValueError
            If the two do not belong to the rows, as in a file that is damaged.
        """
        if cells.shape != (len(self.embeddings_),) or reach.ndim != 2 or (reach < 0).any():
            raise ValueError(f"positions have shape {cells.shape}, reach {reach.shape}")
        if len(cells) and not 0 <= cells.min() <= cells.max() < reach.size:
            raise ValueError(f"positions name cells beyond {reach.shape}")
        self.cells_, self.reach_, self._lookup = cells.astype(np.int32), reach, None
        self._places = _row_and_column(self.cells_, reach.shape[1])
        return self

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the grid in which the cells are counted; None without places."""
        if self.cells_ is None:
            return None
        height, width = self.reach_.shape
        return height, width

    def places(self) -> dict[str, np.ndarray]:
        """Return the arguments of :meth:`place` by their names in a file; none without places."""
        return {} if self.cells_ is None else {"positions": self.cells_, "reach": self.reach_}

    def extended(self, rows: np.ndarray, cells: np.ndarray | None) -> Self:
        """Return a copy with further rows (n, D) and their cells (n,), if they have a place."""
        other = copy.copy(self)
        other.index_ = copy.deepcopy(self.index_)
        other.add(rows)
        if self.cells_ is not None:
            assert cells is not None
            other.place(np.concatenate([self.cells_, cells]), self.reach_)
        return other

    def taken(self, rows: slice | np.ndarray) -> Self:
        """Return a copy with these rows alone, in the same places; for a flat index."""
        other = copy.copy(self)
        other.embeddings_, other._fast_index = self.embeddings_[rows], None
        if self.cells_ is not None:
            other.place(self.cells_[rows], self.reach_)
        return other

    def search_patches(self, X: np.ndarray, k: int, E: Embeddings) -> tuple[np.ndarray, np.ndarray]:
        """Search for the patches X (Q, D) of images E, which are :func:`patch_rows` of them.

        As :meth:`search_near` at their places in the images, or without places as ``search``.
        """
        if (grid := self.grid) is None:
            return self.search(X, k)
        return self.search_near(X, k, patch_cells(E, grid))

    def search_near(
        self, X: np.ndarray, k: int, cells: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find for each query its nearest neighbours within the reach of its cell.

        Parameters
        ----------
        X : array of shape (Q, D), float32
        k : int
            At most as many as the reach was made for.
        cells : ndarray of shape (Q,), int32

        Returns
        -------
        distances : ndarray of shape (Q, k), float32
            Rooted, ascending.
        indices : ndarray of shape (Q, k), int64

        Notes
        -----
        Exact, by brute force over the rows near each square of 4 x 4 cells. The distances of all
        of them come from a product of matrices, relative to a query so that near rows keep their
        digits; those of the nearest ones are then computed from the differences.
        """
        height, width = self.reach_.shape
        row, column = _row_and_column(cells, width)
        reach = self.reach_.ravel()[cells]
        squares = -(-width // _SQUARE)
        square = (row // _SQUARE).astype(np.int64) * squares + column // _SQUARE
        key = reach.astype(np.int64) * (squares * -(-height // _SQUARE)) + square
        in_groups = np.argsort(key, kind="stable")
        indices = np.empty((len(X), k), np.int64)
        with one_blas_thread():
            for group in np.split(in_groups, np.flatnonzero(np.diff(key[in_groups])) + 1):
                if len(group):
                    place = row[group], column[group]
                    indices[group] = self._nearest(X[group], k, *place, int(reach[group[0]]))
        return self._rank(X, indices)

    def _nearest(
        self, X: np.ndarray, k: int, row: np.ndarray, column: np.ndarray, reach: int
    ) -> np.ndarray:
        """Find the rows (q, k) nearest to queries that lie near each other."""
        near_by = self._rows_around(row, column, reach)
        at_once = min(len(near_by), _BLOCK_ROWS)
        step = max(1, _VALUES // at_once)
        found = []
        for start in range(0, len(X), step):
            part = slice(start, start + step)
            origin = X[start].copy()
            Q = -2 * (X[part] - origin)
            sq, indices = np.empty((len(Q), 0), np.float32), np.empty((len(Q), 0), np.int64)
            for first in range(0, len(near_by), at_once):
                rows = near_by[first : first + at_once]
                C = self.embeddings_[rows]
                C -= origin
                sq_here = (
                    Q @ C.T
                )  # |q - x|^2 = |q|^2 - 2 q x + |x|^2, of which the first is left out
                sq_here += np.einsum("md,md->m", C, C)
                outside = np.abs(row[part, None] - self._places[0][rows]) > reach
                outside |= np.abs(column[part, None] - self._places[1][rows]) > reach
                np.copyto(sq_here, np.inf, where=outside)
                best = _smallest(sq_here, min(k, len(rows)))
                sq = np.concatenate([sq, np.take_along_axis(sq_here, best, axis=1)], axis=1)
                indices = np.concatenate([indices, rows[best]], axis=1)
            if indices.shape[1] > k:
                indices = np.take_along_axis(indices, _smallest(sq, k), axis=1)
            found.append(indices)
        return np.concatenate(found)

    def _rows_around(self, row: np.ndarray, column: np.ndarray, reach: int) -> np.ndarray:
        """Return the rows of the bank in the rectangle that holds the windows of all these."""
        if self._lookup is None:
            assert self.cells_ is not None
            starts = np.zeros(self.reach_.size + 1, np.int64)
            starts[1:] = np.bincount(self.cells_, minlength=self.reach_.size).cumsum()
            self._lookup = np.argsort(self.cells_, kind="stable"), starts
        by_cell, starts = self._lookup
        height, width = self.reach_.shape
        top, bottom = max(0, int(row.min()) - reach), min(height, int(row.max()) + reach + 1)
        left, right = max(0, int(column.min()) - reach), min(width, int(column.max()) + reach + 1)
        begin, end = (starts[np.arange(top, bottom) * width + side] for side in (left, right))
        return np.concatenate([by_cell[a:b] for a, b in zip(begin, end, strict=True)])


def _row_and_column(cells: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.divmod(cells, width)
    return row.astype(np.int16), column.astype(np.int16)  # half the bytes to compare


def _smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the columns (n, k) of the smallest values of each row, in any order."""
    if k == 1:
        return np.asarray(values.argmin(axis=1))[:, None]
    if k == values.shape[1]:
        return np.broadcast_to(np.arange(k), values.shape)
    return np.argpartition(values, k - 1, axis=1)[:, :k]
