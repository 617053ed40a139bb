"""How well does a preset find defects on magnetic tiles? One JSON line says it.

    python benchmarks/accuracy/magnetic_tile.py --root /path/to/magnetic_tile
    python benchmarks/accuracy/magnetic_tile.py --root /path/to/magnetic_tile --preset fast
    python benchmarks/accuracy/magnetic_tile.py --root /path/to/magnetic_tile --ensemble

The data set: Huang, Qiu and Yuan, "Surface defect saliency of magnetic tile", The Visual Computer
36, 2020, as published or in MVTec AD's layout. Nothing is chosen on the test images: presets were
chosen on training images and synthetic anomalies, as README.md says.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

# Members of the ensemble, beside the preset: networks and strides that see other things.
MEMBERS: tuple[dict[str, Any], ...] = (
    {"backbone": "efficientnet_lite2", "image_size": 320},
    {"backbone": "efficientnet_lite2", "image_size": 384, "layers": ("blocks.4", "blocks.6")},
    {"backbone": "efficientnet_lite0", "image_size": 384},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="directory of the data set")
    parser.add_argument("--preset", default="accurate", help="a preset of PatchCore, or 'default'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vit", type=Path, help="weights of a DINOv2 ViT-S/14, for --ensemble")
    parser.add_argument("--ensemble", action="store_true", help="several detectors, scores summed")
    args = parser.parse_args()

    from anomalib_lite import PatchCore
    from anomalib_lite.datasets import open_dataset

    dataset = open_dataset(args.root, layout="auto")
    train, test = list(dataset.train), list(dataset.test)
    print(f"{dataset!r}", flush=True)
    began = time.perf_counter()
    if args.ensemble:
        members = list(MEMBERS)
        if args.vit is not None:
            members.append({"backbone": "dinov2_vits14", "weights": args.vit, "image_size": 448})
        detectors = [
            PatchCore(**{"coreset_size": 10_000, "random_state": args.seed} | member)
            for member in members
        ]
    elif args.preset == "default":
        detectors = [PatchCore(random_state=args.seed)]
    else:
        detectors = [PatchCore.preset(args.preset, random_state=args.seed)]
    scores, maps = detect(detectors, train, test)
    seconds = time.perf_counter() - began
    print(json.dumps(judge(test, scores, maps) | {"seconds": round(seconds, 1)}))


def detect(detectors: list[Any], train: list[Any], test: list[Any]) -> tuple[Any, Any]:
    """Return scores and heatmaps of the test images; of several detectors, their means.

    Each detector's scores and maps are standardised first: logarithms, less the mean and divided
    by the deviation of those of its calibration images, which it was not fitted on.
    """
    import numpy as np

    all_scores, all_maps = [], []
    for detector in detectors:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector.fit(train)
        found = detector.detect(test)
        if len(detectors) == 1:
            return found.scores, found.maps
        normal = np.log(detector.calibration_scores_)
        mean, spread = normal.mean(), normal.std(ddof=1)
        all_scores.append((np.log(found.scores) - mean) / spread)
        least = np.finfo(np.float32).tiny
        all_maps.append([(np.log(np.maximum(m, least)) - mean) / spread for m in found.maps])
        print(f"{detector.backbone}, {detector.image_size}: fitted and tested", flush=True)
    maps = [np.mean(same, axis=0) for same in zip(*all_maps, strict=True)]
    return np.mean(all_scores, axis=0), maps


def judge(test: list[Any], scores: Any, maps: Any) -> dict[str, Any]:
    """Return the metrics; kinds of defects one by one as well."""
    import numpy as np

    from anomalib_lite.metrics import aupro, auroc, pixel_auroc, pixel_average_precision

    labels = np.array([sample.label for sample in test])
    masks = [
        np.zeros(np.shape(heatmap), bool) if sample.mask_path is None else sample.mask()
        for sample, heatmap in zip(test, maps, strict=True)
    ]
    kinds = np.array([sample.kind for sample in test])
    normal = labels == 0
    per_kind = {
        kind: round(auroc(labels[of_kind], scores[of_kind]), 4)
        for kind in sorted(set(kinds[~normal]))
        if (of_kind := normal | (kinds == kind)).any()
    }
    return {
        "image_auroc": round(auroc(labels, scores), 4),
        "pixel_auroc": round(pixel_auroc(masks, maps), 4),
        "pixel_ap": round(pixel_average_precision(masks, maps), 4),
        "aupro": round(aupro(masks, maps), 4),
        "per_kind": per_kind,
    }


if __name__ == "__main__":
    main()
