"""Greedy k-centre, lazy and blocked: pick the row farthest from all centres, again and again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from anomalib_lite._threads import workers
from anomalib_lite.neighbors import int8 as int8_products

if TYPE_CHECKING:
    from anomalib_lite.neighbors.torch_index import TorchRows

__all__ = ["greedy", "radius"]

# Rows compared with the new centres at once: small enough to stay in a core's cache.
_BLOCK_ROWS = 1024
# Rows of the pool: the farthest rows, from which centres are picked before the others are updated.
_POOL_ROWS = 1024
# With 8-bit products: as many pools of rows get tight bounds, and a row is updated only if its
# bound (squared) reaches this share of the smallest tight one.
_TIGHT_POOLS, _WAITING = 4, 0.9
# Multiplications (rows x centres x dimensions) from which 8-bit products save more time than their
# preparation takes, and from which they save more than importing torch takes.
_MANY, _VERY_MANY = 3 * 10**10, 10**12


def greedy(
    X: np.ndarray,
    n_samples: int,
    first: int,
    existing: np.ndarray | None,
    bar: tqdm[Any],
    device: str = "cpu",
    int8: bool | None = None,
) -> tuple[np.ndarray, float]:
    """Pick ``n_samples`` rows of ``X`` (N, D); return their indices and the covering radius.

    The first pick is ``first``, unless there are centres ``existing`` (M, D) already. ``int8``
    says whether to use 8-bit products; by default they are used if they save time.
    """
    kind = _kind_of_rows(X, n_samples, int8)
    try:
        return _picks(kind, X, n_samples, first, existing, bar, device)
    except int8_products.WrongProductError:
        bar.reset()
        return _picks(_Rows, X, n_samples, first, existing, bar, device)


def radius(X: np.ndarray, centers: np.ndarray) -> float:
    """Return the largest distance from a row of ``X`` (N, D) to its nearest centre (M, D)."""
    kind = _kind_of_rows(X, len(centers))
    try:
        return _radius_around(kind, X, centers)
    except int8_products.WrongProductError:
        return _radius_around(_Rows, X, centers)


def _picks(
    kind: type[_Rows],
    X: np.ndarray,
    n_samples: int,
    first: int,
    existing: np.ndarray | None,
    bar: tqdm[Any],
    device: str,
) -> tuple[np.ndarray, float]:
    picks = np.empty(n_samples, np.int64)
    with workers() as executor:
        rows = _on(device, X) if device != "cpu" else kind(X, executor)
        done = n_picked = 0
        if existing is None:
            picks[0] = first
            n_picked = 1
        else:
            rows.update(existing)
        while True:
            rows.update(X[picks[done:n_picked]])
            # Rounding leaves a centre some way from itself; it must never be picked again.
            rows.exclude(picks[done:n_picked])
            bar.update(n_picked - done)
            done = n_picked
            if n_picked == n_samples:
                return picks, _radius(rows)
            n_picked = _pick_from_pool(rows, picks, n_picked)


def _radius_around(kind: type[_Rows], X: np.ndarray, centers: np.ndarray) -> float:
    with workers() as executor:
        rows = kind(X, executor)
        rows.update(centers)
        return _radius(rows)


def _kind_of_rows(X: np.ndarray, n_centers: int, int8: bool | None = None) -> type[_Rows]:
    """Choose rows with 8-bit products or without.

    Call it before :func:`workers`, which limits the threads of torch only if torch is loaded.
    """
    if int8 is None:
        work = X.size * n_centers
        int8 = work > _MANY and int8_products.worthwhile(work > _VERY_MANY)
    return _Int8Rows if int8 else _Rows


def _on(device: str, X: np.ndarray) -> TorchRows:
    from anomalib_lite.neighbors.torch_index import (  # the only one who always needs torch
        TorchRows,
    )

    return TorchRows(X, device)


def _radius(rows: _Rows | TorchRows) -> float:
    return float(np.sqrt(max(rows.farthest(_POOL_ROWS)[1].max(), np.float32(0))))


def _pick_from_pool(rows: _Rows | TorchRows, picks: np.ndarray, n_picked: int) -> int:
    """Extend ``picks`` as long as the pool alone decides; return their new number."""
    pool, pool_sq, outside = rows.farthest(_POOL_ROWS)
    between = rows.sq_distances_between(pool)  # (P, P)
    first = n_picked
    while n_picked < len(picks):
        farthest = int(pool_sq.argmax())
        # The first pick is the farthest of all rows, even if it ties with one outside.
        # If only copies of centres are left, any order is right.
        if n_picked > first and pool_sq[farthest] <= outside and outside > 0:
            break
        if pool_sq[farthest] < 0:
            break
        picks[n_picked] = pool[farthest]
        n_picked += 1
        np.minimum(pool_sq, between[farthest], out=pool_sq)
        pool_sq[farthest] = -1
    return n_picked


class _Rows:
    """All rows, each with the squared distance to its nearest centre so far."""

    def __init__(self, X: np.ndarray, executor: ThreadPoolExecutor) -> None:
        self.X, self.executor = X, executor
        # |x - c|^2 = |x|^2 + |c|^2 - 2 x.c cancels badly where norms are larger than
        # distances; centred data have the smallest norms.
        self.mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)  # (D,)
        self.sq_norms = np.empty(len(X), np.float32)  # of the centred rows
        self.sq_distances = np.full(len(X), np.inf, np.float32)
        self.each_block(len(X), self._norms)

    def update(self, centers: np.ndarray) -> None:
        """Update each row's distance to its nearest centre with new ``centers`` (M, D)."""
        for start in range(0, len(centers), _BLOCK_ROWS):
            c = centers[start : start + _BLOCK_ROWS] - self.mean  # (m, D)
            self.each_block(len(self.X), self._nearest, -2 * c.T, _sq_norms(c))

    def farthest(self, n: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the ``n`` farthest rows, their squared distances, and a bound on the others.

        Rows are sorted by index: the lower one wins a tie, as in the plain greedy.
        """
        if n >= len(self.X):
            return np.arange(len(self.X)), self.sq_distances.copy(), -1.0
        order = np.argpartition(self.sq_distances, -n - 1)
        pool = np.sort(order[-n:])
        return pool, self.sq_distances[pool], float(self.sq_distances[order[-n - 1]])

    def sq_distances_between(self, indices: np.ndarray) -> np.ndarray:
        """Compute squared distances (n, n) between some rows."""
        x = self.X[indices] - self.mean
        minus_two_x, sq_norms = -2 * x.T, self.sq_norms[indices]
        between = np.empty((len(x), len(x)), np.float32)

        def work(block: slice) -> None:
            sq = x[block] @ minus_two_x
            sq += sq_norms
            sq += sq_norms[block, None]
            np.maximum(sq, 0, out=between[block])

        self.each_block(len(x), work, n_rows=256)
        return between

    def exclude(self, picks: np.ndarray) -> None:
        """Exclude rows from later picks."""
        self.sq_distances[picks] = -1

    def each_block(self, n: int, work: Any, *args: Any, n_rows: int = _BLOCK_ROWS) -> None:
        """Do the work on blocks of ``n`` rows in threads; errors are raised here."""
        blocks = [slice(start, min(start + n_rows, n)) for start in range(0, n, n_rows)]
        for _ in self.executor.map(lambda block: work(block, *args), blocks):
            pass

    def _norms(self, block: slice) -> None:
        self.sq_norms[block] = _sq_norms(self.X[block] - self.mean)

    def _nearest(self, block: slice, minus_two_c: np.ndarray, c_sq_norms: np.ndarray) -> None:
        sq = (self.X[block] - self.mean) @ minus_two_c  # (B, m)
        sq += c_sq_norms
        nearest = sq.min(axis=1)
        nearest += self.sq_norms[block]
        np.maximum(nearest, 0, out=nearest)  # rounding may go below
        np.minimum(self.sq_distances[block], nearest, out=self.sq_distances[block])


class _Int8Rows(_Rows):
    """Rows with 8-bit products: ``sq_distances`` are upper bounds, made exact if needed.

    Only the farthest rows matter. 8-bit products with new centres give each row a certified upper
    bound and the centre that is probably nearest. The few thousand rows with the largest bounds are
    measured against that centre, which makes their bounds tight. The rows of the pool are compared
    in float32 with all centres that the integers leave open. A row whose bound is well below those
    of the pool waits: its bound stays true whatever is picked.
    """

    def __init__(self, X: np.ndarray, executor: ThreadPoolExecutor) -> None:
        super().__init__(X, executor)
        self.frame = int8_products.QuantizationFrame(X)
        step = self.frame.smallest_step
        self.frame.reserve_bias_columns(float(np.ptp(self.sq_norms)) / 4, step)
        blocks = [slice(i, i + _BLOCK_ROWS) for i in range(0, len(X), _BLOCK_ROWS)]
        self.queries = int8_products.QuantizedQueries.join(
            executor.map(lambda b: self.frame.queries(self.frame.transform(X[b])), blocks)
        )
        self.centers = np.empty((0, X.shape[1]), np.float32)
        self.tiles: list[int8_products.QuantizedItems] = []  # the centers, _BLOCK_ROWS a tile
        self.floor = np.float32(np.inf)  # rows with smaller bounds wait
        self.n_met = np.zeros(len(X), np.int64)  # centers that a row was compared with
        self.nearest = np.zeros(len(X), np.int64)  # probably nearest; an index into centers
        self.tight = np.zeros(len(X), bool)  # the bound is the distance to ``nearest``

    def update(self, centers: np.ndarray) -> None:
        """Update the rows that do not wait; see ``_Rows.update``."""
        self.centers = np.concatenate([self.centers, centers - self.mean])
        del self.tiles[(len(self.centers) - len(centers)) // _BLOCK_ROWS :]  # one that was not full
        for start in range(len(self.tiles) * _BLOCK_ROWS, len(self.centers), _BLOCK_ROWS):
            self.tiles.append(
                self.frame.items(self.frame.rotate(self.centers[start : start + _BLOCK_ROWS]))
            )
        self._catch_up()

    def farthest(self, n: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the farthest rows with exact distances; see ``_Rows.farthest``."""
        n = min(n, len(self.X))
        n_tight = min(_TIGHT_POOLS * n, len(self.X))
        while True:
            least = np.partition(self.sq_distances, -n_tight)[-n_tight]
            if least < self.floor:
                self.floor = np.float32(_WAITING * least) if least > 0 else np.float32(-1)
                self._catch_up()
            self._tighten(n_tight)
            pool, _, outside = super().farthest(n)
            exact = self._exact(pool)
            self.sq_distances[pool] = exact
            if exact.max() >= outside:
                return pool, exact, outside

    def _catch_up(self) -> None:
        """Compare the rows that do not wait with the centres that they lack."""
        rows = np.flatnonzero((self.sq_distances >= self.floor) & (self.n_met < len(self.centers)))
        rows = rows[np.argsort(self.n_met[rows], kind="stable")]
        alike = np.split(rows, np.flatnonzero(np.diff(self.n_met[rows])) + 1)  # as far behind
        blocks = [g[i : i + _BLOCK_ROWS] for g in alike for i in range(0, len(g), _BLOCK_ROWS)]
        for _ in self.executor.map(self._update_from_tiles, blocks):
            pass

    def _update_from_tiles(self, rows: np.ndarray) -> None:
        queries, bound, nearest = (
            self.queries.take(rows),
            self.sq_distances[rows],
            self.nearest[rows],
        )
        first, met = divmod(int(self.n_met[rows[0]]), _BLOCK_ROWS)
        for i, items in enumerate(self.tiles[first:], start=first):
            scores = int8_products.products(queries.codes, items.codes[met:])  # (B, m)
            best = scores.argmax(axis=1)
            score = scores[np.arange(len(best)), best] * (queries.steps * np.float32(items.step))
            score += np.float32(items.shift) - items.error(queries)
            upper = self.sq_norms[rows] - 2 * score
            closer = upper < bound
            np.copyto(bound, upper, where=closer)
            np.copyto(nearest, i * _BLOCK_ROWS + met + best, where=closer)
            met = 0
        self.tight[rows] &= bound == self.sq_distances[rows]
        self.sq_distances[rows], self.nearest[rows] = bound, nearest
        self.n_met[rows] = len(self.centers)

    def _tighten(self, n: int) -> None:
        top = np.argpartition(self.sq_distances, -n)[-n:]
        top = top[~self.tight[top] & (self.sq_distances[top] >= 0)]

        def work(block: slice) -> None:
            rows = top[block]
            measured = self._measure(rows, self.nearest[rows])
            self.sq_distances[rows] = np.minimum(self.sq_distances[rows], measured)

        self.each_block(len(top), work)
        self.tight[top] = True

    def _exact(self, rows: np.ndarray) -> np.ndarray:
        """Compute squared distances (n,) of some rows to their nearest centre, in float32."""
        exact: np.ndarray = self.sq_distances[rows]  # no less, and mostly equal

        def work(block: slice) -> None:
            mine, bound = rows[block], exact[block]
            queries, sq_norms = self.queries.take(mine), self.sq_norms[mine]
            for i, items in enumerate(self.tiles):
                scores = int8_products.products(queries.codes, items.codes)
                lowest = int8_products.limit((sq_norms - bound) / 2, queries, items)
                # The integers say nothing about a row that does not fit.
                row, center = np.nonzero((scores >= lowest[:, None]) | ~queries.fits[:, None])
                if len(row):
                    np.minimum.at(bound, row, self._measure(mine[row], i * _BLOCK_ROWS + center))

        self.each_block(len(rows), work, n_rows=256)
        return exact

    def _measure(self, rows: np.ndarray, centers: np.ndarray) -> np.ndarray:
        difference = self.X[rows] - self.mean
        difference -= self.centers[centers]
        return _sq_norms(difference)


def _sq_norms(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nd,nd->n", x, x))
