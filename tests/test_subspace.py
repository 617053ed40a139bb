"""Subspace from running moments against scikit-learn's PCA and a reference by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.utils.estimator_checks import parametrize_with_checks

from anomalib_lite.errors import InvalidTypeError, InvalidValueError, NotFittedError
from anomalib_lite.gaussian import Moments
from anomalib_lite.subspace import Subspace


def rows(n: int, d: int, seed: int = 0, decay: float = 0.8) -> np.ndarray:
    """Return rows whose variance falls from direction to direction, away from the origin."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(99).normal(size=(d, d)))[0]
    return rng.normal(size=(n, d)) * decay ** np.arange(d) @ turn + np.linspace(-5, 5, d)


def naive(X: np.ndarray, Q: np.ndarray, k: int) -> np.ndarray:
    """Return the distances of Q from the span of k right singular vectors, by least squares."""
    mean = X.mean(axis=0)
    span = np.linalg.svd(X - mean)[2][:k].T
    return np.array(
        [np.linalg.norm(q - span @ np.linalg.lstsq(span, q, rcond=None)[0]) for q in Q - mean]
    )


@parametrize_with_checks([Subspace(), Subspace(0.5), Subspace(1)])
def test_passes_the_checks_of_scikit_learn(estimator: object, check: object) -> None:
    check(estimator)  # type: ignore[operator]


