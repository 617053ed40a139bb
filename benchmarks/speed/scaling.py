"""Time and memory of a fit by the model of docs/scaling.md, beside the measured values.

    python benchmarks/speed/scaling.py

The speed of the coreset's products is measured first. Each case then runs in its own process, on
embeddings that are computed when needed. Prints the lines that are in docs/scaling.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite import PatchCore
from anomalib_lite._threads import n_cores
from anomalib_lite.coreset import select_coreset
from anomalib_lite.detectors import plan_patches

SIDE = 32  # an image has 32 x 32 patches, as with 256 x 256 pixels
PATCHES = SIDE * SIDE
RATE = 0.1  # needs few images for calibration, so a fifth is held back

CASES = [
    {"images": images, "D": D, "ratio": 0.01, "budget": budget}
    for D, budgets in ((152, (None, "110MB")), (384, (None, "150MB")))
    for budget in budgets
    for images in (100, 300)
]


class Made:
    """Embeddings (n, 32, 32, D): ``E[i]`` is computed when needed, always the same.

    ``seconds`` is the total time of that.
    """

    ndim = 4

    def __init__(self, n: int, n_features: int) -> None:
        rng = np.random.default_rng(0)
        # Few directions hold most of the variance, as in features of networks.
        scales = (1 + np.arange(n_features)) ** -0.5
        self._table = (rng.normal(size=(8 * PATCHES, n_features)) * scales).astype(np.float32)
        self._n = n
        self.seconds = 0.0

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> np.ndarray:
        start = time.perf_counter()
        rng = np.random.default_rng(i)
        a, b = rng.integers(len(self._table), size=(2, PATCHES))
        mixed = self._table[a] + np.float32(0.3) * self._table[b]
        self.seconds += time.perf_counter() - start
        return mixed.reshape(SIDE, SIDE, -1)


def resident(field: str) -> int:
    """Return this process's bytes in memory: "VmRSS" now, "VmHWM" the peak. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_case(images: int, D: int, ratio: float, budget: str | None) -> dict[str, float]:
    """Fit in this process; return seconds (without making the embeddings) and bytes above idle.

    Without a budget the embeddings are an array made before, and its bytes are added. A small fit
    comes first, so that one-time loading and starting is not measured.
    """
    made = Made(images, D)
    small = np.stack([made[i] for i in range(20)])[:, ::4]
    PatchCore(false_alarm_rate=RATE).fit_embeddings(small)
    detector = PatchCore(coreset_ratio=ratio, false_alarm_rate=RATE, memory_budget=budget)
    E: Any = made if budget else np.stack([made[i] for i in range(images)])
    there = 0 if budget else E.nbytes
    made.seconds = 0.0
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    detector.fit_embeddings(E)
    seconds = time.perf_counter() - start - made.seconds
    return {"seconds": seconds, "bytes": resident("VmHWM") - before + there}


def gigaflops(D: int) -> float:
    """Measure the speed of the coreset's products, by a coreset of 500 of 50,000 rows."""
    made = Made(50, D)
    rows = np.stack([made[i] for i in range(50)]).reshape(-1, D)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        select_coreset(rows, 500, random_state=0)
        times.append(time.perf_counter() - start)
    return 2 * len(rows) * 500 * D / min(times) / 1e9


def model(
    images: int, D: int, ratio: float, budget: str | None, rate: float
) -> tuple[float, float]:
    """Return seconds and bytes by docs/scaling.md; a budget is one that thins the shards out."""
    n_rows, row, work = images * PATCHES, 4 * D, 2 * D + 32
    n_held = n_rows // 5
    bank = ratio * n_rows
    search = 2 * n_held * 0.8 * bank * D
    if budget is None:
        choose = 2 * (n_rows - n_held) * 0.8 * bank * D + 2 * n_held * bank * D
        n_bytes = 2.0 * n_rows * row + 0.8 * n_rows * work  # as passed, and in the order of fitting
    else:
        plan = plan_patches(
            int(budget.removesuffix("MB")) * 10**6,
            patches=PATCHES,
            n_features=D,
            ratio=ratio,
            n_images=images,
        )
        shard = plan.images_per_shard * PATCHES
        choose = 2 * n_rows * ratio * shard * D + 2 * n_held * 0.8 * bank * D
        n_bytes = float(budget.removesuffix("MB")) * 1e6  # at most
    return (choose + search) / rate / 1e9, n_bytes


def main() -> None:
    """Print the rates and the table; with a case in JSON, run that one and print its result."""
    if len(sys.argv) > 1:
        print(json.dumps(run_case(**json.loads(sys.argv[1]))))
        return
    load = os.getloadavg()[0]
    rates = {D: gigaflops(D) for D in (152, 384)}
    print(
        ", ".join(f"D = {D}: {rate:.0f}" for D, rate in rates.items()),
        f"GFLOP/s, {n_cores()} cores (load average before: {load:.1f}), `coreset_ratio` 0.01:\n",
    )
    print("| images | D | budget | seconds: model | measured | MB: model | measured |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        command = [sys.executable, __file__, json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        seconds, n_bytes = model(**case, rate=rates[case["D"]])
        at_most = "" if case["budget"] is None else "at most "
        print(
            f"| {case['images']} | {case['D']} | {case['budget'] or 'none'} | {seconds:.2f} | "
            f"{found['seconds']:.2f} | {at_most}{n_bytes / 1e6:.0f} | {found['bytes'] / 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
