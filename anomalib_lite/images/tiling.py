"""A large image -> tiles that go through a backbone -> one grid of patch embeddings."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from anomalib_lite._validation import check_int
from anomalib_lite.errors import InvalidValueError

__all__ = ["check_tiles", "embed_tiles", "owners", "tile_starts"]


def check_tiles(tile: Any, overlap: Any, image_size: Any, where: str) -> None:
    """Raise InvalidValueError if a detector's parameters of tiles cannot be used.

    >>> check_tiles(512, 64, 256, "PatchCore")
    >>> check_tiles(None, 64, 256, "PatchCore")
    Traceback (most recent call last):
    ...
    anomalib_lite.errors.InvalidValueError: PatchCore: overlap=64 is that of tiles, got tile=None. \
Set tile, or overlap=0.
    """
    if tile is None:
        if overlap != 0:
            raise InvalidValueError(
                f"{where}: overlap={overlap!r} is that of tiles, got tile=None. Set tile, or "
                "overlap=0."
            )
        return
    side = check_int("tile", tile, where, low=16)
    check_int("overlap", overlap, where, low=0, high=side - 1)
    if isinstance(image_size, tuple | list):
        raise InvalidValueError(
            f"{where}: image_size must be the side of a tile in the backbone, one whole number or "
            f"'auto', if tile is given, got {image_size!r}."
        )


def embed_tiles(
    embed: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    *,
    side: int,
    overlap: int,
    stride: int,
    batch_size: int,
) -> np.ndarray:
    """Embed an image tile by tile; each patch comes from the tile in which it lies most central.

    Parameters
    ----------
    embed : callable
        Turns tiles (B, H, W, 3) into embeddings (B, h, w, D).
    image : ndarray of shape (H, W, 3)
        Sides are multiples of ``stride``.
    side : int
        Side of a tile in pixels, a multiple of ``stride``; a tile is no larger than the image.
    overlap : int
        Pixels that neighbouring tiles share at least, a multiple of ``stride`` below ``side``.
    stride : int
        Pixels per cell of the backbone's coarsest feature map.
    batch_size : int
        Number of tiles that go through the backbone together.

    Returns
    -------
    ndarray of shape (1, h, w, D), float32

    Notes
    -----
    A network sees less of what surrounds a patch near the border of a tile. So tiles overlap, and a
    patch is taken where its surroundings are seen best, as SuperADD does.

    Examples
    --------
    >>> def every_8th(tiles):
    ...     return tiles[:, ::8, ::8, :1].astype(np.float32)
    >>> image = np.arange(80 * 96 * 3, dtype=np.float32).reshape(80, 96, 3)
    >>> options = {"side": 32, "overlap": 16, "stride": 16, "batch_size": 4}
    >>> E = embed_tiles(every_8th, image, **options)
    >>> bool((E == every_8th(image[None])).all())
    True
    """
    sides = [min(side, length) for length in image.shape[:2]]
    starts = [
        tile_starts(length, tile, min(overlap, tile - stride), stride)
        for length, tile in zip(image.shape[:2], sides, strict=True)
    ]
    places = [(y, x) for y in starts[0] for x in starts[1]]
    whole: np.ndarray | None = None
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        E = embed(np.stack([image[y : y + sides[0], x : x + sides[1]] for y, x in batch]))
        cell = [tile // n for tile, n in zip(sides, E.shape[1:3], strict=True)]
        if whole is None:
            grid = [length // c for length, c in zip(image.shape[:2], cell, strict=True)]
            whole = np.empty((1, *grid, E.shape[3]), np.float32)
            rows = owners(starts[0], sides[0], cell[0], grid[0])
            columns = owners(starts[1], sides[1], cell[1], grid[1])
        for one, (y, x) in zip(E, batch, strict=True):
            (top, bottom), (left, right) = rows[y], columns[x]
            i, j = y // cell[0], x // cell[1]
            whole[0, top:bottom, left:right] = one[top - i : bottom - i, left - j : right - j]
    assert whole is not None
    return whole


def tile_starts(length: int, side: int, overlap: int, stride: int) -> list[int]:
    """Place tiles along one side of an image, as evenly as multiples of ``stride`` allow.

    All arguments are in pixels, and multiples of ``stride``.

    >>> tile_starts(160, 64, 16, 16)
    [0, 48, 96]
    >>> tile_starts(64, 64, 16, 16)
    [0]
    """
    n = 1 + -(-(length - side) // (side - overlap))  # fewest that overlap enough
    last = (length - side) // stride
    return [stride * (i * last // (n - 1)) if n > 1 else 0 for i in range(n)]


def owners(starts: list[int], side: int, cell: int, n_cells: int) -> dict[int, tuple[int, int]]:
    """Return the cells, from one to below another, that each tile gives: by its start in pixels.

    A cell belongs to the tile whose centre is nearest.

    >>> owners([0, 48, 96], 64, 16, 10)
    {0: (0, 4), 48: (4, 7), 96: (7, 10)}
    """
    ends = [(a + b + side + cell) // (2 * cell) for a, b in pairwise(starts)]
    return dict(zip(starts, zip([0, *ends], [*ends, n_cells], strict=True), strict=True))
