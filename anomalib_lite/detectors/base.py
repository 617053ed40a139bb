"""The pipeline that all detectors share: images -> embeddings -> scores, maps, labels."""

from __future__ import annotations

import copy
import os
from abc import ABCMeta, abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from tqdm import tqdm

from anomalib_lite._validation import (
    check_choice,
    check_embeddings,
    check_image_size,
    check_int,
    check_number,
    check_seed,
    normal_indices,
)
from anomalib_lite.anomaly_map import anomaly_maps
from anomalib_lite.calibration import calibration_size, conformal_threshold
from anomalib_lite.detectors.detections import Detections
from anomalib_lite.detectors.embeddings import Embeddings, gather, stack, stack_embeddings, take
from anomalib_lite.engines import ENGINES, FUSIONS, AnyBackbone, open_backbone
from anomalib_lite.errors import InvalidValueError, NotFittedError
from anomalib_lite.images import ImageSource, iter_batches

__all__ = ["BaseDetector"]

CALIBRATIONS = ("split", "leave_one_out")


class BaseDetector(BaseEstimator, metaclass=ABCMeta):
    """Base of all detectors: a subclass says how to fit on embeddings and how to score them.

    Subclasses store the parameters that :class:`~anomalib_lite.PatchCore` documents, and
    implement :meth:`_fit_patches` and :meth:`_score_patches`; :meth:`_check_parameters` and
    :meth:`_absorb` where they have something to add.
    """

    def fit(self, images: Any, y: Any = None) -> Self:
        """Learn what normal looks like, and calibrate the threshold.

        Parameters
        ----------
        images : directory, list of paths, PIL images, arrays, tensors, or data set samples
            Normal images; see :class:`~anomalib_lite.images.ImageSource` for all that is
            understood.
        y : array of shape (N,), optional
            0 (or False) for normal, 1 (or True) for anomalous. Anomalous images are left out.

        Returns
        -------
        BaseDetector
            Itself.

        Raises
        ------
        AnomalibLiteError
            For a parameter or an image that cannot be used; see
            :mod:`anomalib_lite.errors` for its kinds. A detector that was fitted before stays
            as it was.

        Warns
        -----
        CalibrationWarning
            If there are too few images to guarantee ``false_alarm_rate``.
        """
        self._check_parameters()
        where = type(self).__name__
        source = ImageSource(images, max_pixels=self.max_pixels, where=where)
        if y is not None:
            source = source.take(normal_indices(y, len(source), where))
        elif isinstance(images, list | tuple) and any(getattr(item, "label", 0) for item in images):
            raise InvalidValueError(
                f"{where}: images holds samples labelled anomalous; fit takes normal images only. "
                "Use dataset.train, or pass y=[sample.label for sample in samples]."
            )
        backbone = open_backbone(
            self.backbone,
            weights=self.weights,
            layers=self.layers,
            fusion=self.fusion,
            device=self.device,
            dtype=self.dtype,
            engine=self.engine,
            where=where,
        )
        check_image_size(self.image_size, where, stride=backbone.stride)
        random = check_random_state(self.random_state)
        order = self._order(len(source), random)
        skipped: list[tuple[int, str]] = []
        batches = self._embed(backbone, source.take(order), "fit", skipped)
        embeddings = gather(len(source), ((batch.indices, E) for batch, E in batches))
        if len(embeddings) == 0:
            raise InvalidValueError(
                f"{where}: none of {len(source)} images could be used; the first: {skipped[0][1]}"
            )
        self._fit_and_calibrate(embeddings, random)
        self._take_backbone(backbone)
        self.skipped_ = [(source.names[i], r) for i, r in sorted((order[i], r) for i, r in skipped)]
        return self

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
            Raw units (a distance); an image is called anomalous above ``threshold_``.

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
        return self.detect(images).maps

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

    def detect(self, images: Any, *, maps: bool = True) -> Detections:
        """Scores, heatmaps and labels, from one pass through the backbone.

        Parameters
        ----------
        images
            As in :meth:`fit`.
        maps : bool, default=True
            Whether heatmaps are wanted; they take (H, W) floats an image.

        Returns
        -------
        Detections

        Raises
        ------
        NotFittedError, AnomalibLiteError
            As :meth:`score`.
        """
        if not hasattr(self, "backbone_"):
            raise NotFittedError(
                f"{type(self).__name__}: not fitted on images yet. Call fit(images) first"
                + ("; after fit_embeddings use score_embeddings." * hasattr(self, "threshold_"))
            )
        source = ImageSource(images, max_pixels=self.max_pixels, where=type(self).__name__)
        scores = np.full(len(source.items), np.nan, np.float32)
        heatmaps: list[Any] = [None] * len(source.items)
        skipped: list[tuple[int, str]] = []
        for batch, embeddings in self._embed(self.backbone_, source, "score", skipped):
            patch_scores, scores[batch.indices] = self._score_patches(embeddings)
            if maps:
                input_size = batch.pixels.shape[1:3]
                made = anomaly_maps(patch_scores, input_size, batch.sizes, self.smoothing)
                for index, heatmap in zip(batch.indices, made, strict=True):
                    heatmaps[index] = heatmap
        labels = ~(scores <= self.threshold_)  # NaN is not known to be good
        return Detections(scores, labels, stack(heatmaps) if maps else None, source.names, skipped)

    def fit_embeddings(self, E: Any, y: object = None) -> Self:
        """:meth:`fit` for those who bring their own patch embeddings.

        Parameters
        ----------
        E : array of shape (N, h, w, D), float32
            Of N normal images; or a list of N arrays (h, w, D).
        y : ignored

        Returns
        -------
        BaseDetector
            Itself; only :meth:`score_embeddings` can be asked then.

        Raises
        ------
        AnomalibLiteError
            For a parameter that cannot be used, or embeddings of another shape or not finite.
        """
        self._check_parameters()
        E = check_embeddings(E, type(self).__name__)
        random = check_random_state(self.random_state)
        self._fit_and_calibrate(take(E, self._order(len(E), random)), random)
        for fitted_on_images in ("backbone_", "dtype_", "engine_", "skipped_"):
            self.__dict__.pop(fitted_on_images, None)
        return self

    def score_embeddings(self, E: Any) -> np.ndarray:
        """:meth:`score` for those who bring their own patch embeddings.

        Parameters
        ----------
        E : array of shape (N, h, w, D), float32, or a list of N arrays (h, w, D)

        Returns
        -------
        ndarray of shape (N,), float32

        Raises
        ------
        NotFittedError
            Before :meth:`fit_embeddings` or :meth:`fit`.
        AnomalibLiteError
            For embeddings of another shape or dimension, or not finite.
        """
        if not hasattr(self, "threshold_"):
            raise NotFittedError(
                f"{type(self).__name__}: not fitted yet. Call fit_embeddings(E) or fit(images)."
            )
        return self._image_scores(check_embeddings(E, type(self).__name__, self.n_features_))

    def save(self, path: str | os.PathLike[str], *, include_backbone: bool = False) -> None:
        """Write everything that scoring needs into one safetensors file.

        Parameters
        ----------
        path : str or Path
            Written beside its place under another name, then renamed: a crash leaves an older
            file whole.
        include_backbone : bool, default=False
            Put the weights of the backbone into the file too, so that it can be loaded where
            they are not to be had (no network, no weights file).

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        OutputError
            If the file cannot be written.
        """
        from anomalib_lite.persistence import save  # it knows all detectors, so it comes after

        save(self, path, include_backbone=include_backbone)

    @abstractmethod
    def _fit_patches(self, E: Embeddings, random: np.random.RandomState) -> None:
        """Learn from the embeddings of normal images."""

    @abstractmethod
    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, h, w, D) -> patch scores (B, h, w) and image scores (B,), both float32."""

    @abstractmethod
    def _score_left_out(self, E: Embeddings) -> np.ndarray:
        """Score (N,) each image that was fitted on as if it had not been."""

    @abstractmethod
    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What a file must hold beside the parameters and the threshold: arrays, and JSON."""

    @abstractmethod
    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Become fitted from what :meth:`_get_state` gave; ValueError if it does not fit."""

    def _absorb(self, E: Embeddings, random: np.random.RandomState) -> None:
        """Learn from the calibration images too, where no score can rise by it."""

    def _check_parameters(self) -> None:
        where = type(self).__name__
        check_choice("fusion", self.fusion, FUSIONS, where)
        check_choice("engine", self.engine, ENGINES, where)
        check_choice("calibration", self.calibration, CALIBRATIONS, where)
        check_choice("on_error", self.on_error, ("raise", "skip"), where)
        check_int("batch_size", self.batch_size, where, low=1)
        check_int("max_pixels", self.max_pixels, where, low=1)
        check_number("smoothing", self.smoothing, where, "[0, 1000]")
        check_number("false_alarm_rate", self.false_alarm_rate, where, "(0, 1)")
        check_image_size(self.image_size, where)
        check_seed(self.random_state, where)

    def _take_backbone(self, backbone: AnyBackbone) -> None:
        self.backbone_ = backbone
        self.engine_ = backbone.engine
        self.dtype_ = str(backbone.dtype).removeprefix("torch.")

    def _order(self, n: int, random: np.random.RandomState) -> np.ndarray:
        """The images, those to be held back for calibration last."""
        return np.arange(n) if self.calibration == "leave_one_out" else random.permutation(n)

    def _n_held_back(self, n: int) -> int:
        """As many as the rate needs; at least a fifth and at most half of ``n`` images."""
        if self.calibration == "leave_one_out":
            return 0
        return min(max(calibration_size(self.false_alarm_rate), n // 5), n // 2)

    def _embed(
        self,
        backbone: AnyBackbone,
        source: ImageSource,
        purpose: str,
        skipped: list[tuple[int, str]],
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Batches of images, each with its patch embeddings (B, h, w, D)."""
        n, quiet = len(source.items), None if self.verbose else True  # None: in a terminal only
        with tqdm(total=n, desc=purpose, unit="image", leave=False, disable=quiet) as bar:
            for batch in iter_batches(
                source,
                image_size=self.image_size,
                stride=backbone.stride,
                batch_size=self.batch_size,
                on_error=self.on_error,
                skipped=skipped,
            ):
                embeddings = backbone.embed(batch.pixels)
                if not np.isfinite(embeddings).all():
                    raise InvalidValueError(
                        f"{type(self).__name__}: the backbone gives NaN or infinity in "
                        f"{backbone.dtype}. Use dtype='float32'."
                    )
                yield batch, embeddings
                bar.update(len(batch.pixels))

    def _fit_and_calibrate(self, E: Embeddings, random: np.random.RandomState) -> None:
        n_to_fit = len(E) - self._n_held_back(len(E))
        held_back: Any = E[n_to_fit:]
        if isinstance(E, list):  # moved, so that nothing is in memory twice
            del E[n_to_fit:]
            E, held_back = stack_embeddings(E), stack_embeddings(held_back)
        else:
            E = E[:n_to_fit]
        fresh = copy.copy(self)  # until all has gone well, what was fitted before stays
        fresh._fit_patches(E, random)
        if self.calibration == "leave_one_out":
            fresh.calibration_scores_ = fresh._score_left_out(E)
        else:
            fresh.calibration_scores_ = fresh._image_scores(held_back)
        fresh.threshold_ = conformal_threshold(fresh.calibration_scores_, self.false_alarm_rate)
        if len(held_back):
            fresh._absorb(held_back, random)
        self.__dict__.update(fresh.__dict__)

    def _image_scores(self, E: Embeddings) -> np.ndarray:
        # A few at a time: the search makes arrays of its own.
        step = self.batch_size if isinstance(E, np.ndarray) else 1
        parts = [
            self._score_patches(np.ascontiguousarray(E[i : i + step]))[1]
            for i in range(0, len(E), step)
        ]
        return np.concatenate([np.empty(0, np.float32), *parts])
