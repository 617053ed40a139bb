"""Data sets: one small file per directory layout, all giving the same ``Sample`` records."""

from __future__ import annotations

from anomalib_lite.datasets.base import Dataset, Sample, load_mask
from anomalib_lite.datasets.elpv import ELPV
from anomalib_lite.datasets.folder import Folder
from anomalib_lite.datasets.mvtec_ad import MVTecAD

__all__ = ["ELPV", "Dataset", "Folder", "MVTecAD", "Sample", "load_mask"]
