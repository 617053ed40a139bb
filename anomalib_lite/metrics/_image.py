"""Image and pixel metrics: numpy arrays in, floats out.

Every metric here only compares scores with each other, so raw scores go in as they are: no
normalising, no clipping. All of them are exact. No threshold grid is used: the scores of the
normal images (or pixels) are sorted once, and each anomalous score is looked up in them.

A metric that is undefined because one class is missing is ``nan``: reported as missing, not as
a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from anomalib_lite._validation import check_number
from anomalib_lite.metrics._ranking import (
    Array,
    area,
    mean_precision,
    n_at_least,
    pool_pixels,
    region_area,
    split_images,
)

__all__ = [
    "aupro",
    "auroc",
    "average_precision",
    "f1_max",
    "fpr_at_tpr",
    "pixel_auroc",
    "pixel_average_precision",
    "pixel_metrics",
    "rate",
    "seg_f1",
]

Masks = Sequence[npt.ArrayLike | None] | Array
Maps = Sequence[npt.ArrayLike] | Array


def auroc(y_true: npt.ArrayLike, y_score: npt.ArrayLike) -> float:
    r"""Area under the receiver operating characteristic.

    Parameters
    ----------
    y_true : array-like of shape (N,)
        Ground truth: 0 or False is normal, 1 or True is anomalous.
    y_score : array-like of shape (N,)
        Scores, higher is more anomalous; any range, infinite values allowed.

    Returns
    -------
    float
        In [0, 1]; 0.5 is chance. ``nan`` if one of the two classes is missing.

    Raises
    ------
    InvalidValueError
        If the input is empty, the lengths differ, a score is NaN, or a label is not 0 or 1.
    InvalidTypeError
        If labels or scores are not numbers.

    Notes
    -----
    The probability that an anomalous image scores above a normal one, ties counting one half:

    .. math:: \frac{1}{n_+ n_-} \sum_{i \in +} \sum_{j \in -}
        \big([s_j < s_i] + \tfrac{1}{2} [s_j = s_i]\big)

    This is the Mann-Whitney form of the area; it equals
    :func:`sklearn.metrics.roc_auc_score`.

    References
    ----------
    Hanley and McNeil, "The meaning and use of the area under a receiver operating
    characteristic (ROC) curve", Radiology 143(1), 1982.

    Examples
    --------
    >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    negatives, positives = split_images(y_true, y_score, "auroc")
    return area(negatives, positives)


def average_precision(y_true: npt.ArrayLike, y_score: npt.ArrayLike) -> float:
    r"""Average precision: the mean precision over the recall steps.

    Parameters
    ----------
    y_true, y_score : array-like of shape (N,)
        Labels (1 is anomalous) and scores (higher is more anomalous), as for :func:`auroc`.

    Returns
    -------
    float
        In (0, 1]; chance is the share of anomalous images. ``nan`` if one class is missing.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        As :func:`auroc`.

    Notes
    -----
    :math:`\sum_n (R_n - R_{n-1}) P_n` over the thresholds :math:`n`, a step function without
    interpolation, equal scores entering together: :func:`sklearn.metrics.average_precision_score`.
    Written per anomalous image, it is the mean of the precision at that image's own score. We
    deviate in one point: with no normal image the result is ``nan``, not 1.

    Examples
    --------
    >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.8333
    """
    negatives, positives = split_images(y_true, y_score, "average_precision")
    return mean_precision(negatives, positives)


def f1_max(y_true: npt.ArrayLike, y_score: npt.ArrayLike) -> float:
    r"""Largest F1 that any threshold on the scores reaches.

    The threshold is chosen with the test labels in hand, so this is an upper bound that says
    how separable the scores are. It is not what a deployed detector reaches.

    Parameters
    ----------
    y_true, y_score : array-like of shape (N,)
        Labels (1 is anomalous) and scores (higher is more anomalous), as for :func:`auroc`.

    Returns
    -------
    float
        In (0, 1]. ``nan`` if one of the two classes is missing.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        As :func:`auroc`.

    Notes
    -----
    :math:`\max_t 2 TP / (2 TP + FP + FN)` with "anomalous" meaning a score of at least
    :math:`t`. Between two anomalous scores a lower threshold only adds false alarms, so the
    maximum lies at one of the anomalous scores and only these are tried.

    Examples
    --------
    >>> f1_max([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.8
    """
    negatives, positives = split_images(y_true, y_score, "f1_max")
    if not negatives.size or not positives.size:
        return float("nan")
    hits = n_at_least(positives, positives)
    alarms = n_at_least(negatives, positives)
    return float((2 * hits / (hits + alarms + positives.size)).max())


