"""Clocks, memory, and the files of jobs and results, for the workers of both sides.

Runs in either environment, so it needs the standard library and numpy only.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

PROCESS_START = time.perf_counter()


def read_job() -> dict[str, Any]:
    """Read the JSON file named on the command line."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def write_result(job: dict[str, Any], result: dict[str, Any]) -> None:
    """Write a result to the file that the job names."""
    Path(job["result"]).write_text(json.dumps(result, indent=1), encoding="utf-8")


def peak_rss_mb() -> float:
    """Return the highest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if platform.system() == "Darwin" else peak * 1024 / 1e6


class Stopwatch:
    """Wall-clock and processor seconds since its creation.

    Wall time is published; processor time shows whether the machine was shared.
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self, name: str) -> dict[str, float]:
        """Return ``{name_s: wall seconds, name_cpu_s: processor seconds}``."""
        return {
            f"{name}_s": time.perf_counter() - self._wall,
            f"{name}_cpu_s": time.process_time() - self._cpu,
        }


def reached(job: dict[str, Any], name: str) -> dict[str, float]:
    """Return wall seconds since run.py started this process, and its processor seconds.

    The monotonic clock is the same in every process, so the start of the interpreter is included.
    """
    return {
        f"{name}_at_s": time.monotonic() - job["started"],
        f"{name}_at_cpu_s": time.process_time(),
    }


def time_singly(
    name: str, call: Callable[[str], Any], paths: list[str], n_warm_up: int
) -> dict[str, float]:
    """Time ``call`` in ms for single images; the first ``n_warm_up`` are not timed."""
    for path in paths[:n_warm_up]:
        call(path)
    cpu, times = time.process_time(), []
    for path in paths[n_warm_up:]:
        start = time.perf_counter()
        call(path)
        times.append(1e3 * (time.perf_counter() - start))
    cpu = time.process_time() - cpu
    return {
        f"{name}_p50_ms": float(np.percentile(times, 50)),
        f"{name}_p95_ms": float(np.percentile(times, 95)),
        f"{name}_mean_ms": float(np.mean(times)),
        f"{name}_cpu_ms": 1e3 * cpu / len(times),
    }


def environment(*distributions: str) -> dict[str, Any]:
    """Return the versions that this process ran with."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"versions": versions}


class Predictions:
    """Scores and maps of the test images; maps go to disk at once and are not kept in memory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.positions: list[int] = []
        self.scores: list[float] = []
        self.shapes: list[tuple[int, ...]] = []
        Path(f"{path}.maps").write_bytes(b"")

    def add(self, positions: Iterable[int], scores: Iterable[float], maps: Iterable[Any]) -> None:
        """Add images: their positions among the test images, their scores, their maps (H, W)."""
        with Path(f"{self.path}.maps").open("ab") as file:
            for position, score, heatmap in zip(positions, scores, maps, strict=True):
                array = np.ascontiguousarray(heatmap, dtype=np.float32)
                file.write(array.tobytes())
                self.positions.append(position)
                self.scores.append(float(score))
                self.shapes.append(array.shape)

    def finish(self, bank: np.ndarray) -> None:
        """Write positions, scores, shapes, and the memory bank (M, D) float32."""
        np.savez(
            self.path,
            positions=np.array(self.positions),
            scores=np.array(self.scores, dtype=np.float32),
            shapes=np.array(self.shapes, dtype=np.int64).reshape(-1, 2),
            bank=np.asarray(bank, dtype=np.float32),
        )


def load_predictions(path: str) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Read scores, maps and bank that ``Predictions`` wrote, in the order of the test images."""
    with np.load(path) as stored:
        shapes, order = stored["shapes"], np.argsort(stored["positions"])
        flat = np.fromfile(f"{path}.maps", dtype=np.float32)
        ends = np.cumsum(shapes.prod(axis=1))
        maps = [m.reshape(s) for m, s in zip(np.split(flat, ends[:-1]), shapes, strict=True)]
        return stored["scores"][order], [maps[i] for i in order], stored["bank"]
