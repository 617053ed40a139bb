"""OpenVINO and ONNX Runtime: run a converted graph on the CPU, without torch."""

from __future__ import annotations

import importlib
import sys
import threading
from collections import Counter
from typing import Any

import numpy as np

from anomalib_lite._threads import requested_threads

__all__ = ["OnnxRuntimeGraph", "OpenVinoGraph", "has_unit", "import_openvino"]

# For a small network, a graph made for one image size is faster by a third and takes a tenth of a
# second to make. So it is made only for sizes that come often, and only if the weights are small.
_IMAGES_BEFORE_OWN_GRAPH = 32
_SMALL_WEIGHTS = 32 << 20
_MOST_OWN_GRAPHS = 4

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# What OpenVINO calls the instructions for a type. Without those for bfloat16, it computes in it all
# the same where there is AVX-512, but more slowly than in float32.
_UNITS = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


def import_openvino() -> Any:
    """Import OpenVINO without its part that reports its use over the network."""
    if "openvino" in sys.modules:  # imported before, with or without that part
        return sys.modules["openvino"]
    reporter = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as if not installed
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules["openvino_telemetry"]
        if reporter is not None:
            sys.modules["openvino_telemetry"] = reporter


def has_unit(dtype: str) -> bool:
    """Tell whether OpenVINO finds instructions for ``dtype`` on this processor."""
    able = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return _UNITS[dtype] in able


class OpenVinoGraph:
    """Runs a graph with OpenVINO: each image by itself, several at a time.

    An image's embeddings therefore do not depend on the other images in its batch. The standard
    is the graph that takes any size, with all cores on one image. Faster variants (one image per
    core; a graph made for one size) are used only if they give the same bits.

    Parameters
    ----------
    graph : bytes
        From ``convert_backbone``.
    dtype : {"float32", "bfloat16", "float16"}
        Number type to compute in.

    Attributes
    ----------
    supports_dtype : bool
        Whether the processor has instructions for ``dtype`` and the graph uses them.
    """

    def __init__(self, graph: bytes, dtype: str) -> None:
        self._openvino = import_openvino()
        self._core = self._openvino.Core()
        length = int.from_bytes(graph[:8], "little")
        xml, weights = graph[8 : 8 + length], np.frombuffer(graph, np.uint8, offset=8 + length)
        self._model = self._core.read_model(xml, self._openvino.Tensor(weights.copy()))
        self._small = len(weights) <= _SMALL_WEIGHTS
        self._config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _PRECISIONS[dtype]}
        if requested_threads():
            self._config["INFERENCE_NUM_THREADS"] = requested_threads()
        self._seen: Counter[tuple[int, int]] = Counter()
        # Variants, by size (None: any size) and whether several images come at once. The value is
        # None for a variant that does not give the same bits.
        self._queues: dict[tuple[Any, bool], Any] = {}
        self._lock = threading.Lock()
        self._standard = self._queues[None, False] = self._compile(None, False)
        compiled = self._standard[0].get_compiled_model()
        precision = compiled.get_property("INFERENCE_PRECISION_HINT")
        self.supports_dtype = has_unit(dtype) and precision.get_type_name() == _PRECISIONS[dtype]

    def embed(self, pixels: np.ndarray, channels: np.ndarray | None = None) -> np.ndarray:
        """(B, H, W, 3), uint8 or float32 in [0, 1] -> (B, h, w, D) float32."""
        with self._lock:
            try:
                return self._run(self._queue_for(pixels), pixels, channels)
            except RuntimeError as error:
                # After one failed run, a queue fails in all later ones.
                self._queues.clear()
                self._standard = self._queues[None, False] = self._compile(None, False)
                raise RuntimeError(_reason(error)) from error

    def _run(
        self, queue: Any, pixels: np.ndarray, channels: np.ndarray | None = None
    ) -> np.ndarray:
        found: dict[str, np.ndarray] = {}
        for i, image in enumerate(pixels):
            in_bytes = image.dtype == np.uint8
            given = image.astype(np.float32) if in_bytes else image * np.float32(255)
            queue.start_async({0: given[None]}, (found, i, len(pixels), channels))
        queue.wait_all()
        return found["embeddings"]

    def _queue_for(self, pixels: np.ndarray) -> Any:
        """Return the fastest variant that gives the same bits as the standard."""
        size, many = pixels.shape[1:3], len(pixels) > 1
        self._seen[size] += len(pixels)
        wishes: list[tuple[Any, bool]] = [(None, many)]
        if self._small and self._seen[size] >= _IMAGES_BEFORE_OWN_GRAPH:
            wishes.insert(0, (size, many))
        for wish in wishes:
            if wish not in self._queues:
                self._forget_a_size()
                queue = self._compile(*wish)
                probe = pixels[:1]
                same = np.array_equal(self._run(queue, probe), self._run(self._standard, probe))
                self._queues[wish] = queue if same else None
            if self._queues[wish] is not None:
                return self._queues[wish]
        return self._standard

    def _forget_a_size(self) -> None:
        own = [wish for wish, queue in self._queues.items() if wish[0] is not None and queue]
        if len(own) >= _MOST_OWN_GRAPHS:
            size = min(own, key=lambda wish: self._seen[wish[0]])
            del self._queues[size]
            self._seen[size[0]] = 0

    def _compile(self, size: tuple[int, int] | None, many: bool) -> Any:
        model = self._model
        if size is not None:
            model = model.clone()
            model.reshape([1, *size, 3])
        hint = {"PERFORMANCE_HINT": "THROUGHPUT" if many else "LATENCY"}
        compiled = self._core.compile_model(model, "CPU", self._config | hint)
        queue = self._openvino.AsyncInferQueue(compiled)
        queue.set_callback(_keep_output)
        return queue


