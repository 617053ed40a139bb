"""Steps of the fit of a cascade, each from the images that it uses."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import clone

from anomalib_lite._validation import check_image_size
from anomalib_lite.cascade._holding_back import Split, Subset, Subsets
from anomalib_lite.cascade.gate import (
    DetectorEncoder,
    Gate,
    LinearHead,
    NetworkEncoder,
    ProbabilityCalibrator,
    Whitening,
)
from anomalib_lite.cascade.routing import max_losses, min_anomalies
from anomalib_lite.detectors import BaseDetector
from anomalib_lite.engines import AnyBackbone, open_backbone
from anomalib_lite.errors import CalibrationWarning, InvalidValueError
from anomalib_lite.gaussian import Moments
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.synthetic import SyntheticAnomalies

if TYPE_CHECKING:  # it imports torch
    from anomalib_lite.cascade._finetuning import FinetuningResult

__all__ = ["GateTraining", "fit_detector", "score_held_back_anomalies", "score_held_back_normal"]

_WHERE = "GatedCascade"
_GATE = f"{_WHERE} (gate)"
# Later layers than a heatmap needs: a gate must know that something is odd, not where.
_STRIDES = (16, 32)
# Least and largest number of synthetic anomalies for the head and for the probability.
_FOR_HEAD, _FOR_PROBABILITY = (64, 512), (64, 256)
# Four times as many held-back anomalies as needed are made: then the gate may miss a share of 0.6
# of max_missed of them instead of 0.33. At most this many are made, unless more are needed.
_MANY = 2000
# Synthetic anomalies that are in memory at once.
_AT_ONCE = 32

Encoder = NetworkEncoder | DetectorEncoder


@dataclass(frozen=True)
class GateTraining:
    """Makes a gate; the fields are parameters of :class:`~anomalib_lite.GatedCascade`."""

    gate: Any
    weights: str | Path | None
    training: str
    epochs: int
    calibration: str
    class_weight: Any
    image_size: int | tuple[int, int]
    device: str
    dtype: str
    engine: str
    batch_size: int
    on_error: str
    verbose: int

    def open_backbone(self, **instead: Any) -> AnyBackbone:
        """Open the gate's backbone by the parameters; ``instead`` replaces some of them."""
        options: dict[str, Any] = {
            "weights": self.weights,
            "strides": _STRIDES,
            "device": self.device,
            "dtype": self.dtype,
            "engine": self.engine,
            "where": _GATE,
        }
        return open_backbone(self.gate, **(options | instead))

    def extractor(self, backbone: AnyBackbone) -> Extractor:
        """Return what embeds images by this backbone."""
        return Extractor(
            backbone,
            self.image_size,
            self.batch_size,
            self.on_error,
            self.verbose,
            name="the gate's backbone",
        )

    def fit(
        self, source: ImageSource, split: Split, random: np.random.RandomState
    ) -> tuple[Gate, Subsets, list[tuple[int, str]]]:
        """Return a fitted gate, the images with their features, and the images it skipped."""
        encoder = self._fit_encoder(source.take(split.encoder_normal))
        features, skipped = encoder(source)
        subsets = split.subsets(source, features, skipped)
        # Labelled anomalies that are too few to hold some back are too few to train on alone.
        n_synthetic = 0
        if not len(subsets.held_back_anomalous):
            n_synthetic = int(np.clip(2 * len(subsets.head_normal), *_FOR_HEAD))
        history: list[dict[str, float]] = []
        if isinstance(encoder, NetworkEncoder) and self.training == "finetune":
            device = encoder.backbone.device
            tuned = self._finetune(subsets, n_synthetic, device, random)
            backbone = self.open_backbone(state=tuned.state, sha256=tuned.sha256)
            encoder = NetworkEncoder(self.extractor(backbone), None)
            features, skipped = encoder(source)
            subsets = split.subsets(source, features, skipped)
            head, history = tuned.head, tuned.history
        else:
            head = self._fit_head(encoder, subsets, n_synthetic, random)
        calibrator = self._fit_calibrator(encoder, head, subsets, random.randint(2**31))
        return Gate(encoder, head, calibrator, history), subsets, skipped

    def _fit_encoder(self, normal: ImageSource) -> Encoder:
        if isinstance(self.gate, BaseDetector):
            return DetectorEncoder(fit_detector(self.gate, normal))
        backbone = self.open_backbone()
        check_image_size(self.image_size, _WHERE, stride=backbone.stride)
        extractor = self.extractor(backbone)
        frozen = self.training == "head"
        return NetworkEncoder(extractor, _fit_whitening(extractor, normal) if frozen else None)

    def _finetune(
        self, subsets: Subsets, n_synthetic: int, device: Any, random: np.random.RandomState
    ) -> FinetuningResult:
        """Finetune a copy of the network, so that the user's own module does not change."""
        from anomalib_lite.backbones import Backbone  # torch, only for those who ask
        from anomalib_lite.cascade._finetuning import finetune_gate

        network = Backbone(
            self.gate,
            weights=self.weights,
            strides=_STRIDES,
            device=device,
            dtype="float32",
            trainable=True,
            where=_GATE,
        )
        tuned = finetune_gate(
            network,
            subsets.head_normal.images,
            subsets.head_anomalous.images if len(subsets.head_anomalous) else None,
            image_size=self.image_size,
            n_synthetic=n_synthetic,
            class_weight=self.class_weight,
            epochs=self.epochs,
            random=random,
            verbose=self.verbose,
        )
        del network
        gc.collect()  # its hooks and itself hold each other
        return tuned

    def _fit_head(
        self, encoder: Encoder, subsets: Subsets, n_synthetic: int, random: np.random.RandomState
    ) -> LinearHead:
        """Fit the head to labelled anomalies, synthetic ones, or both."""
        normal, kinds = subsets.head_normal, [subsets.head_anomalous.features]
        if n_synthetic:
            seed = random.randint(2**31)
            kinds.append(_synthetic_features(encoder, normal.images, n_synthetic, seed))
        return LinearHead.fit(normal.features, kinds, self.class_weight, _WHERE)

    def _fit_calibrator(
        self, encoder: Encoder, head: LinearHead, subsets: Subsets, seed: int
    ) -> ProbabilityCalibrator:
        """Calibrate the probability on labelled anomalies or, without any, on synthetic ones."""
        normal, anomalous = subsets.calibration_normal, subsets.held_back_anomalous.features
        if not len(anomalous):
            n = int(np.clip(2 * len(normal), *_FOR_PROBABILITY))
            anomalous = _synthetic_features(encoder, normal.images, n, seed)
        logits = head.logits(np.concatenate([normal.features, anomalous]))
        y = np.repeat([0, 1], [len(normal), len(anomalous)])
        return ProbabilityCalibrator.fit(self.calibration, logits, y, self.class_weight)


