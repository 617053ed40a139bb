"""The gate: images -> features -> the probability of a defect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from anomalib_lite._validation import check_choice
from anomalib_lite.detectors import BaseDetector
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.gaussian import Gaussian, Moments
from anomalib_lite.images import Extractor, ImageSource

__all__ = [
    "PROBABILITY_CALIBRATIONS",
    "DetectorEncoder",
    "Gate",
    "LinearHead",
    "NetworkEncoder",
    "ProbabilityCalibrator",
    "SavedGate",
    "Whitening",
    "check_class_weight",
    "mean_max_pool",
    "sample_weights",
]

PROBABILITY_CALIBRATIONS = ("temperature", "isotonic")
# Inverse strength of the logistic regression's penalty: features are many and images few.
_C = 0.01
# Share of the logistic function in isotonic probabilities.
_LOGISTIC_SHARE = 1e-3
# Share of an image's patches that count as its farthest.
_FARTHEST = 0.05


@dataclass(frozen=True)
class Whitening:
    """Whitens patches, and summarizes how far those of an image are from normal ones.

    Attributes
    ----------
    center : ndarray of shape (D,), float32
    factor : ndarray of shape (D, D), float32
        For normal patches x, ``(x - center) @ factor`` has mean 0 and nearly no correlation.

    Notes
    -----
    For an image with whitened patches :math:`w_i` and distances :math:`d_i = |w_i|`, these 2 D + 4
    numbers are computed: the largest distance, the mean of the largest 5 %, the mean and the
    standard deviation of all; the root mean square of each component of w; the mean w of the 5 %
    of the patches that are farthest. The d are Mahalanobis distances from a Gaussian fitted as in
    Rippel, Mertens and Merhof, "Modeling the distribution of normal data in pre-trained deep
    features for anomaly detection", ICPR 2021. The d measure how unusual a patch is, the w in
    which direction.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite.gaussian import Moments
    >>> E = np.random.default_rng(0).normal(size=(8, 4, 6, 5)).astype("float32")
    >>> moments = Moments(5)
    >>> moments.add(E.reshape(-1, 5))
    >>> Whitening.fit(moments).summaries(E).shape
    (8, 14)
    """

    center: np.ndarray
    factor: np.ndarray

    @classmethod
    def fit(cls, normal: Moments) -> Whitening:
        """Fit a Gaussian to the sums over normal patches (n, D)."""
        gaussian = Gaussian().fit_moments(normal)
        center, factor = gaussian.location_, gaussian.whitening_
        return cls(center.astype(np.float32), factor.astype(np.float32))

    def summaries(self, E: np.ndarray) -> np.ndarray:
        """Summarize each image by the numbers in Notes: (B, h, w, D) -> (B, 2 D + 4) float32."""
        # One by one: the bits of a matrix product depend on how many rows there are.
        return np.stack([self._summary(e.reshape(-1, len(self.center))) for e in E])

    def _summary(self, patches: np.ndarray) -> np.ndarray:
        w = (patches - self.center) @ self.factor
        d = np.sqrt(np.einsum("nd,nd->n", w, w))
        far = np.argsort(-d, kind="stable")[: max(1, round(_FARTHEST * len(d)))]
        numbers = [d[far[0]], d[far].mean(), d.mean(), d.std()]
        return np.concatenate([numbers, np.sqrt((w**2).mean(axis=0)), w[far].mean(axis=0)])


def mean_max_pool(E: np.ndarray) -> np.ndarray:
    """Take mean and maximum over all positions: (B, h, w, D) -> (B, 2 D)."""
    return np.concatenate([E.mean(axis=(1, 2)), E.max(axis=(1, 2))], axis=1)


def sample_weights(n_normal: int, kinds: Sequence[int], class_weight: Any) -> np.ndarray:
    """Weight the classes as scikit-learn does, and each kind of anomalies equally.

    Parameters
    ----------
    n_normal : int
        Number of normal images.
    kinds : sequence of int
        Number of anomalies of each kind, such as labelled and synthetic ones.
    class_weight : "balanced", dict or None

    Returns
    -------
    ndarray of shape (N,), float64
        Weights of the normal images first, then of each kind of anomalies.

    Examples
    --------
    >>> sample_weights(4, [1, 3], "balanced").round(2).tolist()
    [1.0, 1.0, 1.0, 1.0, 2.0, 0.67, 0.67, 0.67]
    """
    n = sum(kinds)
    weights = compute_sample_weight(class_weight, np.repeat([0, 1], [n_normal, n]))
    weights[n_normal:] *= np.repeat([n / (len(kinds) * m) for m in kinds], kinds)
    return np.asarray(weights, np.float64)


@dataclass(frozen=True)
class LinearHead:
    """Linear classifier of features: a positive logit means anomalous.

    Attributes
    ----------
    weights : ndarray of shape (d,), float64
    bias : float
    """

    weights: np.ndarray
    bias: float

    @classmethod
    def fit(
        cls, normal: np.ndarray, anomalous: Sequence[np.ndarray], class_weight: Any, where: str
    ) -> LinearHead:
        """Fit a logistic regression on standardized features.

        Parameters
        ----------
        normal : ndarray of shape (n, d)
            Features of normal images.
        anomalous : sequence of ndarrays of shape (m, d)
            Features of each kind of anomalies, such as labelled and synthetic ones. All kinds
            count the same, however many images they have.
        class_weight : "balanced", dict or None
            Weights of the classes 0 and 1, as in scikit-learn.
        where : str
            The caller's name: the first word of error messages.

        Raises
        ------
        InvalidValueError
            If one class is missing.

        Examples
        --------
        >>> import numpy as np
        >>> normal, anomalous = np.array([[0.0], [1.0]]), np.array([[4.0], [5.0]])
        >>> head = LinearHead.fit(normal, [anomalous], "balanced", "example")
        >>> (head.logits(np.array([[1.0], [4.0]])) > 0).tolist()
        [False, True]
        """
        sizes = [len(kind) for kind in anomalous if len(kind)]
        if not len(normal) or not sizes:
            raise InvalidValueError(
                f"{where}: a gate learns to tell normal images from anomalous ones and needs both, "
                f"got {len(normal)} normal and {sum(sizes)} anomalous. Give images of both in y, "
                "or leave out y: anomalies are then made from the normal images."
            )
        X = np.concatenate([normal, *anomalous]).astype(np.float64)
        y = np.repeat([0, 1], [len(normal), sum(sizes)])
        weights = sample_weights(len(normal), sizes, class_weight)
        scaler = StandardScaler().fit(X)
        line = LogisticRegression(C=_C, max_iter=5000).fit(scaler.transform(X), y, weights)
        slopes = line.coef_[0] / scaler.scale_
        return cls(slopes, float(line.intercept_[0] - scaler.mean_ @ slopes))

    def logits(self, X: np.ndarray) -> np.ndarray:
        """Return (N,) float64 for features (N, d); NaN for rows of NaN."""
        # Not by a matrix product, whose bits depend on how many rows there are.
        products = np.asarray(X, np.float64) * self.weights
        return np.asarray(products.sum(axis=1) + self.bias)


@dataclass(frozen=True)
class ProbabilityCalibrator:
    """Turns logits into probabilities; fitted on images that the head was not fitted on.

    Attributes
    ----------
    kind : {"temperature", "isotonic"}
    temperature : float
        Divisor of the logits.
    x, y : ndarray of shape (k,), float64
        Corners of the isotonic function: logits and probabilities.

    Notes
    -----
    Temperature: Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks",
    ICML 2017; the targets are smoothed after Platt, "Probabilistic outputs for support vector
    machines", 1999, or perfectly separated images would drive T to 0. Isotonic: Zadrozny and
    Elkan, "Transforming classifier scores into accurate multiclass probability estimates",
    KDD 2002. Both never change the order of two images.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.array([-9.0, -6.0, 3.0, -3.0, 6.0, 9.0])
    >>> fitted = ProbabilityCalibrator.fit("temperature", z, np.array([0, 0, 0, 1, 1, 1]), None)
    >>> bool(fitted.temperature > 1), fitted(np.array([0.0]))
    (True, array([0.5]))
    """

    kind: str
    temperature: float = 1.0
    x: np.ndarray = field(default_factory=lambda: np.empty(0))
    y: np.ndarray = field(default_factory=lambda: np.empty(0))

    @classmethod
    def fit(
        cls, kind: str, logits: np.ndarray, y: np.ndarray, class_weight: Any
    ) -> ProbabilityCalibrator:
        """Fit on held-back logits (n,) and labels (n,), with the class weights of the head."""
        weights = compute_sample_weight(class_weight, y)
        if kind == "isotonic":
            line = IsotonicRegression(y_min=0, y_max=1).fit(logits, y, weights)
            return cls(kind, x=line.X_thresholds_, y=line.y_thresholds_)
        n_anomalous = int(np.sum(y))
        n_normal = len(y) - n_anomalous
        smoothed = np.where(y == 1, (n_anomalous + 1) / (n_anomalous + 2), 1 / (n_normal + 2))

        def loss(log_temperature: float) -> float:
            z = logits * np.exp(-log_temperature)
            entropy = smoothed * log_expit(z) + (1 - smoothed) * log_expit(-z)
            return -float(np.average(entropy, weights=weights))

        found = minimize_scalar(loss, bounds=(-7, 7), method="bounded")
        return cls(kind, temperature=float(np.exp(found.x)))

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities (N,), float64, for logits (N,); NaN stays NaN."""
        if self.kind == "isotonic":
            # Steps alone give many images the same probability, which no threshold can separate.
            steps = np.interp(logits, self.x, self.y)
            return np.asarray((1 - _LOGISTIC_SHARE) * steps + _LOGISTIC_SHARE * expit(logits))
        return np.asarray(expit(logits / self.temperature))


