"""What does each option cost and bring? One row for each option, category and seed.

    python benchmarks/options/run.py --study front
    python benchmarks/options/run.py --study options --seeds 0 1 2
    python benchmarks/options/run.py --quick

README.md says what is measured; report.py makes the tables and figures of the rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

FALSE_ALARM_RATE = 0.05


def measure(
    option: dict[str, Any], category: str, seed: int, n_train: int, n_test: int
) -> dict[str, Any]:
    """Fit one detector on one category, test it, and return what was measured."""
    from sources import draw_images
    from studies import make

    from anomalib_lite import evaluate

    images = draw_images(category, seed, n_train, n_test)
    detector = make(option, false_alarm_rate=FALSE_ALARM_RATE, random_state=seed)
    began = time.perf_counter()
    with warnings.catch_warnings():  # few images: the rate is measured, not promised
        warnings.simplefilter("ignore")
        detector.fit(images.train)
    fit_s = time.perf_counter() - began
    found = evaluate(detector, images.test)
    metrics = {name: found.metrics.get(name) for name in METRICS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        detector.save(file)
        kilobytes = file.stat().st_size / 1000
    bank = getattr(detector, "memory_bank_", None)
    return metrics | {
        "fit_s": fit_s,
        "ms": found.timings["ms_per_image"],
        "bank_rows": None if bank is None else len(bank.embeddings_),
        "file_kb": kilobytes,
        "n_train": len(images.train),
        "n_test": len(images.test),
        "engine": detector.engine_,
        "dtype": detector.dtype_,
    }


METRICS = (
    *("image_auroc", "false_alarm_rate", "detection_rate"),
    *("pixel_auroc", "pixel_ap", "aupro"),
)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what makes a row unique."""
    return row["study"], row["option"], row["category"], row["seed"]


def run(args: argparse.Namespace) -> None:
    """Measure what is not in the file yet, and append it row by row."""
    from sources import CATEGORIES
    from studies import STUDIES

    args.output.parent.mkdir(parents=True, exist_ok=True)
    done: set[tuple[Any, ...]] = set()
    if args.output.exists():
        done = {key(json.loads(line)) for line in args.output.read_text().splitlines()}
    about = surroundings()
    for seed in args.seeds:
        for name in args.options or STUDIES[args.study]:
            option = STUDIES[args.study][name]
            for category in args.categories or CATEGORIES:
                row: dict[str, Any] = {"study": args.study, "option": name}
                row |= {"category": category, "seed": seed}
                if key(row) in done:
                    continue
                row |= measure(option, category, seed, args.train, args.test) | about
                with args.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(*key(row), f"{row['image_auroc']:.3f}", f"{row['fit_s']:.1f} s", flush=True)


def surroundings() -> dict[str, Any]:
    """Return what a figure depends on beside the option: versions and machine."""
    import os

    import torch

    import anomalib_lite

    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "version": anomalib_lite.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def processor() -> str:
    """Return the processor's name."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", default="options", help="front, options, detectors or presets")
    parser.add_argument("--options", nargs="+", help="some of the study; by default all")
    parser.add_argument("--categories", nargs="+", help="by default all sixteen")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=200, help="most images to fit on")
    parser.add_argument("--test", type=int, default=200, help="most images to test, half normal")
    parser.add_argument("--output", type=Path, default=Path("benchmark-options/rows.jsonl"))
    parser.add_argument("--quick", action="store_true", help="one paper, one seed, few options")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.categories, args.train, args.test = [0], ["PA_BDP01_TL"], 16, 16
    return args


if __name__ == "__main__":
    run(parse())
