"""A cheap gate in front of a heatmap model."""

from anomalib_lite.cascade.gated_cascade import (
    SHARED_PARAMETERS,
    CascadeDetections,
    GatedCascade,
)

__all__ = ["SHARED_PARAMETERS", "CascadeDetections", "GatedCascade"]
