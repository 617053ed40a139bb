"""Metrics of both sides, computed in a process of its own.

``worker_judge.py job.json``. Tasks: ``metrics`` (image AUROC, pixel AUROC, AUPRO), ``radius``
(covering radius of a coreset) and ``agreement`` (our bank's rows against the peer's embeddings).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from measuring import load_predictions, read_job, write_result


def main() -> None:
    """Do the task and write the result."""
    job = read_job()
    tasks = {"metrics": judge_metrics, "radius": judge_radius, "agreement": judge_agreement}
    write_result(job, tasks[job["task"]](job))


def judge_metrics(job: dict[str, Any]) -> dict[str, Any]:
    """Compute image metrics on raw scores and, if there are masks, pixel metrics at their size."""
    from anomalib_lite.metrics import aupro, auroc, pixel_auroc

    scores, maps, _ = load_predictions(job["predictions"])
    found: dict[str, Any] = {"image_auroc": float(auroc(np.array(job["labels"]), scores))}
    if not any(job["masks"]):
        return found
    masks = [read_mask(image, mask) for image, mask in zip(job["test"], job["masks"], strict=True)]
    resized = sum(m.shape != mask.shape for m, mask in zip(maps, masks, strict=True))
    maps = [resize(m, mask.shape) for m, mask in zip(maps, masks, strict=True)]
    return found | {
        "pixel_auroc": float(pixel_auroc(masks, maps)),
        "aupro": float(aupro(masks, maps, fpr_limit=0.3)),
        "maps_resized_by_judge": resized,
    }


def read_mask(image: str, mask: str | None) -> np.ndarray:
    """Read the mask (H, W) bool at the image's own size; a good image has an empty one."""
    from PIL import Image

    with Image.open(image) as photograph:
        width, height = photograph.size
    if mask is None:
        return np.zeros((height, width), dtype=bool)
    with Image.open(mask) as truth:
        return np.asarray(truth.convert("L")) > 0


def resize(anomaly_map: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resize bilinearly with half-pixel centres; a map of this shape is returned unchanged."""
    if anomaly_map.shape == shape:
        return anomaly_map
    import torch
    from torch.nn.functional import interpolate

    x = torch.from_numpy(np.ascontiguousarray(anomaly_map))[None, None]  # (1, 1, h, w)
    return interpolate(x, size=shape, mode="bilinear", align_corners=False)[0, 0].numpy()


def judge_radius(job: dict[str, Any]) -> dict[str, Any]:
    """Compute the largest distance of a row to its nearest pick, in float64, unprojected."""
    X = np.load(job["embeddings"])[: job["n_rows"]]
    picks = np.asarray(job["picks"])
    nearest = nearest_rows(X, X[picks])
    distances = np.linalg.norm(X.astype(np.float64) - X[picks][nearest], axis=1)
    return {
        "covering_radius": float(distances.max()),
        "mean_distance": float(distances.mean()),
        "n_picks": len(picks),
        "n_distinct_picks": len(np.unique(picks)),
    }


def judge_agreement(job: dict[str, Any]) -> dict[str, Any]:
    """Compute how far each row of our bank is from the peer's embeddings of the same images.

    Distances are relative to the row's norm. About 1e-6 means the same pixels and the same network
    in float32; rounding the resized pixels to 8 bits alone gives about 3e-2.
    """
    _, _, bank = load_predictions(job["predictions"])
    X = np.load(job["embeddings"])
    nearest = nearest_rows(bank, X)
    relative = np.linalg.norm(bank - X[nearest], axis=1) / np.linalg.norm(bank, axis=1)
    return {
        "median": float(np.median(relative)),
        "p95": float(np.quantile(relative, 0.95)),
        "largest": float(relative.max()),
    }


def nearest_rows(Q: np.ndarray, X: np.ndarray, block: int = 1024) -> np.ndarray:
    """Return the index of the row of X nearest to each row of Q, computed in float64."""
    X = X.astype(np.float64)
    sq_norms = (X**2).sum(axis=1)
    found = [
        (sq_norms - 2 * Q[i : i + block].astype(np.float64) @ X.T).argmin(axis=1)
        for i in range(0, len(Q), block)
    ]
    return np.concatenate(found)


if __name__ == "__main__":
    main()
