"""What stands in front of a heatmap model: features of an image -> the probability of a defect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from tqdm import tqdm

from anomalib_lite._validation import check_choice
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.images import ImageSource, iter_batches

__all__ = ["CALIBRATIONS", "Gate", "Head", "Probability", "check_class_weight", "pooled_features"]

CALIBRATIONS = ("temperature", "isotonic")
# Of the logistic regression: features are many and images few.
_C = 0.01


def pooled_features(
    backbone: AnyBackbone,
    source: ImageSource,
    *,
    image_size: int | tuple[int, int],
    batch_size: int,
    on_error: str,
    verbose: int = 0,
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Mean and maximum over all positions of the patch embeddings of each image.

    Parameters
    ----------
    backbone : Backbone or CompiledBackbone
        Gives embeddings (B, h, w, D).
    source, image_size, batch_size, on_error
        As :func:`~anomalib_lite.images.iter_batches` has them.
    verbose : int, default=0
        Above 0, a progress bar in a terminal.

    Returns
    -------
    features : ndarray of shape (N, 2 D), float32
        A row of NaN for an image that was skipped.
    skipped : list of (int, str)
        Position and reason.

    Raises
    ------
    AnomalibLiteError
        For an image that cannot be used, unless it is skipped; for features that are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite.engines import open_backbone
    >>> backbone = open_backbone("efficientnet_lite0", engine="torch", device="cpu")
    >>> source = ImageSource(np.zeros((3, 64, 96, 3), np.uint8))
    >>> pooled_features(backbone, source, image_size=64, batch_size=2, on_error="raise")[0].shape
    (3, 304)
    """
    features: np.ndarray | None = None
    skipped: list[tuple[int, str]] = []
    quiet = None if verbose else True
    with tqdm(total=len(source), desc="gate", unit="image", leave=False, disable=quiet) as bar:
        for batch in iter_batches(
            source,
            image_size=image_size,
            stride=backbone.stride,
            batch_size=batch_size,
            on_error=on_error,
            skipped=skipped,
        ):
            E = backbone.embed(batch.pixels)  # (B, h, w, D)
            pooled = np.concatenate([E.mean(axis=(1, 2)), E.max(axis=(1, 2))], axis=1)
            if not np.isfinite(pooled).all():
                raise InvalidValueError(
                    f"{source.where}: the gate's backbone gives NaN or infinity in "
                    f"{backbone.dtype}. Use dtype='float32'."
                )
            if features is None:
                features = np.full((len(source), pooled.shape[1]), np.nan, np.float32)
            features[batch.indices] = pooled
            bar.update(len(pooled))
    if features is None:  # not one could be used
        features = np.full((len(source), 1), np.nan, np.float32)
    return features, skipped


@dataclass(frozen=True)
class Head:
    """A line through features: positive on the side of the anomalies.

    Attributes
    ----------
    weights : ndarray of shape (d,), float64
    bias : float
    """

    weights: np.ndarray
    bias: float

    @classmethod
    def fit(cls, X: np.ndarray, y: np.ndarray, class_weight: Any, where: str) -> Head:
        """Logistic regression on standardized features.

        Parameters
        ----------
        X : ndarray of shape (N, d)
        y : ndarray of shape (N,)
            0 for normal, 1 for anomalous.
        class_weight : "balanced", dict or None
            As in scikit-learn.
        where : str
            Who asks; the first word of error messages.

        Raises
        ------
        InvalidValueError
            If one class is missing: there is nothing to tell apart then.

        Examples
        --------
        >>> import numpy as np
        >>> X = np.array([[0.0], [1.0], [4.0], [5.0]])
        >>> head = Head.fit(X, np.array([0, 0, 1, 1]), "balanced", "example")
        >>> (head.logits(X) > 0).tolist()
        [False, False, True, True]
        """
        counts = np.bincount(np.asarray(y, int), minlength=2)
        if 0 in counts:
            raise InvalidValueError(
                f"{where}: a gate learns to tell normal images from anomalous ones and needs both, "
                f"got {counts[0]} normal and {counts[1]} anomalous. Give images of both in y, or "
                "leave out y: anomalies are then made from the normal images."
            )
        scaler = StandardScaler().fit(np.asarray(X, np.float64))
        line = LogisticRegression(C=_C, class_weight=class_weight, max_iter=5000)
        line.fit(scaler.transform(np.asarray(X, np.float64)), y)
        weights = line.coef_[0] / scaler.scale_
        return cls(weights, float(line.intercept_[0] - scaler.mean_ @ weights))

    def logits(self, X: np.ndarray) -> np.ndarray:
        """(N, d) -> (N,) float64, above 0 where an anomaly is likelier; NaN for rows of NaN."""
        # Not by a matrix product, whose bits depend on how many rows there are.
        products = np.asarray(X, np.float64) * self.weights
        return np.asarray(products.sum(axis=1) + self.bias)