# Features (N, d) float32 of N images, with rows of NaN for those that were skipped; and position
# and reason of each of these.
Encoded = tuple[np.ndarray, list[tuple[int, str]]]


@dataclass(frozen=True)
class NetworkEncoder:
    """Turns images into features with a network.

    Attributes
    ----------
    extractor : Extractor
        Gives the patches of an image.
    whitening : Whitening or None
        Summarizes them. None for a finetuned network, for which :func:`mean_max_pool` does.
    """

    extractor: Extractor
    whitening: Whitening | None

    @property
    def backbone(self) -> AnyBackbone:
        """The network itself."""
        return cast("AnyBackbone", self.extractor.backbone)

    def __call__(self, source: ImageSource) -> Encoded:
        """Return features (N, d), float32, and which images were skipped."""
        found: np.ndarray | None = None
        skipped: list[tuple[int, str]] = []
        batches = self.extractor.embed_batches(source, skipped=skipped, progress="gate")
        for batch, E in batches:
            rows = mean_max_pool(E) if self.whitening is None else self.whitening.summaries(E)
            if found is None:
                found = np.full((len(source), rows.shape[1]), np.nan, np.float32)
            found[batch.indices] = rows
        if found is None:  # no image could be used, so d is not known
            found = np.full((len(source), 1), np.nan, np.float32)
        return found, skipped


