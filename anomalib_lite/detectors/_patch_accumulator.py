"""Patches that PatchCore keeps within a budget of memory."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from anomalib_lite.coreset import select_coreset
from anomalib_lite.detectors._foreground import PatchSample
from anomalib_lite.detectors._position_window import patch_cells
from anomalib_lite.detectors.fitting import Accumulator, refuse_budget
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.images.embeddings import Embeddings, patch_rows, unit_rows

__all__ = ["PatchAccumulator", "Plan", "plan_patches", "planned_ratio"]

# Patches of a shard: enough to choose among, and few enough to be work for many workers.
_SHARD_ROWS = 65_536
# Bytes that choosing a coreset takes for any number of rows: blocks of products, pools, threads.
_FIXED_BYTES = 64 * 2**20
# Room for more rows than the first image's size predicts, if images have several sizes.
_SLACK = 1.1


class PatchAccumulator(Accumulator):
    """Patches within a budget of memory: all of them if they fit, or a coreset of each shard.

    Parameters
    ----------
    n_features : int
        D, the length of an embedding.
    method : str
        How a coreset is chosen; see :func:`~anomalib_lite.coreset.select_coreset`.
    ratio : float
        Share of the patches that a coreset keeps.
    seed : int
        Seed of the coresets.
    plan : Plan
        How the budget of memory is spent.
    normalize : bool, default=False
        Whether patches are divided by their length.
    n_to_come : int, default=0
        Number of images that are to be accumulated, and of those that join the bank afterwards; 0
        if unknown, or if none joins.
    size : int, optional
        Number of patches to keep of all these images; ``ratio`` is then a first guess.
    grid : (h, w), optional
        Grid in which the places of the patches are kept; without one they are not.
    samples : bool, default=False
        Whether to take a sample of the patches of the first images.

    Attributes
    ----------
    rows : ndarray of shape (n, D), float32
        Patches that are kept.
    cells : ndarray of shape (n,), int32, or None
        Where they lie.
    sample : PatchSample or None
        Patches of the first images.
    thinned : bool
        Whether ``rows`` are coresets, of ``ratio`` of the patches each, or all patches.
    n_seen, n_images : int
        Number of patches and images that have passed.
    radius : float
        Largest distance from a patch that has passed to the nearest of ``rows`` and of the
        patches that existed before.
    """

    def __init__(
        self,
        n_features: int,
        method: str,
        ratio: float,
        seed: int,
        plan: Plan,
        *,
        normalize: bool = False,
        n_to_come: int = 0,
        size: int | None = None,
        grid: tuple[int, int] | None = None,
        samples: bool = False,
    ) -> None:
        self.rows = np.empty((0, n_features), np.float32)
        self.grid, self.cells = grid, None if grid is None else np.empty(0, np.int32)
        self.samples: bool = samples
        self.sample: PatchSample | None = None
        self.n_seen, self.n_images, self.radius = 0, 0, 0.0
        self.n_to_come, self.size = n_to_come, size
        self.method, self.ratio, self.seed = method, ratio, seed
        self.normalize = normalize
        self.thinned, self.capacity = plan.thin, plan.capacity
        self.images_per_shard = plan.images_per_shard
        self._room = self.rows  # (capacity, D), whose first rows are ``rows``

    def accumulate(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> Self:
        """Return an accumulator of the shard's patches, or of a coreset of them."""
        shard = copy.copy(self)
        shard.rows = unit_rows(patch_rows(E)) if self.normalize else patch_rows(E)
        shard.n_seen, shard.n_images = len(shard.rows), len(E)
        shard.seed = (self.seed + position) % 2**32  # each shard has draws of its own
        if self.grid is not None:
            shard.cells = patch_cells(E, self.grid)
        if self.samples:
            shard.sample = PatchSample.of(E, position, self.normalize)
        if self.thinned:
            kept = shard._thin(existing)
            shard.rows, shard.cells = shard.rows[kept], _of(shard.cells, kept)
        return shard

    def merge(self, other: Self) -> None:
        """Append the rows of another; if all do not fit, thin out both, and all that follow."""
        if not self.thinned and len(self.rows) + len(other.rows) > self.capacity:
            self._compact(self._thin())
        rows, cells = other.rows, other.cells
        if self.thinned and not other.thinned:
            kept = other._thin()
            rows, cells = rows[kept], _of(cells, kept)
        self._append(rows)
        if self.cells is not None and cells is not None:
            self.cells = np.concatenate([self.cells, cells])
        if other.sample is not None:
            self.sample = other.sample if not self.sample else self.sample.merged_with(other.sample)
        self.n_seen += other.n_seen
        self.n_images += other.n_images
        if self.size is not None and not self.thinned:
            share = self.n_images / (self.n_to_come or self.n_images)
            self.ratio = min(1.0, self.size * share / max(1, self.n_seen))
        self.radius = max(self.radius, other.radius)

    def _thin(self, existing: np.ndarray | None = None) -> np.ndarray:
        """Choose the coreset of all rows; return its indices in ascending order."""
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
        """Move these rows to the front of the room."""
        for start in range(0, len(indices), 4096):  # ascending, so no row is needed any more
            block = indices[start : start + 4096]
            self._room[start : start + len(block)] = self._room[block]
        self.rows, self.cells = self._room[: len(indices)], _of(self.cells, indices)

    def _append(self, rows: np.ndarray) -> None:
        """Copy rows behind those that are there."""
        n = len(self.rows) + len(rows)
        if n > self.capacity:
            raise InvalidValueError(
                f"PatchCore: memory_budget has room for {self.capacity:,} patches, which is less "
                f"than a share of {self.ratio:g} of the {self.n_seen:,} that have come so far and "
                "those that follow. Raise memory_budget, or lower coreset_ratio or coreset_size."
            )
        if n > len(self._room):
            # Memory that is never written to costs nothing: make room for all that may come.
            self._room = np.empty((self.capacity, rows.shape[1]), np.float32)
            self._room[: len(self.rows)] = self.rows
        self._room[len(self.rows) : n] = rows
        self.rows = self._room[:n]


