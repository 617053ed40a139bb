"""The coreset and the search against other libraries, alternately in one run, as ratios.

    export ANOMALIB_LITE_DATA=...          # the folder that holds magnetic_tile/
    python benchmarks/speed/run.py

Writes results/speed.json, RESULTS.md and the plots in docs/speed/. See README.md beside this file.
anomalib is installed in benchmarks/peers/.venv-anomalib, which is made on the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import embeddings
import faiss
import numpy as np
import torch
from report import write_report
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm

from anomalib_lite import MemoryBank
from anomalib_lite.coreset import _k_center, covering_radius, select_coreset
from anomalib_lite.neighbors import int8
from anomalib_lite.studies import surroundings

ROOT = Path(__file__).resolve().parents[2]
CASES = ("coreset", "knn", "index", "growth")
N_QUERIES = 8192


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dims", nargs="+", type=int, default=[152, 384, 1152, 1536])
    parser.add_argument("--peer-python", type=Path, help="another interpreter that has anomalib")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/anomalib-lite-speed")
    args = parser.parse_args()
    if "coreset" in args.cases and 152 in args.dims:
        args.peer_python = peers().find_peer(args.peer_python)
    data = Path(os.environ.get("ANOMALIB_LITE_DATA", ROOT.parent / "shared" / "data"))
    results = Path(__file__).parent / "results" / "speed.json"
    results.parent.mkdir(exist_ok=True)
    stored = json.loads(results.read_text("utf-8")) if results.exists() else {}
    measure = {"coreset": coreset, "knn": knn, "index": index, "growth": growth}
    for case in args.cases:
        stored[case] = {"machine": machine(), "rows": measure[case](data, args)}
        results.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    write_report(stored, Path(__file__).parent / "RESULTS.md", ROOT / "docs" / "speed")


@cache
def peers() -> Any:
    """Import the module of benchmarks/peers that finds anomalib's environment, or makes it."""
    sys.path.append(str(ROOT / "benchmarks" / "peers"))
    import surroundings

    return surroundings


def machine() -> dict[str, Any]:
    """Describe the machine and the versions."""
    about = surroundings()
    return {
        "processor": about["machine"],
        "cores": about["cores"],
        "commit": about["commit"],
        "int8 in hardware": int8.worthwhile(True),
        "torch": about["torch"],
        "faiss": faiss.__version__,
        "numpy": np.__version__,
        "load average before": os.getloadavg()[0],
    }


def timed(job: Callable[..., Any], *args: Any, **options: Any) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    start = time.perf_counter()
    result = job(*args, **options)
    return time.perf_counter() - start, result


def alternate(repeats: int, **jobs: Callable[[], Any]) -> dict[str, list[float]]:
    """Time the jobs one after the other, ``repeats`` times; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            seconds[name].append(timed(job)[0])
    return seconds


def median(values: list[float]) -> float:
    """Return the median of seconds."""
    return float(np.median(values))


# --- Coreset ------------------------------------------------------------------------------


def float32_greedy(X: np.ndarray, n: int, first: int) -> tuple[np.ndarray, float]:
    """Run our greedy coreset without 8-bit products."""
    return _k_center.greedy(X, n, first, None, tqdm(disable=True), int8=False)


def product(X: np.ndarray, n: int) -> None:
    """Compute the float32 product of (N, D) and (D, n) alone, in blocks, by numpy's BLAS."""
    c = np.ascontiguousarray(X[:n].T)
    for start in range(0, len(X), 4096):
        X[start : start + 4096] @ c


def plain_greedy(X: np.ndarray, n: int, first: int) -> np.ndarray:
    """Run exact greedy, one matrix-vector product per pick, by torch."""
    x = torch.from_numpy(X)
    x = x - x.mean(dim=0)
    norms = (x * x).sum(dim=1)
    nearest = torch.full((len(x),), torch.inf)
    picks = np.empty(n, np.int64)
    pick = first
    for i in range(n):
        picks[i] = pick
        sq = torch.addmv(norms, x, x[pick], alpha=-2).add_(norms[pick])
        torch.minimum(nearest, sq, out=nearest)
        pick = int(nearest.argmax())
    return picks


