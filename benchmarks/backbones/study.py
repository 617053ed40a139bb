"""Which backbone, on its own category, and on data sets that it was not fitted on?"""

from __future__ import annotations

from typing import Any, Literal

from anomalib_lite import PatchCore, SubspaceAD
from anomalib_lite.studies import (
    NetworkConfig,
    StudyConfig,
    category_names,
    draw_bars,
    draw_categories,
    new_figure,
    save_figure,
    summarize,
)

COLUMNS = (
    *("backbone", "dataset", "category", "image_auroc", "pixel_auroc", "pixel_pr", "timestamp"),
    *("setting", "seed"),
)
METRICS = ("image_auroc", "pixel_auroc", "pixel_pr")


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    backbones: dict[str, NetworkConfig]
    memory: Literal["knn", "pca", "kmeans"] = "knn"
    coreset_ratio: float = 0.05
    n_neighbors: int = 5
    in_domain: list[str]
    cross_domain: list[str]
    max_pooled: int = 250


def measure(config: Config, run: Any) -> Any:
    """Yield a row for each backbone, setting, category and seed."""
    networks = run.networks(config.backbones)
    here = set(run.categories)
    in_domain = [name for name in category_names(config.in_domain) if name in here]
    cross_domain = [name for name in category_names(config.cross_domain) if name in here]
    settings = [{"setting": "own", "category": name} for name in run.categories]
    pooled = f"{', '.join(in_domain)}, tested on {', '.join(cross_domain)}"
    if in_domain and cross_domain:
        settings.append({"setting": "pooled", "category": "all in-domain"})
        if run.results.knows_data("pooled"):  # if more categories are here now, rows are not mixed
            run.results.check_data("pooled", pooled)
    for case in run.cases(
        {"backbone": name, **setting, "seed": seed}
        for seed in run.seeds
        for setting in settings
        for name in networks
    ):
        network, seed = networks[case["backbone"]], case["seed"]
        if case["setting"] == "own":
            tests = {case["category"]: "own"}
            train = run.open(case["category"], seed).train
        else:
            run.results.check_data("pooled", pooled)
            tests = dict.fromkeys(in_domain, "in_domain")
            tests |= dict.fromkeys(cross_domain, "cross_domain")
            share = max(1, config.max_pooled // len(in_domain))
            train = [sample for name in in_domain for sample in run.open(name, seed).train[:share]]
        detector = run.fit(make_detector(config, network, seed), train)
        for name, setting in tests.items():
            images = run.open(name, seed)
            about = {"dataset": images.dataset, "category": name, "setting": setting}
            yield about | run.test(detector, images.test) | {"n_train": len(train)}


def make_detector(config: Config, network: NetworkConfig, seed: int) -> Any:
    """Make the detector that the configuration asks for."""
    options = {**network.parameters(), "random_state": seed, "n_jobs": config.n_jobs}
    if config.memory == "pca":
        return SubspaceAD(**options)
    coreset = "greedy" if config.memory == "knn" else "kmeans"
    return PatchCore(
        coreset=coreset,
        coreset_ratio=config.coreset_ratio,
        n_neighbors=config.n_neighbors,
        **options,
    )


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Summarise each setting.

    The gap is that of one detector: in-domain less cross-domain. Categories differ in difficulty,
    so the loss is there too: what detectors of their own reach on the cross-domain categories,
    less what the foreign one does.
    """
    own = table[table["setting"] == "own"]
    made = {"table": summarize(own, "backbone", METRICS)}
    made["per_category"] = own.pivot_table(
        index="category", columns="backbone", values="image_auroc", sort=False
    )
    gaps = find_gaps(table)
    if len(gaps):
        spread = gaps.groupby("backbone", sort=False).std()
        made["gap"] = gaps.groupby("backbone", sort=False).mean()
        made["gap"]["gap_spread"] = spread["gap"]
        foreign = set(table.loc[table["setting"] == "cross_domain", "category"])
        of_foreign = own[own["category"].isin(foreign)]
        means = of_foreign.groupby("backbone", sort=False)["image_auroc"].mean()
        made["gap"]["cross_domain_own"] = means
        made["gap"]["loss"] = means - made["gap"]["cross_domain"]
    return made


def find_gaps(table: Any) -> Any:
    """Return image AUROC in-domain and cross-domain and their difference, by backbone and seed."""
    pooled = table[table["setting"].isin(["in_domain", "cross_domain"])]
    means = pooled.groupby(["backbone", "seed", "setting"], sort=False)["image_auroc"].mean()
    wide = means.unstack("setting").reindex(columns=["in_domain", "cross_domain"])
    return wide.assign(gap=wide["in_domain"] - wide["cross_domain"]).dropna()


def draw(table: Any, folder: Any, config: Config) -> None:
    """Draw in-domain, cross-domain, the gap and each category."""
    gaps = find_gaps(table)
    names = [name for name in config.backbones if name in set(table["backbone"])]
    means = gaps.groupby("backbone").mean().reindex(names)
    spreads = gaps.groupby("backbone").std().reindex(names)
    figure, panels = new_figure(2, 2, (14, 10))
    for panel, column, title in (
        (panels[0, 0], "in_domain", "In-domain: categories that it was fitted on"),
        (panels[0, 1], "cross_domain", "Cross-domain: data sets that it has not seen"),
        (panels[1, 0], "gap", "Generalisation gap: in-domain less cross-domain"),
    ):
        label = "difference of image AUROC" if column == "gap" else "image AUROC, mean"
        draw_bars(panel, names, means[column], spreads[column], title=title, label=label)
        if column != "gap":
            panel.axhline(0.5, color="black", linestyle=":", linewidth=1)
    own = table[table["setting"] == "own"]
    title = "Each category by a detector of its own"
    draw_categories(panels[1, 1], own, "backbone", names, title=title)
    seeds = table["seed"].nunique()
    figure.suptitle(
        "In-domain, cross-domain and gap: one detector, fitted on all in-domain categories. "
        f"Lines: deviation of {seeds} seeds."
    )
    save_figure(figure, folder / "backbone_comparison.png")
