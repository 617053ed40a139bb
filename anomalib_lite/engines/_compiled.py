"""A frozen network and its fusion as one graph on the CPU, from pixels to embeddings."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from anomalib_lite._device import device_of
from anomalib_lite._version import __version__
from anomalib_lite.engines import _cache
from anomalib_lite.engines._runtimes import OnnxRuntimeGraph, OpenVinoGraph, has_unit
from anomalib_lite.errors import AnomalibLiteError, InvalidValueError, MissingDependencyError
from anomalib_lite.networks import directory_file, package_file
from anomalib_lite.networks.adapter import Adapter

if TYPE_CHECKING:  # torch takes seconds to import, and a cached graph does not need it
    from anomalib_lite.backbones import Backbone

__all__ = ["CompiledBackbone", "compile_backbone", "refusal", "sources"]

_Graph: TypeAlias = tuple[dict[str, Any], bytes]  # what is known of the network, and the graph

_EXTRAS = {"openvino": "fast", "onnxruntime": "onnx"}
_RUNTIMES: dict[str, Any] = {"openvino": OpenVinoGraph, "onnxruntime": OnnxRuntimeGraph}
# The code that makes a graph. If one of these files changes, graphs are converted again.
_PACKAGE = Path(__file__).parents[1]
_FOLDERS, _FILES = ("backbones", "engines", "fusion", "networks"), ("_device.py",)
# Largest error in a short number type, as a share of the embeddings' length. Rounding gives 1 %, or
# 7 % in networks with depthwise convolutions; wrong numbers give far more.
_MOST_ROUNDING = 0.25
# Values of the variable that keep OpenVINO from AVX2, which it needs on x86.
_BEFORE_AVX2 = ("SSE41", "AVX")


def refusal(engine: str, device: Any, where: str) -> AnomalibLiteError | None:
    """Return the error to raise if an engine is not installed or cannot run on this device."""
    if importlib.util.find_spec(engine) is None:
        return MissingDependencyError(
            f"{where}: engine={engine!r} is not installed. Install it with: "
            f"pip install 'anomalib-lite[{_EXTRAS[engine]}]', or use engine='torch'."
        )
    if engine == "openvino" and not _has_avx2():
        return InvalidValueError(
            f"{where}: engine='openvino' needs a processor with AVX2. Use engine='torch'."
        )
    if device_of(device, where) != "cpu":
        return InvalidValueError(
            f"{where}: engine={engine!r} runs on the CPU, got device={str(device)!r}. Use "
            "device='cpu' or engine='torch'."
        )
    return None


@cache
def _has_avx2() -> bool:
    """Whether OpenVINO has the instructions that it needs; without them it may crash."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _BEFORE_AVX2:
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux, where other machines are not that old
        return True
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)  # only x86 has this line
    return flags is None or "avx2" in flags[1].split()


def compile_backbone(
    backbone: Any,
    engine: str,
    *,
    dtype: str,
    where: str,
    sha256: str | None = None,
    **arguments: Any,
) -> CompiledBackbone | InvalidValueError:
    """Compile a network for an engine, or return the error that says why this is impossible.

    Parameters
    ----------
    backbone, engine, dtype, where, sha256, arguments
        The same as those of :func:`~anomalib_lite.engines.open_backbone`.
    """
    origin = _Origin(backbone, engine, where, arguments)
    made = origin.cached_graph(sha256) or origin.convert()
    if isinstance(made, InvalidValueError):
        return made
    description, graph = made
    compiled = CompiledBackbone(origin, description, graph, dtype)
    return compiled._open_runtime() or compiled