def _fit_whitening(extractor: Extractor, normal: ImageSource) -> Whitening:
    """Fit the whitening to the patches of all images that can be used."""
    moments: Moments | None = None
    skipped: list[tuple[int, str]] = []
    for _, E in extractor.embed_batches(normal, skipped=skipped, progress="gate"):
        moments = moments or Moments(E.shape[3])
        moments.add(E.reshape(-1, E.shape[3]))
    if moments is None:
        raise InvalidValueError(
            f"{_WHERE}: none of {len(normal)} images to learn from could be used; the first: "
            f"{skipped[0][1]}"
        )
    return Whitening.fit(moments)


def fit_detector(detector: BaseDetector, normal: ImageSource) -> Any:
    """Fit a copy of a detector, whose own threshold is not used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return clone(detector).fit(normal)


def score_held_back_normal(
    gate: Gate, detector: Any, normal: Subset
) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities and heatmap scores of the images that the heatmap model can use."""
    found = detector.detect(normal.images, maps=False)
    seen = np.isfinite(found.scores)
    if not seen.any():
        raise InvalidValueError(
            f"{_WHERE}: the heatmap model could use none of {len(seen)} held-back normal images; "
            f"the first: {dict(found.skipped).get(0, 'its score is not finite')}"
        )
    return gate.probabilities(normal.features)[seen], found.scores[seen].astype(np.float64)


def score_held_back_anomalies(
    gate: Gate,
    detector: Any,
    normal: Subset,
    anomalous: Subset,
    *,
    threshold: float,
    max_missed: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities and heatmap scores of anomalies, for :func:`choose_t_low`.

    The anomalies are the labelled ones or, if there are none, synthetic ones.

    The heatmap model is slow. Once it has found more than may be missed, it is not run on
    anomalies with a larger probability, because ``t_low`` will be smaller. Their scores are NaN.
    """
    n, batches = len(anomalous), iter([anomalous])
    if not n:
        needed = min_anomalies(max_missed)
        n = max(needed, min(4 * needed, _MANY))
        # Made from images that neither model has seen, as future images are.
        batches = _synthetic_subsets(gate, normal.images, n, seed)
    allowed = max_losses(n, max_missed)
    found, known = np.empty(0), []
    for some in batches:
        p = gate.probabilities(some.features)
        s = np.full(len(p), np.nan)
        asked = p <= (found[allowed] if len(found) > allowed >= 0 else np.inf)
        if asked.any():
            images = some.images.take(np.flatnonzero(asked))
            s[asked] = detector.detect(images, maps=False).scores
        found = np.sort(np.concatenate([found, p[s > threshold]]))
        usable = ~(asked & np.isnan(s))
        known.append((p[usable], s[usable]))
    p, s = (np.concatenate(column) for column in zip(*known, strict=True))
    return p, s


def _synthetic_subsets(gate: Gate, normal: ImageSource, n: int, seed: int) -> Iterator[Subset]:
    for images in SyntheticAnomalies(random_state=seed).sources(normal, n, _AT_ONCE):
        yield Subset(images, gate.features(images)[0])


def _synthetic_features(encoder: Encoder, normal: ImageSource, n: int, seed: int) -> np.ndarray:
    made = SyntheticAnomalies(random_state=seed).sources(normal, n, _AT_ONCE)
    return np.concatenate([encoder(images)[0] for images in made])
