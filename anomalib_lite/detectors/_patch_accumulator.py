"""Patches that PatchCore keeps within a budget of memory."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from typing import Self

import numpy as np

from anomalib_lite.coreset import covering_radius, select_coreset
from anomalib_lite.detectors._foreground import PatchSample
from anomalib_lite.detectors._position_window import patch_cells
from anomalib_lite.detectors.fitting import Accumulator, refuse_budget
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.fusion import unit_rows
from anomalib_lite.images.embeddings import Embeddings, patch_rows

__all__ = ["PatchAccumulator", "Plan", "plan_patches"]

# Patches of a shard: enough to choose among, and few enough to be work for many workers.
_SHARD_ROWS = 65_536
# Bytes that choosing a coreset takes for any number of rows: blocks of products, pools, threads.
_FIXED_BYTES = 64 * 2**20
# Room for more rows than the first image's size predicts, if images have several sizes.
_SLACK = 1.1


class PatchAccumulator(Accumulator):
    """All patches; or within a budget of memory, if they do not fit, a coreset of each shard.

    Parameters
    ----------
    n_features : int
        D, the length of an embedding.
    method : str
        How a coreset is chosen; see :func:`~anomalib_lite.coreset.select_coreset`.
    seed : int
        Seed of the coresets.
    plan : Plan, optional
        How the budget of memory is spent; without one, all patches are kept.
    ratio : float, optional
        Share of the patches that a coreset keeps.
    size : int, optional
        In place of ``ratio``: number of patches to keep of all images.
    n_images : int, optional
        For ``size``: number of these images, also of those that join the bank afterwards.
    normalize : bool, default=False
        Whether patches are divided by their length.
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
    owners : ndarray of shape (n,), int32
        Positions of the images that they are of; none unless ``keeps_images``, which is for no
        budget of memory.
    nearest : ndarray of shape (n,), int64, or None
        Row of the bank that each is nearest to, once that is known.
    sample : PatchSample or None
        Patches of the first images.
    thinned : bool
        Whether ``rows`` are coresets, or all patches.
    n_seen : int
        Number of patches that have passed.
    ratio : float
        Share of these to keep.
    radius : float
        Largest distance from a patch that has passed to the nearest of ``rows`` and of the
        patches that existed before, or an upper bound of it.

    Notes
    -----
    With ``size``, the images numbered a to b of N keep ``ceil(size b / N) - ceil(size a / N)``
    patches, so all shards together keep ``size``, whatever the sizes of their images. Images that
    cannot be used have numbers too: the others of their shard keep their part.
    """

    def __init__(
        self,
        n_features: int,
        method: str,
        seed: int,
        plan: Plan | None = None,
        *,
        ratio: float | None = None,
        size: int | None = None,
        n_images: int | None = None,
        normalize: bool = False,
        grid: tuple[int, int] | None = None,
        samples: bool = False,
    ) -> None:
        self.rows = np.empty((0, n_features), np.float32)
        self.grid, self.cells = grid, None if grid is None else np.empty(0, np.int32)
        self.owners = np.empty(0, np.int32)
        self.nearest: np.ndarray | None = None
        self.samples: bool = samples
        self.sample: PatchSample | None = None
        self.n_seen, self.radius = 0, 0.0
        self.ratio, self.size, self.n_images = 1.0 if ratio is None else ratio, size, n_images
        self.method, self.seed = method, seed
        self.normalize = normalize
        self.thinned, self.capacity = False, sys.maxsize
        if plan is not None:
            self.thinned, self.capacity = plan.thin, plan.capacity
            self.images_per_shard = plan.images_per_shard
        self._has_room = plan is not None
        self._room = self.rows  # (capacity, D), whose first rows are ``rows``
        self._stands_in = False  # whether ``rows`` is one patch although the share is none

    def accumulate(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> Self:
        """Return an accumulator of the shard's patches, or of a coreset of them."""
        shard = copy.copy(self)
        shard.rows = unit_rows(patch_rows(E)) if self.normalize else patch_rows(E)
        shard.n_seen = len(shard.rows)
        shard.files = self.files or range(position, position + len(E))
        shard.seed = (self.seed + position) % 2**32  # each shard has draws of its own
        if self.grid is not None:
            shard.cells = patch_cells(E, self.grid)
        if self.keeps_images:
            patches = [np.count_nonzero(~np.isnan(image[..., 0])) for image in E]
            images = np.arange(position, position + len(E), dtype=np.int32)
            shard.owners = np.repeat(images, patches)
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
        self.radius = max(self.radius, other.radius)
        if other._stands_in and len(self.rows) and len(rows):
            # Each patch is near the one that is left out, and that is near one that is kept.
            beyond = other.radius + covering_radius(rows, self.rows)
            self.radius = max(self.radius, beyond)
            rows, cells = rows[:0], None if cells is None else cells[:0]
        if self._has_room:
            self._append(rows)
        else:
            self.rows = np.concatenate([self.rows, rows]) if len(self.rows) else rows
        if self.cells is not None and cells is not None:
            self.cells = np.concatenate([self.cells, cells])
        self.owners = np.concatenate([self.owners, other.owners])
        if other.sample is not None:
            self.sample = other.sample if not self.sample else self.sample.merged_with(other.sample)
        self.n_seen += other.n_seen
        self.files = range((self.files or other.files).start, other.files.stop)
        if self.size is not None:
            share = len(self.files) / (self.n_images or len(self.files))
            self.ratio = min(1.0, self.size * share / max(1, self.n_seen))

    def _n_to_keep(self) -> int:
        """Return how many rows the coreset of all rows has; 0 if the share of ``size`` is none."""
        if self.size is None:
            return max(1, round(self.ratio * len(self.rows)))
        n = self.n_images or len(self.files)
        before, after = (-(-self.size * i // n) for i in (self.files.start, self.files.stop))
        return min(after - before, len(self.rows))

    def _thin(self, existing: np.ndarray | None = None) -> np.ndarray:
        """Choose the coreset of all rows, at least one; return its indices in ascending order."""
        self.thinned = True
        if len(self.rows) == 0:
            return np.empty(0, np.int64)
        n = self._n_to_keep()
        self._stands_in = n == 0
        kept = select_coreset(
            self.rows,
            max(1, n),
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
        """Copy rows behind those that are there, within the budget."""
        n = len(self.rows) + len(rows)
        if n > self.capacity:
            raise InvalidValueError(
                f"PatchCore: memory_budget has room for {self.capacity:,} patches, which is less "
                f"than a share of {self.ratio:g} of the {self.n_seen:,} that have come so far and "
                "those that follow. Raise memory_budget, or lower coreset_ratio or coreset_size."
            )
        if n > len(self._room):
            # Memory that is never written to costs nothing, but no machine lends more than it has:
            # make room in steps, so that the old room is at most a quarter of what may come.
            room = self.capacity
            while room // 4 >= n:
                room //= 4
            self._room = np.empty((room, rows.shape[1]), np.float32)
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
    ratio: float | None = None,
    size: int | None = None,
    n_images: int | None,
    in_flight: int = 0,
    present: int = 0,
) -> Plan:
    """Spend ``budget`` bytes on a bank of ``ratio`` of all patches, or of ``size`` patches.

    Parameters
    ----------
    budget : int
        Bytes above those of the idle process.
    patches : int
        Patches of one image, h * w.
    n_features : int
        D, the length of an embedding.
    ratio : float, optional
        Share of all patches that the bank keeps.
    size : int, optional
        In place of ``ratio``: number of patches that the bank keeps.
    n_images : int or None
        Number of images whose patches come; None if it is not known yet.
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
        If the budget is too small for the bank; the error names one that would do. With ``size``,
        also if the number of images is not known.

    Notes
    -----
    A row takes b = 4 D bytes, and w = 2 D + 32 more while a coreset is chosen from it (a mask of
    finite values, an 8-bit copy, norms, distances, an order). With n rows of a shard and U rows
    kept so far, there are in memory at a time, beside a fixed part,

    - while a shard is thinned: U b + n (b + w) bytes;
    - while the bank of M rows is made, from coresets: 2 M b; from all patches: U (b + w) + 2 M b.
    """
    if ratio is not None:
        lower = f"coreset_ratio={ratio:g}, "
    elif size is not None and n_images is not None:
        ratio, lower = min(1.0, size / (n_images * patches)), "coreset_size, "
    else:
        raise InvalidValueError(
            "PatchCore: coreset_size is a share of a known number of images, got a stream of "
            "embeddings. Set coreset_ratio, such as coreset_ratio=0.01, or give the iterable an "
            "attribute n_images."
        )
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
        refuse_budget("PatchCore", budget, need, what, lower=lower)
    free = budget - fixed - present * row - shard
    if n_rows is None:  # keep all at first, and thin them out when the room is full
        return Plan(images_per_shard, False, free // (2 * row))
    for_all = (free - 2 * bank * row) // (row + work)
    if n_rows <= for_all:
        return Plan(images_per_shard, False, for_all)
    return Plan(images_per_shard, True, free // row)
