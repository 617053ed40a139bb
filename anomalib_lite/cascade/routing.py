"""Gate probabilities and heatmap scores -> routes, and one score in [0, 1].

The decisions of a cascade as arithmetic on arrays: no images, no networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

from anomalib_lite._validation import check_number
from anomalib_lite.errors import InvalidTypeError, InvalidValueError

__all__ = [
    "ROUTES",
    "Routing",
    "anomaly_shortfall",
    "calibrate_routing",
    "check_threshold_lists",
    "check_thresholds",
    "choose_t_low",
    "leaves_false_alarms",
    "max_losses",
    "min_anomalies",
    "rate_shortfall",
]

_WHERE = "GatedCascade"
ROUTES = ("gate_normal", "gate_anomalous", "detector")
_ABOVE_HALF = np.nextafter(np.float32(0.5), np.float32(1))
# Confidence of the bound on missed anomalies.
CONFIDENCE = 0.95
# Share of the allowed false alarms that the gate may make by itself. The gate is good at images
# unlike any seen before, the heatmap model at small defects, so both get some.
_GATE_SHARE = 0.5


def check_thresholds(t_low: Any, t_high: Any) -> None:
    """Raise unless 0 <= t_low <= t_high <= 1, where None is not checked."""
    for name, value in (("t_low", t_low), ("t_high", t_high)):
        if value is not None:
            check_number(name, value, _WHERE, "[0, 1]")
    if t_low is not None and t_high is not None and t_low > t_high:
        raise InvalidValueError(
            f"{_WHERE}: t_low must not exceed t_high, got {t_low!r} and {t_high!r}: below t_low "
            "the gate says normal, above t_high anomalous."
        )


def check_threshold_lists(t_low: Any, t_high: Any) -> tuple[list[float] | None, list[float] | None]:
    """Validate the thresholds of a sweep and return them as lists; None means: choose them."""
    return _threshold_list(t_low), _threshold_list(t_high)


def _threshold_list(values: Any) -> list[float] | None:
    if values is None:
        return None
    if not np.iterable(values) or isinstance(values, str):
        raise InvalidTypeError(
            f"{_WHERE}: t_low and t_high of a sweep must be lists of numbers or None, got "
            f"{values!r}."
        )
    found = list(values)
    for value in found:
        if value is None:
            raise InvalidTypeError(f"{_WHERE}: t_low and t_high of a sweep must not hold None.")
        check_thresholds(value, value)
    return found


@dataclass(frozen=True)
class Routing:
    """Thresholds of a cascade: which model decides about an image, and the score that follows.

    Attributes
    ----------
    t_low, t_high : float
        Thresholds of the gate's probability, in [0, 1].
    threshold : float
        Threshold of the heatmap model's score, in its units.
    scale : float
        Typical distance of an anomaly's score from the threshold, in the same units, above 0.

    Notes
    -----
    With the gate's probability p, the heatmap model's score s and :math:`z = (s - \\tau) / c`,
    and c the ``scale``, the score of an image is

    .. math::
        p / (4 t_{low}) & \\quad p < t_{low} \\text{: in } [0, 1/4) \\\\
        1/2 + z / (4 + 4 |z|) & \\quad \\text{between: in } (1/4, 3/4) \\\\
        1 - (1 - p) / (4 - 4 t_{high}) & \\quad p > t_{high} \\text{: in } (3/4, 1]

    It exceeds 1/2 exactly if the image is called anomalous. It grows with the value that decided:
    p on the gate's routes, s between. Scores of images that the gate decided lie below or above
    all scores of images that the heatmap model decided.

    Examples
    --------
    >>> import numpy as np
    >>> routing = Routing(t_low=0.2, t_high=0.9, threshold=10.0, scale=2.0)
    >>> p, s = np.array([0.1, 0.5, 0.5, 0.95]), np.array([99.0, 8.0, 12.0, 0.0])
    >>> routing.routes(p).tolist()
    ['gate_normal', 'detector', 'detector', 'gate_anomalous']
    >>> routing.scores(p, s).tolist()
    [0.125, 0.375, 0.625, 0.875]
    """

    t_low: float
    t_high: float
    threshold: float
    scale: float

    def routes(self, probabilities: np.ndarray) -> np.ndarray:
        """Return routes (N,) out of :data:`ROUTES`; ``"skipped"`` where the probability is NaN."""
        routes = np.full(len(probabilities), "detector", dtype="<U14")
        routes[probabilities < self.t_low] = "gate_normal"
        routes[probabilities > self.t_high] = "gate_anomalous"
        routes[np.isnan(probabilities)] = "skipped"
        return routes

    def scores(self, probabilities: np.ndarray, detector_scores: np.ndarray) -> np.ndarray:
        """Return scores (N,), float32; ``detector_scores`` count on the route "detector" alone."""
        p = np.asarray(probabilities, np.float64)
        z = (np.asarray(detector_scores, np.float64) - self.threshold) / self.scale
        scores = 0.5 + z / (4 + 4 * np.abs(z))
        low, high = p < self.t_low, p > self.t_high
        scores[low] = p[low] / (4 * self.t_low)
        scores[high] = 1 - (1 - p[high]) / (4 - 4 * self.t_high)
        scores[np.isnan(p)] = np.nan
        rounded = scores.astype(np.float32)
        # A score that exceeds 1/2 must do so in float32 too.
        return np.asarray(np.where(scores > 0.5, np.maximum(rounded, _ABOVE_HALF), rounded))


def min_anomalies(max_missed: float) -> int:
    r"""Return the least number of held-back anomalies that can show a share of ``max_missed``.

    Parameters
    ----------
    max_missed : float
        Share of anomalies that the gate may miss, in (0, 1).

    Returns
    -------
    int
        The least n for which n anomalies, none of them missed, bound the share with 95 %
        confidence: :math:`(1 - q)^n \le 0.05`.

    Examples
    --------
    >>> min_anomalies(0.01), min_anomalies(0.1)
    (299, 29)
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-max_missed) - 1e-9)


