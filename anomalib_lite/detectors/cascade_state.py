"""What a file must hold of a cascade, beside its heatmap model and the gate's network."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import clone

from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.gate import Gate
from anomalib_lite.detectors.gated_cascade import GatedCascade
from anomalib_lite.detectors.routing import Routing

__all__ = ["get_state", "plain_parameters", "restore_cascade"]

_ARRAYS = (
    "calibration_probabilities_",
    "calibration_detector_scores_",
    "anomaly_probabilities_",
    "anomaly_detector_scores_",
)


def plain_parameters(cascade: GatedCascade) -> dict[str, Any]:
    """The constructor's arguments, without what JSON cannot hold: the detectors among them."""
    parameters = cascade.get_params(deep=False)
    if isinstance(cascade.gate, BaseDetector):
        parameters["gate"] = None
    parameters["detector"] = None
    if isinstance(cascade.class_weight, dict):  # JSON has no numbers as keys
        parameters["class_weight"] = list(cascade.class_weight.items())
    return dict(parameters)


def get_state(cascade: GatedCascade) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays, and JSON."""
    arrays, gate = cascade.gate_.to_arrays()
    arrays |= {name.rstrip("_"): getattr(cascade, name) for name in _ARRAYS}
    routing = {name: float(value) for name, value in vars(cascade.routing_).items()}
    given = cascade.detector is not None
    synthetic = bool(cascade.synthetic_)
    return arrays, {
        "gate": gate,
        "routing": routing,
        "detector_given": given,
        "synthetic": synthetic,
    }


def restore_cascade(
    parameters: dict[str, Any],
    arrays: dict[str, np.ndarray],
    state: dict[str, Any],
    parts: dict[str, Any],
) -> GatedCascade:
    """The cascade, but for the gate's network; KeyError, TypeError or ValueError if broken."""
    if isinstance(parameters["class_weight"], list):
        parameters["class_weight"] = {int(k): float(v) for k, v in parameters["class_weight"]}
    if state["detector_given"]:
        parameters["detector"] = clone(parts["detector"])
    if "gate" in parts:
        parameters["gate"] = clone(parts["gate"])
    cascade = GatedCascade(**parameters)
    cascade.gate_ = Gate.from_arrays(arrays, state["gate"])
    cascade.gate_.detector = parts.get("gate")
    cascade.detector_ = parts["detector"]
    cascade.routing_ = Routing(**{name: float(v) for name, v in state["routing"].items()})
    cascade.synthetic_ = bool(state["synthetic"])
    for name in _ARRAYS:
        setattr(cascade, name, np.asarray(arrays[name.rstrip("_")], np.float64))
    return cascade
