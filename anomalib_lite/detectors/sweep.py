"""What a cascade would do at other thresholds of its gate, all from one pass over the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anomalib_lite.detectors.routing import Routing
from anomalib_lite.metrics import auroc, average_precision

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
        and ``pareto``: whether no other pair has more recall for no more heatmap calls, or fewer
        calls for no less recall. What has no value, as the AUROC of one class, is NaN.
    """

    rows: list[dict[str, Any]]

    @property
    def pareto(self) -> list[dict[str, Any]]:
        """The rows on the Pareto front of recall and heatmap calls, fewest calls first."""
        front = [row for row in self.rows if row["pareto"]]
        return sorted(front, key=lambda row: (row["heatmap_call_rate"], -row["recall"]))


def sweep_routings(
    routings: Sequence[Routing],
    probabilities: np.ndarray,
    detector_scores: np.ndarray,
    y: np.ndarray,
    *,
    gate_ms: float,
    detector_ms: float,
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
    rows = []
    for routing in routings:
        routes = routing.routes(probabilities)
        scores = routing.scores(probabilities, detector_scores)
        called = float(np.mean(routes == "detector"))
        lost = (routes == "gate_normal") & (detector_scores > routing.threshold)
        rows.append(
            {"t_low": routing.t_low, "t_high": routing.t_high}
            | _decisions(scores > 0.5, y == 1)
            | {
                "auroc": auroc(y, scores),
                "ap": average_precision(y, scores),
                "heatmap_call_rate": called,
                "recall_lost": _share(lost[y == 1]),
                "ms_per_image": gate_ms + called * detector_ms,
            }
        )
    for row in rows:
        row["pareto"] = not any(_dominates(other, row) for other in rows)
    return Sweep(rows)


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
