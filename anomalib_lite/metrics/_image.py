"""Image metrics: labels and scores in, floats out.

Every metric only compares scores with each other, so raw scores go in as they are: they are not
normalized and not clipped. All metrics are exact. There is no grid of thresholds: the scores of the
normal images are sorted once, and each anomalous score is looked up in them.

A metric that is undefined because one class is missing is ``nan``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from anomalib_lite._validation import check_number
from anomalib_lite.metrics._ranking import (
    area,
    best_f1,
    mean_precision,
    n_at_least,
    split_images,
)

__all__ = ["auroc", "average_precision", "f1_max", "fpr_at_tpr", "rate"]


def auroc(y_true: npt.ArrayLike, y_score: npt.ArrayLike) -> float:
    r"""Area under the receiver operating characteristic (ROC) curve.

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
    :math:`\sum_n (R_n - R_{n-1}) P_n` over the thresholds :math:`n`: a step function without
    interpolation, in which equal scores make one step, as in
    :func:`sklearn.metrics.average_precision_score`. It equals the mean, over the anomalous images,
    of the precision at the image's own score. One point differs from scikit-learn: with no normal
    image the result is ``nan``, not 1.

    Examples
    --------
    >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.8333
    """
    negatives, positives = split_images(y_true, y_score, "average_precision")
    return mean_precision(negatives, positives)


def f1_max(y_true: npt.ArrayLike, y_score: npt.ArrayLike) -> float:
    r"""Largest F1 score over all thresholds.

    The threshold is chosen with the test labels, so this is an upper bound that says how separable
    the scores are. A deployed detector does not reach it.

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
    maximum lies at an anomalous score, and only these are tried.

    Examples
    --------
    >>> f1_max([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.8
    """
    negatives, positives = split_images(y_true, y_score, "f1_max")
    return best_f1(negatives, positives)


def fpr_at_tpr(y_true: npt.ArrayLike, y_score: npt.ArrayLike, tpr: float = 0.95) -> float:
    """False-alarm rate at the highest threshold that detects a share ``tpr`` of the anomalies.

    Parameters
    ----------
    y_true, y_score : array-like of shape (N,)
        Labels (1 is anomalous) and scores (higher is more anomalous), as for :func:`auroc`.
    tpr : float, default=0.95
        Share of the anomalous images that must be detected, in (0, 1].

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
    An image is detected if its score is at least the threshold. There is no interpolation between
    thresholds: the value is one that a threshold really reaches.

    Examples
    --------
    >>> fpr_at_tpr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], tpr=1.0)
    0.5
    """
    tpr = check_number("tpr", tpr, "fpr_at_tpr", "(0, 1]")
    negatives, positives = split_images(y_true, y_score, "fpr_at_tpr")
    if not negatives.size or not positives.size:
        return float("nan")
    # The smallest k with k / n >= tpr. ceil(tpr * n) would be 1 too large where the product is
    # rounded up, as in 0.55 * 100.
    reached = np.arange(1, positives.size + 1) / positives.size
    k = int(np.searchsorted(reached, tpr, side="left")) + 1
    threshold = positives[positives.size - k]
    return float(n_at_least(negatives, threshold) / negatives.size)


def rate(decisions: npt.ArrayLike) -> float:
    """Share of decisions that are True, such as a false-alarm rate or a recall.

    Parameters
    ----------
    decisions : array-like of shape (N,), bool

    Returns
    -------
    float
        In [0, 1]. ``nan`` if there is no decision.

    Examples
    --------
    >>> rate([True, False, False, False])
    0.25
    """
    array = np.asarray(decisions)
    return float(array.mean()) if array.size else float("nan")
