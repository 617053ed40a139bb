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

from anomalib_lite._validation import check_image_size
from anomalib_lite.calibration import calibration_size
from anomalib_lite.cascade.gate import (
    Gate,
    LinearHead,
    ProbabilityCalibrator,
    Whitening,
    embed_images,
)
from anomalib_lite.cascade.routing import calibrate_routing, max_losses, min_anomalies
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.patchcore import PatchCore
from anomalib_lite.engines import AnyBackbone, open_backbone
from anomalib_lite.errors import CalibrationWarning, InvalidValueError
from anomalib_lite.gaussian import Moments
from anomalib_lite.images import ImageSource
from anomalib_lite.synthetic import SyntheticAnomalies

if TYPE_CHECKING:
    from anomalib_lite.cascade.gated_cascade import GatedCascade

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
class _Shares:
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
    shares = _split(normal, anomalous, parts, cascade, random)
    gate, features, skipped = _learn_gate(cascade, source, shares, random)
    seeds = random.randint(2**31, size=2)
    gate.probability = _fit_probability(cascade, gate, source, features, shares, int(seeds[0]))
    detector = _fit_detector(cascade, source.take(np.r_[shares.learn, shares.check]))
    found = detector.detect(source.take(shares.hold), maps=False)
    seen = np.isfinite(found.scores)
    if not seen.any():
        raise InvalidValueError(
            f"{_WHERE}: the heatmap model could use none of {len(seen)} held-out normal images; "
            f"the first: {dict(found.skipped).get(0, 'its score is not finite')}"
        )
    normal_p = gate.probabilities(features[shares.hold])[seen]
    normal_s = found.scores[seen].astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # comes with the thresholds
        rate, t_high = cascade.false_alarm_rate, cascade.t_high
        routing = calibrate_routing(normal_p, normal_s, rate, t_high=t_high)
    bad_p, bad_s = _judge_anomalies(
        cascade, gate, detector, source, shares, routing.threshold, int(seeds[1])
    )
    return {
        "gate_": gate,
        "detector_": detector,
        "calibration_probabilities_": normal_p,
        "calibration_detector_scores_": normal_s,
        "anomaly_probabilities_": bad_p,
        "anomaly_detector_scores_": bad_s,
        "synthetic_": not len(shares.check_bad),
        "skipped_": [(source.names[i], reason) for i, reason in sorted(skipped)],
    }


