"""Scores of normal images -> a threshold with a known false-alarm rate."""

from __future__ import annotations

import math
import warnings

import numpy as np
from scipy.special import betainc

from anomalib_lite._validation import check_number
from anomalib_lite.errors import CalibrationWarning, InvalidValueError

__all__ = [
    "calibration_size",
    "conformal_p_values",
    "conformal_threshold",
    "describe_threshold",
    "threshold_and_shortfall",
]


def conformal_threshold(
    scores: np.ndarray, false_alarm_rate: float, *, confidence: float | None = None
) -> float:
    r"""Compute the threshold that at most ``false_alarm_rate`` of future normal images exceed.

    Parameters
    ----------
    scores : array of shape (n,)
        Scores of normal images that the detector was *not* fitted on.
    false_alarm_rate : float
        The rate to guarantee, in (0, 1).
    confidence : float, optional
        Probability, in (0, 1), that the rate of this very threshold is at most
        ``false_alarm_rate``, over draws of the n images. By default the mean over draws is.

    Returns
    -------
    float
        Score above which an image is called anomalous. Without any scores it is infinite, so that
        nothing is called anomalous.

    Raises
    ------
    InvalidValueError
        For a rate or a confidence outside (0, 1), or scores that are not finite.

    Warns
    -----
    CalibrationWarning
        If there are fewer than ``1 / false_alarm_rate - 1`` scores (with a confidence c, fewer than
        ``log(1 - c) / log(1 - false_alarm_rate)``): no finite threshold can guarantee the rate
        then. The largest score is returned, which guarantees ``1 / (n + 1)`` on average.

    Notes
    -----
    Split-conformal calibration [1]_: with :math:`k = \lceil (n + 1)(1 - \alpha) \rceil` the
    score of a further normal image exceeds the k-th smallest of the n scores with probability
    at most :math:`\alpha`, for any distribution, if that image and the n are exchangeable (same
    line, same camera, same lighting). This is an average over draws of the n images. For one draw
    the rate is distributed as Beta(n + 1 - k, k) (if no scores are equal), so with n = 99 and
    :math:`\alpha` = 1 % it has mean 1 %, and lies below 3 % in 95 % of all draws. With a
    ``confidence``, k is the least rank for which that distribution has at least so much of its mass
    up to :math:`\alpha` [2]_; equal scores can only make the rate smaller.

    References
    ----------
    .. [1] Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", Springer 2005;
       Angelopoulos and Bates, "A Gentle Introduction to Conformal Prediction", 2021.
    .. [2] Vovk, "Conditional validity of inductive conformal predictors", ACML 2012.

    Examples
    --------
    >>> conformal_threshold(range(1, 100), 0.01)
    99.0
    >>> conformal_threshold(range(1, 100), 0.1)
    90.0
    >>> conformal_threshold(range(1, 100), 0.1, confidence=0.95)
    95.0
    """
    threshold, shortfall = threshold_and_shortfall(scores, false_alarm_rate, confidence)
    if shortfall is not None:
        warnings.warn(shortfall, CalibrationWarning, stacklevel=2)
    return threshold


def threshold_and_shortfall(
    scores: np.ndarray, false_alarm_rate: float, confidence: float | None = None
) -> tuple[float, str | None]:
    """Return what :func:`conformal_threshold` returns, and what it warns of, without warning.

    A caller that is deep in the library gives the warning itself, at the user's line.
    """
    where = "conformal_threshold"
    check_number("false_alarm_rate", false_alarm_rate, where, "(0, 1)")
    if confidence is not None:
        check_number("confidence", confidence, where, "(0, 1)")
    ordered = np.sort(np.asarray(list(scores), dtype=np.float32))
    n = len(ordered)
    if not np.isfinite(ordered).all():
        raise InvalidValueError(f"{where}: scores must be finite, got NaN or infinity.")
    if n < _least(false_alarm_rate, confidence):
        shortfall = _shortfall(n, false_alarm_rate, confidence)
        return float(ordered[-1]) if n else math.inf, shortfall
    return float(ordered[_rank(n, false_alarm_rate, confidence) - 1]), None


def conformal_p_values(scores: np.ndarray, calibration_scores: np.ndarray) -> np.ndarray:
    r"""Compute how likely a normal image is to score as high as each of these.

    Parameters
    ----------
    scores : array of shape (N,)
        Scores of images; NaN stays NaN.
    calibration_scores : array of shape (n,)
        Scores of normal images that the detector was not fitted on.

    Returns
    -------
    ndarray of shape (N,), float64
        In [1 / (n + 1), 1].

    Notes
    -----
    :math:`p = (1 + |\{i: s_i \ge s\}|) / (n + 1)` over the n calibration scores [1]_. For a
    normal image that is exchangeable with the n, :math:`P(p \le u) \le u` for every u. Over a
    batch, ``scipy.stats.false_discovery_control(p)`` bounds the share of good images among those
    called anomalous: these p-values are dependent in a way that Benjamini and Hochberg's procedure
    allows [2]_.

    References
    ----------
    .. [1] Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", Springer 2005.
    .. [2] Bates, Candes, Lei, Romano, Sesia, "Testing for outliers with conformal p-values",
       Annals of Statistics 51(1), 2023.

    Examples
    --------
    >>> conformal_p_values([0.5, 7, 20], range(1, 10))
    array([1. , 0.4, 0.1])
    """
    new = np.asarray(scores, dtype=np.float32)
    ordered = np.sort(np.asarray(list(calibration_scores), dtype=np.float32))
    n_as_high = len(ordered) - np.searchsorted(ordered, new, side="left")
    p_values = (1 + n_as_high) / (len(ordered) + 1)
    return np.where(np.isnan(new), np.nan, p_values)


