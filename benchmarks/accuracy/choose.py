"""Which parameters should "accurate" have? Judged without one real defect.

    python benchmarks/accuracy/choose.py

Each candidate is fitted on two thirds of the training images of a category, and must tell the last
third from copies of it with synthetic anomalies. Categories are those of benchmarks/options.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

DATA = Path(os.environ.get("ANOMALIB_LITE_DATA", HERE.parents[2] / "shared" / "data"))
CATEGORIES = ("magnetic_tile", "piped/PA_BRG03_TL", "elpv/mono", "elpv/poly", "textile")
LITE2: dict[str, Any] = {"backbone": "efficientnet_lite2", "image_size": 384}
CANDIDATES: dict[str, dict[str, Any]] = {
    "default": {},
    "10,000 patches": {"coreset_size": 10_000},
    "Lite2, 320": LITE2 | {"image_size": 320},
    "Lite2, 384": LITE2,
    "Lite2, 384, smoothed": LITE2 | {"image_score": "smoothed"},
    "Lite2, 384, 10,000": LITE2 | {"coreset_size": 10_000},
    "Lite2, 448, smoothed, 10,000": LITE2
    | {"image_size": 448, "image_score": "smoothed", "coreset_size": 10_000},
    "Lite2, 384, per_layer": LITE2 | {"fusion": "per_layer"},
    "Lite2, 448, per_layer": LITE2 | {"image_size": 448, "fusion": "per_layer"},
    "Lite2, 448, per_layer, smoothed": LITE2
    | {"image_size": 448, "fusion": "per_layer", "image_score": "smoothed"},
    "Lite2, 384, strides 16 and 32": LITE2 | {"layers": ("blocks.4", "blocks.6")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=90, help="most images of a category")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES))
    args = parser.parse_args()

    import numpy as np

    from anomalib_lite import PatchCore
    from anomalib_lite.metrics import auroc
    from anomalib_lite.studies import draw_images, open_category
    from anomalib_lite.synthetic import SyntheticAnomalies

    warnings.simplefilter("ignore")
    for name in args.candidates:
        parameters = CANDIDATES[name]
        found = []
        for category in CATEGORIES:
            images, _ = draw_images(open_category(category, DATA), 0, args.images)
            n = 2 * len(images) // 3
            fit, left = images[:n], images[n:]
            made = SyntheticAnomalies(severity=(0.15, 0.6), random_state=0).generate(
                left, len(left)
            )
            detector = PatchCore(**parameters, false_alarm_rate=0.05).fit(fit)
            scores = np.concatenate([detector.score(left), detector.score(made.images)])
            found.append(auroc(np.repeat([0, 1], len(left)), scores))
        each = " ".join(
            f"{category}: {value:.3f}" for category, value in zip(CATEGORIES, found, strict=True)
        )
        print(f"{name:32} mean {np.mean(found):.4f}  {each}", flush=True)


if __name__ == "__main__":
    main()
