"""A cheap gate in front of a heatmap model."""

from anomalib_lite.cascade.gated_cascade import CascadeDetections, GatedCascade

__all__ = ["CascadeDetections", "GatedCascade"]
