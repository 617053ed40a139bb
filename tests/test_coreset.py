"""Coresets against the greedy written from the paper, in float64 and one centre at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from anomalib_lite import coreset
from anomalib_lite.backbones import Backbone
from anomalib_lite.coreset import (
    METHODS,
    _k_center,
    covering_radius,
    greedy_k_center,
    select_coreset,
)
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.fusion import patch_embeddings
from anomalib_lite.images import ImageSource, iter_batches
from anomalib_lite.neighbors import int8
from anomalib_lite.neighbors.torch_index import TorchRows


@pytest.fixture(autouse=True, params=["float32", "int8", "torch"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with each kind of rows; only large data would choose int8 by themselves."""
    if request.param == "int8" and int8.fault() is not None:
        pytest.skip(f"no exact 8-bit products: {int8.fault()}")
    kinds = {
        "float32": _k_center._Rows,
        "int8": _k_center._Int8Rows,
        "torch": lambda X, executor: TorchRows(X, "cpu"),
    }
    monkeypatch.setattr(_k_center, "_kind_of_rows", lambda *_: kinds[request.param])


def naive_greedy(
    X: np.ndarray, n_samples: int, first: int | None, existing: np.ndarray | None = None
) -> tuple[list[int], float, float]:
    """Algorithm 1 of PatchCore: picks, covering radius, and the narrowest lead of a pick."""
    X = X.astype(np.float64)
    sq = np.full(len(X), np.inf)
    for center in [] if existing is None else existing.astype(np.float64):
        sq = np.minimum(sq, ((X - center) ** 2).sum(axis=1))
    picks: list[int] = []
    lead = np.inf
    while len(picks) < n_samples:
        if not picks and first is not None:
            pick = first
        else:
            pick = int(sq.argmax())
            runner_up = np.delete(sq, pick).max(initial=0)
            lead = min(lead, (sq[pick] - runner_up) / sq[pick])
        picks.append(pick)
        sq = np.minimum(sq, ((X - X[pick]) ** 2).sum(axis=1))
    return picks, float(np.sqrt(sq.max())), lead


