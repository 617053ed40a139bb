"""What heatmaps are tested by: masks, or boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from anomalib_lite import metrics
from anomalib_lite.datasets import Sample

__all__ = ["Mask", "PixelTest"]

Mask: TypeAlias = npt.NDArray[np.bool_] | None
# Lowest false-positive rate of AUPIMO's integral: with fewer normal pixels than its inverse, the
# curve below it has no point.
_LEAST_NORMAL_PIXELS = 100_000


class PixelTest:
    """Compares heatmaps with masks or boxes, some images after the other.

    Parameters
    ----------
    read_mask : callable or None
        Takes a sample and the shape of its map, and gives its mask; None without masks.
    boxes : mapping of Path to array of shape (n, 4)
        Boxes of defects by the path of the image; empty without boxes.
    fpr_limit : float
        As for :func:`~anomalib_lite.metrics.aupro`.
    memory_budget : int, str or None
        None keeps all masks and maps. Otherwise they are counted in a table of so many bytes, as
        by :class:`~anomalib_lite.metrics.PixelMetrics`.
    """

    def __init__(
        self,
        read_mask: Callable[[Sample, tuple[int, ...]], Mask] | None,
        boxes: Mapping[Path, npt.ArrayLike],
        fpr_limit: float,
        memory_budget: int | str | None,
    ) -> None:
        self._read_mask, self._boxes, self._fpr_limit = read_mask, boxes, fpr_limit
        self._streamed: metrics.PixelMetrics | None = None
        if memory_budget is not None:
            self._streamed = metrics.PixelMetrics(fpr_limit=fpr_limit, memory_budget=memory_budget)
        self._maps: list[npt.NDArray[np.float32]] = []
        self._masks: list[Mask] = []
        self._hits: list[float] = []
        self._n_normal_pixels = 0
        self.has_masks = read_mask is not None
        self.counts = {"empty_masks": 0, "ignored_pixels": 0} if self.has_masks else {}

    def add(self, samples: Sequence[Sample], maps: Any) -> None:
        """Take the maps (H, W) of some test images."""
        for sample, values in zip(samples, maps, strict=True):
            amap = np.asarray(values, np.float32)
            if sample.path in self._boxes:
                self._hits.append(metrics.pointing_game([self._boxes[sample.path]], [amap]))
            if self._read_mask is None:
                continue
            mask = self._read_mask(sample, amap.shape)
            self._count(sample, mask, amap)
            if self._streamed is not None:
                self._streamed.update([mask], [amap])
            else:
                self._masks.append(mask)
                self._maps.append(amap)

    def _count(self, sample: Sample, mask: Mask, amap: npt.NDArray[np.float32]) -> None:
        # A plain array or None has no ignored pixels.
        n_ignored, marks = int(np.sum(getattr(mask, "mask", 0))), mask is not None and mask.any()
        self.counts["ignored_pixels"] += n_ignored
        self.counts["empty_masks"] += bool(sample.label and mask is not None and not marks)
        if not marks:
            self._n_normal_pixels += amap.size - n_ignored

    def figures(self) -> dict[str, float]:
        """Return the metrics of all images that were taken."""
        found: dict[str, float] = {}
        if self._streamed is not None and self.has_masks:
            found = self._streamed.compute()
        elif self.has_masks:
            found = metrics.pixel_metrics(self._masks, self._maps, fpr_limit=self._fpr_limit)
        if self._n_normal_pixels < _LEAST_NORMAL_PIXELS:
            found.pop("aupimo", None)
        elif self._streamed is None:
            found["aupimo"] = metrics.aupimo(self._masks, self._maps)
        hits = [hit for hit in self._hits if not np.isnan(hit)]
        if hits:
            found["pointing_game"] = float(np.mean(hits))
        return found
