"""Engines that run a backbone and its fusion: torch, OpenVINO or ONNX Runtime."""

from anomalib_lite.engines._compiled import CompiledBackbone
from anomalib_lite.engines._opening import (
    ENGINES,
    FUSIONS,
    AnyBackbone,
    open_backbone,
    opening_backbones,
)

__all__ = [
    "ENGINES",
    "FUSIONS",
    "AnyBackbone",
    "CompiledBackbone",
    "open_backbone",
    "opening_backbones",
]
