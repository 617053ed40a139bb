"""How a cascade learns: normal images and anomalies -> a gate, a heatmap model, thresholds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import clone
from sklearn.utils import check_random_state

from anomalib_lite._moments import Moments
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
from anomalib_lite.detectors.gate import (
    CALIBRATIONS,
    Gate,
    Head,
    Probability,
    Whitening,
    check_class_weight,
    embed_images,
)
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
# Synthetic anomalies to learn from, at least and at most.
_TO_LEARN = (64, 512)
# To hold out, four times as many as are needed, which lets 0.6 of max_missed be lost in place of
# 0.33, but no more than this for the sake of it.
_MANY = 2000
# In memory.
_AT_ONCE = 32


@dataclass
class _Groups:
    """Positions of images, by what they are for."""

    learn: np.ndarray  # normal: the gate and the heatmap model
    check: np.ndarray  # normal: the gate's probability; the heatmap model
    hold: np.ndarray  # normal: the thresholds
    learn_bad: np.ndarray  # labelled anomalous: the gate
    check_bad: np.ndarray  # labelled anomalous: the gate's probability, and t_low; if enough

    def keep(self, usable: np.ndarray) -> None:
        """Leave out the images that turned out not to be usable."""
        for name, group in vars(self).items():
            setattr(self, name, group[usable[group]])


def learn_cascade(
    cascade: GatedCascade, source: ImageSource, normal: np.ndarray, anomalous: np.ndarray
) -> dict[str, Any]:
    """What ``fit`` finds out, by the names of the fitted attributes; the thresholds come after."""
    random = check_random_state(cascade.random_state)
    groups = _split(normal, anomalous, cascade, random)
    seeds = random.randint(2**31, size=2)
    gate, judged = _begin_gate(cascade, source, groups.learn)
    features, skipped = gate.features(source, cascade)
    groups.keep(np.isfinite(features).all(axis=1))
    _check_enough(groups, source, skipped, labelled=len(anomalous) > 0)
    learn = np.intersect1d(groups.learn, judged)
    bad = [features[groups.learn_bad]] if len(groups.learn_bad) else []
    if not len(groups.check_bad):
        n = int(np.clip(2 * len(learn), *_TO_LEARN))
        made = _synthetic(source.take(learn), n, int(seeds[0]))
        bad.append(np.concatenate([gate.features(images, cascade)[0] for images in made]))
    gate.head = Head.fit(features[learn], bad, cascade.class_weight, _WHERE)
    detector = _fit_detector(cascade, source.take(np.r_[groups.learn, groups.check]))
    if len(groups.check_bad):
        bad_features = features[groups.check_bad]
        bad_scores = detector.detect(source.take(groups.check_bad), maps=False).scores
    else:
        needed = anomalies_needed(cascade.max_missed)
        n = max(needed, min(4 * needed, _MANY))
        parts = [
            (gate.features(images, cascade)[0], detector.detect(images, maps=False).scores)
            for images in _synthetic(source.take(groups.check), n, int(seeds[1]))
        ]
        bad_features, bad_scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    seen_bad = np.isfinite(bad_scores)
    logits = gate.head.logits(np.concatenate([features[groups.check], bad_features]))
    y = np.repeat([0, 1], [len(groups.check), len(bad_features)])
    # It keeps the order, so t_low may be chosen by the same anomalies.
    gate.probability = Probability.fit(cascade.calibration, logits, y, cascade.class_weight)
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
        "anomaly_probabilities_": gate.probabilities(bad_features)[seen_bad],
        "anomaly_detector_scores_": np.asarray(bad_scores[seen_bad], np.float64),
        "skipped_": [(source.names[i], reason) for i, reason in sorted(skipped)],
    }


def _split(
    normal: np.ndarray, anomalous: np.ndarray, cascade: GatedCascade, random: np.random.RandomState
) -> _Groups:
    if len(normal) < _FEWEST:
        raise InvalidValueError(
            f"{_WHERE}: fit needs at least {_FEWEST} normal images, to learn from and to hold out, "
            f"got {len(normal)}. Give more."
        )
    n = len(normal)
    normal, anomalous = random.permutation(normal), random.permutation(anomalous)
    n_hold = min(max(calibration_size(cascade.false_alarm_rate), n // 5), n // 2)
    n_learn = n - n_hold - (n - n_hold) // 4
    # Where half of the labelled anomalies could show nothing, they are of more use in learning.
    half = (len(anomalous) + 1) // 2
    if len(anomalous) - half < anomalies_needed(cascade.max_missed):
        half = len(anomalous)
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
        whitening = Whitening.fit(_moments(backbone, source.take(learn), cascade))
        return Gate(backbone=backbone, whitening=whitening), learn
    # The scores of images that it was fitted on would be too low.
    half = len(learn) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # its own threshold is not used
        detector = clone(cascade.gate).fit(source.take(learn[:half]))
    return Gate(detector=detector), learn[half:]


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
    needed = ["learn", "check", "hold"] + (["learn_bad"] if labelled else [])
    for name in needed:
        if not len(getattr(groups, name)):
            raise InvalidValueError(
                f"{_WHERE}: too few of {len(source)} images could be used to learn from and to "
                f"hold out; the first that could not: {skipped[0][1]}"
            )


def _moments(backbone: AnyBackbone, normal: ImageSource, cascade: GatedCascade) -> Moments:
    """Sums over the patches of all images that can be used."""
    moments: Moments | None = None
    skipped: list[tuple[int, str]] = []
    for _, E in embed_images(backbone, normal, cascade, skipped):
        moments = moments or Moments(E.shape[3])
        moments.add(E.reshape(-1, E.shape[3]))
    if moments is None:
        raise InvalidValueError(
            f"{_WHERE}: none of {len(normal)} images to learn from could be used; the first: "
            f"{skipped[0][1]}"
        )
    return moments


def _synthetic(normal: ImageSource, n: int, seed: int) -> Iterator[ImageSource]:
    """``n`` anomalies made from normal images, some at a time."""
    made = SyntheticAnomalies(random_state=seed).iterate(normal, n)
    while images := [anomaly.image for anomaly in islice(made, _AT_ONCE)]:
        yield ImageSource(images, where=_WHERE)


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
    check_choice("calibration", cascade.calibration, CALIBRATIONS, _WHERE)
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


def labels_of(y: Any, n: int) -> np.ndarray:
    """Return ``n`` labels as int64, 0 for normal and 1 for anomalous."""
    labels = np.asarray(y)
    if labels.shape != (n,) or not np.isin(labels, (0, 1)).all():
        raise InvalidValueError(
            f"{_WHERE}: y must hold {n} labels, 0 for normal and 1 for anomalous, got shape "
            f"{labels.shape} with values {np.unique(labels)[:5].tolist()}."
        )
    return labels.astype(np.int64)
