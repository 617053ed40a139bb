"""Our PatchCore and PaDiM against anomalib's: same images, weights, size and coreset."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from scipy.stats import wilcoxon

from anomalib_lite.metrics import auroc, bootstrap_interval, paired_test
from anomalib_lite.studies import COLORS, StudyConfig, draw_bars, new_figure, save_figure

PEERS = Path(__file__).resolve().parents[1] / "peers"
sys.path.append(str(PEERS))

from measuring import load_predictions  # noqa: E402
from surroundings import HUGE_PAGES, check_peer, our_weights, work  # noqa: E402
from worker_judge import judge_metrics  # noqa: E402

# What the workers run: it decides the rows as this file does.
SOURCES = [
    PEERS / f"{name}.py"
    for name in (
        *("measuring", "surroundings", "anomalib_model"),
        *("worker_ours", "worker_anomalib", "worker_judge"),
    )
]
LIBRARIES = {"ours": "anomalib-lite", "peer": "anomalib"}
METRICS = ("image_auroc", "pixel_auroc", "aupro")
COSTS = {
    "fit_s": "seconds to fit",
    "test_ms": "ms an image to test",
    "peak_mb": "peak memory, MB",
}
COLUMNS = ("method", "category", *METRICS, *COSTS, "difference", "p_value", "seed")
COMPARED = "method"
QUICK = {"categories": ["piped/PA_BDP01_TL"]}


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    detectors: list[Literal["patchcore", "padim"]] = Field(
        default_factory=lambda: ["patchcore", "padim"]
    )
    image_size: int = 256
    coreset_ratio: float = 0.01
    n_components: int = 100
    batch_size: int = 32
    variant: Literal["bare", "engine"] = "bare"
    huge_pages: bool = True
    rounds: int = Field(default=1, ge=1)
    threads: int = 2
    peer_python: str | None = None


def measure(config: Config, run: Any) -> Any:
    """Yield two rows, ours and anomalib's, for each detector, category and seed."""
    peer = check_peer(None if config.peer_python is None else Path(config.peer_python))
    weights = our_weights()
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix="anomalib-") as scratch:
        for number, case in enumerate(
            run.cases(
                {"detector": detector, "category": category, "seed": seed}
                for seed in run.seeds
                for detector in config.detectors
                for category in run.categories
            )
        ):
            images = run.open(case["category"], case["seed"])
            job = make_job(config, case, images, weights, Path(scratch))
            runs: dict[str, list[dict[str, Any]]] = {who: [] for who in LIBRARIES}
            for turn in range(config.rounds):
                order = list(LIBRARIES) if (number + turn) % 2 == 0 else list(LIBRARIES)[::-1]
                for who in order:
                    found = work(
                        who,
                        job,
                        Path(scratch),
                        peer_python=peer,
                        threads=config.threads,
                        malloc=HUGE_PAGES if config.huge_pages else None,
                    )
                    found |= judge_metrics(job)
                    found["scores"] = load_predictions(job["predictions"])[0]
                    runs[who].append(found)
            yield from compare(case, job["labels"], runs, {"weights_sha256": sha256})


def make_job(
    config: Config, case: dict[str, Any], images: Any, weights: Path, scratch: Path
) -> dict[str, Any]:
    """Return what both workers are told, as benchmarks/peers tells them."""
    test = images.test
    return {
        "task": "patchcore",  # fit and test; the method says with which detector
        "method": case["detector"],
        "seed": case["seed"],
        "train": [str(sample.path) for sample in images.train],
        "test": [str(sample.path) for sample in test],
        "masks": [sample.mask_path and str(sample.mask_path) for sample in test],
        "labels": [sample.label for sample in test],
        "image_size": [config.image_size, config.image_size],
        "coreset_ratio": config.coreset_ratio,
        "n_components": config.n_components,
        "batch_size": config.batch_size,
        "variant": config.variant,
        "threads": config.threads,
        "num_workers": 0,
        "weights": str(weights),
        "predictions": str(scratch / "predictions.npz"),
        "result": str(scratch / "result.json"),
    }


