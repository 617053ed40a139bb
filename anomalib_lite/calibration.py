"""Scores of normal images -> a threshold with a known false-alarm rate."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from scipy.special import betainc

from anomalib_lite._validation import check_groups, check_number
from anomalib_lite.errors import CalibrationWarning, InvalidValueError

__all__ = [
    "calibration_size",
    "conformal_p_values",
    "conformal_threshold",
    "describe_threshold",
    "threshold_and_shortfall",
]


def conformal_threshold(
    scores: np.ndarray,
    false_alarm_rate: float,
    *,
    confidence: float | None = None,
    groups: Any = None,
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
    groups : sequence of n whole numbers or strings, optional
        The group of each score, such as the part that the image shows. The rate is then that of
        images of *new* groups. By default each image is a group of its own.

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
        If there are fewer than ``1 / false_alarm_rate - 1`` groups (with a confidence c, fewer than
        ``log(1 - c) / log(1 - false_alarm_rate)``): no finite threshold can guarantee the rate
        then. The largest score is returned, which guarantees ``1 / (n + 1)`` on average (n
        groups).

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

    Several photographs of one part are not exchangeable with those of others: n of them say less
    than n parts would. With K groups, the j-th of :math:`n_j` images, a score of group j weighs
    :math:`1 / ((K + 1) n_j)`, and the threshold is the least score for which the scores up to it
    weigh at least :math:`1 - \alpha` [3]_. The score of an image of a further group exceeds it with
    probability at most :math:`\alpha`, if the groups are exchangeable, and the images within each
    are. With a ``confidence`` the first image of each group counts, and n is K.

    References
    ----------
    .. [1] Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", Springer 2005;
       Angelopoulos and Bates, "A Gentle Introduction to Conformal Prediction", 2021.
    .. [2] Vovk, "Conditional validity of inductive conformal predictors", ACML 2012.
    .. [3] Lee, Barber, Willett, "Distribution-free inference with hierarchical data", 2023
       (arXiv:2306.06342).

    Examples
    --------
    >>> conformal_threshold(range(1, 100), 0.01)
    99.0
    >>> conformal_threshold(range(1, 100), 0.1)
    90.0
    >>> conformal_threshold(range(1, 100), 0.1, confidence=0.95)
    95.0
    >>> conformal_threshold([1, 2, 3, 9, 9, 9], 0.4)
    9.0
    >>> conformal_threshold([1, 2, 3, 9, 9, 9], 0.4, groups=["a", "b", "c", "d", "d", "d"])
    3.0
    """
    threshold, shortfall = threshold_and_shortfall(scores, false_alarm_rate, confidence, groups)
    if shortfall is not None:
        warnings.warn(shortfall, CalibrationWarning, stacklevel=2)
    return threshold


def threshold_and_shortfall(
    scores: np.ndarray,
    false_alarm_rate: float,
    confidence: float | None = None,
    groups: Any = None,
) -> tuple[float, str | None]:
    """Return what :func:`conformal_threshold` returns, and what it warns of, without warning.

    A caller that is deep in the library gives the warning itself, at the user's line.
    """
    where = "conformal_threshold"
    check_number("false_alarm_rate", false_alarm_rate, where, "(0, 1)")
    if confidence is not None:
        check_number("confidence", confidence, where, "(0, 1)")
    ordered, weights = _in_order(scores, groups, confidence)
    if not np.isfinite(ordered).all():
        raise InvalidValueError(f"{where}: scores must be finite, got NaN or infinity.")
    n_groups = _count(weights)
    if n_groups < _least(false_alarm_rate, confidence):
        shortfall = _shortfall(
            n_groups, false_alarm_rate, confidence, in_groups=n_groups < len(ordered)
        )
        return float(ordered[-1]) if n_groups else math.inf, shortfall
    return float(ordered[_rank(weights, false_alarm_rate, confidence) - 1]), None


