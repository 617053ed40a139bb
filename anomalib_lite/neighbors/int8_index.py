"""Find exact nearest neighbours by 8-bit products with a certified error."""

from __future__ import annotations

import numpy as np

from anomalib_lite._threads import workers
from anomalib_lite.neighbors.int8 import (
    QuantizationFrame,
    QuantizedItems,
    QuantizedQueries,
    limit,
    products,
)

__all__ = ["Int8Index"]

# Items and queries of a tile of the product, which stays in the cache.
_TILE_ITEMS = 1024
_TILE_QUERIES = 1024
_ENCODED_AT_ONCE = 128
# Rows of neighbouring norms that are sorted by range among themselves.
_SIMILAR_ROWS = 8 * _TILE_ITEMS
# Items of a group, of which only the best score is looked at first.
_GROUP = 32
# Open pairs that one thread keeps: if all rows are equal, every pair stays open.
_MOST_PAIRS = 1 << 21
# Values of the differences whose distances are computed at once.
_BLOCK_VALUES = 1 << 20


class Int8Index:
    """Search a bank whose rows are kept in 8-bit integers beside the rows themselves.

    Parameters
    ----------
    X : ndarray of shape (N, D), float32
        The bank; kept, not copied.
    """

    def __init__(self, X: np.ndarray) -> None:
        self.X = X
        self.frame = QuantizationFrame(X)
        steps, half_sq_norms = np.empty((2, len(X)), np.float32)
        blocks = [slice(i, i + _TILE_ITEMS) for i in range(0, len(X), _TILE_ITEMS)]

        def measure(block: slice) -> None:
            x = self.frame.transform(X[block])
            steps[block] = np.abs(x).max(axis=1) / 127
            half_sq_norms[block] = np.einsum("nd,nd->n", x, x) / 2

        with workers() as executor:
            list(executor.map(measure, blocks))
            # Rows of similar norm share a tile, so that their biases are small; among those, rows
            # of similar range, so that no row is rounded in steps too long for it.
            order = np.argsort(half_sq_norms, kind="stable")
            for start in range(0, len(X), _SIMILAR_ROWS):
                part = order[start : start + _SIMILAR_ROWS]
                part[:] = part[np.argsort(steps[part], kind="stable")]
            # In random order, since good neighbours found early rule out more of the others.
            tiles = [order[blocks[i]] for i in np.random.default_rng(0).permutation(len(blocks))]
            half_ranges = [np.ptp(half_sq_norms[tile]) / 2 for tile in tiles]
            self.frame.reserve_bias_columns(
                float(np.quantile(half_ranges, 0.9)), float(np.median(steps))
            )
            self.tiles: list[tuple[np.ndarray, QuantizedItems]] = list(
                executor.map(lambda t: (t, self.frame.items(self.frame.transform(X[t]))), tiles)
            )

    def search(self, Q: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the ``k`` nearest rows of the bank for each row of ``Q`` (n, D).

        Distances (n, k) are Euclidean (rooted), ascending, computed in float32 from the
        differences; indices (n, k) are int64. Indices are -1 for a query so large that its codes
        say nothing.
        """
        distances, indices = np.empty((len(Q), k), np.float32), np.empty((len(Q), k), np.int64)
        starts = range(0, len(Q), _TILE_QUERIES)
        blocks = [slice(start, min(start + _TILE_QUERIES, len(Q))) for start in starts]

        def work(block: slice) -> None:
            search = _Search(self, Q[block], k)
            search.run()
            np.sqrt(search.sq_distances, out=distances[block])
            indices[block] = search.rows

        with workers() as executor:
            list(executor.map(work, blocks))
        return distances, indices


class _Search:
    """Search the bank for one block of queries, tile by tile."""

    def __init__(self, index: Int8Index, Q: np.ndarray, k: int) -> None:
        self.index, self.Q, self.k = index, Q, k
        parts = [Q[i : i + _ENCODED_AT_ONCE] for i in range(0, len(Q), _ENCODED_AT_ONCE)]
        self.queries = QuantizedQueries.join(
            index.frame.queries(index.frame.transform(q)) for q in parts
        )
        self.sq_norms = self.queries.norms**2
        # Certified lower bounds of the k best scores so far, the k-th best first.
        self.best = np.full((k, len(Q)), -np.inf, np.float32)
        # Pairs that the bounds leave open: query, row, score, error.
        self.pairs: list[tuple[np.ndarray, ...]] = []
        # The k nearest of the rows measured so far, and their exact squared distances.
        self.rows = np.full((len(Q), k), -1, np.int64)
        self.sq_distances = np.full((len(Q), k), np.inf, np.float32)

    def run(self) -> None:
        """Visit all tiles; then ``rows`` and ``sq_distances`` hold the answer."""
        for rows, items in self.index.tiles:
            self._look(products(items.codes, self.queries.codes), rows, items)  # (m, n)
            if sum(len(query) for query, *_ in self.pairs) > _MOST_PAIRS:
                self._settle()
        self._settle()

    def _look(self, scores: np.ndarray, rows: np.ndarray, items: QuantizedItems) -> None:
        """Add the items of a tile that may be among the k nearest to ``pairs``."""
        n_groups = len(rows) // _GROUP
        n_grouped = n_groups * _GROUP
        groups = scores[:n_grouped].reshape(n_groups, _GROUP, scores.shape[1]).max(axis=1)
        if n_grouped < len(rows):
            groups = np.concatenate([groups, scores[n_grouped:]])  # (g, n)
        highest = groups.max(axis=0)
        error = items.error(self.queries)
        scale, shift = self.queries.steps * np.float32(items.step), np.float32(items.shift)
        self._raise_bounds(groups, highest, scale, shift - error)
        lowest = limit(self.best[0], self.queries, items)
        hot = np.flatnonzero(highest >= lowest)  # queries to which anything here may be near
        group, query = np.nonzero(groups[:, hot] >= lowest[hot])
        query = hot[query]
        item = group[:, None] * _GROUP + np.arange(_GROUP)
        if n_grouped < len(rows):
            single = group >= n_groups
            item[single] = (group[single] - n_groups + n_grouped)[:, None]
        found = scores[item, query[:, None]]
        open_ = found >= lowest[query][:, None]
        if n_grouped < len(rows):
            open_[single, 1:] = False
        query = np.repeat(query, np.count_nonzero(open_, axis=1))
        score = found[open_] * scale[query] + shift
        self.pairs.append((query, rows[item[open_]], score, error[query]))

    def _raise_bounds(
        self, groups: np.ndarray, highest: np.ndarray, scale: np.ndarray, offset: np.ndarray
    ) -> None:
        # The best of each group are different items, so bounds of theirs bound the k best.
        lower = highest * scale + offset
        better = np.flatnonzero(lower > self.best[0])
        if self.k == 1:
            self.best[0, better] = lower[better]
            return
        lower = groups[:, better] * scale[better] + offset[better]
        both = np.concatenate([self.best[:, better], lower])
        self.best[:, better] = np.partition(both, -self.k, axis=0)[-self.k :]

    def _settle(self) -> None:
        """Measure the pairs that are still open, and empty ``pairs``."""
        if not self.pairs:
            return
        query, row, score, error = (np.concatenate(p) for p in zip(*self.pairs, strict=True))
        self.pairs.clear()
        open_ = score + error >= self.best[0, query]
        query, row, score, error = query[open_], row[open_], score[open_], error[open_]
        # The most promising first: their exact distances rule out most of the others.
        highest, lowest = score.max(initial=-np.inf), score.min(initial=np.inf)
        order = np.argsort(query - (score - lowest) / max(highest - lowest, 1e-30) * 0.9)
        query, row, score, error = query[order], row[order], score[order], error[order]
        first = np.arange(len(query)) - np.searchsorted(query, query) < self.k
        self._measure(query[first], row[first])
        rest = ~first & (score + error >= self._least()[query])
        self._measure(query[rest], row[rest])
        self.best[0] = self._least()

    def _least(self) -> np.ndarray:
        """Return a lower bound (n,) of the score that an item needs to be among the k nearest."""
        farthest = self.sq_distances[:, -1]
        rounding = 1e-5 * (self.sq_norms + np.where(np.isinf(farthest), 0, farthest))
        return np.asarray(np.maximum(self.best[0], (self.sq_norms - farthest) / 2 - rounding))

    def _measure(self, query: np.ndarray, row: np.ndarray) -> None:
        """Merge pairs, sorted by query, into the k nearest so far."""
        if len(query) == 0:
            return
        sq_distances = np.empty(len(query), np.float32)
        step = max(1, _BLOCK_VALUES // self.Q.shape[1])
        for start in range(0, len(query), step):
            pairs = slice(start, start + step)
            difference = self.index.X[row[pairs]]
            difference -= self.Q[query[pairs]]
            np.einsum("pd,pd->p", difference, difference, out=sq_distances[pairs])
        met, first, count = np.unique(query, return_index=True, return_counts=True)
        place = np.arange(len(query)) - np.repeat(first, count) + self.k
        line = np.repeat(np.arange(len(met)), count)
        all_sq = np.full((len(met), self.k + count.max()), np.inf, np.float32)
        all_rows = np.full(all_sq.shape, -1)
        all_sq[:, : self.k], all_rows[:, : self.k] = self.sq_distances[met], self.rows[met]
        all_sq[line, place], all_rows[line, place] = sq_distances, row
        nearest = np.argsort(all_sq, axis=1, kind="stable")[:, : self.k]
        self.sq_distances[met] = np.take_along_axis(all_sq, nearest, 1)
        self.rows[met] = np.take_along_axis(all_rows, nearest, 1)
