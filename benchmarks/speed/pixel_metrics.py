"""Measure memory and time of the pixel metrics of 2,000 maps of 1,024 x 1,024.

The maps come from a generator, so they are never in memory together (they would have 8.4 GB)::

    python benchmarks/speed/pixel_metrics.py [--images 2000] [--memory-budget 512MB]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator

import numpy as np

from anomalib_lite.metrics import PixelMetrics

SIDE = 1024


def pairs(n_images: int) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """Yield masks and maps with the spread of distances; every fifth image has two defects."""
    rng = np.random.default_rng(0)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[300:420, 200:500] = mask[800:820, 700:730] = True
    for index in range(n_images):
        scores = rng.standard_normal((SIDE, SIDE), np.float32)
        scores += np.float32(2 * (index % 5 == 0)) * mask
        yield (mask if index % 5 == 0 else None), 20 * np.exp(np.float32(0.3) * scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--memory-budget", default="512MB")
    arguments = parser.parse_args()
    found = PixelMetrics(memory_budget=arguments.memory_budget)
    seconds = 0.0
    for mask, amap in pairs(arguments.images):
        start = time.process_time()
        found.update([mask], [amap])
        seconds += time.process_time() - start
    start = time.process_time()
    values, bounds = found.compute(), found.bounds()
    end_seconds = time.process_time() - start
    print(
        json.dumps(
            {
                "images": arguments.images,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
                "processor_ms_per_image": 1000 * seconds / arguments.images,
                "processor_s_at_the_end": end_seconds,
                "metrics": values,
                "bound_widths": {name: high - low for name, (low, high) in bounds.items()},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