def skewed(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Rows of very different lengths, so that the farthest is so by a margin."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * rng.lognormal(size=(n, 1))).astype(np.float32)


# Below this lead float32 cannot be asked to tell two rows apart.
CLEAR = 3e-6


@pytest.mark.parametrize(
    ("n", "d", "n_samples"),
    [
        (2, 1, 2),
        (50, 3, 50),
        (700, 16, 90),
        (1023, 8, 100),
        (1024, 8, 100),
        (1025, 8, 100),
        (2047, 8, 100),
        (2048, 152, 100),
        (2049, 8, 100),
        (2049, 30, 300),
        (5000, 24, 200),
    ],
)
def test_greedy_picks_what_the_plain_greedy_picks(n: int, d: int, n_samples: int) -> None:
    X = skewed(n, d)
    got = greedy_k_center(X, n_samples, random_state=0)
    assert got.dtype == np.int64
    expected, radius, lead = naive_greedy(X, n_samples, int(got[0]))
    assert lead > CLEAR, "choose another seed: the premise of this test is data without ties"
    assert got.tolist() == expected
    coreset = select_coreset(X, n_samples, random_state=0)
    assert coreset.indices.tolist() == expected
    assert coreset.covering_radius == pytest.approx(radius, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("n", "n_samples"), [(1500, 1400), (3000, 1500), (2049, 2049)])
def test_each_pick_is_the_farthest_even_where_rows_are_close(n: int, n_samples: int) -> None:
    X = np.random.default_rng(0).random((n, 4), dtype=np.float32)
    picks = greedy_k_center(X, n_samples, random_state=0)
    assert len(set(picks.tolist())) == n_samples
    distances = cdist(X, X).astype(np.float64)
    nearest = distances[:, picks[0]].copy()
    for pick in picks[1:]:
        assert nearest[pick] >= nearest.max() - 1e-5
        nearest = np.minimum(nearest, distances[:, pick])


@pytest.mark.parametrize(("n", "m", "n_samples"), [(300, 1, 40), (1500, 7, 60), (2049, 2100, 60)])
def test_existing_centres_are_known_from_the_start(n: int, m: int, n_samples: int) -> None:
    X, existing = skewed(n, 6), skewed(m, 6, seed=1)
    coreset = select_coreset(X, n_samples, existing=existing, random_state=0)
    expected, radius, lead = naive_greedy(X, n_samples, None, existing)
    assert lead > CLEAR, "choose another seed: the premise of this test is data without ties"
    assert coreset.indices.tolist() == expected
    assert coreset.covering_radius == pytest.approx(radius, rel=1e-5)
    again = greedy_k_center(X, n_samples, existing=existing, random_state=5)
    assert again.tolist() == expected  # there is nothing left to chance


def test_the_first_centre_is_random_and_part_of_the_result() -> None:
    X = skewed(4, 3)
    firsts = [int(greedy_k_center(X, 1, random_state=seed)[0]) for seed in range(100)]
    counts = np.bincount(firsts, minlength=4)
    assert counts.min() > 7  # 25 expected
    for seed, first in enumerate(firsts[:10]):
        assert greedy_k_center(X, 3, random_state=seed)[0] == first


def test_a_larger_coreset_goes_on_where_a_smaller_one_ended() -> None:
    X = skewed(3000, 12)
    picks = greedy_k_center(X, 150, random_state=3)
    for n_samples in (1, 2, 70):
        assert greedy_k_center(X, n_samples, random_state=3).tolist() == picks[:n_samples].tolist()


@pytest.mark.parametrize("n", [1, 5, 1024, 1500, 2049])
def test_equal_rows_are_each_picked_once(n: int) -> None:
    for value in (0.0, 1.0, 1e4, -3e7):
        X = np.full((n, 3), value, np.float32)
        coreset = select_coreset(X, n, random_state=0)
        assert sorted(coreset.indices.tolist()) == list(range(n))
        assert coreset.covering_radius == 0


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_twins_are_not_picked_before_all_others(offset: float) -> None:
    distinct = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32) + np.float32(offset)
    X = np.repeat(distinct, 40, axis=0)  # 2,400 rows
    picks = greedy_k_center(X, len(X), random_state=0)
    assert sorted(picks.tolist()) == list(range(len(X)))
    assert len({int(p) // 40 for p in picks[:60]}) == 60


@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("n", [900, 2500])
def test_data_far_from_the_origin_are_covered_as_well(n: int, offset: float) -> None:
    X = np.random.default_rng(0).normal(size=(n, 20)).astype(np.float32) + np.float32(offset)
    coreset = select_coreset(X, 100, random_state=0)
    assert len(set(coreset.indices.tolist())) == 100
    _, radius, _ = naive_greedy(X, 100, int(coreset.indices[0]))
    exact = cdist(X.astype(np.float64), X[coreset.indices].astype(np.float64)).min(axis=1).max()
    assert exact == pytest.approx(radius, rel=0.01)
    assert coreset.covering_radius == pytest.approx(exact, rel=1e-5)


def test_real_embeddings_are_covered_as_by_the_plain_greedy(data_dir: Path) -> None:
    files = sorted((data_dir / "magnetic_tile" / "train" / "good").iterdir())[:4]
    backbone = Backbone("efficientnet_lite0", dtype="float32", device="cpu")
    grids = [
        patch_embeddings(backbone(batch.pixels)).reshape(-1, 152).numpy()
        for batch in iter_batches(
            ImageSource(files), image_size=128, stride=backbone.stride, batch_size=4
        )
    ]
    X = np.concatenate(grids)
    n_samples = len(X) // 10
    assert n_samples > 150
    coreset = select_coreset(X, n_samples, random_state=0)
    _, radius, _ = naive_greedy(X, n_samples, int(coreset.indices[0]))
    assert coreset.covering_radius == pytest.approx(radius, rel=1e-5)


# --- Random and k-means -------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "n_samples"), [(300, 1), (300, 40), (300, 300), (2100, 200)])
def test_every_method_keeps_distinct_rows_and_says_how_they_cover(
    method: str, n: int, n_samples: int
) -> None:
    X = skewed(n, 6)
    coreset = select_coreset(X, n_samples, method=method, random_state=0)
    assert coreset.indices.shape == (n_samples,)
    assert coreset.indices.dtype == np.int64
    assert len(set(coreset.indices.tolist())) == n_samples
    assert coreset.indices.min() >= 0
    assert coreset.indices.max() < n
    exact = cdist(X.astype(np.float64), X[coreset.indices].astype(np.float64)).min(axis=1).max()
    # A difference of float32 norms: small distances are known to some 1e-3 only.
    assert coreset.covering_radius == pytest.approx(exact, rel=1e-4, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_seeds_decide_and_nothing_else_does(method: str) -> None:
    X = skewed(500, 6)
    picks = [select_coreset(X, 30, method=method, random_state=s).indices for s in (0, 0, 1)]
    assert picks[0].tolist() == picks[1].tolist()
    assert picks[0].tolist() != picks[2].tolist()
    state = np.random.RandomState(0)
    by_state = select_coreset(X, 30, method=method, random_state=state)
    assert by_state.indices.tolist() == picks[0].tolist()
    np.random.seed(7)  # noqa: NPY002, the global generator must not matter
    again = select_coreset(X, 30, method=method, random_state=0)
    assert again.indices.tolist() == picks[0].tolist()


def test_random_gives_every_row_the_same_chance() -> None:
    X = skewed(6, 3)
    counts = np.zeros(6)
    for seed in range(150):
        counts[select_coreset(X, 2, method="random", random_state=seed).indices] += 1
    assert np.abs(counts - 50).max() < 29  # five standard deviations


def test_kmeans_stands_for_the_rows_better_than_chance() -> None:
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(12, 5)) * 10
    X = (middles[rng.integers(0, 12, 600)] + rng.normal(size=(600, 5))).astype(np.float32)

    def error(method: str, seed: int) -> float:
        kept = X[select_coreset(X, 40, method=method, random_state=seed).indices]
        return float((cdist(X, kept).min(axis=1) ** 2).mean())

    assert error("kmeans", 0) < 0.8 * np.mean([error("random", seed) for seed in range(5)])


def test_kmeans_fills_up_where_rows_are_equal() -> None:
    X = np.zeros((40, 3), np.float32)
    X[0] = 1
    coreset = select_coreset(X, 20, method="kmeans", random_state=0)
    assert len(set(coreset.indices.tolist())) == 20


def test_kmeans_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    select_coreset(skewed(300, 4), 100, method="kmeans", random_state=0)
    assert capfd.readouterr() == ("", "")


# --- Covering radius ----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (300, 17), (2049, 5), (70, 2300)])
def test_covering_radius_is_the_largest_distance_to_a_nearest_centre(n: int, m: int) -> None:
    X, centers = skewed(n, 9), skewed(m, 9, seed=1)
    exact = cdist(X.astype(np.float64), centers.astype(np.float64)).min(axis=1).max()
    assert covering_radius(X, centers) == pytest.approx(exact, rel=1e-5)


# --- What is refused ----------------------------------------------------------------------

X = skewed(30, 4)


@pytest.mark.parametrize("n_samples", [0, 31, -1, 1.5, True, "3", None])
def test_numbers_of_samples_that_make_no_sense(n_samples: object) -> None:
    with pytest.raises(InvalidValueError, match=r"n_samples must be .* at most 30, got"):
        greedy_k_center(X, n_samples)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.where(X > 2, np.nan, X), InvalidValueError, "X must be finite"),
        (np.where(X > 2, np.inf, X), InvalidValueError, "X must be finite"),
        (X[0], InvalidValueError, r"shape \(N, D\).*got \(4,\)"),
        (X[None], InvalidValueError, r"got \(1, 30, 4\)"),
        (X[:0], InvalidValueError, r"got \(0, 4\)"),
        (X[:, :0], InvalidValueError, r"got \(30, 0\)"),
        ([["a", "b"]], InvalidTypeError, "numeric array"),
        (None, InvalidTypeError, "numeric array|shape"),
        ([[1, 2], [3]], InvalidTypeError, "numeric array"),
    ],
)
def test_embeddings_that_are_none(bad: object, error: type[Exception], message: str) -> None:
    with pytest.raises((error, InvalidValueError), match=message):
        select_coreset(bad, 1)  # type: ignore[arg-type]


