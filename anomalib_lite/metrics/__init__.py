"""Metrics of how well scores and heatmaps separate anomalous from normal."""

from anomalib_lite.metrics._aupimo import aupimo, aupimo_scores
from anomalib_lite.metrics._image import auroc, average_precision, f1_max, fpr_at_tpr, rate
from anomalib_lite.metrics._pixel import (
    aupro,
    pixel_auroc,
    pixel_average_precision,
    pixel_f1_max,
    pixel_metrics,
    seg_f1,
)
from anomalib_lite.metrics._pointing import pointing_game
from anomalib_lite.metrics._streaming import PixelMetrics
from anomalib_lite.metrics._uncertainty import PairedTest, bootstrap_interval, paired_test

__all__ = [
    "PairedTest",
    "PixelMetrics",
    "aupimo",
    "aupimo_scores",
    "aupro",
    "auroc",
    "average_precision",
    "bootstrap_interval",
    "f1_max",
    "fpr_at_tpr",
    "paired_test",
    "pixel_auroc",
    "pixel_average_precision",
    "pixel_f1_max",
    "pixel_metrics",
    "pointing_game",
    "rate",
    "seg_f1",
]
