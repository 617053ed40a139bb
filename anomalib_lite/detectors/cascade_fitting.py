"""How a cascade learns: normal images and anomalies -> a gate, a heatmap model, thresholds."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import clone
from sklearn.utils import check_random_state

from anomalib_lite._moments import Moments
from anomalib_lite._validation import (
    check_image_size,
)
from anomalib_lite.calibration import calibration_size
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.gate import (
    Gate,
    Head,
    Probability,
    Whitening,
    embed_images,
)
from anomalib_lite.detectors.patchcore import PatchCore
from anomalib_lite.detectors.routing import (
    anomalies_needed,
    calibrate_routing,
    losses_allowed,
)
from anomalib_lite.engines import AnyBackbone, open_backbone
from anomalib_lite.errors import CalibrationWarning, InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.synthetic import SyntheticAnomalies

if TYPE_CHECKING:
    from anomalib_lite.detectors.gated_cascade import GatedCascade

__all__ = ["learn_cascade", "open_gate"]

_WHERE = "GatedCascade"
# Later layers than a heatmap needs: a gate must know that something is odd, not where.
_STRIDES = (16, 32)
# What a heatmap model that nobody gave has of the cascade.
_SHARED = ("device", "dtype", "engine", "batch_size", "on_error", "max_pixels", "random_state")
_FEWEST = 8
# Synthetic anomalies to learn from, and to make a probability by: at least and at most.
_TO_LEARN, _TO_CHECK = (64, 512), (64, 256)
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
    cascade: GatedCascade,
    source: ImageSource,
    normal: np.ndarray,
    anomalous: np.ndarray,
    parts: np.ndarray,
) -> dict[str, Any]:
    """What ``fit`` finds out, by the names of the fitted attributes; the thresholds come after."""
    random = check_random_state(cascade.random_state)
    groups = _split(normal, anomalous, parts, cascade, random)
    gate, features, skipped = _learn_gate(cascade, source, groups, random)
    seeds = random.randint(2**31, size=2)
    gate.probability = _fit_probability(cascade, gate, source, features, groups, int(seeds[0]))
    detector = _fit_detector(cascade, source.take(np.r_[groups.learn, groups.check]))
    found = detector.detect(source.take(groups.hold), maps=False)
    seen = np.isfinite(found.scores)
    if not seen.any():
        raise InvalidValueError(
            f"{_WHERE}: the heatmap model could use none of {len(seen)} held-out normal images; "
            f"the first: {found.skipped[0][1]}"
        )
    normal_p = gate.probabilities(features[groups.hold])[seen]
    normal_s = found.scores[seen].astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # comes with the thresholds
        rate, t_high = cascade.false_alarm_rate, cascade.t_high
        routing = calibrate_routing(normal_p, normal_s, rate, t_high=t_high)
    bad_p, bad_s = _judge_anomalies(
        cascade, gate, detector, source, groups, routing.threshold, int(seeds[1])
    )
    return {
        "gate_": gate,
        "detector_": detector,
        "calibration_probabilities_": normal_p,
        "calibration_detector_scores_": normal_s,
        "anomaly_probabilities_": bad_p,
        "anomaly_detector_scores_": bad_s,
        "skipped_": [(source.names[i], reason) for i, reason in sorted(skipped)],
    }


def _split(
    normal: np.ndarray,
    anomalous: np.ndarray,
    parts: np.ndarray,
    cascade: GatedCascade,
    random: np.random.RandomState,
) -> _Groups:
    if len(normal) < _FEWEST:
        raise InvalidValueError(
            f"{_WHERE}: fit needs at least {_FEWEST} normal images, to learn from and to hold out, "
            f"got {len(normal)}. Give more."
        )
    n_parts = len(np.unique(parts[normal]))
    if n_parts < 3:
        raise InvalidValueError(
            f"{_WHERE}: groups must have at least 3 different values among normal images, to "
            f"learn from, to check by and to hold out, got {n_parts}. Give images of more parts, "
            "or leave groups out."
        )
    n = len(normal)
    normal, anomalous = (_shuffled(indices, parts, random) for indices in (normal, anomalous))
    n_hold = min(max(calibration_size(cascade.false_alarm_rate), n // 5), n // 2)
    end = _cut(parts[normal], n - n_hold, least=2)
    n_learn = _cut(parts[normal[:end]], end - (n - n_hold) // 4)
    # Where half of the labelled anomalies could show nothing, they are of more use in learning.
    half = len(anomalous)
    if half // 2 >= anomalies_needed(cascade.max_missed):
        half = _cut(parts[anomalous], (half + 1) // 2)
    return _Groups(
        learn=normal[:n_learn],
        check=normal[n_learn:end],
        hold=normal[end:],
        learn_bad=anomalous[:half],
        check_bad=anomalous[half:],
    )


def _shuffled(indices: np.ndarray, parts: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """The indices in random order, those of one part side by side."""
    indices = random.permutation(indices)
    names, inverse = np.unique(parts[indices], return_inverse=True)
    if len(names) == len(indices):
        return indices
    return np.asarray(indices[np.argsort(random.permutation(len(names))[inverse], kind="stable")])


def _cut(parts: np.ndarray, wanted: int, least: int = 1) -> int:
    """The end of a part that is nearest to ``wanted``, with at least so many parts before it and
    one after; the end of all, if there is no such.
    """
    ends = np.append(np.flatnonzero(parts[1:] != parts[:-1])[least - 1 :] + 1, [])
    return int(ends[np.argmin(np.abs(ends - wanted))]) if len(ends) else len(parts)


def _learn_gate(
    cascade: GatedCascade, source: ImageSource, groups: _Groups, random: np.random.RandomState
) -> tuple[Gate, np.ndarray, list[tuple[int, str]]]:
    """A gate that lacks its probability, its features of all images, and what was skipped; images
    that cannot be used are taken out of ``groups``.
    """
    labelled = len(groups.learn_bad) > 0
    gate, judged = _begin_gate(cascade, source, groups.learn)
    features, skipped = gate.features(source, cascade)
    groups.keep(np.isfinite(features).all(axis=1))
    _check_enough(groups, source, skipped, labelled=labelled)
    learn = np.intersect1d(groups.learn, judged)
    # Labelled ones that are too few to hold some out are too few to learn from alone.
    n_made = 0 if len(groups.check_bad) else int(np.clip(2 * len(learn), *_TO_LEARN))
    if cascade.training == "finetune":
        known = source.take(groups.learn_bad) if labelled else None
        gate = _tune(cascade, gate, source.take(learn), known, n_made, random)
        return gate, *gate.features(source, cascade)
    bad = [features[groups.learn_bad]] if labelled else []
    if n_made:
        made = _synthetic(source.take(learn), n_made, random.randint(2**31))
        bad.append(_features_of(gate, cascade, made))
    gate.head = Head.fit(features[learn], bad, cascade.class_weight, _WHERE)
    return gate, features, skipped


def _fit_probability(
    cascade: GatedCascade,
    gate: Gate,
    source: ImageSource,
    features: np.ndarray,
    groups: _Groups,
    seed: int,
) -> Probability:
    bad = features[groups.check_bad]
    if not len(bad):
        n = int(np.clip(2 * len(groups.check), *_TO_CHECK))
        bad = _features_of(gate, cascade, _synthetic(source.take(groups.check), n, seed))
    logits = gate.head.logits(np.concatenate([features[groups.check], bad]))
    y = np.repeat([0, 1], [len(groups.check), len(bad)])
    return Probability.fit(cascade.calibration, logits, y, cascade.class_weight)


def _judge_anomalies(
    cascade: GatedCascade,
    gate: Gate,
    detector: Any,
    source: ImageSource,
    groups: _Groups,
    threshold: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out anomalies as :func:`lowest_probability` needs them: labelled ones, or made ones.

    The heatmap model takes its time. Once it has found more than may be lost, it is asked no more
    about anomalies that the gate is surer of: ``t_low`` will be below. Their scores are NaN.
    """
    n, images = len(groups.check_bad), iter([source.take(groups.check_bad)])
    if not n:
        needed = anomalies_needed(cascade.max_missed)
        n = max(needed, min(4 * needed, _MANY))
        images = _synthetic(source.take(groups.check), n, seed)
    allowed = losses_allowed(n, cascade.max_missed)
    found, parts = np.empty(0), []
    for some in images:
        p = gate.probabilities(gate.features(some, cascade)[0])
        s = np.full(len(p), np.nan)
        asked = p <= (found[allowed] if len(found) > allowed >= 0 else np.inf)
        if asked.any():
            s[asked] = detector.detect(some.take(np.flatnonzero(asked)), maps=False).scores
        found = np.sort(np.concatenate([found, p[s > threshold]]))
        usable = ~(asked & np.isnan(s))
        parts.append((p[usable], s[usable]))
    p, s = (np.concatenate(column) for column in zip(*parts, strict=True))
    return p, s


def _begin_gate(
    cascade: GatedCascade, source: ImageSource, learn: np.ndarray
) -> tuple[Gate, np.ndarray]:
    """The gate without its head, and the normal images that the head may learn from."""
    if not isinstance(cascade.gate, BaseDetector):
        backbone = open_gate(cascade)
        check_image_size(cascade.image_size, _WHERE, stride=backbone.stride)
        if cascade.training == "finetune":
            return Gate(backbone=backbone), learn
        whitening = Whitening.fit(_moments(backbone, source.take(learn), cascade))
        return Gate(backbone=backbone, whitening=whitening), learn
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


def _features_of(gate: Gate, cascade: GatedCascade, made: Iterable[ImageSource]) -> np.ndarray:
    return np.concatenate([gate.features(images, cascade)[0] for images in made])


def _fit_detector(cascade: GatedCascade, normal: ImageSource) -> Any:
    detector = cascade.detector
    if detector is None:
        detector = PatchCore(**{name: getattr(cascade, name) for name in _SHARED})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # its own threshold is not used
        return clone(detector).fit(normal)
