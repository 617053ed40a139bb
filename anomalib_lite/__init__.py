"""Visual anomaly detection in scikit-learn's manner, trained on good images only.

>>> import anomalib_lite
>>> "PatchCore" in dir(anomalib_lite)
True

The names below are imported when first used, so ``import anomalib_lite`` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from anomalib_lite._version import __version__ as __version__

if TYPE_CHECKING:
    from anomalib_lite.cascade import GatedCascade as GatedCascade
    from anomalib_lite.cascade import ProductRouter as ProductRouter
    from anomalib_lite.detectors import MahalanobisVFM as MahalanobisVFM
    from anomalib_lite.detectors import PaDiM as PaDiM
    from anomalib_lite.detectors import PatchCore as PatchCore
    from anomalib_lite.detectors import SubspaceAD as SubspaceAD
    from anomalib_lite.evaluation import evaluate as evaluate
    from anomalib_lite.memory_bank import MemoryBank as MemoryBank
    from anomalib_lite.persistence import load as load

_HOME = {
    "GatedCascade": "anomalib_lite.cascade",
    "MahalanobisVFM": "anomalib_lite.detectors",
    "PaDiM": "anomalib_lite.detectors",
    "PatchCore": "anomalib_lite.detectors",
    "ProductRouter": "anomalib_lite.cascade",
    "SubspaceAD": "anomalib_lite.detectors",
    "MemoryBank": "anomalib_lite.memory_bank",
    "evaluate": "anomalib_lite.evaluation",
    "load": "anomalib_lite.persistence",
}

__all__ = [
    "GatedCascade",
    "MahalanobisVFM",
    "MemoryBank",
    "PaDiM",
    "PatchCore",
    "ProductRouter",
    "SubspaceAD",
    "evaluate",
    "load",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'anomalib_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
