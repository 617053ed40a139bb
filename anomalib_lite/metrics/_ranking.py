"""The core of all metrics: positive scores are looked up in the sorted negative scores.

Two binary searches give the rank of a positive score among the sorted negatives. AUROC, average
precision and AUPRO are then plain means over the positives. They are exact, ties included, and need
neither a grid of thresholds nor an index array of 8 bytes per pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from anomalib_lite.errors import InvalidTypeError, InvalidValueError

Array = npt.NDArray[Any]

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
# Number of positives looked up at a time: counts take 8 bytes each and must not need more memory
# than the scores.
_LOOKUP = 1 << 18


class PixelPool(NamedTuple):
    """Scores of all pixels of all images, in one buffer of the total size of the maps."""

    negatives: Array  # (n_negative,) sorted
    positives: Array  # (n_positive,) region after region, or one sorted run
    region_sizes: Array  # (n_regions,) pixels of each region, in the order of ``positives``


def n_at_least(ordered: Array, threshold: Any) -> Any:
    """Count the values ``>= threshold`` in the sorted array ``ordered``."""
    return ordered.size - np.searchsorted(ordered, threshold, side="left")


def n_above(ordered: Array, threshold: Any) -> Any:
    """Count the values ``> threshold`` in the sorted array ``ordered``."""
    return ordered.size - np.searchsorted(ordered, threshold, side="right")


def area(negatives: Array, positives: Array, limit: float = 1.0) -> float:
    """Return the mean of :func:`_shares` over sorted ``positives``: AUROC for ``limit=1``."""
    if not negatives.size or not positives.size:
        return float("nan")
    total = sum(float(_shares(negatives, p, limit).sum()) for _, p in _portions(positives))
    return total / positives.size


def mean_precision(negatives: Array, positives: Array) -> float:
    """Return the mean precision at the scores of the sorted ``positives``."""
    if not negatives.size or not positives.size:
        return float("nan")
    total = 0.0
    for _, scores in _portions(positives):
        hits = n_at_least(positives, scores)
        total += float((hits / (hits + n_at_least(negatives, scores))).sum())
    return total / positives.size


def best_f1(negatives: Array, positives: Array) -> float:
    """Return the largest F1 score over the thresholds at the sorted ``positives``."""
    if not negatives.size or not positives.size:
        return float("nan")
    best = 0.0
    for _, scores in _portions(positives):
        hits = n_at_least(positives, scores)
        alarms = n_at_least(negatives, scores)
        best = max(best, float((2 * hits / (hits + alarms + positives.size)).max()))
    return best


def region_area(pool: PixelPool, limit: float) -> float:
    """Return the mean of :func:`_shares` over the pixels of each region, then over the regions."""
    if not pool.negatives.size or not pool.region_sizes.size:
        return float("nan")
    ends = np.cumsum(pool.region_sizes)
    total = 0.0
    for start, scores in _portions(pool.positives):
        # Sorted look-ups touch neighbouring memory, which is several times faster.
        order = np.argsort(scores)
        region = np.searchsorted(ends, start + order, side="right")
        shares = _shares(pool.negatives, scores[order], limit)
        total += float((shares / pool.region_sizes[region]).sum())
    return total / len(pool.region_sizes)


def split_images(
    y_true: npt.ArrayLike, y_score: npt.ArrayLike, where: str, name: str = "y_score"
) -> tuple[Array, Array]:
    """Check labels and scores; return the sorted scores of normal and of anomalous images."""
    labels, scores = np.asarray(y_true), numbers(name, y_score, where)
    if labels.ndim != 1 or scores.shape != labels.shape:
        raise InvalidValueError(
            f"{where}: y_true and {name} must both have shape (N,), "
            f"got {labels.shape} and {scores.shape}."
        )
    if not labels.size:
        raise InvalidValueError(f"{where}: y_true must hold at least one label, got none.")
    if labels.dtype.kind not in "biuf":
        raise InvalidTypeError(
            f"{where}: y_true must hold 0 (normal) and 1 (anomalous), got dtype {labels.dtype}."
        )
    valid = (labels == 0) | (labels == 1)
    if not valid.all():
        raise InvalidValueError(
            f"{where}: y_true must hold only 0 (normal) and 1 (anomalous), "
            f"got {labels[~valid][0]!s}. For scikit-learn's +1 and -1, pass y == -1."
        )
    if np.isnan(scores).any():
        index = int(np.isnan(scores).argmax())
        raise InvalidValueError(f"{where}: {name} must not be NaN, got NaN at index {index}.")
    anomalous = labels == 1
    return np.sort(scores[~anomalous]), np.sort(scores[anomalous])


def pool_pixels(
    masks: Sequence[npt.ArrayLike | None] | Array,
    maps: Sequence[npt.ArrayLike] | Array,
    where: str,
    *,
    by_region: bool,
) -> PixelPool:
    """Check masks and maps, and collect the scores of their pixels.

    Negatives fill one buffer from its start and positives from its end, so nothing has to be
    counted first and there is no second copy of the maps.
    """
    masks, arrays = check_lists(masks, maps, where)
    buffer = np.empty(sum(a.size for a in arrays), np.result_type(*{a.dtype for a in arrays}))
    n_negatives, start = 0, buffer.size
    region_sizes: list[int] = []
    for index, (values, array) in enumerate(zip(masks, arrays, strict=True)):
        mask = check_mask(values, array.shape, index, where)
        negatives = array[~mask & counted(values)]
        buffer[n_negatives : n_negatives + negatives.size] = negatives
        n_negatives += negatives.size
        for region in _regions(mask, array) if by_region else [array[mask]]:
            buffer[start - region.size : start] = region
            start -= region.size
            region_sizes.append(region.size)
    pool = PixelPool(buffer[:n_negatives], buffer[start:], np.array(region_sizes[::-1]))
    pool.negatives.sort()
    if not by_region:
        pool.positives.sort()
    return pool


def _shares(negatives: Array, scores: Array, limit: float) -> Array:
    """Return, for each score, the share of [0, limit] under its ramp; see ``aupro``.

    Over the false-positive rate, a positive with score t is missed up to #(negatives > t) / n, is
    detected from #(negatives >= t) / n on, and lies on a straight line in between.
    """
    low = n_above(negatives, scores) / negatives.size
    high = n_at_least(negatives, scores) / negatives.size
    return shares_under_ramps(low, high, limit)


def shares_under_ramps(low: Array, high: Array, limit: float) -> Array:
    """Return the share of [0, limit] under ramps that rise from 0 at ``low`` to 1 at ``high``."""
    rise = np.minimum(high, limit) - np.minimum(low, limit)
    under_ramp = np.zeros_like(rise)
    np.divide(rise**2, 2 * (high - low), out=under_ramp, where=high > low)
    # Divided before summing, so that a perfect map gives 1.0 and not 0.9999...
    return np.asarray((limit - np.minimum(high, limit) + under_ramp) / limit)


def _portions(positives: Array) -> Iterator[tuple[int, Array]]:
    for start in range(0, positives.size, _LOOKUP):
        yield start, positives[start : start + _LOOKUP]


def _regions(mask: Array, array: Array) -> Iterator[Array]:
    """Yield the scores of each connected component of ``mask``, with 8-neighbourhood."""
    labels, _ = label_regions(mask)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        yield array[box][labels[box] == number]


def label_regions(mask: Array) -> tuple[Array, int]:
    """Return the number of each pixel's component, with 8-neighbourhood, and how many there are."""
    labels, n = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    return labels, int(n)


