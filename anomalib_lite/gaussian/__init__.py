"""Gaussians and the distances to them, fitted from running moments."""

from anomalib_lite.gaussian._gaussian import Gaussian, GaussianGrid, check_shrinkage
from anomalib_lite.gaussian._moments import Moments

__all__ = [
    "Gaussian",
    "GaussianGrid",
    "Moments",
    "check_shrinkage",
]
