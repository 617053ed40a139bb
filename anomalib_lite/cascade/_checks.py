"""What a cascade may be given: its parameters, labels and groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_lite._validation import (
    check_choice,
    check_image_size,
    check_int,
    check_number,
    check_seed,
    normal_indices,
)
from anomalib_lite.cascade.gate import PROBABILITY_CALIBRATIONS, check_class_weight
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.engines import ENGINES
from anomalib_lite.errors import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from anomalib_lite.cascade.gated_cascade import GatedCascade

__all__ = [
    "MAPS",
    "check_parameters",
    "check_thresholds",
    "classes",
    "parts_of",
    "thresholds_of",
]

MAPS = ("escalated", "always")
_WHERE = "GatedCascade"


def check_parameters(cascade: GatedCascade) -> None:
    """Raise for the first constructor argument of a cascade that cannot be used."""
    _check_models(cascade)
    check_thresholds(cascade.t_low, cascade.t_high)
    check_number("max_missed", cascade.max_missed, _WHERE, "(0, 1)")
    check_number("false_alarm_rate", cascade.false_alarm_rate, _WHERE, "(0, 1)")
    check_choice("training", cascade.training, ("head", "finetune"), _WHERE)
    if cascade.training == "finetune" and isinstance(cascade.gate, BaseDetector):
        raise InvalidValueError(
            f"{_WHERE}: training='finetune' tunes the weights of a network, got the detector "
            f"gate={cascade.gate!r}. Give the name of a backbone or a module, or training='head'."
        )
    check_int("epochs", cascade.epochs, _WHERE, low=1)
    check_choice("calibration", cascade.calibration, PROBABILITY_CALIBRATIONS, _WHERE)
    check_class_weight(cascade.class_weight, _WHERE)
    check_choice("maps", cascade.maps, MAPS, _WHERE)
    check_choice("engine", cascade.engine, ENGINES, _WHERE)
    check_choice("on_error", cascade.on_error, ("raise", "skip"), _WHERE)
    check_int("batch_size", cascade.batch_size, _WHERE, low=1)
    check_int("max_pixels", cascade.max_pixels, _WHERE, low=1)
    check_image_size(cascade.image_size, _WHERE)
    check_seed(cascade.random_state, _WHERE)
    for model in (cascade.gate, cascade.detector):
        if isinstance(model, BaseDetector):
            model._check_parameters()  # before the gate has learned, which takes its time


def _check_models(cascade: GatedCascade) -> None:
    gate, detector = cascade.gate, cascade.detector
    if isinstance(gate, type) or not (
        isinstance(gate, str | BaseDetector) or hasattr(gate, "state_dict")
    ):
        raise InvalidTypeError(
            f"{_WHERE}: gate must be the name of a backbone, a torch.nn.Module or a detector such "
            f"as PatchCore(image_size=64), got {gate!r}."
        )
    if detector is not None and not isinstance(detector, BaseDetector):
        raise InvalidTypeError(
            f"{_WHERE}: detector must be a detector such as PaDiM(image_size=(256, 256)), or None "
            f"for PatchCore, got {detector!r}."
        )
    if cascade.weights is not None and not isinstance(gate, str):
        raise InvalidValueError(
            f"{_WHERE}: weights go with the name of a backbone, got gate={gate!r}."
        )


def check_thresholds(t_low: Any, t_high: Any) -> None:
    """Raise unless those that are given are 0 <= t_low <= t_high <= 1."""
    for name, value in (("t_low", t_low), ("t_high", t_high)):
        if value is not None:
            check_number(name, value, _WHERE, "[0, 1]")
    if t_low is not None and t_high is not None and t_low > t_high:
        raise InvalidValueError(
            f"{_WHERE}: t_low must not exceed t_high, got {t_low!r} and {t_high!r}: below t_low "
            "the gate says normal, above t_high anomalous."
        )


def classes(images: Any, y: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the normal and of the anomalous among ``n`` images."""
    normal = np.arange(n)
    if y is not None:
        normal = normal_indices(y, n, _WHERE)
    elif isinstance(images, list | tuple) and any(getattr(item, "label", 0) for item in images):
        raise InvalidValueError(
            f"{_WHERE}: images holds samples labelled anomalous. Pass their labels, "
            "y=[sample.label for sample in samples]."
        )
    return normal, np.setdiff1d(np.arange(n), normal)


def parts_of(groups: Any, n: int) -> np.ndarray:
    """Which part each of ``n`` images shows, as numbers; all another, if nobody says."""
    if groups is None:
        return np.arange(n)
    given = list(groups) if np.iterable(groups) else groups
    if not isinstance(given, list) or len(given) != n:
        raise InvalidValueError(
            f"{_WHERE}: groups must hold {n} values, one for each image, got "
            f"{len(given) if isinstance(given, list) else given!r}."
        )
    numbers: dict[Any, int] = {}
    for i, value in enumerate(given):
        if not isinstance(value, str | int | np.integer):
            raise InvalidTypeError(
                f"{_WHERE}: groups must hold whole numbers or strings, got {value!r} at position "
                f"{i}."
            )
        numbers.setdefault(value, len(numbers))
    return np.array([numbers[value] for value in given])


def thresholds_of(values: Any) -> list[float] | None:
    """Those of a sweep, as a list; None if they are to be chosen."""
    if values is None:
        return None
    if not np.iterable(values) or isinstance(values, str):
        raise InvalidTypeError(
            f"{_WHERE}: t_low and t_high of a sweep must be lists of numbers or None, got "
            f"{values!r}."
        )
    found = list(values)
    for value in found:
        if value is None:
            raise InvalidTypeError(f"{_WHERE}: t_low and t_high of a sweep must not hold None.")
        check_thresholds(value, value)
    return found
