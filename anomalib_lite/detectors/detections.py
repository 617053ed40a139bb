"""What a detector answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["CascadeDetections", "Detections"]


@dataclass(frozen=True)
class Detections:
    """What a detector says of each image, in the order in which the images were given.

    Attributes
    ----------
    scores : ndarray of shape (N,), float32
        Higher is more anomalous; raw units (a distance). NaN for an image that was skipped.
    labels : ndarray of shape (N,), bool
        True where the score exceeds ``threshold_``: anomalous. Also True for an image that was
        skipped, since nothing shows that it is good.
    maps : ndarray of shape (N, H, W), float32, or list of N arrays (H, W), or None
        Heatmaps at the images' own sizes, in the units of the scores; a list where sizes
        differ or an image was skipped (its entry is None). None if they were not asked for.
    names : list of str
        The image's path, or ``images[i]``.
    skipped : list of (int, str)
        Position and reason of every image left out; only with ``on_error="skip"``.
    """

    scores: np.ndarray
    labels: np.ndarray
    maps: Any
    names: list[str]
    skipped: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class CascadeDetections(Detections):
    """What a :class:`~anomalib_lite.GatedCascade` says of each image.

    ``scores`` lie in [0, 1]. ``maps`` has the heatmap model's heatmaps, in its own units, and None
    for each image that it did not see.

    Attributes
    ----------
    routes : ndarray of shape (N,), str
        Who decided: ``"gate_normal"``, ``"gate_anomalous"``, ``"detector"``; or ``"skipped"``.
    probabilities : ndarray of shape (N,), float64
        The gate's, of an anomaly; NaN for an image that was skipped.
    """

    routes: np.ndarray = field(default_factory=lambda: np.empty(0, "<U14"))
    probabilities: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def heatmap_call_rate(self) -> float:
        """Share of the images, without those skipped, that the heatmap model had to decide."""
        seen = self.routes[self.routes != "skipped"]
        return float(np.mean(seen == "detector")) if seen.size else float("nan")