def max_losses(n: int, max_missed: float) -> int:
    r"""Return how many of n held-back anomalies may be missed, if ``max_missed`` is to be shown.

    Returns
    -------
    int
        The largest k for which :math:`P(B(n, q) \le k) \le 0.05` (Clopper and Pearson); -1 if n
        is too small even for k = 0.

    Examples
    --------
    >>> max_losses(298, 0.01), max_losses(299, 0.01), max_losses(1196, 0.01)
    (-1, 0, 6)
    """
    as_few = binom.cdf(np.arange(n), n, max_missed) <= 1 - CONFIDENCE + 1e-12
    return int(np.count_nonzero(as_few)) - 1


def calibrate_routing(
    probabilities: np.ndarray,
    detector_scores: np.ndarray,
    false_alarm_rate: float,
    *,
    t_low: float = 0.0,
    t_high: float | None = None,
) -> Routing:
    r"""Choose thresholds with which the cascade as a whole keeps ``false_alarm_rate``.

    Parameters
    ----------
    probabilities, detector_scores : arrays of shape (n,)
        The gate's probabilities and the heatmap model's scores of normal images that neither
        learned from.
    false_alarm_rate : float
        Share of future normal images that may be called anomalous, in (0, 1).
    t_low : float, default=0
        The gate's lower threshold; it may depend on the same images.
    t_high : float, optional
        The gate's upper threshold. By default chosen here, and at least ``t_low``.

    Returns
    -------
    Routing
        It does not keep the rate if there are too few images for it, or if the given ``t_high``
        alone makes all of the allowed false alarms: :func:`rate_shortfall` says so.

    Notes
    -----
    Of n + 1 exchangeable normal images, :math:`a = \lfloor (n + 1) \alpha \rfloor` may be
    called anomalous. The gate gets :math:`a_g = \lfloor a / 2 \rfloor` of them: ``t_high`` is
    the :math:`a_g`-th largest probability, or 1 where it gets none. The threshold is the
    :math:`(a - a_g)`-th largest score among the images that are not above ``t_high``.

    Why the rate holds: judge each of the n + 1 images by the thresholds computed from the n
    others. Only the :math:`a_g` images with the largest probabilities can exceed their
    ``t_high``. For every other image, the set of images above ``t_high`` is the same one, so at
    most :math:`a - a_g` of them have a score above their threshold. So at most a of the n + 1
    images are called anomalous, and a future normal image is, with a probability of at most
    :math:`a / (n + 1) \le \alpha`, as in
    :func:`~anomalib_lite.calibration.conformal_threshold`. Normal images below
    ``t_low`` can only lower that rate, so ``t_low`` may depend on the same images.

    The threshold is at least the median score of all n images. Otherwise, if almost all normal
    images are above ``t_high``, the few that are left would set a much too low threshold.

    Examples
    --------
    >>> p, s = np.arange(99) / 100, np.arange(99.0)[::-1]
    >>> calibrate_routing(p, s, 0.1, t_low=0.3)
    Routing(t_low=0.3, t_high=0.94, threshold=94.0, scale=45.0)
    """
    p, s = np.asarray(probabilities, np.float64), np.asarray(detector_scores, np.float64)
    allowed = _allowed(len(p), false_alarm_rate)
    if t_high is None:
        by_gate = int(_GATE_SHARE * allowed)
        t_high = max(t_low, float(np.sort(p)[-by_gate])) if by_gate else 1.0
    else:
        by_gate = int(np.count_nonzero(p > t_high))
    median = float(np.median(s))
    seen = np.sort(np.where(p <= t_high, s, -np.inf))
    threshold = max(float(seen[-max(1, allowed - by_gate)]), median)
    # From a typical score to the threshold; if both are equal, any scale above 0 will do.
    scale = (threshold - median) or abs(threshold) or 1.0
    return Routing(float(t_low), float(t_high), threshold, scale)


