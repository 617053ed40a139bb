"""One run of anomalib-lite in a process of its own: ``worker_ours.py job.json``.

Tasks: ``patchcore`` (fit and test) and ``coreset`` (greedy k-centre alone).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from measuring import (
    PROCESS_START,
    Predictions,
    Stopwatch,
    environment,
    peak_rss_mb,
    read_job,
    write_result,
)

DISTRIBUTIONS = (
    "torch", "timm", "numpy", "faiss-cpu", "openvino", "onnxruntime", "scikit-learn", "pillow",
)  # fmt: skip


def main() -> None:
    """Do the task and write the result."""
    job = read_job()
    task = {"patchcore": run_patchcore, "coreset": run_coreset}[job["task"]]
    result = task(job)
    result |= environment(*DISTRIBUTIONS)
    result["versions"]["anomalib-lite"] = __import__("anomalib_lite").__version__
    write_result(job, result)


def run_patchcore(job: dict[str, Any]) -> dict[str, Any]:
    """Fit on the training images, detect on the test images."""
    watch = Stopwatch()
    import torch

    from anomalib_lite import PatchCore

    result: dict[str, Any] = watch.read("import")
    result["rss_after_import_mb"] = peak_rss_mb()
    torch.set_num_threads(job["threads"])

    watch = Stopwatch()
    detector = PatchCore(
        backbone="efficientnet_lite0",
        image_size=tuple(job["image_size"]),
        coreset_ratio=job["coreset_ratio"],
        batch_size=job["batch_size"],
        random_state=job["seed"],
    )
    result |= watch.read("build")

    watch = Stopwatch()
    detector.fit(job["train"])
    result |= watch.read("fit")
    result["peak_rss_after_fit_mb"] = peak_rss_mb()

    watch = Stopwatch()
    predictions, test = Predictions(job["predictions"]), job["test"]
    for start in range(0, len(test), 2 * job["batch_size"]):
        positions = range(start, min(start + 2 * job["batch_size"], len(test)))
        detections = detector.detect([test[i] for i in positions])
        predictions.add(positions, detections.scores, detections.maps)
    result |= watch.read("test")
    result["script_s"] = time.perf_counter() - PROCESS_START
    result["peak_rss_mb"] = peak_rss_mb()  # before anything is stacked, saved or scored

    bank = np.asarray(detector.memory_bank_.embeddings_)
    result["bank_shape"] = bank.shape
    result["settings"] = settings(detector)
    predictions.finish(bank)
    return result


def settings(detector: Any) -> dict[str, Any]:
    """Every parameter of the detector, and what ``auto`` became."""
    parameters = dict(detector.get_params(deep=False))
    for name in ("dtype_", "engine_", "device_"):
        if hasattr(detector, name):
            parameters[name] = getattr(detector, name)
    plain = int | float | str | None
    return {k: v if isinstance(v, plain) else str(v) for k, v in parameters.items()}


def run_coreset(job: dict[str, Any]) -> dict[str, Any]:
    """Pick ``n_samples`` rows of the stored embeddings, after a small warm-up call."""
    watch = Stopwatch()
    import torch

    from anomalib_lite.coreset import greedy_k_center

    result: dict[str, Any] = watch.read("import")
    torch.set_num_threads(job["threads"])
    X = np.load(job["embeddings"])[: job["n_rows"]]
    greedy_k_center(X[:1000].copy(), 10, random_state=0)
    rss_before = peak_rss_mb()

    watch = Stopwatch()
    picks = greedy_k_center(X, job["n_samples"], random_state=job["seed"])
    result |= watch.read("coreset")
    result |= {"rss_before_mb": rss_before, "peak_rss_mb": peak_rss_mb()}
    result["picks"] = np.asarray(picks).tolist()
    return result


if __name__ == "__main__":
    main()
