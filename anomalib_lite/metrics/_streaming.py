"""Pixel metrics of more maps than fit in memory: scores are counted, not kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anomalib_lite._validation import check_memory, check_number
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.metrics._aupimo import areas_over_log, check_limits
from anomalib_lite.metrics._ranking import (
    Array,
    check_map,
    check_mask,
    counted,
    label_regions,
    shares_under_ramps,
)

__all__ = ["PixelMetrics"]

# The bits of a float32 are divided: scores with the same upper bits share a slot of the table, in
# which each value of the lower bits has a bin.
_LOWER_BITS = 14
_N_SLOTS = 1 << (32 - _LOWER_BITS)
_SLOT_BINS = 1 << _LOWER_BITS
# Rows of the table: for each bin, the number of negatives and of positives, and three sums over its
# pixels: of 1 / (pixels of the region), of 1 / (anomalous pixels of the image) and, on normal
# images, of 1 / (pixels of the image).
_NEGATIVES, _POSITIVES, _REGIONS, _IMAGES, _NORMALS = range(5)
# Bins handled at a time, so that temporary arrays are small.
_FOLDED_AT_ONCE = 1 << 18
_READ_AT_ONCE = 1 << 14
_MISSING: Any = object()


class _Bins(NamedTuple):
    """Bins that hold pixels, from the highest score down; arrays of one shape (n,)."""

    counts: Array  # (5, n) rows of the table
    above: Array  # (5, n) sums of each row over all higher bins
    is_one_score: Array  # (n,) bool: all pixels of the bin have the same score


class PixelMetrics:
    """Pixel metrics over a stream of maps, in bounded memory.

    Maps go in one after the other and are not kept, so there may be more than fit in memory. The
    functions of the same names need all maps at once.

    Parameters
    ----------
    fpr_limit : float, default=0.3
        As for :func:`aupro`.
    fpr_limits : pair of float, default=(1e-5, 1e-4)
        As for :func:`aupimo`.
    memory_budget : int or str, default="512MB"
        Bytes for the table of counts, or such as ``"1GB"``; at least 12 MB. About 10 MB come on
        top, and ten times the memory of one map.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If a parameter is out of range.

    Notes
    -----
    A float32 has 2^32 values. The table has a bin for every value with the same upper 18 bits as a
    score that was seen, so each value has a bin of its own, and the metrics are exact. If that
    would exceed ``memory_budget``, neighbouring bins are added up in pairs, for all scores alike,
    until it fits: a bin then holds 2, 4, 8... neighbouring float32 values, and its pixels count as
    ties. With 512 MB this begins at scores that spread over about 1.4 powers of two, and each
    doubling of the range of powers costs one bit of the 24 that a float32 has.

    Ties only change the order inside a bin. :meth:`bounds` computes each metric for the best and
    for the worst order, so the exact value is proven to lie between. A bin whose pixels all have
    the same score, such as the zeros of a background, holds true ties and does not widen them.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite.metrics import pixel_auroc
    >>> rng = np.random.default_rng(0)
    >>> masks = [np.arange(600).reshape(20, 30) < 40, None, None]
    >>> maps = [rng.random((20, 30), dtype=np.float32) for _ in masks]
    >>> found = PixelMetrics().update(masks, (amap for amap in maps))
    >>> exact = pixel_auroc(masks, maps)
    >>> round(found.compute()["pixel_auroc"] - exact, 9)
    0.0
    >>> low, high = found.bounds()["pixel_auroc"]
    >>> bool(low - 1e-12 <= exact <= high + 1e-12)
    True
    """

    def __init__(
        self,
        *,
        fpr_limit: float = 0.3,
        fpr_limits: tuple[float, float] = (1e-5, 1e-4),
        memory_budget: int | str = "512MB",
    ) -> None:
        where = "PixelMetrics"
        self.fpr_limit = check_number("fpr_limit", fpr_limit, where, "(0, 1]")
        self.fpr_limits = check_limits(fpr_limits, where)
        self.memory_budget = memory_budget
        n_bins = check_memory("memory_budget", memory_budget, where) // (5 * 8 + 2 * 2)
        if n_bins < _N_SLOTS:
            raise InvalidValueError(
                f"{where}: memory_budget must be at least 12MB, got {memory_budget!r}."
            )
        # Memory is taken from the system only where a bin is touched.
        self._table = np.zeros((5, n_bins))
        # Lower bits of the highest score in each bin, plus one, and of the lowest, less than
        # _SLOT_BINS by so much: both only grow, and 0 is an empty bin.
        self._ends = np.zeros((2, n_bins), np.uint16)
        self._slots = np.full(_N_SLOTS, -1, np.int64)  # upper bits -> place in the table
        self._n_slots = 0
        self._shift = 0  # each bin holds 2 ** shift neighbouring values
        self._n_images = self._n_regions = self._n_anomalous = self._n_normal = 0

    def update(
        self, masks: Iterable[npt.ArrayLike | None], maps: Iterable[npt.ArrayLike]
    ) -> PixelMetrics:
        """Count the pixels of some images.

        Parameters
        ----------
        masks : iterable of arrays of shape (H, W)
            Ground truth, as for :func:`pixel_auroc`; ``None`` is a good image.
        maps : iterable of arrays of shape (H, W), float32 or float16
            Anomaly maps. Generators and arrays in files are read one map at a time. Integers and
            float64 are taken if all their values are float32 values.

        Returns
        -------
        PixelMetrics
            This object.

        Raises
        ------
        InvalidValueError, InvalidTypeError
            If there are more masks than maps or fewer, or a map has values that float32 would
            round; otherwise as :func:`pixel_auroc`. Images before the one at fault are counted.
        """
        pairs = zip_longest(_iterable("masks", masks), _iterable("maps", maps), fillvalue=_MISSING)
        for index, (mask, amap) in enumerate(pairs):
            if mask is _MISSING or amap is _MISSING:
                fewer, more = ("masks", "maps") if mask is _MISSING else ("maps", "masks")
                raise InvalidValueError(
                    f"PixelMetrics.update: masks and maps must be equally many, got {index} "
                    f"{fewer} and more {more}."
                )
            array = check_map(amap, index, "PixelMetrics.update")
            truth = check_mask(mask, array.shape, index, "PixelMetrics.update")
            self._count(truth, counted(mask), _ordered_bits(array, index))
        return self

    def compute(self) -> dict[str, float]:
        """Return the metrics of all images so far.

        Returns
        -------
        dict of str to float
            ``"pixel_auroc"``, ``"pixel_ap"``, ``"pixel_f1_max"``, ``"aupro"`` and ``"aupimo"``,
            with pixels of one bin as ties; ``nan`` where the functions of these names give it.

        Raises
        ------
        InvalidValueError
            If there was no image.
        """
        return self._all_metrics("middle")

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Return bounds of the exact value of each metric.

        Returns
        -------
        dict of str to (float, float)
            For each key of :meth:`compute` a low and a high bound, for the scores as they are. They
            are the computed value itself while each float32 value has a bin of its own.

        Raises
        ------
        InvalidValueError
            If there was no image.
        """
        orders = ("worst", "best") if self._shift else ("middle", "middle")
        low, high = (self._all_metrics(order) for order in orders)
        return {name: (low[name], high[name]) for name in low}

    def _count(self, mask: Array, seen: Array | np.bool_, bits: Array) -> None:
        """Add the pixels of one image that are seen to the table; it may be that none is."""
        self._n_images += 1
        known = np.broadcast_to(seen, bits.shape)
        self._make_room(bits[known])
        lower = bits & (_SLOT_BINS - 1)
        bins = self._slots[bits >> _LOWER_BITS]
        bins *= _SLOT_BINS >> self._shift
        bins += lower >> self._shift
        if self._shift:
            self._add_ends(bins[known], lower[known])
        anomalous = mask.any()
        negatives = bins[~mask & seen]
        np.add.at(self._table[_NEGATIVES], negatives, 1.0)
        if not anomalous:
            if negatives.size:
                np.add.at(self._table[_NORMALS], negatives, 1.0 / negatives.size)
                self._n_normal += 1
            return
        labels, n_regions = label_regions(mask)
        labels, bins = labels[mask], bins[mask]
        np.add.at(self._table[_POSITIVES], bins, 1.0)
        np.add.at(self._table[_REGIONS], bins, 1.0 / np.bincount(labels)[labels])
        np.add.at(self._table[_IMAGES], bins, 1.0 / bins.size)
        self._n_regions += n_regions
        self._n_anomalous += 1

    def _add_ends(self, bins: Array, lower: Array) -> None:
        """Note the lowest and the highest score of bins, given by their lower bits."""
        np.maximum.at(self._ends[0], bins, (lower + 1).astype(np.uint16))
        np.maximum.at(self._ends[1], bins, (_SLOT_BINS - lower).astype(np.uint16))

    def _make_room(self, bits: Array) -> None:
        """Give a slot to each value of the upper bits; fold the table until all slots fit."""
        seen = np.zeros(_N_SLOTS, bool)
        seen[bits >> _LOWER_BITS] = True
        new = np.flatnonzero(seen & (self._slots < 0))
        while (self._n_slots + new.size) * (_SLOT_BINS >> self._shift) > self._table.shape[1]:
            self._fold()
        self._slots[new] = self._n_slots + np.arange(new.size)
        self._n_slots += new.size

    def _fold(self) -> None:
        """Add up neighbouring bins in pairs."""
        used = self._n_slots * (_SLOT_BINS >> self._shift)
        for start in range(0, used, _FOLDED_AT_ONCE):
            stop = min(start + _FOLDED_AT_ONCE, used)
            if not self._shift:  # each bin is one value so far
                filled = start + np.flatnonzero(self._table[:2, start:stop].any(axis=0))
                self._add_ends(filled, filled & (_SLOT_BINS - 1))
            half = slice(start // 2, stop // 2)
            for row in self._table:
                row[half] = row[start:stop].reshape(-1, 2).sum(axis=1)
            for ends in self._ends:
                ends[half] = ends[start:stop].reshape(-1, 2).max(axis=1)
        self._table[:, used // 2 : used] = 0
        self._ends[:, used // 2 : used] = 0
        self._shift += 1

    def _bins(self) -> Iterator[_Bins]:
        """Yield the bins that hold pixels, some slots at a time, from the highest score down."""
        size = _SLOT_BINS >> self._shift
        inside = np.arange(size)[::-1]
        starts = self._slots[self._slots >= 0][::-1] * size
        at_once = max(1, _READ_AT_ONCE // size)
        total = np.zeros((5, 1))
        for first in range(0, starts.size, at_once):
            bins = (starts[first : first + at_once, None] + inside).ravel()
            bins = bins[(self._table[_NEGATIVES, bins] > 0) | (self._table[_POSITIVES, bins] > 0)]
            counts = self._table[:, bins]
            sums = np.hstack([total, total + np.cumsum(counts, axis=1)])
            is_one_score = self._ends[:, bins].sum(axis=0) == _SLOT_BINS + 1
            yield _Bins(counts, sums[:, :-1], is_one_score)
            total = sums[:, -1:]

    def _all_metrics(self, order: str) -> dict[str, float]:
        """Return all metrics, with the pixels of a bin as ties, or in the best or worst order."""
        if not self._n_images:
            raise InvalidValueError("PixelMetrics: update must be called with at least one image.")
        used = self._table[:, : self._n_slots * (_SLOT_BINS >> self._shift)]
        n_negative, n_positive = used[_NEGATIVES].sum(), used[_POSITIVES].sum()
        lowest, highest = np.log(self.fpr_limits)
        sums = dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro", "aupimo"), 0.0)
        best_f1 = 0.0
        for counts, above, is_one_score in self._bins() if n_negative and n_positive else ():
            order_of = partial(_orders, order=order, tied=is_one_score)
            first, last = order_of(above[_NEGATIVES], counts[_NEGATIVES])
            positives = counts[_POSITIVES]
            low, high = first / n_negative, last / n_negative
            sums["pixel_auroc"] += positives @ shares_under_ramps(low, high, 1.0)
            sums["aupro"] += counts[_REGIONS] @ shares_under_ramps(low, high, self.fpr_limit)
            hits = above[_POSITIVES] + positives
            sure = hits
            if order == "worst":  # the first positive of a bin has the lowest precision
                sure = np.where(is_one_score, hits, above[_POSITIVES] + np.minimum(positives, 1))
            sums["pixel_ap"] += positives @ (sure / np.maximum(sure + last, 1))
            # In any order there is a threshold below all pixels of the bin.
            f1 = 2 * hits / (hits + last + n_positive)
            best_f1 = max(best_f1, float(f1.max(initial=0)))
            if self._n_normal:
                rates = order_of(above[_NORMALS], counts[_NORMALS])
                a, b = (np.minimum(rate / self._n_normal, 1.0) for rate in rates)
                areas = areas_over_log(a, b, lowest, highest) / (highest - lowest)
                sums["aupimo"] += counts[_IMAGES] @ areas
        if not n_negative or not n_positive:
            return dict.fromkeys((*sums, "pixel_f1_max"), float("nan"))
        return {
            "pixel_auroc": float(sums["pixel_auroc"] / n_positive),
            "pixel_ap": float(sums["pixel_ap"] / n_positive),
            "pixel_f1_max": best_f1,
            "aupro": float(sums["aupro"] / self._n_regions),
            "aupimo": float(sums["aupimo"] / self._n_anomalous) if self._n_normal else float("nan"),
        }


def _orders(above: Array, inside: Array, *, order: str, tied: Array) -> tuple[Array, Array]:
    """Return how many negatives come before the positives of a bin, and before or with them."""
    if order == "middle":
        return above, above + inside
    only = above if order == "best" else above + inside
    return np.where(tied, above, only), np.where(tied, above + inside, only)


def _iterable(name: str, values: Any) -> Iterator[Any]:
    try:
        return iter(values)
    except TypeError as error:
        raise InvalidTypeError(
            f"PixelMetrics.update: {name} must be an iterable of (H, W) arrays, "
            f"got {type(values).__name__}."
        ) from error


def _ordered_bits(array: Array, index: int) -> Array:
    """Return whole numbers (H, W), uint32, in the order of the scores, equal where they are."""
    scores = array.astype(np.float32, copy=False)
    if scores.dtype != array.dtype and not np.array_equal(scores, array):
        raise InvalidTypeError(
            f"PixelMetrics.update: maps[{index}] must hold float32 values, got {array.dtype} that "
            "float32 would round. Convert the maps first, as in maps.astype(np.float32)."
        )
    bits = np.ascontiguousarray(scores + np.float32(0)).view(np.uint32)  # -0 becomes 0
    negative = bits >> 31 == 1
    return np.where(negative, ~bits, bits | np.uint32(1 << 31))
