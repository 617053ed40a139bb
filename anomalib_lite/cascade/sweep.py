"""What a cascade would do at other thresholds of its gate, all from one pass over the images."""

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
from anomalib_lite.metrics import auroc, average_precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sweep", "sweep_routings"]


@dataclass(frozen=True)
class Sweep:
    """One row for each pair of thresholds.

    Attributes
    ----------
    rows : list of dict
        ``t_low``, ``t_high``, ``accuracy``, ``precision``, ``recall``, ``f1``,
        ``false_alarm_rate``, ``auroc``, ``ap``, ``heatmap_call_rate`` (share of images for which
        the heatmap model must run), ``recall_lost`` (share of anomalous images that the gate
        calls normal and the heatmap model would have found), ``ms_per_image`` (measured here),
        ``keeps_rate`` (whether ``t_high`` leaves room for the ``false_alarm_rate`` asked for, by
        the images held out for it), and ``pareto``: whether it does, and no other pair that does
        has more recall for no more heatmap calls, or fewer calls for no less recall; of those
        equal in both, the first of the fewest false alarms. What has no value, as the AUROC of
        one class, is NaN.
    gate_ms, detector_ms : float
        Milliseconds that the gate and the heatmap model took for an image.
    alone : dict or None
        The same of the heatmap model without a gate, with a threshold for the same
        ``false_alarm_rate``; ``t_low``, ``t_high`` and what follows from them are not in it.
    """

    rows: list[dict[str, Any]]
    gate_ms: float
    detector_ms: float
    alone: dict[str, Any] | None = None

    @property
    def pareto(self) -> list[dict[str, Any]]:
        """The rows on the Pareto front of recall and heatmap calls, fewest calls first."""
        front = [row for row in self.rows if row["pareto"]]
        return sorted(front, key=lambda row: (row["heatmap_call_rate"], -row["recall"]))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Recall against heatmap calls, every pair a dot, the Pareto front a line.

        The thresholds ``t_low / t_high`` stand beside some points of the front, as many as there
        is room for. A dashed line is the recall of the heatmap model alone; the scale above has
        the milliseconds per image.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; its size must be final, or labels may meet: give the figure
            ``layout="constrained"``. By default in a new figure, ``ax.figure``, of which pyplot
            knows nothing: nothing is shown, and no setting of matplotlib changes.

        Returns
        -------
        matplotlib.axes.Axes
            x from 0 to 1, the share of images for which the heatmap model must run; y, the recall.

        Raises
        ------
        MissingDependencyError
            Without matplotlib (extra ``plot``).
        InvalidValueError
            If there is no recall, since no image was anomalous.
        InvalidTypeError
            If ``ax`` is something else.

        Examples
        --------
        >>> import numpy as np
        >>> p, s = np.array([0.1, 0.4, 0.3, 0.9]), np.array([1.0, 2.0, 5.0, 9.0])
        >>> pairs = [Routing(low, 1.0, 3.0, 1.0) for low in (0.0, 0.2, 0.35)]
        >>> found = sweep_routings(pairs, p, s, np.array([0, 0, 1, 1]), gate_ms=1, detector_ms=8)
        >>> found.plot().get_ylabel()
        'recall'
        """
        drawn: Axes = plot_sweep(self, ax)
        return drawn

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows, their names in the first line; what has no value is empty.

        Parameters
        ----------
        path : str or Path
            A file that stood there is replaced in one step.

        Raises
        ------
        OutputError
            If the file cannot be written; what stood there stays as it was.

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
    """Judge each routing by the same images.

    Parameters
    ----------
    routings : sequence of Routing
    probabilities, detector_scores : arrays of shape (N,)
        Of all images, by the gate and by the heatmap model.
    y : array of shape (N,)
        0 for normal, 1 for anomalous.
    gate_ms, detector_ms : float
        Milliseconds that each takes for an image.
    keeps_rate : sequence of bool, optional
        Of each routing, for the rows; by default all do.
    alone : Routing, optional
        One that leaves all images to the heatmap model, for :attr:`Sweep.alone`.

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
        | _judge(routing, probabilities, detector_scores, y)
        for routing in routings
    ]
    for row, keeps in zip(rows, keeps_rate or [True] * len(rows), strict=True):
        row["ms_per_image"] = gate_ms + row["heatmap_call_rate"] * detector_ms
        row["keeps_rate"] = keeps
    # A gate that stops everything finds everything, with no call: that is no choice.
    eligible = [row for row in rows if row["keeps_rate"]]
    by_alarms = sorted(eligible, key=lambda row: row["false_alarm_rate"])
    first: dict[tuple[float, float], int] = {}
    for row in by_alarms:
        first.setdefault((row["heatmap_call_rate"], row["recall"]), id(row))
    for row in rows:
        beaten = any(_dominates(other, row) for other in eligible)
        row["pareto"] = not beaten and id(row) in first.values()
    if alone is None:
        return Sweep(rows, gate_ms, detector_ms)
    without_gate = _judge(alone, probabilities, detector_scores, y) | {"ms_per_image": detector_ms}
    return Sweep(rows, gate_ms, detector_ms, without_gate)


def _judge(routing: Routing, p: np.ndarray, s: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    routes, scores = routing.routes(p), routing.scores(p, s)
    return _decisions(scores > 0.5, y == 1) | {
        "auroc": auroc(y, scores),
        "ap": average_precision(y, scores),
        "heatmap_call_rate": float(np.mean(routes == "detector")),
        "recall_lost": _share((routes == "gate_normal")[y == 1] & (s > routing.threshold)[y == 1]),
    }


def _decisions(alarm: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    hits, alarms, there = (int(np.sum(a)) for a in (alarm & truth, alarm, truth))
    return {
        "accuracy": float(np.mean(alarm == truth)),
        "precision": hits / alarms if alarms else float("nan"),
        "recall": _share(alarm[truth]),
        "f1": 2 * hits / (alarms + there) if alarms + there else float("nan"),
        "false_alarm_rate": _share(alarm[~truth]),
    }


def _share(chosen: np.ndarray) -> float:
    return float(np.mean(chosen)) if chosen.size else float("nan")


def _dominates(a: dict[str, Any], b: dict[str, Any]) -> bool:
    fewer, more = b["heatmap_call_rate"] - a["heatmap_call_rate"], a["recall"] - b["recall"]
    return bool(fewer >= 0 and more >= 0 and (fewer > 0 or more > 0))