def projected_greedy(X: np.ndarray, n: int, n_starts: int = 10) -> None:
    """Run the approximate greedy of amazon-science's patchcore.

    A random projection to 128 dimensions, ten random starts, then one pass over all rows per pick.
    Written from its description, in its simplest form.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(X.shape[1], 128, generator=generator) / X.shape[1] ** 0.5
    x = torch.from_numpy(X) @ weights
    norms = (x * x).sum(dim=1)

    def distances(row: int) -> torch.Tensor:
        sq = torch.addmv(norms, x, x[row], alpha=-2).add_(norms[row])
        return sq.clamp_(min=0).sqrt_()

    starts = torch.randperm(len(x), generator=generator)[:n_starts]
    nearest = torch.stack([distances(int(row)) for row in starts]).mean(dim=0)
    for _ in range(n):
        torch.minimum(nearest, distances(int(nearest.argmax())), out=nearest)


_FEW, _MORE = 100, 500  # picks of the slower methods


def extrapolated(job: Callable[..., Any], X: np.ndarray, n: int, *args: Any) -> tuple[float, Any]:
    """Extrapolate the seconds for ``n`` picks; also return the result of ``_MORE`` picks."""
    few, _ = timed(job, X, _FEW, *args)
    more, result = timed(job, X, _MORE, *args)
    return line_through(few, more, n), result


def line_through(few: float, more: float, n: int) -> float:
    """Return the seconds for ``n`` picks; time is linear in their number."""
    return few + (more - few) / (_MORE - _FEW) * (n - _FEW)


def anomalib_seconds(python: Path, file: Path, n: int) -> float:
    """Time anomalib's KCenterGreedy in its own environment."""
    script = Path(__file__).parent / "peer_coreset.py"
    command = [str(python), str(script), str(file), str(_FEW), str(_MORE)]
    options: dict[str, Any] = {"capture_output": True, "env": peers().environment_of_peer()}
    answer = subprocess.run(command, check=True, text=True, **options).stdout
    return line_through(*json.loads(answer.strip().splitlines()[-1]), n)


def coreset(data: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure coresets of 1 % and 10 % of 100,000 rows."""
    rows = []
    for d in args.dims:
        X = embeddings.load(data, args.folder, d, 100_000)
        first = int(np.random.RandomState(0).randint(len(X)))  # where select_coreset starts
        file = args.folder / "rows.npy"
        np.save(file, X)
        for n in (1000, 10_000):
            seconds: dict[str, list[float]] = {}
            for _ in range(args.repeats):
                done = {
                    "ours": timed(select_coreset, X, n, random_state=0),
                    "float32": timed(float32_greedy, X, n, first),
                    "product": timed(product, X, n),
                    "projected": extrapolated(projected_greedy, X, n),
                    "plain": extrapolated(plain_greedy, X, n, first),
                }
                if d == 152:
                    done["anomalib"] = anomalib_seconds(args.peer_python, file, n), None
                for name, (value, _) in done.items():
                    seconds.setdefault(name, []).append(value)
            picks = done["ours"][1].indices
            same, radius = done["float32"][1]
            row = {
                "D": d,
                "kept": n,
                "seconds": seconds,
                "radius": covering_radius(X, X[picks]),
                "radius of float32": radius,
                "same picks": float((picks == same).mean()),
                "same picks as plain": float((picks[:_MORE] == done["plain"][1]).mean()),
            }
            say("coreset", row)
            rows.append(row)
    return rows


# --- Search -------------------------------------------------------------------------------


def knn(data: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure 8,192 queries of a flat index."""
    rows = []
    for d in args.dims:
        Q = embeddings.load(data, args.folder, d, N_QUERIES, test=True)
        for n in (16_000, 100_000):
            X = embeddings.load(data, args.folder, d, n)
            ours = MemoryBank(algorithm="auto").fit(X)
            flat = faiss.IndexFlatL2(d)
            flat.add(X)
            ours.search(Q, 1)
            prepare_s = prepare_seconds(ours, args.repeats)
            for k in (1, 9):
                distances, indices = ours.search(Q, k)
                _, expected = flat.search(Q, k)
                seconds = alternate(
                    args.repeats,
                    ours=lambda ours=ours, Q=Q, k=k: ours.search(Q, k),
                    faiss=lambda flat=flat, Q=Q, k=k: flat.search(Q, k),
                )
                if n == 16_000:
                    brute = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=-1).fit(X)
                    seconds |= alternate(1, sklearn=lambda b=brute, Q=Q: b.kneighbors(Q))
                true, faiss_true = (true_distances(X, Q, i) for i in (indices, expected))
                row = {
                    "D": d,
                    "bank": n,
                    "k": k,
                    "seconds": seconds,
                    "prepare_s": prepare_s,
                    "by": type(ours._fast_index).__name__,
                    "same neighbours": float((indices == expected).mean()),
                    "farther by": farther_by(true, faiss_true),
                    "distances off by": float(np.abs(distances / true - 1).max()),
                }
                say("knn", row)
                rows.append(row)
    return rows


