"""Embeddings (N, D) -> indices of the rows to keep.

The rows kept are centres. The *covering radius* is the largest distance from any row to its nearest
centre: how well the few represent the many. Greedy k-centre takes
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

from dataclasses import dataclass

import numpy as np
from sklearn.utils import check_random_state
from tqdm import tqdm

from anomalib_lite._validation import check_choice, check_int, check_matrix, check_number
from anomalib_lite.coreset import _k_center
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.neighbors.faiss_index import faiss

__all__ = [
    "Coreset",
    "check_device",
    "coreset_size",
    "covering_radius",
    "greedy_k_center",
    "select_coreset",
]


@dataclass(frozen=True)
class Coreset:
    """Rows that were kept, and how well they cover the others.

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
    device: str = "cpu",
    progress: bool = False,
) -> Coreset:
    """Choose ``n_samples`` rows of ``X`` that represent all rows.

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
        Centres that exist already: rows near them are not picked, and the covering radius counts
        them. Only with ``"greedy"``.
    device : str, default="cpu"
        Device of torch on which ``"greedy"`` computes, such as ``"cuda"``; ``X`` must fit there.
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
    check_device(device, where)
    random = check_random_state(random_state)
    return METHODS[method](X, n_samples, random, existing, device, progress)


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
        Centres that exist already. The first pick is then the row farthest from them.
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
    """Return the largest Euclidean distance from a row of ``X`` to its nearest of ``centers``.

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
    return _k_center.radius(X, centers)


def check_device(device: str, where: str) -> None:
    """Raise InvalidValueError unless ``device`` is "cpu" or a GPU of this machine."""
    if device == "cpu":
        return
    from anomalib_lite._device import resolve_device  # it needs torch

    if device == "auto" or resolve_device(device, where).type == "mps":
        raise InvalidValueError(
            f"{where}: device must be 'cpu', 'cuda' or such as 'cuda:1', got {device!r}."
        )


def coreset_size(amount: float | int, n: int, name: str, where: str) -> int:
    """Convert a share (float) or a number (int) of ``n`` rows to a number of rows."""
    if isinstance(amount, int | np.integer) and not isinstance(amount, bool):
        return check_int(name, amount, where, low=1, high=n)
    size = round(check_number(name, amount, where, "(0, 1]") * n)
    if size < 1:
        raise InvalidValueError(
            f"{where}: {name}={amount:g} of {n} patches keeps none. Ask for at least {1 / n:.2g}."
        )
    return size


def _greedy(
    X: np.ndarray,
    n_samples: int,
    random: np.random.RandomState,
    existing: np.ndarray | None,
    device: str,
    progress: bool,
) -> Coreset:
    first = int(random.randint(len(X))) if existing is None else -1
    with tqdm(
        total=n_samples,
        desc="coreset",
        unit="patch",
        leave=False,
        disable=None if progress else True,
    ) as bar:
        return Coreset(*_k_center.greedy(X, n_samples, first, existing, bar, device))


def _random(
    X: np.ndarray,
    n_samples: int,
    random: np.random.RandomState,
    existing: np.ndarray | None,
    device: str,
    progress: bool,
) -> Coreset:
    indices = random.permutation(len(X))[:n_samples]
    return Coreset(indices, covering_radius(X, X[indices]))


def _kmeans(
    X: np.ndarray,
    n_samples: int,
    random: np.random.RandomState,
    existing: np.ndarray | None,
    device: str,
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
