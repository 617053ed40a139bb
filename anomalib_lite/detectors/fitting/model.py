"""Methods that a detector supplies to fit on patch embeddings, and to score them."""

from __future__ import annotations

import copy
import math
import sys
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, Self

import numpy as np
from sklearn.base import BaseEstimator

from anomalib_lite._validation import check_memory
from anomalib_lite.anomaly_map import anomaly_maps, image_scores, standardize, structure
from anomalib_lite.detectors.fitting.groups import group_starts
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.images.augmentation import AugmentedSource
from anomalib_lite.images.embeddings import Embeddings, contiguous

__all__ = [
    "Accumulator",
    "EmbeddingModel",
    "Folding",
    "InMemory",
    "LeftOut",
    "ShardResult",
    "ShardSource",
    "ShardTask",
    "images_within_budget",
    "refuse_budget",
]


# Number of images, without copies -> their folds (n,), ascending.
Folding = Callable[[int], np.ndarray]
# Scores of patches (b, h, w) and of images (b,), and which patches are ignored (b, h, w).
LeftOut = tuple[np.ndarray, np.ndarray, np.ndarray]


class Accumulator(ABC):
    """Keeps what a model needs of embeddings that arrive shard by shard.

    A model makes an empty accumulator. Each shard of images is accumulated on its own, perhaps in
    another process, and the results are merged in the order of the shards. The shards are fixed,
    so the result does not depend on which process computed which shard.
    """

    images_per_shard: int = sys.maxsize  # images whose embeddings are in memory at a time
    channels: np.ndarray | None = None  # channels of the embeddings that are used; None for all
    keeps_images: bool = False  # whether to keep of each what leaving it out will need
    files: range = range(0)  # numbers of the shard's images, and of those that could not be used

    @abstractmethod
    def accumulate(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> Self:
        """Return an accumulator of the same kind that holds only this shard.

        Parameters
        ----------
        E : Embeddings
            Embeddings of the images of the shard.
        position : int
            Position of its first image among all images.
        existing : array of shape (M, D), float32, optional
            Patches that are in the model already.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the content of another accumulator, which is of the images that follow."""


class EmbeddingModel(BaseEstimator, metaclass=ABCMeta):
    """Fits on patch embeddings and scores them.

    A subclass must supply the abstract methods: an accumulator, how to fit on it, how to score
    patches, and its state. It may supply the others.
    """

    # "split", "cross" or "leave_one_out": what ``calibration`` stands for in the present fit.
    _calibrates_by: str = "split"
    image_score: str = "max"
    smoothing: float = 4.0
    false_alarm_rate: float
    augment: Any = None
    memory_budget: Any
    batch_size: int
    n_features_: int
    map_statistics_: np.ndarray  # (2, 3), what "structure" standardizes by
    _channels: np.ndarray | None = None  # channels of the embeddings that are used; None for all

    # --- A subclass must supply these ---------------------------------------------------------

    @abstractmethod
    def _make_accumulator(
        self,
        shape: tuple[int, ...],
        n_images: int | None,
        in_flight: int,
        random: np.random.RandomState,
    ) -> Accumulator:
        """Return an empty accumulator; the model itself stays as it is.

        Parameters
        ----------
        shape : (h, w, D)
            Shape of the embeddings of the first image.
        n_images : int or None
            Number of images that are accumulated, also of those held back if they join the model
            afterwards; None if it is not known in advance.
        in_flight : int
            Bytes of memory taken beside the embeddings of a shard: batches of images, network.
        random : RandomState
            Source of random choices.
        """

    @abstractmethod
    def _fit_accumulated(self, accumulated: Any, random: np.random.RandomState) -> Any:
        """Fit on the accumulated embeddings; in an update, also on those of earlier fits.

        Return what :meth:`_left_out` needs, if anything.
        """

    @abstractmethod
    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score patches (B, h, w) and images (B,), both float32, from embeddings (B, h, w, D)."""

    @abstractmethod
    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what scoring needs beside the parameters and the threshold: arrays, JSON."""

    @abstractmethod
    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Become fitted from what :meth:`_get_state` gave; ValueError if it does not fit."""

    # --- A subclass may supply these ----------------------------------------------------------

    def _fits_in_shards(self) -> bool:
        """Whether ``fit`` works shard by shard, so that embeddings are never all in memory."""
        return self.memory_budget is not None

    def _without(self, own: Embeddings, first: int, fitted: Any) -> Self | None:
        """Return a model of all images of the fit but ``own``; None if too few are left.

        The first of them has position ``first``; ``fitted`` is what :meth:`_fit_accumulated`
        returned.
        """
        raise InvalidValueError(
            f"{type(self).__name__}: this detector cannot leave images out. Use "
            "calibration='split'."
        )

    def _left_out(
        self, E: Embeddings, fitted: Any, folding: Folding, copies: int
    ) -> Iterator[LeftOut | None]:
        """Score the images of each fold by a model without that fold, some at a time.

        Parameters
        ----------
        E : Embeddings
            All images of the fit, each with its copies behind it.
        fitted
            What :meth:`_fit_accumulated` returned.
        folding : callable
            Takes the number of images, without copies, and returns their folds (n,), ascending.
        copies : int
            Number of versions of each image. They are left out together, and the first is scored.

        Yields
        ------
        (patch_scores, scores, ignored) or None
            Arrays (b, h, w) float32, (b,) float32 and (b, h, w) bool; None if too few images are
            left without a fold.
        """
        folds = folding(len(E) // copies)
        for begin, end in pairwise([*group_starts(folds), len(folds)]):
            own = E[begin * copies : end * copies]
            rest = self._without(own, int(begin) * copies, fitted)
            if rest is None:
                yield None
                return
            originals = own[::copies]
            step = self.batch_size if isinstance(own, np.ndarray) else 1
            for i in range(0, len(originals), step):
                some = np.ascontiguousarray(originals[i : i + step])
                yield *rest._score_patches(some), np.isnan(some[..., 0])

    def _score_left_out(
        self, E: Embeddings, fitted: Any, folding: Folding, copies: int, patch_pixels: float
    ) -> list[np.ndarray]:
        """Score images as :meth:`_left_out`, like :meth:`_calibration_scores`, some at a time.

        Return none if too few images are left.
        """
        scores = []
        for found in self._left_out(E, fitted, folding, copies):
            if found is None:
                return []
            scores.append(self._with_peaks(*found[:2], patch_pixels))
        return scores

    def _scores_are_monotone(self) -> bool:
        """Whether fitting on more images can only lower scores.

        If so, the images held back are added to the model after calibration, and their scores are
        still used after an update.
        """
        return False

    def _existing_patches(self) -> np.ndarray | None:
        """Return the patches in the model, for coresets that must not repeat them; else None."""
        return None

    def _remove_calibration_patches(self) -> Any:
        """Take the images held back out of the model before an update; return their patches."""

    def _add_calibration_patches(
        self, removed: Any, accumulated: Any, random: np.random.RandomState
    ) -> None:
        """Add the images held back: those removed before an update, and the new ones."""

    # --- What the base class makes of them ----------------------------------------------------

    @property
    def _name(self) -> str:
        """The first word of error messages."""
        return type(self).__name__

    def _scored(self, E: Embeddings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Score a few images at a time, since the search needs memory of its own."""
        step = self.batch_size if isinstance(E, np.ndarray) else 1
        for i in range(0, len(E), step):
            yield self._score_patches(np.ascontiguousarray(E[i : i + step]))

    def _image_scores(self, E: Embeddings) -> np.ndarray:
        scores = [of_images for _, of_images in self._scored(E)]
        return np.concatenate(scores or [np.empty(0, np.float32)])

    def _calibration_scores(self, E: Embeddings, patch_pixels: float) -> np.ndarray:
        """Score normal images that were not fitted on: see :meth:`_with_peaks`."""
        return np.concatenate([self._with_peaks(*found, patch_pixels) for found in self._scored(E)])

    def _with_peaks(
        self, patch_scores: np.ndarray, scores: np.ndarray, patch_pixels: float
    ) -> np.ndarray:
        """Put the largest value of each heatmap before what :meth:`_score_maps` says of it.

        Returns (b, 2), or (b, 4) for "structure" before maps are known, float32. Resizing a
        heatmap from the size in the backbone, where a patch has ``patch_pixels`` a side, to the
        image's own raises no maximum.
        """
        height, width = (round(n * patch_pixels) for n in patch_scores.shape[1:])
        sizes = [(height, width)] * len(scores)
        maps = anomaly_maps(patch_scores, (height, width), sizes, self.smoothing)
        return np.column_stack([[heatmap.max() for heatmap in maps], scores])

    def _score_maps(self, patch_scores: np.ndarray, ignored: np.ndarray) -> np.ndarray:
        """Compute the scores (B,) of images from those of their patches, by ``image_score``.

        ``ignored`` (B, h, w), bool, says which patches have no effect. For ``"structure"``, until
        the maps of normal images are known, their descriptions (B, 3).
        """
        left_out = ignored if ignored.any() else None
        if self.image_score != "structure":
            return image_scores(patch_scores, self.image_score, left_out)
        described = structure(patch_scores, left_out)
        statistics = getattr(self, "map_statistics_", None)
        return described if statistics is None else standardize(described, statistics)

    def _with_copies(
        self, images: ImageSource, order: np.ndarray, n_held_back: int
    ) -> tuple[AugmentedSource, np.ndarray]:
        """Put copies behind each image to fit on; return in ``order`` what each was made of.

        Images held back get none: they must be like future ones.
        """
        source = AugmentedSource(images, self.augment, n_held_back)
        return source, order[source.origins]

    def _take_statistics(self) -> np.ndarray | None:
        """Take out what earlier maps have taught: without, new maps are described in full."""
        statistics = self.__dict__.pop("map_statistics_", None)
        return None if self.image_score != "structure" else statistics

    def _describe_statistics(self, tensors: dict[str, Any]) -> None:
        """Add to what a file holds how the maps of normal images vary, if that is known."""
        if hasattr(self, "map_statistics_"):
            tensors["map_statistics"] = self.map_statistics_

    def _restore_statistics(self, arrays: dict[str, np.ndarray]) -> None:
        """Take it over from a file."""
        if self.image_score == "structure":
            self.map_statistics_ = arrays["map_statistics"]

    def _standardize_calibration(
        self,
        described: np.ndarray,
        groups: np.ndarray,
        left_out: bool,
        statistics: np.ndarray | None = None,
    ) -> np.ndarray:
        """Learn from what :meth:`_score_maps` says of normal maps how they vary; return scores.

        One half of the images teaches, the other half calibrates: an image that had a say in its
        own standard would score too low; nor are photographs of one part, a group (N,), in both
        halves. ``left_out`` images do both. If ``statistics`` are known, as
        in an update, they stay: these images had no say in them, so all of them calibrate.
        """
        if self.image_score != "structure":
            return described[:, 0]
        n_taught = 0
        if statistics is None:
            starts = group_starts(groups)
            n_taught = len(described)
            if not left_out and len(starts):
                n_taught = int(starts[len(starts) // 2])
            if n_taught < 2:
                raise InvalidValueError(
                    f"{self._name}: image_score='structure' needs at least "
                    f"{2 if left_out else 4} images to learn how maps of normal images vary (with "
                    f"calibration='split', held back), got {len(described)}. Give more "
                    "images, or set another image_score."
                )
            taught = described[:n_taught].astype(np.float64)
            spread = taught.std(axis=0, ddof=1)
            statistics = np.array([taught.mean(axis=0), spread], np.float32)
        self.map_statistics_ = statistics
        return standardize(described if left_out else described[n_taught:], statistics)


@dataclass
class ShardResult:
    """Results for the images of one shard."""

    accumulated: Any = None  # an Accumulator, if the task asked for one
    scores: np.ndarray | None = None  # (n, 2) or (n, 4) float32, if the task asked for them
    embeddings: Embeddings | None = None  # only if there was no task
    skipped: Sequence[tuple[int, str]] = ()  # position in the shard, reason
    error: tuple[str, str] | None = None  # class and message: not all backends can send the object


@dataclass(frozen=True)
class ShardTask:
    """A task for one shard: accumulate its embeddings, score its images, or both."""

    empty: Accumulator | None = None  # makes the accumulator of the shard
    model: EmbeddingModel | None = None  # model fitted so far
    score: bool = False  # whether to score the images with the model
    patch_pixels: float = 8.0  # side of a patch in the backbone

    @property
    def channels(self) -> np.ndarray | None:
        """Channels of the embeddings that are used; None for all."""
        if self.empty is not None:
            return self.empty.channels
        return None if self.model is None else self.model._channels

    def __call__(self, E: Embeddings, position: int, files: range | None = None) -> ShardResult:
        """Carry out the task; ``position`` is that of the shard's first image.

        ``files`` are the numbers of its images and of those that could not be used; by default all
        could.
        """
        result = ShardResult()
        if len(E) == 0:
            return result
        if self.model is not None and self.score:
            result.scores = self.model._calibration_scores(E, self.patch_pixels)
        if self.empty is not None:
            existing = None if self.model is None else self.model._existing_patches()
            empty = copy.copy(self.empty)
            empty.files = range(position, position + len(E)) if files is None else files
            result.accumulated = empty.accumulate(E, position, existing)
        return result


class ShardSource(ABC):
    """Normal images in the order of fitting; the ones to hold back for calibration come last."""

    shape: tuple[int, ...]  # (h, w, D) of the first image
    n_images: int | None  # None if it is not known in advance
    n_to_fit: int | None  # of these, the images that are not held back
    in_flight = 0  # bytes of memory taken beside the embeddings of a shard
    embeddings: Embeddings = []  # noqa: RUF012  # of the images to fit on, if all are in memory
    groups: np.ndarray | None = None  # (n,) int, of all images; None if each is its own
    names: Sequence[str] | None = None  # of all images; None if they are not known
    patch_pixels = 8.0  # side of a patch in the backbone; of embeddings this is a convention
    copies = 1  # of each image to fit on, with itself
    skipped: Sequence[tuple[int, str]] = ()  # those of them that could not be used

    @abstractmethod
    def to_fit(self, task: ShardTask) -> Iterator[ShardResult]:
        """Carry out the task on the images to fit on; yield the result of each shard."""

    @abstractmethod
    def held_back(self, task: ShardTask) -> Iterator[ShardResult]:
        """Carry out the task on the images held back; yield the result of each shard."""

    def groups_of_last(self, n: int, copies: int = 1) -> np.ndarray:
        """Return the groups (n,) of the last images that could be used, each with its copies."""
        if self.groups is None:
            return np.arange(n)
        groups: np.ndarray = self.groups[self._last(n, copies, len(self.groups))]
        return groups

    def names_of_last(self, n: int, copies: int = 1) -> list[str]:
        """Return the names of these images; empty ones if they are not known."""
        if self.names is None:
            return [""] * n
        return [self.names[i] for i in self._last(n, copies, len(self.names))]

    def _last(self, n: int, copies: int, n_given: int) -> np.ndarray:
        """Return the positions (n,) of the last images that could be used, of all given."""
        usable: np.ndarray = np.delete(np.arange(n_given), [index for index, _ in self.skipped])
        return usable[len(usable) - n * copies :: copies]


class InMemory(ShardSource):
    """Embeddings that are all in memory: one shard to fit on, and one that is held back."""

    def __init__(self, E: Embeddings, n_held_back: int) -> None:
        self.n_images, self.shape = len(E), E[0].shape
        self.n_to_fit = n_to_fit = len(E) - n_held_back
        held: Any = E[n_to_fit:]
        if isinstance(E, list):  # arrays are moved, so that none is in memory twice
            del E[n_to_fit:]
            E, held = contiguous(E), contiguous(held)
        else:
            E = E[:n_to_fit]
        self.embeddings, self._held_back = E, held

    def to_fit(self, task: ShardTask) -> Iterator[ShardResult]:
        """Carry out the task on the one shard to fit on."""
        yield task(self.embeddings, 0)

    def held_back(self, task: ShardTask) -> Iterator[ShardResult]:
        """Carry out the task on the one shard held back, if any is."""
        if len(self._held_back):
            yield task(self._held_back, len(self.embeddings))


def images_within_budget(
    where: str,
    memory_budget: int | str,
    *,
    fixed: int,
    per_image: int,
    at_most: int,
    for_what: str,
    lower: str = "",
) -> int:
    """Return how many images may have their embeddings in memory at a time.

    Parameters
    ----------
    where : str
        First word of error messages.
    memory_budget : int or str
        Budget in bytes, or text such as "2GB".
    fixed, per_image : int
        Bytes that are taken whatever the number of images, and those of each image.
    at_most : int
        Largest number to return.
    for_what, lower : str
        What takes the memory, and what to lower, as in :func:`refuse_budget`.

    Raises
    ------
    InvalidValueError
        If the budget is too small for one image, or is no number of bytes.

    Examples
    --------
    >>> images_within_budget(
    ...     "PaDiM", "1MB", fixed=200_000, per_image=100_000, at_most=32, for_what="the covariances"
    ... )
    8
    """
    budget = check_memory("memory_budget", memory_budget, where)
    if budget < fixed + per_image:
        refuse_budget(where, budget, fixed + per_image, for_what, lower=lower)
    return min((budget - fixed) // per_image, at_most)


def refuse_budget(
    where: str, budget: int, needed: int, for_what: str, *, lower: str = ""
) -> NoReturn:
    """Raise InvalidValueError for a ``memory_budget`` that is too small, and name a sufficient one.

    ``lower`` names further parameters that reduce memory if lowered, beside ``image_size`` and
    ``batch_size``.
    """
    raise InvalidValueError(
        f"{where}: memory_budget={budget:,} bytes is too small: {for_what} take {needed:,} bytes. "
        f"Raise it to {math.ceil(needed / 1e6):,}MB, or lower {lower}image_size or batch_size."
    )
