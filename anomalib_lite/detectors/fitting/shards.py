"""The order of learning: images to fit on, images to calibrate with, what these add in the end."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from anomalib_lite._validation import check_embeddings, check_grid
from anomalib_lite.calibration import calibration_size, conformal_threshold
from anomalib_lite.detectors.fitting.workers import Part, Work, distribute
from anomalib_lite.embeddings import Embeddings, gather, stack_embeddings, take
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.images import ImageSource

if TYPE_CHECKING:
    from anomalib_lite.detectors.base import BaseDetector

__all__ = ["learn_embeddings", "learn_images"]

# Images of a shard, where no budget of memory says how many.
_SHARD_IMAGES = 64
# What a network and its activations take on a CPU, for each pixel that it is given at once:
# measured with EfficientNet-Lite0 in float32.
_NETWORK_BYTES = 480
# Pixels that go through a network at a time, if they are of more than one image.
_PIXELS_AT_ONCE = 8 * 256 * 256
_USUAL_BATCH = 32


def learn_images(
    detector: BaseDetector,
    backbone: AnyBackbone,
    source: ImageSource,
    order: np.ndarray,
    random: np.random.RandomState,
    *,
    update: bool = False,
) -> list[tuple[str, str]]:
    """Fit a detector on images, or go on with it; name and reason of each one left out.

    ``order`` has the images to be held back for calibration last.
    """
    images = _Images(detector, backbone, source.take(order), update)
    if not detector._in_shards():
        E = images.all_embeddings()
        material: _Material = _Whole(E, detector._n_held_back(len(E), update))
    else:
        images.look_at_first()
        material = images
    _learn(detector, material, random, update)
    return [(source.names[i], r) for i, r in sorted((order[i], r) for i, r in images.skipped)]


def learn_embeddings(
    detector: BaseDetector, E: Any, random: np.random.RandomState, *, update: bool = False
) -> None:
    """Fit a detector on embeddings, or go on with it."""
    where, bounded = type(detector).__name__, detector._in_shards()
    n_features = detector.n_features_ if update else None
    by_number = isinstance(E, list | tuple) or getattr(E, "ndim", 0) > 0
    one_by_one = isinstance(E, Iterable) and not by_number and not hasattr(E, "ndim")
    material: _Material
    if one_by_one and bounded and detector.calibration != "leave_one_out":
        material = _Stream(detector, E, random, n_features, update)
    elif bounded and by_number and len(E):
        material = _Given(detector, E, random, n_features, update)
    else:
        E = check_embeddings(list(_grids(E, where)) if one_by_one else E, where, n_features)
        E = take(E, detector._order(len(E), random))
        material = _Whole(E, detector._n_held_back(len(E), update))
    _learn(detector, material, random, update)


def _learn(
    detector: BaseDetector, material: _Material, random: np.random.RandomState, update: bool
) -> None:
    fresh = copy.copy(detector)  # until all has gone well, what was fitted before stays
    if update:
        fresh._begin_update()
    else:
        for name in [n for n in vars(fresh) if n.endswith("_")]:
            delattr(fresh, name)
    blank = fresh._collector(material.shape, material.n_images, material.in_flight, random)
    collected = copy.copy(blank)
    for part in material.to_fit(Work(blank, fresh if update else None)):
        collected.merge(part.collected)
        del part  # and its memory, before the next
    fresh._fit_collected(collected, random)
    collected, joins = copy.copy(blank), fresh._scores_only_fall()
    if fresh.calibration == "leave_one_out":
        scores: list[Any] = [fresh._score_left_out(material.embeddings)]
    else:
        # Old scores still bound what those images would score now, if scores can only fall.
        scores = [detector.calibration_scores_ if update and joins else np.empty(0, np.float32)]
        for part in material.held_back(Work(blank if joins else None, fresh, score=True)):
            scores.append(part.scores)
            if joins:
                collected.merge(part.collected)
            del part
    fresh.calibration_scores_ = np.concatenate(scores)
    fresh.threshold_ = conformal_threshold(fresh.calibration_scores_, fresh.false_alarm_rate)
    if joins:
        fresh._absorb(collected, random)
    detector.__dict__.update(fresh.__dict__)


class _Material(ABC):
    """Normal images in the order of learning."""

    shape: tuple[int, ...]  # (h, w, D) of the first
    n_images: int | None  # None if nobody knows before the end
    in_flight = 0  # bytes taken beside those of a shard
    embeddings: Embeddings = []  # noqa: RUF012  # of those to fit on, if all are at hand

    @abstractmethod
    def to_fit(self, work: Work) -> Iterator[Part]:
        """Do the work on the images to fit on."""

    @abstractmethod
    def held_back(self, work: Work) -> Iterator[Part]:
        """Do the work on those held back for calibration."""


class _Whole(_Material):
    """Embeddings that are all in memory: one shard to fit on, one held back."""

    def __init__(self, E: Embeddings, n_held_back: int) -> None:
        self.n_images, self.shape = len(E), E[0].shape
        n_to_fit = len(E) - n_held_back
        held: Any = E[n_to_fit:]
        if isinstance(E, list):  # moved, so that nothing is in memory twice
            del E[n_to_fit:]
            E, held = stack_embeddings(E), stack_embeddings(held)
        else:
            E = E[:n_to_fit]
        self.embeddings, self._held = E, held

    def to_fit(self, work: Work) -> Iterator[Part]:
        yield work(self.embeddings, 0)

    def held_back(self, work: Work) -> Iterator[Part]:
        if len(self._held):
            yield work(self._held, len(self.embeddings))


class _Sharded(_Material):
    """Images in shards, the last of them held back."""

    def __init__(self, detector: BaseDetector, n: int, update: bool) -> None:
        self.n_images: int = n
        self.n_to_fit = n - detector._n_held_back(n, update)
        self._size = 1

    @abstractmethod
    def _parts(self, begin: int, end: int, size: int, work: Work) -> Iterator[Part]:
        """Do the work on images ``begin`` to ``end``, ``size`` in a shard."""

    def to_fit(self, work: Work) -> Iterator[Part]:
        assert work.blank is not None
        self._size = work.blank.images_per_shard
        return self._parts(0, self.n_to_fit, self._size, work)

    def held_back(self, work: Work) -> Iterator[Part]:
        return self._parts(self.n_to_fit, self.n_images, self._size, work)


class _Given(_Sharded):
    """Embeddings that can be asked for by number: arrays in memory or in a file, lists."""

    def __init__(
        self,
        detector: BaseDetector,
        E: Any,
        random: np.random.RandomState,
        n_features: int | None,
        update: bool,
    ) -> None:
        super().__init__(detector, len(E), update)
        self._E, self._where = E, type(detector).__name__
        self._order = detector._order(len(E), random)
        self._n_features = n_features
        self.shape = self._grid(0).shape

    def _grid(self, position: int) -> np.ndarray:
        i = int(self._order[position])
        grid = _as_floats(self._E[i], self._where)
        self._n_features = check_grid(grid, i, self._where, self._n_features)
        return grid

    def _parts(self, begin: int, end: int, size: int, work: Work) -> Iterator[Part]:
        for start in range(begin, end, size):
            n = min(size, end - start)
            yield work(gather(n, (([i], self._grid(start + i)[None]) for i in range(n))), start)


class _Stream(_Material):
    """Embeddings that come one by one, nobody knows how many.

    Those to be held back are drawn as they come (reservoir sampling), as many as the rate needs
    and at most half: each image is as likely to be among them, in whatever order they come.
    """

    n_images = None

    def __init__(
        self,
        detector: BaseDetector,
        blocks: Iterable[Any],
        random: np.random.RandomState,
        n_features: int | None,
        update: bool,
    ) -> None:
        self._where, self._random = type(detector).__name__, random
        self._grids: Iterator[np.ndarray] = _grids(blocks, self._where, n_features)
        first = next(self._grids, None)
        if first is None:
            raise InvalidValueError(f"{self._where}: E holds no image. Give at least one.")
        self._grids = itertools.chain([first], self._grids)
        self.shape = first.shape
        there = len(detector.calibration_scores_) if update and detector._scores_only_fall() else 0
        self._n_held = max(1, calibration_size(detector.false_alarm_rate) - there)
        self._held: list[np.ndarray] = []
        self._n_seen, self._size = 0, 1
        self.in_flight = self._n_held * first.nbytes

    def to_fit(self, work: Work) -> Iterator[Part]:
        assert work.blank is not None
        self._size = work.blank.images_per_shard
        shard: list[np.ndarray] = []
        for grid in self._not_held():
            shard.append(grid.copy())  # or it would keep its whole block in memory
            if len(shard) == self._size:
                yield self._work(work, shard)
        if shard:
            yield self._work(work, shard)

    def held_back(self, work: Work) -> Iterator[Part]:
        while self._held:
            shard, self._held = self._held[: self._size], self._held[self._size :]
            yield self._work(work, shard)

    def _work(self, work: Work, shard: list[np.ndarray]) -> Part:
        self._n_seen += len(shard)
        n, E = len(shard), stack_embeddings(shard)
        shard.clear()
        return work(E, self._n_seen - n)

    def _not_held(self) -> Iterator[np.ndarray]:
        n = 0
        for n, grid in enumerate(self._grids, 1):
            if len(self._held) < self._n_held:
                self._held.append(grid.copy())
            elif (place := self._random.randint(n)) < self._n_held:
                yield self._held[place]
                self._held[place] = grid.copy()
            else:
                yield grid
        shuffled = [self._held[i] for i in self._random.permutation(len(self._held))]
        self._held = shuffled[: n // 2]
        yield from shuffled[n // 2 :]


class _Images(_Sharded):
    """Images that go through the backbone, here or where joblib's backend decides."""

    def __init__(
        self, detector: BaseDetector, backbone: AnyBackbone, source: ImageSource, update: bool
    ) -> None:
        super().__init__(detector, len(source), update)
        self._detector, self._backbone, self._source = detector, backbone, source
        # To go on with a detector is for a few images: this process has the backbone.
        self._alone = detector.n_jobs is None or update
        self._first: Embeddings | None = None
        self._n_looked_at = 0
        self.skipped: list[tuple[int, str]] = []  # positions in the source, reasons

    def all_embeddings(self) -> Embeddings:
        """Of all images that can be used."""
        if self._alone:
            E, self.skipped = self._detector._embed_all(self._backbone, self._source, "fit")
        else:
            parts = self._shards(0, self.n_images, _SHARD_IMAGES, None)
            grids = (grid for part in parts for grid in part.collected)
            E = gather(self.n_images, (([i], grid[None]) for i, grid in enumerate(grids)))
        if len(E) == 0:
            self._none_usable()
        return E

    def look_at_first(self) -> None:
        """Embed the first image that can be used, which tells how much memory the others take."""
        backbone = self._backbone
        while self._n_looked_at < self.n_images:
            i = self._n_looked_at
            self._n_looked_at += 1
            skipped: list[tuple[int, str]] = []
            for batch, E in self._detector._embed(backbone, self._source.take([i]), None, skipped):
                self._first, self.shape = E, E.shape[1:]
                # The shards must not depend on the batch, unless it is unusually large.
                pixels, n = batch.pixels[0], max(self._detector.batch_size, _USUAL_BATCH)
                size = pixels[..., 0].size
                at_once = max(size, min(n * size, _PIXELS_AT_ONCE))
                self.in_flight = n * (4 * pixels.nbytes + 2 * E.nbytes) + _NETWORK_BYTES * at_once
            self.skipped += [(i, reason) for _, reason in skipped]
            if self._first is not None:
                self.n_to_fit = max(self.n_to_fit, self._n_looked_at)
                return
        self._none_usable()

    def _none_usable(self) -> None:
        raise InvalidValueError(
            f"{type(self._detector).__name__}: none of {self.n_images} images could be used; the "
            f"first: {self.skipped[0][1]}"
        )

    def _parts(self, begin: int, end: int, size: int, work: Work) -> Iterator[Part]:
        if begin < self._n_looked_at:
            first, self._first = self._first, None
            assert first is not None
            yield work(first, self._n_looked_at - 1)
            begin = self._n_looked_at
        for part in self._shards(begin, end, size, work):
            if part.collected is not None or part.scores is not None:
                yield part

    def _shards(self, begin: int, end: int, size: int, work: Work | None) -> Iterator[Part]:
        starts = range(begin, end, size)
        shards = ((i, self._source.take(range(i, min(i + size, end)))) for i in starts)
        if self._alone:
            assert work is not None
            parts: Iterator[Part] = (self._work(shard, i, work) for i, shard in shards)
        else:
            parts = distribute(self._detector, self._backbone, shards, work)
        quiet = None if self._detector.verbose else True
        with tqdm(total=end - begin, desc="fit", unit="image", leave=False, disable=quiet) as bar:
            for start in starts:
                part = next(parts)
                self.skipped += [(start + i, reason) for i, reason in part.skipped]
                bar.update(min(size, end - start))
                yield part
                del part
            next(parts, None)  # let it end its work in order

    def _work(self, shard: ImageSource, start: int, work: Work) -> Part:
        E, skipped = self._detector._embed_all(self._backbone, shard, channels=work.channels)
        part = work(E, start)
        part.skipped = skipped
        return part


def _grids(
    blocks: Iterable[Any], where: str, n_features: int | None = None
) -> Iterator[np.ndarray]:
    """Each image (h, w, D) of blocks (n, h, w, D) or (h, w, D)."""
    i = 0
    for given in blocks:
        block = _as_floats(given, where)
        for grid in block if block.ndim == 4 else block[None]:
            n_features = check_grid(grid, i, where, n_features)
            yield grid
            i += 1


def _as_floats(given: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(
            f"{where}: E must hold numeric arrays (h, w, D), got {type(given).__name__}."
        ) from error