def compare(
    case: dict[str, Any], labels: list[int], runs: dict[str, list[dict[str, Any]]], about: Any
) -> Any:
    """Yield a row for each library: metrics of the first round, and medians of the costs."""
    ours, peers = (runs[who][0]["scores"] for who in LIBRARIES)
    test = paired_test(auroc, labels, ours, peers, random_state=0)
    for who, library in LIBRARIES.items():
        first = runs[who][0]
        low, high = bootstrap_interval(auroc, labels, first["scores"], random_state=0)
        row = {"method": f"{case['detector']}, {library}", "library": library}
        row |= {name: first.get(name) for name in METRICS}
        row |= {"image_auroc_low": low, "image_auroc_high": high}
        costs = {
            "fit_s": [r["fit_s"] for r in runs[who]],
            "test_ms": [1000 * r["test_s"] / len(labels) for r in runs[who]],
            "peak_mb": [r["peak_rss_mb"] for r in runs[who]],
            "import_s": [r["import_s"] for r in runs[who]],
        }
        row |= {name: float(np.median(values)) for name, values in costs.items()}
        row |= {"bank_rows": first["bank_shape"][0], "n_test": len(labels)}
        if who == "ours":
            row |= {"difference": test.difference, "p_value": test.p_value}
        settings, versions = first["settings"], first["versions"]
        row |= {"engine": settings.get("engine_", "torch"), "torch": versions["torch"]}
        row |= {"dtype": settings.get("dtype_") or settings["dtype"]}
        yield row | {"library_version": versions[library]} | about


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return each category, a test over the categories, and the costs."""
    wide = side_by_side(table)
    each = pd.DataFrame(
        {
            f"{metric}, {library}": wide[metric, library]
            for metric in METRICS
            for library in LIBRARIES.values()
        }
    )
    ours = table[table["library"] == LIBRARIES["ours"]]
    by_case = ours.groupby(["detector", "category"], sort=False)
    each["difference of image_auroc"] = by_case["difference"].mean()
    # Of several seeds, the largest: no seed alone makes a difference.
    each["p_value"] = by_case["p_value"].max()
    costs = table.groupby("method", sort=False)[list(COSTS)].median()
    return {"per_category": each, "over_categories": over_categories(wide), "costs": costs}


def side_by_side(table: Any) -> Any:
    """Return means over seeds: a row for each detector and category, columns by library."""
    grid = table.pivot_table(
        index=["detector", "category"],
        columns="library",
        values=[*METRICS, *COSTS],
        sort=False,
        dropna=False,
        aggfunc="mean",
    )
    return grid.dropna(how="all")


def over_categories(wide: Any) -> Any:
    """Test whether ours is better or worse over the categories, for each detector and metric.

    ``p_value`` is of Wilcoxon's signed-rank test, two-sided; ``low`` and ``high`` are the 95 %
    interval of the mean difference, by the bootstrap over categories.
    """
    found = []
    for detector, grid in wide.groupby(level="detector", sort=False):
        for metric in METRICS:
            pairs = grid[metric].dropna()
            if pairs.empty:
                continue
            less = (pairs[LIBRARIES["ours"]] - pairs[LIBRARIES["peer"]]).to_numpy()
            drawn = np.random.RandomState(0).randint(len(less), size=(2000, len(less)))
            low, high = np.percentile(less[drawn].mean(axis=1), [2.5, 97.5])
            row = {"detector": detector, "metric": metric, "mean_difference": less.mean()}
            row |= {"low": low, "high": high}
            row |= {"p_value": wilcoxon(less).pvalue if less.any() else 1.0}
            row |= {"higher": (less > 0).sum(), "lower": (less < 0).sum(), "categories": len(less)}
            found.append(row)
    return pd.DataFrame(found).set_index(["detector", "metric"])


def draw(table: Any, folder: Path, config: Config) -> None:
    """Draw the image AUROC of each category, and the costs as ratios, for each detector."""
    detectors = list(dict.fromkeys(table["detector"]))
    figure, panels = new_figure(len(detectors), 2, (15, 5.5 * len(detectors)))
    wide = side_by_side(table)
    for (left, right), detector in zip(panels, detectors, strict=True):
        draw_categories(left, table[table["detector"] == detector], detector)
        grid = wide.loc[detector]
        ratios = {
            text: (grid[cost, LIBRARIES["peer"]] / grid[cost, LIBRARIES["ours"]]).median()
            for cost, text in COSTS.items()
        }
        draw_bars(
            right,
            list(ratios),
            list(ratios.values()),
            title=f"{detector}: what anomalib takes more",
            label="anomalib / anomalib-lite, median of the categories",
        )
        right.axhline(1, color="black", linestyle=":", linewidth=1)
    save_figure(figure, folder / "anomalib_comparison.png")


def draw_categories(panel: Any, rows: Any, detector: str) -> None:
    """Draw a mark with its interval for each library and category."""
    columns = ["image_auroc", "image_auroc_low", "image_auroc_high"]
    for i, (library, marker) in enumerate(zip(LIBRARIES.values(), "os", strict=True)):
        some = rows[rows["library"] == library]
        value, low, high = some.groupby("category", sort=False)[columns].mean().to_numpy().T
        place = np.arange(len(value)) + 0.2 * (i - 0.5)
        lines = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
        panel.errorbar(
            place, value, lines, fmt=marker, color=COLORS[i], label=library, ms=5, lw=1, capsize=2
        )
    names = [str(name).split("/")[-1] for name in rows["category"].unique()]
    panel.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    panel.set_ylabel("image AUROC")
    panel.set_title(f"{detector}: each category, with 95 % intervals", loc="left")
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
