"""Images -> the size at which they go through a backbone, if the user names none."""

from __future__ import annotations

import numpy as np

from anomalib_lite.errors import AnomalibLiteError
from anomalib_lite.images._source import ImageSource

__all__ = ["choose_image_size"]

# From this shorter side of the images on, in pixels -> shorter side in the backbone.
_SIZES = ((0, 256), (160, 320), (512, 448))
_AT_MOST = 64  # images that are looked at: their median hardly changes with more


def choose_image_size(source: ImageSource, tile: int | None = None) -> int:
    """Return a size for the backbone that suits the images' own.

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
        Shorter side in pixels. If the median of the shorter sides of the images (or ``tile``,
        where that is less) is below 160, 256; below 512, 320; from 512 on, 448.

    Notes
    -----
    The sizes are few, and none is nearly that of the image: an image that is resized by one or two
    per cent is sharp in some places and blurred in others. ``docs/options.md`` of the repository
    has figures.

    Examples
    --------
    >>> [choose_image_size(ImageSource(np.zeros((s, 999), np.uint8))) for s in (60, 300, 800)]
    [256, 320, 448]
    """
    n = len(source)
    sides = []
    for index in np.unique(np.linspace(0, n - 1, min(n, _AT_MOST)).astype(int)):
        try:
            side = min(source.size(index))
        except AnomalibLiteError:  # fit will say so, or skip it
            continue
        sides.append(side if tile is None else min(side, tile))
    median = np.median(sides or [0])
    return max(size for least, size in _SIZES if median >= least)