def check_lists(
    masks: Sequence[npt.ArrayLike | None] | Array,
    maps: Sequence[npt.ArrayLike] | Array,
    where: str,
    first: str = "masks",
) -> tuple[list[Any], list[Array]]:
    """Return equally many masks (or what ``first`` names; not checked yet) and maps (checked)."""
    masks, maps = listed(first, masks, where), listed("maps", maps, where)
    if len(masks) != len(maps):
        raise InvalidValueError(
            f"{where}: {first} and maps must be equally many, got {len(masks)} and {len(maps)}."
        )
    if not maps:
        raise InvalidValueError(f"{where}: maps must hold at least one map, got none.")
    return masks, [check_map(values, index, where) for index, values in enumerate(maps)]


def listed(name: str, values: Any, where: str) -> list[Any]:
    """Return masks or maps as a list."""
    try:
        return list(values)
    except TypeError as error:
        shape = "(n, 4)" if name == "boxes" else "(H, W)"
        expected = f"a list of {shape} arrays or an array of shape (N, {shape[1:]}"
        raise InvalidTypeError(
            f"{where}: {name} must be {expected}, got {type(values).__name__}."
        ) from error


def numbers(name: str, values: npt.ArrayLike, where: str) -> Array:
    """Return real numbers in float32, or wider where float32 would round them."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "biuf":
        raise InvalidTypeError(f"{where}: {name} must hold real numbers, got dtype {array.dtype}.")
    # float64 and wide integers keep their precision: rounding them would invent ties.
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def check_map(values: npt.ArrayLike, index: int, where: str) -> Array:
    """Return an anomaly map (H, W) without NaN."""
    array = numbers(f"maps[{index}]", values, where)
    if array.ndim != 2 or not array.size:
        raise InvalidValueError(
            f"{where}: maps[{index}] must have shape (H, W), got {array.shape}. "
            "A single map goes in as a list of one."
        )
    if np.isnan(array.max()):
        raise InvalidValueError(f"{where}: maps[{index}] must not be NaN, got NaN.")
    return array


def check_mask(
    values: npt.ArrayLike | None, shape: tuple[int, ...], index: int, where: str
) -> Array:
    """Return a mask of the map's ``shape`` as bool; None is all zero."""
    if values is None:
        return np.zeros(shape, dtype=bool)
    mask = np.asarray(values)
    if mask.shape != shape:
        raise InvalidValueError(
            f"{where}: masks[{index}] and maps[{index}] must have one shape (H, W), "
            f"got {mask.shape} and {shape}. Compare maps at the mask's own size."
        )
    fractions = mask.dtype.kind == "f" and not np.isin(mask, (0, 1)).all()
    if mask.dtype.kind not in "biuf" or fractions:
        raise InvalidTypeError(
            f"{where}: masks[{index}] must be bool or integer, got dtype {mask.dtype}. "
            "Threshold a resized or soft mask first, as in mask > 0.5."
        )
    return np.asarray(mask.astype(bool, copy=False) & counted(values))


def counted(values: Any) -> Array | np.bool_:
    """Return which pixels of a mask count (H, W): all (True) but the masked ones of a masked array.

    The others are neither anomalous nor normal.
    """
    if isinstance(values, np.ma.MaskedArray):
        return np.asarray(~np.ma.getmaskarray(values))
    return np.True_
