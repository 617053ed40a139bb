"""OpenVINO and ONNX Runtime: a converted graph, ready to run on the CPU, without torch."""

from __future__ import annotations

import importlib
import sys
import threading
from collections import Counter
from typing import Any

import numpy as np

from anomalib_lite._threads import requested_threads

__all__ = ["OnnxRuntimeGraph", "OpenVinoGraph", "import_openvino"]

# A graph made for one size is faster by a third for a small network, and takes a tenth of a
# second to make: so only for sizes that come again and again, and where weights are small.
_IMAGES_BEFORE_OWN_GRAPH = 32
_SMALL_WEIGHTS = 32 << 20
_MOST_OWN_GRAPHS = 4

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def import_openvino() -> Any:
    """The module, imported without the part of it that reports its use over the network."""
    if "openvino" in sys.modules:  # then whoever imported it has decided
        return sys.modules["openvino"]
    reporter = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as if not installed
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules["openvino_telemetry"]
        if reporter is not None:
            sys.modules["openvino_telemetry"] = reporter


class OpenVinoGraph:
    """Runs a graph with OpenVINO: each image by itself, several at a time.

    So an image's embeddings do not depend on which others share its batch. The graph that takes
    any size, on all cores for one image, is the standard. Faster variants (one image a core; made
    for one size) are used only if they give the same bits.

    Parameters
    ----------
    graph : bytes
        From ``convert_backbone``.
    dtype : {"float32", "bfloat16", "float16"}
        In which numbers; ``supports_dtype`` says whether the processor can.
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
        # By size (None: any) and whether many images come at once; None: not the same bits.
        self._queues: dict[tuple[Any, bool], Any] = {}
        self._lock = threading.Lock()
        self._standard = self._queues[None, False] = self._compile(None, False)
        compiled = self._standard[0].get_compiled_model()
        precision = compiled.get_property("INFERENCE_PRECISION_HINT")
        self.supports_dtype = precision.get_type_name() == _PRECISIONS[dtype]

    def embed(self, pixels: np.ndarray, channels: np.ndarray | None = None) -> np.ndarray:
        """(B, H, W, 3), uint8 or float32 in [0, 1] -> (B, h, w, D) float32."""
        with self._lock:
            try:
                return self._run(self._queue_for(pixels), pixels, channels)
            except RuntimeError:
                # A queue in which one run failed fails in all that follow.
                self._queues.clear()
                self._standard = self._queues[None, False] = self._compile(None, False)
                raise

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
        """The fastest variant that gives the same bits as the standard."""
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


def _keep_output(request: Any, place: tuple[dict[str, np.ndarray], int, int, Any]) -> None:
    (found, i, n, channels), output = place, request.get_output_tensor().data[0]  # (h, w, D)
    shape = (n, *output.shape[:2], output.shape[2] if channels is None else len(channels))
    # Several threads come here; the first to set the array sets it for all.
    all_outputs = found.setdefault("embeddings", np.empty(shape, np.float32))
    if channels is None:
        all_outputs[i] = output
    else:  # checking each index takes longer
        np.take(output, channels, axis=2, out=all_outputs[i], mode="clip")


class OnnxRuntimeGraph:
    """Runs a graph with ONNX Runtime, one image after the other, in float32.

    Parameters
    ----------
    graph : bytes
        From ``convert_backbone``.
    dtype : str
        ``supports_dtype`` is whether it is "float32".
    """

    def __init__(self, graph: bytes, dtype: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = requested_threads() or 0
        options.log_severity_level = 3  # it warns of each shape that it cannot know beforehand
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
        except Exception as error:  # of kinds that it does not export
            raise RuntimeError(str(error)) from error
