"""The pointing game: does the highest value of a heatmap lie in a box?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from anomalib_lite._validation import check_number
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.metrics._pixel import Maps
from anomalib_lite.metrics._ranking import Array, check_lists, numbers

__all__ = ["pointing_game"]


def pointing_game(
    boxes: Sequence[npt.ArrayLike | None], maps: Maps, *, tolerance: float = 0.0
) -> float:
    """Share of the images whose highest map value lies in one of their boxes.

    For data sets that mark defects by boxes: a box holds much normal surface, so it is no mask.

    Parameters
    ----------
    boxes : sequence of N arrays of shape (n, 4)
        Boxes x_min, y_min, x_max, y_max of each image, in pixels of its map, from 0, without the
        ends, as in ``NEUDET.boxes``: ``amap[y_min:y_max, x_min:x_max]`` is the box. An image with
        ``None`` or no box is not counted.
    maps : sequence of N arrays of shape (H, W), or array of shape (N, H, W)
        Anomaly maps, higher is more anomalous; any range.
    tolerance : float, default=0
        Distance in pixels, at least 0, from the pixel of the maximum to the nearest pixel of a box
        up to which an image is a hit. The paper uses 15, on photographs of about 500 x 375 pixels.

    Returns
    -------
    float
        In [0, 1]. ``nan`` if no image has a box.

    Raises
    ------
    InvalidValueError
        If the input is empty, the numbers of images differ, a box is empty or not inside its map,
        a map holds NaN, or ``tolerance`` is negative.
    InvalidTypeError
        If boxes or maps are not numbers.

    Notes
    -----
    If several pixels share the maximum, all of them must be hits. So a constant map is a miss
    unless the boxes cover it, and no order of pixels decides. Distances are Euclidean. The paper
    averages over the classes of objects; here all images count the same.

    References
    ----------
    Zhang, Lin, Brandt, Shen and Sclaroff, "Top-down Neural Attention by Excitation Backprop",
    ECCV 2016.

    Examples
    --------
    >>> import numpy as np
    >>> amap = np.zeros((20, 30))
    >>> amap[5, 12] = 1
    >>> pointing_game([[[10, 4, 14, 9]], [[20, 4, 28, 9]]], [amap, amap])
    0.5
    >>> pointing_game([[[10, 4, 14, 9]], [[20, 4, 28, 9]]], [amap, amap], tolerance=8)
    1.0
    """
    tolerance = check_number("tolerance", tolerance, "pointing_game", "[0, inf)")
    listed, arrays = check_lists(boxes, maps, "pointing_game", first="boxes")
    hits = []
    for index, (values, array) in enumerate(zip(listed, arrays, strict=True)):
        corners = _check_boxes(values, array.shape, index)
        if corners.size:
            hits.append(_is_hit(corners, array, tolerance))
    return float(np.mean(hits)) if hits else float("nan")


def _is_hit(boxes: Array, amap: Array, tolerance: float) -> bool:
    """Tell whether every pixel that has the maximum is within ``tolerance`` of a box."""
    y, x = (position[:, None] for position in np.nonzero(amap == amap.max()))
    x_min, y_min, x_max, y_max = boxes.T  # (n,), against the (n_maxima, 1) positions
    dx = np.maximum(np.maximum(x_min - x, x - (x_max - 1)), 0)
    dy = np.maximum(np.maximum(y_min - y, y - (y_max - 1)), 0)
    return bool((np.hypot(dx, dy).min(axis=1) <= tolerance).all())


def _check_boxes(values: npt.ArrayLike | None, shape: tuple[int, ...], index: int) -> Array:
    name = f"boxes[{index}]"
    if values is None:
        return np.empty((0, 4))
    try:
        boxes = numbers(name, values, "pointing_game")
    except ValueError as error:  # rows of different lengths
        raise InvalidTypeError(
            f"pointing_game: {name} must be an array of shape (n, 4), got {values!r}."
        ) from error
    if not boxes.size:
        return np.empty((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InvalidValueError(
            f"pointing_game: {name} must have shape (n, 4), got {boxes.shape}. "
            "A single box goes in as a list of one."
        )
    x_min, y_min, x_max, y_max = boxes.T
    height, width = shape
    inside = (x_min >= 0) & (x_max <= width) & (y_min >= 0) & (y_max <= height)
    valid = inside & (x_min < x_max) & (y_min < y_max)
    if not valid.all():
        raise InvalidValueError(
            f"pointing_game: {name} must hold boxes x_min < x_max, y_min < y_max inside the map of "
            f"{height} x {width} pixels (H x W), got {boxes[~valid][0].tolist()}. "
            "Give boxes in pixels of the map."
        )
    return boxes
