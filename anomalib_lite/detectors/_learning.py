"""How a detector learns: what is held back, what is fitted on, and the threshold at the end."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Self, cast

import numpy as np
from sklearn.utils import check_random_state

from anomalib_lite._validation import (
    check_embeddings,
    check_groups,
    check_image_size,
    normal_indices,
    refuse_labelled,
)
from anomalib_lite.calibration import calibration_size, threshold_and_shortfall
from anomalib_lite.detectors._per_layer import LayerModels
from anomalib_lite.detectors._thresholds import ThresholdMixin
from anomalib_lite.detectors._transforming import (
    BY_LAYER,
    TransformingModel,
    transform_all,
    type_name,
)
from anomalib_lite.detectors.fitting import (
    Distribute,
    EmbeddingModel,
    EmbeddingStream,
    ImageShards,
    Indexed,
    InMemory,
    NumberedNames,
    ShardSource,
    ShardTask,
    distribute,
    embed_distributed,
    folds_of,
    group_starts,
    iter_grids,
    none_usable,
    order_of_fit,
    whole_groups,
)
from anomalib_lite.engines import AnyBackbone, open_backbone
from anomalib_lite.errors import CalibrationWarning, InvalidValueError
from anomalib_lite.fusion import EmbeddingTransform
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.images.augmentation import AugmentedSource, n_versions
from anomalib_lite.images.embeddings import (
    Embeddings,
    embed_all,
    image_size_for,
    patch_pixels,
    take,
)
from anomalib_lite.images.grouping import default_groups, group_ids
from anomalib_lite.images.ignore_mask import IgnoreMask, per_image

__all__ = ["LearningModel"]

_NORMAL_ONLY = (
    "fit takes normal images only. Use dataset.train, or pass y=[sample.label for sample in "
    "samples]."
)
# Parts of the images that are left out in turn, with calibration="cross".
N_FOLDS = 10
# Most images for which "auto" does so: their embeddings are in memory meanwhile.
MOST_TO_LEAVE_OUT = 500
# Fitted attributes that are of images, and not of embeddings.
_FITTED_ON_IMAGES = ("adapter_", "backbone_", "dtype_", "engine_", "ignore_mask_", "skipped_")


class LearningModel(ThresholdMixin, TransformingModel):
    """Fits on images or embeddings, and takes its threshold from those held back."""

    # Strides of the stages that the embeddings are made of, unless ``layers`` says.
    _strides: tuple[int, ...] = (8, 16)
    _one_mask = False  # whether all images to fit on must ignore the same regions
    tile: int | None = None
    overlap: int = 0
    image_size: Any
    on_error: str
    calibration: str
    calibration_: str
    max_pixels: int
    verbose: int
    image_size_: int | tuple[int, int]
    ignore_mask_: IgnoreMask | None
    skipped_: list[tuple[str, str]]

    # --- Images -----------------------------------------------------------------------------------

    def _fit_images(
        self, images: Any, y: Any, ignore_mask: Any, groups: Any, update: bool = False
    ) -> Self:
        """Embed normal images, the ones to hold back for calibration last, and fit on them."""
        random = check_random_state(self.random_state)
        in_order, order, one_for_all = self._normal_images(
            images, y, ignore_mask, groups, update, random
        )
        size = self.image_size_ if update else image_size_for(in_order, self.image_size, self.tile)
        backbone = self.backbone_ if update else self._open_to_fit(in_order, size, random)
        if self.augment is not None:
            n_held_back = self._n_to_hold_back(len(order), in_order.groups, update)
            in_order, order = self._with_copies(in_order, order, n_held_back)
        options: Any = {"tile": self.tile, "overlap": self.overlap, "verbose": self.verbose}
        extractor = Extractor(backbone, size, self.batch_size, self.on_error, **options)
        transform = self.transform_ if update else None
        if not update and (self.fusion in BY_LAYER or any(getattr(self, a) for a in self._asking)):
            transform = self._learn_from_images(extractor, in_order, random)
        extractor = replace(extractor, transform=transform)
        in_workers = self.n_jobs is not None and not update  # an update is for a few images
        distributor = self._distributor(backbone, extractor) if in_workers else None
        E: Embeddings | None = None
        skipped: list[tuple[int, str]] = []
        if not self._fits_in_shards():
            if distributor is None:
                E, skipped = embed_all(extractor, in_order, progress="fit")
            else:
                E, skipped = embed_distributed(in_order, distributor, self.verbose)
            if len(E) == 0:
                raise none_usable(in_order, skipped)
        groups = in_order.groups
        if groups is not None:
            groups = np.delete(groups, [index for index, _ in skipped])
        n_held_back = self._n_to_hold_back(len(order) - len(skipped), groups, update)
        if isinstance(in_order, AugmentedSource):
            n_held_back = in_order.n_held_back(skipped)
        if transform is not None and not update:  # images that it was learned from are fitted on
            n_held_back = min(n_held_back, len(order) - len(skipped) - transform.n_images_)
        if groups is not None:
            n_held_back = whole_groups(groups, n_held_back)
        of_images = extractor, in_order, n_held_back, skipped, distributor
        shards: ShardSource = ImageShards(*of_images) if E is None else InMemory(E, n_held_back)
        shards.groups, shards.names = in_order.groups, in_order.names
        shards.skipped, shards.copies = skipped, in_order.n_versions
        shards.patch_pixels = patch_pixels(extractor, in_order, skipped, shards.shape[0])
        self._fit_shards(shards, random, update, transform)
        self._take_backbone(backbone)
        self.ignore_mask_, self.image_size_ = one_for_all, size
        left_out = sorted({(order[i], in_order.names[i], reason) for i, reason in skipped})
        self.skipped_ = (self.skipped_ if update else []) + [entry[1:] for entry in left_out]
        return self

    def _normal_images(
        self,
        images: Any,
        y: Any,
        ignore_mask: Any,
        groups: Any,
        update: bool,
        random: np.random.RandomState,
    ) -> tuple[ImageSource, np.ndarray, IgnoreMask | None]:
        """Return the images in the order of fitting, their positions, and what later ones ignore.

        Positions are those among the normal images.
        """
        where = type(self).__name__
        source = ImageSource(images, max_pixels=self.max_pixels, where=where)
        asked = ignore_mask is not None or update
        one_for_all = self._ignore(source, ignore_mask, update) if asked else None
        if groups is not None:
            self._check_may_group(len(source), update)
            source.groups = group_ids(source, groups, self.on_error)
        if y is not None:
            source = source.take(normal_indices(y, len(source), where))
        else:
            refuse_labelled(images, where, _NORMAL_ONLY)
        self._calibrates_by = self._way_to_calibrate(len(source.items), update)
        if groups is None:
            # At the user's line: above a public method, its _fit_images and this one.
            exact_alone = self.memory_budget is not None or self.n_jobs is not None
            found = default_groups(source, self.on_error, exact_alone=exact_alone, stacklevel=5)
            source.groups = None if self._calibrates_by == "leave_one_out" else found
        n, in_order = len(source.items), self._calibrates_by == "leave_one_out"
        order = np.arange(n) if in_order else random.permutation(n)
        if source.groups is not None:
            order = order_of_fit(order, source.groups, random)
        return source.take(order), order, one_for_all

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

    # --- Embeddings that a user brings ------------------------------------------------------------

    def _fit_embeddings(self, E: Any, groups: Any = None, update: bool = False) -> Self:
        """Fit on embeddings in any of the forms that :meth:`fit_embeddings` takes."""
        if not update:
            self._check_fit_on_embeddings()
        where, random = type(self).__name__, check_random_state(self.random_state)
        by_number = isinstance(E, list | tuple) or getattr(E, "ndim", 0) > 0
        one_by_one = isinstance(E, Iterable) and not by_number and not hasattr(E, "ndim")
        self._calibrates_by = self._way_to_calibrate(len(E) if by_number else None, update)
        in_shards, n_features = self._fits_in_shards(), self.n_features_ if update else None
        stream = one_by_one and in_shards and self._calibrates_by == "split"
        indexed = by_number and in_shards and len(E) > 0
        transform = self.transform_ if update else None
        if transform is not None:
            n_features = transform.n_features_in_
        if not stream and not indexed:
            given = list(iter_grids(E, where)) if one_by_one else E
            E = check_embeddings(given, where, n_features)
        n = None if stream else len(E)
        if groups is not None:
            self._check_may_group(n, update)
        ids = None if groups is None or n is None else check_groups(groups, n, where)
        shards: ShardSource
        if n is None:
            if not update:
                self._check_stream()
            n_held_back = self._n_to_hold_back(n, None, update)
            shards = EmbeddingStream(E, n_held_back, random, n_features, where, transform)
        else:
            in_order = self._calibrates_by == "leave_one_out"
            order = np.arange(n) if in_order else random.permutation(n)
            if ids is not None:
                order = order_of_fit(order, ids, random)
                ids = ids[order]
            if not update:
                transform = self._learn_from_embeddings(E, order, ids, random)
            n_held_back = self._n_to_hold_back(n, ids, update)
            if indexed:
                shards = Indexed(E, order, n_held_back, n_features, where, transform)
            else:
                E = E if transform is None else transform_all(E, transform)
                shards = InMemory(take(E, order), n_held_back)
            shards.groups, shards.names = ids, NumberedNames(order)
        self._fit_shards(shards, random, update, transform)
        if not update:
            for fitted_on_images in _FITTED_ON_IMAGES:
                self.__dict__.pop(fitted_on_images, None)
        return self

    def _check_fit_on_embeddings(self) -> None:
        """Raise if a parameter needs images."""
        if self.fusion in BY_LAYER:
            raise InvalidValueError(
                f"{type(self).__name__}: fusion={self.fusion!r} must know which features are of "
                "which layer, which embeddings do not tell. Call fit(images), or set another "
                "fusion."
            )

    def _check_stream(self) -> None:
        """Raise if a map must be learned before the first of embeddings that come once."""
        if self._needs_transform():
            raise InvalidValueError(
                f"{type(self).__name__}: feature_dim, whiten and normalize are learned before the "
                "fit, so embeddings must be there twice, got an iterable that is gone through "
                "once. Give an array, which may lie in a file, or a list."
            )

    # --- Fitting and calibrating ------------------------------------------------------------------

    def _way_to_calibrate(self, n: int | None, update: bool) -> str:
        """Return what ``calibration`` stands for: ``n`` images, None if they come only once."""
        if update:
            return self.calibration_
        if self.calibration != "auto":
            return self.calibration
        many = n is None or n * n_versions(self.augment) > MOST_TO_LEAVE_OUT
        return "split" if many or self._cannot_cross() is not None else "cross"

    def _cannot_cross(self) -> str | None:
        """Return why folds of images cannot be left out, as the end of a sentence; else None."""
        if self.memory_budget is not None:
            return "keeps the embeddings of all images, which no memory_budget bounds"
        if self.false_alarm_confidence is not None:
            return "has scores that depend on each other, for which no confidence is known"
        return None

    def _n_to_hold_back(
        self, n: int | None, groups: np.ndarray | None, update: bool = False
    ) -> int:
        """Return how many of ``n`` images, the last ones, to hold back for calibration.

        Groups (n,) in the order of fitting are held back whole, and it is them that count. In an
        ``update`` scores that stay count. For "structure" others are held back to learn how maps
        vary, unless that is known from before the update.
        """
        if self._calibrates_by != "split":
            return 0
        known = update and hasattr(self.layer_models_ or self, "map_statistics_")
        purposes = 2 if self.image_score == "structure" and not known else 1
        n_known = 0
        if update and self._scores_are_monotone():
            n_known = len(np.unique(self.calibration_groups_))
        starts = None if groups is None else group_starts(groups)
        n_groups = n if starts is None else len(starts)
        wanted = calibration_size(
            self.false_alarm_rate, n_groups, n_known, purposes, self.false_alarm_confidence
        )
        if starts is None or groups is None:
            return wanted
        return len(groups) - int(np.append(starts, len(groups))[len(starts) - wanted])

    def _check_may_group(self, n: int | None, update: bool) -> None:
        """Raise InvalidValueError if whole groups of ``n`` images cannot be held back."""
        if not update and self.calibration == "leave_one_out":
            raise InvalidValueError(
                f"{type(self).__name__}: groups need calibration='split' or 'cross': to leave one "
                "image of a group out leaves the others in. Set one of these, or groups=None."
            )
        if n is None:
            raise InvalidValueError(
                f"{type(self).__name__}: groups need embeddings that can be taken in any order, "
                "got an iterable that is gone through once. Give an array, which may lie in a "
                "file, or a list."
            )

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
        left_out, copies = self._calibrates_by != "split", shards.copies
        empty.keeps_images = left_out
        removed = model._remove_calibration_patches() if update else None
        statistics = model._take_statistics() if update else None
        # Fit on the images that are not held back.
        accumulated = copy.copy(empty)
        for result in shards.to_fit(ShardTask(empty, model if update else None)):
            accumulated.merge(result.accumulated)
            del result  # and its memory, before the next
        fitted = model._fit_accumulated(accumulated, random)
        # Calibrate with scores of images that were not fitted on.
        # Those of images fitted on before stay if they can only have fallen since, or nearly so.
        stay = update and (joins or left_out) and self.image_score != "structure"
        scores: list[Any] = []
        if stay:
            scores.append(np.column_stack([self.calibration_peaks_, self.calibration_scores_]))
        accumulated = copy.copy(empty)
        if left_out:
            folding, more = partial(self._fold, shards, copies), (copies, shards.patch_pixels)
            scores += model._score_left_out(shards.embeddings, fitted, folding, *more)
        else:
            task = ShardTask(empty if joins else None, model, True, shards.patch_pixels)
            for result in shards.held_back(task):
                scores.append(result.scores)
                if joins:
                    accumulated.merge(result.accumulated)
                del result
        fresh._calibrate_by(scores, shards, stay, model, statistics)
        # Add the images held back to the model, if that can only lower scores.
        if joins:
            model._add_calibration_patches(removed, accumulated, random)
        self.__dict__ = fresh.__dict__  # nothing of an earlier fit is left

    def _calibrate_by(
        self,
        scores: list[np.ndarray],
        shards: ShardSource,
        stay: bool,
        model: EmbeddingModel,
        statistics: np.ndarray | None,
    ) -> None:
        """Take the threshold from scores: those from before if they stay, and those of shards."""
        n_columns = 4 if self.image_score == "structure" else 2
        found = np.concatenate(scores or [np.empty((0, n_columns), np.float32)])
        left_out = self._calibrates_by != "split"
        known = self.calibration_groups_ if stay else np.empty(0, np.int64)
        of_last = len(found) - len(known), shards.copies if left_out else 1
        new = shards.groups_of_last(*of_last) + known.max(initial=-1) + 1
        groups = np.concatenate([known, new])
        names = [*(self.calibration_names_ if stay else []), *shards.names_of_last(*of_last)]
        promise = self.false_alarm_rate, self.false_alarm_confidence
        own = self._own_pixel_threshold()
        self.calibration_scores_ = model._standardize_calibration(
            found[:, 1:], groups, left_out, statistics
        )
        self.calibration_ = self._calibrates_by
        first = len(groups) - len(self.calibration_scores_)  # "structure" learned from others
        self.calibration_groups_, self.calibration_names_ = groups[first:], names[first:]
        self.calibration_peaks_ = found[first:, 0]
        self.pixel_threshold_ = self._calibrated_pixels() if own is None else own
        self._remember_parameters()
        calibrated, shortfall = threshold_and_shortfall(
            self.calibration_scores_, *promise, self.calibration_groups_
        )
        if self._take_threshold(calibrated) and shortfall is not None:
            # At the user's line: above a public method, its _fit_..., _fit_shards and this one.
            warnings.warn(shortfall, CalibrationWarning, stacklevel=5)

    def _fold(self, shards: ShardSource, copies: int, n: int) -> np.ndarray:
        """Return the folds (n,) of the images of a fit, ascending: one for each, or a few."""
        groups = shards.groups_of_last(n, copies)
        return folds_of(groups, N_FOLDS if self._calibrates_by == "cross" else n)

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

    # --- The backbone -----------------------------------------------------------------------------

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

    def _distributor(self, backbone: AnyBackbone, extractor: Extractor) -> Distribute:
        """Return the function that embeds shards of images in the workers of joblib's backend."""
        unfitted = type(self)(**self.get_params(deep=False))
        return partial(
            distribute,
            backbone=backbone,
            # Engine and type of this process, not what "auto" would be there: all embeddings of
            # a bank must be of one kind.
            reopen=partial(
                unfitted._open_backbone,
                engine=backbone.engine,
                dtype=type_name(backbone.dtype),
                adapter=backbone.adapter,
            ),
            extractor=extractor,
            n_jobs=self.n_jobs or 1,
            where=type(self).__name__,
        )

    def _take_backbone(self, backbone: AnyBackbone) -> None:
        """Make this the backbone of the fitted detector."""
        self.backbone_ = backbone
        self.engine_ = backbone.engine
        self.dtype_ = type_name(backbone.dtype)
