"""Figures of a cascade at other thresholds of its gate, all from one pass over the images."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_lite._files import write_text
from anomalib_lite.cascade._sweep_plot import plot_sweep
from anomalib_lite.cascade.routing import Routing
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.metrics import auroc, average_precision, rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sweep", "decision_figures", "dominates", "sweep_routings", "threshold_pairs"]


@dataclass(frozen=True)
class Sweep:
    """Figures for each pair of thresholds.

    Attributes
    ----------
    rows : list of dict
        One for each pair: ``t_low``, ``t_high``, ``accuracy``, ``precision``, ``recall``, ``f1``,
        ``false_alarm_rate``, ``auroc``, ``ap``, ``heatmap_call_rate`` (share of images for which
        the heatmap model must run), ``recall_lost`` (share of anomalous images that the gate
        misses: it calls them normal and the heatmap model would have found them),
        ``ms_per_image`` (measured here), ``keeps_rate`` (whether ``t_high`` leaves the heatmap
        model any of the false alarms that ``false_alarm_rate`` allows, counted on the normal
        images held back in ``fit``), and ``pareto``. A pair is on the Pareto front if it keeps the
        rate and no other pair that keeps it is better: more recall for at most as many heatmap
        calls, or fewer calls for at least as much recall. Of pairs equal in both, only the one with
        the fewest false alarms is on the front (the first, if several have equally few). A figure
        without a value, such as the AUROC of one class, is NaN.
    gate_ms, detector_ms : float
        Milliseconds that the gate and the heatmap model took for an image.
    alone : dict or None
        Figures of the heatmap model without a gate, with a threshold for the same
        ``false_alarm_rate``; without those that depend on ``t_low`` and ``t_high``.
    """

    rows: list[dict[str, Any]]
    gate_ms: float
    detector_ms: float
    alone: dict[str, Any] | None = None

    @property
    def pareto(self) -> list[dict[str, Any]]:
        """Rows on the Pareto front of recall and heatmap calls, fewest calls first."""
        front = [row for row in self.rows if row["pareto"]]
        return sorted(front, key=lambda row: (row["heatmap_call_rate"], -row["recall"]))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw recall against heatmap calls: every pair as a dot, the Pareto front as a line.

        The thresholds ``t_low / t_high`` stand beside some points of the front, as many as there
        is room for. A dashed line is the recall of the heatmap model alone; the upper scale shows
        the milliseconds per image.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Axes to draw in; their size must be final, or labels may overlap: give the figure
            ``layout="constrained"``. By default those of a new figure, ``ax.figure``, which is not
            registered with pyplot: nothing is shown, and no setting of matplotlib changes.

        Returns
        -------
        matplotlib.axes.Axes
            x is the share of images for which the heatmap model must run, y the recall.

        Raises
        ------
        MissingDependencyError
            Without matplotlib (extra ``plot``).
        InvalidValueError
            If no image was anomalous, so that there is no recall.
        InvalidTypeError
            If ``ax`` is not axes of matplotlib.

        Examples
        --------
        >>> import numpy as np
        >>> p, s = np.array([0.1, 0.4, 0.3, 0.9]), np.array([1.0, 2.0, 5.0, 9.0])
        >>> pairs = [Routing(low, 1.0, 3.0, 1.0) for low in (0.0, 0.2, 0.35)]
        >>> found = sweep_routings(pairs, p, s, np.array([0, 0, 1, 1]), gate_ms=1, detector_ms=8)
        >>> found.plot().get_ylabel()
        'recall'
        """
        drawn: Axes = plot_sweep(
            self.rows, self.pareto, self.alone, self.gate_ms, self.detector_ms, ax
        )
        return drawn

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV, with their names in the first line and nothing for NaN.

        Parameters
        ----------
        path : str or Path
            File to write; an existing one is replaced in one step.

        Raises
        ------
        OutputError
            If the file cannot be written; an existing one stays as it was.

        Examples
        --------
        >>> import tempfile
        >>> from pathlib import Path
        >>> row = {"t_low": 0.1, "recall": 1.0, "auroc": float("nan"), "pareto": True}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Sweep([row], gate_ms=1, detector_ms=8).to_csv(Path(directory, "sweep.csv"))
        ...     print(Path(directory, "sweep.csv").read_text())
        t_low,recall,auroc,pareto
        0.1,1.0,,True
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.rows[0])
        for row in self.rows:
            writer.writerow("" if math.isnan(value) else value for value in row.values())
        write_text(path, text.getvalue(), "Sweep")


def threshold_pairs(
    t_low: Sequence[float] | None,
    t_high: Sequence[float] | None,
    probabilities: np.ndarray,
    current: Routing,
) -> list[tuple[float, float]]:
    """Return all pairs with ``t_low <= t_high``.

    Parameters
    ----------
    t_low, t_high : sequences of float, optional
        By default the current threshold, 0 for ``t_low`` and 1 for ``t_high``, and the deciles of
        the probabilities.
    probabilities : array of shape (N,)
        The gate's, without NaN.
    current : Routing

    Raises
    ------
    InvalidValueError
        If there is no such pair.

    Examples
    --------
    >>> threshold_pairs([0.1, 0.5], [0.2, 0.9], np.array([0.3]), Routing(0.0, 1.0, 1.0, 1.0))
    [(0.1, 0.2), (0.1, 0.9), (0.5, 0.9)]
    """
    deciles = np.quantile(probabilities, np.linspace(0.1, 0.9, 9)).tolist()
    lows = sorted({0.0, current.t_low, *deciles}) if t_low is None else t_low
    highs = sorted({1.0, current.t_high, *deciles}) if t_high is None else t_high
    pairs = [(low, high) for low in lows for high in highs if low <= high]
    if not pairs:
        raise InvalidValueError(
            f"GatedCascade: t_low and t_high must have a pair with t_low <= t_high, got {t_low!r} "
            f"and {t_high!r}."
        )
    return pairs


