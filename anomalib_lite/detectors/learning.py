"""What all detectors share in learning: images or embeddings -> fitted, and calibrated."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state

from anomalib_lite._validation import (
    check_choice,
    check_image_size,
    check_int,
    check_memory,
    check_number,
    check_seed,
    normal_indices,
)
from anomalib_lite.calibration import calibration_size
from anomalib_lite.detectors._patch_accumulator import Collector
from anomalib_lite.detectors.fitting.shards import learn_embeddings, learn_images
from anomalib_lite.embeddings import Embeddings
from anomalib_lite.engines import ENGINES, FUSIONS, AnyBackbone
from anomalib_lite.errors import InvalidValueError, NotFittedError
from anomalib_lite.images import ImageSource

__all__ = ["Learner"]

CALIBRATIONS = ("split", "leave_one_out")


class Learner(BaseEstimator, metaclass=ABCMeta):
    """The half of a detector that learns; :class:`BaseDetector` adds the half that scores."""

    _channels: np.ndarray | None = None  # of an embedding, those that are needed; None for all

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
        source, random = self._normal_images(images, y), check_random_state(self.random_state)
        order = self._order(len(source), random)
        to_fit = source.take(order[: len(order) - self._n_held_back(len(order))])
        backbone = self._open_to_fit(to_fit, random)
        check_image_size(self.image_size, type(self).__name__, stride=backbone.stride)
        skipped = learn_images(self, backbone, source, order, random)
        self._take_backbone(backbone)
        self.skipped_ = skipped
        return self

    def partial_fit(self, images: Any, y: Any = None) -> Self:
        """Go on learning from new normal images; what was learned stays.

        Parameters
        ----------
        images, y
            As in :meth:`fit`, which this is if nothing was learned yet. One image will do.

        Returns
        -------
        BaseDetector
            Itself; in case of an error as it was.

        Raises
        ------
        NotFittedError
            After :meth:`fit_embeddings`, which fits no backbone.
        AnomalibLiteError
            As :meth:`fit`, and for ``calibration="leave_one_out"``, which would need the
            embeddings of all images that were fitted on before.

        Warns
        -----
        CalibrationWarning
            If there are still too few images to guarantee ``false_alarm_rate``.

        Notes
        -----
        Some of the new images are held back, drawn by ``random_state``: as many as the
        calibration still lacks, at least a fifth and at most half (none of a single one). The
        others are learned from; then those held back are scored by all that was *fitted* on,
        their scores join ``calibration_scores_``, the threshold is taken anew, and they join
        too. Old scores stay: where scores can only fall by learning more, they are no smaller
        than those images would have now, so the guarantee of :meth:`fit` holds for old and new
        images that are exchangeable. Where scores may also rise (an approximate index,
        Equation 7) the old scores are dropped, and the threshold comes from the new ones alone.
        ``n_jobs`` does not count here.
        """
        if not hasattr(self, "threshold_"):
            return self.fit(images, y)
        self._check_update()
        if not hasattr(self, "backbone_"):
            raise NotFittedError(
                f"{type(self).__name__}: fitted on embeddings, not on images. Go on with "
                "partial_fit_embeddings(E), or call fit(images)."
            )
        source, random = self._normal_images(images, y), check_random_state(self.random_state)
        order = self._order(len(source), random)
        self.skipped_ = self.skipped_ + learn_images(
            self, self.backbone_, source, order, random, update=True
        )
        return self

    def fit_embeddings(self, E: Any, y: object = None) -> Self:
        """:meth:`fit` for those who bring their own patch embeddings.

        Parameters
        ----------
        E : array of shape (N, h, w, D), float32, list of N arrays (h, w, D), or an iterable
            Of N normal images. An iterable gives blocks (n, h, w, D) or images (h, w, D), and is
            gone through once. With ``memory_budget`` an array may lie in a file
            (``numpy.load(..., mmap_mode="r")``), and N need not be known before the end.
        y : ignored

        Returns
        -------
        BaseDetector
            Itself; only :meth:`score_embeddings` can be asked then.

        Raises
        ------
        AnomalibLiteError
            For a parameter that cannot be used, or embeddings of another shape or not finite.

        Notes
        -----
        Of an iterable with ``memory_budget`` the images to calibrate with are drawn as they
        come, each as likely as any other; they are held in memory, so no more are drawn than
        ``false_alarm_rate`` needs.
        """
        self._check_parameters()
        learn_embeddings(self, E, check_random_state(self.random_state))
        for fitted_on_images in ("backbone_", "dtype_", "engine_", "skipped_"):
            self.__dict__.pop(fitted_on_images, None)
        return self

    def partial_fit_embeddings(self, E: Any, y: object = None) -> Self:
        """:meth:`partial_fit` for those who bring embeddings, as in :meth:`fit_embeddings`."""
        if not hasattr(self, "threshold_"):
            return self.fit_embeddings(E)
        self._check_update()
        learn_embeddings(self, E, check_random_state(self.random_state), update=True)
        return self

    @abstractmethod
    def _collector(
        self,
        shape: tuple[int, ...],
        n_images: int | None,
        in_flight: int,
        random: np.random.RandomState,
    ) -> Collector:
        """An empty collector for images with embeddings of this ``shape`` (h, w, D)."""

    @abstractmethod
    def _fit_collected(self, collected: Any, random: np.random.RandomState) -> None:
        """Learn from what was collected, beside what was learned before."""

    @abstractmethod
    def _score_left_out(self, E: Embeddings) -> np.ndarray:
        """Score (N,) each image that was fitted on as if it had not been."""

    def _open_to_fit(self, source: ImageSource, random: np.random.RandomState) -> AnyBackbone:
        """The backbone, which may learn from the images to fit on."""
        backbone: AnyBackbone = self._open_backbone()
        return backbone

    def _in_shards(self) -> bool:
        """Whether embeddings are to pass by shard by shard, and not to be held all at once."""
        return self.memory_budget is not None

    def _scores_only_fall(self) -> bool:
        """Whether to learn from more images can only lower scores; then :meth:`_absorb` is."""
        return False

    def _absorb(self, collected: Any, random: np.random.RandomState) -> None:
        """Learn from the calibration images too."""

    def _begin_update(self) -> None:
        """Set aside what calibration images have taught, before others are scored."""

    def _known_rows(self) -> np.ndarray | None:
        """Patches that are there already, where a coreset heeds them."""

    def _normal_images(self, images: Any, y: Any) -> ImageSource:
        where = type(self).__name__
        source = ImageSource(images, max_pixels=self.max_pixels, where=where)
        if y is not None:
            source = source.take(normal_indices(y, len(source), where))
        elif isinstance(images, list | tuple) and any(getattr(item, "label", 0) for item in images):
            raise InvalidValueError(
                f"{where}: images holds samples labelled anomalous; fit takes normal images only. "
                "Use dataset.train, or pass y=[sample.label for sample in samples]."
            )
        return source

    def _check_update(self) -> None:
        self._check_parameters()
        if self.calibration == "leave_one_out":
            raise InvalidValueError(
                f"{type(self).__name__}: partial_fit needs calibration='split': to leave one out, "
                "the embeddings of all images would have to be kept. Fit again on all of them."
            )

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
        if self.n_jobs is not None and self.n_jobs != -1:
            check_int("n_jobs", self.n_jobs, where, low=1)
        if self.memory_budget is not None:
            check_memory("memory_budget", self.memory_budget, where)
            if self.calibration == "leave_one_out":
                raise InvalidValueError(
                    f"{where}: calibration='leave_one_out' keeps the embeddings of all images, "
                    "which no memory_budget bounds. Use calibration='split'."
                )

    def _order(self, n: int, random: np.random.RandomState) -> np.ndarray:
        """The images, those to be held back for calibration last."""
        return np.arange(n) if self.calibration == "leave_one_out" else random.permutation(n)

    def _n_held_back(self, n: int, update: bool = False) -> int:
        """As many as the rate needs; at least a fifth and at most half of ``n`` images."""
        if self.calibration == "leave_one_out":
            return 0
        there = len(self.calibration_scores_) if update and self._scores_only_fall() else 0
        return min(max(calibration_size(self.false_alarm_rate) - there, n // 5), n // 2)
