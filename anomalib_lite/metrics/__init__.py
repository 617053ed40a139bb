"""How well scores and heatmaps tell anomalous from normal."""

from anomalib_lite.metrics._image import (
    aupro,
    auroc,
    average_precision,
    f1_max,
    fpr_at_tpr,
    pixel_auroc,
    pixel_average_precision,
    pixel_metrics,
    rate,
    seg_f1,
)

__all__ = [
    "aupro",
    "auroc",
    "average_precision",
    "f1_max",
    "fpr_at_tpr",
    "pixel_auroc",
    "pixel_average_precision",
    "pixel_metrics",
    "rate",
    "seg_f1",
]
