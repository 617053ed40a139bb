"""Detectors: what is done with patch embeddings."""

from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.detections import Detections, DetectorMixin
from anomalib_lite.detectors.mahalanobis_vfm import MahalanobisVFM
from anomalib_lite.detectors.padim import PaDiM
from anomalib_lite.detectors.patchcore import PatchCore

__all__ = [
    "BaseDetector",
    "Detections",
    "DetectorMixin",
    "MahalanobisVFM",
    "PaDiM",
    "PatchCore",
]
