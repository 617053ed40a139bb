"""Anything that is an image -> (B, H, W, 3) batches of one size -> their patch embeddings."""

from __future__ import annotations

import copy
import io
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from anomalib_lite._threads import n_cores
from anomalib_lite._validation import check_int
from anomalib_lite.errors import AnomalibLiteError, ImageError, InvalidValueError
from anomalib_lite.images._given import DatasetItem, as_item, list_given
from anomalib_lite.images._pixels import (
    check_one_page,
    deep_pixels,
    explain,
    refuse_special,
    to_array,
    unit_floats,
)
from anomalib_lite.images.ignore_mask import IgnoreMask
from anomalib_lite.images.tiling import embed_tiles

__all__ = [
    "TILE_PIXELS",
    "Batch",
    "Embedder",
    "Extractor",
    "ImageSource",
    "iter_batches",
]

# Smaller images, in pixels per side, have no texture to describe.
MIN_SIDE = 8

# Pixels of the tiles that go through a network together.
TILE_PIXELS = 4 * 256 * 256
# Pixels of one image in the network, whose shorter side alone is given; about 1 GB in the default
# network. A thin strip would have any number.
NETWORK_PIXELS = 3_000_000
# ... but so many squares of the given side are always allowed.
_SQUARES = 4
_DECODERS = min(8, n_cores())
# PIL's limit on pixels is a global variable; it is lifted only while a thread that holds this lock
# reads a header.
_OPEN_LOCK = threading.Lock()
_BILINEAR = Image.Resampling.BILINEAR
# Pillow lets other programs draw these.
_PROGRAMS = ("EPS", "WMF")


@dataclass(frozen=True)
class Batch:
    """Images of one size, decoded and resized.

    Attributes
    ----------
    indices : list of int
        Positions of the images in the source.
    pixels : ndarray of shape (B, H, W, 3)
        uint8 in [0, 255], or float32 in [0, 1].
    sizes : list of (H, W)
        Original sizes in pixels, after any EXIF rotation.
    ignored : sequence of B IgnoreMask or None
        Regions of the images to ignore; empty if there are none.
    """

    indices: list[int]
    pixels: np.ndarray
    sizes: list[tuple[int, int]]
    ignored: Sequence[IgnoreMask | None] = ()


