"""How a cascade learns: normal images and anomalies -> a gate, a heatmap model, thresholds."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import clone
from sklearn.utils import check_random_state

from anomalib_lite._validation import (
    check_choice,
    check_image_size,
    check_int,
    check_number,
    check_seed,
    normal_indices,
)
from anomalib_lite.calibration import calibration_size
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.gate import CALIBRATIONS, Gate, Head, Probability, check_class_weight
from anomalib_lite.detectors.patchcore import PatchCore
from anomalib_lite.detectors.routing import anomalies_needed
from anomalib_lite.engines import ENGINES, AnyBackbone, open_backbone
from anomalib_lite.errors import CalibrationWarning, InvalidTypeError, InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.synthetic import SyntheticAnomalies

if TYPE_CHECKING:
    from anomalib_lite.detectors.gated_cascade import GatedCascade

__all__ = [
    "MAPS",
    "check_parameters",
    "check_thresholds",
    "classes",
    "labels_of",
    "learn_cascade",
    "open_gate",
]

MAPS = ("escalated", "always")
_WHERE = "GatedCascade"
# Later layers than a heatmap needs: a gate must know that something is odd, not where.
_STRIDES = (16, 32)
# What a heatmap model that nobody gave has of the cascade.
_SHARED = ("device", "dtype", "engine", "batch_size", "on_error", "max_pixels", "random_state")
_FEWEST = 8
# Synthetic anomalies to learn from, at least and at most; to hold out, at most; in memory.
_TO_LEARN, _MOST_HELD_OUT, _AT_ONCE = (64, 512), 1000, 32


@dataclass
class _Groups:
    """Positions of images, by what they are for."""

    learn: np.ndarray  # normal: the gate and the heatmap model
    check: np.ndarray  # normal: the gate's probability; the heatmap model
    hold: np.ndarray  # normal: the thresholds
    learn_bad: np.ndarray  # anomalous: the gate
    check_bad: np.ndarray  # anomalous: the gate's probability, and t_low

    def keep(self, usable: np.ndarray) -> None:
        """Leave out the images that turned out not to be usable."""
        for name, group in vars(self).items():
            setattr(self, name, group[usable[group]])


def learn_cascade(
    cascade: GatedCascade, source: ImageSource, normal: np.ndarray, anomalous: np.ndarray
) -> dict[str, Any]:
    """What ``fit`` finds out, by the names of the fitted attributes; the thresholds come after."""
    random = check_random_state(cascade.random_state)
    groups = _split(normal, anomalous, cascade.false_alarm_rate, random)
    seeds = random.randint(2**31, size=2)
    gate, judged = _begin_gate(cascade, source, groups.learn)
    features, skipped = gate.features(source, cascade)
    groups.keep(np.isfinite(features).all(axis=1))
    _check_enough(groups, source, skipped, labelled=len(anomalous) > 0)
    learn = np.intersect1d(groups.learn, judged)
    n_learn = int(np.clip(2 * len(groups.learn), *_TO_LEARN))
    if cascade.training == "finetune":
        known = source.take(groups.learn_bad) if len(anomalous) else None
        gate = _tune(cascade, gate, source.take(learn), known, n_learn, random)
        features, skipped = gate.features(source, cascade)
    bad, check_bad = features[groups.learn_bad], features[groups.check_bad]
    if not len(anomalous):
        if gate.head is None:
            bad = _synthetic(cascade, gate, source.take(groups.learn), n_learn, int(seeds[0]))
        n_check = min(2 * anomalies_needed(cascade.max_missed), _MOST_HELD_OUT)
        check_bad = _synthetic(cascade, gate, source.take(groups.check), n_check, int(seeds[1]))
    if gate.head is None:
        gate.head = Head.fit(*_both(features[learn], bad), cascade.class_weight, _WHERE)
    X, y = _both(features[groups.check], check_bad)
    logits = gate.head.logits(X)
    # It keeps the order, so t_low may be chosen by the same anomalies.
    gate.probability = Probability.fit(cascade.calibration, logits, y, cascade.class_weight)
    detector = _fit_detector(cascade, source.take(np.r_[groups.learn, groups.check]))
    found = detector.detect(source.take(groups.hold), maps=False)
    seen = np.isfinite(found.scores)
    if not seen.any():
        raise InvalidValueError(
            f"{_WHERE}: the heatmap model could use none of {len(seen)} held-out normal images; "
            f"the first: {found.skipped[0][1]}"
        )
    return {
        "gate_": gate,
        "detector_": detector,
        "calibration_probabilities_": gate.probabilities(features[groups.hold])[seen],
        "calibration_detector_scores_": np.asarray(found.scores[seen], np.float64),
        "anomaly_probabilities_": gate.probabilities(check_bad),
        "skipped_": [(source.names[i], reason) for i, reason in sorted(skipped)],
    }


def _split(
    normal: np.ndarray, anomalous: np.ndarray, rate: float, random: np.random.RandomState
) -> _Groups:
    if len(normal) < _FEWEST:
        raise InvalidValueError(
            f"{_WHERE}: fit needs at least {_FEWEST} normal images, to learn from and to hold out, "
            f"got {len(normal)}. Give more."
        )
    if len(anomalous) == 1:
        raise InvalidValueError(
            f"{_WHERE}: y has 1 anomalous image; fit needs at least 2, to learn from and to hold "
            "out. Give more, or leave out y: anomalies are then made from the normal images."
        )
    n = len(normal)
    normal, anomalous = random.permutation(normal), random.permutation(anomalous)
    n_hold = min(max(calibration_size(rate), n // 5), n // 2)
    n_learn = n - n_hold - (n - n_hold) // 4
    half = (len(anomalous) + 1) // 2
    return _Groups(
        learn=normal[:n_learn],
        check=normal[n_learn : n - n_hold],
        hold=normal[n - n_hold :],
        learn_bad=anomalous[:half],
        check_bad=anomalous[half:],
    )


def _begin_gate(
    cascade: GatedCascade, source: ImageSource, learn: np.ndarray
) -> tuple[Gate, np.ndarray]:
    """The gate without its head, and the normal images that the head may learn from."""
    if not isinstance(cascade.gate, BaseDetector):
        backbone = open_gate(cascade)
        check_image_size(cascade.image_size, _WHERE, stride=backbone.stride)
        return Gate(backbone=backbone), learn
    # The scores of images that it was fitted on would be too low.
    half = len(learn) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # its own threshold is not used
        detector = clone(cascade.gate).fit(source.take(learn[:half]))
    return Gate(detector=detector), learn[half:]


def _tune(
    cascade: GatedCascade,
    gate: Gate,
    normal: ImageSource,
    anomalous: ImageSource | None,
    n_synthetic: int,
    random: np.random.RandomState,
) -> Gate:
    """The gate with a network of its own: tuned, as is the head, and run as the frozen one was."""
    from anomalib_lite.backbones import Backbone  # torch, only for those who ask
    from anomalib_lite.detectors.gate_tuning import tune_gate

    network = Backbone(
        cascade.gate,
        weights=cascade.weights,
        strides=_STRIDES,
        device=gate.backbone.device,
        dtype="float32",
        trainable=True,
        where=gate.backbone.where,
    )
    tuned = tune_gate(
        network,
        normal,
        anomalous,
        image_size=cascade.image_size,
        n_synthetic=n_synthetic,
        class_weight=cascade.class_weight,
        epochs=cascade.epochs,
        random=random,
        verbose=cascade.verbose,
    )
    del network
    gc.collect()  # its hooks and itself hold each other
    backbone = open_gate(cascade, state=tuned.state, sha256=tuned.sha256)
    return Gate(backbone=backbone, head=tuned.head, history=tuned.history)


def open_gate(cascade: GatedCascade, **instead: Any) -> AnyBackbone:
    """The gate's backbone as the parameters describe it, but for what is given ``instead``."""
    options: dict[str, Any] = {
        "weights": cascade.weights,
        "strides": _STRIDES,
        "device": cascade.device,
        "dtype": cascade.dtype,
        "engine": cascade.engine,
        "where": f"{_WHERE} (gate)",
    }
    return open_backbone(cascade.gate, **(options | instead))


