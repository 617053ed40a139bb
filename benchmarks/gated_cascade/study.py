"""Does a gate in front of a heatmap model pay? Cascades on normal, mixed and foreign images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from anomalib_lite.errors import MissingPathError
from anomalib_lite.studies import NetworkConfig, StudyConfig

from . import measuring, pictures
from .experiments import EXPERIMENTS, backbones, build, fit
from .splits import SPLITS, counts, draw_splits

FIGURES = (
    *("accuracy", "precision", "recall", "f1", "auroc", "pr_auc"),
    *("latency_ms", "heatmap_call_rate"),
)
COLUMNS = ("experiment_id", "split", *FIGURES, "what", "seed")
# Columns of a line -> what they are called in the table.
LINE = {
    "heatmap_call_rate": "calls",
    "ms": "ms",
    "ms_alone": "ms alone",
    "ms_ratio": "ms ratio",
    "false_alarm_rate": "false alarms",
    "recall": "recall",
    "recall_alone_equal": "recall alone*",
    "recall_ratio_equal": "ratio*",
    "false_alarm_rate_alone_automatic": "false alarms alone+",
    "recall_alone_automatic": "recall alone+",
    "recall_ratio_automatic": "ratio+",
    "neu_recall": "NEU recall",
    "neu_recall_alone_equal": "NEU recall alone*",
    "neu_recall_ratio_equal": "NEU ratio*",
}
CHOSEN = ("t_low", "t_high", "heatmap_call_rate", "recall", "false_alarm_rate", "recall_lost")
JUDGED = ("val_mix", "test_mix")
QUICK = {"max_train": 40, "max_test": 24, "rounds": 1, "shrink": 2}


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean. Folders are below the data root."""

    experiments: list[Literal[tuple(EXPERIMENTS)]] = Field(  # type: ignore[valid-type]
        default_factory=lambda: list(EXPERIMENTS)
    )
    networks: dict[str, NetworkConfig] = Field(default_factory=dict)
    kolektor: str | None = None
    mvtec: str | None = None
    neu: str = "neu_det"
    as_delivered: bool = False
    false_alarm_rate: float = 0.05
    max_missed: float = 0.02
    rounds: int = 3
    engine: str = "auto"
    shrink: int = 1


def measure(config: Config, run: Any) -> Any:
    """Yield rows of ``images`` (those of a split), of a ``line`` and of a ``sweep``."""
    if run.data_root is None:
        raise MissingPathError(
            "gated_cascade: needs the directory that holds magnetic_tile and neu_det. Give "
            "--data-root, or set ANOMALIB_LITE_DATA."
        )
    weights, names = at_hand(config, run)
    for case in run.cases({"seed": seed} for seed in run.seeds):
        splits, parts = draw_images(config, run.data_root, case["seed"])
        images = [sample for split in splits.values() for sample in split]
        run.check_images(f"splits, seed {case['seed']}", images)
        models, answers = {}, {}
        for name in names:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                models[name] = fit(build(name, case["seed"], config, weights), name, splits, parts)
            for warning in said:
                run.log.info("%s: %s", name, warning.message)
            answers[name] = {s: measuring.ask(models[name], splits[s])[0] for s in SPLITS}
        with run.without_cache():
            ms = measuring.time_all(models, splits, config.rounds)
        if case["seed"] == run.seeds[0]:
            for name in names:
                sheet = pictures.samples(models[name], splits, answers[name], name)
                sheet.save(run.results.folder / f"samples_{name}.png")
        yield from of_images(names, splits, answers, ms)
        yield from of_lines(names, answers, ms)
        yield from of_sweeps(config, models, splits, answers)


def at_hand(config: Config, run: Any) -> tuple[dict[str, Path | None], list[str]]:
    """Return the files of weights, and the experiments that can run with what is here."""
    wanted = {EXPERIMENTS[name].get("alone") for name in config.experiments}
    names = [name for name in EXPERIMENTS if name in wanted | set(config.experiments)]
    used = dict.fromkeys(backbone for name in names for backbone in backbones(name))
    networks = {b: config.networks.get(b) or NetworkConfig(backbone=b) for b in used}
    found = run.networks(networks)
    names = [name for name in names if found.keys() >= set(backbones(name))]
    return {name: network.weights for name, network in found.items()}, names


def draw_images(config: Config, data: Path, seed: int) -> Any:
    """Draw the splits, and name the part that each image to fit on shows."""
    return draw_splits(
        seed,
        data=data,
        kolektor=None if config.kolektor is None else data / config.kolektor,
        mvtec=None if config.mvtec is None else data / config.mvtec,
        neu=data / config.neu,
        n_train=config.max_train,
        n_test=config.max_test,
        delivered=config.as_delivered,
    )


def of_images(names: list[str], splits: Any, answers: Any, ms: Any) -> Any:
    """Yield a row for each experiment and split."""
    numbers = counts(splits)
    for name in names:
        for split in SPLITS:
            row = {"experiment_id": name, "split": split, "what": "images"}
            row |= {"latency_ms": float(np.median(ms[name][split]))}
            row |= {f"n_{label}": n for label, n in numbers[split].items()}
            row["n_train"] = numbers["train_normal"]["normal"]
            yield row | measuring.judge(answers[name][split])


