"""The pipeline that all detectors share: images -> embeddings -> scores, maps, labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from anomalib_lite._validation import check_embeddings
from anomalib_lite.anomaly_map import anomaly_maps
from anomalib_lite.detectors.detections import Detections, DetectorMixin
from anomalib_lite.detectors.learning import Learner
from anomalib_lite.embeddings import Embeddings, gather, stack
from anomalib_lite.engines import AnyBackbone, open_backbone
from anomalib_lite.errors import InvalidValueError, NotFittedError
from anomalib_lite.images import ImageSource, iter_batches

__all__ = ["BaseDetector"]


class BaseDetector(DetectorMixin, Learner):
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

    def _fitted_backbone(self) -> AnyBackbone | None:
        return getattr(self, "backbone_", None)

    def _describe(self, include_backbone: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        tensors, header = super()._describe(include_backbone)
        return tensors | {"calibration_scores": self.calibration_scores_}, header

    @classmethod
    def _restore(
        cls,
        parameters: dict[str, Any],
        arrays: dict[str, np.ndarray],
        state: dict[str, Any],
        members: dict[str, Any],
    ) -> Self:
        detector = super()._restore(parameters, arrays, state, members)
        detector.calibration_scores_ = arrays["calibration_scores"]
        return detector

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
