"""GatedCascade: a small network decides about clear images, a heatmap model about the rest."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_random_state

from anomalib_lite._validation import check_choice, check_int, check_labels, check_number
from anomalib_lite.cascade._fitting import (
    GateTraining,
    fit_detector,
    score_held_back_anomalies,
    score_held_back_normal,
)
from anomalib_lite.cascade._holding_back import draw_split, positions_by_class
from anomalib_lite.cascade.gate import (
    PROBABILITY_CALIBRATIONS,
    DetectorEncoder,
    Encoded,
    Gate,
    NetworkEncoder,
    SavedGate,
    check_class_weight,
)
from anomalib_lite.cascade.routing import (
    Routing,
    anomaly_shortfall,
    calibrate_routing,
    check_threshold_lists,
    check_thresholds,
    choose_t_low,
    leaves_false_alarms,
    rate_shortfall,
)
from anomalib_lite.cascade.sweep import Sweep, sweep_routings, threshold_pairs
from anomalib_lite.detectors import BaseDetector, Detections, DetectorMixin, PatchCore
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import (
    CalibrationWarning,
    InvalidTypeError,
    InvalidValueError,
    NotFittedError,
)
from anomalib_lite.images import ImageSource
from anomalib_lite.images.embeddings import stack
from anomalib_lite.images.grouping import default_groups, group_ids

__all__ = ["SHARED_PARAMETERS", "CascadeDetections", "GatedCascade"]

MAPS = ("escalated", "always")
_WHERE = "GatedCascade"
# Parameters of the cascade that the default heatmap model gets too.
SHARED_PARAMETERS = (
    *("device", "dtype", "engine"),
    *("batch_size", "on_error", "max_pixels", "random_state"),
)
# Fitted attributes about held-back images: a file has them under these names without the "_".
_HELD_BACK = (
    "calibration_probabilities_",
    "calibration_detector_scores_",
    "anomaly_probabilities_",
    "anomaly_detector_scores_",
)


@dataclass(frozen=True)
class CascadeDetections(Detections):
    """Results of a :class:`~anomalib_lite.GatedCascade` for each image.

    ``scores`` lie in [0, 1]. ``maps`` holds the heatmaps of the heatmap model, in its units, and
    None for each image on which it was not run.

    Attributes
    ----------
    routes : ndarray of shape (N,), str
        Model that decided: ``"gate_normal"``, ``"gate_anomalous"``, ``"detector"``; or
        ``"skipped"``.
    probabilities : ndarray of shape (N,), float64
        Probability of an anomaly by the gate; NaN for an image that was skipped.
    """

    routes: np.ndarray = field(default_factory=lambda: np.empty(0, "<U14"))
    probabilities: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def heatmap_call_rate(self) -> float:
        """Share of the images that the heatmap model decided; skipped images do not count."""
        seen = self.routes[self.routes != "skipped"]
        return float(np.mean(seen == "detector")) if seen.size else float("nan")


class GatedCascade(DetectorMixin, BaseEstimator):
    """Detector with a cheap gate that decides about clear images, and a heatmap model for the rest.

    Parameters
    ----------
    gate : str, torch.nn.Module or BaseDetector, default="efficientnet_lite0"
        A backbone, as in :class:`~anomalib_lite.PatchCore`, or an unfitted detector, whose score
        is the only feature then.
    detector : BaseDetector, optional
        The heatmap model, unfitted. By default ``PatchCore()`` with ``device``, ``dtype``,
        ``engine``, ``batch_size``, ``on_error``, ``max_pixels`` and ``random_state`` of the
        cascade.
    training : {"head", "finetune"}, default="head"
        How a gate that is a network learns. ``"head"`` fits a logistic regression on whitened
        patches of the frozen network. ``"finetune"`` trains the weights of the network too; see
        :func:`~anomalib_lite.cascade._finetuning.finetune_gate`.
    epochs : int, default=20
        Number of epochs of ``training="finetune"``.
    t_low, t_high : float, optional
        Thresholds in [0, 1]. The gate calls an image normal below ``t_low``, anomalous above
        ``t_high``, and leaves it to the heatmap model between. By default ``fit`` chooses both.
    max_missed : float, default=0.01
        Largest share of anomalous images that the gate may miss, in (0, 1). The gate misses an
        image if it calls it normal and the heatmap model would have found the anomaly. ``t_low``
        keeps this share with 95 % confidence, for anomalies such as those held back.
    false_alarm_rate : float, default=0.01
        Share of future normal images that gate and heatmap model together may call anomalous,
        in (0, 1).
    calibration : {"temperature", "isotonic"}, default="temperature"
        How the gate's output becomes a probability; fitted on images that the gate's head was not
        fitted on.
    class_weight : {"balanced"}, dict or None, default="balanced"
        Weights of the classes 0 (normal) and 1 in the gate, as in scikit-learn.
    maps : {"escalated", "always"}, default="escalated"
        For which images :meth:`detect` makes heatmaps: those that the heatmap model decides, or
        all, which costs what the heatmap model alone would.
    weights : str or Path, optional
        Weights file of the gate's backbone, if ``gate`` is a timm name.
    image_size : int or (int, int), default=160
        Size of images for the gate; the heatmap model has its own.
    device, dtype, engine, batch_size, on_error, max_pixels, verbose
        Options of the gate, as in :class:`~anomalib_lite.PatchCore`; a ``detector`` has its own.
    random_state : int, RandomState or None, default=0
        Seed of the split into images to train on and to hold back, of synthetic anomalies, and of
        ``training="finetune"``.

    Attributes
    ----------
    detector_ : BaseDetector
        The fitted heatmap model.
    gate_ : Gate
        The fitted gate: its ``backbone`` or ``detector``, its ``head``, its ``probability``, and
        the ``history`` of its finetuning.
    routing_ : Routing
        ``t_low``, ``t_high`` and the ``threshold`` of the heatmap model.
    threshold_ : float
        0.5. An image with a larger score is called anomalous.
    calibration_probabilities_, calibration_detector_scores_ : ndarray of shape (n,), float64
        Gate probabilities and heatmap scores of the normal images held back for the thresholds.
    anomaly_probabilities_, anomaly_detector_scores_ : ndarray of shape (m,), float64
        The same of the anomalies held back for ``t_low``. A score is NaN if the probability is so
        large that ``t_low`` cannot depend on the score.
    synthetic_ : bool
        Whether these anomalies are synthetic, because there were no or too few labelled ones.
    skipped_ : list of (str, str)
        Name and reason of each training image that the gate left out.

    Notes
    -----
    A fifth to half of the normal images, as many as ``false_alarm_rate`` needs, are held back for
    the thresholds. The heatmap model is fitted on the others. The gate is fitted on three quarters
    of these, and its probability is calibrated on the last quarter. ``Whitening`` in
    :mod:`anomalib_lite.cascade.gate` says what the gate sees of an image; ``calibrate_routing``,
    ``choose_t_low`` and ``Routing`` in :mod:`anomalib_lite.cascade.routing` say why the rates hold
    and what the score means.

    Cascades of classifiers of growing cost: Viola and Jones, "Rapid object detection using a
    boosted cascade of simple features", CVPR 2001.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite import GatedCascade, PatchCore
    >>> rng = np.random.default_rng(0)
    >>> good = rng.integers(100, 140, (60, 64, 96, 3), dtype=np.uint8)
    >>> bad = good[:1].copy()
    >>> bad[0, 20:40, 30:60] = 255
    >>> heatmaps = PatchCore(image_size=64)
    >>> cascade = GatedCascade(
    ...     detector=heatmaps, image_size=64, max_missed=0.2, false_alarm_rate=0.1
    ... )
    >>> found = cascade.fit(good).detect(bad)
    >>> bool(found.labels[0]), bool(found.scores[0] > 0.5)
    (True, True)
    """

    _network = "gate"
    _threshold_range = "[0, 1]"
    _routes = ("gate_normal", "gate_anomalous", "detector")

    def __init__(
        self,
        gate: Any = "efficientnet_lite0",
        detector: Any = None,
        *,
        training: str = "head",
        epochs: int = 20,
        t_low: float | None = None,
        t_high: float | None = None,
        max_missed: float = 0.01,
        false_alarm_rate: float = 0.01,
        calibration: str = "temperature",
        class_weight: Any = "balanced",
        maps: str = "escalated",
        weights: str | Path | None = None,
        image_size: int | tuple[int, int] = 160,
        device: str = "auto",
        dtype: str = "auto",
        engine: str = "auto",
        batch_size: int = 32,
        on_error: str = "raise",
        max_pixels: int = 100_000_000,
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        self.gate = gate
        self.detector = detector
        self.training = training
        self.epochs = epochs
        self.t_low = t_low
        self.t_high = t_high
        self.max_missed = max_missed
        self.false_alarm_rate = false_alarm_rate
        self.calibration = calibration
        self.class_weight = class_weight
        self.maps = maps
        self.weights = weights
        self.image_size = image_size
        self.device = device
        self.dtype = dtype
        self.engine = engine
        self.batch_size = batch_size
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, images: Any, y: Any = None, groups: Any = None) -> Self:
        """Train the gate, fit the heatmap model, and calibrate both together.

        Parameters
        ----------
        images
            As in :meth:`PatchCore.fit <anomalib_lite.PatchCore.fit>`; at least 8 normal ones.
        y : array of shape (N,), optional
            0 for normal, 1 for anomalous. The gate learns to tell them apart. The heatmap model
            is fitted on normal images alone. If there are no anomalies, or fewer than twice as
            many as ``max_missed`` needs, synthetic ones are added, made from the normal images by
            :class:`~anomalib_lite.synthetic.SyntheticAnomalies`.
        groups : sequence of N int or str, or "auto", optional
            The part that each image shows, as in scikit-learn's splitters. At least 8 parts must
            have normal images. Give it if parts are photographed several times: without groups,
            images held back would be near copies of training images, and the thresholds too low
            for new parts. ``"auto"`` finds them by
            :func:`~anomalib_lite.images.copies.find_copies`.

        Returns
        -------
        GatedCascade
            Itself; unchanged in case of an error.

        Raises
        ------
        AnomalibLiteError
            For a parameter or an image that cannot be used, or for too few images.

        Warns
        -----
        CalibrationWarning
            If there are too few normal images for ``false_alarm_rate``, or too few anomalies for
            ``max_missed``.
        CopiesWarning
            Without ``groups``: if images have the same content as others, which are then held back
            together, or look like copies or photographs of one part, which are not.
        """
        self._check_parameters()
        source = ImageSource(images, max_pixels=self.max_pixels, where=_WHERE)
        normal, anomalous = positions_by_class(images, y, len(source))
        if groups is None:
            groups = default_groups(source, self.on_error, stacklevel=3)
        random = check_random_state(self.random_state)
        split = draw_split(
            normal,
            anomalous,
            group_ids(source, groups, self.on_error),
            false_alarm_rate=self.false_alarm_rate,
            max_missed=self.max_missed,
            halve=isinstance(self.gate, BaseDetector),
            random=random,
        )
        gate, subsets, skipped = self._gate_training().fit(source, split, random)
        detector = fit_detector(self._heatmap_model(), subsets.detector_normal.images)
        normal_p, normal_s = score_held_back_normal(gate, detector, subsets.held_back_normal)
        routing = calibrate_routing(normal_p, normal_s, self.false_alarm_rate, t_high=self.t_high)
        anomaly_p, anomaly_s = score_held_back_anomalies(
            gate,
            detector,
            subsets.held_back_normal,
            subsets.held_back_anomalous,
            threshold=routing.threshold,
            max_missed=self.max_missed,
            seed=random.randint(2**31),
        )
        fitted = {
            "gate_": gate,
            "detector_": detector,
            "calibration_probabilities_": normal_p,
            "calibration_detector_scores_": normal_s,
            "anomaly_probabilities_": anomaly_p,
            "anomaly_detector_scores_": anomaly_s,
            "synthetic_": not len(subsets.held_back_anomalous),
            "skipped_": [(source.names[i], reason) for i, reason in sorted(skipped)],
        }
        routing, shortfalls = self._route(fitted, self.t_low, self.t_high)
        for shortfall in shortfalls:
            warnings.warn(shortfall, CalibrationWarning, stacklevel=2)
        self.__dict__.update(fitted, routing_=routing, threshold_=0.5)
        self._remember_parameters()
        return self

    def set_thresholds(self, t_low: float | None = None, t_high: float | None = None) -> Self:
        """Set other thresholds of the gate, without fitting again.

        Parameters
        ----------
        t_low, t_high : float, optional
            New values of these parameters of the class; None means that the threshold is chosen
            automatically. The threshold of the heatmap model is adapted, so that
            ``false_alarm_rate`` holds.

        Returns
        -------
        GatedCascade
            Itself.

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        InvalidValueError
            Unless 0 <= t_low <= t_high <= 1.

        Warns
        -----
        CalibrationWarning
            As :meth:`fit`, or if ``t_high`` alone makes all the false alarms that
            ``false_alarm_rate`` allows.
        """
        self._check_fitted("false_alarm_rate", "max_missed")
        check_thresholds(t_low, t_high)
        routing, shortfalls = self._route(vars(self), t_low, t_high)
        for shortfall in shortfalls:
            warnings.warn(shortfall, CalibrationWarning, stacklevel=2)
        self.routing_, self.t_low, self.t_high = routing, t_low, t_high
        self._remember_parameters()
        return self

    def detect(self, images: Any, *, maps: str | bool | None = None) -> CascadeDetections:
        """Return scores, labels, routes and heatmaps.

        Parameters
        ----------
        images
            As in :meth:`fit`.
        maps : {"escalated", "always"} or bool, optional
            Images that get a heatmap: False means none, True means ``"always"``. By default the
            parameter ``maps`` of the class.

        Returns
        -------
        CascadeDetections

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        AnomalibLiteError
            For an image that cannot be used, unless ``on_error="skip"``: its score is NaN then,
            and its label True.
        """
        self._check_fitted()
        wanted = self.maps if maps is None else maps
        if isinstance(wanted, bool):
            wanted = "always" if wanted else "none"
        check_choice("maps", wanted, (*MAPS, "none"), _WHERE)
        source = ImageSource(images, max_pixels=self.max_pixels, where=_WHERE)
        features, skipped = self._gate_features(source)
        probabilities = self.gate_.probabilities(features)
        routes = self.routing_.routes(probabilities)
        to_see = np.flatnonzero(routes != "skipped" if wanted == "always" else routes == "detector")
        detector_scores = np.full(len(source), np.nan)
        heatmaps: list[Any] = [None] * len(source)
        if len(to_see):
            found = self.detector_.detect(source.take(to_see), maps=wanted != "none")
            detector_scores[to_see] = found.scores
            for k, i in enumerate(to_see if wanted != "none" else ()):
                heatmaps[i] = found.maps[k]
            skipped += [(int(to_see[i]), reason) for i, reason in found.skipped]
        scores = self.routing_.scores(probabilities, detector_scores)
        return CascadeDetections(
            scores=scores,
            labels=self._labels(scores),
            maps=None if wanted == "none" else stack(heatmaps),
            names=source.names,
            skipped=sorted(skipped),
            pixel_threshold=self._map_threshold,
            routes=routes,
            probabilities=probabilities,
        )

    def sweep(
        self,
        images: Any,
        y: Any,
        *,
        t_low: Sequence[float] | None = None,
        t_high: Sequence[float] | None = None,
    ) -> Sweep:
        """Evaluate this cascade at other thresholds of its gate.

        Parameters
        ----------
        images
            As in :meth:`fit`, but images that it was not fitted on.
        y : array of shape (N,)
            0 for normal, 1 for anomalous.
        t_low, t_high : sequences of float in [0, 1], optional
            By default the current threshold, 0 for ``t_low`` and 1 for ``t_high``, and the deciles
            of the images' probabilities. All pairs with ``t_low <= t_high`` are evaluated, each
            with the threshold of the heatmap model that :meth:`set_thresholds` would choose.

        Returns
        -------
        Sweep

        Raises
        ------
        NotFittedError, AnomalibLiteError
            As :meth:`detect`; images skipped are left out.
        """
        self._check_fitted()
        source = ImageSource(images, max_pixels=self.max_pixels, where=_WHERE)
        truth = check_labels(y, len(source), _WHERE)
        lows, highs = check_threshold_lists(t_low, t_high)
        started = time.perf_counter()
        p = self.gate_.probabilities(self._gate_features(source)[0])
        gate_ms = 1000 * (time.perf_counter() - started) / len(p)
        usable = np.flatnonzero(~np.isnan(p))
        if not len(usable):
            raise InvalidValueError(f"{_WHERE}: sweep could use none of {len(p)} images.")
        pairs = threshold_pairs(lows, highs, p[usable], self.routing_)
        s, started = np.full(len(p), np.nan), time.perf_counter()
        s[usable] = self.detector_.detect(source.take(usable), maps=False).scores
        detector_ms = 1000 * (time.perf_counter() - started) / len(usable)
        kept = ~np.isnan(s)
        if not kept.any():
            raise InvalidValueError(f"{_WHERE}: sweep could use none of {len(p)} images.")
        held_back, rate = self.calibration_probabilities_, self.false_alarm_rate
        return sweep_routings(
            [self._route(vars(self), low, high)[0] for low, high in pairs],
            p[kept],
            s[kept],
            truth[kept],
            gate_ms=gate_ms,
            detector_ms=detector_ms,
            keeps_rate=[leaves_false_alarms(held_back, rate, high) for _, high in pairs],
            alone=self._route(vars(self), 0.0, 1.0)[0],
        )

    @property
    def _map_threshold(self) -> float:
        return float(
            self.detector_._with_options(threshold_=self.routing_.threshold)._map_threshold
        )

    def _members(self) -> dict[str, DetectorMixin]:
        members = {"detector": self.detector_, "gate": self.gate_.detector}
        return {name: fitted for name, fitted in members.items() if fitted is not None}

    def _check_parameters(self) -> None:
        """Raise for the first constructor argument that cannot be used."""
        self._check_models()
        self._check_image_parameters()
        check_thresholds(self.t_low, self.t_high)
        check_number("max_missed", self.max_missed, _WHERE, "(0, 1)")
        check_choice("training", self.training, ("head", "finetune"), _WHERE)
        if self.training == "finetune" and isinstance(self.gate, BaseDetector):
            raise InvalidValueError(
                f"{_WHERE}: training='finetune' tunes the weights of a network, got the detector "
                f"gate={self.gate!r}. Give the name of a backbone or a module, or training='head'."
            )
        check_int("epochs", self.epochs, _WHERE, low=1)
        check_choice("calibration", self.calibration, PROBABILITY_CALIBRATIONS, _WHERE)
        check_class_weight(self.class_weight, _WHERE)
        check_choice("maps", self.maps, MAPS, _WHERE)
        for model in (self.gate, self.detector):
            if isinstance(model, BaseDetector):
                model._check_parameters()  # before the gate is fitted, which takes time

    def _check_models(self) -> None:
        gate, detector = self.gate, self.detector
        if isinstance(gate, type) or not (
            isinstance(gate, str | BaseDetector) or hasattr(gate, "state_dict")
        ):
            raise InvalidTypeError(
                f"{_WHERE}: gate must be the name of a backbone, a torch.nn.Module or a detector "
                f"such as PatchCore(image_size=64), got {gate!r}."
            )
        if detector is not None and not isinstance(detector, BaseDetector):
            raise InvalidTypeError(
                f"{_WHERE}: detector must be a detector such as PaDiM(image_size=(256, 256)), or "
                f"None for PatchCore, got {detector!r}."
            )
        if self.weights is not None and not isinstance(gate, str):
            raise InvalidValueError(
                f"{_WHERE}: weights go with the name of a backbone, got gate={gate!r}."
            )

    def _heatmap_model(self) -> BaseDetector:
        """Return the unfitted heatmap model."""
        if self.detector is not None:
            given: BaseDetector = self.detector
            return given
        return PatchCore(**{name: getattr(self, name) for name in SHARED_PARAMETERS})

    def _gate_training(self) -> GateTraining:
        """Return how a gate is made, by the parameters as they are now."""
        return GateTraining(**{f.name: getattr(self, f.name) for f in fields(GateTraining)})

    def _gate_features(self, source: ImageSource) -> Encoded:
        """Ask the gate for features, by the parameters as they are now."""
        gate = self.gate_
        if isinstance(gate.encoder, NetworkEncoder):
            extractor = self._gate_training().extractor(gate.encoder.backbone)
            gate = replace(gate, encoder=replace(gate.encoder, extractor=extractor))
        return gate.features(source)

    def _with_options(self, **options: Any) -> Self:
        other = super()._with_options(**options)
        other.detector_ = self.detector_._with_options(**options)
        if self.gate_.detector is not None:
            encoder = DetectorEncoder(self.gate_.detector._with_options(**options))
            other.gate_ = replace(self.gate_, encoder=encoder)
        return other

    def _summary_lines(self) -> list[tuple[str, str]]:
        routing, inside = self.routing_, self.gate_.detector
        backbone: Any = self.gate_.backbone if inside is None else inside.backbone_
        normal = f"below {routing.t_low:.3g}" if routing.t_low > 0 else "never"
        anomalous = f"above {routing.t_high:.3g}" if routing.t_high < 1 else "never"
        if routing.t_low == 0:
            missed = "nothing, since it calls no image normal"
        elif self.t_low is not None:
            missed = "as many as lie below the t_low given: nothing is promised of them"
        else:
            kind = "synthetic" if self.synthetic_ else "given"
            missed = (
                f"at most {self.max_missed:.3g} of anomalies such as the "
                f"{len(self.anomaly_probabilities_):,} {kind} ones held back (95 % confidence)"
            )
        where = f"{backbone.device}, {str(backbone.dtype).removeprefix('torch.')}"
        return [
            ("gate", f"{self.gate} ({where}): normal {normal}, anomalous {anomalous}"),
            ("gate misses", missed),
            *self.detector_._learner()._summary_lines(),
        ]

    def _fitted_backbone(self) -> AnyBackbone | None:
        return self.gate_.backbone

    def _open_backbone(self, **instead: Any) -> AnyBackbone:
        return self._gate_training().open_backbone(**instead)

    def _take_backbone(self, backbone: AnyBackbone) -> None:
        extractor = self._gate_training().extractor(backbone)
        self._take_encoder(NetworkEncoder(extractor, self._saved_gate.whitening))

    def _take_encoder(self, encoder: NetworkEncoder | DetectorEncoder) -> None:
        """Make the gate whole that was read from a file."""
        saved: SavedGate = self.__dict__.pop("_saved_gate")
        self.gate_ = Gate(encoder, saved.head, saved.probability, saved.history)

    def _weights_exist_here_alone(self) -> bool:
        return bool(self.gate_.history)  # the gate's network was fine-tuned

    def _plain_parameters(self) -> dict[str, Any]:
        parameters = super()._plain_parameters() | {"detector": None}
        if isinstance(self.gate, BaseDetector):
            parameters["gate"] = None
        if isinstance(self.class_weight, dict):  # JSON has no numbers as keys
            parameters["class_weight"] = list(self.class_weight.items())
        return parameters

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, gate = self.gate_.to_save().to_arrays()
        arrays |= {name.rstrip("_"): getattr(self, name) for name in _HELD_BACK}
        return arrays, {
            "gate": gate,
            "routing": {name: float(value) for name, value in vars(self.routing_).items()},
            "detector_given": self.detector is not None,
            "synthetic": bool(self.synthetic_),
        }

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        self._saved_gate = SavedGate.from_arrays(arrays, state["gate"])  # until its network is open
        self.routing_ = Routing(**{name: float(v) for name, v in state["routing"].items()})
        self.synthetic_ = bool(state["synthetic"])
        for name in _HELD_BACK:
            setattr(self, name, np.asarray(arrays[name.rstrip("_")], np.float64))

    @classmethod
    def _restore(
        cls,
        parameters: dict[str, Any],
        arrays: dict[str, np.ndarray],
        state: dict[str, Any],
        members: dict[str, Any],
    ) -> Self:
        parameters = dict(parameters)
        if isinstance(parameters["class_weight"], list):
            parameters["class_weight"] = {int(k): float(v) for k, v in parameters["class_weight"]}
        if state["detector_given"]:
            parameters["detector"] = clone(members["detector"])
        if "gate" in members:
            parameters["gate"] = clone(members["gate"])
        cascade = super()._restore(parameters, arrays, state, members)
        cascade.detector_ = members["detector"]
        if "gate" in members:
            cascade._take_encoder(DetectorEncoder(members["gate"]))
        return cascade

    def _check_fitted(self, *may_change: str) -> None:
        if not hasattr(self, "routing_"):
            raise NotFittedError(f"{_WHERE}: not fitted yet. Call fit(images) first.")
        self._refuse_changes(*may_change)

    def _route(
        self, fitted: Mapping[str, Any], t_low: float | None, t_high: float | None
    ) -> tuple[Routing, list[str]]:
        """Return the routing, with thresholds chosen where they are None; and shortfalls."""
        p, s = fitted["calibration_probabilities_"], fitted["calibration_detector_scores_"]
        low, shortfalls = t_low, []
        if low is None:
            anomaly_p = fitted["anomaly_probabilities_"]
            anomaly_s = fitted["anomaly_detector_scores_"]
            routing = calibrate_routing(p, s, self.false_alarm_rate, t_high=t_high)
            low = choose_t_low(anomaly_p, anomaly_s, routing, self.max_missed)
            shortfalls.append(anomaly_shortfall(len(anomaly_p), self.max_missed))
        routing = calibrate_routing(p, s, self.false_alarm_rate, t_low=low, t_high=t_high)
        shortfalls.append(rate_shortfall(p, self.false_alarm_rate, routing.t_high))
        return routing, [shortfall for shortfall in shortfalls if shortfall is not None]
