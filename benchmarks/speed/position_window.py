"""What does a position window save in the search, and what does it cost in accuracy, on tiles?

    python benchmarks/speed/position_window.py --root /path/to/magnetic_tile
    python benchmarks/speed/position_window.py --root /path/to/magnetic_tile --images 40 --rounds 2

Prints one JSON line for each window: ``ms``, milliseconds to score the embeddings of one image,
which are computed before; ``ratio``, that time by the one without a window; ``image_auroc`` on the
test images; and ``bank``, the number of patches in it. The windows run in turns, and times and
ratios are medians over the rounds. With OMP_NUM_THREADS=1 they are those of one thread.

The tiles are textures that were cut out at any place, which no window is meant for.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

WINDOWS = (None, 0, 1, 2)
TIMED = 16  # images


def embed(detector: Any, paths: list[Path]) -> list[np.ndarray]:
    """Return the embeddings (1, h, w, D) of each image, as the detector would compute them."""
    from anomalib_lite.images import ImageSource

    source, backbone = ImageSource(paths), detector.backbone_
    loaded = (source.load(i, detector.image_size_, backbone.stride)[0] for i in range(len(source)))
    return [backbone.embed(pixels[None]) for pixels in loaded]


def measure(detector: Any, embeddings: list[np.ndarray]) -> float:
    """Return the milliseconds in which the detector scores the embeddings of one image."""
    began = time.perf_counter()
    for E in embeddings:
        detector.score_embeddings(E)
    return 1000 * (time.perf_counter() - began) / len(embeddings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="directory of the data set")
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--coreset-ratio", type=float, default=0.1)
    parser.add_argument("--images", type=int, help="to fit on, and to test; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    from anomalib_lite import PatchCore, evaluate
    from anomalib_lite.datasets import open_dataset
    from anomalib_lite.studies import draw_images

    dataset = open_dataset(args.root, layout="auto")
    train, test = draw_images(dataset, 0, args.images, args.images)
    given = {"image_size": args.image_size, "coreset_ratio": args.coreset_ratio}
    detectors = [
        PatchCore(position_window=window, false_alarm_rate=0.05, **given).fit(train)
        for window in WINDOWS
    ]
    embeddings = embed(detectors[0], [sample.path for sample in test[:TIMED]])
    for detector in detectors:
        measure(detector, embeddings)  # warms up
    ms = np.array([[measure(d, embeddings) for d in detectors] for _ in range(args.rounds)])
    for i, (window, detector) in enumerate(zip(WINDOWS, detectors, strict=True)):
        found = evaluate(detector, test, pixel_metrics=False)
        row = {
            "position_window": window,
            "ms": round(float(np.median(ms[:, i])), 2),
            "ratio": round(float(np.median(ms[:, i] / ms[:, 0])), 3),
            "image_auroc": round(found.metrics["image_auroc"], 4),
            "bank": len(detector.memory_bank_.embeddings_),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
