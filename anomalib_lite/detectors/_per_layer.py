"""One model for each layer of a network, in place of one model of all layers side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from anomalib_lite._validation import check_memory
from anomalib_lite.detectors.fitting import Accumulator, EmbeddingModel, Folding, LeftOut
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.images.embeddings import Embeddings
from anomalib_lite.model_file import select

__all__ = ["LayerModels"]

# What the model of a layer has in place of the detector's parameters: maps are averaged before
# they become scores of images, and embeddings come as they are to be compared.
_OF_ONE_LAYER: dict[str, Any] = {
    "image_score": "max",
    "global_weight": 1.0,  # so that its score of an image is that of the whole image
    "layer_weights": None,
    "feature_dim": None,
    "whiten": False,
    "backbone": None,
    "weights": None,
    "layers": None,
    "n_jobs": None,
    "augment": None,  # the copies are among the embeddings
}


class LayerModels(EmbeddingModel):
    """Fits a model on the features of each layer, and averages their patch scores.

    Parameters
    ----------
    detector : BaseDetector
        Unfitted, without a backbone: its parameters are those of the models.
    layers : sequence of ndarray of int64
        Positions of the features of each layer among those of an embedding.

    Attributes
    ----------
    models_ : list of BaseDetector
        One for each layer, fitted on embeddings.

    Notes
    -----
    RAD and SuperAD keep one memory bank a layer, and average the maps. A layer of few channels or
    of small features counts as much as any other in that mean only as far as its distances are as
    large: ``normalize`` or ``whiten`` makes them comparable.
    """

    models_: list[Any]

    def __init__(self, detector: Any, layers: Sequence[np.ndarray]) -> None:
        self.detector = detector
        self.layers = layers

    @classmethod
    def of(cls, detector: Any) -> Self:
        """Return unfitted models for a detector whose map is learned."""
        parameters = detector.get_params(deep=False) | {"backbone": None, "n_jobs": None}
        return cls(type(detector)(**parameters), detector.transform_.layers_)

    def copied(self) -> Self:
        """Return a copy whose models can be updated; they share what they have learned."""
        other = copy.copy(self)
        other.models_ = [copy.copy(model) for model in self.models_]
        return other

    @property
    def _name(self) -> str:
        return type(self.detector).__name__

    @property
    def image_score(self) -> str:  # type: ignore[override]
        """The detector's parameter."""
        return str(self.detector.image_score)

    @property
    def smoothing(self) -> float:  # type: ignore[override]
        """The detector's parameter."""
        return float(self.detector.smoothing)

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """The detector's parameter."""
        return int(self.detector.batch_size)

    def _unfitted(self) -> list[Any]:
        """Return an unfitted model for each layer, with its share of the memory."""
        given = self.detector.get_params(deep=False)
        given |= {name: value for name, value in _OF_ONE_LAYER.items() if name in given}
        given["fusion"] = self.detector._layout
        budget = self.detector.memory_budget
        models, n_features = [], sum(len(at) for at in self.layers)
        for at in self.layers:
            if budget is not None:
                whole = check_memory("memory_budget", budget, type(self.detector).__name__)
                given["memory_budget"] = max(1, whole * len(at) // n_features)
            models.append(type(self.detector)(**given))
            models[-1].n_features_ = len(at)
        return models

    # --- What an EmbeddingModel supplies --------------------------------------------------------

    def _make_accumulator(
        self,
        shape: tuple[int, ...],
        n_images: int | None,
        in_flight: int,
        random: np.random.RandomState,
    ) -> LayerAccumulator:
        parts = []
        models = self.models_ if hasattr(self, "models_") else self._unfitted()
        # One image is in memory with all layers, beside the features of one layer.
        in_flight += 4 * int(np.prod(shape))
        for i, (model, at) in enumerate(zip(models, self.layers, strict=True)):
            own, share = (*shape[:2], len(at)), in_flight * len(at) // shape[2]
            try:
                parts.append(model._make_accumulator(own, n_images, share, random))
            except InvalidValueError as error:
                # What it names as enough would be that of this layer alone.
                reason = str(error).partition(" Raise it to ")[0]
                raise InvalidValueError(
                    f"{reason} This is the share of layer {i}, {len(at)} of {shape[2]} features. "
                    "Raise memory_budget, or lower image_size or batch_size."
                ) from error
        images_per_shard = min(part.images_per_shard for part in parts)
        if self.detector.memory_budget is not None:  # features of a layer are copied
            images_per_shard = max(1, images_per_shard // 2)
        return LayerAccumulator(parts, self.layers, images_per_shard)

    def _fit_accumulated(self, accumulated: LayerAccumulator, random: np.random.RandomState) -> Any:
        models = self.models_ if hasattr(self, "models_") else self._unfitted()
        both = zip(models, accumulated.parts, strict=True)
        fitted = [model._fit_accumulated(part, random) for model, part in both]
        self.models_ = models
        return fitted

    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = zip(self.models_, self.layers, strict=True)
        found = [model._score_patches(np.take(E, at, axis=-1)) for model, at in both]
        return self._mean(found, np.isnan(E[..., 0]))

    def _mean(self, found: Sequence[Any], ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Average the patch scores of the layers, and score the images by them."""
        maps = [patches for patches, *_ in found]
        patch_scores = np.asarray(np.mean(maps, axis=0, dtype=np.float32))
        weight = np.float32(getattr(self.detector, "global_weight", 0))
        scores = self._score_maps(patch_scores, ignored)
        if weight > 0:
            whole = np.mean([whole for _, whole, *_ in found], axis=0, dtype=np.float32)
            scores = weight * whole + (1 - weight) * scores
        return patch_scores, scores

    def _left_out(
        self, E: Embeddings, fitted: Any, folding: Folding, copies: int
    ) -> Iterator[LeftOut | None]:
        layers = [
            model._left_out(_of_layer(E, at), own, folding, copies)
            for model, at, own in zip(self.models_, self.layers, fitted, strict=True)
        ]
        for found in zip(*layers, strict=True):
            if any(layer is None for layer in found):
                yield None
                return
            ignored = found[0][2]
            yield *self._mean(found, ignored), ignored

    def _scores_are_monotone(self) -> bool:
        return bool(self.detector._scores_are_monotone())

    def _existing_patches(self) -> Any:
        existing = [model._existing_patches() for model in self.models_]
        return None if existing[0] is None else existing

    def _remove_calibration_patches(self) -> list[Any]:
        return [model._remove_calibration_patches() for model in self.models_]

    def _add_calibration_patches(
        self, removed: Any, accumulated: LayerAccumulator, random: np.random.RandomState
    ) -> None:
        before = [None] * len(self.models_) if removed is None else removed
        for model, old, part in zip(self.models_, before, accumulated.parts, strict=True):
            model._add_calibration_patches(old, part, random)

    def _summary_lines(self) -> list[tuple[str, str]]:
        """Return lines about what was learned, each as (title, text)."""
        return [
            (title, f"layer {i}: {text}")
            for i, model in enumerate(self.models_)
            for title, text in model._summary_lines()
        ]

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays: dict[str, np.ndarray] = {}
        states = []
        for i, model in enumerate(self.models_):
            own, state = model._get_state()
            arrays |= {f"layer{i}.{name}": array for name, array in own.items()}
            states.append(state)
        return arrays, {"layers": states}

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        models = self._unfitted()
        for i, (model, own) in enumerate(zip(models, state["layers"], strict=True)):
            model._set_state(select(f"layer{i}.", arrays), own)
            if model.n_features_ != len(self.layers[i]):
                raise ValueError(f"layer {i} has {model.n_features_} features")
        self.models_ = models


def _of_layer(E: Embeddings, at: np.ndarray) -> Embeddings:
    """Return the features of one layer, whose positions are given."""
    if isinstance(E, np.ndarray):
        return np.take(E, at, axis=-1)
    return [np.take(grid, at, axis=-1) for grid in E]


class LayerAccumulator(Accumulator):
    """An accumulator for each layer.

    Parameters
    ----------
    parts : list of Accumulator
    layers : sequence of ndarray of int64
        Positions of the features of each layer.
    images_per_shard : int
    """

    def __init__(
        self, parts: list[Any], layers: Sequence[np.ndarray], images_per_shard: int
    ) -> None:
        self.parts, self.layers, self.images_per_shard = parts, layers, images_per_shard

    def accumulate(self, E: Embeddings, position: int, existing: Any = None) -> Self:
        """Return an accumulator of the shard, each layer by itself."""
        shard, parts = copy.copy(self), []
        for i, (part, at) in enumerate(zip(self.parts, self.layers, strict=True)):
            own, known = _of_layer(E, at), None if existing is None else existing[i]
            part = copy.copy(part)
            part.files, part.keeps_images = self.files, self.keeps_images
            parts.append(part.accumulate(own, position, known))
        shard.parts = parts
        return shard

    def merge(self, other: Self) -> None:
        """Add what another holds, layer by layer."""
        self.parts = [copy.copy(part) for part in self.parts]  # a copy of this one has them too
        for part, more in zip(self.parts, other.parts, strict=True):
            part.merge(more)