def fpr_at_tpr(y_true: npt.ArrayLike, y_score: npt.ArrayLike, tpr: float = 0.95) -> float:
    """False-alarm rate at the highest threshold that finds a share ``tpr`` of the anomalies.

    Parameters
    ----------
    y_true, y_score : array-like of shape (N,)
        Labels (1 is anomalous) and scores (higher is more anomalous), as for :func:`auroc`.
    tpr : float, default=0.95
        Share of the anomalous images that must be found, in (0, 1].

    Returns
    -------
    float
        In [0, 1], lower is better. ``nan`` if one of the two classes is missing.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If ``tpr`` is outside (0, 1]; otherwise as :func:`auroc`.

    Notes
    -----
    An image is found if its score is at least the threshold. There is no interpolation between
    thresholds: the value is one that a threshold really has.

    Examples
    --------
    >>> fpr_at_tpr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], tpr=1.0)
    0.5
    """
    tpr = check_number("tpr", tpr, "fpr_at_tpr", "(0, 1]")
    negatives, positives = split_images(y_true, y_score, "fpr_at_tpr")
    if not negatives.size or not positives.size:
        return float("nan")
    # The smallest k with k / n >= tpr. ceil(tpr * n) would be one too many where the product
    # is rounded up, as in 0.55 * 100.
    reached = np.arange(1, positives.size + 1) / positives.size
    k = int(np.searchsorted(reached, tpr, side="left")) + 1
    threshold = positives[positives.size - k]
    return float(n_at_least(negatives, threshold) / negatives.size)


def rate(decisions: npt.NDArray[np.bool_]) -> float:
    """Share of decisions (N,) that are True; ``nan`` if there are none.

    Examples
    --------
    >>> rate(np.array([True, False, False, True])), rate(np.array([], bool))
    (0.5, nan)
    """
    return float(decisions.mean()) if decisions.size else float("nan")


def pixel_auroc(masks: Masks, maps: Maps) -> float:
    """AUROC over the pixels of all images, pooled.

    Parameters
    ----------
    masks : sequence of N arrays of shape (H, W), or array of shape (N, H, W)
        Ground truth, bool or integer; non-zero is anomalous. Sizes may differ between images.
        ``None`` in place of a mask means a good image: all zero.
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
    All pixels go into one pool: it is no mean over images. Takes memory for a copy of the maps.

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


def aupro(masks: Masks, maps: Maps, fpr_limit: float = 0.3) -> float:
    r"""Area under the per-region overlap curve, up to a false-positive rate.

    Each connected defect counts the same, so small ones cannot hide behind a large one.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`.
    fpr_limit : float, default=0.3
        False-positive rate up to which the curve is integrated, in (0, 1]. MVTec AD uses 0.3,
        MVTec AD 2 uses 0.05; figures of different limits cannot be compared.

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
    For a threshold, a region's overlap is the share of its pixels at or above it; PRO is the
    mean overlap of all regions of all images. Regions are the connected components of the masks
    with 8-neighbourhood. The false-positive rate is taken over all defect-free pixels, those of
    good images included. PRO is integrated over the false-positive rate from 0 to the limit,
    with straight lines between the thresholds and interpolated exactly at the limit, and divided
    by the limit.

    No threshold is enumerated. A pixel of score :math:`t` adds a ramp to the curve, from 0 at
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
    """F1 of the pixels of all images, pooled, at a given threshold: MVTec AD 2's SegF1.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`.
    threshold : float
        Pixels above it are called anomalous. Take it from normal images, never from these.

    Returns
    -------
    float
        In [0, 1]: 2 TP / (2 TP + FP + FN). ``nan`` if there is no anomalous pixel.

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
    """All pixel metrics at once: the pixels are pooled and sorted once instead of three times.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`.
    fpr_limit : float, default=0.3
        As for :func:`aupro`.

    Returns
    -------
    dict of str to float
        ``"pixel_auroc"``, ``"pixel_ap"`` and ``"aupro"``.

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
    {'pixel_auroc': 0.8125, 'pixel_ap': 0.75, 'aupro': 0.625}
    """
    limit = check_number("fpr_limit", fpr_limit, "pixel_metrics", "(0, 1]")
    pool = pool_pixels(masks, maps, "pixel_metrics", by_region=True)
    overlap = region_area(pool, limit)
    pool.positives.sort()  # the regions are done with: one run from here on
    return {
        "pixel_auroc": area(pool.negatives, pool.positives),
        "pixel_ap": mean_precision(pool.negatives, pool.positives),
        "aupro": overlap,
    }
