"""Visual anomaly detection in scikit-learn's manner, trained on good images only.

>>> import anomalib_lite
>>> "PatchCore" in dir(anomalib_lite)
True

The names below are imported when first used, so ``import anomalib_lite`` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anomalib_lite.detectors.gated_cascade import GatedCascade as GatedCascade
    from anomalib_lite.detectors.mahalanobis_vfm import MahalanobisVFM as MahalanobisVFM
    from anomalib_lite.detectors.padim import PaDiM as PaDiM
    from anomalib_lite.detectors.patchcore import PatchCore as PatchCore
    from anomalib_lite.evaluation import evaluate as evaluate
    from anomalib_lite.memory_bank import MemoryBank as MemoryBank
    from anomalib_lite.persistence import load as load

__version__ = "0.1.0"

_HOME = {
    "GatedCascade": "anomalib_lite.detectors.gated_cascade",
    "MahalanobisVFM": "anomalib_lite.detectors.mahalanobis_vfm",
    "PaDiM": "anomalib_lite.detectors.padim",
    "PatchCore": "anomalib_lite.detectors.patchcore",
    "MemoryBank": "anomalib_lite.memory_bank",
    "evaluate": "anomalib_lite.evaluation",
    "load": "anomalib_lite.persistence",
}

__all__ = ["GatedCascade", "MahalanobisVFM", "MemoryBank", "PaDiM", "PatchCore", "evaluate", "load"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'anomalib_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
