"""The threshold: exact ranks, and the false-alarm rate that it promises."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest

from anomalib_lite.calibration import calibration_size, conformal_threshold
from anomalib_lite.errors import CalibrationWarning, InvalidValueError

RATES = ["0.001", "0.01", "0.02", "0.03", "0.05", "0.07", "0.1", "0.15", "0.2", "0.3", "0.5", "0.9"]


def exact_rank(n: int, rate: str) -> int:
    """k = ceil((n + 1) (1 - rate)), in exact arithmetic."""
    return math.ceil((n + 1) * (1 - Fraction(rate)))


@pytest.mark.parametrize("rate", RATES)
def test_size_is_the_least_that_can_promise_the_rate(rate: str) -> None:
    size = calibration_size(float(rate))
    assert exact_rank(size, rate) <= size
    assert size == 1 or exact_rank(size - 1, rate) > size - 1


@pytest.mark.parametrize("rate", RATES)
def test_the_threshold_is_the_score_of_the_exact_rank(rate: str) -> None:
    rng = np.random.default_rng(0)
    least = calibration_size(float(rate))
    for n in {least, least + 1, *range(least, least + 300, 7), 1000 + least}:
        ranks = rng.permutation(n) + 1  # the score of each image is its rank
        assert conformal_threshold(ranks, float(rate)) == exact_rank(n, rate)


def test_scores_come_in_any_order_and_type() -> None:
    scores = np.random.default_rng(0).normal(size=200)
    expected = conformal_threshold(scores, 0.1)
    assert expected == float(np.sort(scores.astype(np.float32))[exact_rank(200, "0.1") - 1])
    assert conformal_threshold(scores[::-1], 0.1) == expected
    assert conformal_threshold(scores.astype(np.float32), 0.1) == expected
    assert conformal_threshold(scores.tolist(), 0.1) == expected
    assert isinstance(expected, float)


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (30, 0.07), (50, 0.1), (99, 0.01), (40, 0.3)])
def test_false_alarms_stay_below_the_rate_and_near_it(n: int, rate: float) -> None:
    """A new score exceeds the k-th of n with probability 1 - k / (n + 1), whatever their law."""
    rng = np.random.default_rng(n)
    n_draws = 4000
    scores = rng.gamma(2.0, size=(n_draws, n + 1)).astype(np.float32)  # skewed, as distances are
    alarms = sum(conformal_threshold(row[:-1], rate) < row[-1] for row in scores)
    expected = 1 - exact_rank(n, str(rate)) / (n + 1)
    assert rate - 1 / (n + 1) < expected <= rate + 1e-9
    error = math.sqrt(expected * (1 - expected) / n_draws)
    assert abs(alarms / n_draws - expected) < 4 * error


def test_ties_only_lower_the_rate() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (4000, 31)).astype(np.float32)
    alarms = sum(conformal_threshold(row[:-1], 0.1) < row[-1] for row in scores)
    assert alarms / 4000 <= 0.1 + 4 * math.sqrt(0.09 / 4000)


@pytest.mark.parametrize(("n", "rate", "needed"), [(98, 0.01, 99), (10, 0.05, 19), (1, 0.3, 3)])
def test_too_few_scores_warn_with_what_is_needed_and_reachable(
    n: int, rate: float, needed: int
) -> None:
    scores = np.random.default_rng(0).normal(size=n).astype(np.float32)
    message = rf"{rate:g} needs {needed} normal images.*got {n};.*guarantees {1 / (n + 1):.3g}"
    with pytest.warns(CalibrationWarning, match=message):
        assert conformal_threshold(scores, rate) == scores.max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conformal_threshold(np.arange(needed), rate)  # enough: silent


def test_no_score_at_all_gives_an_infinite_threshold() -> None:
    with pytest.warns(CalibrationWarning, match=r"got 0; threshold_ is infinite.*set threshold_"):
        assert conformal_threshold(np.empty(0, np.float32), 0.01) == math.inf


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan, math.inf, "0.01", None, True])
def test_rates_outside_of_0_and_1_are_refused(rate: object) -> None:
    with pytest.raises(InvalidValueError, match=r"false_alarm_rate must be .*\(0, 1\).*got"):
        conformal_threshold(np.arange(100), rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InvalidValueError, match="must be finite"):
        conformal_threshold(np.array([1.0, bad, *range(100)]), 0.1)
