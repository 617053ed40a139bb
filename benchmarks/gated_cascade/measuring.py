"""Fitted models and splits -> figures, times, sweeps, and what a stream of good images costs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from anomalib_lite import GatedCascade
from anomalib_lite.cascade.sweep import decision_figures, dominates
from anomalib_lite.metrics import auroc, average_precision, rate

# The source's grid: 11 x 8 = 88 pairs. Nine of them have t_low > t_high; they are judged with
# t_high = t_low, as if an image below t_low were called normal before t_high is looked at.
SOURCE_LOW = [float(x) for x in np.linspace(0.001, 0.05, 11).round(4)]
SOURCE_HIGH = [float(x) for x in np.linspace(0.01, 0.5, 8).round(2)]
# Over all that a gate says: quantiles of its probabilities on val_mix, beside 0 and 1.
OWN_LOW = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
OWN_HIGH = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98]
CLASSES = ("normal", "anomalous")
# Share of anomalous images on a line.
ON_A_LINE = 0.05
# Images a call: their heatmaps are in memory at once.
_AT_ONCE = 100


@dataclass
class Answers:
    """What a model says of a split; a heatmap model alone decides about all images itself."""

    y: np.ndarray
    scores: np.ndarray
    alarms: np.ndarray
    routes: np.ndarray
    probabilities: np.ndarray


def ask(model: Any, samples: list[Any]) -> tuple[Answers, float]:
    """Answers, and the seconds that ``detect`` took, with heatmaps as they are by default."""
    seconds, parts = 0.0, []
    for i in range(0, len(samples), _AT_ONCE):
        some = samples[i : i + _AT_ONCE]
        began = time.perf_counter()
        found = model.detect(some)
        seconds += time.perf_counter() - began
        routes = getattr(found, "routes", np.full(len(some), "detector"))
        probabilities = getattr(found, "probabilities", np.full(len(some), np.nan))
        parts.append((found.scores, found.labels, routes, probabilities))
    y = np.array([s.label for s in samples])
    return Answers(y, *(np.concatenate(columns) for columns in zip(*parts, strict=True))), seconds


def judge(answers: Answers) -> dict[str, Any]:
    """Figures of a split; None where a figure has no value."""
    y, alarms = answers.y == 1, answers.alarms
    figures = {name: _known(value) for name, value in decision_figures(alarms, y).items()}
    false_alarm_rate = figures.pop("false_alarm_rate")
    return figures | {
        "auroc": _known(auroc(answers.y, answers.scores)),
        "pr_auc": _known(average_precision(answers.y, answers.scores)),
        "heatmap_call_rate": float(np.mean(answers.routes == "detector")),
        "false_alarm_rate": false_alarm_rate,
        **{
            f"{truth}_called_{called}": int(np.sum((y == a) & (alarms == b)))
            for a, truth in enumerate(CLASSES)
            for b, called in enumerate(CLASSES)
        },
    }


def time_all(models: dict[str, Any], splits: dict[str, list[Any]], rounds: int) -> dict[str, Any]:
    """Milliseconds an image, by model and group, of each round; all models in each round."""
    groups = {name: splits[name] for name in ("val_mix", "neu_test")}
    for y in (0, 1):
        groups[f"test_mix {y}"] = [s for s in splits["test_mix"] if s.label == y]
    ms: dict[str, Any] = {name: {group: [] for group in groups} for name in models}
    for turn in range(rounds):
        names = list(models) if turn % 2 == 0 else list(models)[::-1]
        for group, samples in groups.items():
            for name in names:  # one soon after the other, so that they share what else is going on
                ms[name][group].append(1000 * ask(models[name], samples)[1] / len(samples))
    shares = [len(groups[f"test_mix {y}"]) / len(splits["test_mix"]) for y in (0, 1)]
    for times in ms.values():
        times["test_mix"] = _weighted(times, *shares)
    return ms


def stream(
    cascade: dict[str, Answers],
    alone: dict[str, Answers],
    cascade_ms: dict[str, list[float]],
    alone_ms: dict[str, list[float]],
) -> dict[str, Any]:
    """A cascade on a line with few anomalies, beside its heatmap model alone.

    Rates of normal and of anomalous test images, and their times, weighted by how many of each
    there are on a line. Recall is compared at equal false alarms: the heatmap model alone gets
    the threshold with which it makes as many of them as the cascade, on the same images.
    """
    mixed, beside, neu = cascade["test_mix"], alone["test_mix"], cascade["neu_test"]
    called, y = mixed.routes == "detector", mixed.y == 1
    ms, ms_alone = (_weighted(t, 1 - ON_A_LINE, ON_A_LINE) for t in (cascade_ms, alone_ms))
    n_false = int(np.sum(mixed.alarms & ~y))
    falling = np.sort(beside.scores[~y])[::-1]
    threshold = float(np.append(falling, falling[-1] - 1)[n_false])  # so many lie above it
    found: dict[str, Any] = {
        "anomalous_share": ON_A_LINE,
        "heatmap_call_rate": float(
            (1 - ON_A_LINE) * called[~y].mean() + ON_A_LINE * called[y].mean()
        ),
        "ms": float(np.median(ms)),
        "ms_alone": float(np.median(ms_alone)),
        "ms_ratio": float(np.median(np.divide(ms, ms_alone))),
        "false_alarm_rate": _rate(mixed.alarms[~y]),
        "false_alarm_rate_alone_automatic": _rate(beside.alarms[~y]),
        "false_alarm_rate_alone_equal": _rate(beside.scores[~y] > threshold),
        "threshold_alone_equal": threshold,
    }
    for name, ours, theirs in (
        ("recall", mixed.alarms[y], (beside.alarms[y], beside.scores[y] > threshold)),
        (
            "neu_recall",
            neu.alarms,
            (alone["neu_test"].alarms, alone["neu_test"].scores > threshold),
        ),
    ):
        found[name] = _rate(ours)
        for kind, other in zip(("automatic", "equal"), theirs, strict=True):
            found[f"{name}_alone_{kind}"] = there = _rate(other)
            found[f"{name}_ratio_{kind}"] = float(ours.mean() / there) if there else None
    return found


def grids(probabilities: np.ndarray) -> dict[str, list[tuple[float, float]]]:
    """Pairs of t_low and t_high: the source's, and those of a gate with these probabilities."""
    low = [0.0, *np.quantile(probabilities, OWN_LOW).tolist()]
    high = [*np.quantile(probabilities, OWN_HIGH).tolist(), 1.0]
    return {
        "source": [(a, b) for a in SOURCE_LOW for b in SOURCE_HIGH],
        "own": [(a, b) for a in low for b in high if a <= b],
    }