@dataclass(frozen=True)
class Probability:
    """Logits -> probabilities, fitted on images that the line was not fitted on.

    Attributes
    ----------
    kind : {"temperature", "isotonic"}
    temperature : float
        Logits are divided by it.
    x, y : ndarray of shape (k,), float64
        Corners of the isotonic function of the logit.

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
    >>> fitted = Probability.fit("temperature", z, np.array([0, 0, 0, 1, 1, 1]), None)
    >>> bool(fitted.temperature > 1), fitted(np.array([0.0]))
    (True, array([0.5]))
    """

    kind: str
    temperature: float = 1.0
    x: np.ndarray = field(default_factory=lambda: np.empty(0))
    y: np.ndarray = field(default_factory=lambda: np.empty(0))

    @classmethod
    def fit(cls, kind: str, logits: np.ndarray, y: np.ndarray, class_weight: Any) -> Probability:
        """From held-out logits (n,) and labels (n,), weighted as the line was."""
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
        """(N,) -> (N,) float64 in [0, 1]; NaN stays NaN."""
        if self.kind == "isotonic":
            return np.asarray(np.interp(logits, self.x, self.y))
        return np.asarray(expit(logits / self.temperature))


@dataclass
class Gate:
    """Images -> features -> the probability of a defect.

    Attributes
    ----------
    backbone : Backbone or CompiledBackbone, optional
        What gives the features of an image, see :func:`pooled_features`;
    detector : BaseDetector, optional
        or what gives its score, which then is the only feature.
    head : Head
    probability : Probability
    history : list of dict
        Of a backbone that was tuned: see :class:`~anomalib_lite.detectors.gate_tuning.Tuned`.
        Empty, if it was not.
    """

    backbone: Any = None
    detector: Any = None
    head: Any = None
    probability: Any = None
    history: list[dict[str, float]] = field(default_factory=list)

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What a file must hold of it beside its backbone or detector: arrays, and JSON."""
        arrays = {"gate_weights": self.head.weights}
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
    def from_arrays(cls, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> Gate:
        """What :meth:`to_arrays` took apart; KeyError or ValueError where a part is missing."""
        head = Head(np.asarray(arrays["gate_weights"], np.float64), float(state["bias"]))
        probability = Probability(str(state["kind"]), float(state["temperature"]))
        if probability.kind == "isotonic":
            x, y = (np.asarray(arrays[name], np.float64) for name in ("gate_x", "gate_y"))
            if x.ndim != 1 or x.shape != y.shape or not len(x):
                raise ValueError(f"isotonic corners have shapes {x.shape} and {y.shape}")
            probability = Probability("isotonic", x=x, y=y)
        history = [dict(epoch) for epoch in state.get("history", [])]  # older files have none
        return cls(head=head, probability=probability, history=history)

    def features(
        self, source: ImageSource, options: Any
    ) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """(N, d) float32, rows of NaN for skipped images, and these; ``options`` is a cascade."""
        if self.detector is not None:
            found = self.detector.detect(source, maps=False)
            return found.scores[:, None], list(found.skipped)
        return pooled_features(
            self.backbone,
            source,
            image_size=options.image_size,
            batch_size=options.batch_size,
            on_error=options.on_error,
            verbose=options.verbose,
        )

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, d) -> (N,) float64 in [0, 1]; NaN for rows of NaN."""
        if np.isnan(features).all():  # not one image could be used, so d is not known
            return np.full(len(features), np.nan)
        return np.asarray(self.probability(self.head.logits(features)))


def check_class_weight(class_weight: Any, where: str) -> None:
    """Raise unless it is "balanced", None, or weights of the classes 0 and 1."""
    if class_weight is None:
        return
    if isinstance(class_weight, str):
        check_choice("class_weight", class_weight, ("balanced",), where)
        return
    if not isinstance(class_weight, Mapping):
        raise InvalidTypeError(
            f"{where}: class_weight must be 'balanced', None or a dict such as {{0: 1, 1: 5}}, got "
            f"{class_weight!r}."
        )
    numbers = [w for w in class_weight.values() if isinstance(w, int | float | np.number) and w > 0]
    if set(class_weight) != {0, 1} or len(numbers) != 2:
        raise InvalidValueError(
            f"{where}: class_weight must give a number above 0 for each of the classes 0 and 1, "
            f"got {class_weight!r}."
        )
