"""Models made of several detectors: a gate and a heatmap model, or a detector for each product."""

from anomalib_lite.cascade.gated_cascade import (
    SHARED_PARAMETERS,
    CascadeDetections,
    GatedCascade,
)
from anomalib_lite.cascade.router import ProductDetections, ProductRouter

__all__ = [
    "SHARED_PARAMETERS",
    "CascadeDetections",
    "GatedCascade",
    "ProductDetections",
    "ProductRouter",
]
