"""What both workers share: clocks, memory, the job they are given and the answer they write.

Runs under either environment, so it needs the standard library and numpy only.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROCESS_START = time.perf_counter()


def read_job() -> dict[str, Any]:
    """Read the JSON file named on the command line."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def write_result(job: dict[str, Any], result: dict[str, Any]) -> None:
    """Write what was measured to the file that the job names."""
    Path(job["result"]).write_text(json.dumps(result, indent=1), encoding="utf-8")


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if platform.system() == "Darwin" else peak * 1024 / 1e6


class Stopwatch:
    """Wall-clock and processor seconds since it was made.

    Wall time is what is published; processor time tells whether the machine was shared.
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self, name: str) -> dict[str, float]:
        """Return ``{name_s: wall seconds, name_cpu_s: processor seconds}``."""
        return {
            f"{name}_s": time.perf_counter() - self._wall,
            f"{name}_cpu_s": time.process_time() - self._cpu,
        }


def environment(*distributions: str) -> dict[str, Any]:
    """Versions of what this process ran with."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"versions": versions}


def save_predictions(
    path: str, scores: Sequence[float] | np.ndarray, maps: Sequence[np.ndarray], bank: np.ndarray
) -> None:
    """Write the scores (N,), maps of any sizes and the memory bank (M, D), all float32."""
    np.savez(
        path,
        scores=np.asarray(scores, dtype=np.float32),
        shapes=np.array([m.shape for m in maps], dtype=np.int64).reshape(-1, 2),
        maps=np.concatenate([np.asarray(m, dtype=np.float32).ravel() for m in maps]),
        bank=np.asarray(bank, dtype=np.float32),
    )


def load_predictions(path: str) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Read back what ``save_predictions`` wrote: scores, maps, bank."""
    with np.load(path) as stored:
        shapes, flat = stored["shapes"], stored["maps"]
        ends = np.cumsum(shapes.prod(axis=1))
        maps = [m.reshape(s) for m, s in zip(np.split(flat, ends[:-1]), shapes, strict=True)]
        return stored["scores"], maps, stored["bank"]