def _in_order(scores: Any, groups: Any, confidence: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores that count, ascending, and the share of its group that each one is."""
    given = scores if isinstance(scores, np.ndarray) else list(scores)
    found = np.asarray(given, dtype=np.float32)
    ids = check_groups(groups, len(found), "conformal_threshold")
    if confidence is not None:  # which is known for independent scores: one of each group
        found = found[np.unique(ids, return_index=True)[1]]
        ids = np.arange(len(found))
    order = np.argsort(found, kind="stable")
    return found[order], 1 / np.bincount(ids)[ids[order]]


def _count(weights: np.ndarray) -> int:
    """Return the number of groups: the sum of the shares of their images."""
    return round(float(weights.sum()))


def conformal_p_values(
    scores: np.ndarray, calibration_scores: np.ndarray, groups: Any = None
) -> np.ndarray:
    r"""Compute how likely a normal image is to score as high as each of these.

    Parameters
    ----------
    scores : array of shape (N,)
        Scores of images; NaN stays NaN.
    calibration_scores : array of shape (n,)
        Scores of normal images that the detector was not fitted on.
    groups : sequence of n whole numbers or strings, optional
        The group of each calibration score, as in :func:`conformal_threshold`.

    Returns
    -------
    ndarray of shape (N,), float64
        In [1 / (n + 1), 1] for n groups; without groups, n scores.

    Notes
    -----
    :math:`p = (1 + |\{i: s_i \ge s\}|) / (n + 1)` over the n calibration scores [1]_; of a group
    of m images each counts 1 / m, and n is the number of groups. For a
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
    ordered, weights = _in_order(calibration_scores, groups, None)
    lower = np.concatenate([[0], np.cumsum(weights)])[np.searchsorted(ordered, new, side="left")]
    n_groups = _count(weights)
    p_values = (1 + n_groups - lower) / (n_groups + 1)
    return np.where(np.isnan(new), np.nan, p_values)


def describe_threshold(
    scores: np.ndarray,
    false_alarm_rate: float,
    confidence: float | None = None,
    groups: Any = None,
) -> str:
    """Say which of the calibration scores the threshold is, and what it would be at other rates.

    Takes what :func:`threshold_and_shortfall` does, and gives one line. Of the other rates, 1, 5
    and 20 %, it names the first two that the scores are enough for, with the same ``confidence``.

    >>> describe_threshold(range(1, 301), 0.02)
    'the 295th of 300 scores; at 1 % it would be 298, at 5 % 286'
    >>> describe_threshold(range(1, 41), 0.01)
    'the largest of 40 scores; at 5 % it would be 39, at 20 % 33'
    >>> describe_threshold(range(1, 41), 0.2, groups=[i // 4 for i in range(40)])
    'the 36th of 40 scores of 10 groups'
    """
    ordered, weights = _in_order(scores, groups, confidence)
    n, n_groups = len(ordered), _count(weights)
    if not n:
        return "no scores"
    enough = n_groups >= _least(false_alarm_rate, confidence)
    rank = _rank(weights, false_alarm_rate, confidence) if enough else n
    ending = {1: "st", 2: "nd", 3: "rd"}.get(rank % 10 * (rank % 100 not in (11, 12, 13)), "th")
    text = f"the {'largest' if rank == n else f'{rank:,}{ending}'} of {n:,} scores"
    text += "" if n_groups == n else f" of {n_groups:,} groups"
    others = [
        f"{100 * rate:g} % {'' if i else 'it would be '}"
        f"{ordered[_rank(weights, rate, confidence) - 1]:.5g}"
        for i, rate in enumerate(
            rate
            for rate in (0.01, 0.05, 0.2)
            if rate != false_alarm_rate and n_groups >= _least(rate, confidence)
        )
    ][:2]
    return "; at ".join([text, ", at ".join(others)] if others else [text])


def calibration_size(
    false_alarm_rate: float,
    n_images: int | None = None,
    n_known: int = 0,
    purposes: int = 1,
    confidence: float | None = None,
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
    confidence : float, optional
        As in :func:`conformal_threshold`.

    Returns
    -------
    int
        For the rate, the least n with ``(n + 1) (1 - rate) <= n``: ``1 / rate - 1`` rounded up;
        with a confidence, that with ``(1 - rate) ** n <= 1 - confidence``.

    Examples
    --------
    >>> calibration_size(0.01), calibration_size(0.05)
    (99, 19)
    >>> calibration_size(0.05, confidence=0.95)
    59
    >>> calibration_size(0.01, 120), calibration_size(0.05, 60), calibration_size(0.05, 200)
    (60, 19, 40)
    """
    needed = purposes * _least(false_alarm_rate, confidence) - n_known
    if n_images is None:
        return max(1, needed)
    return min(max(needed, n_images // 5), n_images // 2)


def _least(false_alarm_rate: float, confidence: float | None = None) -> int:
    """Return the least number of scores that can guarantee the rate."""
    if confidence is None:
        # 1e-9: 1 / 0.01 - 1 is 99, not 100, although binary fractions make it a little more.
        return max(1, math.ceil(1 / false_alarm_rate - 1 - 1e-9))
    return math.ceil(math.log1p(-confidence) / math.log1p(-false_alarm_rate) - 1e-9)


def _rank(weights: np.ndarray, false_alarm_rate: float, confidence: float | None = None) -> int:
    """Return which of the ascending scores, from 1, is the threshold; they are enough."""
    n = _count(weights)
    if confidence is None:
        wanted = (n + 1) * (1 - false_alarm_rate) - 1e-9
        return min(len(weights), 1 + int(np.searchsorted(np.cumsum(weights), wanted)))
    ranks = np.arange(1, n + 1)
    mass = betainc(n + 1 - ranks, ranks, false_alarm_rate)  # grows with the rank
    # n scores are enough: at most rounding keeps the largest one's mass below the confidence.
    return min(n, 1 + int(np.searchsorted(mass, confidence - 1e-12)))


def _shortfall(
    n: int, false_alarm_rate: float, confidence: float | None, *, in_groups: bool
) -> str:
    needed = _least(false_alarm_rate, confidence)
    with_confidence = "" if confidence is None else f" with confidence={confidence:g}"
    what = "groups of normal images" if in_groups else "normal images"
    reachable = (
        f"threshold_ is the largest of their scores, which guarantees {1 / (n + 1):.3g} at best"
        if n
        else "threshold_ is infinite: nothing will be called anomalous until you set it"
    )
    return (
        f"false_alarm_rate={false_alarm_rate:g}{with_confidence} needs {needed} {what} for "
        f"calibration, got {n}; {reachable}. Fit on more images, ask for a higher rate, or set "
        "threshold_ yourself."
    )
