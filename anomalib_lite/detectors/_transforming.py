"""Where a detector has its embeddings from: a backbone, and a learned map that changes them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from anomalib_lite._validation import check_memory
from anomalib_lite.detectors._per_layer import LayerModels
from anomalib_lite.detectors.fitting import (
    EmbeddingModel,
    Indexed,
    none_usable,
    refuse_budget,
)
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.fusion import EmbeddingTransform
from anomalib_lite.gaussian import Moments
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.images.embeddings import patch_rows
from anomalib_lite.model_file import select

__all__ = ["BY_LAYER", "TransformingModel"]

# Strategies that must know which features are of which layer.
BY_LAYER = ("weighted", "adaptive", "per_layer")

# Fitted attributes that are of images, and not of embeddings.
_FITTED_ON_IMAGES = ("adapter_", "backbone_", "dtype_", "engine_", "ignore_mask_", "skipped_")
# Images that a transformation is learned from, at most: all of their patches.
_MOST_IMAGES = 64
_TRANSFORM = "transform."  # prefix of its tensors in a file


class TransformingModel(EmbeddingModel):
    """Fits on embeddings that a learned map has changed, if a parameter asks for one."""

    random_state: Any
    threshold_: float
    calibration_scores_: np.ndarray
    calibration_groups_: np.ndarray
    # For detectors that do not have all of these parameters.
    false_alarm_confidence: float | None = None
    fusion: str = "concat"
    layer_weights: Sequence[float] | None = None
    feature_dim: int | None = None
    projection: str = "pca"
    whiten: bool = False
    whiten_shrinkage: float = 0.07
    normalize: bool = False
    false_alarm_rate: float
    n_jobs: Any
    backbone_: AnyBackbone
    transform_: EmbeddingTransform | None = None  # None: embeddings stay as they are
    layer_models_: LayerModels | None = None  # with fusion="per_layer"
    # Parameters that ask for a map; without normalize, the model divides by the length itself.
    _asking: ClassVar[tuple[str, ...]] = ("feature_dim", "whiten", "normalize")
    _copies: ClassVar[int] = 1  # 2: the features of a patch are beside those of its image
    _layout: ClassVar[str] = "concat"  # how layers are brought together for BY_LAYER

    def _check_transform(self) -> None:
        """Raise for the first parameter of the map that cannot be used."""
        where = type(self).__name__
        self._unfitted_transform(None).check(where)
        if (self.fusion == "weighted") == (self.layer_weights is None):
            raise InvalidValueError(
                f"{where}: layer_weights go with fusion='weighted', one number a layer; got "
                f"fusion={self.fusion!r} and layer_weights={self.layer_weights!r}. Set both, or "
                "neither."
            )
        if isinstance(self.layer_weights, str):
            raise InvalidTypeError(
                f"{where}: layer_weights must be a list of numbers, one a layer, got "
                f"{self.layer_weights!r}. fusion='adaptive' learns them."
            )
        if self.fusion == "per_layer" and self.image_score == "reweighted":
            raise InvalidValueError(
                f"{where}: image_score='reweighted' needs one model, and fusion='per_layer' has "
                "one for each layer. Set another image_score, or fusion='concat'."
            )

    def _unfitted_transform(self, random: Any) -> EmbeddingTransform:
        return EmbeddingTransform(
            feature_dim=self.feature_dim,
            projection=self.projection,
            whiten=self.whiten,
            whiten_shrinkage=self.whiten_shrinkage,
            normalize=self.normalize if "normalize" in self._asking else False,
            layer_weights="adaptive" if self.fusion == "adaptive" else self.layer_weights,
            per_layer=self.fusion == "per_layer",
            random_state=random,
        )

    def _needs_transform(self) -> bool:
        """Whether the parameters ask for a map."""
        return self.fusion in BY_LAYER or any(getattr(self, name) for name in self._asking)

    # --- Learning from embeddings that a user brings ---------------------------------------------

    # --- Learning the map -----------------------------------------------------------------------

    def _learn_from_images(
        self, extractor: Extractor, images: ImageSource, random: np.random.RandomState
    ) -> EmbeddingTransform:
        """Learn from images in the order of fitting, without those to be held back."""
        positions, most = self._to_learn_from(len(images), images.groups), self._most_images()
        learner, skipped = _Learner(self, random), []
        for start in range(0, len(positions), most):  # the next if all are unusable
            some = images.take(positions[start : start + most])
            left_out: list[tuple[int, str]] = []
            for batch, E in extractor.embed_batches(some, skipped=left_out):
                if learner.n_images == 0 and self.fusion in BY_LAYER:
                    learner.channels = _channels(extractor, batch.pixels, self._copies)
                learner.add(E)
            skipped += [(start + i, reason) for i, reason in left_out]
            if learner.n_images:
                return learner.learn()
        raise none_usable(images, skipped)

    def _learn_from_embeddings(
        self,
        E: Any,
        order: np.ndarray,
        groups: np.ndarray | None,
        random: np.random.RandomState,
    ) -> EmbeddingTransform | None:
        """Learn from embeddings that are asked for by number, in the order of fitting."""
        if not self._needs_transform():
            return None
        learner, given = _Learner(self, random), Indexed(E, order, 0, None, type(self).__name__)
        for position in self._to_learn_from(len(order), groups)[: self._most_images()]:
            learner.add(given.grid(position)[None])
        return learner.learn()

    @abstractmethod
    def _n_to_hold_back(
        self, n: int | None, groups: np.ndarray | None, update: bool = False
    ) -> int:
        """Return how many of ``n`` images, the last ones, to hold back for calibration."""

    def _most_images(self) -> int:
        """Number of images to learn from: one where their sizes are all that must be known."""
        components = self.feature_dim is not None and self.projection == "pca"
        return _MOST_IMAGES if components or self.whiten or self.fusion == "adaptive" else 1

    def _to_learn_from(self, n: int, groups: np.ndarray | None) -> np.ndarray:
        """Return positions in the order of fitting; the first ``_most_images()`` are used.

        Images held back for calibration are not among them: their scores must be those of images
        that nothing was learned from.
        """
        if self._calibrates_by == "leave_one_out":  # in the order given: from all of it
            sample = np.linspace(0, n - 1, min(n, self._most_images())).astype(np.int64)
            return np.concatenate([sample, np.setdiff1d(np.arange(n), sample)])
        return np.arange(n - self._n_to_hold_back(n, groups))

    def _score_raw(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score patches and images as :meth:`_score_patches`, from embeddings not yet changed."""
        if self.transform_ is not None:
            E = self.transform_.transform(E)
        return (self.layer_models_ or self)._score_patches(np.ascontiguousarray(E))

    # --- Its backbone ---------------------------------------------------------------------------

    # --- Its part of the detector's file --------------------------------------------------------

    def _describe_transform(self, tensors: dict[str, Any], header: dict[str, Any]) -> None:
        """Add the map to what a file holds."""
        if self.transform_ is not None:
            arrays, header["state"]["transform"] = self.transform_.to_arrays()
            tensors |= {_TRANSFORM + name: array for name, array in arrays.items()}

    def _restore_transform(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Take the map over from a file; ValueError if it does not fit."""
        if "transform" in state:
            fitted = self._unfitted_transform(None)
            self.transform_ = fitted.set_arrays(select(_TRANSFORM, arrays), state["transform"])


class _Learner:
    """Moments of the patches that a map is learned from."""

    def __init__(self, model: TransformingModel, random: np.random.RandomState) -> None:
        self.model, self.random = model, random
        self.n_images, self.n_features = 0, 0
        self.channels: list[int] | None = None
        self._moments = Moments(1)

    def add(self, E: np.ndarray) -> None:
        """Add the patches of images (B, h, w, D) that are not ignored."""
        if self.n_images == 0:
            self.n_features = E.shape[-1]
            n = self.n_features // self.model._copies
            if self.model.memory_budget is not None:
                self._check_budget(6 * 8 * n**2 + 2 * E.nbytes)
            self._moments = Moments(n)
        n = len(self._moments.mean)
        for grid in E:  # one by one, so that the sums do not depend on the batches
            self._moments.add(patch_rows(grid[None])[:, :n])
        self.n_images += len(E)

    def _check_budget(self, needed: int) -> None:
        where = type(self.model).__name__
        budget = check_memory("memory_budget", self.model.memory_budget, where)
        if budget < needed:
            refuse_budget(where, budget, needed, "the moments of the features and a batch")

    def learn(self) -> EmbeddingTransform:
        """Learn the map; errors are those of the detector."""
        try:
            # A copy, so that what is drawn later does not depend on the map.
            return self.model._unfitted_transform(copy.deepcopy(self.random)).fit_moments(
                self._moments,
                channels=self.channels,
                copies=self.model._copies,
                n_features=self.n_features,
                n_images=self.n_images,
            )
        except InvalidValueError as error:
            message = str(error).removeprefix("EmbeddingTransform: ")
            raise InvalidValueError(f"{type(self.model).__name__}: {message}") from error


def transform_all(E: Any, transform: EmbeddingTransform) -> Any:
    """Change embeddings that are all in memory: an array, or a list of arrays (h, w, D)."""
    if isinstance(E, np.ndarray):
        return transform.transform(E)
    return [transform.transform(grid) for grid in E]


def _channels(extractor: Extractor, pixels: np.ndarray, copies: int) -> list[int]:
    """Return the number of channels of each layer, asking the network if it does not say."""
    backbone: Any = extractor.backbone
    if backbone.channels is not None:
        return list(backbone.channels)
    side = None if extractor.tile is None else extractor.tile_side
    maps = backbone(pixels[:1, :side, :side])
    return [int(m.shape[1]) for m in maps[: len(maps) // copies]]


def type_name(dtype: Any) -> str:
    """Return the name of a number type without "torch."."""
    return str(dtype).removeprefix("torch.")
