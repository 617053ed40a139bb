"""Gaussians from running moments against scikit-learn, and the grid against PaDiM's paper."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.covariance import OAS, LedoitWolf, ShrunkCovariance
from sklearn.utils.estimator_checks import parametrize_with_checks

from anomalib_lite.errors import InvalidTypeError, InvalidValueError, NotFittedError
from anomalib_lite.gaussian import Gaussian, GaussianGrid, Moments


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Correlated rows of different ranges, away from the origin."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * rng.uniform(0.1, 3, d)
    return (mixed + rng.normal(scale=5, size=d)).astype(np.float32)


@parametrize_with_checks([Gaussian(), Gaussian("oas"), Gaussian(0.1)])
def test_passes_the_checks_of_scikit_learn(estimator: object, check: object) -> None:
    check(estimator)  # type: ignore[operator]


# --- One Gaussian ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(7, 3), (40, 100), (900, 30)])
@pytest.mark.parametrize(
    ("shrinkage", "theirs"),
    [("ledoit_wolf", LedoitWolf()), ("oas", OAS()), (0.2, ShrunkCovariance(shrinkage=0.2))],
)
def test_the_fit_is_that_of_scikit_learn(n: int, d: int, shrinkage: object, theirs: object) -> None:
    X, Q = rows(n, d), rows(20, d, 1)
    ours = Gaussian(shrinkage).fit(X)
    expected = clone(theirs).fit(X.astype(np.float64))
    np.testing.assert_allclose(ours.shrinkage_, getattr(expected, "shrinkage_", 0.2), rtol=1e-10)
    scale = np.abs(expected.covariance_).max()
    np.testing.assert_allclose(ours.covariance_, expected.covariance_, atol=1e-10 * scale)
    np.testing.assert_allclose(ours.location_, expected.location_, rtol=1e-9)
    squared = expected.mahalanobis(Q.astype(np.float64))
    np.testing.assert_allclose(ours.mahalanobis(Q) ** 2, squared, rtol=1e-7)
    identity = ours.precision_ @ ours.covariance_
    np.testing.assert_allclose(identity, np.eye(d), atol=1e-7)


def test_without_shrinkage_the_distance_is_the_textbook_one() -> None:
    X, Q = rows(200, 6).astype(np.float64), rows(9, 6, 1).astype(np.float64)
    precision = np.linalg.inv(np.cov(X.T, bias=True))
    expected = [np.sqrt((q - X.mean(0)) @ precision @ (q - X.mean(0))) for q in Q]
    np.testing.assert_allclose(Gaussian(0).fit(X).mahalanobis(Q), expected, rtol=1e-9)


@pytest.mark.parametrize("shrinkage", ["ledoit_wolf", "oas", 0.3])
@pytest.mark.parametrize("cuts", [[1], [30, 31, 290], [2, 150]])
def test_blocks_of_rows_do_not_change_the_fit(shrinkage: object, cuts: list[int]) -> None:
    X, Q = rows(300, 12), rows(9, 12, 1)
    whole, bit = Gaussian(shrinkage).fit(X), Gaussian(shrinkage)
    for part in np.split(X, cuts):
        bit.partial_fit(part)
    np.testing.assert_allclose(bit.shrinkage_, whole.shrinkage_, rtol=1e-9)
    np.testing.assert_allclose(bit.mahalanobis(Q), whole.mahalanobis(Q), rtol=1e-9)


def test_whitening_is_a_root_of_the_precision() -> None:
    rng = np.random.default_rng(3)
    X = rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)) + 5
    gaussian = Gaussian().fit(X)
    lengths = np.linalg.norm((X - gaussian.location_) @ gaussian.whitening_, axis=1)
    np.testing.assert_allclose(lengths, gaussian.mahalanobis(X), rtol=1e-9)
    identity = gaussian.whitening_.T @ gaussian.covariance_ @ gaussian.whitening_
    np.testing.assert_allclose(identity, np.eye(6), atol=1e-9)


def test_too_few_rows_raise_when_distances_are_needed() -> None:
    gaussian = Gaussian().partial_fit(rows(2, 12))
    with pytest.raises(InvalidValueError, match=r"2 rows in 12 dimensions .* has no inverse"):
        gaussian.mahalanobis(rows(1, 12))
    assert np.isfinite(gaussian.partial_fit(rows(30, 12)).mahalanobis(rows(1, 12))).all()


def test_merged_moments_are_those_of_all_rows() -> None:
    X = rows(500, 7).astype(np.float64)
    whole, parts = Moments(7), [Moments(7) for _ in range(4)]
    whole.add(X)
    for part, block in zip(parts, np.split(X, [3, 4, 200]), strict=True):
        part.add(block)
    left, right = parts[0], parts[2]
    left.merge(parts[1])
    right.merge(parts[3])
    before = right.scatter.copy()
    left.merge(right)
    np.testing.assert_array_equal(right.scatter, before)
    y = X - X.mean(0)
    sq = (y**2).sum(1)
    for moments in (whole, left):
        assert moments.n == 500
        np.testing.assert_allclose(moments.mean, X.mean(0))
        np.testing.assert_allclose(moments.scatter, y.T @ y, atol=1e-9 * np.abs(y.T @ y).max())
        np.testing.assert_allclose(moments.cubic, sq @ y, atol=1e-8 * np.abs(sq @ y).max())
        np.testing.assert_allclose(moments.quartic, sq @ sq)


def test_large_float32_arrays_are_not_copied_and_keep_their_precision() -> None:
    X = rows(100_000, 768)
    X[:, 0] += 1000  # a mean far larger than the spread
    tracemalloc.start()
    gaussian = Gaussian().fit(X)
    distances = gaussian.mahalanobis(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * X.nbytes  # X itself is not counted
    y = X.astype(np.float64)
    y -= y.mean(axis=0)
    covariance = y.T @ y / len(y)
    identity = np.trace(covariance) / 768 * np.eye(768)
    shrunk = (1 - gaussian.shrinkage_) * covariance + gaussian.shrinkage_ * identity
    expected = np.sqrt((y[:5000] @ np.linalg.inv(shrunk) * y[:5000]).sum(axis=1))
    np.testing.assert_allclose(distances[:5000], expected, rtol=1e-4)


def test_a_failed_fit_keeps_the_earlier_one() -> None:
    X = rows(50, 4)
    gaussian = Gaussian(0).fit(X)
    before = gaussian.mahalanobis(X)
    with pytest.raises(InvalidValueError, match=r"no inverse\. Give more rows"):
        gaussian.fit(np.ones((9, 4)))
    np.testing.assert_array_equal(gaussian.mahalanobis(X), before)
    np.testing.assert_array_equal(clone(gaussian).fit(X).mahalanobis(X), before)


@pytest.mark.parametrize("shrinkage", ["ledoit-wolf", -0.1, 1.5, None, True])
def test_an_invalid_shrinkage_is_refused(shrinkage: object) -> None:
    with pytest.raises((InvalidValueError, InvalidTypeError), match=r"^Gaussian: shrinkage"):
        Gaussian(shrinkage).fit(rows(9, 2))


@pytest.mark.parametrize(
    "X", [np.ones(4), np.ones((1, 4)), [[np.nan, 1], [2, 3]], [["a"], ["b"]], [[1e20], [2]]]
)
def test_invalid_rows_are_refused(X: object) -> None:
    with pytest.raises((InvalidValueError, InvalidTypeError), match=r"^Gaussian: "):
        Gaussian().fit(X)


def test_distances_need_a_fit() -> None:
    with pytest.raises(NotFittedError, match="Call fit"):
        Gaussian().mahalanobis(rows(2, 2))


# --- One Gaussian for each position ---------------------------------------------------------


def embeddings(n: int, h: int = 5, w: int = 7, d: int = 6, seed: int = 0) -> np.ndarray:
    return rows(n, h * w * d, seed).reshape(n, h, w, d) / np.float32((h * w * d) ** 0.5)


def naive(E: np.ndarray, Q: np.ndarray, ridge: float) -> np.ndarray:
    """PaDiM, Equations 1 and 2, position by position, in float64."""
    out = np.empty(Q.shape[:3])
    for i, j in np.ndindex(E.shape[1:3]):
        x = E[:, i, j].astype(np.float64)
        mean = x.mean(axis=0)
        covariance = sum(np.outer(k - mean, k - mean) for k in x) / (len(x) - 1)
        inverse = np.linalg.inv(covariance + ridge * np.eye(x.shape[1]))
        for b, q in enumerate(Q[:, i, j].astype(np.float64)):
            out[b, i, j] = np.sqrt((q - mean) @ inverse @ (q - mean))
    return out


@pytest.mark.parametrize("n", [2, 4, 60])  # fewer images than dimensions, and more
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_each_position_follows_the_paper(n: int, ridge: float) -> None:
    E, Q = embeddings(n), embeddings(9, seed=1)
    grid = GaussianGrid((5, 7, 6), ridge)
    grid.add(E)
    grid.factorize()
    np.testing.assert_allclose(grid.mahalanobis(Q), naive(E, Q, ridge), rtol=2e-4)


def test_images_can_be_added_after_factorize_and_restore() -> None:
    E, Q = embeddings(80), embeddings(9, seed=1)
    grid = GaussianGrid((5, 7, 6))
    grid.add(E[:30])
    grid.factorize()
    again = GaussianGrid((5, 7, 6))
    again.restore(grid.n, grid.mean.copy(), grid.packed())
    np.testing.assert_array_equal(again.mahalanobis(Q), grid.mahalanobis(Q))
    for one in (grid, again):
        one.add(E[30:31])
        one.add(E[31:])
        one.factorize()
        assert one.n == 80
        np.testing.assert_allclose(one.mahalanobis(Q), naive(E, Q, 0.01), rtol=1e-3)


def test_leave_one_out_equals_a_fit_without_the_image() -> None:
    E = embeddings(25)
    grid = GaussianGrid((5, 7, 6))
    grid.add(E)
    got = grid.leave_one_out([E[:10], E[10:]])
    for i in (0, 7, 24):
        expected = naive(np.delete(E, i, axis=0), E[i : i + 1], 0.01)
        np.testing.assert_allclose(got[i : i + 1], expected, rtol=1e-2)


def test_arrays_of_another_shape_are_refused() -> None:
    grid = GaussianGrid((5, 7, 6))
    with pytest.raises(ValueError, match="mean has shape"):
        grid.restore(3, np.zeros((35, 5), np.float32), np.zeros((35, 21), np.float32))
    with pytest.raises(ValueError, match="shape"):
        grid.restore(3, np.zeros((35, 6), np.float32), np.zeros((35, 20), np.float32))
