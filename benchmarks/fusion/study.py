"""How should layers become one embedding of a patch, and what does a longer embedding bring?"""

from __future__ import annotations

import statistics
import time
from typing import Any

from anomalib_lite import PatchCore
from anomalib_lite.studies import (
    COLORS,
    MARKERS,
    NetworkConfig,
    StudyConfig,
    StudyModel,
    draw_bars,
    new_figure,
    save_figure,
    summarize,
)

COLUMNS = (
    *("fusion_strategy", "category", "image_auroc", "pixel_auroc", "feature_dim"),
    *("inference_time_ms", "timestamp", "seed", "bank_mb", "pixel_pr", "aupro"),
)
METRICS = ("image_auroc", "pixel_auroc")


class StrategyConfig(StudyModel):
    """Parameters of PatchCore that decide how layers are fused; `layers` replace the network's."""

    fusion: str
    layer_weights: list[float] | None = None
    layers: list[str | int] | None = None
    feature_dim: int | None = None


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    network: NetworkConfig
    strategies: dict[str, StrategyConfig]
    coreset_ratio: float = 0.05
    timed_images: int = 4
    repeats: int = 3


def measure(config: Config, run: Any) -> Any:
    """Yield a row for each strategy, category and seed."""
    [network] = run.networks({"network": config.network}).values()
    for case in run.cases(
        {"category": name, "seed": seed} for seed in run.seeds for name in run.categories
    ):
        images = run.open(case["category"], case["seed"])
        rows, detectors = {}, {}
        for name, strategy in config.strategies.items():
            detector = make_detector(config, network, strategy, case["seed"])
            detectors[name] = run.fit(detector, images.train)
            rows[name] = {"fusion_strategy": name, **run.test(detector, images.test)}
            rows[name] |= {"feature_dim": detector.n_features_, "bank_mb": bank_mb(detector)}
        with run.without_cache():
            times = time_alternating(detectors, images.test[: config.timed_images], config.repeats)
        for name, row in rows.items():
            yield row | {"inference_time_ms": times[name], "n_train": len(images.train)}


def make_detector(
    config: Config, network: NetworkConfig, strategy: StrategyConfig, seed: int
) -> PatchCore:
    """Make the detector of a strategy; all but the fusion is the same for all."""
    given = {name: value for name, value in dict(strategy).items() if value is not None}
    options = {**network.parameters(), "random_state": seed, "n_jobs": config.n_jobs}
    return PatchCore(coreset_ratio=config.coreset_ratio, **(options | given))


def bank_mb(detector: Any) -> float:
    """Return the size of what the detector remembers, in millions of bytes."""
    layers = getattr(detector, "layer_models_", None)
    models = [detector] if layers is None else layers.models_
    return sum(model.memory_bank_.embeddings_.nbytes for model in models) / 1e6


def time_alternating(
    detectors: dict[str, Any], samples: list[Any], repeats: int
) -> dict[str, float]:
    """Return milliseconds an image, read and embedded and searched: the median of the repeats.

    The detectors take turns, so that what slows the machine for a while slows all of them.
    """
    for detector in detectors.values():
        detector.detect(samples[:1])  # what is prepared at the first call does not count
    times: dict[str, list[float]] = {name: [] for name in detectors}
    for _ in range(repeats):
        for name, detector in detectors.items():
            began = time.perf_counter()
            detector.detect(samples)
            times[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(t) / len(samples) for name, t in times.items()}


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return one line for each strategy, and the image AUROC of each category."""
    made = summarize(table, "fusion_strategy", METRICS)
    groups = table.groupby("fusion_strategy")
    made["feature_dim"] = groups["feature_dim"].median()
    made["inference_time_ms"] = groups["inference_time_ms"].median()
    made["bank_mb"] = groups["bank_mb"].mean()
    per_category = table.pivot_table(
        index="category", columns="fusion_strategy", values="image_auroc", sort=False
    )
    return {"table": made, "per_category": per_category}


def draw(table: Any, folder: Any, config: Config) -> None:
    """Draw both accuracies, and accuracy over dimension and over time."""
    made = tables(table, config)["table"]
    made = made.reindex([name for name in config.strategies if name in made.index])
    figure, panels = new_figure(2, 2, (14, 10))
    for panel, metric, text in (
        (panels[0, 0], "image_auroc", "image AUROC"),
        (panels[0, 1], "pixel_auroc", "pixel AUROC"),
    ):
        draw_bars(
            panel,
            list(made.index),
            made[metric],
            made[f"{metric}_spread"],
            title=f"{text[0].upper()}{text[1:]} of each strategy",
            label=f"{text}, mean",
        )
        panel.axhline(0.5, color="black", linestyle=":", linewidth=1)
    label = "numbers in the embedding of a patch (equal ones side by side)"
    draw_points(panels[1, 0], made, side_by_side(made["feature_dim"]), label)
    panels[1, 0].set(title="Dimension against performance", xscale="log", ylabel="image AUROC")
    dimensions = sorted(set(made["feature_dim"]))
    panels[1, 0].set_xticks(dimensions, [f"{n:.0f}" for n in dimensions], rotation=45)
    panels[1, 0].set_xticks([], minor=True)
    draw_points(panels[1, 1], made, made["inference_time_ms"], "time for an image [ms], median")
    panels[1, 1].set(title="Time against performance", ylabel="image AUROC")
    panels[1, 1].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    categories, seeds = table["category"].nunique(), table["seed"].nunique()
    figure.suptitle(
        f"PatchCore, mean of {categories} categories. Lines: deviation of {seeds} seeds."
    )
    save_figure(figure, folder / "fusion_comparison.png")


def side_by_side(dimensions: Any) -> Any:
    """Move equal dimensions a little apart, so that no mark hides another."""
    group = dimensions.groupby(dimensions)
    place = group.cumcount() - (group.transform("size") - 1) / 2
    return dimensions * 1.06**place


def draw_points(panel: Any, made: Any, places: Any, label: str) -> None:
    """Draw a mark with its spread for each strategy."""
    for i, (name, line) in enumerate(made.iterrows()):
        spread = line["image_auroc_spread"]
        panel.errorbar(
            places[name],
            line["image_auroc"],
            yerr=spread if spread == spread else None,
            fmt=MARKERS[i % len(MARKERS)],
            color=COLORS[i % len(COLORS)],
            markersize=9,
            capsize=3,
            label=name,
        )
    panel.set_xlabel(label)
    panel.grid(alpha=0.3, which="both")
