"""Images that are all in memory at once, as training needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from anomalib_lite.images._source import ImageSource, iter_batches

__all__ = ["by_size", "load_all", "to_uint8"]

_Item = TypeVar("_Item")


def load_all(
    source: ImageSource,
    image_size: int | tuple[int, int],
    stride: int,
    *,
    on_error: str = "raise",
) -> list[np.ndarray]:
    """Load all images into memory at the size at which the backbone will see them.

    Parameters
    ----------
    source : ImageSource
        The images.
    image_size : int or (int, int)
        Shorter side, or height and width, in pixels.
    stride : int
        Stride of the backbone; both sides become multiples of it.
    on_error : {"raise", "skip"}, default="raise"
        Whether an image that cannot be used raises its error, or is left out.

    Returns
    -------
    list of ndarrays of shape (H, W, 3), uint8
        Pixels in [0, 255], in the order of ``source``. Sizes differ if aspects do.

    Raises
    ------
    AnomalibLiteError
        For an image that cannot be used, unless ``on_error="skip"``.

    Examples
    --------
    >>> [image.shape for image in load_all(ImageSource(np.zeros((2, 60, 99, 3), np.uint8)), 32, 16)]
    [(32, 48, 3), (32, 48, 3)]
    """
    images: dict[int, np.ndarray] = {}
    for batch in iter_batches(
        source, image_size=image_size, stride=stride, batch_size=16, on_error=on_error
    ):
        images.update(zip(batch.indices, to_uint8(batch.pixels), strict=True))
    return [images[i] for i in sorted(images)]


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as uint8 in [0, 255], from uint8 or from floats in [0, 1]."""
    return pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)


def by_size(
    items: Iterable[_Item], size: Callable[[_Item], tuple[int, ...]], most: int
) -> Iterator[list[_Item]]:
    """Yield groups of one size, of at most ``most`` items: full ones as soon as they are full.

    >>> list(by_size(["a", "bb", "c", "d", "ee"], lambda word: (len(word),), 2))
    [['a', 'c'], ['bb', 'ee'], ['d']]
    """
    waiting: dict[tuple[int, ...], list[_Item]] = {}
    for item in items:
        group = waiting.setdefault(size(item), [])
        group.append(item)
        if len(group) == most:
            yield waiting.pop(size(item))
    yield from waiting.values()
