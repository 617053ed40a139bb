"""What does each option cost and bring? One row for each option, category and seed."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from anomalib_lite import MahalanobisVFM, PaDiM, PatchCore, SubspaceAD, evaluate
from anomalib_lite.studies import (
    COLORS,
    PAPERS,
    StudyConfig,
    category_names,
    new_figure,
    save_figure,
)

METRICS = (
    *("image_auroc", "false_alarm_rate", "detection_rate"),
    *("pixel_auroc", "pixel_ap", "aupro"),
)
COLUMNS = ("option", "category", "seed", *METRICS, "fit_s", "ms", "bank_rows", "file_kb")
DETECTORS = {
    "PatchCore": PatchCore,
    "PaDiM": PaDiM,
    "MahalanobisVFM": MahalanobisVFM,
    "SubspaceAD": SubspaceAD,
}
FALSE_ALARM_RATE = 0.05
# Tables have one column for each of these: name -> categories.
GROUPS = {
    "tiles": ("magnetic_tile",),
    "papers": tuple(f"piped/{name}" for name in PAPERS),
    "solar cells, mono": ("elpv/mono",),
    "solar cells, poly": ("elpv/poly",),
    "textile": ("textile",),
}
WITH_MASKS = ("tiles", "papers")
DEFAULT = "auto, 5,000"
QUICK = {"categories": ["piped/PA_BDP01_TL"]}


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    options: dict[str, dict[str, Any]]
    baseline: str = "default"
    front: bool = False
    rounds: int = Field(default=0, ge=0)
    timed: list[str] = Field(
        default_factory=lambda: [names[0] for names in GROUPS.values()], min_length=1
    )
    timed_test: int = 60

    @field_validator("options")
    @classmethod
    def _check(cls, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, option in options.items():
            try:
                make(option)
            except (TypeError, KeyError) as error:
                raise ValueError(f"{name}: {error}") from error
        return options


def make(option: dict[str, Any], **more: Any) -> Any:
    """Return the detector that an option describes; without ``detector`` it is a PatchCore."""
    parameters = {**option, **more}
    kind = DETECTORS[parameters.pop("detector", "PatchCore")]
    preset = parameters.pop("preset", None)
    return kind(**parameters) if preset is None else kind.preset(preset, **parameters)


def measure(config: Config, run: Any) -> Any:
    """Yield rows of tests, and then those of times, if there are rounds."""
    for case in run.cases(
        {"option": option, "category": category, "seed": seed}
        for seed in run.seeds
        for option in config.options
        for category in run.categories
    ):
        images = run.open(case["category"], case["seed"])
        detector, row = fit(config, run, case["option"], images.train, case["seed"])
        found = evaluate(detector, images.test)
        row |= {name: found.metrics.get(name) for name in METRICS}
        row |= {"n_train": len(images.train), "n_test": len(images.test)}
        yield {name: value for name, value in row.items() if name != "fit_s"}
    if config.rounds:
        timed = [name for name in category_names(config.timed) if name in run.categories]
        for case in run.cases({"category": name, "timed": True} for name in timed):
            with run.without_cache():
                yield from measure_times(config, run, run.open(case["category"], 0))


def fit(
    config: Config, run: Any, option: str, train: list[Any], seed: int
) -> tuple[Any, dict[str, Any]]:
    """Fit a detector; return it, the time, and the sizes of its bank and its file."""
    detector = make(
        config.options[option],
        false_alarm_rate=FALSE_ALARM_RATE,
        random_state=seed,
        n_jobs=config.n_jobs,
    )
    began = time.perf_counter()
    run.fit(detector, train)
    row: dict[str, Any] = {"fit_s": time.perf_counter() - began}
    row |= {"engine": detector.engine_, "dtype": detector.dtype_}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        detector.save(file)
        row["file_kb"] = file.stat().st_size / 1000
    bank = getattr(detector, "memory_bank_", None)
    return detector, row | {"bank_rows": None if bank is None else len(bank.embeddings_)}


def measure_times(config: Config, run: Any, images: Any) -> Any:
    """Yield the time of each option: all in one process, in turns; the median of the rounds."""
    half = config.timed_test // 2
    by_label = [[s for s in images.test if s.label == label][:half] for label in (0, 1)]
    test = [sample for some in by_label for sample in some]
    fitted = {name: fit(config, run, name, images.train, 0) for name in config.options}
    ms: dict[str, list[float]] = {name: [] for name in fitted}
    for number in range(config.rounds + 1):
        for name, (detector, _) in fitted.items():
            began = time.perf_counter()
            detector.detect(test)
            if number:  # the first round makes the graphs of the engine
                ms[name].append(1000 * (time.perf_counter() - began) / len(test))
    for name, (_, row) in fitted.items():
        yield {"option": name, "seed": 0, **row, "ms": statistics.median(ms[name])}


# --- Tables and the figure ----------------------------------------------------------------------


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return one row for each option, of the seeds that have all categories."""
    tests, times = split(table)
    tests = complete(tests)
    return {"table": summarize(tests, times, config.baseline)} if len(tests) else {}


