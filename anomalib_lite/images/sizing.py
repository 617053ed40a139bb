"""Images -> the size at which they go through a backbone, if the user names none."""

from __future__ import annotations

import numpy as np

from anomalib_lite.errors import AnomalibLiteError
from anomalib_lite.images._source import ImageSource

__all__ = ["SIZES", "own_image_size"]

# Below the smallest a network sees too few patches; above the largest its time grows faster than
# accuracy does.
SIZES = (256, 448)
_AT_MOST = 64  # images that are looked at: their median hardly changes with more


def own_image_size(source: ImageSource, tile: int | None = None) -> int:
    """Return the shorter side that images have themselves, within what a network works well at.

    Parameters
    ----------
    source : ImageSource
        At most 64 images are looked at, evenly spread; of a file the header alone is read. Those
        that cannot be read do not count.
    tile : int, optional
        Side in pixels of the squares that images are cut into.

    Returns
    -------
    int
        Median of their shorter sides (or of ``tile``, where that is less), in pixels, but at least
        256 and at most 448.

    Notes
    -----
    More pixels than an image has bring time, and hardly accuracy; fewer lose small defects.
    ``docs/options.md`` of the repository has figures.

    Examples
    --------
    >>> [own_image_size(ImageSource(np.zeros((s, 600), np.uint8))) for s in (60, 300, 500)]
    [256, 300, 448]
    """
    n = len(source)
    sides = []
    for index in np.unique(np.linspace(0, n - 1, min(n, _AT_MOST)).astype(int)):
        try:
            side = min(source.size(index))
        except AnomalibLiteError:  # fit will say so, or skip it
            continue
        sides.append(side if tile is None else min(side, tile))
    return int(np.clip(np.median(sides or [SIZES[0]]), *SIZES))