def prepare_seconds(bank: MemoryBank, repeats: int) -> float:
    """Time the making of the index that a bank's first large search keeps; 0 if there is none."""
    if bank._fast_index is None:
        return 0.0
    kind = type(bank._fast_index)
    return median([timed(kind, bank.embeddings_)[0] for _ in range(repeats)])


def true_distances(X: np.ndarray, Q: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Compute distances (Q, k) in float64."""
    out = np.empty(indices.shape)
    for i in range(0, len(Q), 512):
        difference = X[indices[i : i + 512]].astype(np.float64) - Q[i : i + 512, None]
        out[i : i + 512] = np.linalg.norm(difference, axis=2)
    return out


def farther_by(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return how much farther our neighbours are, relatively and at most; 0 if none is farther.

    True distances (Q, k) are sorted, since rounding may swap neighbours of nearly equal distance.
    """
    a, b = np.sort(ours, axis=1), np.sort(theirs, axis=1)
    return float(np.divide(a - b, b, out=np.zeros_like(a), where=a > b).max())


def index(data: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure approximate indexes: 100,000 x 152, 8,192 queries, nearest neighbour."""
    X = embeddings.load(data, args.folder, 152, 100_000)
    Q = embeddings.load(data, args.folder, 152, N_QUERIES, test=True)
    kinds: list[dict[str, Any]] = [
        {"index": "flat"},
        *({"index": "IVF256,Flat", "nprobe": p} for p in (1, 8, 32)),
        *({"index": "HNSW32", "ef_search": e} for e in (16, 64, 256)),
        {"index": "SQ8"},
        {"index": "PQ38"},
        {"index": "IVF256,PQ38", "nprobe": 16},
    ]
    rows = []
    for parameters in kinds:
        start = time.perf_counter()
        bank = MemoryBank(1, **parameters).fit(X)
        built = time.perf_counter() - start
        bank.search(Q[:64], 1)
        seconds = alternate(args.repeats, search=lambda bank=bank: bank.search(Q, 1))
        row = parameters | {"built": built, "seconds": seconds, "recall": bank.recall(Q, 1)}
        say("index", row)
        rows.append(row)
    return rows


def growth(data: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the time for growing N (1,000 kept), and for growing coresets of 100,000."""
    rows = []
    sizes = [(n, 1000) for n in (10_000, 30_000, 100_000, 300_000, 1_000_000)]
    sizes += [(100_000, m) for m in (100, 300, 3000, 10_000, 30_000)]
    for n, m in sizes:
        X = embeddings.load(data, args.folder, 152, n)
        seconds = alternate(
            args.repeats,
            ours=lambda X=X, m=m: select_coreset(X, m, random_state=0),
            product=lambda X=X, m=m: product(X, m),
        )
        row = {"N": n, "kept": m, "seconds": seconds}
        say("growth", row)
        rows.append(row)
    return rows


def say(case: str, row: dict[str, Any]) -> None:
    """Print one row as soon as it is measured."""
    seconds = {k: round(median(v), 4) for k, v in row["seconds"].items()}
    print(case, row | {"seconds": seconds}, flush=True)


if __name__ == "__main__":
    main()