def split(table: Any) -> tuple[Any, Any]:
    """Return the rows of tests, and those of times."""
    timed = table["timed"].notna() if "timed" in table else table["option"].isna()
    return table[~timed], table[timed]


def complete(tests: Any) -> Any:
    """Keep the seeds of an option that were measured on all categories."""
    n = tests.groupby(["option", "seed"])["category"].transform("nunique")
    return tests[n == tests["category"].nunique()]


def by_group(table: Any, value: str) -> Any:
    """Average over the categories of a group, for each option and seed."""
    group = {category: name for name, of_group in GROUPS.items() for category in of_group}
    table = table.assign(group=table["category"].map(group))
    return table.groupby(["option", "seed", "group"], sort=False)[value].mean().unstack("group")


def summarize(tests: Any, times: Any, baseline: str) -> Any:
    """Return one row for each option: means over groups, spreads over seeds, and costs."""
    auroc = by_group(tests, "image_auroc")
    groups = [name for name in GROUPS if name in auroc]
    whole = auroc.mean(axis=1).groupby("option", sort=False)
    found = auroc.groupby("option", sort=False).mean()[groups]
    found["mean"], found["spread"] = whole.mean(), whole.std()
    for name in ("pixel_auroc", "aupro"):
        means = by_group(tests, name).groupby("option", sort=False).mean()
        for group in (g for g in WITH_MASKS if g in groups):
            found[f"{name}, {group}"] = means[group]
    for name in ("detection_rate", "false_alarm_rate", "bank_rows", "file_kb"):
        found[name] = by_group(tests, name).mean(axis=1).groupby("option", sort=False).mean()
    for name in ("ms", "fit_s") if len(times) else ():
        cost = by_group(times, name).groupby("option", sort=False).mean()
        found[[f"{name}, {group}" for group in cost]] = cost
        # A ratio for each group: no group counts for more because its images are large.
        if baseline in cost.index:
            found[f"{name}, ratio"] = (cost / cost.loc[baseline]).mean(axis=1)
    found["seeds"] = tests.groupby("option", sort=False)["seed"].nunique()
    return found


def draw(table: Any, folder: Path, config: Config) -> None:
    """Draw the front, where names of options are sizes of images and banks."""
    tests, times = split(table)
    if config.front and len(times):
        draw_front(complete(tests), times, config.baseline, folder / "front.png")


def draw_front(tests: Any, times: Any, baseline: str, path: Path) -> None:
    """Draw accuracy and found share against time, for each group of categories and for all.

    ``times`` are rows whose options alone are drawn.
    """
    from matplotlib.lines import Line2D

    tests = tests[tests["option"].isin(set(times["option"]))]
    sizes = ("256", "320", "384", "448", "auto")
    colours = dict(zip(sizes, (*COLORS[:4], "#000000"), strict=True))
    markers = {"10 %": "s", "1 %": "v", "2,000": "o", "5,000": "D", "10,000": "^"}
    found, time_ = summarize(tests, times, baseline), by_group(times, "ms")
    time_ = time_.groupby("option", sort=False).mean()
    figure, panels = new_figure(2, 4, (15, 7.2))
    titles = {name: name for name in GROUPS if name in found}
    titles |= {"mean": "mean of the groups", "detection_rate": "found at the threshold, mean"}
    for panel, (column, title) in zip(panels.flat, titles.items(), strict=False):
        x = time_[column] if column in time_ else time_.mean(axis=1)
        for option, value in found[column].items():
            size, bank = str(option).split(", ", 1)
            is_default = option == DEFAULT
            panel.scatter(
                x[option], value, s=130 if is_default else 55, color=colours[size],
                marker=markers[bank], edgecolor="black" if is_default else "none", zorder=3,
            )  # fmt: skip
        panel.set(title=title, xlabel="ms per image", xscale="log")
        panel.set_ylabel("share" if column == "detection_rate" else "image AUROC")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="x", which="minor", labelsize=7)
    for panel in panels.flat[len(titles) :]:
        panel.axis("off")
    handles = [Line2D([], [], ls="", marker="o", color=c, label=s) for s, c in colours.items()]
    handles += [
        Line2D([], [], ls="", marker=m, color="0.4", label=f"bank: {b}")
        for b, m in markers.items()
        if any(str(option).endswith(f", {b}") for option in found.index)
    ]
    ring = {"marker": "D", "ms": 10, "mec": "black", "mfc": "w"}
    handles.append(Line2D([], [], ls="", label="default", **ring))
    panels.flat[-1].legend(handles=handles, loc="center", frameon=False)
    save_figure(figure, path)