@pytest.mark.parametrize(("n", "d"), [(900, 30), (40, 100), (7, 3)])
@pytest.mark.parametrize("n_components", [0.5, 0.9, 0.99, 1, 2])
def test_the_fit_is_that_of_scikit_learn(n: int, d: int, n_components: float) -> None:
    X, Q = rows(n, d), rows(20, d, 1)
    ours = Subspace(n_components).fit(X)
    theirs = PCA(n_components, svd_solver="full").fit(X)
    assert ours.n_components_ == theirs.n_components_ == len(ours.components_)
    assert ours.n_samples_seen_ == n
    np.testing.assert_allclose(ours.mean_, theirs.mean_, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=1e-8)
    ratios = theirs.explained_variance_ratio_
    np.testing.assert_allclose(ours.explained_variance_ratio_, ratios, rtol=1e-8)
    alike = np.abs((ours.components_ * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(alike, 1, rtol=1e-9)
    k = ours.n_components_
    np.testing.assert_allclose(ours.residual(Q), naive(X, Q, k), rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(ours.residual(Q), np.sqrt(ours.sq_residual(Q)))


def test_signs_do_not_depend_on_the_solver() -> None:
    components = Subspace(5).fit(rows(60, 12)).components_
    assert (components[range(5), np.abs(components).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(components @ components.T, np.eye(5), atol=1e-12)


@pytest.mark.parametrize("n_components", [0.95, 3])
@pytest.mark.parametrize("cuts", [[1], [30, 31, 290], [2, 150]])
def test_blocks_of_rows_do_not_change_the_fit(n_components: float, cuts: list[int]) -> None:
    X, Q = rows(300, 12), rows(9, 12, 1)
    whole, bit = Subspace(n_components).fit(X), Subspace(n_components)
    for part in np.split(X, cuts):
        assert bit.partial_fit(part) is bit
    np.testing.assert_allclose(bit.residual(Q), whole.residual(Q), rtol=1e-9)
    np.testing.assert_allclose(bit.components_, whole.components_, atol=1e-9)
    assert bit.n_samples_seen_ == 300


def test_a_subspace_that_holds_all_is_found_with_few_rows() -> None:
    rng = np.random.default_rng(0)
    span = rng.normal(size=(3, 200))
    X, Q = rng.normal(size=(12, 3)) @ span, rng.normal(size=(5, 3)) @ span
    across = np.linalg.svd(span)[2][-1]
    subspace = Subspace(0.999999).fit(X)
    assert subspace.n_components_ == 3
    np.testing.assert_allclose(subspace.residual(Q), 0, atol=1e-6)
    np.testing.assert_allclose(subspace.residual(Q + 0.25 * across), 0.25, rtol=1e-6)


@pytest.mark.parametrize("k", [2, 20])  # either way of computing
def test_a_centre_far_away_costs_no_digits(k: int) -> None:
    X, Q = rows(500, 24), rows(9, 24, 1)
    near = Subspace(k).fit(X).residual(Q)
    far = Subspace(k).fit(X + 1e6).residual(Q + 1e6)
    np.testing.assert_allclose(far, near, rtol=1e-6)


@pytest.mark.parametrize("k", [2, 20])
def test_a_small_residual_of_a_long_vector_is_seen(k: int) -> None:
    X = rows(500, 24, decay=0.5)
    subspace = Subspace(k).fit(X)
    axes = np.linalg.svd(X - X.mean(axis=0))[2]
    q = X.mean(axis=0) + 1e3 * axes[0] + 1e-6 * axes[-1]
    np.testing.assert_allclose(subspace.residual(q[None]), 1e-6, rtol=1e-3)


def test_equal_rows_have_no_direction() -> None:
    subspace = Subspace().fit(np.full((6, 3), 2.0))
    assert subspace.components_.shape == (0, 3)
    assert subspace.explained_variance_ratio_.shape == (0,)
    np.testing.assert_allclose(subspace.residual([[2, 2, 2], [2, 5, 6]]), [0, 5])


def test_moments_without_some_rows_are_a_fit_without_them() -> None:
    X, Q = rows(60, 8), rows(9, 8, 1)
    whole, some = Moments(8), Moments(8)
    whole.add(X)
    some.add(X[20:25])
    left = Subspace(3).fit_moments(whole.without(some))
    expected = Subspace(3).fit(np.delete(X, range(20, 25), axis=0))
    np.testing.assert_allclose(left.residual(Q), expected.residual(Q), rtol=1e-9)


def test_large_float32_arrays_are_not_copied_and_keep_their_precision() -> None:
    X = rows(100_000, 96, decay=0.9).astype(np.float32)
    X[:, 0] += 1000  # a mean far larger than the spread
    tracemalloc.start()
    subspace = Subspace(0.9).fit(X)
    distances = subspace.residual(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 8 * (1 << 22) + 2 * distances.nbytes + 20e6  # a few blocks of float64
    k = subspace.n_components_
    y = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)
    axes = np.linalg.eigh(y.T @ y)[1][:, : 96 - k]
    np.testing.assert_allclose(distances, np.linalg.norm(y @ axes, axis=1), rtol=1e-6)


def test_a_failed_fit_keeps_the_earlier_one() -> None:
    X = rows(50, 4)
    subspace = Subspace(2).fit(X)
    before = subspace.residual(X)
    with pytest.raises(InvalidValueError, match=r"n_components=2 is more than the 0 directions"):
        subspace.fit(np.ones((9, 4)))
    np.testing.assert_array_equal(subspace.residual(X), before)
    np.testing.assert_array_equal(clone(subspace).fit(X).residual(X), before)


def test_too_few_directions_raise_when_they_are_needed() -> None:
    subspace = Subspace(3).partial_fit(rows(2, 12))
    with pytest.raises(InvalidValueError, match="more than the 1 directions in which 2 rows of 12"):
        subspace.residual(rows(1, 12))
    assert np.isfinite(subspace.partial_fit(rows(30, 12, 1)).residual(rows(1, 12))).all()
    with pytest.raises(InvalidValueError, match="n_components=13 is more than the 12 directions"):
        Subspace(13).fit(rows(40, 12))


@pytest.mark.parametrize("n_components", [0, -1, 0.0, 1.0, 1.5, "all", None, True, float("nan")])
def test_invalid_components_are_refused(n_components: object) -> None:
    with pytest.raises(InvalidValueError, match=r"^Subspace: n_components must be .*got"):
        Subspace(n_components).fit(rows(9, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "X", [np.ones(4), np.ones((1, 4)), [[np.nan, 1], [2, 3]], [["a"], ["b"]], [[1e20], [2]]]
)
def test_invalid_rows_are_refused(X: object) -> None:
    with pytest.raises((InvalidValueError, InvalidTypeError), match=r"^Subspace: "):
        Subspace().fit(X)


def test_distances_need_a_fit() -> None:
    with pytest.raises(NotFittedError, match="Call fit"):
        Subspace().residual(rows(2, 2))
    assert not hasattr(Subspace(), "components_")
