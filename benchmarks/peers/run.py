"""PatchCore of anomalib-lite and of anomalib, side by side: ``python benchmarks/peers/run.py``.

Both run alternately, each in its own process, on the same images, backbone, image size and coreset
size. One judge computes the metrics of both. README.md in this folder says what is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tables
from surroundings import (
    HERE,
    HUGE_PAGES,
    check_ours,
    describe_machine,
    find_images,
    find_peer,
    our_weights,
    work,
)

from anomalib_lite.studies import surroundings

RESULTS = HERE / "results"
CASES = ("100", "all", "padim", "coreset", "latency", "start")
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2_000_000_000),
    "MALLOC_TRIM_THRESHOLD_": str(2_000_000_000),
}


@dataclass(frozen=True)
class Pair:
    """Ours and one variant of the peer, measured directly after each other."""

    name: str
    variant: str
    malloc: dict[str, str] = field(default_factory=dict)


PATCHCORE_PAIRS = (
    Pair("engine", "engine"),
    Pair("bare", "bare"),
    Pair("bare_huge", "bare", HUGE_PAGES),
)
CORESET_PAIRS = (
    Pair("default", "coreset"),
    Pair("huge", "coreset", HUGE_PAGES),
    Pair("kept", "coreset", KEEP_MEMORY),
)
# Ours finds an empty cache of converted networks, or the cache that its last process left. The peer
# has no cache: it does the same in both.
START_PAIRS = (Pair("cold", "bare"), Pair("warm", "bare"))


def main() -> None:
    """Measure the cases asked for, then rewrite RESULTS.md from all stored results."""
    args = parse_arguments()
    images = find_images(args)
    peer_python = find_peer(args.peer_python)
    check_ours()
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        bench = Bench(args, images, peer_python, Path(scratch))
        results = []
        for case in args.cases:
            results.append(bench.run_case(case))
            if not args.quick:
                RESULTS.mkdir(exist_ok=True)
                text = json.dumps(results[-1], indent=1) + "\n"
                (RESULTS / f"{case}.json").write_text(text, encoding="utf-8")
    if args.quick:
        print(tables.render(results))
        print("A quick run shows that everything works. Its figures say nothing about speed.")
        return
    stored = [RESULTS / f"{case}.json" for case in CASES]
    page = tables.render([json.loads(p.read_text("utf-8")) for p in stored if p.exists()])
    (HERE / "RESULTS.md").write_text(page, encoding="utf-8")
    print(page)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all of them")
    add("--repeats", type=int, default=3, help="rounds of every case but all")
    add("--repeats-all", type=int, default=1, help="rounds of the case all (slow for the peer)")
    add("--pairs", nargs="+", choices=[p.name for p in PATCHCORE_PAIRS],
        help="ways of running the peer in 100, all, padim, latency; default: all")  # fmt: skip
    add("--peer-python", type=Path, help="a Python with anomalib; default: .venv-anomalib here")
    add("--peer-workers", type=int, default=0, help="data loader processes of anomalib's Engine")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: 2")
    add("--quick", action="store_true",
        help="a few images, one round, nothing written: does it all work?")  # fmt: skip
    args = parser.parse_args()
    if "latency" in args.cases and args.pairs == ["engine"]:
        parser.error("the case latency has the pairs bare and bare_huge only")
    if args.quick:
        args.repeats = args.repeats_all = 1
    return args


class Bench:
    """Starts the workers alternately, and collects their measurements."""

    def __init__(
        self, args: argparse.Namespace, images: dict[str, Any], peer_python: Path, scratch: Path
    ) -> None:
        self.args, self.images, self.scratch = args, images, scratch
        self.peer_python = peer_python
        self.embeddings = scratch / "embeddings.npy"
        self.fitted: dict[str, dict[str, Any]] = {}  # results of `store`, by side
        self.train_100 = self.draw_training_images(0)
        self.common = {
            "image_size": [256, 256],
            "coreset_ratio": 0.01,
            "n_components": 100,  # of PaDiM
            "batch_size": 32,
            "threads": args.threads,
            "num_workers": args.peer_workers,
            "weights": str(our_weights()),
        }

    def run_case(self, case: str) -> dict[str, Any]:
        """Measure one case; return the content of its JSON file."""
        result: dict[str, Any] = {
            "case": case,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": describe_machine(),
            "load_average_at_start": os.getloadavg()[0],
            "commit": surroundings()["commit"],
            "settings": {k: v for k, v in self.common.items() if k != "weights"},
        }
        measures = {
            "coreset": self.run_coreset,
            "latency": self.run_latency,
            "start": self.run_start,
        }
        return result | measures.get(case, self.run_patchcore)(case)

    def run_patchcore(self, case: str) -> dict[str, Any]:
        """Run rounds of every pair: ours, then the peer, each judged directly afterwards."""
        train = self.images["train"]
        repeats = self.args.repeats_all if case == "all" else self.args.repeats
        method = "padim" if case == "padim" else "patchcore"
        pairs = self.chosen(PATCHCORE_PAIRS)
        runs: list[dict[str, Any]] = []
        agreement = None
        for repeat in range(repeats):
            if case == "100":  # other images each round, the same ones for both sides
                train = self.draw_training_images(repeat)
            for pair in pairs:
                for who in ("ours", "peer"):
                    job = self.job("patchcore", pair, len(runs) // 2) | self.images
                    job |= {
                        "method": method,
                        "train": train,
                        "predictions": str(self.scratch / "predictions.npz"),
                    }
                    run = self.work(who, job, pair)
                    run |= self.work("judge", job | {"task": "metrics"})
                    if case == "100" and who == "ours" and agreement is None:
                        agreement = self.check_agreement(job)
                    runs.append({"pair": pair.name, "repeat": repeat, "who": who} | run)
                    say(case, runs[-1], "fit_s", "test_s", "peak_rss_mb", "image_auroc")
        return {
            "n_train": len(train),
            "n_test": len(self.images["test"]),
            "train_images": "drawn anew each round" if case == "100" else "every one",
            "our_bank_rows_to_nearest_peer_embedding": agreement,
            "runs": runs,
        }

    def run_coreset(self, case: str) -> dict[str, Any]:
        """Run rounds of the coreset alone on the same stored embeddings."""
        self.store_embeddings()
        size = (10_000, 100) if self.args.quick else (100_000, 1_000)
        runs: list[dict[str, Any]] = []
        for repeat in range(self.args.repeats):
            for pair in available(CORESET_PAIRS):
                for who in ("ours", "peer"):
                    job = self.job("coreset", pair, len(runs) // 2)
                    job |= {"n_rows": size[0], "n_samples": size[1]}
                    run = self.work(who, job, pair)
                    picks = run.pop("picks")
                    run |= self.work("judge", job | {"task": "radius", "picks": picks})
                    runs.append({"pair": pair.name, "repeat": repeat, "who": who} | run)
                    say(case, runs[-1], "coreset_s", "covering_radius")
        return {"n_rows": size[0], "n_samples": size[1], "runs": runs}

    def run_latency(self, case: str) -> dict[str, Any]:
        """Run rounds in which fitted models score single images, then batches."""
        n_warm_up, n_single = (2, 10) if self.args.quick else (10, 100)
        self.store_models()
        runs: list[dict[str, Any]] = []
        for repeat in range(self.args.repeats):
            single = random.Random(repeat).sample(self.images["test"], n_warm_up + n_single)
            for pair in self.chosen(PATCHCORE_PAIRS[1:]):
                for who in ("ours", "peer"):
                    job = self.job("latency", pair, repeat) | self.stored(who)
                    job |= {"test": self.images["test"], "single": single, "n_warm_up": n_warm_up}
                    run = self.work(who, job, pair) | {"settings": self.fitted[who]["settings"]}
                    runs.append({"pair": pair.name, "repeat": repeat, "who": who} | run)
                    say(case, runs[-1], "detect_p50_ms", "detect_p95_ms", "batches_s")
        sizes = {"n_single": n_single, "n_warm_up": n_warm_up, "n_test": len(self.images["test"])}
        return sizes | {"n_train": len(self.train_100), "runs": runs}

    def run_start(self, case: str) -> dict[str, Any]:
        """Run rounds of processes that load a stored model and score two images."""
        self.store_models()
        runs: list[dict[str, Any]] = []
        for repeat in range(self.args.repeats):
            cache = tempfile.mkdtemp(prefix="cache-", dir=self.scratch)
            for pair in START_PAIRS:
                for who in ("ours", "peer"):
                    job = self.job("start", pair, repeat) | self.stored(who)
                    job |= {"test": self.images["test"][:2], "cache": cache}
                    run = self.work(who, job, pair) | {"settings": self.fitted[who]["settings"]}
                    self.check_score(who, run["score"])
                    runs.append({"pair": pair.name, "repeat": repeat, "who": who} | run)
                    say(case, runs[-1], "imports_at_s", "score_at_s", "second_s", "peak_rss_mb")
        return {"n_train": len(self.train_100), "runs": runs}

    def chosen(self, pairs: tuple[Pair, ...]) -> list[Pair]:
        """Select the pairs that were asked for and that this system can run."""
        return [p for p in available(pairs) if p.name in (self.args.pairs or [p.name])]

    def draw_training_images(self, seed: int) -> list[str]:
        """Draw a hundred of the training images, in random order."""
        return random.Random(seed).sample(self.images["train"], 10 if self.args.quick else 100)

    def check_agreement(self, job: dict[str, Any]) -> dict[str, Any]:
        """Compare our bank of the 100-image case with the peer's embeddings of these images."""
        self.store_embeddings()
        return self.work("judge", job | {"task": "agreement"})

    def store_embeddings(self) -> None:
        """Embed the 100 training images with the peer's own model, once."""
        if not self.embeddings.exists():
            job = self.job("embed", PATCHCORE_PAIRS[1], 0)
            self.work("peer", job | {"train": self.train_100})

    def store_models(self) -> None:
        """Fit both on the 100 training images and store the models, once.

        The test images are read here, so that all processes find them in the system's cache.
        """
        for path in self.images["test"]:
            Path(path).read_bytes()
        for who in ("ours", "peer"):
            if who not in self.fitted:
                print(f"fitting and storing: {who}", flush=True)
                job = self.job("store", PATCHCORE_PAIRS[1], 0) | self.stored(who)
                job |= {"train": self.train_100, "test": self.images["test"][:1]}
                self.fitted[who] = self.work(who, job)

    def stored(self, who: str) -> dict[str, str]:
        """Return the path of the fitted model, as an entry of a job."""
        return {"stored": str(self.scratch / f"{who}.model")}

    def check_score(self, who: str, score: float) -> None:
        """Stop if a stored model's score differs from its score before it was stored."""
        before = self.fitted[who]["score"]
        if abs(score - before) > 0.01 * abs(before):
            sys.exit(f"{who}: the stored model gives {score} where the fitted one gave {before}")

    def job(self, task: str, pair: Pair, seed: int) -> dict[str, Any]:
        """Make the job that a worker reads."""
        return self.common | {
            "task": task,
            "method": "patchcore",
            "variant": pair.variant,
            "seed": seed,
            "embeddings": str(self.embeddings),
            "result": str(self.scratch / "result.json"),
        }

    def work(self, who: str, job: dict[str, Any], pair: Pair | None = None) -> dict[str, Any]:
        """Run one worker to its end and return its result."""
        return work(
            who,
            job,
            self.scratch,
            peer_python=self.peer_python,
            threads=self.args.threads,
            malloc=pair.malloc if pair else None,
        )


def available(pairs: tuple[Pair, ...]) -> list[Pair]:
    """Select the pairs that this system can run: the allocator's variables need glibc."""
    glibc = platform.libc_ver()[0] == "glibc"
    return [p for p in pairs if glibc or not p.malloc]


def say(case: str, run: dict[str, Any], *names: str) -> None:
    """Print a line of progress."""
    figures = ", ".join(f"{name} {run[name]:.4g}" for name in names)
    print(f"{case} {run['pair']} round {run['repeat'] + 1} {run['who']}: {figures}", flush=True)


if __name__ == "__main__":
    main()
