"""Embeddings (N, D) -> indices of the rows to keep.

The rows kept are centres; the *covering radius* is the largest distance from any row to
its nearest centre, and says how well the few stand for the many. Greedy k-centre takes
the farthest row again and again; its radius is at most twice the best that any choice of
as many centres could reach [1]_.

References
----------
.. [1] Gonzalez, "Clustering to minimize the maximum intercluster distance", Theoretical
   Computer Science 38, 1985.
.. [2] Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022,
   Algorithm 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import faiss
import numpy as np
from sklearn.utils import check_random_state
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from anomalib_lite._validation import check_choice, check_int, check_matrix
from anomalib_lite.errors import InvalidValueError

__all__ = ["Coreset", "covering_radius", "greedy_k_center", "select_coreset"]

# Rows compared with the new centres at once: small enough to stay in a core's cache.
_BLOCK_ROWS = 2048
# Farthest rows among which centres are picked before all the others are brought up to date.
_POOL_ROWS = 1024


@dataclass(frozen=True)
class Coreset:
    """The rows that were kept, and how well they cover all the others.

    Attributes
    ----------
    indices : ndarray of shape (n_samples,), int64
        Rows of the input, in the order in which they were picked; no row twice.
    covering_radius : float
        Largest Euclidean distance from a row to its nearest kept row.
    """

    indices: np.ndarray
    covering_radius: float


def select_coreset(
    X: np.ndarray,
    n_samples: int,
    *,
    method: str = "greedy",
    random_state: int | np.random.RandomState | None = None,
    existing: np.ndarray | None = None,
    progress: bool = False,
) -> Coreset:
    """Choose ``n_samples`` rows of ``X`` that stand for all of it.

    Parameters
    ----------
    X : array of shape (N, D), float32
        Embeddings, finite.
    n_samples : int
        Rows to keep, 1 to N.
    method : {"greedy", "random", "kmeans"}, default="greedy"
        ``"greedy"`` is the k-centre of PatchCore and covers best. ``"random"`` costs nothing
        and follows density. ``"kmeans"`` keeps the row nearest to each of ``n_samples``
        k-means centres (FAISS, 20 iterations); where two centres share a nearest row, rows
        chosen at random fill up the number.
    random_state : int, RandomState or None
        Seed of the first centre, of the random choice, and of k-means.
    existing : array of shape (M, D), float32, optional
        Centres that are already there: rows near them need not be picked, and the covering
        radius counts them. Only with ``"greedy"``.
    progress : bool, default=False
        Show a progress bar (only in a terminal).

    Returns
    -------
    Coreset

    Raises
    ------
    InvalidValueError
        For an unknown method, ``n_samples`` outside [1, N], or embeddings that are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.float32([[0, 0], [1, 0], [0, 1], [9, 9]])
    >>> coreset = select_coreset(X, 2, random_state=0)
    >>> sorted(coreset.indices.tolist()), coreset.covering_radius
    ([0, 3], 1.0)
    """
    where = "select_coreset"
    check_choice("method", method, METHODS, where)
    X = check_matrix("X", X, where)
    check_int("n_samples", n_samples, where, low=1, high=len(X))
    if existing is not None:
        if method != "greedy":
            raise InvalidValueError(
                f"{where}: existing centres need method='greedy', got {method!r}."
            )
        existing = check_matrix("existing", existing, where, n_features=X.shape[1])
    random = check_random_state(random_state)
    return METHODS[method](X, n_samples, random, existing, progress)


def greedy_k_center(
    X: np.ndarray,
    n_samples: int,
    *,
    random_state: int | np.random.RandomState | None = None,
    existing: np.ndarray | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Pick rows of ``X`` one by one, each the farthest from all picked before.

    Parameters
    ----------
    X : array of shape (N, D), float32
        Embeddings, finite.
    n_samples : int
        Rows to pick, 1 to N.
    random_state : int, RandomState or None
        Seed of the first centre, which is part of the result.
    existing : array of shape (M, D), float32, optional
        Centres that are already there. The first pick is then the row farthest from them.
    progress : bool, default=False
        Show a progress bar (only in a terminal).

    Returns
    -------
    ndarray of shape (n_samples,), int64
        Indices in the order of the picks. :func:`select_coreset` gives the covering radius
        with them.

    Raises
    ------
    InvalidValueError
        For ``n_samples`` outside [1, N], or embeddings that are not finite.

    Notes
    -----
    The picks are those of the plain greedy (Algorithm 1 of [2]_ without its random
    projection), which after each pick compares every row with the new centre. That is bound
    by memory, so this one is lazy and blocked: a row's distance to its nearest centre can
    only fall, so the farthest ``P`` rows (the pool) alone decide the next picks for as long as
    the pool's farthest row is farther than the farthest row outside was when the pool was
    taken. Then all rows meet all centres picked since in one blocked matrix product, whose
    row-wise minimum is taken while the block is in the cache. Rows nearer to each other than
    float32 can tell apart may be picked in another order.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.float32([[0], [1], [5], [9]])
    >>> greedy_k_center(X, 3, random_state=0).tolist()
    [0, 3, 2]
    """
    return select_coreset(
        X,
        n_samples,
        random_state=random_state,
        existing=existing,
        progress=progress,
    ).indices


