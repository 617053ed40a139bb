"""Greedy k-centre, lazy and blocked: who is farthest from all centres, again and again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from anomalib_lite import _int8
from anomalib_lite._threads import workers

if TYPE_CHECKING:
    from anomalib_lite._on_device import DeviceRows

__all__ = ["greedy", "radius"]

# Rows compared with the new centres at once: small enough to stay in a core's cache.
_BLOCK_ROWS = 1024
# Farthest rows among which centres are picked before all the others are brought up to date.
_POOL_ROWS = 1024
# Products of a row with a centre below which the preparation of 8-bit products does not pay, and
# below which it does not pay to import torch for them.
_MANY, _VERY_MANY = 10**9, 10**11


def greedy(
    X: np.ndarray,
    n_samples: int,
    first: int,
    existing: np.ndarray | None,
    bar: tqdm[Any],
    device: str = "cpu",
    int8: bool | None = None,
) -> tuple[np.ndarray, float]:
    """Indices of ``n_samples`` rows of ``X`` (N, D), and the covering radius they leave.

    The first pick is ``first`` if there are no centres ``existing`` (M, D). ``int8`` says
    whether to use 8-bit products; by default where they pay.
    """
    picks = np.empty(n_samples, np.int64)
    with workers() as executor:
        rows = _rows(X, executor, len(X) * n_samples, device, int8)
        done = n_picked = 0
        if existing is None:
            picks[0] = first
            n_picked = 1
        else:
            rows.meet(existing)
        while True:
            rows.meet(X[picks[done:n_picked]])
            # Rounding leaves a centre some way from itself; it must never be picked again.
            rows.rule_out(picks[done:n_picked])
            bar.update(n_picked - done)
            done = n_picked
            if n_picked == n_samples:
                return picks, _radius(rows)
            n_picked = _pick_from_pool(rows, picks, n_picked)


def radius(X: np.ndarray, centers: np.ndarray, device: str = "cpu") -> float:
    """Largest distance from a row of ``X`` (N, D) to its nearest row of ``centers`` (M, D)."""
    with workers() as executor:
        rows = _rows(X, executor, len(X) * len(centers), device, None)
        rows.meet(centers)
        return _radius(rows)


def _rows(
    X: np.ndarray, executor: ThreadPoolExecutor, n_pairs: int, device: str, int8: bool | None
) -> _Rows | DeviceRows:
    if device != "cpu":
        from anomalib_lite._on_device import DeviceRows  # the only one who always needs torch

        return DeviceRows(X, device)
    if int8 is None:
        work = n_pairs * X.shape[1]
        int8 = work > _MANY and _int8.pays(work > _VERY_MANY) and _int8.can_hold(X)
    return (_Int8Rows if int8 else _Rows)(X, executor)


def _radius(rows: _Rows | DeviceRows) -> float:
    return float(np.sqrt(max(rows.farthest(_POOL_ROWS)[1].max(), np.float32(0))))


def _pick_from_pool(rows: _Rows | DeviceRows, picks: np.ndarray, n_picked: int) -> int:
    """Extend ``picks`` while the pool alone decides; return how many there are then."""
    pool, pool_sq, outside = rows.farthest(_POOL_ROWS)
    between = rows.sq_distances_between(pool)  # (P, P)
    first = n_picked
    while n_picked < len(picks):
        farthest = int(pool_sq.argmax())
        # The first pick is the farthest of all rows, even if it ties with one outside.
        # Where nothing but twins of centres is left, any order is as good.
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
    """All rows and, for each, the squared distance to its nearest centre so far."""

    def __init__(self, X: np.ndarray, executor: ThreadPoolExecutor) -> None:
        self.X, self.executor = X, executor
        # |x - c|^2 = |x|^2 + |c|^2 - 2 x.c cancels badly where norms are larger than
        # distances; centred data have the smallest norms.
        self.mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)  # (D,)
        self.sq_norms = np.empty(len(X), np.float32)  # of the centred rows
        self.sq_distances = np.full(len(X), np.inf, np.float32)
        self.each_block(len(X), self._norms)

    def meet(self, centers: np.ndarray) -> None:
        """Let every row know the new ``centers`` (M, D)."""
        for start in range(0, len(centers), _BLOCK_ROWS):
            c = centers[start : start + _BLOCK_ROWS] - self.mean  # (m, D)
            self.each_block(len(self.X), self._nearest, -2 * c.T, _sq_norms(c))

    def farthest(self, n: int) -> tuple[np.ndarray, np.ndarray, float]:
        """The ``n`` rows farthest from all centres, how far they are (squared), and a bound on
        all others. They come sorted by index: ties go to the lower, as in the plain greedy.
        """
        if n >= len(self.X):
            return np.arange(len(self.X)), self.sq_distances.copy(), -1.0
        order = np.argpartition(self.sq_distances, -n - 1)
        pool = np.sort(order[-n:])
        return pool, self.sq_distances[pool], float(self.sq_distances[order[-n - 1]])

    def sq_distances_between(self, indices: np.ndarray) -> np.ndarray:
        """(n, n)"""
        x = self.X[indices] - self.mean
        between = np.empty((len(x), len(x)), np.float32)

        def work(block: slice) -> None:
            between[block] = self._to_centers(x[block], -2 * x.T, self.sq_norms[indices])

        self.each_block(len(x), work, n_rows=256)
        return between

    def rule_out(self, picks: np.ndarray) -> None:
        """Never pick these rows again."""
        self.sq_distances[picks] = -1

    def each_block(self, n: int, work: Any, *args: Any, n_rows: int = _BLOCK_ROWS) -> None:
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

    def _to_centers(
        self, x: np.ndarray, minus_two_c: np.ndarray, c_sq_norms: np.ndarray
    ) -> np.ndarray:
        sq: np.ndarray = x @ minus_two_c
        sq += c_sq_norms
        sq += _sq_norms(x)[:, None]
        np.maximum(sq, 0, out=sq)
        return sq


class _Int8Rows(_Rows):
    """The same with 8-bit products: ``sq_distances`` are upper bounds, made exact where needed.

    Only the farthest rows matter. So every row meets every centre in 8-bit integers, which gives
    a certain upper bound and the centre that is probably nearest; for the few thousand rows with
    the largest bounds the distance to that centre makes the bound tight; and the rows of the
    pool are compared with all centres in float32.
    """

    def __init__(self, X: np.ndarray, executor: ThreadPoolExecutor) -> None:
        super().__init__(X, executor)
        self.frame = _int8.Frame(X)
        step = self.frame.smallest_step
        self.frame.make_room(float(np.ptp(self.sq_norms)) / 4, step)
        blocks = [slice(i, i + _BLOCK_ROWS) for i in range(0, len(X), _BLOCK_ROWS)]
        self.queries = _int8.Queries.join(
            executor.map(lambda b: self.frame.queries(self.frame.place(X[b])), blocks)
        )
        self.tiles: list[tuple[int, _int8.Items]] = []  # where each begins in centers
        self.centers = np.empty((0, X.shape[1]), np.float32)
        self.nearest = np.zeros(len(X), np.int64)  # probably; an index into centers
        self.tight = np.zeros(len(X), bool)  # the bound is the distance to ``nearest``

    def meet(self, centers: np.ndarray) -> None:
        for start in range(0, len(centers), _BLOCK_ROWS):
            c = centers[start : start + _BLOCK_ROWS]
            items = self.frame.items(self.frame.place(c))
            self.tiles.append((len(self.centers), items))
            self.each_block(len(self.X), self._meet_tile, len(self.centers), items)
            self.centers = np.concatenate([self.centers, c - self.mean])

    def _meet_tile(self, block: slice, base: int, items: _int8.Items) -> None:
        rows = self.queries.take(block)
        scores = _int8.products(rows.codes, items.codes)  # (B, m)
        best = scores.argmax(axis=1)
        score = scores[np.arange(len(best)), best] * (rows.steps * np.float32(items.step))
        score += np.float32(items.shift) - items.error(rows)
        upper = self.sq_norms[block] - 2 * score
        closer = upper < self.sq_distances[block]
        np.copyto(self.sq_distances[block], upper, where=closer)
        np.copyto(self.nearest[block], base + best, where=closer)
        self.tight[block] &= ~closer

    def farthest(self, n: int) -> tuple[np.ndarray, np.ndarray, float]:
        n = min(n, len(self.X))
        while True:
            self._tighten(min(8 * n, len(self.X)))
            pool, _, outside = super().farthest(n)
            exact = self._exact(pool)
            self.sq_distances[pool] = exact
            if exact.max() >= outside:
                return pool, exact, outside

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
        """Squared distances (n,) of some rows from all centres, in float32."""
        exact: np.ndarray = self.sq_distances[rows]  # no less, and mostly equal

        def work(block: slice) -> None:
            mine = self.queries.take(rows[block])
            for base, items in self.tiles:
                scores = _int8.products(mine.codes, items.codes)
                limit = _int8.limit((sq_norms[block] - exact[block]) / 2, mine, items)
                row, center = np.nonzero(scores >= limit[:, None])
                if len(row):
                    measured = self._measure(rows[block][row], base + center)
                    np.minimum.at(exact[block], row, measured)

        sq_norms = self.sq_norms[rows]
        self.each_block(len(rows), work, n_rows=512)
        return exact

    def _measure(self, rows: np.ndarray, centers: np.ndarray) -> np.ndarray:
        difference = self.X[rows] - self.mean
        difference -= self.centers[centers]
        return _sq_norms(difference)


def _sq_norms(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nd,nd->n", x, x))