class CompiledBackbone:
    """A frozen network and its fusion as one graph on the CPU, from pixels to embeddings.

    Made by :func:`open_backbone`. The graph comes from the cache on disk, or is converted from
    torch's network and stored there. Can be pickled and copied: the copy opens the graph again.

    Attributes
    ----------
    layers, stride, channels, mean, std, sha256, adapter
        The same as those of :class:`~anomalib_lite.backbones.Backbone`.
    device : str
        "cpu".
    dtype : str
        Number type in which the graph is computed.
    engine : str
        "openvino" or "onnxruntime".

    Examples
    --------
    See :func:`open_backbone`.
    """

    device = "cpu"

    def __init__(
        self, origin: _Origin, description: dict[str, Any], graph: bytes, dtype: str
    ) -> None:
        self.engine, self.where = origin.engine, origin.where
        self.adapter: Adapter | None = origin.arguments["adapter"]
        self.layers, self.stride = description["layers"], description["stride"]
        self.channels: list[int] | None = description["channels"]
        self.mean, self.std = description["mean"], description["std"]
        self.sha256: str = description["sha256"]
        self.dtype = _resolve_dtype(dtype, origin.engine, description["depthwise"])
        self._origin, self._sizes, self._graph = origin, description["sizes"], graph
        self._torch: Any = None  # opened if feature maps are asked for

    def embed(self, pixels: np.ndarray, channels: np.ndarray | None = None) -> np.ndarray:
        """Patch embeddings of a batch.

        Parameters
        ----------
        pixels : ndarray of shape (B, H, W, 3)
            uint8 in [0, 255], or float32 in [0, 1].
        channels : ndarray of shape (d,), int64, optional
            Positions of the wanted channels among the D; only these are kept. All by default.

        Returns
        -------
        ndarray of shape (B, h, w, D), float32
            The embeddings of an image do not depend on the other images in the batch.

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
        """Feature maps, one tensor (B, C, h, w) a layer, from torch: the graph does not give them.

        Parameters
        ----------
        pixels : ndarray of shape (B, H, W, 3)
            uint8 in [0, 255], or float32 in [0, 1].
        """
        if self._torch is None:
            self._torch = self._origin.open_torch()
        maps: list[Any] = self._torch(pixels)
        return maps

    def original_state(self) -> dict[str, Any]:
        """The same as :meth:`~anomalib_lite.backbones.Backbone.original_state`."""
        network = self._origin.open_torch()
        if network.sha256 != self.sha256:
            raise InvalidValueError(
                f"{self.where}: the weights of the backbone have changed since fit; fit again."
            )
        return network.original_state()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_runtime", "_torch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _torch=None)
        reason = refusal(self.engine, "cpu", self.where) or self._open_runtime()
        if reason is not None:
            raise reason

    def _open_runtime(self) -> InvalidValueError | None:
        """Open the graph, or return the error to raise if it does not run on this processor.

        The graph was checked where it was made, which may have been on another processor.
        """
        short = self.dtype != "float32"
        able = not (short and self.engine == "openvino" and _is_limited())
        if able:
            self._runtime = _RUNTIMES[self.engine](self._graph, self.dtype)
        if not (able and self._runtime.supports_dtype):
            return InvalidValueError(
                f"{self.where}: engine={self.engine!r} cannot compute in {self.dtype} on this "
                "processor. Use dtype='float32' or engine='torch'."
            )
        size = (1, *self._sizes["traced"], 3)
        pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        try:
            found = self._runtime.embed(pixels)
        except RuntimeError as error:
            return InvalidValueError(
                f"{self.where}: engine={self.engine!r} cannot run this backbone on this processor: "
                f"{error}. Use engine='torch'."
            )
        if not short:
            return None
        exact = _RUNTIMES[self.engine](self._graph, "float32").embed(pixels)
        rounding = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        if rounding <= _MOST_ROUNDING:
            return None
        return InvalidValueError(
            f"{self.where}: engine={self.engine!r} cannot compute in {self.dtype} on this "
            f"processor: embeddings differ from those in float32 by {rounding:.2g} of their "
            "length. Use dtype='float32' or engine='torch'."
        )


@dataclass(frozen=True)
class _Origin:
    """What a graph is made from: a network, its weights and layers, for an engine.

    Attributes
    ----------
    backbone : str or torch.nn.Module
    engine, where : str
    arguments : dict
        Arguments of :class:`~anomalib_lite.backbones.Backbone`: weights, layers, strides, fusion,
        adapter and state.
    """

    backbone: Any
    engine: str
    where: str
    arguments: dict[str, Any]

    def open_torch(self) -> Backbone:
        """Open the network that the graph was made of, on the CPU in float32."""
        from anomalib_lite.backbones import Backbone

        options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "where": self.where}
        return Backbone(self.backbone, **self.arguments, **options)

    def cached_graph(self, sha256: str | None) -> _Graph | None:
        """Return the graph from the cache, if the weights can be identified without torch."""
        weights, layers = self._weights_id(sha256), self.arguments["layers"]
        if layers is not None and not isinstance(layers, list | tuple):
            return None  # Backbone says what is wrong
        return None if weights is None else _cache.read(self._key(weights, layers))

    def convert(self) -> _Graph | InvalidValueError:
        """Convert torch's network and store the graph; or return the error that says why not."""
        network = self.open_torch()
        weights = self._weights_id(network.sha256)
        made: _Graph | InvalidValueError | None = None
        if weights:
            made = _cache.read(self._key(network.sha256, network.layers))
        made = made or self._convert(network)
        if weights and not isinstance(made, InvalidValueError):
            asked = [self.arguments["layers"], network.layers]
            keys = [self._key(w, layers) for w in (weights, network.sha256) for layers in asked]
            _cache.write(keys, *made)
        return made

    def _convert(self, network: Backbone) -> _Graph | InvalidValueError:
        from anomalib_lite.engines._conversion import (
            GraphError,
            check_converted,
            convert_backbone,
        )

        try:
            graph, sizes = convert_backbone(network, self.engine)
            check_converted(lambda: _RUNTIMES[self.engine](graph, "float32"), network, sizes)
        except GraphError as error:
            message = (
                f"{self.where}: engine={self.engine!r} cannot run this backbone: {error}. Use "
                "engine='torch'."
            )
            return _caused_by(error, InvalidValueError(message))
        names = ("layers", "stride", "channels", "mean", "std", "sha256", "depthwise")
        return {name: getattr(network, name) for name in names} | {"sizes": sizes}, graph

    def _weights_id(self, sha256: str | None) -> str | None:
        """Return a hash that identifies the weights; None if only torch can tell what they are."""
        if not isinstance(self.backbone, str):  # a module may run any code
            return None
        if self.arguments["state"] is not None:
            return sha256
        file = self.arguments["weights"]
        if file is None:
            file = package_file(self.backbone) or directory_file(self.backbone, self.where)
        if file is None:  # from the hub, which may hold others tomorrow
            return sha256
        return _file_id(Path(file))

    def _key(self, weights: str, layers: Sequence[str | int] | None) -> dict[str, Any]:
        """Return the cache's key of this graph, for weights of this hash."""
        adapter = self.arguments["adapter"]
        return {
            "backbone": self.backbone,
            "weights": weights,
            "layers": None if layers is None else [repr(layer) for layer in layers],
            "strides": list(self.arguments["strides"]) if layers is None else None,
            "fusion": self.arguments["fusion"],
            "adapter": None if adapter is None else adapter.sha256(),
            "engine": self.engine,
            "made_by": _made_by(self.engine),
        }


