"""Is a scratch of 3 x 40 pixels found on a large photograph, and in how much memory?

    python benchmarks/speed/large_images.py --size 3000 4000 --tile 512
    python benchmarks/speed/large_images.py --size 6000 8000 --tile 512
    python benchmarks/speed/large_images.py --size 3000 4000            # without tiles

The photographs are made: a rough surface under a slant of light, as files. Prints one JSON line:
whether the scratch was found and outlined, what else was, the memory above the idle process (the
detector's code loaded, one small image scored) in fit and in detect, and seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, label

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from anomalib_lite import PatchCore  # noqa: E402
from anomalib_lite.evaluation import peak_memory  # noqa: E402

SCRATCH = (3, 40)  # pixels


def surface(height: int, width: int, seed: int) -> np.ndarray:
    """Return a photograph (H, W), uint8: grain of two scales, and light from one side."""
    rng = np.random.default_rng(seed)
    fine = gaussian_filter(rng.standard_normal((height, width), np.float32), 1.5)
    coarse = gaussian_filter(rng.standard_normal((height // 8, width // 8), np.float32), 3)
    coarse = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    light = np.linspace(-12, 12, width, dtype=np.float32)
    return np.clip(120 + 40 * fine + 40 * coarse + light, 0, 255).astype(np.uint8)


def reset_peak() -> float:
    """Start the measurement of a peak; return the memory in use now, in MiB. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(3000, 4000), metavar=("H", "W"))
    parser.add_argument("--tile", type=int)
    parser.add_argument("--overlap", type=int, default=64)
    parser.add_argument("--image-size", type=int, help="default: by the size of the image or tile")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--memory-budget", default="750MB")
    args = parser.parse_args()

    height, width = args.size
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i in range(args.images + 1):
            image = surface(height, width, i)
            if i == args.images:
                y, x = height * 3 // 5, width // 3
                image[y : y + SCRATCH[0], x : x + SCRATCH[1]] = 250
            paths.append(Path(folder, f"{i}.png"))
            Image.fromarray(image).save(paths[-1], compress_level=1)
        del image
        more: dict[str, Any] = {"image_size": args.image_size or "auto", "false_alarm_rate": 0.25}
        PatchCore(false_alarm_rate=0.25).fit(
            np.zeros((8, 64, 64, 3), np.uint8) + np.arange(8, dtype=np.uint8)[:, None, None, None]
        )
        if args.tile is not None:
            more |= {"tile": args.tile, "overlap": args.overlap}
            more |= {"memory_budget": args.memory_budget}
        idle, began = reset_peak(), time.perf_counter()
        detector = PatchCore(**more).fit(paths[:-1])
        fit_mib, fit_s = peak_memory() - idle, time.perf_counter() - began
        idle, began = reset_peak(), time.perf_counter()
        found = detector.detect(paths[-1:])
        detect_mib, detect_s = peak_memory() - idle, time.perf_counter() - began
    heatmap = found.maps[0]
    outlined, n_regions = label(heatmap > detector.threshold_)
    own = set(np.unique(outlined[y - 8 : y + 11, x - 8 : x + 48])) - {0}
    peak = np.unravel_index(heatmap.argmax(), heatmap.shape)
    print(
        json.dumps(
            {
                "pixels": f"{height} x {width}",
                "tile": args.tile,
                "image_size": detector.image_size_,
                "called_anomalous": bool(found.labels[0]),
                "score_by_threshold": round(float(found.scores[0] / detector.threshold_), 3),
                "scratch_outlined": bool(own),
                "peak_in_scratch": bool(abs(peak[0] - y) < 12 and -12 < peak[1] - x < 52),
                "other_regions": n_regions - len(own),
                "fit_mb_above_idle": round(fit_mib * 2**20 / 1e6),
                "detect_mb_above_idle": round(detect_mib * 2**20 / 1e6),
                "fit_s": round(fit_s, 1),
                "detect_s": round(detect_s, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