def sweep(
    cascade: GatedCascade,
    samples: list[Any],
    answers: Answers,
    pairs: dict[str, list[tuple[float, float]]],
    most_false: float,
) -> list[dict[str, Any]]:
    """A row for each pair of each of the :func:`grids`, and one for the automatic thresholds.

    ``pareto`` is among the pairs of a grid with at most ``most_false`` false alarms: to call
    everything anomalous needs no heatmap and misses nothing.
    """
    y = [s.label for s in samples]
    routing = cascade.routing_
    known = {"automatic": [(routing.t_low, routing.t_high)]}
    low, high = ({pair[k] for asked in (pairs | known).values() for pair in asked} for k in (0, 1))
    table = cascade.sweep(samples, y, t_low=sorted(low), t_high=sorted(low | high))
    by_pair = {(row["t_low"], row["t_high"]): row for row in table.rows}
    rows = []
    for grid, asked in pairs.items():
        chosen = [{"grid": grid} | by_pair[a, max(a, b)] | {"t_high": b} for a, b in asked]
        allowed = [row for row in chosen if row["false_alarm_rate"] <= most_false]
        for row in chosen:
            row["within_limit"] = few = row["false_alarm_rate"] <= most_false
            row["pareto"] = few and not any(dominates(other, row) for other in allowed)
        rows += chosen
    figures = judge(answers)
    figures["ap"] = figures.pop("pr_auc")
    lost = by_pair[routing.t_low, routing.t_high]["recall_lost"]
    automatic = {"t_low": routing.t_low, "t_high": routing.t_high, "recall_lost": lost}
    return [*rows, {"grid": "automatic"} | automatic | figures]


def _weighted(times: dict[str, list[float]], normal: float, anomalous: float) -> list[float]:
    """Of each round: as if images came with these shares."""
    both = zip(times["test_mix 0"], times["test_mix 1"], strict=True)
    return [normal * a + anomalous * b for a, b in both]


def _rate(decisions: np.ndarray) -> float | None:
    return _known(rate(decisions))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
