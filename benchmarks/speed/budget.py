"""Cost of a memory budget: a million rows of 384 numbers within 512 MB, and without a budget.

    export ANOMALIB_LITE_DATA=...          # the folder that holds magnetic_tile/, weights beside it
    python benchmarks/speed/budget.py

The rows are those of a hundred images, each about ten times with a little noise, as from a line
that makes the same part many times. They are computed when needed. Linux; takes a minute.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import embeddings
import numpy as np

from anomalib_lite import MemoryBank, PatchCore
from anomalib_lite.coreset import select_coreset

ROOT = Path(__file__).resolve().parents[2]
IMAGES, PATCHES, SIDE = 977, 1024, 32
BUDGET = "512MB"


def images(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield embeddings (1, 32, 32, D), one image at a time, always the same."""
    n_there = len(rows) // PATCHES
    for i in range(IMAGES):
        random = np.random.default_rng(i)
        start = random.integers(0, n_there) * PATCHES
        x = np.array(rows[start : start + PATCHES])
        x += random.normal(scale=0.02, size=x.shape).astype(np.float32)
        yield x.reshape(1, SIDE, SIDE, -1)


def anonymous_mb() -> float:
    """Return the anonymous memory (not backed by a file) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon"))


def watched(peak: list[float], stop: threading.Event) -> None:
    """Record the highest memory until ``stop`` is set."""
    while not stop.wait(0.01):
        peak[0] = max(peak[0], anonymous_mb())


def main() -> None:
    """Fit with the budget and without, and print time, memory and radius."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/anomalib-lite-speed")
    folder = parser.parse_args().folder
    data = Path(os.environ.get("ANOMALIB_LITE_DATA", ROOT.parent / "shared" / "data"))
    rows = embeddings.load(data, folder, 384, 100 * PATCHES)
    small = np.concatenate([x for x, _ in zip(images(rows), range(20), strict=False)])[:, ::4]
    PatchCore(false_alarm_rate=0.1).fit_embeddings(small)  # loads and starts what is needed once
    idle, peak, stop = anonymous_mb(), [0.0], threading.Event()
    watcher = threading.Thread(target=watched, args=(peak, stop))
    watcher.start()
    start = time.perf_counter()
    detector = PatchCore(coreset_ratio=0.01, memory_budget=BUDGET).fit_embeddings(images(rows))
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    bank = detector.memory_bank_.embeddings_
    search = MemoryBank(1).fit(bank)
    true = max(search.kneighbors(x.reshape(-1, 384), 1)[0].max() for x in images(rows))
    print(f"{IMAGES * PATCHES:,} rows of 384 numbers, {BUDGET}: {seconds:.0f} s, peak "
          f"{peak[0] - idle:.0f} MB above idle, {len(bank):,} rows kept, true radius {true:.3f}, "
          f"radius said {detector.memory_bank_.covering_radius_:.3f}")  # fmt: skip
    X = np.concatenate([x.reshape(-1, 384) for x in images(rows)])
    start = time.perf_counter()
    unbounded = select_coreset(X, len(bank), random_state=0).covering_radius
    seconds = time.perf_counter() - start
    ratio = true / unbounded
    print(f"without a budget: {seconds:.0f} s, radius {unbounded:.3f}; {ratio:.2f} times")


if __name__ == "__main__":
    main()