@dataclass(frozen=True)
class DetectorEncoder:
    """Turns images into one feature: a detector's score."""

    detector: BaseDetector

    def __call__(self, source: ImageSource) -> Encoded:
        """Return scores (N, 1), float32, and which images were skipped."""
        found = self.detector.detect(source, maps=False)
        return found.scores[:, None], list(found.skipped)


@dataclass(frozen=True)
class Gate:
    """Turns images into features, and features into the probability of a defect.

    Attributes
    ----------
    encoder : NetworkEncoder or DetectorEncoder
    head : LinearHead
    probability : ProbabilityCalibrator
    history : list of dict
        Measurements of the finetuning, as in
        :class:`~anomalib_lite.cascade._finetuning.FinetuningResult`; empty for a frozen network.
    """

    encoder: NetworkEncoder | DetectorEncoder
    head: LinearHead
    probability: ProbabilityCalibrator
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def backbone(self) -> AnyBackbone | None:
        """The network that computes the features; None if a detector does."""
        return self.encoder.backbone if isinstance(self.encoder, NetworkEncoder) else None

    @property
    def detector(self) -> BaseDetector | None:
        """The detector that computes the feature; None if a network does."""
        return self.encoder.detector if isinstance(self.encoder, DetectorEncoder) else None

    def features(self, source: ImageSource) -> Encoded:
        """Return features (N, d), float32, and which images were skipped."""
        return self.encoder(source)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return (N,) float64 in [0, 1] for features (N, d); NaN for rows of NaN."""
        if np.isnan(features).all():  # no image could be used, so d is not known
            return np.full(len(features), np.nan)
        return np.asarray(self.probability(self.head.logits(features)))

    def to_save(self) -> SavedGate:
        """Return what a file holds of this gate."""
        whitening = self.encoder.whitening if isinstance(self.encoder, NetworkEncoder) else None
        return SavedGate(whitening, self.head, self.probability, self.history)


@dataclass(frozen=True)
class SavedGate:
    """Part of a :class:`Gate` that a file holds: all except its network or detector."""

    whitening: Whitening | None
    head: LinearHead
    probability: ProbabilityCalibrator
    history: list[dict[str, float]]

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return arrays by name, and the rest as JSON."""
        arrays = {"gate_weights": self.head.weights}
        if self.whitening is not None:
            arrays |= {"gate_center": self.whitening.center, "gate_factor": self.whitening.factor}
        if self.probability.kind == "isotonic":
            arrays |= {"gate_x": self.probability.x, "gate_y": self.probability.y}
        state = {
            "bias": self.head.bias,
            "kind": self.probability.kind,
            "temperature": self.probability.temperature,
            "history": self.history,
        }
        return arrays, state

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> SavedGate:
        """Read what :meth:`to_arrays` gave; KeyError or ValueError if something is missing."""
        head = LinearHead(np.asarray(arrays["gate_weights"], np.float64), float(state["bias"]))
        probability = ProbabilityCalibrator(str(state["kind"]), float(state["temperature"]))
        if probability.kind == "isotonic":
            x, y = (np.asarray(arrays[name], np.float64) for name in ("gate_x", "gate_y"))
            if x.ndim != 1 or x.shape != y.shape or not len(x):
                raise ValueError(f"isotonic corners have shapes {x.shape} and {y.shape}")
            probability = ProbabilityCalibrator("isotonic", x=x, y=y)
        whitening = None
        if "gate_center" in arrays:
            center, factor = (
                np.asarray(arrays[f"gate_{k}"], np.float32) for k in ("center", "factor")
            )
            if (
                factor.shape != (len(center), len(center))
                or len(head.weights) != 2 * len(center) + 4
            ):
                raise ValueError(
                    f"the gate's center and factor have shapes {center.shape} and {factor.shape}"
                )
            whitening = Whitening(center, factor)
        history = [dict(epoch) for epoch in state.get("history", [])]
        return cls(whitening, head, probability, history)


def check_class_weight(class_weight: Any, where: str) -> None:
    """Raise unless ``class_weight`` is "balanced", None, or weights of the classes 0 and 1."""
    if class_weight is None:
        return
    if isinstance(class_weight, str):
        check_choice("class_weight", class_weight, ("balanced",), where)
        return
    if not isinstance(class_weight, dict):
        raise InvalidTypeError(
            f"{where}: class_weight must be 'balanced', None or a dict such as {{0: 1, 1: 5}}, got "
            f"{class_weight!r}."
        )
    numbers = [
        w
        for w in class_weight.values()
        if isinstance(w, int | float | np.number) and 0 < w < np.inf
    ]
    if set(class_weight) != {0, 1} or len(numbers) != 2:
        raise InvalidValueError(
            f"{where}: class_weight must give a number above 0 for each of the classes 0 and 1, "
            f"got {class_weight!r}."
        )
