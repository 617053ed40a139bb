"""What runs a backbone and its fusion: torch, OpenVINO or ONNX Runtime."""

from anomalib_lite.engines._compiled import (
    ENGINES,
    FUSIONS,
    AnyBackbone,
    CompiledBackbone,
    device_of,
    open_backbone,
)

__all__ = [
    "ENGINES",
    "FUSIONS",
    "AnyBackbone",
    "CompiledBackbone",
    "device_of",
    "open_backbone",
]
