"""Training images in shards, so that their embeddings need not all be in memory."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from anomalib_lite._validation import check_grid, check_int
from anomalib_lite.detectors.fitting.model import ShardResult, ShardSource, ShardTask
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.fusion import EmbeddingTransform
from anomalib_lite.images import TILE_PIXELS, Extractor, ImageSource
from anomalib_lite.images.embeddings import Embeddings, assemble, contiguous, embed_all

__all__ = [
    "CountedEmbeddings",
    "Distribute",
    "EmbeddingStream",
    "ImageShards",
    "Indexed",
    "NumberedNames",
    "embed_distributed",
    "iter_grids",
    "none_usable",
]

# Images of a shard, if there is no memory budget that sets the number.
_SHARD_IMAGES = 64
# Bytes that a network and its activations take on a CPU for each pixel of the batch inside it:
# measured with EfficientNet-Lite0 in float32.
_NETWORK_BYTES = 480
# Largest number of pixels in the network at a time, unless one image alone has more.
_PIXELS_AT_ONCE = 8 * 256 * 256
_USUAL_BATCH = 32

# (position and images of each shard, the task or None) -> their results, in the same order.
Distribute = Callable[[Iterator[tuple[int, ImageSource]], ShardTask | None], Iterator[ShardResult]]


class _Sharded(ShardSource):
    """Images in shards of a fixed size."""

    def __init__(self, n_images: int, n_held_back: int) -> None:
        self.n_images: int = n_images
        self.n_to_fit: int = n_images - n_held_back
        self._size = 1

    @abstractmethod
    def _results(self, begin: int, end: int, size: int, task: ShardTask) -> Iterator[ShardResult]:
        """Carry out the task on images ``begin`` to ``end``, ``size`` in a shard."""

    def to_fit(self, task: ShardTask) -> Iterator[ShardResult]:
        """Carry out the task on the images to fit on, in shards that the accumulator asks for."""
        assert task.empty is not None
        self._size = task.empty.images_per_shard
        return self._results(0, self.n_to_fit, self._size, task)

    def held_back(self, task: ShardTask) -> Iterator[ShardResult]:
        """Carry out the task on the images held back, in shards of the same size."""
        return self._results(self.n_to_fit, self.n_images, self._size, task)


class Indexed(_Sharded):
    """Embeddings that can be indexed: arrays in memory or in a file, lists.

    Parameters
    ----------
    E : array of shape (N, h, w, D), or sequence of N arrays (h, w, D)
    order : array of shape (N,), int64
        Order of fitting; the images to hold back come last.
    n_held_back : int
    n_features : int or None
        D, if it is known.
    where : str
        First word of error messages.
    transform : EmbeddingTransform, optional
        Changes the embeddings of each image when they are asked for.
    """

    def __init__(
        self,
        E: Any,
        order: np.ndarray,
        n_held_back: int,
        n_features: int | None,
        where: str,
        transform: EmbeddingTransform | None = None,
    ) -> None:
        super().__init__(len(order), n_held_back)
        self._E, self._order, self._n_features, self._where = E, order, n_features, where
        self._transform = transform
        self.shape = self.grid(0).shape

    def grid(self, position: int) -> np.ndarray:
        """Return the embeddings (h, w, D) of one image, by its place in the order."""
        i = int(self._order[position])
        grid = _as_floats(self._E[i], self._where)
        self._n_features = check_grid(grid, i, self._where, self._n_features)
        return grid if self._transform is None else self._transform.transform(grid)

    def _results(self, begin: int, end: int, size: int, task: ShardTask) -> Iterator[ShardResult]:
        for start in range(begin, end, size):
            n = min(size, end - start)
            grids = (([i], self.grid(start + i)[None]) for i in range(n))
            yield task(assemble(n, grids), start)


class CountedEmbeddings:
    """An iterable of embeddings that says of how many images they are, about.

    Parameters
    ----------
    blocks : iterable of arrays (n, h, w, D) or (h, w, D)
    n_images : int
    """

    def __init__(self, blocks: Iterable[Any], n_images: int) -> None:
        self.blocks, self.n_images = blocks, n_images

    def __iter__(self) -> Iterator[Any]:
        return iter(self.blocks)


class NumberedNames(Sequence[str]):
    """Names of embeddings in the order of fitting, made when they are asked for."""

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: Any) -> Any:
        return f"embeddings[{self.order[position]}]"


class EmbeddingStream(ShardSource):
    """Embeddings that arrive one by one; their number is not known in advance.

    Images to hold back are drawn while they arrive (reservoir sampling): ``n_held_back`` of them,
    or half of all if that is less. Each image is drawn with the same probability, in any order of
    arrival.

    Parameters
    ----------
    blocks : iterable of arrays (n, h, w, D) or (h, w, D)
    n_held_back : int
    random : RandomState
    n_features : int or None
        D, if it is known.
    where : str
        First word of error messages.
    transform : EmbeddingTransform, optional
        Changes the embeddings of each image as they come.
    """

    n_images: int | None = None

    def __init__(
        self,
        blocks: Iterable[Any],
        n_held_back: int,
        random: np.random.RandomState,
        n_features: int | None,
        where: str,
        transform: EmbeddingTransform | None = None,
    ) -> None:
        self.n_images = n = getattr(blocks, "n_images", None)
        if n is not None:
            check_int("the attribute n_images of E", n, where, low=1)
        self.n_to_fit = None if n is None else n - min(n_held_back, n // 2)
        grids = iter_grids(blocks, where, n_features)
        if transform is not None:
            grids = map(transform.transform, grids)
        first = next(grids, None)
        if first is None:
            raise InvalidValueError(f"{where}: E holds no image. Give at least one.")
        self._grids = itertools.chain([first], grids)
        self._random, self._n_held_back = random, n_held_back
        self._held_back: list[np.ndarray] = []
        self._n_seen, self._size = 0, 1
        self.shape, self.in_flight = first.shape, n_held_back * first.nbytes

    def to_fit(self, task: ShardTask) -> Iterator[ShardResult]:
        """Carry out the task on the images that are not drawn to be held back, as they arrive."""
        assert task.empty is not None
        self._size = task.empty.images_per_shard
        shard: list[np.ndarray] = []
        for grid in self._not_drawn():
            shard.append(grid.copy())  # a view would keep its whole block in memory
            if len(shard) == self._size:
                yield self._carry_out(task, shard)
        if shard:
            yield self._carry_out(task, shard)

    def held_back(self, task: ShardTask) -> Iterator[ShardResult]:
        """Carry out the task on the images held back, and free their memory."""
        while self._held_back:
            shard, self._held_back = self._held_back[: self._size], self._held_back[self._size :]
            yield self._carry_out(task, shard)

    def _carry_out(self, task: ShardTask, shard: list[np.ndarray]) -> ShardResult:
        self._n_seen += len(shard)
        n, E = len(shard), contiguous(shard)
        shard.clear()
        return task(E, self._n_seen - n)

    def _not_drawn(self) -> Iterator[np.ndarray]:
        """Yield the images to fit on: those not drawn, and those drawn and replaced later."""
        n = 0
        for n, grid in enumerate(self._grids, 1):
            if len(self._held_back) < self._n_held_back:
                self._held_back.append(grid.copy())
            elif (place := self._random.randint(n)) < self._n_held_back:
                yield self._held_back[place]
                self._held_back[place] = grid.copy()
            else:
                yield grid
        shuffled = [self._held_back[i] for i in self._random.permutation(len(self._held_back))]
        self._held_back = shuffled[: n // 2]
        yield from shuffled[n // 2 :]


class ImageShards(_Sharded):
    """Images that are embedded shard by shard, in this process or in workers.

    Parameters
    ----------
    extractor : Extractor
    source : ImageSource
        Images in the order of fitting; the ones to hold back come last.
    n_held_back : int
    skipped : list
        List to which ``(index, reason)`` of every image left out is appended.
    distribute : callable, optional
        Carries out the task on shards in workers; see
        :func:`~anomalib_lite.detectors.fitting.workers.distribute`. By default this process does.

    Raises
    ------
    InvalidValueError
        If no image can be used.
    """

    def __init__(
        self,
        extractor: Extractor,
        source: ImageSource,
        n_held_back: int,
        skipped: list[tuple[int, str]],
        distribute: Distribute | None = None,
    ) -> None:
        super().__init__(len(source), n_held_back)
        self._extractor, self._source, self._skipped = extractor, source, skipped
        self._distribute = distribute
        self._first: Embeddings | None = None
        self._n_tried = 0  # images read to find the first usable one
        self._embed_first()

    def _embed_first(self) -> None:
        """Embed the first image that can be used, to know how much memory an image takes."""
        while self._first is None and self._n_tried < self.n_images:
            i = self._n_tried
            self._n_tried += 1
            skipped: list[tuple[int, str]] = []
            for batch, E in self._extractor.embed_batches(self._source.take([i]), skipped=skipped):
                self._first, self.shape = E, E.shape[1:]
                n_bytes, transform = E.nbytes, self._extractor.transform
                if transform is not None:  # before and after it, and itself
                    n_bytes += E.nbytes // E.shape[-1] * transform.n_features_in_
                self.in_flight = self._bytes_in_flight(batch.pixels[0], n_bytes)
                self.in_flight += 0 if transform is None else transform.nbytes
            self._skipped += [(i, reason) for _, reason in skipped]
        if self._first is None:
            raise none_usable(self._source, self._skipped)
        self.n_to_fit = max(self.n_to_fit, self._n_tried)

    def _bytes_in_flight(self, pixels: np.ndarray, embedding_bytes: int) -> int:
        """Return the bytes taken by images being embedded, estimated from one of them."""
        if self._extractor.tile is not None:  # image by image, and a few tiles of each at a time
            at_once = max(self._extractor.tile_side**2, TILE_PIXELS)
            return 4 * pixels.nbytes + embedding_bytes // 4 + _NETWORK_BYTES * at_once
        # Shards must not depend on the batch size, unless it is unusually large.
        n, size = max(self._extractor.batch_size, _USUAL_BATCH), pixels[..., 0].size
        at_once = max(size, min(n * size, _PIXELS_AT_ONCE))
        return n * (4 * pixels.nbytes + 2 * embedding_bytes) + _NETWORK_BYTES * at_once

    def _results(self, begin: int, end: int, size: int, task: ShardTask) -> Iterator[ShardResult]:
        if begin < self._n_tried:
            first, self._first = self._first, None
            assert first is not None
            yield task(first, self._n_tried - 1, range(self._n_tried))
            begin = self._n_tried
        shards = _cut(self._source, begin, end, size)
        if self._distribute is not None:
            results = self._distribute(shards, task)
        else:
            results = (self._carry_out(shard, start, task) for start, shard in shards)
        starts = range(begin, end, size)
        for result in _watch(results, starts, end, self._skipped, self._extractor.verbose):
            if result.accumulated is not None or result.scores is not None:
                yield result

    def _carry_out(self, shard: ImageSource, start: int, task: ShardTask) -> ShardResult:
        E, skipped = embed_all(self._extractor, shard, channels=task.channels)
        result = task(E, start, range(start, start + len(shard)))
        result.skipped = skipped
        return result


def embed_distributed(
    source: ImageSource, distribute: Distribute, verbose: int
) -> tuple[Embeddings, list[tuple[int, str]]]:
    """Embed all images in the workers of joblib's backend.

    Returns embeddings and skipped images, as
    :func:`~anomalib_lite.images.embeddings.embed_all` does.
    """
    skipped: list[tuple[int, str]] = []
    n = len(source)
    shards, starts = _cut(source, 0, n, _SHARD_IMAGES), range(0, n, _SHARD_IMAGES)
    results = _watch(distribute(shards, None), starts, n, skipped, verbose)
    blocks = (result.embeddings for result in results)
    grids = (grid for block in blocks if block is not None for grid in block)
    return assemble(n, (([i], grid[None]) for i, grid in enumerate(grids))), skipped


def none_usable(source: ImageSource, skipped: list[tuple[int, str]]) -> InvalidValueError:
    """Return the error of a fit in which no image can be used."""
    return InvalidValueError(
        f"{source.where}: none of {len(source)} images could be used; the first: {skipped[0][1]}"
    )


def iter_grids(
    blocks: Iterable[Any], where: str, n_features: int | None = None
) -> Iterator[np.ndarray]:
    """Check blocks (n, h, w, D) or (h, w, D) and yield the embeddings (h, w, D) of each image."""
    i = 0
    for given in blocks:
        block = _as_floats(given, where)
        for grid in block if block.ndim == 4 else block[None]:
            n_features = check_grid(grid, i, where, n_features)
            yield grid
            i += 1


def _cut(source: ImageSource, begin: int, end: int, size: int) -> Iterator[tuple[int, ImageSource]]:
    """Cut images ``begin`` to ``end`` into shards; yield the position and images of each."""
    for start in range(begin, end, size):
        yield start, source.take(range(start, min(start + size, end)))


def _watch(
    results: Iterator[ShardResult],
    starts: range,
    end: int,
    skipped: list[tuple[int, str]],
    verbose: int,
) -> Iterator[ShardResult]:
    """Yield the result of each shard, show the progress, and record which images are skipped."""
    quiet = None if verbose else True  # None: in a terminal only
    n = end - starts.start
    with tqdm(total=n, desc="fit", unit="image", leave=False, disable=quiet) as bar:
        for start in starts:
            result = next(results)
            skipped += [(start + i, reason) for i, reason in result.skipped]
            bar.update(min(starts.step, end - start))
            yield result
            del result  # and its memory, before the next
        next(results, None)  # run the generator to its end, so that it can clean up


def _as_floats(given: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(
            f"{where}: E must hold numeric arrays (h, w, D), got {type(given).__name__}."
        ) from error
