"""A backbone and its fusion -> one graph from pixels to patch embeddings, checked with torch."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anomalib_lite.backbones import Backbone
from anomalib_lite.engines._runtimes import import_openvino
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.fusion import patch_embeddings

__all__ = ["GraphError", "check_converted", "convert_backbone"]

# Opset 18 is the first whose Resize has torch's antialiasing.
_OPSET = 18
# A graph in float32 adds in another order than torch: a relative error of about 1e-6 in norm.
_TOLERANCE = 1e-4


class GraphError(Exception):
    """The network cannot be converted to a graph, or the graph gives other embeddings."""


class _PixelsToEmbeddings(nn.Module):
    """(1, H, W, 3) float32 in [0, 255] -> (1, h, w, D) float32."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.network = backbone.network
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (B, h, w, D) of pixels in [0, 255]."""
        return patch_embeddings(self.backbone(pixels / 255), self.backbone.fusion)


def convert_backbone(backbone: Backbone, engine: str) -> tuple[bytes, dict[str, Any]]:
    """Convert a float32 backbone on the CPU.

    Parameters
    ----------
    backbone : Backbone
        Of dtype float32, on the CPU.
    engine : {"openvino", "onnxruntime"}

    Returns
    -------
    graph : bytes
        For one image of any H and W that the backbone takes.
    sizes : dict
        ``"multiple"``: H and W must be multiples of this number; ``"only"``: the one size (H, W)
        that the network takes, or None; ``"traced"``: a small size (H, W) that it takes.

    Raises
    ------
    GraphError
        If the network cannot be converted: says why.
    """
    size, only = _size_to_trace(backbone)
    example = torch.from_numpy(_random_pixels(size).astype(np.float32))
    try:
        # Tracing warns of each size that becomes a constant; check_converted finds those that
        # matter.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            module = _PixelsToEmbeddings(backbone).eval()
            graph = _WRITERS[engine](module, example)
    except Exception as error:  # tracers and converters raise all kinds
        reason = _first_line(error)
        raise GraphError(f"converting it to {engine} failed: {reason}") from error
    multiple = 1 if only else _multiple(backbone, size)
    return graph, {
        "multiple": multiple,
        "only": list(only) if only else None,
        "traced": list(size),
    }


def check_converted(
    open_graph: Callable[[], Any], backbone: Backbone, sizes: dict[str, Any]
) -> None:
    """Raise GraphError if a float32 graph gives other embeddings than the backbone at any size.

    Parameters
    ----------
    open_graph : callable
        Opens the graph; what it returns has ``embed``.
    backbone : Backbone
        Of dtype float32, on the CPU.
    sizes : dict
        From :func:`convert_backbone`.
    """
    try:
        embed = open_graph().embed
    except Exception as error:  # each engine has its own types of errors
        raise GraphError(f"its graph cannot be opened: {_first_line(error)}") from error
    if sizes["only"]:
        to_try = [tuple(sizes["only"])]
    else:
        (height, width), step = _size_to_trace(backbone)[0], sizes["multiple"]
        to_try = [(height, width), (width, height), (height + 3 * step, width + 5 * step)]
    for size in to_try:
        pixels = _random_pixels(size)
        expected = backbone.embed(pixels)
        try:
            got = embed(pixels)
        except RuntimeError as error:
            raise GraphError(
                f"its graph cannot take images of {size[0]}x{size[1]}: {_first_line(error)}"
            ) from error
        norm = float(np.linalg.norm(expected))
        if got.shape != expected.shape or not np.linalg.norm(got - expected) <= _TOLERANCE * norm:
            raise GraphError(f"its graph gives other embeddings for images of {size[0]}x{size[1]}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _size_to_trace(backbone: Backbone) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Return the size to trace with, and the only size that the network takes, or None.

    The size is small and not square, unless the network takes no other than its own.
    """
    stride = max(backbone.stride, 8)
    small = tuple(max(n * stride, -(-low // stride) * stride) for n, low in ((4, 64), (6, 96)))
    if _takes(backbone, small):
        return (small[0], small[1]), None
    cfg = getattr(backbone.network, "pretrained_cfg", None) or {}
    own = tuple(cfg.get("input_size", ()))[1:]
    if len(own) == 2 and _takes(backbone, own):
        return own, own
    raise GraphError(f"it does not take images of {small[0]}x{small[1]}")


def _multiple(backbone: Backbone, size: tuple[int, int]) -> int:
    """Find by trial the number of which H and W must be multiples."""
    for step in (1, backbone.stride, 2, 4, 8, 16, 32):
        if _takes(backbone, (size[0] + 3 * step, size[1] + 5 * step)):
            return step
    raise GraphError(f"it takes images of {size[0]}x{size[1]}, but not somewhat larger ones")


def _takes(backbone: Backbone, size: tuple[int, ...]) -> bool:
    try:
        backbone(_random_pixels(size))
    except InvalidValueError:
        return False
    return True


def _random_pixels(size: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)


def _write_openvino(module: nn.Module, example: Tensor) -> bytes:
    """Convert to bytes: the length of the XML in 8 bytes, the XML, the weights."""
    openvino = import_openvino()
    any_size = openvino.PartialShape([1, -1, -1, 3])
    model = openvino.convert_model(module, example_input=example, input=[any_size])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "graph.xml")
        openvino.save_model(model, path, compress_to_fp16=False)
        xml, weights = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    return len(xml).to_bytes(8, "little") + xml + weights


def _write_onnx(module: nn.Module, example: Tensor) -> bytes:
    file = io.BytesIO()
    onnx: Any = torch.onnx  # its types lack files in memory and private functions
    with _antialiased_resize(onnx):
        onnx.export(
            module,
            (example,),
            file,
            dynamo=False,
            opset_version=_OPSET,
            input_names=["pixels"],
            output_names=["embeddings"],
            dynamic_axes={"pixels": {1: "H", 2: "W"}, "embeddings": {1: "h", 2: "w"}},
        )
    return file.getvalue()


@contextmanager
def _antialiased_resize(onnx: Any) -> Iterator[None]:
    """Let torch export the operation by which vision transformers resize position embeddings."""
    name = "aten::_upsample_bicubic2d_aa"

    def symbolic(g: Any, x: Any, size: Any, align_corners: Any, *scales: Any) -> Any:
        to_int64 = {"to_i": onnx.TensorProtoDataType.INT64}
        first_two = g.op(
            "Slice",
            g.op("Shape", x),
            g.op("Constant", value_t=torch.tensor([0])),
            g.op("Constant", value_t=torch.tensor([2])),
        )
        sizes = g.op("Concat", first_two, g.op("Cast", size, **to_int64), axis_i=0)
        empty = g.op("Constant", value_t=torch.tensor([], dtype=torch.float32))
        return g.op(
            "Resize",
            x,
            empty,
            empty,
            sizes,
            mode_s="cubic",
            antialias_i=1,
            cubic_coeff_a_f=-0.5,
            exclude_outside_i=1,
            coordinate_transformation_mode_s="half_pixel",
        )

    onnx.register_custom_op_symbolic(name, symbolic, _OPSET)
    try:
        yield
    finally:
        onnx.unregister_custom_op_symbolic(name, _OPSET)


_WRITERS: dict[str, Callable[[nn.Module, Tensor], bytes]] = {
    "openvino": _write_openvino,
    "onnxruntime": _write_onnx,
}
