"""AUPIMO: recall in each anomalous image, at very few false alarms on normal images."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from anomalib_lite._validation import check_number
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.metrics._pixel import Maps, Masks
from anomalib_lite.metrics._ranking import (
    Array,
    check_lists,
    check_mask,
    counted,
    n_above,
    n_at_least,
)

__all__ = ["aupimo", "aupimo_scores"]


def aupimo(masks: Masks, maps: Maps, fpr_limits: tuple[float, float] = (1e-5, 1e-4)) -> float:
    """Mean of :func:`aupimo_scores` over the anomalous images.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`.
    fpr_limits : pair of float, default=(1e-5, 1e-4)
        Range of the false-positive rate, as for :func:`aupimo_scores`.

    Returns
    -------
    float
        In [0, 1]. ``nan`` if there is no anomalous image, or no normal one.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        As :func:`aupimo_scores`.

    References
    ----------
    Bertoldo, Ameln, Vaidya and Akçay, "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with
    High Speed and Low Tolerance", BMVC 2024, arXiv:2401.01984.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[0, 0, 1], [0, 0, 1]])
    >>> amap = np.array([[0.1, 0.2, 0.9], [0.1, 0.3, 0.2]], dtype=np.float32)
    >>> normal = np.linspace(0, 0.5, 6).reshape(2, 3)
    >>> aupimo([mask, None], [amap, normal])
    0.5
    """
    scores = _scores(masks, maps, fpr_limits, "aupimo")
    scores = scores[~np.isnan(scores)]
    return float(scores.mean()) if scores.size else float("nan")


def aupimo_scores(
    masks: Masks, maps: Maps, fpr_limits: tuple[float, float] = (1e-5, 1e-4)
) -> npt.NDArray[np.float64]:
    r"""Area under the per-image overlap curve (AUPIMO) of each image.

    The value of an image is the share of its anomalous pixels that is found, averaged over
    thresholds at which almost no pixel of a normal image is. Because each image has a value of its
    own, the images that a detector misses can be named.

    Parameters
    ----------
    masks, maps : sequences of N arrays of shape (H, W), or arrays of shape (N, H, W)
        Ground truth and anomaly maps, as for :func:`pixel_auroc`. An image is normal if its mask
        is ``None`` or all zero.
    fpr_limits : pair of float, default=(1e-5, 1e-4)
        Lowest and highest false-positive rate of the integral, 0 < low < high <= 1. Values at
        different limits cannot be compared.

    Returns
    -------
    ndarray of shape (N,), float64
        In [0, 1] for an anomalous image, ``nan`` for a normal one. All ``nan`` if there is no
        normal image.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If ``fpr_limits`` are not two increasing rates; otherwise as :func:`pixel_auroc`.

    Notes
    -----
    For a threshold :math:`t`, :math:`F(t)` is the mean over the normal images of the share of
    pixels with a score of at least :math:`t`, and :math:`T_i(t)` is that share among the anomalous
    pixels of image :math:`i`. Normal pixels of anomalous images are not counted. With limits
    :math:`L < U`,

    .. math:: \text{AUPIMO}_i = \frac{1}{\log (U / L)} \int_{\log L}^{\log U} T_i \, d \log F

    Between two thresholds the curve is a straight line over :math:`\log F`, as in the authors'
    code; this concerns ties alone. Below the lowest rate above 0 there is no such line, and
    :math:`T_i` is the recall without a false positive. So with fewer than :math:`1 / U` normal
    pixels the result is this recall.

    The authors' code differs in three points, none of which is part of the definition. It
    evaluates a grid of 300,000 thresholds, here every score is one. It integrates between the
    thresholds nearest to the limits, here at the limits. It leaves out what lies below the lowest
    rate above 0, or raises an error.

    References
    ----------
    Bertoldo, Ameln, Vaidya and Akçay, "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with
    High Speed and Low Tolerance", BMVC 2024, arXiv:2401.01984.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[0, 0, 1], [0, 0, 1]])
    >>> amap = np.array([[0.1, 0.2, 0.9], [0.1, 0.3, 0.2]], dtype=np.float32)
    >>> normal = np.linspace(0, 0.5, 6).reshape(2, 3)
    >>> aupimo_scores([mask, None], [amap, normal])
    array([0.5, nan])
    """
    return _scores(masks, maps, fpr_limits, "aupimo_scores")


def _scores(
    masks: Masks, maps: Maps, fpr_limits: tuple[float, float], where: str
) -> npt.NDArray[np.float64]:
    low, high = np.log(check_limits(fpr_limits, where))
    masks, arrays = check_lists(masks, maps, where)
    anomalous: dict[int, Array] = {}
    normal: dict[int, list[Array]] = {}  # by the number of pixels
    for index, (values, array) in enumerate(zip(masks, arrays, strict=True)):
        mask = check_mask(values, array.shape, index, where)
        if mask.any():
            anomalous[index] = array[mask]
        elif (seen := array[np.broadcast_to(counted(values), array.shape)]).size:
            normal.setdefault(seen.size, []).append(seen)
    result = np.full(len(arrays), np.nan)
    if normal:
        # Pixels of one size have one weight, so one sorted run a size is enough.
        runs = [np.concatenate(images, axis=None) for images in normal.values()]
        n_images = [len(images) for images in normal.values()]
        for run in runs:
            run.sort()
        for index, scores in anomalous.items():
            above, at_least = (
                sum(
                    n * count(run, scores) / run.size for n, run in zip(n_images, runs, strict=True)
                )
                / sum(n_images)
                for count in (n_above, n_at_least)
            )
            result[index] = areas_over_log(above, at_least, low, high).mean() / (high - low)
    return result


def areas_over_log(above: Array, at_least: Array, low: float, high: float) -> Array:
    """Return the area over [low, high] of the ramp of each pixel, from 0 to 1 over log FPR.

    A pixel is missed up to the rate ``above``, is found from the rate ``at_least`` on, and lies on
    a straight line in between. A ramp from rate 0, where there is no line, is a step at its end.
    """
    with np.errstate(divide="ignore"):
        end = np.log(at_least)
        start = np.where(above > 0, np.log(above), end)
    first, last = np.clip(start, low, high), np.clip(end, low, high)
    under_ramp = np.zeros_like(end)
    rising = last > first
    start, length = start[rising], end[rising] - start[rising]
    mean_height = ((first[rising] - start) + (last[rising] - start)) / (2 * length)
    under_ramp[rising] = (last - first)[rising] * mean_height
    return np.asarray(under_ramp + high - last)


def check_limits(limits: Any, where: str) -> tuple[float, float]:
    """Return two increasing rates."""
    try:
        low, high = limits
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(
            f"{where}: fpr_limits must be a pair (low, high), got {limits!r}."
        ) from error
    low = check_number("fpr_limits[0]", low, where, "(0, 1)")
    high = check_number("fpr_limits[1]", high, where, "(0, 1]")
    if low >= high:
        raise InvalidValueError(f"{where}: fpr_limits must increase, got ({low:g}, {high:g}).")
    return low, high
