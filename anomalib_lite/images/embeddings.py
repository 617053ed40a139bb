"""Patch embeddings of many images, of one size or of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.images.sizing import choose_image_size

__all__ = [
    "Embeddings",
    "assemble",
    "contiguous",
    "embed_all",
    "image_size_for",
    "patch_pixels",
    "patch_rows",
    "stack",
    "take",
]

# (N, h, w, D) float32, or a list of N arrays (h, w, D) where images have different sizes. A patch
# that is ignored is NaN.
Embeddings = np.ndarray | list[np.ndarray]


def image_size_for(
    source: ImageSource, image_size: int | tuple[int, int] | str, tile: int | None = None
) -> int | tuple[int, int]:
    """Return what a detector's ``image_size`` means for these images: ``"auto"`` is chosen.

    >>> images = ImageSource(np.zeros((300, 400), np.uint8))
    >>> [image_size_for(images, size) for size in ("auto", 200, (np.int64(96), 128))]
    [320, 200, (96, 128)]
    """
    if isinstance(image_size, str):
        return choose_image_size(source, tile)
    if isinstance(image_size, int | np.integer):
        return int(image_size)
    height, width = image_size
    return int(height), int(width)


def patch_pixels(
    extractor: Extractor, source: ImageSource, skipped: Sequence[tuple[int, str]], height: int
) -> float:
    """Return the side of a patch in the backbone, in pixels.

    If workers have embedded the images, the first one not ``skipped``, which has ``height`` patches
    from top to bottom, is resized once more.
    """
    if extractor.patch_pixels:
        return extractor.patch_pixels[0]
    first = int(np.setdiff1d(np.arange(len(source)), [i for i, _ in skipped])[0])
    stride: int = extractor.backbone.stride
    pixels, _ = source.load(first, extractor.image_size, stride, extractor.tile)
    return len(pixels) / height


def embed_all(
    extractor: Extractor,
    source: ImageSource,
    *,
    channels: np.ndarray | None = None,
    progress: str | None = None,
) -> tuple[Embeddings, list[tuple[int, str]]]:
    """Embed all images at once.

    Parameters
    ----------
    extractor : Extractor
    source : ImageSource
    channels : array of shape (d,), int64, optional
        Channels of the embeddings that are wanted; by default all.
    progress : str, optional
        Label of the progress bar; without one there is no bar.

    Returns
    -------
    embeddings : Embeddings
        Of the images that can be used, in their order.
    skipped : list of (int, str)
        Position and reason of each image left out.
    """
    skipped: list[tuple[int, str]] = []
    batches = extractor.embed_batches(source, channels=channels, skipped=skipped, progress=progress)
    return assemble(len(source.items), ((batch.indices, E) for batch, E in batches)), skipped


def stack(arrays: list[Any]) -> Any:
    """Move arrays of one shape into one array; return the list itself if the shapes differ.

    The arrays are moved one by one, so none is in memory twice for long.
    """
    if len({None if a is None else a.shape for a in arrays}) != 1 or arrays[0] is None:
        return arrays
    if len(arrays) == 1:
        return arrays[0][None]
    stacked = np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
    for i in range(len(arrays)):
        stacked[i], arrays[i] = arrays[i], None
    return stacked


def take(E: Embeddings, indices: np.ndarray) -> Embeddings:
    """Select the embeddings of some of the images."""
    return E[indices] if isinstance(E, np.ndarray) else [E[i] for i in indices]


def assemble(n: int, batches: Iterable[tuple[list[int], np.ndarray]]) -> Embeddings:
    """Put the embeddings of up to ``n`` images into the order of their indices.

    Parameters
    ----------
    n : int
    batches : iterable of (list of B int, array of shape (B, h, w, D))
        Indices and embeddings of some images at a time; an index may be missing.

    Returns
    -------
    Embeddings
    """
    grids: dict[int, np.ndarray] = {}
    whole = np.empty((n, 0, 0, 0), np.float32)
    for indices, embeddings in batches:
        if len(indices) == n and indices == list(range(n)):
            return embeddings  # all at once: no copy
        if not grids:  # untouched room for all, which is used if all have one size
            whole = np.empty((n, *embeddings.shape[1:]), np.float32)
        for index, grid in zip(indices, embeddings, strict=True):
            if grid.shape == whole.shape[1:]:
                whole[index] = grid
                grids[index] = whole[index]
            else:
                grids[index] = grid.copy()
    if len(grids) == n and all(grid.base is whole for grid in grids.values()):
        return whole
    return [grids[index] for index in sorted(grids)]


def contiguous(grids: list[np.ndarray]) -> Embeddings:
    """Move the embeddings (h, w, D) of many images next to each other in memory.

    The arrays are moved one by one, so none is in memory twice for long.
    """
    if len({grid.shape for grid in grids}) <= 1:
        stacked: Embeddings = stack(grids) if grids else []
        return stacked
    ends = np.cumsum([grid.shape[0] * grid.shape[1] for grid in grids])
    rows = np.empty((ends[-1], grids[0].shape[2]), np.float32)
    for i, end in enumerate(ends):
        height, width, length = grids[i].shape
        place = rows[end - height * width : end].reshape(height, width, length)
        place[:], grids[i] = grids[i], place
    return grids


def patch_rows(E: Embeddings) -> np.ndarray:
    """Return all patches of all images as rows (n, D), without those that are ignored (NaN).

    Those of an array, and :func:`contiguous` ones, are not copied if none is ignored.
    """
    rows: Any
    if isinstance(E, np.ndarray):
        rows = E.reshape(-1, E.shape[-1])
    else:
        rows = E[0].base
        shape = (sum(grid.shape[0] * grid.shape[1] for grid in E), E[0].shape[2])
        if rows is None or rows.shape != shape or any(grid.base is not rows for grid in E):
            rows = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in E])
    ignored = np.isnan(rows[:, 0])
    return np.asarray(rows[~ignored] if ignored.any() else rows)