def _caused_by(cause: Exception, error: InvalidValueError) -> InvalidValueError:
    # In a function of its own: a variable beside the traceback of the cause would be a cycle of
    # references, which keeps torch's network in memory.
    error.__cause__ = cause
    return error


def _resolve_dtype(dtype: str, engine: str, depthwise: bool) -> str:
    if dtype != "auto":
        return dtype
    fast = engine == "openvino" and not depthwise and not _is_limited() and has_unit("bfloat16")
    return "bfloat16" if fast else "float32"


def _is_limited() -> bool:
    """Tell whether OpenVINO is kept from some instructions.

    What it says that it can do does not consider that, and it may crash where it tries.
    """
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in ("", "ALL", "DEFAULT")


def _file_id(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if it cannot be read, which ``Backbone`` reports."""
    try:
        with path.open("rb") as file:
            return "file:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@cache
def _made_by(engine: str) -> dict[str, str]:
    """Return the versions of all that decides what a graph computes."""
    made_by = {"anomalib_lite": __version__}
    for package in ("timm", "torch", engine):
        try:
            made_by[package] = version(package)
        except PackageNotFoundError:  # torch or timm, under another name
            made_by[package] = ""
    made_by["sources"] = _cache.digest(
        [[path.relative_to(_PACKAGE).as_posix(), path.read_text("utf-8")] for path in sources()]
    )
    return made_by


def sources() -> list[Path]:
    """List the files whose code decides what a graph computes."""
    found = [path for name in _FOLDERS for path in sorted((_PACKAGE / name).rglob("*.py"))]
    return found + [_PACKAGE / name for name in _FILES]
