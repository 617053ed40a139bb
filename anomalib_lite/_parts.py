"""A detector, and those that it is made of."""

from __future__ import annotations

from typing import Any

from anomalib_lite.detectors import GatedCascade

__all__ = ["map_threshold", "with_parts"]


def with_parts(detector: Any) -> list[Any]:
    """Itself and, of a cascade, the fitted detectors inside: each has options of its own."""
    if not isinstance(detector, GatedCascade):
        return [detector]
    inside = (detector.detector_, detector.gate_.detector)
    return [detector, *(part for part in inside if part is not None)]


def map_threshold(detector: Any) -> float:
    """The threshold in the units of its heatmaps, which of a cascade are the heatmap model's."""
    if isinstance(detector, GatedCascade):
        return detector.routing_.threshold
    return float(detector.threshold_)
