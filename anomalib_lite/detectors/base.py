"""The pipeline of all detectors: images -> embeddings -> scores, heatmaps and labels."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import numpy as np
from sklearn.utils import check_random_state

from anomalib_lite._validation import (
    check_choice,
    check_embeddings,
    check_image_size,
    check_int,
    check_memory,
    check_number,
    check_seed,
    normal_indices,
    refuse_labelled,
)
from anomalib_lite.anomaly_map import anomaly_maps
from anomalib_lite.calibration import conformal_p_values, threshold_and_shortfall
from anomalib_lite.detectors._per_layer import LayerModels
from anomalib_lite.detectors._saving import SavedDetector
from anomalib_lite.detectors._thresholds import ThresholdMixin
from anomalib_lite.detectors._transforming import BY_LAYER, TransformingModel, transform_all
from anomalib_lite.detectors.detections import Detections
from anomalib_lite.detectors.fitting import (
    EmbeddingModel,
    ImageShards,
    InMemory,
    ShardSource,
    ShardTask,
    embed_distributed,
    none_usable,
)
from anomalib_lite.detectors.presets import PresetMixin
from anomalib_lite.engines import ENGINES, FUSIONS, AnyBackbone, open_backbone
from anomalib_lite.errors import CalibrationWarning, InvalidValueError, NotFittedError
from anomalib_lite.fusion import EmbeddingTransform
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.images.augmentation import AugmentedSource
from anomalib_lite.images.embeddings import Embeddings, embed_all, image_size_for, stack
from anomalib_lite.images.ignore_mask import IgnoreMask, per_image, read_ignore_mask

__all__ = ["BaseDetector", "DetectorMixin"]

CALIBRATIONS = ("split", "leave_one_out")

_NORMAL_ONLY = (
    "fit takes normal images only. Use dataset.train, or pass y=[sample.label for sample in "
    "samples]."
)


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
            in those of ``map_threshold_``); a list where sizes differ.

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
        return other

    def _summary_lines(self) -> list[tuple[str, str]]:
        """Return lines about what was learned, each as (title, text)."""
        return []


class BaseDetector(PresetMixin, ThresholdMixin, DetectorMixin, TransformingModel):
    """Base of all detectors: fits on images, calibrates the threshold, and detects.

    Subclasses store the parameters that :class:`~anomalib_lite.PatchCore` documents, and supply
    what :class:`~anomalib_lite.detectors.fitting.EmbeddingModel` asks for.
    """

    # Strides of the stages that the embeddings are made of, unless ``layers`` says.
    _strides: tuple[int, ...] = (8, 16)
    # "summary" puts the numbers of the whole image into each of its patches.
    _fusions: ClassVar[tuple[str, ...]] = (*(f for f in FUSIONS if f != "summary"), *BY_LAYER)
    _knows_auto = True
    tile: int | None = None
    overlap: int = 0
    _one_mask = False  # whether all images to fit on must ignore the same regions
    ignore_mask_: IgnoreMask | None
    image_size_: int | tuple[int, int]

    @property
    def _map_threshold(self) -> float:
        return self._learner()._in_map_units(float(self.threshold_))

    def fit(self, images: Any, y: Any = None, *, ignore_mask: Any = None) -> Self:
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
        """
        self._check_parameters()
        return self._fit_images(images, y, ignore_mask)

    def partial_fit(self, images: Any, y: Any = None, *, ignore_mask: Any = None) -> Self:
        """Update the detector with new normal images, without fitting again on the old ones.

        Parameters
        ----------
        images, y
            As in :meth:`fit`, which is called if the detector is not fitted. One image is enough.
        ignore_mask : optional
            Regions to ignore in these images; by default those that :meth:`fit` was given for all
            images.

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

        Scores of earlier images are kept if more images can only lower scores. Such a score is
        then at least as large as the image's score would be now, so the guarantee of :meth:`fit`
        holds for old and new images that are exchangeable. If scores may also rise (an
        approximate index, Equation 7, ``"structure"``), earlier scores are dropped, and the
        threshold comes from the new ones alone. The statistics of ``"structure"`` stay, and
        ``map_threshold_`` comes from the new images too. ``n_jobs`` has no effect here.
        """
        if not hasattr(self, "threshold_"):
            self._check_parameters()
            return self._fit_images(images, y, ignore_mask)
        self._check_update()
        if not hasattr(self, "backbone_"):
            raise NotFittedError(
                f"{type(self).__name__}: fitted on embeddings, not on images. Go on with "
                "partial_fit_embeddings(E), or call fit(images)."
            )
        return self._fit_images(images, y, ignore_mask, update=True)

    def fit_embeddings(self, E: Any, y: object = None) -> Self:
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
        return self._fit_embeddings(E)

    def partial_fit_embeddings(self, E: Any, y: object = None) -> Self:
        """Update the detector with further embeddings, as :meth:`partial_fit` does with images.

        Parameters
        ----------
        E : array of shape (N, h, w, D), float32, list of N arrays (h, w, D), or an iterable
            Embeddings of N normal images, as in :meth:`fit_embeddings`, with the same D as before.
        y : ignored

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
            return self._fit_embeddings(E)
        self._check_update()
        return self._fit_embeddings(E, update=True)

    def detect(self, images: Any, *, maps: bool = True, ignore_mask: Any = None) -> Detections:
        """Return scores, heatmaps and labels, from one pass through the backbone.

        Parameters
        ----------
        images
            As in :meth:`fit`.
        maps : bool, default=True
            Whether to make heatmaps, of (H, W) floats an image.
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
                    heatmaps[index] = heatmap
                    if (ignored := source.ignored_in(index)) is not None:
                        heatmap[ignored.of(heatmap.shape)] = 0
        return Detections(
            scores, self._labels(scores), stack(heatmaps) if maps else None, source.names, skipped,
            p_values=conformal_p_values(scores, self.calibration_scores_),
        )  # fmt: skip

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
        transform = self.transform_
        length = self.n_features_ if transform is None else transform.n_features_in_
        E = check_embeddings(E, type(self).__name__, length)
        model = self.layer_models_ or self
        return model._image_scores(E if transform is None else transform_all(E, transform))

    # --- How a detector learns --------------------------------------------------------------

    def _fit_shards(
        self,
        shards: ShardSource,
        random: np.random.RandomState,
        update: bool,
        transform: EmbeddingTransform | None,
    ) -> None:
        """Fit, calibrate with the images held back, and then add these to the model.

        A copy is fitted, so that after an error this detector is as before.
        """
        fresh, model = self._copy_to_fit(shards.shape[-1], update, transform)
        joins = model._scores_are_monotone()  # so do the images held back, in the end
        n_images = shards.n_images if joins else shards.n_to_fit
        empty = model._make_accumulator(shards.shape, n_images, shards.in_flight, random)
        removed = model._remove_calibration_patches() if update else None
        statistics = model._take_statistics() if update else None
        # Fit on the images that are not held back.
        accumulated = copy.copy(empty)
        for result in shards.to_fit(ShardTask(empty, model if update else None)):
            accumulated.merge(result.accumulated)
            del result  # and its memory, before the next
        fitted = model._fit_accumulated(accumulated, random)
        # Calibrate with scores of images that were not fitted on.
        scores: list[Any]
        accumulated = copy.copy(empty)
        if self.calibration == "leave_one_out":
            scores = [model._score_left_out(shards.embeddings, fitted)]
        else:  # if scores can only fall, old ones are at least as large as they would be now
            scores = [self.calibration_scores_] if update and joins else []
            for result in shards.held_back(ShardTask(empty if joins else None, model, score=True)):
                scores.append(result.scores)
                if joins:
                    accumulated.merge(result.accumulated)
                del result
        fresh.calibration_scores_ = model._standardize_calibration(
            np.concatenate(scores or [np.empty(0, np.float32)]),
            self.false_alarm_rate,
            left_out=self.calibration == "leave_one_out",
            statistics=statistics,
        )
        calibrated, shortfall = threshold_and_shortfall(
            fresh.calibration_scores_, self.false_alarm_rate
        )
        if fresh._take_threshold(calibrated) and shortfall is not None:
            # At the user's line: above a public method and its _fit_...
            warnings.warn(shortfall, CalibrationWarning, stacklevel=4)
        # Add the images held back to the model, if that can only lower scores.
        if joins:
            model._add_calibration_patches(removed, accumulated, random)
        self.__dict__ = fresh.__dict__  # nothing of an earlier fit is left

    def _copy_to_fit(
        self, n_features: int, update: bool, transform: EmbeddingTransform | None
    ) -> tuple[Self, EmbeddingModel]:
        """Return a copy, without what was learned unless for an update; and what learns in it."""
        fresh = copy.copy(self)
        if not update:
            for name in [n for n in vars(fresh) if n.endswith("_")]:
                delattr(fresh, name)
            fresh.n_features_ = n_features
        fresh.transform_, known, model = transform, fresh.layer_models_, cast(EmbeddingModel, fresh)
        fresh.layer_models_ = None
        if self.fusion == "per_layer":
            model = known.copied() if known is not None else LayerModels.of(fresh)
            fresh.layer_models_ = model
        return fresh, model

    def _fit_images(self, images: Any, y: Any, ignore_mask: Any, update: bool = False) -> Self:
        """Embed normal images, the ones to hold back for calibration last, and fit on them."""
        where, random = type(self).__name__, check_random_state(self.random_state)
        source = ImageSource(images, max_pixels=self.max_pixels, where=where)
        asked = ignore_mask is not None or update
        one_for_all = self._ignore(source, ignore_mask, update) if asked else None
        if y is not None:
            source = source.take(normal_indices(y, len(source), where))
        else:
            refuse_labelled(images, where, _NORMAL_ONLY)
        n, leave_one_out = len(source.items), self.calibration == "leave_one_out"
        order = np.arange(n) if leave_one_out else random.permutation(n)
        in_order = source.take(order)
        size = self.image_size_ if update else image_size_for(source, self.image_size, self.tile)
        backbone = self.backbone_ if update else self._open_to_fit(in_order, size, random)
        if self.augment is not None:
            in_order, order = self._with_copies(in_order, order, self._n_to_hold_back(n, update))
        options = size, self.batch_size, self.on_error, self.verbose
        extractor = Extractor(backbone, *options, tile=self.tile, overlap=self.overlap)
        transform = self.transform_ if update else None
        if not update and (self.fusion in BY_LAYER or any(getattr(self, a) for a in self._asking)):
            transform = self._learn_from_images(extractor, in_order, random)
        extractor = replace(extractor, transform=transform)
        alone = self.n_jobs is None or update  # an update is for a few images
        distributor = None if alone else self._distributor(backbone, extractor)
        E: Embeddings | None = None
        skipped: list[tuple[int, str]] = []
        if not self._fits_in_shards():
            if distributor is None:
                E, skipped = embed_all(extractor, in_order, progress="fit")
            else:
                E, skipped = embed_distributed(in_order, distributor, self.verbose)
            if (n := len(E)) == 0:
                raise none_usable(in_order, skipped)
        n_held_back = self._n_to_hold_back(n, update)
        if isinstance(in_order, AugmentedSource):
            n_held_back = in_order.n_held_back(skipped)
        if transform is not None and not update:  # images that it was learned from are fitted on
            n_held_back = min(n_held_back, len(in_order) - len(skipped) - transform.n_images_)
        shards: ShardSource
        if E is not None:
            shards = InMemory(E, n_held_back)
        else:
            shards = ImageShards(extractor, in_order, n_held_back, skipped, distributor)
        self._fit_shards(shards, random, update, transform)
        self._take_backbone(backbone)
        self.ignore_mask_, self.image_size_ = one_for_all, size
        self._take_skipped(source, [(order[i], reason) for i, reason in skipped], update)
        return self

    def _take_skipped(
        self, source: ImageSource, skipped: list[tuple[int, str]], update: bool
    ) -> None:
        """List the images left out, each as (position, reason), by their names."""
        named = [(source.names[i], reason) for i, reason in sorted(set(skipped))]
        self.skipped_ = [*self.skipped_, *named] if update else named

    def _ignore(self, source: ImageSource, given: Any, update: bool) -> IgnoreMask | None:
        """Set the regions to ignore in images to fit on; return those of all later images."""
        masks = self.ignore_mask_ if given is None else per_image(given, len(source), source.where)
        source.ignored = masks
        one_for_all = None if isinstance(masks, list) else masks
        one_for_all = self.ignore_mask_ if update else one_for_all
        if self._one_mask and masks is not one_for_all:
            raise InvalidValueError(
                f"{source.where}: ignore_mask must be one for all images: a patch is compared with "
                "those at its own place. Give one mask, or polygons."
            )
        return one_for_all

    def _check_parameters(self) -> None:
        """Raise for the first parameter that cannot be used."""
        where = type(self).__name__
        self._check_image_parameters()
        check_choice("fusion", self.fusion, self._fusions, where)
        self._check_transform()
        check_choice("calibration", self.calibration, CALIBRATIONS, where)
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

    def _check_update(self) -> None:
        """Raise if a parameter cannot be used, or if the calibration allows no update."""
        self._check_parameters()
        self._check_same_transform()
        if self.calibration == "leave_one_out":
            raise InvalidValueError(
                f"{type(self).__name__}: partial_fit needs calibration='split': to leave one out, "
                "the embeddings of all images would have to be kept. Fit again on all of them."
            )

    # --- The backbone -----------------------------------------------------------------------

    def _open_to_fit(
        self, images: ImageSource, size: int | tuple[int, int], random: np.random.RandomState
    ) -> AnyBackbone:
        """Open the backbone; a subclass may first adapt it to the images, at ``size``.

        The images are in the order of fitting: those to hold back come last.
        """
        backbone = self._open_backbone()
        check_image_size(size, type(self).__name__, stride=backbone.stride)
        return backbone

    def _open_backbone(self, **instead: Any) -> AnyBackbone:
        """Open the backbone that the parameters describe, with other options ``instead``."""
        options = {
            "weights": self.weights,
            "layers": self.layers,
            "strides": self._strides,
            "fusion": self._layout if self.fusion in BY_LAYER else self.fusion,
            "device": self.device,
            "dtype": self.dtype,
            "engine": self.engine,
            "where": type(self).__name__,
        }
        return open_backbone(self.backbone, **(options | instead))

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
        tensors["calibration_scores"] = self.calibration_scores_
        if self.calibrated_threshold_ != self.threshold_:  # the user has set another
            header["state"]["calibrated_threshold"] = self.calibrated_threshold_
        size = getattr(self, "image_size_", self.image_size)  # none after fit_embeddings
        if size != self.image_size:
            header["state"]["image_size"] = size
        if hasattr(self._learner(), "map_statistics_"):
            tensors["map_statistics"] = self._learner().map_statistics_
            header["state"]["map_threshold"] = self._learner().map_threshold_
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
        detector.calibration_scores_ = arrays["calibration_scores"]
        calibrated = state.get("calibrated_threshold", detector.threshold_)
        detector.calibrated_threshold_ = float(calibrated)
        size = state.get("image_size", detector.image_size)
        if not isinstance(size, str):
            detector.image_size_ = tuple(size) if isinstance(size, list) else size
        if detector.image_score == "structure":
            learner = detector._learner()
            learner.map_statistics_ = arrays["map_statistics"]
            learner.map_threshold_ = state.get("map_threshold")  # older files do not say
        mask, polygons = arrays.get("ignore_mask"), state.get("ignore_polygons")
        ignored = next((given for given in (mask, polygons) if given is not None), None)
        detector.ignore_mask_ = None if ignored is None else read_ignore_mask(ignored, cls.__name__)
        return detector
