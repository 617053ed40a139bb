"""What a detector says of images, and what all detectors share."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import NotFittedError
from anomalib_lite.model_file import ADAPTER, BACKBONE, VERSIONS, to_json, write_model

__all__ = ["Detections", "DetectorMixin"]


@dataclass(frozen=True)
class Detections:
    """What a detector says of each image, in the order in which the images were given.

    Attributes
    ----------
    scores : ndarray of shape (N,), float32
        Higher is more anomalous; raw units (a distance). NaN for an image that was skipped.
    labels : ndarray of shape (N,), bool
        True where the score exceeds ``threshold_``: anomalous. Also True for an image that was
        skipped, since nothing shows that it is good.
    maps : ndarray of shape (N, H, W), float32, or list of N arrays (H, W), or None
        Heatmaps at the images' own sizes, in the units of the scores; a list where sizes
        differ or an image was skipped (its entry is None). None if they were not asked for.
    names : list of str
        The image's path, or ``images[i]``.
    skipped : list of (int, str)
        Position and reason of every image left out; only with ``on_error="skip"``.
    """

    scores: np.ndarray
    labels: np.ndarray
    maps: Any
    names: list[str]
    skipped: list[tuple[int, str]] = field(default_factory=list)


class DetectorMixin(ABC):
    """What every detector answers, all of it from one ``detect(images)``."""

    threshold_: float
    skipped_: list[tuple[str, str]]
    batch_size: int
    max_pixels: int
    on_error: str
    verbose: int
    _network: ClassVar[str] = "backbone"  # the parameter that names the network
    _threshold_range: ClassVar[str] = "[0, inf)"  # values that threshold_ may have
    _routes: ClassVar[tuple[str, ...]] = ()  # models that decide, if there are several

    @abstractmethod
    def detect(self, images: Any, *, maps: Any = True) -> Detections:
        """Scores, labels and, if wanted, heatmaps."""

    def score(self, images: Any) -> np.ndarray:
        """How anomalous each image is: higher is more anomalous.

        Note that scikit-learn's outlier detectors have it the other way round; that direction is
        :meth:`score_samples`.

        Parameters
        ----------
        images
            As in :meth:`fit`.

        Returns
        -------
        ndarray of shape (N,), float32
            An image is called anomalous above ``threshold_``. Raw units (a distance); of a
            cascade, in [0, 1].

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        AnomalibLiteError
            For an image that cannot be used, unless ``on_error="skip"``: its score is NaN then.
        """
        return self.detect(images, maps=False).scores

    def anomaly_map(self, images: Any) -> Any:
        """Where each image is anomalous.

        Parameters
        ----------
        images
            As in :meth:`fit`.

        Returns
        -------
        ndarray of shape (N, H, W), float32, or list of N arrays (H, W)
            At the images' own sizes, in the units of the scores; a list where sizes differ.

        Raises
        ------
        NotFittedError, AnomalibLiteError
            As :meth:`score`.
        """
        return self.detect(images, maps=True).maps

    def predict(self, images: Any) -> np.ndarray:
        """+1 for normal, -1 for anomalous (or skipped), as in scikit-learn: (N,) int64."""
        return np.where(self.detect(images, maps=False).labels, -1, 1)

    def score_samples(self, images: Any) -> np.ndarray:
        """The negative of :meth:`score`: scikit-learn's direction, higher is more normal.

        Takes images as :meth:`fit` does and gives an ndarray of shape (N,), float32.
        """
        return -self.score(images)

    def decision_function(self, images: Any) -> np.ndarray:
        """``threshold_ - score``: negative is anomalous, as in scikit-learn.

        Takes images as :meth:`fit` does and gives an ndarray of shape (N,), float32.
        """
        scores = self.score(images)
        return np.float32(self.threshold_) - scores

    def save(self, path: str | os.PathLike[str], *, include_backbone: bool = False) -> None:
        """Write everything that scoring needs into one safetensors file.

        Parameters
        ----------
        path : str or Path
            Written beside its place under another name, then renamed: a crash leaves an older
            file whole.
        include_backbone : bool, default=False
            Put the weights of the backbone (of a cascade, of both) into the file too, so that it
            can be loaded where they are not to be had (no network, no weights file).

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        InvalidValueError
            If a parameter is an object that JSON cannot hold, such as a ``RandomState``.
        OutputError
            If the file cannot be written.

        Notes
        -----
        The file is a safetensors file. Its metadata have one key, ``anomalib_lite``, which holds
        JSON: ``format_version``, ``library_version``, ``detector`` (class name), ``parameters``
        (every constructor argument), ``backbone`` (layers, stride, mean and deviation of the
        pixels, number type, engine, SHA-256 of the weights, and ``adapter`` if there is one; null
        after ``fit_embeddings``) and ``state`` (threshold and the rest). Its tensors are
        ``calibration_scores`` (n,) and the detector's arrays: for PatchCore ``embeddings`` (M, D)
        float32, and ``index``, the bytes of a trained FAISS index, unless it is ``"flat"``; for
        PaDiM ``mean`` (P, d) and ``factors`` (P, d (d + 1) / 2), float32, and ``components``;
        those of an adapter begin with ``adapter.``. A cascade has the header of each of its
        members under ``parts``, and their tensors after ``detector.`` and ``gate.``. The weights
        of a gate that was tuned are always in the file.

        Examples
        --------
        See :func:`~anomalib_lite.load`.
        """
        name = type(self).__name__
        if not hasattr(self, "threshold_"):
            raise NotFittedError(f"{name}: not fitted yet. Call fit(images) before save.")
        write_model(path, *self._describe(include_backbone), name)

    @abstractmethod
    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what a file must hold beside the parameters and the threshold: arrays, JSON."""

    @abstractmethod
    def _fitted_backbone(self) -> AnyBackbone | None:
        """Return the backbone that this detector was fitted with, without those of its members."""

    def _members(self) -> dict[str, DetectorMixin]:
        """Return the fitted detectors inside this one by name; each has options of its own."""
        return {}

    @property
    def _map_threshold(self) -> float:
        """The threshold in the units of the heatmaps."""
        return float(self.threshold_)

    def _with_options(self, **options: Any) -> Self:
        """Return a copy with other options, also in its members; it shares all fitted state."""
        other = copy.copy(self)
        vars(other).update(options)
        return other

    def _summary_lines(self) -> list[tuple[str, str]]:
        """Return lines about what was learned, each as (title, text)."""
        return []

    def _describe(self, include_backbone: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what a file holds of this detector: tensors by name, and the header as JSON."""
        name = type(self).__name__
        arrays, state = self._get_state()
        tensors: dict[str, Any] = {key: np.ascontiguousarray(a) for key, a in arrays.items()}
        header: dict[str, Any] = {
            **VERSIONS,
            "detector": name,
            "parameters": {k: to_json(k, v, name) for k, v in self._plain_parameters().items()},
            "backbone": None,
            "state": {"threshold": float(self.threshold_), **state},
        }
        if hasattr(self, "skipped_"):
            header["state"]["skipped"] = self.skipped_
        backbone = self._fitted_backbone()
        if backbone is not None:
            with_weights = include_backbone or self._weights_exist_here_alone()
            more, header["backbone"] = _describe_backbone(backbone, with_weights)
            tensors |= more
        for member, fitted in self._members().items():
            own, header.setdefault("parts", {})[member] = fitted._describe(include_backbone)
            tensors |= {f"{member}.{key}": tensor for key, tensor in own.items()}
        return tensors, header

    def _weights_exist_here_alone(self) -> bool:
        """Tell whether the backbone's weights must be saved because they exist nowhere else."""
        return False

    def _plain_parameters(self) -> dict[str, Any]:
        """Return the constructor's arguments without those that the members describe."""
        parameters: dict[str, Any] = self.get_params(deep=False)  # type: ignore[attr-defined]
        return parameters

    @classmethod
    def _restore(
        cls,
        parameters: dict[str, Any],
        arrays: dict[str, np.ndarray],
        state: dict[str, Any],
        members: dict[str, Any],
    ) -> Self:
        """Return the detector that :meth:`_describe` took apart, but for its backbone.

        KeyError, TypeError or ValueError if something is missing or does not fit.
        """
        detector = cls(**parameters)
        detector._set_state(arrays, state)
        detector.threshold_ = float(state["threshold"])
        if "skipped" in state:
            detector.skipped_ = [tuple(entry) for entry in state["skipped"]]
        return detector

    @abstractmethod
    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Become fitted from what :meth:`_get_state` gave; ValueError if it does not fit."""


def _describe_backbone(
    backbone: AnyBackbone, include_weights: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ("layers", "stride", "mean", "std", "engine", "sha256")
    header = {key: getattr(backbone, key) for key in names}
    header["dtype"] = str(backbone.dtype).removeprefix("torch.")
    tensors: dict[str, Any] = {}
    if backbone.adapter is not None:
        factors, header["adapter"] = backbone.adapter.to_arrays()
        tensors |= {ADAPTER + k: v for k, v in factors.items()}
    if include_weights:
        tensors |= {BACKBONE + k: v for k, v in backbone.original_state().items()}
    return tensors, header