def test_unknown_methods_and_misfitting_centres() -> None:
    with pytest.raises(InvalidValueError, match=r"method must be one of .*got 'gredy'.*'greedy'\?"):
        select_coreset(X, 3, method="gredy")
    with pytest.raises(InvalidValueError, match=r"existing must have 4 columns.*got 3"):
        select_coreset(X, 3, existing=X[:, :3])
    with pytest.raises(InvalidValueError, match=r"existing.*finite"):
        select_coreset(X, 3, existing=np.full((1, 4), np.nan))
    for method in ("random", "kmeans"):
        with pytest.raises(InvalidValueError, match=r"existing centres need method='greedy'"):
            select_coreset(X, 3, method=method, existing=X[:2])
    with pytest.raises(InvalidValueError, match="centers must have 4 columns"):
        covering_radius(X, X[:, :3])


def test_other_number_types_are_converted_and_nothing_is_changed() -> None:
    whole = np.random.default_rng(0).integers(0, 99, (50, 3))
    before = whole.copy()
    expected = greedy_k_center(whole.astype(np.float32), 10, random_state=0).tolist()
    for form in (whole, whole.tolist(), whole.astype(np.float64), np.asfortranarray(whole)):
        assert greedy_k_center(form, 10, random_state=0).tolist() == expected
    np.testing.assert_array_equal(whole, before)
    floats = skewed(50, 3)
    kept = floats.copy()
    select_coreset(floats, 10, existing=floats[:4], random_state=0)
    np.testing.assert_array_equal(floats, kept)


