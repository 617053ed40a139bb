"""The pipeline of all detectors: images -> embeddings -> scores, heatmaps and labels."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar, Self

import numpy as np

from anomalib_lite._validation import (
    check_choice,
    check_embeddings,
    check_image_size,
    check_int,
    check_memory,
    check_number,
    check_seed,
)
from anomalib_lite.anomaly_map import anomaly_maps
from anomalib_lite.calibration import conformal_p_values
from anomalib_lite.detectors._learning import LearningModel
from anomalib_lite.detectors._per_layer import LayerModels
from anomalib_lite.detectors._saving import SavedDetector
from anomalib_lite.detectors._transforming import BY_LAYER, transform_all
from anomalib_lite.detectors.detections import Detections
from anomalib_lite.detectors.fitting import EmbeddingModel
from anomalib_lite.detectors.presets import PresetMixin
from anomalib_lite.engines import ENGINES, FUSIONS, AnyBackbone
from anomalib_lite.errors import InvalidValueError, NotFittedError
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.images.embeddings import stack
from anomalib_lite.images.ignore_mask import per_image, read_ignore_mask

__all__ = ["BaseDetector", "DetectorMixin"]

CALIBRATIONS = ("auto", "split", "cross", "leave_one_out")


class DetectorMixin(SavedDetector):
    """Methods that every detector has; their answers are views of one ``detect(images)``."""

    image_size: int | tuple[int, int] | str
    false_alarm_rate: float
    engine: str
    batch_size: int
    max_pixels: int
    on_error: str
    random_state: Any
    verbose: int
    _network: ClassVar[str] = "backbone"  # the parameter that names the network
    _threshold_range: ClassVar[str] = "[0, inf)"  # values that threshold_ may have
    _routes: ClassVar[tuple[str, ...]] = ()  # models that decide, if there are several
    _knows_auto: ClassVar[bool] = False  # whether image_size may be "auto"

    @abstractmethod
    def detect(self, images: Any, *, maps: Any = True) -> Detections:
        """Return scores, labels and, if wanted, heatmaps."""

    def score(self, images: Any) -> np.ndarray:
        """Score how anomalous each image is: higher is more anomalous.

        In scikit-learn's outlier detectors higher is more normal; :meth:`score_samples` has that
        direction.

        Parameters
        ----------
        images
            As in :meth:`fit`.

        Returns
        -------
        ndarray of shape (N,), float32
            An image is called anomalous above ``threshold_``. In units of the detector, which its
            class states; those of a cascade lie in [0, 1].

        Raises
        ------
        NotFittedError
            Before :meth:`fit`.
        AnomalibLiteError
            For an image that cannot be used, unless ``on_error="skip"``: its score is NaN then.
        """
        return self.detect(images, maps=False).scores

    def anomaly_map(self, images: Any) -> Any:
        """Show where each image is anomalous.

        Parameters
        ----------
        images
            As in :meth:`fit`.

        Returns
        -------
        ndarray of shape (N, H, W), float32, or list of N arrays (H, W)
            At the images' own sizes, in the units of the scores (for ``image_score="structure"``
            in those of ``pixel_threshold_``); a list where sizes differ.

        Raises
        ------
        NotFittedError, AnomalibLiteError
            As :meth:`score`.
        """
        return self.detect(images, maps=True).maps

    def predict(self, images: Any) -> np.ndarray:
        """Return +1 for normal and -1 for anomalous (or skipped), as scikit-learn does.

        Takes images as :meth:`fit` does and gives an ndarray of shape (N,), int64.
        """
        return np.where(self.detect(images, maps=False).labels, -1, 1)

    def score_samples(self, images: Any) -> np.ndarray:
        """Return the negative of :meth:`score`: higher is more normal, as in scikit-learn.

        Takes images as :meth:`fit` does and gives an ndarray of shape (N,), float32.
        """
        return -self.score(images)

    def decision_function(self, images: Any) -> np.ndarray:
        """Return ``threshold_ - score``: negative is anomalous, as in scikit-learn.

        Takes images as :meth:`fit` does and gives an ndarray of shape (N,), float32.
        """
        scores = self.score(images)
        return np.float32(self.threshold_) - scores

    def _check_image_parameters(self) -> None:
        """Raise for the first of the parameters of all detectors that cannot be used."""
        where = type(self).__name__
        check_choice("engine", self.engine, ENGINES, where)
        check_choice("on_error", self.on_error, ("raise", "skip"), where)
        check_int("batch_size", self.batch_size, where, low=1)
        check_int("max_pixels", self.max_pixels, where, low=1)
        check_number("false_alarm_rate", self.false_alarm_rate, where, "(0, 1)")
        check_image_size(self.image_size, where, auto=self._knows_auto)
        check_seed(self.random_state, where)

    def _labels(self, scores: np.ndarray) -> np.ndarray:
        """Decide which images (N,) are anomalous; a score of NaN is, as the part may be bad."""
        if not isinstance(self.threshold_, float | int | np.number) or np.isnan(self.threshold_):
            raise InvalidValueError(
                f"{type(self).__name__}: threshold_ must be a number, got {self.threshold_!r}."
            )
        return ~(scores <= self.threshold_)

    @property
    def _map_threshold(self) -> float:
        """The threshold in the units of the heatmaps."""
        return float(self.threshold_)

    def _with_options(self, **options: Any) -> Self:
        """Return a copy with other options, also in its members; it shares all fitted state."""
        other = copy.copy(self)
        vars(other).update(options)
        other._remember_parameters()
        return other

    def _summary_lines(self) -> list[tuple[str, str]]:
        """Return lines about what was learned, each as (title, text)."""
        return []


class BaseDetector(PresetMixin, DetectorMixin, LearningModel):
    """Base of all detectors: fits on images, calibrates the threshold, and detects.

    Subclasses store the parameters that :class:`~anomalib_lite.PatchCore` documents, and supply
    what :class:`~anomalib_lite.detectors.fitting.EmbeddingModel` asks for.
    """

    # "summary" puts the numbers of the whole image into each of its patches.
    _fusions: ClassVar[tuple[str, ...]] = (*(f for f in FUSIONS if f != "summary"), *BY_LAYER)
    _knows_auto = True

    @property
    def _map_threshold(self) -> float:
        level = self._in_map_units(float(self.threshold_))
        if level is None:
            raise InvalidValueError(
                f"{type(self).__name__}: the threshold of the heatmaps is not known: with "
                "image_score='structure' scores have other units, and an older version saved this "
                "detector. Fit again, or set pixel_threshold_ to a level of your heatmaps."
            )
        return level

    def fit(
        self, images: Any, y: Any = None, *, ignore_mask: Any = None, groups: Any = None
    ) -> Self:
        """Learn what normal looks like, and calibrate the threshold.

        Parameters
        ----------
        images : directory, list of paths, PIL images, arrays, tensors, or data set samples
            Normal images; :class:`~anomalib_lite.images.ImageSource` lists all forms.
        y : array of shape (N,), optional
            0 (or False) for normal, 1 (or True) for anomalous. Anomalous images are left out.
        ignore_mask : array (H, W), PIL image, path, polygons, or N of them, optional
            Regions to ignore in fitting, calibration, scores and heatmaps. One mask for all images
            is saved with the detector and used for every later image. A list has one (or None) for
            each image. Pixels that are not 0 are ignored; see
            :func:`~anomalib_lite.images.ignore_mask.read_ignore_mask`.
        groups : sequence of N whole numbers or strings, or "auto", optional
            Group of each image, such as the part that it shows: photographs of one part are like
            each other, so they are fitted on or held back together, and the rate is that of images
            of *new* parts. ``"auto"`` finds them by
            :func:`~anomalib_lite.images.copies.find_copies`.

        Returns
        -------
        BaseDetector
            Itself.

        Raises
        ------
        AnomalibLiteError
            For a parameter or an image that cannot be used; :mod:`anomalib_lite.errors` lists
            the kinds. A detector that was fitted before stays as it was.

        Warns
        -----
        CalibrationWarning
            If there are too few images to guarantee ``false_alarm_rate``.
        CopiesWarning
            Without ``groups``: if images have the same content as others, which are then held back
            together, or if they look like copies or photographs of one part (looked for among at
            most 2,000 images, and not with ``memory_budget`` or ``n_jobs``), which are not.
        """
        self._check_parameters()
        return self._fit_images(images, y, ignore_mask, groups)

    def partial_fit(
        self, images: Any, y: Any = None, *, ignore_mask: Any = None, groups: Any = None
    ) -> Self:
        """Update the detector with new normal images, without fitting again on the old ones.

        Parameters
        ----------
        images, y
            As in :meth:`fit`, which is called if the detector is not fitted. One image is enough.
        ignore_mask : optional
            Regions to ignore in these images; by default those that :meth:`fit` was given for all
            images.
        groups : optional
            As in :meth:`fit`. They are new ones: give all photographs of a part in one call.

        Returns
        -------
        BaseDetector
            Itself; after an error it is as before.

        Raises
        ------
        NotFittedError
            After :meth:`fit_embeddings`, which fits no backbone.
        AnomalibLiteError
            As :meth:`fit`; also for ``calibration="leave_one_out"``, which would need the
            embeddings of all images that were fitted on before.

        Warns
        -----
        CalibrationWarning
            If there are still too few images to guarantee ``false_alarm_rate``.

        Notes
        -----
        Some of the new images are held back, drawn by ``random_state``: as many as the
        calibration still lacks, at least a fifth and at most half (none of a single one). The
        detector is fitted on the others. Then the images held back are scored by a model of the
        images *fitted* on, without any that were held back. Their scores are added to
        ``calibration_scores_``, the threshold is computed again, and their patches are added.

        After a fit with ``calibration="cross"`` nothing is held back: parts of the new images are
        left out, as in :meth:`fit`, and their scores are added to the earlier ones.

        Scores of earlier images are kept if more images can only lower scores. Such a score is
        then at least as large as the image's score would be now, so the guarantee of :meth:`fit`
        holds for old and new images that are exchangeable. If scores may also rise (an
        approximate index, Equation 7, ``"structure"``), earlier scores are dropped, and the
        threshold comes from the new ones alone. (With ``"cross"``, earlier scores are dropped for
        ``"structure"`` only.) The statistics of ``"structure"`` stay. ``pixel_threshold_``
        follows ``threshold_`` in all this. ``n_jobs`` has no effect here.
        """
        if not hasattr(self, "threshold_"):
            self._check_parameters()
            return self._fit_images(images, y, ignore_mask, groups)
        self._check_update()
        if not hasattr(self, "backbone_"):
            raise NotFittedError(
                f"{type(self).__name__}: fitted on embeddings, not on images. Go on with "
                "partial_fit_embeddings(E), or call fit(images)."
            )
        return self._fit_images(images, y, ignore_mask, groups, update=True)

    def fit_embeddings(self, E: Any, y: object = None, *, groups: Any = None) -> Self:
        """Fit on your own patch embeddings, as :meth:`fit` does on images.

        Parameters
        ----------
        E : array of shape (N, h, w, D), float32, list of N arrays (h, w, D), or an iterable
            Embeddings of N normal images. An iterable yields blocks (n, h, w, D) or images
            (h, w, D), and is read once; its length need not be known, except for PatchCore's
            ``coreset_size`` with ``memory_budget``: then its attribute ``n_images`` is that, or
            about that. An array may be in a file
            (``numpy.load(..., mmap_mode="r")``). With ``memory_budget``, neither is ever in memory
            as a whole.
        y : ignored
        groups : sequence of N whole numbers or strings, optional
            As in :meth:`fit`, without ``"auto"``. Not for an iterable, which has an order already.

        Returns
        -------
        BaseDetector
            Itself; only :meth:`score_embeddings` can be called then.

        Raises
        ------
        AnomalibLiteError
            For a parameter that cannot be used, or embeddings of another shape or not finite.

        Notes
        -----
        With ``memory_budget``, the images of an iterable that are held back for calibration are
        drawn while it is read, each with the same probability. They stay in memory, so no more are
        drawn than ``false_alarm_rate`` needs.
        """
        self._check_parameters()
        return self._fit_embeddings(E, groups)

    def partial_fit_embeddings(self, E: Any, y: object = None, *, groups: Any = None) -> Self:
        """Update the detector with further embeddings, as :meth:`partial_fit` does with images.

        Parameters
        ----------
        E : array of shape (N, h, w, D), float32, list of N arrays (h, w, D), or an iterable
            Embeddings of N normal images, as in :meth:`fit_embeddings`, with the same D as before.
        y : ignored
        groups : optional
            As in :meth:`fit_embeddings`; they are new ones.

        Returns
        -------
        BaseDetector
            Itself; after an error it is as before.

        Raises
        ------
        AnomalibLiteError
            As :meth:`fit_embeddings`; also for another D, or ``calibration="leave_one_out"``.

        Warns
        -----
        CalibrationWarning
            If there are still too few images to guarantee ``false_alarm_rate``.

        Examples
        --------
        >>> import numpy as np
        >>> from anomalib_lite import PatchCore
        >>> E = np.random.default_rng(0).normal(size=(40, 4, 6, 8)).astype("float32")
        >>> detector = PatchCore(false_alarm_rate=0.2).fit_embeddings(E[:20])
        >>> len(detector.partial_fit_embeddings(E[20:]).calibration_scores_)
        8
        """
        if not hasattr(self, "threshold_"):
            self._check_parameters()
            return self._fit_embeddings(E, groups)
        self._check_update()
        return self._fit_embeddings(E, groups, update=True)

    def detect(self, images: Any, *, maps: Any = True, ignore_mask: Any = None) -> Detections:
        """Return scores, heatmaps and labels, from one pass through the backbone.

        Parameters
        ----------
        images
            As in :meth:`fit`.
        maps : bool or callable, default=True
            Whether to make heatmaps, of (H, W) floats an image. Of many images a function keeps
            less: what it makes of each heatmap is in its place, as with ``maps=np.max``.
        ignore_mask : optional
            Regions to ignore, as in :meth:`fit`; by default those that :meth:`fit` was given for
            all images. Heatmaps are 0 there. The content of these regions has no effect: they are
            filled with gray before the image is resized and embedded, also in fitting.

        Returns
        -------
        Detections

        Raises
        ------
        NotFittedError, AnomalibLiteError
            As :meth:`score`.
        """
        if not hasattr(self, "backbone_"):
            remedy = "Call fit(images) first"
            if hasattr(self, "threshold_"):
                remedy += "; after fit_embeddings use score_embeddings."
            raise NotFittedError(f"{type(self).__name__}: not fitted on images yet. {remedy}")
        if any(getattr(self, name) is not then for name, then in self.fitted_with_.items()):
            self._refuse_changes()
        source = ImageSource(images, max_pixels=self.max_pixels, where=type(self).__name__)
        source.ignored = self.ignore_mask_
        if ignore_mask is not None:
            source.ignored = per_image(ignore_mask, len(source.items), source.where)
        scores = np.full(len(source.items), np.nan, np.float32)
        heatmaps: list[Any] = [None] * len(source.items)
        skipped: list[tuple[int, str]] = []
        more: Any = {"tile": self.tile, "overlap": self.overlap, "transform": self.transform_}
        extractor = Extractor(
            self.backbone_, self.image_size_, self.batch_size, self.on_error, self.verbose, **more
        )
        model = self.layer_models_ or self
        for batch, E in extractor.embed_batches(
            source, channels=model._channels, skipped=skipped, progress="score"
        ):
            patch_scores, scores[batch.indices] = model._score_patches(E)
            if maps:
                input_size = batch.pixels.shape[1:3]
                made = anomaly_maps(patch_scores, input_size, batch.sizes, self.smoothing)
                for index, heatmap in zip(batch.indices, made, strict=True):
                    if (ignored := source.ignored_in(index)) is not None:
                        heatmap[ignored.of(heatmap.shape)] = 0
                    heatmaps[index] = maps(heatmap) if callable(maps) else heatmap
        known = self.calibration_scores_, self.calibration_groups_
        return Detections(
            scores,
            self._labels(scores),
            stack(heatmaps) if maps else None,
            source.names,
            skipped,
            p_values=conformal_p_values(scores, *known),
            pixel_threshold=self._in_map_units(float(self.threshold_)),
        )

    def score_embeddings(self, E: Any) -> np.ndarray:
        """Score your own patch embeddings, as :meth:`score` does images.

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
        self._refuse_changes()
        transform = self.transform_
        length = self.n_features_ if transform is None else transform.n_features_in_
        E = check_embeddings(E, type(self).__name__, length)
        model = self.layer_models_ or self
        return model._image_scores(E if transform is None else transform_all(E, transform))

    # --- How a detector learns --------------------------------------------------------------

    def _check_parameters(self) -> None:
        """Raise for the first parameter that cannot be used."""
        where = type(self).__name__
        self._check_image_parameters()
        check_choice("fusion", self.fusion, self._fusions, where)
        self._check_transform()
        check_choice("calibration", self.calibration, CALIBRATIONS, where)
        if self.false_alarm_confidence is not None:
            check_number("false_alarm_confidence", self.false_alarm_confidence, where, "(0, 1)")
        check_number("smoothing", self.smoothing, where, "[0, 1000]")
        if self.n_jobs is not None and self.n_jobs != -1:
            check_int("n_jobs", self.n_jobs, where, low=1)
        if self.memory_budget is not None:
            check_memory("memory_budget", self.memory_budget, where)
            if self.calibration == "leave_one_out":
                raise InvalidValueError(
                    f"{where}: calibration='leave_one_out' keeps the embeddings of all images, "
                    "which no memory_budget bounds. Use calibration='split'."
                )
        if self.calibration == "cross" and (reason := self._cannot_cross()):
            raise InvalidValueError(
                f"{where}: calibration='cross' {reason}. Use calibration='split'."
            )

    def _check_update(self) -> None:
        """Raise if a parameter cannot be used, or if the calibration allows no update."""
        self._check_parameters()
        self._refuse_changes("false_alarm_rate", "false_alarm_confidence")
        where = type(self).__name__
        if self.calibration_ == "leave_one_out":
            raise InvalidValueError(
                f"{where}: partial_fit needs a fit with calibration='split' or 'cross': to leave "
                "one out, the embeddings of all images would have to be kept. Fit again on all of "
                "them."
            )
        if self.calibration_ == "cross" and (reason := self._cannot_cross()):
            raise InvalidValueError(
                f"{where}: partial_fit goes on with calibration='cross', as fit did, which "
                f"{reason}. Set that parameter back, or call fit on all images."
            )

    # --- The backbone -----------------------------------------------------------------------

    def _fitted_backbone(self) -> AnyBackbone | None:
        return getattr(self, "backbone_", None)

    def _learner(self) -> EmbeddingModel:
        return self.layer_models_ or self

    def _restore_learner(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        self._restore_transform(arrays, state)
        if self.fusion == "per_layer":
            if self.transform_ is None:
                raise ValueError("nothing says which features are of which layer")
            self.layer_models_ = LayerModels.of(self)
            self.n_features_ = self.transform_.n_features_
        self._learner()._set_state(arrays, state)
        if self.transform_ is not None and self.transform_.n_features_ != self.n_features_:
            raise ValueError(f"the transformation does not give {self.n_features_} features")

    # --- Its file -----------------------------------------------------------------------------

    def _describe(self, include_backbone: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        tensors, header = super()._describe(include_backbone)
        self._describe_transform(tensors, header)
        self._describe_threshold(tensors, header)
        size = getattr(self, "image_size_", self.image_size)  # none after fit_embeddings
        if size != self.image_size:
            header["state"]["image_size"] = size
        self._learner()._describe_statistics(tensors)
        ignored = getattr(self, "ignore_mask_", None)
        if ignored is not None and ignored.mask is not None:
            tensors["ignore_mask"] = ignored.mask.astype(np.uint8)
        elif ignored is not None:
            header["state"]["ignore_polygons"] = ignored.polygons
        return tensors, header

    @classmethod
    def _restore(
        cls,
        parameters: dict[str, Any],
        arrays: dict[str, np.ndarray],
        state: dict[str, Any],
        members: dict[str, Any],
    ) -> Self:
        detector = super()._restore(parameters, arrays, state, members)
        detector._restore_threshold(arrays, state)
        size = state.get("image_size", detector.image_size)
        if not isinstance(size, str):
            detector.image_size_ = tuple(size) if isinstance(size, list) else size
        detector._learner()._restore_statistics(arrays)
        mask, polygons = arrays.get("ignore_mask"), state.get("ignore_polygons")
        ignored = next((given for given in (mask, polygons) if given is not None), None)
        detector.ignore_mask_ = None if ignored is None else read_ignore_mask(ignored, cls.__name__)
        return detector