def covering_radius(X: np.ndarray, centers: np.ndarray) -> float:
    """Largest Euclidean distance from a row of ``X`` to its nearest row of ``centers``.

    Parameters
    ----------
    X : array of shape (N, D), float32
    centers : array of shape (M, D), float32

    Returns
    -------
    float

    Raises
    ------
    InvalidValueError
        If the arrays are not finite or have different numbers of columns.

    Examples
    --------
    >>> import numpy as np
    >>> covering_radius(np.float32([[0, 0], [3, 4]]), np.float32([[0, 0]]))
    5.0
    """
    X = check_matrix("X", X, "covering_radius")
    centers = check_matrix("centers", centers, "covering_radius", n_features=X.shape[1])
    with _workers() as executor:
        rows = _Rows(X, executor)
        rows.meet(centers)
        return rows.radius()


@dataclass
class _Rows:
    """All rows and, for each, the squared distance to its nearest centre so far."""

    X: np.ndarray  # (N, D)
    executor: ThreadPoolExecutor
    mean: np.ndarray = field(init=False)  # (D,)
    sq_norms: np.ndarray = field(init=False)  # (N,), of the centred rows
    sq_distances: np.ndarray = field(init=False)  # (N,)

    def __post_init__(self) -> None:
        # |x - c|^2 = |x|^2 + |c|^2 - 2 x.c cancels badly where norms are larger than
        # distances; centred data have the smallest norms.
        self.mean = self.X.mean(axis=0, dtype=np.float64).astype(np.float32)
        self.sq_norms = np.empty(len(self.X), np.float32)
        self.sq_distances = np.full(len(self.X), np.inf, np.float32)
        self._each_block(self._norms)

    def _each_block(self, work: object, *args: object) -> None:
        starts = range(0, len(self.X), _BLOCK_ROWS)
        blocks = [slice(start, start + _BLOCK_ROWS) for start in starts]
        for _ in self.executor.map(lambda block: work(block, *args), blocks):  # type: ignore[operator]
            pass

    def _norms(self, block: slice) -> None:
        x = self.X[block] - self.mean
        self.sq_norms[block] = np.einsum("nd,nd->n", x, x)

    def meet(self, centers: np.ndarray) -> None:
        """Let every row know the new ``centers`` (M, D)."""
        for start in range(0, len(centers), _BLOCK_ROWS):
            c = centers[start : start + _BLOCK_ROWS] - self.mean  # (m, D)
            self._each_block(self._nearest, -2 * c.T, np.einsum("md,md->m", c, c))

    def _nearest(self, block: slice, minus_two_c: np.ndarray, c_sq_norms: np.ndarray) -> None:
        sq = (self.X[block] - self.mean) @ minus_two_c  # (B, m)
        sq += c_sq_norms
        nearest = sq.min(axis=1)
        nearest += self.sq_norms[block]
        np.maximum(nearest, 0, out=nearest)  # rounding may go below
        np.minimum(self.sq_distances[block], nearest, out=self.sq_distances[block])

    def radius(self) -> float:
        return float(np.sqrt(max(self.sq_distances.max(), np.float32(0))))


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """One thread a core, each with a BLAS of one thread.

    Blocks are then centred, multiplied and reduced in parallel; a BLAS of many threads would
    leave all but the product to one core.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(n_cores) as executor:
        yield executor


def _greedy(
    X: np.ndarray,
    n_samples: int,
    random: np.random.RandomState,
    existing: np.ndarray | None,
    progress: bool,
) -> Coreset:
    picks = np.empty(n_samples, np.int64)
    with (
        _workers() as executor,
        tqdm(
            total=n_samples,
            desc="coreset",
            unit="patch",
            leave=False,
            disable=None if progress else True,
        ) as bar,
    ):
        rows = _Rows(X, executor)
        done = n_picked = 0
        if existing is None:
            picks[0] = random.randint(len(X))
            n_picked = 1
        else:
            rows.meet(existing)
        while True:
            rows.meet(X[picks[done:n_picked]])
            # Rounding leaves a centre some way from itself; it must never be picked again.
            rows.sq_distances[picks[done:n_picked]] = -1
            bar.update(n_picked - done)
            done = n_picked
            if n_picked == n_samples:
                return Coreset(picks, rows.radius())
            n_picked = _pick_from_pool(rows, picks, n_picked)


def _pick_from_pool(rows: _Rows, picks: np.ndarray, n_picked: int) -> int:
    """Extend ``picks`` while the pool alone decides; return how many there are then."""
    sq_distances = rows.sq_distances
    if len(sq_distances) > _POOL_ROWS:
        order = np.argpartition(sq_distances, -_POOL_ROWS - 1)
        pool, outside = order[-_POOL_ROWS:], sq_distances[order[-_POOL_ROWS - 1]]
    else:
        pool, outside = np.arange(len(sq_distances)), np.float32(-1)
    pool = np.sort(pool)  # ties go to the lower index, as in the plain greedy
    x = rows.X[pool] - rows.mean  # (P, D)
    sq_norms, pool_sq = rows.sq_norms[pool], sq_distances[pool]
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
        sq = x @ (-2 * x[farthest])  # (P,)
        sq += sq_norms
        sq += sq_norms[farthest]
        np.maximum(sq, 0, out=sq)
        np.minimum(pool_sq, sq, out=pool_sq)
        pool_sq[farthest] = -1
    return n_picked


def _random(
    X: np.ndarray,
    n_samples: int,
    random: np.random.RandomState,
    existing: np.ndarray | None,
    progress: bool,
) -> Coreset:
    indices = random.permutation(len(X))[:n_samples]
    return Coreset(indices, covering_radius(X, X[indices]))


def _kmeans(
    X: np.ndarray,
    n_samples: int,
    random: np.random.RandomState,
    existing: np.ndarray | None,
    progress: bool,
) -> Coreset:
    kmeans = faiss.Kmeans(
        X.shape[1],
        n_samples,
        niter=20,
        seed=int(random.randint(2**31 - 1)),
        # FAISS warns on stdout below 39 rows a centre; a coreset has fewer by design.
        min_points_per_centroid=1,
    )
    kmeans.train(X)
    _, nearest = faiss.knn(np.asarray(kmeans.centroids), X, 1)
    # Two centres may share a nearest row: keep it once, and fill up with others at random.
    indices = np.unique(nearest)
    others = random.permutation(np.setdiff1d(np.arange(len(X)), indices))
    indices = np.concatenate([indices, others[: n_samples - len(indices)]])
    return Coreset(indices, covering_radius(X, X[indices]))


METHODS = {"greedy": _greedy, "random": _random, "kmeans": _kmeans}