class ImageSource(Sequence[np.ndarray]):
    """A sequence of images that are decoded only when they are needed.

    Parameters
    ----------
    images : directory, path, PIL image, array, tensor, bytes, data set, or a sequence of such
        - a directory: its image files, sorted by name, without those of its subdirectories; what
          else is there is said in a :class:`~anomalib_lite.errors.LeftOutWarning`;
        - paths, or objects with a ``path`` attribute (the samples of our data sets);
        - the content of a file: bytes, or a file that is open in binary mode, such as ``BytesIO``;
        - a map-style data set (``__getitem__`` and ``__len__``) that gives such images, or
          (image, label), whose label is not looked at;
        - PIL images of any mode: palettes and CMYK become RGB, alpha is dropped, 16-bit values
          are divided by 65535; of one page or frame;
        - arrays of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or (N, H, W, C): uint8,
          uint16, or floats in [0, 1];
        - torch tensors, which may also have their channels first: (3, H, W), (N, 3, H, W).
    max_pixels : int, default=100_000_000
        Largest number of pixels; larger images are refused, files before they are decoded.
    where : str
        Caller, named in errors.
    recursive : bool, default=False
        Whether the subdirectories of a directory are read, too.

    Raises
    ------
    MissingPathError, InvalidValueError, InvalidTypeError
        If a directory does not exist; if there is no image; if the type holds no images.

    Examples
    --------
    >>> import numpy as np
    >>> source = ImageSource(np.zeros((5, 32, 48, 3), np.uint8))
    >>> len(source), source[0].shape, source.names[4]
    (5, (32, 48, 3), 'images[4]')
    """

    n_versions = 1  # images here for each that was given; AugmentedSource has more

    def __init__(
        self,
        images: Any,
        *,
        max_pixels: int = 100_000_000,
        where: str = "ImageSource",
        recursive: bool = False,
    ) -> None:
        self.max_pixels = max_pixels
        self.where = where
        if isinstance(images, ImageSource):
            images = images.items
        elif not isinstance(images, list | tuple) or not images:
            images = list_given(images, where, recursive=recursive)
        is_path = (str, Path)
        self.items: list[Any] = [i if isinstance(i, is_path) else as_item(i, where) for i in images]
        # Regions to ignore: in all images, or one for each of them.
        self.ignored: IgnoreMask | list[IgnoreMask | None] | None = None
        self.names = [
            str(item) if isinstance(item, str | os.PathLike) else f"images[{i}]"
            for i, item in enumerate(self.items)
        ]
        self.groups: np.ndarray | None = None  # (n,) int: images that are held back together

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        """The decoded image (H, W, 3), uint8 or float32 in [0, 1]; a slice gives a source."""
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return np.asarray(self.decode(index))

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageSource:
        """Return the source of the images at these positions; they keep their names."""
        source = copy.copy(self)
        source.items = [self.items[i] for i in indices]
        source.names = [self.names[i] for i in indices]
        if isinstance(self.ignored, list):
            source.ignored = [self.ignored[i] for i in indices]
        if self.groups is not None:
            source.groups = self.groups[np.asarray(indices)]
        return source

    def ignored_in(self, index: int) -> IgnoreMask | None:
        """Return the regions of one image to ignore."""
        return self.ignored[index] if isinstance(self.ignored, list) else self.ignored

    def load(
        self,
        index: int,
        image_size: int | tuple[int, int],
        stride: int,
        tile: int | None = None,
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Load one image at the size for the backbone, and its original size.

        Parameters
        ----------
        index : int
        image_size : int or (H, W)
            An int is the length of the shorter side; the aspect ratio is kept and both sides are
            rounded to multiples of ``stride``. An image so thin that it would then have more than
            3,000,000 pixels, and more than four squares of that side, is refused. A pair is used as
            it is.
        stride : int
            Pixels per cell of the backbone's coarsest feature map.
        tile : int, optional
            Pixels of the original image that ``image_size``, an int, stands for, instead of its
            shorter side.

        Returns
        -------
        pixels : ndarray of shape (H, W, 3)
            uint8 in [0, 255] or float32 in [0, 1]; resized bilinearly, with antialiasing when
            it becomes smaller.
        size : (H, W)
            Original size, after any EXIF rotation.

        Raises
        ------
        ImageError, MissingPathError, InvalidTypeError
            For the reasons that :meth:`decode` has; if an image is too thin for ``image_size``.

        Examples
        --------
        >>> ImageSource(np.zeros((60, 100), np.uint8)).load(0, 32, 16)[0].shape
        (32, 48, 3)
        """
        image = self.decode(index, gray=True)
        size = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        if self.ignored is not None and (ignored := self.ignored_in(index)) is not None:
            image = ignored.fill(image, f"{self.where}: {self.names[index]}")
        if isinstance(image_size, int | np.integer):
            scale = image_size / (tile or min(size))
            height, width = (max(stride, round(side * scale / stride) * stride) for side in size)
            most = self.max_pixels if tile else max(NETWORK_PIXELS, _SQUARES * int(image_size) ** 2)
            if height * width > most:
                remedy = (
                    "raise tile" if tile else "cut it into tiles (tile=...), give a pair (H, W)"
                )
                raise ImageError(
                    f"{self.where}: {self.names[index]} is {size[0]}x{size[1]} pixels, and would "
                    f"be {height}x{width} at image_size={image_size}, more than {most:,} pixels. "
                    f"Crop it, {remedy}, or lower image_size."
                )
        else:
            height, width = image_size
        if isinstance(image, np.ndarray):  # PIL resizes floats one channel at a time
            channels = [Image.fromarray(image[..., c]) for c in range(3)]
            resized = [np.asarray(c.resize((width, height), _BILINEAR)) for c in channels]
            return np.stack(resized, axis=-1), size
        return np.asarray(image.resize((width, height), _BILINEAR).convert("RGB")), size

    def decode(self, index: int, *, gray: bool = False, size_alone: bool = False) -> Any:
        """Decode one image.

        Parameters
        ----------
        index : int
        gray : bool, default=False
            Whether a gray image keeps PIL's mode L, which is resized in a third of the time.
        size_alone : bool, default=False
            Whether only height and width are wanted, as :meth:`size` gives them.

        Returns
        -------
        PIL image of mode RGB (or L), or float32 array of shape (H, W, 3) in [0, 1]

        Raises
        ------
        ImageError, MissingPathError, InvalidTypeError
            If the image cannot be read, does not exist, or is of another type; they name it.
        """
        item, name = self.items[index], f"{self.where}: {self.names[index]}"
        try:
            if isinstance(item, DatasetItem):
                with _OPEN_LOCK:  # such data sets are not made for threads
                    item = item.read(self.where)
            is_path = isinstance(item, str | os.PathLike)
            if is_path and not S_ISREG(os.stat(item).st_mode):  # noqa: PTH116
                raise refuse_special(item, name)  # opening a FIFO would never end
            if is_path or isinstance(item, bytes):
                with open(item, "rb") if is_path else io.BytesIO(item) as file:  # noqa: PTH123
                    with _OPEN_LOCK:
                        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                        try:
                            image = Image.open(file)  # reads the header alone
                        finally:
                            Image.MAX_IMAGE_PIXELS = limit
                    if image.format in _PROGRAMS:
                        raise ImageError(f"{name} must hold pixels, not a drawing. Save it as PNG.")
                    return image.size[::-1] if size_alone else self._convert(image, name, gray)
            if size_alone:
                is_pil = isinstance(item, Image.Image)
                return item.size[::-1] if is_pil else to_array(item, name).shape[:2]
            # One PIL image that is not read yet may be in the source twice; reading is not
            # safe in two threads.
            with _OPEN_LOCK if isinstance(item, Image.Image) else nullcontext():
                return self._convert(item, name, gray)
        except (AnomalibLiteError, MemoryError):
            raise
        except Exception as error:  # PIL's decoders raise all kinds on broken files
            raise explain(error, item, name) from error

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width of one image, before any EXIF rotation; of a file, the header's.

        Raises
        ------
        ImageError, MissingPathError, InvalidTypeError
            As :meth:`decode`, as far as the header tells.
        """
        height, width = self.decode(index, size_alone=True)
        return height, width

    def _convert(self, image: Any, name: str, gray: bool) -> Any:
        """Check a PIL image, array or tensor, and convert it to what :meth:`decode` returns."""
        is_pil = isinstance(image, Image.Image)
        if not is_pil:
            image = to_array(image, name)  # (H, W, C)
        height, width = (image.height, image.width) if is_pil else image.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise ImageError(
                f"{name} is {height}x{width} pixels; each side must be at least {MIN_SIDE}."
            )
        if height * width > self.max_pixels:
            raise ImageError(
                f"{name} is {height}x{width} pixels, more than max_pixels={self.max_pixels:,}. "
                "Raise max_pixels if the image is meant to be so large."
            )
        if is_pil:
            if getattr(image, "is_animated", False):
                check_one_page(image, name)
            # 12 to 32 bits for a number: gray images of such modes, or colours still to be read.
            other = image.mode[0] in "FI" or image.format in ("TIFF", "PPM")
            if other or ";16" in str(getattr(image, "tile", "")):
                image = deep_pixels(image, name)
            else:
                image = ImageOps.exif_transpose(image)
        if isinstance(image, Image.Image):
            if image.mode == "P":  # through RGBA, since a palette may have transparency
                image = image.convert("RGBA")
            return image if gray and image.mode == "L" else image.convert("RGB")
        if image.dtype.kind == "u" and image.dtype != np.uint8:
            image = image.astype(np.float32) / np.float32(65535)
        if image.dtype.kind == "f":
            image = unit_floats(image, name)
        image = np.ascontiguousarray(np.broadcast_to(image[..., :3], (*image.shape[:2], 3)))
        return Image.fromarray(image) if image.dtype == np.uint8 else image


def iter_batches(
    source: ImageSource,
    *,
    image_size: int | tuple[int, int],
    stride: int,
    batch_size: int,
    tile: int | None = None,
    on_error: str = "raise",
    skipped: list[tuple[int, str]] | None = None,
) -> Iterator[Batch]:
    """Decode and resize images in threads, ahead of the code that uses the batches.

    Parameters
    ----------
    source, image_size, stride, tile
        See :meth:`ImageSource.load`.
    batch_size : int
        Largest number of images per batch. Images of different resized sizes are put into
        different batches, so that ``source``'s order is kept only within a batch.
    on_error : {"raise", "skip"}, default="raise"
        Whether an image that cannot be used raises its error or is left out.
    skipped : list, optional
        Receives ``(index, reason)`` for every image that is left out.

    Yields
    ------
    Batch
        With ``on_error="raise"`` the first image that cannot be used raises its error.

    Notes
    -----
    A few threads decode at most two batches ahead. At most two batches of decoded images wait for
    others of their size.
    """
    if batch_size < 1:  # fit checks it, but the user may have changed it since
        check_int("batch_size", batch_size, source.where, low=1)
    waiting: dict[Any, list[tuple[int, np.ndarray, tuple[int, int]]]] = {}
    pending: deque[tuple[int, Callable[[], tuple[np.ndarray, tuple[int, int]]]]] = deque()
    executor = ThreadPoolExecutor(_DECODERS, "decode")
    to_submit, alone = iter(range(len(source.items))), len(source.items) == 1
    try:
        while True:
            for index in itertools.islice(to_submit, 2 * batch_size - len(pending)):
                # For a single image, another thread would cost more than it saves.
                load = partial(source.load, index, image_size, stride, tile)
                pending.append((index, load if alone else executor.submit(load).result))
            ready = None
            if pending:
                index, result = pending.popleft()
                try:
                    pixels, size = result()
                except AnomalibLiteError as error:
                    if on_error == "raise":
                        raise
                    if skipped is not None:
                        skipped.append((index, str(error)))
                    continue
                key = (pixels.shape, pixels.dtype)
                group = waiting.setdefault(key, [])
                group.append((index, pixels, size))
                if len(group) >= _room(pixels, image_size, batch_size):
                    ready = key
            elif not waiting:
                break
            if ready is None and (not pending or sum(map(len, waiting.values())) >= 2 * batch_size):
                ready = max(waiting, key=lambda k: len(waiting[k]))
            if ready is not None:
                indices, batch, sizes = zip(*waiting.pop(ready), strict=True)
                ignored = [] if source.ignored is None else [source.ignored_in(i) for i in indices]
                pixels = (
                    batch[0][None] if tile and len(batch) == 1 else np.stack(batch)
                )  # no copy of a large one
                yield Batch(list(indices), pixels, list(sizes), ignored)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _room(pixels: np.ndarray, image_size: int | tuple[int, int], batch_size: int) -> int:
    """Return the number of such images in a batch: fewer if they are thin, so large, strips."""
    if not isinstance(image_size, int | np.integer):
        return batch_size
    allowed = _SQUARES * batch_size * int(image_size) ** 2
    room: int = allowed // (pixels.shape[0] * pixels.shape[1])
    return max(1, min(batch_size, room))


class Embedder(Protocol):
    """Turns batches of pixels into patch embeddings, as every backbone does."""

    @property
    def stride(self) -> int:
        """Pixels that one cell of the coarsest map stands for."""

    @property
    def dtype(self) -> Any:
        """Number type of the network."""

    def embed(self, pixels: np.ndarray, channels: np.ndarray | None = None) -> np.ndarray:
        """Return the embeddings (B, h, w, D) of images (B, H, W, 3), or these channels of them."""


@dataclass(frozen=True)
class Extractor:
    """Takes images through a backbone, one batch after the other.

    Attributes
    ----------
    backbone : Embedder
    image_size, batch_size, on_error
        As in :func:`iter_batches`.
    verbose : int, default=0
        1 shows a progress bar (in a terminal only).
    name : str, default="the backbone"
        What error messages call the backbone.
    tile, overlap : int, optional
        Side of the squares that an image is cut into, and what neighbours share at least, in pixels
        of the original image. Each goes through the backbone at ``image_size``, an int; see
        :func:`~anomalib_lite.images.tiling.embed_tiles`.
    transform : EmbeddingTransform, optional
        What changes embeddings, by its method ``transform``, before anything else sees them.
    patch_pixels : list of float
        Filled in: the side of a patch in the backbone, in pixels, for each batch so far.

    Examples
    --------
    >>> class Gray:
    ...     stride, dtype = 8, "float32"
    ...     def embed(self, pixels, channels=None):
    ...         return pixels[:, ::8, ::8].mean(axis=3, keepdims=True, dtype="float32")
    >>> extractor = Extractor(Gray(), image_size=32)
    >>> for batch, E in extractor.embed_batches(ImageSource(np.zeros((5, 40, 60, 3)))):
    ...     print(batch.indices, E.shape)
    [0, 1, 2, 3, 4] (5, 4, 6, 1)
    """

    backbone: Embedder
    image_size: int | tuple[int, int]
    batch_size: int = 32
    on_error: str = "raise"
    verbose: int = 0
    name: str = "the backbone"
    tile: int | None = None
    overlap: int = 0
    transform: Any = None
    patch_pixels: list[float] = field(default_factory=list, compare=False)

    def embed_batches(
        self,
        source: ImageSource,
        *,
        channels: np.ndarray | None = None,
        skipped: list[tuple[int, str]] | None = None,
        progress: str | None = None,
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield each batch of images with its patch embeddings.

        Parameters
        ----------
        source : ImageSource
        channels : array of shape (d,), int64, optional
            Channels of the embeddings that are wanted; by default all.
        skipped : list, optional
            Is given ``(index, reason)`` for every image left out.
        progress : str, optional
            Label of the progress bar; without one there is no bar.

        Yields
        ------
        Batch
        ndarray of shape (B, h, w, D) or (B, h, w, d), float32
            NaN where a patch is ignored.

        Raises
        ------
        AnomalibLiteError
            For an image that cannot be used, unless it is skipped; for embeddings that are not
            finite.
        """
        quiet = None if self.verbose and progress else True  # None: in a terminal only
        n, wanted = len(source.items), None if self.transform is not None else channels
        with tqdm(total=n, desc=progress, unit="image", leave=False, disable=quiet) as bar:
            for batch in iter_batches(
                source,
                image_size=self.image_size,
                stride=self.backbone.stride,
                batch_size=self.batch_size if self.tile is None else 1,
                tile=self.tile,
                on_error=self.on_error,
                skipped=skipped,
            ):
                if self.tile is None:
                    embeddings = self.backbone.embed(batch.pixels, wanted)
                else:
                    embeddings = self._embed_tiles(batch.pixels[0], wanted)
                if not np.isfinite(embeddings).all():
                    raise InvalidValueError(
                        f"{source.where}: {self.name} gives NaN or infinity in "
                        f"{self.backbone.dtype}. Use dtype='float32'."
                    )
                self.patch_pixels.append(batch.pixels.shape[1] / embeddings.shape[1])
                if self.transform is not None:
                    embeddings = self.transform.transform(embeddings)
                    if channels is not None:
                        embeddings = np.take(embeddings, channels, axis=-1)
                for grid, mask, size in zip(embeddings, batch.ignored, batch.sizes, strict=False):
                    if mask is not None:
                        grid[mask.cells(size, grid.shape[:2], source.where)] = np.nan
                yield batch, embeddings
                bar.update(len(batch.pixels))

    @property
    def tile_side(self) -> int:
        """Side of a tile in the backbone, in pixels."""
        assert isinstance(self.image_size, int | np.integer)
        return max(1, round(self.image_size / self.backbone.stride)) * self.backbone.stride

    def _embed_tiles(self, image: np.ndarray, channels: np.ndarray | None) -> np.ndarray:
        """Return the embeddings (1, h, w, D) of an image (H, W, 3), cut into tiles."""
        assert self.tile is not None
        stride, side = self.backbone.stride, self.tile_side
        shared = -(-self.overlap * side // (self.tile * stride)) * stride
        return embed_tiles(
            partial(self.backbone.embed, channels=channels),
            image,
            side=side,
            overlap=min(shared, side - stride),
            stride=stride,
            batch_size=max(1, min(self.batch_size, TILE_PIXELS // side**2)),
        )