def _of(cells: np.ndarray | None, indices: np.ndarray) -> np.ndarray | None:
    return None if cells is None else cells[indices]


@dataclass(frozen=True)
class Plan:
    """How a budget of memory is spent.

    Attributes
    ----------
    images_per_shard : int
        Number of images whose embeddings are in memory at a time.
    thin : bool
        Whether each shard is thinned out at once, because all patches would not fit.
    capacity : int
        Number of patches that fit beside a shard.
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
    size_given: bool = False,
    in_flight: int = 0,
    present: int = 0,
) -> Plan:
    """Spend ``budget`` bytes on a bank of ``ratio`` of all patches.

    Parameters
    ----------
    budget : int
        Bytes above those of the idle process.
    patches : int
        Patches of one image, h * w.
    n_features : int
        D, the length of an embedding.
    ratio : float
        Share of all patches that the bank keeps.
    n_images : int or None
        Number of images; None if it is not known yet.
    size_given : bool, default=False
        Whether the share comes from ``coreset_size``, which an error then names.
    in_flight : int
        Bytes taken by other images: on their way through the backbone, or held back.
    present : int
        Patches that are in the bank already.

    Returns
    -------
    Plan

    Raises
    ------
    InvalidValueError
        If the budget is too small for the bank; the error names one that would do.

    Notes
    -----
    A row takes b = 4 D bytes, and w = 2 D + 32 more while a coreset is chosen from it (a mask of
    finite values, an 8-bit copy, norms, distances, an order). With n rows of a shard and U rows
    kept so far, there are in memory at a time, beside a fixed part,

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
        what = f"a bank of {bank:,} patches of {n_features} numbers and the making of it"
        lower = "coreset_size, " if size_given else f"coreset_ratio={ratio:g}, "
        refuse_budget("PatchCore", budget, need, what, lower=lower)
    free = budget - fixed - present * row - shard
    if n_rows is None:  # keep all at first, and thin them out when the room is full
        return Plan(images_per_shard, False, free // (2 * row))
    for_all = (free - 2 * bank * row) // (row + work)
    if n_rows <= for_all:
        return Plan(images_per_shard, False, for_all)
    return Plan(images_per_shard, True, free // row)


def planned_ratio(size: int, n_images: int | None, patches: int) -> float:
    """Return the share that ``size`` patches are of those of ``n_images``, of ``patches`` each.

    InvalidValueError if the number of images is not known.
    """
    if n_images is None:
        raise InvalidValueError(
            "PatchCore: coreset_size is a share of a known number of images, got a stream of "
            "embeddings. Set coreset_ratio, such as coreset_ratio=0.01, or give the iterable an "
            "attribute n_images."
        )
    return min(1.0, size / (n_images * patches))
