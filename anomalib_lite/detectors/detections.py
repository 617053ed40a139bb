"""Results of a detector: scores, labels and heatmaps of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Detections"]


@dataclass(frozen=True)
class Detections:
    """Results of a detector for each image, in the order in which the images were given.

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
    p_values : ndarray of shape (N,), float64, or None
        How likely a normal image is to score as high as this one, in (0, 1], by the detector's
        ``calibration_scores_``; see :func:`~anomalib_lite.calibration.conformal_p_values`. NaN for
        an image that was skipped. None for a cascade or a router.
    """

    scores: np.ndarray
    labels: np.ndarray
    maps: Any
    names: list[str]
    skipped: list[tuple[int, str]] = field(default_factory=list)
    p_values: np.ndarray | None = field(default=None, kw_only=True)
