"""What a detector keeps of embeddings that pass by: all patches, or a coreset of each shard."""

from __future__ import annotations

import copy
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from anomalib_lite.coreset import select_coreset
from anomalib_lite.embeddings import Embeddings, rows_of
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.gaussian import Moments

__all__ = ["Collector", "PatchCollector", "Plan", "plan_patches"]

# Patches of a shard: enough to choose among, and few enough to be work for many workers.
_SHARD_ROWS = 65_536
# What choosing a coreset takes whatever the number of rows: blocks of products, pools, threads.
_FIXED_BYTES = 64 * 2**20
# More rows than the first image's size foretells, where images are not all of one size.
_SLACK = 1.1


class Collector(ABC):
    """What is kept of a stream of embeddings until the detector learns from it.

    A detector makes an empty one; each shard of images is put into a copy of that (perhaps in
    another process), and these are merged in the order of the shards. So the outcome depends on
    the shards, which are fixed, and not on who computed them. A detector that needs running
    moments alone adds and merges those.
    """

    images_per_shard: int = sys.maxsize  # whose embeddings are in memory at a time
    channels: np.ndarray | None = None  # of an embedding that are wanted; None for all

    def of(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> Self:
        """One like this with one shard in it; the arguments are those of :meth:`add`."""
        shard = copy.copy(self)
        shard.add(E, position, existing)
        return shard

    @abstractmethod
    def add(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> None:
        """Take in one shard: its embeddings, its first image's position, what is known already."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what another collector has of the images that follow."""


class PatchCollector(Collector):
    """Patches of the images seen: all of them, or a coreset of each shard.

    Parameters
    ----------
    n_features : int
    method : str
        How a coreset is chosen; see :func:`~anomalib_lite.coreset.select_coreset`.
    ratio : float
        Share of the patches that a coreset keeps.
    seed : int
    plan : Plan, optional
        Without one, all patches are kept.

    Attributes
    ----------
    rows : ndarray of shape (n, D), float32
    thinned : bool
        Whether they are coresets, of ``ratio`` of the patches each, or all patches.
    n_seen : int
        Patches that have passed.
    radius : float
        Each of them is at most so far from one of ``rows``, or from one that existed.
    """

    def __init__(
        self, n_features: int, method: str, ratio: float, seed: int = 0, plan: Plan | None = None
    ) -> None:
        self.rows = np.empty((0, n_features), np.float32)
        self.n_seen, self.radius = 0, 0.0
        self.method, self.ratio, self.seed = method, ratio, seed
        self.thinned, self.capacity = False, sys.maxsize
        if plan is not None:
            self.thinned, self.capacity = plan.thin, plan.capacity
            self.images_per_shard = plan.images_per_shard
        self._room = self.rows  # (capacity, D), whose first rows are ``rows``

    def add(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> None:
        """Keep the shard's patches, or a coreset of them."""
        self.rows = rows_of(E)
        self.n_seen = len(self.rows)
        self.seed = (self.seed + position) % 2**32  # as if the shards were drawn one by one
        if self.thinned:
            self.thinned = False
            self.rows = self.rows[self._thin(existing)]

    def merge(self, other: Self) -> None:
        """Append the rows of another; if all are too many, thin both out, once and for all."""
        if len(self.rows) == 0 and self.capacity == sys.maxsize:
            self.rows = other.rows  # all there is: no copy
        else:
            if not self.thinned and len(self.rows) + len(other.rows) > self.capacity:
                self._compact(self._thin())
            rows = other.rows[other._thin()] if self.thinned and not other.thinned else other.rows
            self._append(rows)
        self.n_seen += other.n_seen
        self.radius = max(self.radius, other.radius)

    def _thin(self, existing: np.ndarray | None = None) -> np.ndarray:
        """Choose the coreset of all rows; its indices, in the order of the rows."""
        self.thinned = True
        if len(self.rows) == 0:
            return np.empty(0, np.int64)
        kept = select_coreset(
            self.rows,
            max(1, round(self.ratio * len(self.rows))),
            method=self.method,
            random_state=self.seed,
            existing=existing if self.method == "greedy" else None,
        )
        self.radius = kept.covering_radius
        return np.sort(kept.indices)

    def _compact(self, indices: np.ndarray) -> None:
        for start in range(0, len(indices), 4096):  # ascending, so no row is needed any more
            block = indices[start : start + 4096]
            self._room[start : start + len(block)] = self._room[block]
        self.rows = self._room[: len(indices)]

    def _append(self, rows: np.ndarray) -> None:
        n = len(self.rows) + len(rows)
        if n > self.capacity:
            raise InvalidValueError(
                f"PatchCore: memory_budget has room for {self.capacity:,} patches, which is less "
                f"than coreset_ratio={self.ratio:g} keeps of the {self.n_seen:,} that have come "
                "so far and those that follow. Raise memory_budget or lower coreset_ratio."
            )
        if n > len(self._room):
            # Memory that is never written to is never taken: room for all that may come.
            bounded = self.capacity < sys.maxsize
            size = self.capacity if bounded else max(n, 2 * len(self._room))
            self._room = np.empty((size, rows.shape[1]), np.float32)
            self._room[: len(self.rows)] = self.rows
        self._room[len(self.rows) : n] = rows
        self.rows = self._room[:n]


@dataclass(frozen=True)
class Plan:
    """How a budget of memory is spent.

    Attributes
    ----------
    images_per_shard : int
        Images whose embeddings are in memory at a time.
    thin : bool
        Whether each shard is thinned out at once, since all patches would not fit.
    capacity : int
        Patches that fit beside a shard.
    """

    images_per_shard: int
    thin: bool
    capacity: int


def plan_patches(
    budget: int,
    *,
    patches: int,
    n_features: int,
    ratio: float,
    n_images: int | None,
    in_flight: int = 0,
    present: int = 0,
) -> Plan:
    """Spend ``budget`` bytes on a bank of ``ratio`` of all patches.

    Parameters
    ----------
    budget : int
        Bytes above those of the idle process.
    patches : int
        Of one image: h * w.
    n_features : int
        D.
    ratio : float
        Share of all patches that the bank keeps.
    n_images : int or None
        None if nobody knows yet.
    in_flight : int
        Bytes taken besides: images on their way through the backbone, or images held back.
    present : int
        Patches in a bank that is there already.

    Returns
    -------
    Plan

    Raises
    ------
    InvalidValueError
        If the budget is too small for the bank; it names one that would do.

    Notes
    -----
    A row takes b = 4 D bytes, and w = 2 D + 32 more while a coreset is chosen from it (a mask of
    what is finite, an 8-bit copy, norms, distances, an order). Besides a fixed part, and n rows
    of a shard and U kept so far, there are in memory at a time

    - while a shard is thinned: U b + n (b + w) bytes;
    - while the bank of M rows is made, from coresets: 2 M b; from all patches: U (b + w) + 2 M b.
    """
    row, work = 4 * n_features, 2 * n_features + 32
    fixed = _FIXED_BYTES + in_flight
    n_rows = None if n_images is None else n_images * patches
    bank = present + math.ceil(ratio * (n_rows or 2 * patches) * _SLACK)
    by_memory = (budget - fixed - bank * row) // 2 // (patches * (row + work))
    images_per_shard = max(1, min(by_memory, _SHARD_ROWS // patches))
    shard = images_per_shard * patches * (row + work)
    need = fixed + max(2 * bank * row, (bank + patches) * row + shard)
    if budget < need:
        raise InvalidValueError(
            f"PatchCore: memory_budget={budget:,} bytes is too small: a bank of {bank:,} patches "
            f"of {n_features} numbers and the making of it take {need:,} bytes. Raise it to "
            f"{math.ceil(need / 1e6):,}MB, or lower coreset_ratio={ratio:g}, image_size or "
            "batch_size."
        )
    free = budget - fixed - present * row - shard
    if n_rows is None:  # all that come, at first; thinned out when the room is full
        return Plan(images_per_shard, False, free // (2 * row))
    for_all = (free - 2 * bank * row) // (row + work)
    if n_rows <= for_all:
        return Plan(images_per_shard, False, for_all)
    return Plan(images_per_shard, True, free // row)


class MomentsCollector(Collector):
    """Moments of patches and of whole images."""

    images_per_shard = 32  # whose embeddings are in memory, where no budget says how many

    def __init__(self, n_features: int, normalize: bool, known: Sequence[Moments] = ()) -> None:
        self.normalize = normalize
        self.patches, self.images = known or (Moments(n_features), Moments(n_features))

    def add(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> None:
        """The moments of one shard alone."""
        n_features = len(self.patches.mean)
        self.patches, self.images = Moments(n_features), Moments(n_features)
        # All at once where they have one size: each sum that joins costs d x d numbers.
        for part in [E] if isinstance(E, np.ndarray) else [grid[None] for grid in E]:
            X, G = split_summary(part, self.normalize)
            self.patches.add(X)
            self.images.add(G)

    def merge(self, other: Self) -> None:
        """Let those of the other join."""
        self.patches = self.patches.merged_with(other.patches)
        self.images = self.images.merged_with(other.images)


def split_summary(E: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """(B, h, w, 2 d) -> patches (B h w, d) and whole images (B, d), of length 1 if asked.

    The attention may stand behind.
    """
    n_features = E.shape[3] // 2
    X = E[..., :n_features].reshape(-1, n_features)
    G = E[:, 0, 0, n_features : 2 * n_features]
    if normalize:
        X, G = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (X, G))
    return X, G
