"""What do the presets reach by the protocols of the papers, and what was published?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from anomalib_lite import PaDiM, PatchCore, SubspaceAD
from anomalib_lite.detectors.presets import PRESETS
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.evaluation import evaluate
from anomalib_lite.studies import (
    NetworkConfig,
    StudyConfig,
    StudyModel,
    category_names,
    draw_bars,
    draw_categories,
    new_figure,
    save_figure,
    summarize,
)

COLUMNS = (
    *("method", "dataset", "category", "image_auroc", "pixel_auroc", "aupro", "timestamp"),
    *("pixel_pr", "fpr_limit", "shots", "foreground", "n_train", "n_test", "seed"),
)
METRICS = ("image_auroc", "pixel_auroc", "aupro")
DETECTORS = {"PatchCore": PatchCore, "PaDiM": PaDiM, "SubspaceAD": SubspaceAD}
REPORTED = Path(__file__).with_name("reported.csv")


class MethodConfig(StudyModel):
    """A preset, and how many images it is fitted on."""

    detector: Literal["PatchCore", "PaDiM", "SubspaceAD"]
    preset: str
    shots: int | None = None
    foreground: list[str] | None = None
    parameters: dict[str, Any] | None = None


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    methods: dict[str, MethodConfig]
    fpr_limit: float = 0.3


def measure(config: Config, run: Any) -> Any:
    """Yield a row for each method, category and seed."""
    methods = methods_here(config, run)
    for case in run.cases(
        {"method": name, "category": category, "seed": seed}
        for seed in run.seeds
        for category in run.categories
        for name in methods
    ):
        method, seed = config.methods[case["method"]], case["seed"]
        images = run.open(case["category"], seed)
        train = draw_shots(images.train, method.shots, seed)
        detector, foreground = fit(config, method, run, case, train)
        report = evaluate(detector, images.test, fpr_limit=config.fpr_limit).metrics
        found = {name: report.get(name) for name in METRICS} | {"pixel_pr": report.get("pixel_ap")}
        about = {"dataset": images.dataset, "shots": method.shots, "foreground": foreground}
        about |= {"n_train": len(train), "n_test": len(images.test)}
        yield {**found, **about, "fpr_limit": config.fpr_limit}


def make_detector(method: MethodConfig, **given: Any) -> Any:
    """Make the detector of a method; its own parameters go before those given."""
    return DETECTORS[method.detector].preset(method.preset, **(given | (method.parameters or {})))


def methods_here(config: Config, run: Any) -> list[str]:
    """Return the methods whose network can be opened on this machine; the others are left out."""
    networks = {}
    for name, method in config.methods.items():
        made = make_detector(method)
        layers = None if made.layers is None else list(made.layers)
        networks[name] = NetworkConfig(backbone=made.backbone, weights=made.weights, layers=layers)
    return list(run.networks(networks))


def draw_shots(train: list[Any], shots: int | None, seed: int) -> list[Any]:
    """Draw so many images to fit on; None takes all."""
    if shots is None:
        return train
    order = np.random.RandomState(seed).permutation(len(train))[:shots]
    return [train[i] for i in order]


def fit(
    config: Config, method: MethodConfig, run: Any, case: dict[str, Any], train: list[Any]
) -> tuple[Any, bool]:
    """Fit the detector on all of its images; return it, and whether it masks the background.

    No image is held back for the threshold, which no metric here depends on.
    """
    given = {"calibration": "leave_one_out", "random_state": case["seed"]}
    given |= {"n_jobs": config.n_jobs}
    if case["category"] not in category_names(method.foreground or []):
        return run.fit(make_detector(method, **given), train), False
    try:
        return run.fit(make_detector(method, foreground=True, **given), train), True
    except InvalidValueError as error:  # these images show no clear object
        run.log.warning("%s: %s: no foreground: %s", run.name, case["category"], error)
        return run.fit(make_detector(method, **given), train), False


# --- Tables and figures -------------------------------------------------------------------------


def read_reported(table: Any) -> Any:
    """Return what was published of the data sets measured: a line a figure."""
    import pandas as pd

    reported = pd.read_csv(REPORTED)
    return reported[reported["dataset"].isin(set(table["dataset"]))]


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return means, measured beside reported, and what the presets do otherwise."""
    return {
        "table": summarize(table, "method", METRICS),
        "beside_reported": beside_reported(table),
        "presets": describe_presets(config),
    }


def beside_reported(table: Any) -> Any:
    """Return measured and reported figures of each method: the mean, and each category.

    A mean stands beside a published one only if all categories of the latter were measured.
    """
    import pandas as pd

    reported = read_reported(table)
    wide = reported.pivot_table(
        index=["method", "category"], columns="figure", values="value", sort=False
    )
    lines = {}
    for name, rows in table.groupby("method", sort=False):
        each = rows.groupby("category", sort=False)[list(METRICS)].mean()
        for dataset in rows["dataset"].unique():
            own = each[each.index.str.startswith(f"{dataset}/")]
            whole = len(own) == len(category_names([f"{dataset}/*"]))
            lines[name, f"{dataset}, mean"] = own.mean() if whole else own.mean() * np.nan
            for category, line in own.iterrows():
                lines[name, category] = line
    made = pd.DataFrame(lines).T.rename_axis(["method", "category"])
    for metric in METRICS:
        column = wide[metric] if metric in wide else pd.Series(dtype=float)
        made[f"reported {metric}"] = column.reindex(made.index)
        made[f"{metric} difference"] = made[metric] - made[f"reported {metric}"]
    return made


def describe_presets(config: Config) -> Any:
    """Return the source of each method's preset, and what it does otherwise."""
    import pandas as pd

    found = {}
    for name, method in config.methods.items():
        preset = PRESETS[method.detector][method.preset]
        found[name] = {"source": preset.source, "differs": preset.differs or "in nothing known"}
    return pd.DataFrame(found).T.rename_axis("method")


def draw(table: Any, folder: Any, config: Config) -> None:
    """Draw the means of each method, measured and reported, and image AUROC by category."""
    beside = beside_reported(table)
    names = [name for name in config.methods if name in set(table["method"])]
    means = table.groupby(["method", "category"])[list(METRICS)].mean().groupby("method").mean()
    is_mean = beside.index.get_level_values("category").str.endswith(", mean")
    # A published mean is of all categories, so it stands only beside such a one.
    reported = beside[is_mean & beside["image_auroc"].notna()].groupby("method").mean()
    figure, panels = new_figure(2, 2, (16, 12))
    for panel, metric in zip(panels.flat, METRICS, strict=False):
        values = means[metric].reindex(names)
        text = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}.get(
            metric, f"AUPRO to {config.fpr_limit:g}"
        )
        draw_bars(panel, names, values, title=f"Mean {text}", label=text)
        published = reported[f"reported {metric}"].reindex(names)
        if published.notna().any():
            place = [x + 0.28 for x in range(len(names))]
            style = {"color": "white", "markeredgecolor": "black", "markeredgewidth": 1.5}
            panel.plot(place, published, "D", label="reported", **style)
            panel.legend(loc="lower right")
    draw_categories(panels[1, 1], table, "method", names, title="Each category, measured")
    seeds = table["seed"].nunique()
    categories = table["category"].nunique()
    figure.suptitle(
        f"Presets by the protocols of the papers: {categories} categories, seeds: {seeds}"
    )
    save_figure(figure, folder / "paper_comparison.png")
