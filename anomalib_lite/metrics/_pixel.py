"""Pixel metrics: masks and anomaly maps in, floats out.

The pixels of all images go into one pool. As with the image metrics, only the order of the scores
counts, all metrics are exact, and a metric is ``nan`` where a class is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from anomalib_lite._validation import check_number
from anomalib_lite.metrics._ranking import (
    Array,
    area,
    best_f1,
    mean_precision,
    pool_pixels,
    region_area,
)

__all__ = [
    "aupro",
    "pixel_auroc",
    "pixel_average_precision",
    "pixel_f1_max",
    "pixel_metrics",
    "seg_f1",
]

Masks = Sequence[npt.ArrayLike | None] | Array
Maps = Sequence[npt.ArrayLike] | Array


def pixel_auroc(masks: Masks, maps: Maps) -> float:
    """AUROC over the pixels of all images, pooled.

    Parameters
    ----------
    masks : sequence of N arrays of shape (H, W), or array of shape (N, H, W)
        Ground truth, bool or integer; non-zero is anomalous. Sizes may differ between images.
        ``None`` in place of a mask means a good image: all zero. Of a masked array
        (:class:`numpy.ma.MaskedArray`) the masked pixels are left out.
    maps : sequence of N arrays of shape (H, W), or array of shape (N, H, W)
        Anomaly maps at their masks' own sizes, higher is more anomalous; any range.

    Returns
    -------
    float
        In [0, 1]. ``nan`` if there is no anomalous pixel, or no other.

    Raises
    ------
    InvalidValueError
        If the input is empty, the numbers of masks and maps differ, a map is not of its mask's
        size, or a map holds NaN.
    InvalidTypeError
        If masks or maps are not numbers, or a mask holds fractions.

    Notes
    -----
    All pixels go into one pool, so this is not a mean over images. It needs memory for one copy of
    the maps.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[0, 0, 1], [0, 0, 1]])
    >>> amap = np.array([[0.1, 0.2, 0.9], [0.1, 0.3, 0.2]], dtype=np.float32)
    >>> pixel_auroc([mask, None], [amap, np.zeros((2, 2), np.float32)])
    0.90625
    """
    pool = pool_pixels(masks, maps, "pixel_auroc", by_region=False)
    return area(pool.negatives, pool.positives)


def pixel_average_precision(masks: Masks, maps: Maps) -> float:
    """:func:`average_precision` over the pixels of all images, pooled.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`.

    Returns
    -------
    float
        In (0, 1]; chance is the share of anomalous pixels. ``nan`` if there is no anomalous
        pixel, or no other.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        As :func:`pixel_auroc`.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[0, 0, 1], [0, 0, 1]])
    >>> amap = np.array([[0.1, 0.2, 0.9], [0.1, 0.3, 0.2]], dtype=np.float32)
    >>> pixel_average_precision([mask], [amap])
    0.75
    """
    pool = pool_pixels(masks, maps, "pixel_average_precision", by_region=False)
    return mean_precision(pool.negatives, pool.positives)


def pixel_f1_max(masks: Masks, maps: Maps) -> float:
    """:func:`f1_max` over the pixels of all images, pooled.

    The threshold is chosen with the test masks, so this is an upper bound. :func:`seg_f1` takes a
    threshold that was chosen on normal images.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`.

    Returns
    -------
    float
        In (0, 1]. ``nan`` if there is no anomalous pixel, or no other.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        As :func:`pixel_auroc`.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[0, 0, 1], [0, 0, 1]])
    >>> amap = np.array([[0.1, 0.2, 0.9], [0.1, 0.3, 0.2]], dtype=np.float32)
    >>> round(pixel_f1_max([mask], [amap]), 4)
    0.6667
    """
    pool = pool_pixels(masks, maps, "pixel_f1_max", by_region=False)
    return best_f1(pool.negatives, pool.positives)


def aupro(masks: Masks, maps: Maps, fpr_limit: float = 0.3) -> float:
    r"""Area under the per-region overlap curve, up to a false-positive rate.

    Each connected defect has the same weight, so a large one cannot hide small ones.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`.
    fpr_limit : float, default=0.3
        False-positive rate up to which the curve is integrated, in (0, 1]. MVTec AD uses 0.3,
        MVTec AD 2 uses 0.05; values at different limits cannot be compared.

    Returns
    -------
    float
        In [0, 1]. ``nan`` if there is no anomalous pixel, or no other.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If ``fpr_limit`` is outside (0, 1]; otherwise as :func:`pixel_auroc`.

    Notes
    -----
    At a threshold, the overlap of a region is the share of its pixels at or above the threshold;
    PRO is the mean overlap over all regions of all images. Regions are the connected components of
    the masks with 8-neighbourhood. The false-positive rate counts all defect-free pixels, also
    those of good images. PRO is integrated over the false-positive rate from 0 to the limit, with
    straight lines between the thresholds and exact interpolation at the limit, and divided by the
    limit.

    No threshold is enumerated. A pixel with score :math:`t` adds a ramp to the curve, from 0 at
    :math:`a = |\{j: s_j > t\}| / n_-` to 1 at :math:`b = |\{j: s_j \ge t\}| / n_-`, whose area
    up to the limit :math:`L` is :math:`L - (a + b) / 2` if :math:`b \le L`,
    :math:`(L - a)^2 / (2 (b - a))` if :math:`a < L < b`, and 0 otherwise. AUPRO is the mean of
    these areas over a region's pixels, then over the regions, divided by :math:`L`.

    References
    ----------
    Bergmann, Fauser, Sattlegger and Steger, "Uninformed Students", CVPR 2020.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[0, 0, 1], [0, 0, 1]])
    >>> amap = np.array([[0.1, 0.2, 0.9], [0.1, 0.3, 0.2]], dtype=np.float32)
    >>> aupro([mask], [amap], fpr_limit=0.5)
    0.625
    """
    limit = check_number("fpr_limit", fpr_limit, "aupro", "(0, 1]")
    return region_area(pool_pixels(masks, maps, "aupro", by_region=True), limit)


def seg_f1(masks: Masks, maps: Maps, threshold: float) -> float:
    """F1 score of the pixels of all images, pooled, at a threshold: SegF1 of MVTec AD 2.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`.
    threshold : float
        Pixels with a score above it are called anomalous. Choose it on normal images, never on the
        test images.

    Returns
    -------
    float
        In [0, 1]: 2 TP / (2 TP + FP + FN). ``nan`` if there is no anomalous pixel.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If ``threshold`` is no finite number; otherwise as :func:`pixel_auroc`.

    References
    ----------
    Heckler-Kram, Neudeck, Scheler, König and Steger, "The MVTec AD 2 Dataset", arXiv:2503.21622,
    2025.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[0, 0, 1], [0, 0, 1]])
    >>> amap = np.array([[0.1, 0.2, 0.9], [0.1, 0.3, 0.2]], dtype=np.float32)
    >>> seg_f1([mask], [amap], threshold=0.25)
    0.5
    """
    above = check_number("threshold", threshold, "seg_f1", "(-inf, inf)")
    pool = pool_pixels(masks, maps, "seg_f1", by_region=False)
    found, alarms = ((scores > above).sum() for scores in (pool.positives, pool.negatives))
    n_anomalous = pool.positives.size
    return float(2 * found / (found + alarms + n_anomalous)) if n_anomalous else float("nan")


def pixel_metrics(masks: Masks, maps: Maps, *, fpr_limit: float = 0.3) -> dict[str, float]:
    """All pixel metrics at once; the pixels are pooled and sorted only once.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`.
    fpr_limit : float, default=0.3
        As for :func:`aupro`.

    Returns
    -------
    dict of str to float
        ``"pixel_auroc"``, ``"pixel_ap"``, ``"pixel_f1_max"`` and ``"aupro"``.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        As :func:`aupro`.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[0, 0, 1], [0, 0, 1]])
    >>> amap = np.array([[0.1, 0.2, 0.9], [0.1, 0.3, 0.2]], dtype=np.float32)
    >>> pixel_metrics([mask], [amap], fpr_limit=0.5)
    {'pixel_auroc': 0.8125, 'pixel_ap': 0.75, 'pixel_f1_max': 0.6666666666666666, 'aupro': 0.625}
    """
    limit = check_number("fpr_limit", fpr_limit, "pixel_metrics", "(0, 1]")
    pool = pool_pixels(masks, maps, "pixel_metrics", by_region=True)
    overlap = region_area(pool, limit)
    pool.positives.sort()  # the regions are no longer needed
    return {
        "pixel_auroc": area(pool.negatives, pool.positives),
        "pixel_ap": mean_precision(pool.negatives, pool.positives),
        "pixel_f1_max": best_f1(pool.negatives, pool.positives),
        "aupro": overlap,
    }