@pytest.mark.parametrize("n_samples", [30, 300])
def test_rows_far_larger_than_all_others(n_samples: int) -> None:
    X = np.random.default_rng(0).normal(scale=0.01, size=(8000, 16)).astype(np.float32)
    X[-40:-20] *= 1000  # far out, each with a twin
    X[-20:] = X[-40:-20] + np.float32(1e-4)
    kept = coreset.select_coreset(X, n_samples, random_state=0)
    assert np.count_nonzero(kept.indices >= 7960) == 20  # one of each pair
    true = cdist(X.astype(np.float64), X[kept.indices].astype(np.float64)).min(axis=1).max()
    assert kept.covering_radius == pytest.approx(true, abs=2e-3)
    assert coreset.covering_radius(X, X[kept.indices]) == pytest.approx(true, abs=2e-3)


def test_many_twins_take_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(40, 6)).astype(np.float32), 150, axis=0)  # (6000, 6)
    passes = []
    pick = _k_center._pick_from_pool
    monkeypatch.setattr(_k_center, "_pick_from_pool", lambda *a: passes.append(1) or pick(*a))
    indices = coreset.greedy_k_center(X, 600, random_state=0)
    assert len(set(indices.tolist())) == 600
    assert coreset.covering_radius(X, X[indices]) == pytest.approx(0, abs=1e-2)
    assert len(passes) < 60