def rate_shortfall(probabilities: np.ndarray, false_alarm_rate: float, t_high: float) -> str | None:
    """Say why a routing cannot keep ``false_alarm_rate``; None if it can.

    Parameters
    ----------
    probabilities : array of shape (n,)
        The gate's probabilities of the images that :func:`calibrate_routing` was given.
    false_alarm_rate : float
        Rate that it was given.
    t_high : float
        Threshold that it chose, or was given.

    Returns
    -------
    str or None
        Text of a warning.

    Examples
    --------
    >>> p = np.arange(99) / 100
    >>> rate_shortfall(p, 0.1, 0.9) is None
    True
    >>> rate_shortfall(p, 0.001, 1.0)[:59]
    'false_alarm_rate=0.001 needs 999 normal images, got 99; the'
    """
    n, by_gate = len(probabilities), int(np.count_nonzero(np.asarray(probabilities) > t_high))
    if by_gate < _allowed(n, false_alarm_rate):
        return None
    reason = f"needs {math.ceil(1 / false_alarm_rate - 1 - 1e-9)} normal images, got {n}"
    if by_gate:
        reason = (
            f"is spent by t_high alone, above which {by_gate} of {n} held-back normal images lie"
        )
    return (
        f"false_alarm_rate={false_alarm_rate:g} {reason}; the heatmap model's threshold is the "
        f"largest of their scores, and the rate {(by_gate + 1) / (n + 1):.3g} at best. Fit on "
        "more images, ask for a higher rate, or set a higher t_high."
    )


def leaves_false_alarms(probabilities: np.ndarray, false_alarm_rate: float, t_high: float) -> bool:
    """Tell whether ``t_high`` leaves the heatmap model some of the allowed false alarms.

    ``probabilities`` (n,) are the gate's probabilities of the held-back normal images. If they are
    too few to allow one false alarm, return whether the gate makes none.

    Examples
    --------
    >>> p = np.arange(99) / 100
    >>> leaves_false_alarms(p, 0.1, 0.9), leaves_false_alarms(p, 0.1, 0.5)
    (True, False)
    """
    by_gate = int(np.count_nonzero(np.asarray(probabilities) > t_high))
    return by_gate < max(1, _allowed(len(probabilities), false_alarm_rate))


def _allowed(n: int, false_alarm_rate: float) -> int:
    """Return how many of n + 1 normal images may be called anomalous."""
    return math.floor((n + 1) * false_alarm_rate + 1e-9)


def choose_t_low(
    probabilities: np.ndarray, detector_scores: np.ndarray, routing: Routing, max_missed: float
) -> float:
    """Choose the largest ``t_low`` with which the gate misses at most a share ``max_missed``.

    The gate misses an anomaly if it calls it normal and the heatmap model would have called it
    anomalous. An anomaly that neither of them finds does not count.

    Parameters
    ----------
    probabilities, detector_scores : arrays of shape (n,)
        The gate's probabilities and the heatmap model's scores of anomalies that neither learned
        from. A score of NaN (the heatmap model was not run) counts as found.
    routing : Routing
        Holds the heatmap model's threshold, and ``t_high``, which ``t_low`` does not exceed.
    max_missed : float
        Share of anomalies that the gate may miss, in (0, 1).

    Returns
    -------
    float
        0 if there are too few anomalies to show the share. Then the gate calls no image normal,
        and :func:`anomaly_shortfall` says so.

    Notes
    -----
    Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the
    binomial", Biometrika 1934: of n anomalies, k may be missed, the largest k that still bounds
    the share below ``max_missed``. The (k + 1)-th smallest probability of those that the heatmap
    model finds is returned, or the largest of all if it finds no more than k. Over the draw of the
    n anomalies, the gate misses more than that share in at most 5 % of all cases, for any
    distribution.

    Examples
    --------
    >>> import numpy as np
    >>> routing = Routing(t_low=0.0, t_high=1.0, threshold=3.0, scale=1.0)
    >>> p = 0.1 + 0.01 * np.arange(46)
    >>> choose_t_low(p, np.full(46, 5.0), routing, 0.1)  # of 46, one may be missed
    0.11
    >>> choose_t_low(p, np.repeat([1.0, 5.0], [16, 30]), routing, 0.1)  # 16 no model finds
    0.27
    """
    p, s = np.asarray(probabilities, np.float64), np.asarray(detector_scores, np.float64)
    if len(p) < min_anomalies(max_missed):
        return 0.0
    allowed = max_losses(len(p), max_missed)
    found = np.sort(p[~(s <= routing.threshold)])
    t_low = found[allowed] if len(found) > allowed else p.max()
    return float(min(t_low, routing.t_high))


def anomaly_shortfall(n: int, max_missed: float) -> str | None:
    """Say that n held-back anomalies are too few for ``max_missed``; None if they are enough.

    Examples
    --------
    >>> anomaly_shortfall(299, 0.01) is None
    True
    >>> anomaly_shortfall(9, 0.01)[:57]
    'max_missed=0.01 needs 299 held-back anomalies to be shown'
    """
    needed = min_anomalies(max_missed)
    if n >= needed:
        return None
    return (
        f"max_missed={max_missed:g} needs {needed} held-back anomalies to be shown, got {n}; t_low "
        "is 0, so the gate calls no image normal. Raise max_missed, or set t_low."
    )