def _check_enough(
    groups: _Groups, source: ImageSource, skipped: list[tuple[int, str]], *, labelled: bool
) -> None:
    needed = ["learn", "check", "hold"] + (["learn_bad", "check_bad"] if labelled else [])
    for name in needed:
        if not len(getattr(groups, name)):
            raise InvalidValueError(
                f"{_WHERE}: too few of {len(source)} images could be used to learn from and to "
                f"hold out; the first that could not: {skipped[0][1]}"
            )


def _synthetic(
    cascade: GatedCascade, gate: Gate, normal: ImageSource, n: int, seed: int
) -> np.ndarray:
    """Features of ``n`` anomalies made from normal images."""
    made: Iterator[Any] = SyntheticAnomalies(random_state=seed).iterate(normal, n)
    parts = []
    while images := [anomaly.image for anomaly in islice(made, _AT_ONCE)]:
        parts.append(gate.features(ImageSource(images, where=_WHERE), cascade)[0])
    return np.concatenate(parts)


def _both(good: np.ndarray, bad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([good, bad]), np.repeat([0, 1], [len(good), len(bad)])


def _fit_detector(cascade: GatedCascade, normal: ImageSource) -> Any:
    detector = cascade.detector
    if detector is None:
        detector = PatchCore(**{name: getattr(cascade, name) for name in _SHARED})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # its own threshold is not used
        return clone(detector).fit(normal)


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
    check_choice("calibration", cascade.calibration, CALIBRATIONS, _WHERE)
    check_class_weight(cascade.class_weight, _WHERE)
    check_choice("maps", cascade.maps, MAPS, _WHERE)
    check_choice("engine", cascade.engine, ENGINES, _WHERE)
    check_choice("on_error", cascade.on_error, ("raise", "skip"), _WHERE)
    check_int("batch_size", cascade.batch_size, _WHERE, low=1)
    check_int("max_pixels", cascade.max_pixels, _WHERE, low=1)
    check_image_size(cascade.image_size, _WHERE)
    check_seed(cascade.random_state, _WHERE)


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


def labels_of(y: Any, n: int) -> np.ndarray:
    """Return ``n`` labels as int64, 0 for normal and 1 for anomalous."""
    labels = np.asarray(y)
    if labels.shape != (n,) or not np.isin(labels, (0, 1)).all():
        raise InvalidValueError(
            f"{_WHERE}: y must hold {n} labels, 0 for normal and 1 for anomalous, got shape "
            f"{labels.shape} with values {np.unique(labels)[:5].tolist()}."
        )
    return labels.astype(np.int64)