def of_lines(names: list[str], answers: Any, ms: Any) -> Any:
    """Yield a row for each cascade: it, and its heatmap model alone, where anomalies are few."""
    for name in names:
        alone = EXPERIMENTS[name].get("alone")
        if alone is not None:
            line = measuring.stream(answers[name], answers[alone], ms[name], ms[alone])
            yield {"experiment_id": name, "what": "line", "alone": alone} | line


def of_sweeps(config: Config, models: Any, splits: Any, answers: Any) -> Any:
    """Yield a row for each cascade, mixed split and pair of thresholds."""
    for name, model in models.items():
        if EXPERIMENTS[name].get("alone") is None:
            continue
        pairs = measuring.grids(answers[name]["val_mix"].probabilities)
        limit = 2 * config.false_alarm_rate
        for split in JUDGED:
            head = {"experiment_id": name, "split": split, "what": "sweep"}
            for row in measuring.sweep(model, splits[split], answers[name][split], pairs, limit):
                yield head | row


# --- Tables -----------------------------------------------------------------------------------


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return means over seeds: of splits, lines, the source's grid, and thresholds by val_mix."""
    images = select(table, "images")
    made = {"table": images.groupby(["experiment_id", "split"], sort=False)[list(FIGURES)].mean()}
    numbers = images.groupby("split", sort=False)[["n_normal", "n_anomalous"]].mean()
    made["images"] = numbers
    lines, sweeps = select(table, "line"), select(table, "sweep")
    if len(lines):
        means = lines.groupby("experiment_id", sort=False)[list(LINE)].mean()
        made["on_a_line"] = means.rename(columns=LINE)
        made["grid_of_the_source"] = count_calls(sweeps)
        made["thresholds_by_val_mix"] = by_val_mix(sweeps)
    return made


def select(table: Any, what: str) -> Any:
    """Return the rows of one kind, without the columns that it does not have."""
    return table[table["what"] == what].dropna(axis="columns", how="all").infer_objects()


def count_calls(sweeps: Any) -> Any:
    """Count the pairs of the source's grid with any heatmap call and any recall, by seed."""
    source = sweeps[sweeps["grid"] == "source"]
    flags = source.assign(
        pairs=1, with_calls=source["heatmap_call_rate"] > 0, with_recall=source["recall"] > 0
    )
    columns = ["pairs", "with_calls", "with_recall"]
    summed = flags.groupby(["experiment_id", "split", "seed"], sort=False)[columns].sum()
    return summed.groupby(["experiment_id", "split"], sort=False).mean()


def by_val_mix(sweeps: Any) -> Any:
    """Return what thresholds do on ``test_mix``: automatic ones, and those of labelled images.

    The latter are the pair of the gate's own grid with the fewest heatmap calls on ``val_mix``, of
    those with no less recall and no more false alarms than the automatic pair has there.
    """
    rows = []
    for (name, _), some in sweeps.groupby(["experiment_id", "seed"], sort=False):
        val, test = (some[some["split"] == split] for split in JUDGED)
        automatic = val[val["grid"] == "automatic"].iloc[0]
        own = val[val["grid"] == "own"]
        fit_ = own[
            (own["recall"] >= automatic["recall"])
            & (own["false_alarm_rate"] <= automatic["false_alarm_rate"])
        ]
        rows.append((name, "automatic", test[test["grid"] == "automatic"].iloc[0]))
        if len(fit_):
            pair = fit_.loc[fit_["heatmap_call_rate"].idxmin()]
            same = (test[["grid", "t_low", "t_high"]] == pair[["grid", "t_low", "t_high"]]).all(
                axis=1
            )
            rows.append((name, "by val_mix", test[same].iloc[0]))
    frame = pd.DataFrame(
        [{"experiment_id": n, "thresholds": by, **row[list(CHOSEN)]} for n, by, row in rows]
    )
    groups = frame.groupby(["experiment_id", "thresholds"], sort=False)
    return groups.mean().assign(seeds=groups.size())


def draw(table: Any, folder: Path, config: Config) -> None:
    """Draw confusion matrices and sweeps of the first seed; measure has saved the samples."""
    first = table[table["seed"] == table["seed"].iloc[0]]
    images, sweeps = select(first, "images"), select(first, "sweep")
    pictures.confusion(folder / "confusion.png", images)
    recall = images.set_index(["experiment_id", "split"])["recall"]
    for name, rows in sweeps.groupby("experiment_id", sort=False) if len(sweeps) else ():
        alone = {split: recall[EXPERIMENTS[name]["alone"], split] for split in JUDGED}
        title = (
            f"{name}, seed {first['seed'].iloc[0]} (hollow: over {2 * config.false_alarm_rate:.0%}"
        )
        title += " false alarms; line: Pareto front of the others)"
        pictures.sweeps(folder / f"sweep_{name}.png", rows.to_dict("records"), alone, title)