def _reason(error: RuntimeError) -> str:
    """Return the line that says what is wrong; those before it say where in OpenVINO."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Exception from ")]
    return (told or lines or ["it says no more"])[0]


def _keep_output(request: Any, place: tuple[dict[str, np.ndarray], int, int, Any]) -> None:
    (found, i, n, channels), output = place, request.get_output_tensor().data[0]  # (h, w, D)
    shape = (n, *output.shape[:2], output.shape[2] if channels is None else len(channels))
    # Several threads call this; the first one makes the array for all of them.
    all_outputs = found.setdefault("embeddings", np.empty(shape, np.float32))
    if channels is None:
        all_outputs[i] = output
    else:  # the default mode would check each index, which is slower
        np.take(output, channels, axis=2, out=all_outputs[i], mode="clip")


class OnnxRuntimeGraph:
    """Runs a graph with ONNX Runtime, one image after the other, in float32.

    Parameters
    ----------
    graph : bytes
        From ``convert_backbone``.
    dtype : str
        Number type to compute in.

    Attributes
    ----------
    supports_dtype : bool
        True for "float32" alone.
    """

    def __init__(self, graph: bytes, dtype: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = requested_threads() or 0
        options.log_severity_level = 3  # or it warns of each shape that it cannot infer
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        self.supports_dtype = dtype == "float32"

    def embed(self, pixels: np.ndarray, channels: np.ndarray | None = None) -> np.ndarray:
        """(B, H, W, 3), uint8 or float32 in [0, 1] -> (B, h, w, D) float32."""
        try:
            scale = np.float32(1 if pixels.dtype == np.uint8 else 255)
            inputs = ({"pixels": image[None] * scale} for image in pixels)
            wanted = slice(None) if channels is None else channels
            outputs = (self._session.run(None, given)[0] for given in inputs)
            return np.concatenate([output[..., wanted] for output in outputs])
        except Exception as error:  # its own types of errors are private
            raise RuntimeError(str(error)) from error
