"""GatedCascade: a small network decides what is easy, a heatmap model the rest."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, clone

from anomalib_lite._validation import check_choice, check_labels
from anomalib_lite.cascade._checks import (
    MAPS,
    check_parameters,
    check_thresholds,
    classes,
    parts_of,
    thresholds_of,
)
from anomalib_lite.cascade._fitting import learn_cascade, open_gate
from anomalib_lite.cascade.gate import Gate
from anomalib_lite.cascade.routing import (
    Routing,
    calibrate_routing,
    choose_t_low,
    leaves_false_alarms,
)
from anomalib_lite.cascade.sweep import Sweep, sweep_routings
from anomalib_lite.detectors import BaseDetector, Detections, DetectorMixin
from anomalib_lite.embeddings import stack
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import (
    CalibrationWarning,
    InvalidValueError,
    NotFittedError,
)
from anomalib_lite.images import ImageSource

__all__ = ["CascadeDetections", "GatedCascade"]

_WHERE = "GatedCascade"
_REMEDY = "Raise max_missed, or set t_low."
# Fitted attributes of held-out images, which a file holds under these names without the "_".
_HELD_OUT = (
    "calibration_probabilities_",
    "calibration_detector_scores_",
    "anomaly_probabilities_",
    "anomaly_detector_scores_",
)


@dataclass(frozen=True)
class CascadeDetections(Detections):
    """What a :class:`~anomalib_lite.GatedCascade` says of each image.

    ``scores`` lie in [0, 1]. ``maps`` has the heatmap model's heatmaps, in its own units, and None
    for each image that it did not see.

    Attributes
    ----------
    routes : ndarray of shape (N,), str
        Who decided: ``"gate_normal"``, ``"gate_anomalous"``, ``"detector"``; or ``"skipped"``.
    probabilities : ndarray of shape (N,), float64
        The gate's, of an anomaly; NaN for an image that was skipped.
    """

    routes: np.ndarray = field(default_factory=lambda: np.empty(0, "<U14"))
    probabilities: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def heatmap_call_rate(self) -> float:
        """Share of the images, without those skipped, that the heatmap model had to decide."""
        seen = self.routes[self.routes != "skipped"]
        return float(np.mean(seen == "detector")) if seen.size else float("nan")


class GatedCascade(DetectorMixin, BaseEstimator):
    """A cheap gate decides about clear images, a heatmap model about the rest.

    Parameters
    ----------
    gate : str, torch.nn.Module or BaseDetector, default="efficientnet_lite0"
        A backbone, as in :class:`~anomalib_lite.PatchCore`, or an unfitted detector, whose score
        a logistic regression judges.
    detector : BaseDetector, optional
        The heatmap model, unfitted; by default ``PatchCore()`` with the device, engine, batch size
        and the like of the cascade.
    training : {"head", "finetune"}, default="head"
        How a gate that is a network learns: whitened patches of the frozen network are judged by
        a logistic regression, or the network's own weights learn too, by
        :func:`~anomalib_lite.cascade._finetuning.finetune_gate`.
    epochs : int, default=20
        Of ``training="finetune"``.
    t_low, t_high : float, optional
        In [0, 1]. The gate calls an image normal below ``t_low``, anomalous above ``t_high``, and
        leaves it to the heatmap model between. By default both are chosen by ``fit``.
    max_missed : float, default=0.01
        Share of anomalous images that the gate may lose, in (0, 1): call normal, where the heatmap
        model would have found them. ``t_low`` keeps it with 95 % confidence, for anomalies such
        as those held out.
    false_alarm_rate : float, default=0.01
        Share of future normal images that gate and heatmap model together may call anomalous,
        in (0, 1).
    calibration : {"temperature", "isotonic"}, default="temperature"
        How the gate's output becomes a probability, on held-out images.
    class_weight : {"balanced"}, dict or None, default="balanced"
        Of the classes 0 (normal) and 1 in the gate, as in scikit-learn.
    maps : {"escalated", "always"}, default="escalated"
        For which images :meth:`detect` makes heatmaps: those that the heatmap model decides, or
        all, which costs what the heatmap model alone would.
    weights : str or Path, optional
        Weights file of the gate's backbone, if ``gate`` is a timm name.
    image_size : int or (int, int), default=160
        Of the gate; the heatmap model has its own.
    device, dtype, engine, batch_size, on_error, max_pixels, verbose
        Of the gate, as in :class:`~anomalib_lite.PatchCore`; detectors that are given have their
        own.
    random_state : int, RandomState or None, default=0
        Seed of what is held out, of synthetic anomalies, and of ``training="finetune"``.

    Attributes
    ----------
    detector_ : BaseDetector
        The fitted heatmap model.
    gate_ : Gate
        The fitted gate: its ``backbone`` or ``detector``, its ``head``, its ``probability``, and
        the ``history`` of its tuning.
    routing_ : Routing
        ``t_low``, ``t_high`` and the ``threshold`` of the heatmap model.
    threshold_ : float
        0.5. An image with a larger score is called anomalous.
    calibration_probabilities_, calibration_detector_scores_ : ndarray of shape (n,), float64
        Of the normal images held out for the thresholds.
    anomaly_probabilities_, anomaly_detector_scores_ : ndarray of shape (m,), float64
        Of the anomalies held out for ``t_low``. A score is NaN where the gate was too sure for it
        to matter.
    synthetic_ : bool
        Whether these anomalies were made, as labelled ones were none or too few.
    skipped_ : list of (str, str)
        Name and reason of each training image that the gate left out.

    Notes
    -----
    A fifth to half of the normal images, as many as ``false_alarm_rate`` needs, are held out for
    the thresholds. The heatmap model is fitted on the others; so is the gate, but for a quarter of
    them that calibrate its probability. What the gate sees of an image is told at ``Whitening`` in
    :mod:`anomalib_lite.cascade.gate`, why the rates hold and what the score means at
    ``calibrate_routing``, ``choose_t_low`` and ``Routing`` in
    :mod:`anomalib_lite.cascade.routing`.

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
            0 for normal, 1 for anomalous. The gate learns to tell them apart; the heatmap model
            is fitted on normal images alone. Where there are no anomalies, or fewer than twice
            what ``max_missed`` needs, more are made from the normal images by
            :class:`~anomalib_lite.synthetic.SyntheticAnomalies`.
        groups : sequence of N int or str, optional
            Which part each image shows, as in scikit-learn's splitters; normal ones of at least 8
            parts. Where a part is photographed several times, images held out would else be near
            copies of those learned from, and the thresholds too low for parts to come.

        Returns
        -------
        GatedCascade
            Itself; in case of an error as it was.

        Raises
        ------
        AnomalibLiteError
            For a parameter or an image that cannot be used, or for too few images.

        Warns
        -----
        CalibrationWarning
            If there are too few normal images for ``false_alarm_rate``, or too few anomalies for
            ``max_missed``.
        """
        check_parameters(self)
        source = ImageSource(images, max_pixels=self.max_pixels, where=_WHERE)
        parts = parts_of(groups, len(source))
        fitted = learn_cascade(self, source, *classes(images, y, len(source)), parts)
        routing = self._route(fitted, self.t_low, self.t_high)
        self.__dict__.update(fitted, routing_=routing, threshold_=0.5)
        return self

    def set_thresholds(self, t_low: float | None = None, t_high: float | None = None) -> Self:
        """Take other thresholds of the gate, without fitting again.

        Parameters
        ----------
        t_low, t_high : float, optional
            As the parameters of the class, which they become; None is automatic. The threshold of
            the heatmap model follows, so that ``false_alarm_rate`` holds.

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
        """
        self._check_fitted()
        check_thresholds(t_low, t_high)
        self.routing_ = self._route(vars(self), t_low, t_high)
        self.t_low, self.t_high = t_low, t_high
        return self

    def detect(self, images: Any, *, maps: str | bool | None = None) -> CascadeDetections:
        """Scores, labels, routes and heatmaps.

        Parameters
        ----------
        images
            As in :meth:`fit`.
        maps : {"escalated", "always"} or bool, optional
            For which images heatmaps are wanted: False is none, True is ``"always"``. By default
            what the parameter ``maps`` of the class says.

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
        features, skipped = self.gate_.features(source, self)
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
            labels=~(scores <= self.threshold_),  # NaN is not known to be good
            maps=None if wanted == "none" else stack(heatmaps),
            names=source.names,
            skipped=sorted(skipped),
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
        """What this cascade would do at other thresholds of its gate.

        Parameters
        ----------
        images
            As in :meth:`fit`; not those that it was fitted on.
        y : array of shape (N,)
            0 for normal, 1 for anomalous.
        t_low, t_high : sequences of float in [0, 1], optional
            By default what it has now, 0 and 1, and what parts the images' probabilities by
            tenths. All pairs with ``t_low <= t_high`` are judged. Each has the threshold of the
            heatmap model that :meth:`set_thresholds` would give it.

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
        lows, highs = (thresholds_of(values) for values in (t_low, t_high))
        started = time.perf_counter()
        p = self.gate_.probabilities(self.gate_.features(source, self)[0])
        gate_ms = 1000 * (time.perf_counter() - started) / len(p)
        usable = np.flatnonzero(~np.isnan(p))
        if not len(usable):
            raise InvalidValueError(f"{_WHERE}: sweep could use none of {len(p)} images.")
        tenths = np.quantile(p[usable], np.linspace(0.1, 0.9, 9)).tolist()
        lows = sorted({0.0, self.routing_.t_low, *tenths}) if lows is None else lows
        highs = sorted({1.0, self.routing_.t_high, *tenths}) if highs is None else highs
        pairs = [(low, high) for low in lows for high in highs if low <= high]
        if not pairs:
            raise InvalidValueError(
                f"{_WHERE}: t_low and t_high must have a pair with t_low <= t_high, got {t_low!r} "
                f"and {t_high!r}."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # one a pair would say nothing
            routings = [self._route(vars(self), low, high) for low, high in [*pairs, (0.0, 1.0)]]
        s, detector_started = np.full(len(p), np.nan), time.perf_counter()
        s[usable] = self.detector_.detect(source.take(usable), maps=False).scores
        detector_ms = 1000 * (time.perf_counter() - detector_started) / len(usable)
        kept = ~np.isnan(s)
        if not kept.any():
            raise InvalidValueError(f"{_WHERE}: sweep could use none of {len(p)} images.")
        return sweep_routings(
            routings[:-1],
            *(p[kept], s[kept], truth[kept]),
            gate_ms=gate_ms,
            detector_ms=detector_ms,
            keeps_rate=[
                leaves_false_alarms(self.calibration_probabilities_, self.false_alarm_rate, high)
                for _, high in pairs
            ],
            alone=routings[-1],
        )

    @property
    def _map_threshold(self) -> float:
        return self.routing_.threshold

    def _members(self) -> dict[str, DetectorMixin]:
        members = {"detector": self.detector_, "gate": self.gate_.detector}
        return {name: fitted for name, fitted in members.items() if fitted is not None}

    def _fitted_backbone(self) -> AnyBackbone | None:
        backbone: AnyBackbone | None = self.gate_.backbone
        return backbone

    def _open_backbone(self, **instead: Any) -> AnyBackbone:
        return open_gate(self, **instead)

    def _take_backbone(self, backbone: AnyBackbone) -> None:
        self.gate_.backbone = backbone

    def _describe(self, include_backbone: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        # FinetuningResult weights exist nowhere else.
        return super()._describe(include_backbone or bool(self.gate_.history))

    def _plain_parameters(self) -> dict[str, Any]:
        parameters = super()._plain_parameters() | {"detector": None}
        if isinstance(self.gate, BaseDetector):
            parameters["gate"] = None
        if isinstance(self.class_weight, dict):  # JSON has no numbers as keys
            parameters["class_weight"] = list(self.class_weight.items())
        return parameters

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, gate = self.gate_.to_arrays()
        arrays |= {name.rstrip("_"): getattr(self, name) for name in _HELD_OUT}
        return arrays, {
            "gate": gate,
            "routing": {name: float(value) for name, value in vars(self.routing_).items()},
            "detector_given": self.detector is not None,
            "synthetic": bool(self.synthetic_),
        }

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        self.gate_ = Gate.from_arrays(arrays, state["gate"])
        self.routing_ = Routing(**{name: float(v) for name, v in state["routing"].items()})
        self.synthetic_ = bool(state["synthetic"])
        for name in _HELD_OUT:
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
        cascade.detector_, cascade.gate_.detector = members["detector"], members.get("gate")
        return cascade

    def _check_fitted(self) -> None:
        if not hasattr(self, "routing_"):
            raise NotFittedError(f"{_WHERE}: not fitted yet. Call fit(images) first.")

    def _route(
        self, fitted: Mapping[str, Any], t_low: float | None, t_high: float | None
    ) -> Routing:
        """The routing for thresholds that are given or, where they are None, found."""
        normal = fitted["calibration_probabilities_"], fitted["calibration_detector_scores_"]
        low = t_low
        if low is None:
            anomalous = fitted["anomaly_probabilities_"], fitted["anomaly_detector_scores_"]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)  # once is enough: below
                routing = calibrate_routing(*normal, self.false_alarm_rate, t_high=t_high)
            low = choose_t_low(*anomalous, routing, self.max_missed, _REMEDY)
        return calibrate_routing(*normal, self.false_alarm_rate, t_low=low, t_high=t_high)
