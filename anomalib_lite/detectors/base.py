"""The pipeline that all detectors share: images -> embeddings -> scores, maps, labels."""

from __future__ import annotations

import os
from abc import ABCMeta, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from tqdm import tqdm

from anomalib_lite._validation import check_choice, check_int, check_number
from anomalib_lite.anomaly_map import anomaly_maps
from anomalib_lite.backbones import ENGINES, Backbone
from anomalib_lite.calibration import calibration_size, conformal_threshold
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, NotFittedError
from anomalib_lite.fusion import STRATEGIES, patch_embeddings
from anomalib_lite.images import ImageSource, iter_batches

__all__ = ["BaseDetector", "Detections", "Embeddings"]

# (N, h, w, D) float32, or a list of N arrays (h, w, D) where images have different sizes.
Embeddings = np.ndarray | list[np.ndarray]

CALIBRATIONS = ("split", "leave_one_out")


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
            source = source.take(_normal_ones(y, len(source), where))
        elif any(getattr(item, "label", 0) for item in _samples(images)):
            raise InvalidValueError(
                f"{where}: images holds samples labelled anomalous; fit takes normal images only. "
                "Use dataset.train, or pass y=[sample.label for sample in samples]."
            )
        backbone = Backbone(
            self.backbone,
            weights=self.weights,
            layers=self.layers,
            device=self.device,
            dtype=self.dtype,
            where=where,
        )
        self._check_image_size(backbone.stride)
        random = check_random_state(self.random_state)
        to_fit, held_back = self._split(len(source), random)
        skipped: list[tuple[int, str]] = []
        embeddings = self._gather(backbone, source, to_fit, "fit", skipped)
        calibration = self._gather(backbone, source, held_back, "calibrate", skipped)
        if len(embeddings) == 0:
            raise InvalidValueError(
                f"{where}: none of {len(source)} images could be used; the first: {skipped[0][1]}"
            )
        self._fit_and_calibrate(embeddings, calibration, random)
        self.backbone_ = backbone
        self.dtype_ = str(backbone.dtype).removeprefix("torch.")
        self.skipped_ = [(source.names[i], reason) for i, reason in skipped]
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
        """Scikit-learn's outlier convention.

        Parameters
        ----------
        images
            As in :meth:`fit`.

        Returns
        -------
        ndarray of shape (N,), int64
            +1 for normal, -1 for anomalous (or skipped).

        Raises
        ------
        NotFittedError, AnomalibLiteError
            As :meth:`score`.
        """
        return np.where(self.detect(images, maps=False).labels, -1, 1)

    def score_samples(self, images: Any) -> np.ndarray:
        """The negative of :meth:`score`: scikit-learn's direction, higher is more normal.

        Parameters
        ----------
        images
            As in :meth:`fit`.

        Returns
        -------
        ndarray of shape (N,), float32
        """
        return -self.score(images)

    def decision_function(self, images: Any) -> np.ndarray:
        """``threshold_ - score``: negative is anomalous, as in scikit-learn.

        Parameters
        ----------
        images
            As in :meth:`fit`.

        Returns
        -------
        ndarray of shape (N,), float32
        """
        return np.float32(self.threshold_) - self.score(images)

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
        return Detections(
            scores, labels, _stack(heatmaps) if maps else None, source.names, skipped
        )

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
        E = self._check_embeddings(E)
        random = check_random_state(self.random_state)
        to_fit, held_back = self._split(len(E), random)
        self._fit_and_calibrate(_take(E, to_fit), _take(E, held_back), random)
        for fitted_on_images in ("backbone_", "dtype_", "skipped_"):
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
        return self._image_scores(self._check_embeddings(E, self.n_features_))

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
        check_choice("fusion", self.fusion, STRATEGIES, where)
        check_choice("engine", self.engine, ENGINES, where)
        check_choice("calibration", self.calibration, CALIBRATIONS, where)
        check_choice("on_error", self.on_error, ("raise", "skip"), where)
        check_int("batch_size", self.batch_size, where, low=1)
        check_int("max_pixels", self.max_pixels, where, low=1)
        check_number("smoothing", self.smoothing, where, low=0, high=1000)
        check_number(
            "false_alarm_rate",
            self.false_alarm_rate,
            where,
            low=0,
            high=1,
            low_open=True,
            high_open=True,
        )
        pair = self.image_size if isinstance(self.image_size, tuple | list) else [self.image_size]
        if len(pair) > 2 or (len(pair) == 1 and pair[0] is not self.image_size):
            raise InvalidValueError(
                f"{where}: image_size must be an int (shorter side) or a pair (H, W), "
                f"got {self.image_size!r}."
            )
        for side in pair:
            check_int("image_size", side, where, low=16, high=8192)

    def _check_image_size(self, stride: int) -> None:
        """A backbone whose coarsest map would be empty cannot describe anything."""
        sides = self.image_size if isinstance(self.image_size, tuple | list) else [self.image_size]
        if min(sides) < stride:
            raise InvalidValueError(
                f"{type(self).__name__}: image_size={self.image_size!r} is smaller than the "
                f"backbone's stride of {stride} pixels. Use a larger image_size."
            )

    def _check_embeddings(self, E: Any, n_features: int | None = None) -> Embeddings:
        where = type(self).__name__
        as_list = isinstance(E, list | tuple)
        try:
            grids = [np.asarray(e, np.float32) for e in E] if as_list else np.asarray(E, np.float32)
        except (TypeError, ValueError) as error:
            raise InvalidTypeError(
                f"{where}: E must be numeric, of shape (N, h, w, D), got {type(E).__name__}."
            ) from error
        d = n_features
        for i, grid in enumerate(grids):
            d = d or grid.shape[-1]
            if grid.ndim != 3 or 0 in grid.shape or grid.shape[-1] != d:
                raise InvalidValueError(
                    f"{where}: E must have shape (N, h, w, {d}), got {grid.shape} for E[{i}]."
                )
            if not np.isfinite(grid).all():
                raise InvalidValueError(f"{where}: E[{i}] must be finite, got NaN or infinity.")
        if len(grids) == 0:
            raise InvalidValueError(f"{where}: E is empty. Give the embeddings of an image.")
        return grids

    def _split(
        self, n: int, random: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images to fit on and images held back for calibration, both in their order.

        Held back are as many as the rate needs, at least a fifth and at most half of all.
        """
        if self.calibration == "leave_one_out":
            return np.arange(n), np.arange(0)
        n_held_back = min(max(calibration_size(self.false_alarm_rate), n // 5), n // 2)
        order = random.permutation(n)
        return np.sort(order[n_held_back:]), np.sort(order[:n_held_back])

    def _embed(
        self,
        backbone: Backbone,
        source: ImageSource,
        purpose: str,
        skipped: list[tuple[int, str]],
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Batches of images, each with its patch embeddings (B, h, w, D)."""
        with tqdm(
            total=len(source.items),
            desc=purpose,
            unit="image",
            leave=False,
            disable=None if self.verbose else True,
        ) as bar:
            for batch in iter_batches(
                source,
                image_size=self.image_size,
                stride=backbone.stride,
                batch_size=self.batch_size,
                on_error=self.on_error,
                skipped=skipped,
            ):
                yield batch, patch_embeddings(backbone(batch.pixels), self.fusion).cpu().numpy()
                bar.update(len(batch.indices))

    def _gather(
        self,
        backbone: Backbone,
        source: ImageSource,
        indices: np.ndarray,
        purpose: str,
        skipped: list[tuple[int, str]],
    ) -> Embeddings:
        """The embeddings of these images, all of them, in the order of ``indices``."""
        left_out: list[tuple[int, str]] = []
        grids: list[Any] = [None] * len(indices)
        for batch, embeddings in self._embed(backbone, source.take(indices), purpose, left_out):
            for index, grid in zip(batch.indices, embeddings, strict=True):
                grids[index] = grid.copy()  # its own memory, that can be given back alone
        skipped += [(int(indices[i]), reason) for i, reason in left_out]
        return _stack([grid for grid in grids if grid is not None])

    def _fit_and_calibrate(
        self, E: Embeddings, calibration: Embeddings, random: np.random.RandomState
    ) -> None:
        self._fit_patches(E, random)
        if self.calibration == "leave_one_out":
            scores = self._score_left_out(E)
        else:
            scores = self._image_scores(calibration)
        self.threshold_ = conformal_threshold(scores, self.false_alarm_rate)
        if len(calibration):
            self._absorb(calibration, random)

    def _image_scores(self, E: Embeddings) -> np.ndarray:
        # A few at a time: the search makes arrays of its own.
        step = self.batch_size if isinstance(E, np.ndarray) else 1
        parts = [
            self._score_patches(np.ascontiguousarray(E[i : i + step]))[1]
            for i in range(0, len(E), step)
        ]
        return np.concatenate([np.empty(0, np.float32), *parts])


def _stack(arrays: list[Any]) -> Any:
    """One array if all have one shape, else the list; either way nothing is held twice."""
    if len({None if a is None else a.shape for a in arrays}) != 1 or arrays[0] is None:
        return arrays
    stacked = np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
    for i in range(len(arrays)):
        stacked[i], arrays[i] = arrays[i], None
    return stacked


def _take(E: Embeddings, indices: np.ndarray) -> Embeddings:
    return E[indices] if isinstance(E, np.ndarray) else [E[i] for i in indices]


def _samples(images: Any) -> Sequence[Any]:
    return images if isinstance(images, list | tuple) else ()


def _normal_ones(y: Any, n: int, where: str) -> np.ndarray:
    labels = np.asarray(y)
    if labels.shape != (n,) or not np.isin(labels, (0, 1)).all():
        raise InvalidValueError(
            f"{where}: y must hold {n} labels, 0 for normal and 1 for anomalous, "
            f"got shape {labels.shape} with values {np.unique(labels)[:5].tolist()}."
        )
    if not (labels == 0).any():
        raise InvalidValueError(f"{where}: y has no normal image (0); fit needs at least one.")
    return np.flatnonzero(labels == 0)
