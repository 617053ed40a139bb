"""How much faster is the default network in OpenVINO than in torch, for one image and in a batch?

    python benchmarks/speed/engines.py
    python benchmarks/speed/engines.py --rounds 3

Prints one JSON line: milliseconds an image of 256 x 256 pixels in each engine, on the CPU in
float32, and ``ratio``, torch's by OpenVINO's. The engines run in turns. All figures are medians
over the rounds; a ratio is that of two times in one round.
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

ENGINES = ("torch", "openvino")
BATCH = 32
WARM_UP = 2  # rounds that do not count: each engine prepares itself for a new shape


def measure(network: Any, pixels: np.ndarray) -> float:
    """Return the milliseconds an image that the network needs for pixels (B, H, W, 3), uint8."""
    began = time.perf_counter()
    network.embed(pixels)
    return 1000 * (time.perf_counter() - began) / len(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds

    from anomalib_lite.engines import open_backbone
    from anomalib_lite.studies import surroundings

    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, 256, 256, 3), dtype=np.uint8)
    networks = [
        open_backbone("efficientnet_lite0", engine=engine, device="cpu", dtype="float32")
        for engine in ENGINES
    ]
    found: dict[str, Any] = {}
    for name, images in (("one_image", pixels[:1]), (f"batch_of_{BATCH}", pixels)):
        all_rounds = [
            [measure(network, images) for network in networks] for _ in range(WARM_UP + rounds)
        ]
        ms = np.array(all_rounds[WARM_UP:])  # (rounds, engines)
        found[name] = dict(zip(ENGINES, np.median(ms, axis=0).round(2).tolist(), strict=True))
        found[name]["ratio"] = round(float(np.median(ms[:, 0] / ms[:, 1])), 2)
    print(json.dumps(found | {"rounds": rounds, **surroundings()}))


if __name__ == "__main__":
    main()