def describe_threshold(
    scores: np.ndarray, false_alarm_rate: float, confidence: float | None = None
) -> str:
    """Say which of the calibration scores the threshold is, and what it would be at other rates.

    Takes what :func:`threshold_and_shortfall` does, and gives one line. Of the other rates, 1, 5
    and 20 %, it names the first two that the scores are enough for, with the same ``confidence``.

    >>> describe_threshold(range(1, 301), 0.02)
    'the 295th of 300 scores; at 1 % it would be 298, at 5 % 286'
    >>> describe_threshold(range(1, 41), 0.01)
    'the largest of 40 scores; at 5 % it would be 39, at 20 % 33'
    """
    ordered = np.sort(np.asarray(list(scores), dtype=np.float32))
    n = len(ordered)
    if not n:
        return "no scores"
    enough = n >= _least(false_alarm_rate, confidence)
    rank = _rank(n, false_alarm_rate, confidence) if enough else n
    ending = {1: "st", 2: "nd", 3: "rd"}.get(rank % 10 * (rank % 100 not in (11, 12, 13)), "th")
    text = f"the {'largest' if rank == n else f'{rank:,}{ending}'} of {n:,} scores"
    others = [
        f"{100 * rate:g} % {'' if i else 'it would be '}"
        f"{ordered[_rank(n, rate, confidence) - 1]:.5g}"
        for i, rate in enumerate(
            rate
            for rate in (0.01, 0.05, 0.2)
            if rate != false_alarm_rate and n >= _least(rate, confidence)
        )
    ][:2]
    return "; at ".join([text, ", at ".join(others)] if others else [text])


def calibration_size(
    false_alarm_rate: float, n_images: int | None = None, n_known: int = 0, purposes: int = 1
) -> int:
    """Number of normal images to hold back for calibration.

    Parameters
    ----------
    false_alarm_rate : float
        The rate to guarantee, in (0, 1).
    n_images : int, optional
        Number of images at hand: at least a fifth and at most half of them are held back.
        Without it, only the rate counts.
    n_known : int, default=0
        Number of calibration scores that there are already; so many images fewer are needed.
    purposes : int, default=1
        Number of purposes that need held-back images of their own, as many each.

    Returns
    -------
    int
        For the rate, the least n with ``(n + 1) (1 - rate) <= n``: ``1 / rate - 1`` rounded up.

    Examples
    --------
    >>> calibration_size(0.01), calibration_size(0.05)
    (99, 19)
    >>> calibration_size(0.01, 120), calibration_size(0.05, 60), calibration_size(0.05, 200)
    (60, 19, 40)
    """
    # 1e-9: 1 / 0.01 - 1 is 99, not 100, although binary fractions make it a little more.
    needed = purposes * max(1, math.ceil(1 / false_alarm_rate - 1 - 1e-9)) - n_known
    if n_images is None:
        return max(1, needed)
    return min(max(needed, n_images // 5), n_images // 2)


def _least(false_alarm_rate: float, confidence: float | None = None) -> int:
    """Return the least number of scores that can guarantee the rate."""
    if confidence is None:
        return calibration_size(false_alarm_rate)
    return math.ceil(math.log1p(-confidence) / math.log1p(-false_alarm_rate) - 1e-9)


def _rank(n: int, false_alarm_rate: float, confidence: float | None = None) -> int:
    """Return k, the rank of the threshold among n scores, which are enough."""
    if confidence is None:
        return math.ceil((n + 1) * (1 - false_alarm_rate) - 1e-9)
    ranks = np.arange(1, n + 1)
    mass = betainc(n + 1 - ranks, ranks, false_alarm_rate)  # grows with the rank
    # n scores are enough: at most rounding keeps the largest one's mass below the confidence.
    return min(n, 1 + int(np.searchsorted(mass, confidence - 1e-12)))


def _shortfall(n: int, false_alarm_rate: float, confidence: float | None) -> str:
    needed = _least(false_alarm_rate, confidence)
    with_confidence = "" if confidence is None else f" with confidence={confidence:g}"
    reachable = (
        f"threshold_ is the largest of their scores, which guarantees {1 / (n + 1):.3g} at best"
        if n
        else "threshold_ is infinite: nothing will be called anomalous until you set it"
    )
    return (
        f"false_alarm_rate={false_alarm_rate:g}{with_confidence} needs {needed} normal images for "
        f"calibration, got {n}; {reachable}. Fit on more images, ask for a higher rate, or set "
        "threshold_ yourself."
    )
