"""One run of anomalib-lite in a process of its own: ``worker_ours.py job.json``.

Tasks: ``patchcore`` (fit and test), ``coreset`` (greedy k-centre alone), ``store`` (save a fitted
detector for the next two), ``latency`` (single images and batches) and ``start`` (from the start of
the process to the first score). torch is not imported here: the library does so when it needs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from measuring import (
    PROCESS_START,
    Predictions,
    Stopwatch,
    environment,
    peak_rss_mb,
    reached,
    read_job,
    time_singly,
    write_result,
)

DISTRIBUTIONS = (
    "torch", "timm", "numpy", "faiss-cpu", "openvino", "onnxruntime", "scikit-learn", "pillow",
)  # fmt: skip


def main() -> None:
    """Do the task and write the result."""
    job = read_job()
    tasks = {
        "patchcore": run_patchcore,
        "coreset": run_coreset,
        "store": run_store,
        "latency": run_latency,
        "start": run_start,
    }
    result = tasks[job["task"]](job)
    result |= environment(*DISTRIBUTIONS)
    result["versions"]["anomalib-lite"] = __import__("anomalib_lite").__version__
    write_result(job, result)


def run_patchcore(job: dict[str, Any]) -> dict[str, Any]:
    """Fit on the training images, detect on the test images."""
    watch = Stopwatch()
    import anomalib_lite

    classes = {"patchcore": "PatchCore", "padim": "PaDiM"}
    cls = getattr(anomalib_lite, classes[job["method"]])
    result: dict[str, Any] = watch.read("import")
    result["rss_after_import_mb"] = peak_rss_mb()

    watch = Stopwatch()
    detector = cls(**parameters(job))
    result |= watch.read("build")

    watch = Stopwatch()
    detector.fit(job["train"])
    result |= watch.read("fit")
    result["peak_rss_after_fit_mb"] = peak_rss_mb()

    watch = Stopwatch()
    predictions = Predictions(job["predictions"])
    for positions, detections in detect_all(detector, job):
        predictions.add(positions, detections.scores, detections.maps)
    result |= watch.read("test")
    result["script_s"] = time.perf_counter() - PROCESS_START
    result["peak_rss_mb"] = peak_rss_mb()  # before anything is stacked, saved or scored

    padim = job["method"] == "padim"
    bank = np.asarray(detector.gaussians_.mean if padim else detector.memory_bank_.embeddings_)
    result["bank_shape"] = bank.shape
    result["settings"] = settings(detector)
    predictions.finish(bank)
    return result


def parameters(job: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the detector; all others are defaults."""
    own = {"coreset_ratio": job["coreset_ratio"]}
    if job["method"] == "padim":  # fits on all images, as the peer does
        own = {"n_components": job["n_components"], "calibration": "leave_one_out"}
    return own | {
        "backbone": "efficientnet_lite0",
        "image_size": tuple(job["image_size"]),
        "batch_size": job["batch_size"],
        "random_state": job["seed"],
    }


def detect_all(detector: Any, job: dict[str, Any]) -> Iterator[tuple[range, Any]]:
    """Yield scores and maps of the test images, two batches per call, so few are in memory."""
    test = job["test"]
    for start in range(0, len(test), 2 * job["batch_size"]):
        positions = range(start, min(start + 2 * job["batch_size"], len(test)))
        yield positions, detector.detect([test[i] for i in positions])


def settings(detector: Any) -> dict[str, Any]:
    """Return every parameter of the detector, and the values chosen for ``auto``."""
    chosen = dict(detector.get_params(deep=False))
    for name in ("dtype_", "engine_"):
        if hasattr(detector, name):
            chosen[name] = getattr(detector, name)
    plain = int | float | str | None
    return {k: v if isinstance(v, plain) else str(v) for k, v in chosen.items()}


def run_coreset(job: dict[str, Any]) -> dict[str, Any]:
    """Pick ``n_samples`` rows of the stored embeddings, after a small warm-up call."""
    watch = Stopwatch()
    from anomalib_lite.coreset import greedy_k_center

    result: dict[str, Any] = watch.read("import")
    X = np.load(job["embeddings"])[: job["n_rows"]]
    greedy_k_center(X[:1000].copy(), 10, random_state=0)
    rss_before = peak_rss_mb()

    watch = Stopwatch()
    picks = greedy_k_center(X, job["n_samples"], random_state=job["seed"])
    result |= watch.read("coreset")
    result |= {"rss_before_mb": rss_before, "peak_rss_mb": peak_rss_mb()}
    result["picks"] = np.asarray(picks).tolist()
    return result


def run_store(job: dict[str, Any]) -> dict[str, Any]:
    """Fit and save a detector."""
    from anomalib_lite import PatchCore

    detector = PatchCore(**parameters(job)).fit(job["train"])
    detector.save(job["stored"])
    return {"score": float(detector.score(job["test"][0])[0]), "settings": settings(detector)}


def run_latency(job: dict[str, Any]) -> dict[str, Any]:
    """Score images one by one, then the test images in batches, from paths each time."""
    from anomalib_lite import load

    detector, n_warm_up = load(job["stored"]), job["n_warm_up"]
    result: dict[str, Any] = time_singly("detect", detector.detect, job["single"], n_warm_up)
    result |= time_singly("score", detector.score, job["single"], n_warm_up)
    detector.detect(job["test"][: job["batch_size"]])
    watch = Stopwatch()
    for _ in detect_all(detector, job):
        pass
    return result | watch.read("batches") | {"peak_rss_mb": peak_rss_mb()}


def run_start(job: dict[str, Any]) -> dict[str, Any]:
    """Import, load and score one image, then another."""
    from anomalib_lite import load

    result: dict[str, Any] = reached(job, "imports")
    result["rss_after_import_mb"] = peak_rss_mb()
    detector = load(job["stored"])
    result |= reached(job, "loaded")
    result["score"] = float(detector.score(job["test"][0])[0])
    result |= reached(job, "score")
    watch = Stopwatch()
    detector.score(job["test"][1])
    return result | watch.read("second") | {"peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    main()
