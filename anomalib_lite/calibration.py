"""Scores of normal images -> a threshold with a known false-alarm rate."""

from __future__ import annotations

import math
import warnings

import numpy as np

from anomalib_lite._validation import check_number
from anomalib_lite.errors import CalibrationWarning, InvalidValueError

__all__ = ["calibration_size", "conformal_threshold", "threshold_and_shortfall"]


def conformal_threshold(scores: np.ndarray, false_alarm_rate: float) -> float:
    r"""Compute the threshold that at most ``false_alarm_rate`` of future normal images exceed.

    Parameters
    ----------
    scores : array of shape (n,)
        Scores of normal images that the detector was *not* fitted on.
    false_alarm_rate : float
        The rate to guarantee, in (0, 1).

    Returns
    -------
    float
        Score above which an image is called anomalous. Without any scores it is infinite, so that
        nothing is called anomalous.

    Raises
    ------
    InvalidValueError
        For a rate outside (0, 1), or scores that are not finite.

    Warns
    -----
    CalibrationWarning
        If there are fewer than ``1 / false_alarm_rate - 1`` scores: no finite threshold can
        guarantee the rate then. The largest score is returned, which guarantees ``1 / (n + 1)``.

    Notes
    -----
    Split-conformal calibration [1]_: with :math:`k = \lceil (n + 1)(1 - \alpha) \rceil` the
    score of a further normal image exceeds the k-th smallest of the n scores with probability
    at most :math:`\alpha`, for any distribution, if that image and the n are exchangeable (same
    line, same camera, same lighting). This is an average over draws of the n images. For one draw
    the rate is distributed as Beta(n + 1 - k, k) (if no scores are equal), so with n = 99 and
    :math:`\alpha` = 1 % it has mean 1 %, and lies below 3 % in 95 % of all draws.

    References
    ----------
    .. [1] Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", Springer 2005;
       Angelopoulos and Bates, "A Gentle Introduction to Conformal Prediction", 2021.

    Examples
    --------
    >>> conformal_threshold(range(1, 100), 0.01)
    99.0
    >>> conformal_threshold(range(1, 100), 0.1)
    90.0
    """
    threshold, shortfall = threshold_and_shortfall(scores, false_alarm_rate)
    if shortfall is not None:
        warnings.warn(shortfall, CalibrationWarning, stacklevel=2)
    return threshold


def threshold_and_shortfall(
    scores: np.ndarray, false_alarm_rate: float
) -> tuple[float, str | None]:
    """Return what :func:`conformal_threshold` returns, and what it warns of, without warning.

    A caller that is deep in the library gives the warning itself, at the user's line.
    """
    where = "conformal_threshold"
    check_number("false_alarm_rate", false_alarm_rate, where, "(0, 1)")
    ordered = np.sort(np.asarray(list(scores), dtype=np.float32))
    n = len(ordered)
    if not np.isfinite(ordered).all():
        raise InvalidValueError(f"{where}: scores must be finite, got NaN or infinity.")
    if n < calibration_size(false_alarm_rate):
        return float(ordered[-1]) if n else math.inf, _shortfall(n, false_alarm_rate)
    return float(ordered[_rank(n, false_alarm_rate) - 1]), None


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


def _rank(n: int, false_alarm_rate: float) -> int:
    """Return k, the rank of the threshold among n scores."""
    return math.ceil((n + 1) * (1 - false_alarm_rate) - 1e-9)


def _shortfall(n: int, false_alarm_rate: float) -> str:
    needed = calibration_size(false_alarm_rate)
    reachable = (
        f"threshold_ is the largest of their scores, which guarantees {1 / (n + 1):.3g} at best"
        if n
        else "threshold_ is infinite: nothing will be called anomalous until you set it"
    )
    return (
        f"false_alarm_rate={false_alarm_rate:g} needs {needed} normal images for calibration, got "
        f"{n}; {reachable}. Fit on more images, ask for a higher rate, or set threshold_ yourself."
    )
