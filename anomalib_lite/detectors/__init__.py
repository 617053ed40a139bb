"""Detectors: what is done with patch embeddings."""

from anomalib_lite.detectors._patch_accumulator import plan_patches
from anomalib_lite.detectors.base import BaseDetector, DetectorMixin
from anomalib_lite.detectors.detections import Detections, Region
from anomalib_lite.detectors.mahalanobis_vfm import MahalanobisVFM
from anomalib_lite.detectors.padim import PaDiM
from anomalib_lite.detectors.patchcore import PatchCore
from anomalib_lite.detectors.subspace_ad import SubspaceAD

__all__ = [
    "BaseDetector",
    "Detections",
    "DetectorMixin",
    "MahalanobisVFM",
    "PaDiM",
    "PatchCore",
    "Region",
    "SubspaceAD",
    "plan_patches",
]
