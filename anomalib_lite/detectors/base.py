"""The pipeline that all detectors share: images -> embeddings -> scores, maps, labels."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from anomalib_lite._validation import check_embeddings
from anomalib_lite.anomaly_map import anomaly_maps
from anomalib_lite.detectors.detections import Detections
from anomalib_lite.detectors.embeddings import Embeddings, gather, stack
from anomalib_lite.detectors.learning import Learner
from anomalib_lite.engines import AnyBackbone, open_backbone
from anomalib_lite.errors import InvalidValueError, NotFittedError
from anomalib_lite.images import ImageSource, iter_batches

__all__ = ["Answers", "BaseDetector"]


class Answers(ABC):
    """What every detector answers, all of it from one ``detect(images)``."""

    threshold_: float

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
        OutputError
            If the file cannot be written.
        """
        from anomalib_lite.persistence import save  # it knows all detectors, so it comes after

        save(self, path, include_backbone=include_backbone)


class BaseDetector(Answers, Learner):
    """Base of all detectors: a subclass says how to fit on embeddings and how to score them.

    Subclasses store the parameters that :class:`~anomalib_lite.PatchCore` documents, and
    implement the abstract methods; :meth:`_check_parameters` and those that have a body below
    where they have something to add.
    """

    # Of which stages the embeddings are, unless ``layers`` says.
    _strides: tuple[int, ...] = (8, 16)

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
        if not isinstance(self.threshold_, float | int | np.number) or np.isnan(self.threshold_):
            raise InvalidValueError(
                f"{type(self).__name__}: threshold_ must be a number, got {self.threshold_!r}."
            )
        source = ImageSource(images, max_pixels=self.max_pixels, where=type(self).__name__)
        scores = np.full(len(source.items), np.nan, np.float32)
        heatmaps: list[Any] = [None] * len(source.items)
        skipped: list[tuple[int, str]] = []
        for batch, embeddings in self._embed(
            self.backbone_, source, "score", skipped, self._channels
        ):
            patch_scores, scores[batch.indices] = self._score_patches(embeddings)
            if maps:
                input_size = batch.pixels.shape[1:3]
                made = anomaly_maps(patch_scores, input_size, batch.sizes, self.smoothing)
                for index, heatmap in zip(batch.indices, made, strict=True):
                    heatmaps[index] = heatmap
        labels = ~(scores <= self.threshold_)  # NaN is not known to be good
        return Detections(scores, labels, stack(heatmaps) if maps else None, source.names, skipped)

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

    @abstractmethod
    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, h, w, D) -> patch scores (B, h, w) and image scores (B,), both float32."""

    @abstractmethod
    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What a file must hold beside the parameters and the threshold: arrays, and JSON."""

    @abstractmethod
    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Become fitted from what :meth:`_get_state` gave; ValueError if it does not fit."""

    def _open_backbone(self, **instead: Any) -> AnyBackbone:
        """The backbone that the parameters describe, but for what is given ``instead``."""
        return open_backbone(self.backbone, **(self._backbone_options() | instead))

    def _backbone_options(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "layers": self.layers,
            "strides": self._strides,
            "fusion": self.fusion,
            "device": self.device,
            "dtype": self.dtype,
            "engine": self.engine,
            "where": type(self).__name__,
        }

    def _take_backbone(self, backbone: AnyBackbone) -> None:
        self.backbone_ = backbone
        self.engine_ = backbone.engine
        self.dtype_ = str(backbone.dtype).removeprefix("torch.")

    def _embed_all(
        self,
        backbone: AnyBackbone,
        source: ImageSource,
        purpose: str | None = None,
        channels: np.ndarray | None = None,
    ) -> tuple[Embeddings, list[tuple[int, str]]]:
        """Embeddings of the images that can be used, in order, and those that cannot."""
        skipped: list[tuple[int, str]] = []
        batches = self._embed(backbone, source, purpose, skipped, channels)
        return gather(len(source), ((batch.indices, E) for batch, E in batches)), skipped

    def _embed(
        self,
        backbone: AnyBackbone,
        source: ImageSource,
        purpose: str | None,
        skipped: list[tuple[int, str]],
        channels: np.ndarray | None = None,
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Batches of images, each with its patch embeddings (B, h, w, D), or these channels."""
        n = len(source.items)
        quiet = None if self.verbose and purpose else True  # None: in a terminal only
        with tqdm(total=n, desc=purpose, unit="image", leave=False, disable=quiet) as bar:
            for batch in iter_batches(
                source,
                image_size=self.image_size,
                stride=backbone.stride,
                batch_size=self.batch_size,
                on_error=self.on_error,
                skipped=skipped,
            ):
                embeddings = backbone.embed(batch.pixels, channels)
                if not np.isfinite(embeddings).all():
                    raise InvalidValueError(
                        f"{type(self).__name__}: the backbone gives NaN or infinity in "
                        f"{backbone.dtype}. Use dtype='float32'."
                    )
                yield batch, embeddings
                bar.update(len(batch.pixels))

    def _image_scores(self, E: Embeddings) -> np.ndarray:
        # A few at a time: the search makes arrays of its own.
        step = self.batch_size if isinstance(E, np.ndarray) else 1
        parts = [
            self._score_patches(np.ascontiguousarray(E[i : i + step]))[1]
            for i in range(0, len(E), step)
        ]
        return np.concatenate([np.empty(0, np.float32), *parts])
