"""Gaussian models of normal embeddings, fitted from running moments."""

from anomalib_lite.gaussian._estimator import MomentsEstimator
from anomalib_lite.gaussian._gaussian import Gaussian, check_shrinkage
from anomalib_lite.gaussian._grid import GaussianGrid
from anomalib_lite.gaussian._moments import Moments

__all__ = [
    "Gaussian",
    "GaussianGrid",
    "Moments",
    "MomentsEstimator",
    "check_shrinkage",
]