def sweep_routings(
    routings: Sequence[Routing],
    probabilities: np.ndarray,
    detector_scores: np.ndarray,
    y: np.ndarray,
    *,
    gate_ms: float,
    detector_ms: float,
    keeps_rate: Sequence[bool] | None = None,
    alone: Routing | None = None,
) -> Sweep:
    """Evaluate each routing on the same images.

    Parameters
    ----------
    routings : sequence of Routing
    probabilities, detector_scores : arrays of shape (N,)
        What the gate and the heatmap model say of each image.
    y : array of shape (N,)
        0 for normal, 1 for anomalous.
    gate_ms, detector_ms : float
        Milliseconds that each takes for an image.
    keeps_rate : sequence of bool, optional
        Whether each routing keeps the false-alarm rate; by default all do.
    alone : Routing, optional
        The routing that leaves all images to the heatmap model, for :attr:`Sweep.alone`.

    Returns
    -------
    Sweep

    Examples
    --------
    >>> import numpy as np
    >>> p, s = np.array([0.1, 0.4, 0.3, 0.9]), np.array([1.0, 2.0, 5.0, 9.0])
    >>> pairs = [Routing(low, 1.0, 3.0, 1.0) for low in (0.0, 0.2, 0.35)]
    >>> found = sweep_routings(pairs, p, s, np.array([0, 0, 1, 1]), gate_ms=1, detector_ms=8)
    >>> [(row["recall"], row["heatmap_call_rate"], row["ms_per_image"]) for row in found.pareto]
    [(0.5, 0.5, 5.0), (1.0, 0.75, 7.0)]
    """
    rows = [
        {"t_low": routing.t_low, "t_high": routing.t_high}
        | _figures(routing, probabilities, detector_scores, y)
        for routing in routings
    ]
    for row, keeps in zip(rows, keeps_rate or [True] * len(rows), strict=True):
        row["ms_per_image"] = gate_ms + row["heatmap_call_rate"] * detector_ms
        row["keeps_rate"] = keeps
    # Without this, a gate that calls every image anomalous would have full recall and no calls.
    eligible = [row for row in rows if row["keeps_rate"]]
    by_alarms = sorted(eligible, key=lambda row: row["false_alarm_rate"])
    first: dict[tuple[float, float], int] = {}
    for row in by_alarms:
        first.setdefault((row["heatmap_call_rate"], row["recall"]), id(row))
    for row in rows:
        beaten = any(dominates(other, row) for other in eligible)
        row["pareto"] = not beaten and id(row) in first.values()
    if alone is None:
        return Sweep(rows, gate_ms, detector_ms)
    without_gate = _figures(alone, probabilities, detector_scores, y) | {
        "ms_per_image": detector_ms
    }
    return Sweep(rows, gate_ms, detector_ms, without_gate)


def _figures(routing: Routing, p: np.ndarray, s: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    routes, scores = routing.routes(p), routing.scores(p, s)
    return decision_figures(scores > 0.5, y == 1) | {
        "auroc": auroc(y, scores),
        "ap": average_precision(y, scores),
        "heatmap_call_rate": float(np.mean(routes == "detector")),
        "recall_lost": rate((routes == "gate_normal")[y == 1] & (s > routing.threshold)[y == 1]),
    }


def decision_figures(alarms: np.ndarray, anomalous: np.ndarray) -> dict[str, float]:
    """Return accuracy, precision, recall, F1 and false-alarm rate of decisions (N,), bool.

    A figure without a value is NaN.

    Examples
    --------
    >>> figures = decision_figures(np.array([True, False, True]), np.array([True, True, False]))
    >>> [figures[name] for name in ("precision", "recall", "false_alarm_rate")]
    [0.5, 0.5, 1.0]
    """
    hits, n_alarms, n_anomalous = (int(np.sum(a)) for a in (alarms & anomalous, alarms, anomalous))
    n = n_alarms + n_anomalous
    return {
        "accuracy": float(np.mean(alarms == anomalous)),
        "precision": hits / n_alarms if n_alarms else float("nan"),
        "recall": rate(alarms[anomalous]),
        "f1": 2 * hits / n if n else float("nan"),
        "false_alarm_rate": rate(alarms[~anomalous]),
    }


def dominates(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Tell whether row ``a`` beats ``b``: in heatmap calls or recall, and in neither is worse.

    Examples
    --------
    >>> one = {"heatmap_call_rate": 0.2, "recall": 0.9}
    >>> dominates(one, one), dominates(one | {"recall": 0.95}, one)
    (False, True)
    """
    fewer, more = b["heatmap_call_rate"] - a["heatmap_call_rate"], a["recall"] - b["recall"]
    return bool(fewer >= 0 and more >= 0 and (fewer > 0 or more > 0))