def _split(
    normal: np.ndarray,
    anomalous: np.ndarray,
    parts: np.ndarray,
    cascade: GatedCascade,
    random: np.random.RandomState,
) -> _Shares:
    """Whole parts to each share. What the promises rest on has one image of each part: parts, not
    images, come as if drawn at random.
    """
    order = random.permutation(np.unique(parts[normal]))
    n = len(order)
    if n < _FEWEST:
        raise InvalidValueError(
            f"{_WHERE}: fit needs at least {_FEWEST} normal images, of different parts if groups "
            f"are given, to learn from and to hold out, got {n}. Give more."
        )
    n_hold = min(max(calibration_size(cascade.false_alarm_rate), n // 5), n // 2)
    n_learn = n - n_hold - (n - n_hold) // 4
    bad_order = random.permutation(np.unique(parts[anomalous]))
    half = len(bad_order) // 2
    # Where half of the labelled anomalies could show nothing, they are of more use in learning.
    n_check_bad = half if half >= min_anomalies(cascade.max_missed) else 0
    n_learn_bad = len(bad_order) - n_check_bad
    return _Shares(
        learn=_of(order[:n_learn], normal, parts),
        check=_of(order[n_learn : n - n_hold], normal, parts),
        hold=_of(order[n - n_hold :], normal, parts, random),
        learn_bad=_of(bad_order[:n_learn_bad], anomalous, parts),
        check_bad=_of(bad_order[n_learn_bad:], anomalous, parts, random),
    )


def _of(
    chosen: np.ndarray,
    indices: np.ndarray,
    parts: np.ndarray,
    one_each: np.random.RandomState | None = None,
) -> np.ndarray:
    """Of these images those of the parts chosen, in their order; or one of each part, drawn."""
    ordered = indices[np.argsort(parts[indices], kind="stable")]
    starts, ends = (np.searchsorted(parts[ordered], chosen, side) for side in ("left", "right"))
    images = [ordered[start:end] for start, end in zip(starts, ends, strict=True)]
    if one_each is not None:
        images = [some[[one_each.randint(len(some))]] if len(some) > 1 else some for some in images]
    return np.concatenate([np.empty(0, np.int64), *images])


def _learn_gate(
    cascade: GatedCascade, source: ImageSource, shares: _Shares, random: np.random.RandomState
) -> tuple[Gate, np.ndarray, list[tuple[int, str]]]:
    """A gate that lacks its probability, its features of all images, and what was skipped; images
    that cannot be used are taken out of ``shares``.
    """
    labelled = len(shares.learn_bad) > 0
    gate, judged = _begin_gate(cascade, source, shares.learn)
    features, skipped = gate.features(source, cascade)
    shares.keep(np.isfinite(features).all(axis=1))
    _check_enough(shares, source, skipped, labelled=labelled)
    learn = np.intersect1d(shares.learn, judged)
    # Labelled ones that are too few to hold some out are too few to learn from alone.
    n_made = 0 if len(shares.check_bad) else int(np.clip(2 * len(learn), *_TO_LEARN))
    if cascade.training == "finetune":
        known = source.take(shares.learn_bad) if labelled else None
        gate = _tune(cascade, gate, source.take(learn), known, n_made, random)
        return gate, *gate.features(source, cascade)
    bad = [features[shares.learn_bad]] if labelled else []
    if n_made:
        made = _synthetic(source.take(learn), n_made, random.randint(2**31))
        bad.append(_features_of(gate, cascade, made))
    gate.head = LinearHead.fit(features[learn], bad, cascade.class_weight, _WHERE)
    return gate, features, skipped


def _fit_probability(
    cascade: GatedCascade,
    gate: Gate,
    source: ImageSource,
    features: np.ndarray,
    shares: _Shares,
    seed: int,
) -> ProbabilityCalibrator:
    bad = features[shares.check_bad]
    if not len(bad):
        n = int(np.clip(2 * len(shares.check), *_TO_CHECK))
        bad = _features_of(gate, cascade, _synthetic(source.take(shares.check), n, seed))
    logits = gate.head.logits(np.concatenate([features[shares.check], bad]))
    y = np.repeat([0, 1], [len(shares.check), len(bad)])
    return ProbabilityCalibrator.fit(cascade.calibration, logits, y, cascade.class_weight)


def _judge_anomalies(
    cascade: GatedCascade,
    gate: Gate,
    detector: Any,
    source: ImageSource,
    shares: _Shares,
    threshold: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out anomalies as :func:`choose_t_low` needs them: labelled ones, or made ones.

    The heatmap model takes its time. Once it has found more than may be lost, it is asked no more
    about anomalies that the gate is surer of: ``t_low`` will be below. Their scores are NaN.
    """
    n, images = len(shares.check_bad), iter([source.take(shares.check_bad)])
    if not n:
        needed = min_anomalies(cascade.max_missed)
        n = max(needed, min(4 * needed, _MANY))
        # On images that neither model has seen, as those to come.
        images = _synthetic(source.take(shares.hold), n, seed)
    allowed = max_losses(n, cascade.max_missed)
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
    from anomalib_lite.cascade._finetuning import finetune_gate

    network = Backbone(
        cascade.gate,
        weights=cascade.weights,
        strides=_STRIDES,
        device=gate.backbone.device,
        dtype="float32",
        trainable=True,
        where=gate.backbone.where,
    )
    tuned = finetune_gate(
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
    shares: _Shares, source: ImageSource, skipped: list[tuple[int, str]], *, labelled: bool
) -> None:
    needed = ["learn", "check", "hold"] + (["learn_bad"] if labelled else [])
    for name in needed:
        if not len(getattr(shares, name)):
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
