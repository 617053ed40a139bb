"""Data sets: one file per layout of directories; all of them give ``Sample`` records."""

from __future__ import annotations

from anomalib_lite.datasets._opening import open_dataset
from anomalib_lite.datasets.base import Dataset, Sample
from anomalib_lite.datasets.btad import BTAD
from anomalib_lite.datasets.elpv import ELPV
from anomalib_lite.datasets.folder import Folder
from anomalib_lite.datasets.kolektor_sdd import KolektorSDD
from anomalib_lite.datasets.kolektor_sdd_2 import KolektorSDD2
from anomalib_lite.datasets.magnetic_tile import MagneticTile
from anomalib_lite.datasets.masks import load_mask
from anomalib_lite.datasets.mvtec_ad import MVTecAD
from anomalib_lite.datasets.mvtec_ad_2 import MVTecAD2
from anomalib_lite.datasets.mvtec_loco import MVTecLOCO
from anomalib_lite.datasets.neu_det import NEUDET
from anomalib_lite.datasets.real_iad import RealIAD
from anomalib_lite.datasets.shared import find_shared
from anomalib_lite.datasets.textile import Textile
from anomalib_lite.datasets.visa import VisA

__all__ = [
    "BTAD",
    "ELPV",
    "NEUDET",
    "Dataset",
    "Folder",
    "KolektorSDD",
    "KolektorSDD2",
    "MVTecAD",
    "MVTecAD2",
    "MVTecLOCO",
    "MagneticTile",
    "RealIAD",
    "Sample",
    "Textile",
    "VisA",
    "find_shared",
    "load_mask",
    "open_dataset",
]
