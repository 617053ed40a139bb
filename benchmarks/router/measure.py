"""How many good images does a router send to their product, and how many does it refuse?

python benchmarks/router/measure.py --root DIR
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="directory of the papers of PIPED")
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--unknown-rate", type=float, default=0.06)
    args = parser.parse_args()

    rows = [one_draw(args.root, args.unknown_rate, seed) for seed in range(args.draws)]
    refused = [row["refused"] for row in rows]
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    found["refused_error"] = float(np.std(refused, ddof=1) / np.sqrt(len(refused)))
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


def one_draw(root: Path, unknown_rate: float, seed: int) -> dict[str, float]:
    """Fit on two thirds of the good images of each product, and route the others."""
    from anomalib_lite import PatchCore, ProductRouter

    random = np.random.default_rng(seed)
    to_fit, to_route = {}, {}
    for home in sorted(path for path in root.iterdir() if path.is_dir()):
        good = sorted([*(home / "train/good").iterdir(), *(home / "test/good").iterdir()])
        good = [good[i] for i in random.permutation(len(good))]
        n = round(2 / 3 * len(good))
        to_fit[home.name], to_route[home.name] = good[:n], good[n:]
    detector = PatchCore(
        image_size=128, coreset="random", false_alarm_rate=unknown_rate, random_state=seed
    )
    router = ProductRouter(detector, unknown_rate=unknown_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        router.fit(to_fit)
    right, refused = [], []
    for name, images in to_route.items():
        found = router.detect(images, maps=False)
        right.append(np.mean(found.nearest == name))
        refused.append(np.mean(found.routes == "unknown"))
    return {"right": float(np.mean(right)), "refused": float(np.mean(refused))}


if __name__ == "__main__":
    main()
