"""Bootstrap intervals and the paired test: their level over many data sets, and their power."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import binom, norm, rankdata
from sklearn.metrics import roc_auc_score

from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.metrics import (
    auroc,
    average_precision,
    bootstrap_interval,
    f1_max,
    fpr_at_tpr,
    paired_test,
)


def draw(seed: int, *, shift: float = 1.2, n: tuple[int, int] = (50, 50)):
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1], n)
    return y, rng.normal(size=y.size) + shift * y


def two_detectors(seed: int, gains: tuple[float, float], n: int = 40):
    """Return labels, and scores of two detectors that share half of their noise."""
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1], n)
    shared = rng.normal(size=y.size)
    a, b = (gain * y + shared + rng.normal(size=y.size) for gain in gains)
    return y, a, np.exp(b)  # another scale: only the order counts


@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max, partial(fpr_at_tpr, tpr=0.9)])
def test_the_interval_holds_the_value_and_grows_with_the_confidence(metric) -> None:
    y, scores = draw(0)
    value = metric(y, scores)
    narrow = bootstrap_interval(metric, y, scores, confidence=0.5, n_resamples=300, random_state=1)
    wide = bootstrap_interval(metric, y, scores, confidence=0.99, n_resamples=300, random_state=1)
    assert 0 <= wide[0] < narrow[0] < narrow[1] < wide[1] <= 1
    assert wide[0] < value < wide[1]


def test_the_interval_covers_the_true_value_about_as_often_as_asked() -> None:
    true_value = norm.cdf(1.2 / math.sqrt(2))  # AUROC of two normal distributions
    covered = 0
    for seed in range(300):
        low, high = bootstrap_interval(auroc, *draw(seed), n_resamples=150, random_state=seed)
        covered += low <= true_value <= high
    # The percentile method is a little narrow; 0.90 and 0.99 are far outside 300 draws at 0.945.
    assert 0.90 < covered / 300 < 0.99


def test_more_images_make_it_narrower() -> None:
    def width(n: int) -> float:
        y, scores = draw(3, n=(n, n))
        low, high = bootstrap_interval(auroc, y, scores, n_resamples=200, random_state=0)
        return high - low

    assert width(1600) < width(100) / 2  # 16 times the images: about a quarter


def test_each_class_is_drawn_on_its_own() -> None:
    counts = set()

    def count(y, scores) -> float:
        counts.add((int((y == 0).sum()), int((y == 1).sum())))
        assert set(scores[y == 1]) <= {8, 9}
        return float(scores[y == 1].sum())

    bootstrap_interval(count, [0, 1, 0, 1, 0], [1, 8, 2, 9, 3], n_resamples=50, random_state=0)
    assert counts == {(3, 2)}


def test_same_seed_same_result() -> None:
    y, a, b = two_detectors(0, (1.0, 0.6))
    assert bootstrap_interval(auroc, y, a, n_resamples=50, random_state=4) == bootstrap_interval(
        auroc, y, a, n_resamples=50, random_state=4
    )
    first = paired_test(auroc, y, a, b, n_resamples=50, random_state=4)
    assert first == paired_test(auroc, y, a, b, n_resamples=50, random_state=4)


def test_perfect_scores_leave_no_width() -> None:
    interval = bootstrap_interval(auroc, [0, 0, 1, 1], [1, 2, 3, 4], n_resamples=20, random_state=0)
    assert interval == (1.0, 1.0)


def test_the_difference_is_that_of_the_metric() -> None:
    y, a, b = two_detectors(2, (2.0, 0.7))
    expected = roc_auc_score(y, a) - roc_auc_score(y, b)
    forth = paired_test(auroc, y, a, b, n_resamples=99, random_state=0)
    back = paired_test(auroc, y, b, a, n_resamples=99, random_state=0)
    assert forth.difference == pytest.approx(expected, abs=1e-12)
    assert back.difference == pytest.approx(-expected, abs=1e-12)
    assert forth.p_value == back.p_value


def test_the_p_value_is_that_of_all_permutations() -> None:
    """With 9 images all 512 exchanges can be listed; 4,000 draws come near their share."""
    rng = np.random.default_rng(5)
    y = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    a, b = rng.normal(size=9) + 1.5 * y, rng.normal(size=9)
    ra, rb = rankdata(a), rankdata(b)
    observed = abs(roc_auc_score(y, a) - roc_auc_score(y, b))
    n_as_large = 0
    for swap in itertools.product([False, True], repeat=9):
        drawn = roc_auc_score(y, np.where(swap, rb, ra)) - roc_auc_score(y, np.where(swap, ra, rb))
        n_as_large += abs(drawn) >= observed - 1e-12
    p_value = paired_test(auroc, y, a, b, n_resamples=4000, random_state=0).p_value
    assert p_value == pytest.approx(n_as_large / 512, abs=0.04)  # 5 standard errors or more


@pytest.mark.parametrize("metric", [auroc, average_precision])
def test_the_level_holds_for_equal_detectors(metric) -> None:
    p_values = np.array(
        [
            paired_test(metric, *two_detectors(seed, (1.0, 1.0)), n_resamples=99, random_state=seed)
            for seed in range(300)
        ]
    )[:, 1]
    for level in (0.05, 0.2):
        rejected = int((p_values <= level).sum())
        low, high = binom.interval(0.9999, 300, level)
        assert low <= rejected <= high


def test_it_finds_a_detector_that_is_better() -> None:
    found = [
        paired_test(
            auroc, *two_detectors(seed, (2.2, 0.8)), n_resamples=99, random_state=seed
        ).p_value
        for seed in range(30)
    ]
    assert np.mean(np.array(found) <= 0.05) > 0.8
    y, a, _ = two_detectors(0, (1.0, 1.0))
    assert paired_test(auroc, y, a, 1000 * a, n_resamples=99, random_state=0) == (0.0, 1.0)


@pytest.mark.parametrize("y", [[0, 0, 0], [1, 1, 1]])
def test_is_nan_without_one_class(y) -> None:
    scores = [1, 2, 3]
    assert all(math.isnan(v) for v in bootstrap_interval(auroc, y, scores))
    assert all(math.isnan(v) for v in paired_test(auroc, y, scores, scores))


def test_a_metric_that_is_nan_proves_no_difference() -> None:
    y, a, b = two_detectors(0, (2.2, 0.8))

    def undefined(y_true, y_score) -> float:
        return float("nan")

    assert all(math.isnan(value) for value in paired_test(undefined, y, a, b, n_resamples=9))

    own = (rankdata(a), rankdata(b))

    def only_of_the_two(y_true, y_score) -> float:
        """NaN for exchanged scores, as a metric may be at the edge of what it is defined for."""
        known = any(np.array_equal(y_score, ranks) for ranks in own)
        return auroc(y_true, y_score) if known else float("nan")

    found = paired_test(only_of_the_two, y, a, b, n_resamples=19, random_state=0)
    assert found.difference > 0
    assert found.p_value == 1.0


def test_refuses_wrong_input() -> None:
    y, scores = [0, 1, 1], [1, 2, 3]
    with pytest.raises(InvalidTypeError, match="bootstrap_interval: metric must be a function"):
        bootstrap_interval("auroc", y, scores)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match=r"confidence must be a number in \(0, 1\)"):
        bootstrap_interval(auroc, y, scores, confidence=95)
    with pytest.raises(InvalidValueError, match="n_resamples must be a whole number"):
        paired_test(auroc, y, scores, scores, n_resamples=0)
    with pytest.raises(InvalidValueError, match="random_state must be a whole number"):
        paired_test(auroc, y, scores, scores, random_state="x")
    with pytest.raises(InvalidValueError, match=r"y_true and scores_b must both have shape \(N,\)"):
        paired_test(auroc, y, scores, [1, 2])
    with pytest.raises(InvalidValueError, match="scores_a must not be NaN, got NaN at index 1"):
        paired_test(auroc, y, [1, np.nan, 3], scores)
