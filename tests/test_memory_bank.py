"""MemoryBank: scikit-learn's contract, and neighbours against scikit-learn's brute force."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import check_estimator

from anomalib_lite import MemoryBank
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, NotFittedError
from anomalib_lite.memory_bank import check_index
from anomalib_lite.neighbors import faiss_index


def data(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def clustered(n: int, d: int, seed: int = 0) -> np.ndarray:
    """What indexes are made for: 20 clusters."""
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(99).normal(size=(20, d)) * 5
    return (middles[rng.integers(0, 20, n)] + rng.normal(size=(n, d))).astype(np.float32)


def spread(n: int, d: int, seed: int = 0) -> np.ndarray:
    """No clusters, so that neighbours lie in many cells; of 8 dimensions, which PCA keeps."""
    mix = np.random.default_rng(99).normal(size=(8, d))
    return (data(n, 8, seed) @ mix + data(n, d, seed + 50) / 10).astype(np.float32)


def brute(X: np.ndarray, Q: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    exact = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(X.astype(np.float64))
    return exact.kneighbors(Q.astype(np.float64))


def test_it_is_a_scikit_learn_estimator() -> None:
    results = check_estimator(MemoryBank(), on_skip=None, on_fail="raise")
    assert len(results) > 30
    for result in results:
        # That check needs scipy set up in a special way, for every estimator.
        assert result["status"] == "passed" or "array_api" in result["check_name"], result


# --- Neighbours ---------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3, 152, 600])
@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("n_queries", [1, 7, 300])  # FAISS works in other ways for few and many
@pytest.mark.parametrize("index", ["flat", "Flat"])
def test_neighbours_and_distances_are_those_of_scikit_learn(
    d: int, k: int, n_queries: int, index: str
) -> None:
    X, Q = data(500, d), data(n_queries, d, seed=1)
    distances, indices = MemoryBank(index=index).fit(X).kneighbors(Q, k)
    expected, neighbours = brute(X, Q, k)
    assert (distances.shape, distances.dtype) == ((n_queries, k), np.float32)
    assert (indices.shape, indices.dtype) == ((n_queries, k), np.int64)
    np.testing.assert_allclose(distances, expected, rtol=2e-6, atol=2e-6)
    # Where two neighbours are as far to six digits, either order is right.
    differs = indices != neighbours
    assert differs.mean() < 0.01
    assert (np.diff(distances, axis=1) >= 0).all()


def test_distances_are_rooted() -> None:
    distances, indices = MemoryBank().fit([[0.0, 0.0]]).kneighbors([[3.0, 4.0]], 1)
    assert distances.tolist() == [[5.0]]
    assert indices.tolist() == [[0]]


@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("n_queries", [5, 500])
def test_neighbours_are_found_far_from_the_origin_too(offset: float, n_queries: int) -> None:
    X, Q = data(2000, 32) + np.float32(offset), data(n_queries, 32, seed=1) + np.float32(offset)
    distances, _ = MemoryBank().fit(X).kneighbors(Q, 1)
    np.testing.assert_allclose(distances, brute(X, Q, 1)[0], rtol=1e-5)


def test_an_embedding_of_the_bank_is_at_no_distance_from_itself() -> None:
    X = data(3000, 64) * 30 + 10
    distances, indices = MemoryBank().fit(X).kneighbors(X, 1)
    assert distances.max() == 0
    assert indices.ravel().tolist() == list(range(3000))


@pytest.mark.parametrize(
    ("index", "recall"),
    [
        ("HNSW32", 0.98),
        ("IVF16,Flat", 0.8),  # one list of 16 is visited
        ("SQ8", 0.95),
        ("PQ4x4", 0.05),  # 16 numbers in 2 bytes
        ("IVF4,PQ2x4", 0.02),
        ("PCA8,Flat", 0.1),
    ],
)
def test_approximate_indexes_find_most_neighbours_at_exact_distances(
    index: str, recall: float
) -> None:
    X, Q = clustered(1500, 16), clustered(200, 16, seed=1)
    bank = MemoryBank(index=index).fit(X)
    distances, indices = bank.kneighbors(Q, 5)
    expected, neighbours = brute(X, Q, 5)
    exact = np.linalg.norm(X[indices].astype(np.float64) - Q[:, None], axis=2)
    np.testing.assert_allclose(distances, exact, rtol=1e-6)
    assert (np.diff(distances, axis=1) >= 0).all()
    assert (distances >= expected - 1e-4).all()
    found = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(indices, neighbours, strict=True)])
    assert found >= recall


def test_queries_whose_lists_hold_too_few_are_searched_exactly() -> None:
    X, Q = data(200, 8), data(50, 8, seed=1)
    bank = MemoryBank(index="IVF100,Flat").fit(X)
    distances, indices = bank.kneighbors(Q, 40)  # some two rows a list
    assert (indices >= 0).all()
    expected, _ = brute(X, Q, 40)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)


def test_an_index_may_divide_the_dimension_in_any_way_that_fits() -> None:
    X = data(400, 152)  # of the embedded backbone: 8 times 19
    bank = MemoryBank(index="PQ19x4").fit(X)
    assert bank.kneighbors(X[:5], 1)[0].shape == (5, 1)


@pytest.mark.parametrize("index", ["IVF16,Flat", "PQ4x4"])
def test_training_an_index_is_silent(index: str, capfd: pytest.CaptureFixture[str]) -> None:
    MemoryBank(index=index).fit(data(500, 8))
    assert capfd.readouterr() == ("", "")


def test_one_query_or_many_give_the_same_answer() -> None:
    X, Q = data(5000, 40), data(300, 40, seed=1)
    bank = MemoryBank().fit(X)
    distances, indices = bank.kneighbors(Q, 3)
    for i in range(0, 300, 29):
        alone, neighbours = bank.kneighbors(Q[i : i + 1], 3)
        np.testing.assert_allclose(alone[0], distances[i], rtol=1e-6)
        assert neighbours[0].tolist() == indices[i].tolist()
    many = np.concatenate([Q] * 20)  # more than one block
    np.testing.assert_allclose(bank.kneighbors(many, 3)[0], np.tile(distances, (20, 1)), rtol=1e-6)


def test_defaults_and_indices_alone() -> None:
    X = data(50, 4)
    bank = MemoryBank(n_neighbors=4).fit(X)
    distances, indices = bank.kneighbors(X)
    assert distances.shape == (50, 4)
    assert bank.kneighbors(X, return_distance=False).tolist() == indices.tolist()


# --- Growing and shrinking ----------------------------------------------------------------


@pytest.mark.parametrize("index", ["flat", "HNSW16", "IVF4,Flat", "SQ8"])
def test_what_was_added_is_found(index: str) -> None:
    X, more = clustered(400, 8), clustered(60, 8, seed=2)
    bank = MemoryBank(index=index).fit(X)
    assert bank.add(more) is bank
    np.testing.assert_array_equal(bank.embeddings_, np.concatenate([X, more]))
    distances, indices = bank.kneighbors(more, 1)
    found = indices.ravel() == np.arange(400, 460)
    assert found.mean() >= (0.9 if index == "SQ8" else 1.0)  # codes of one byte may be shared
    np.testing.assert_array_equal(distances[found], 0)


def test_adding_to_an_empty_bank_fits_it() -> None:
    X = data(20, 3)
    np.testing.assert_array_equal(MemoryBank().add(X).embeddings_, X)


def test_fitting_again_forgets() -> None:
    bank = MemoryBank().fit(data(20, 3)).subsample(5, random_state=0)
    bank.fit(data(30, 7))
    assert bank.embeddings_.shape == (30, 7)
    assert bank.n_features_in_ == 7


def test_a_refused_fit_leaves_the_bank_as_it_was() -> None:
    X = data(60, 6)
    for index, bad in (("flat", np.full((3, 6), np.nan)), ("IVF64,Flat", data(50, 6))):
        bank = MemoryBank().fit(X)
        expected = bank.kneighbors(X, 3)[0]
        bank.set_params(index=index)
        with pytest.raises(InvalidValueError):
            bank.fit(bad)
        np.testing.assert_array_equal(bank.kneighbors(X, 3)[0], expected)


@pytest.mark.parametrize(("amount", "n"), [(0.25, 50), (50, 50), (1.0, 200), (1, 1), (0.005, 1)])
@pytest.mark.parametrize("index", ["flat", "SQ8"])
def test_subsampling_keeps_a_coreset(amount: float, n: int, index: str) -> None:
    X = data(200, 5)
    bank = MemoryBank(index=index).fit(X)
    assert bank.subsample(amount, random_state=0) is bank
    assert bank.embeddings_.shape == (n, 5)
    rows = {r.tobytes() for r in X}
    assert len({r.tobytes() for r in bank.embeddings_} & rows) == n
    farthest = brute(bank.embeddings_, X, 1)[0].max()
    assert bank.covering_radius_ == pytest.approx(farthest, rel=1e-4, abs=2e-3)
    assert bank.kneighbors(X, 1)[1].max() < n


def test_subsampling_by_each_method_and_seed() -> None:
    X = data(200, 5)

    def kept(method: str, seed: int) -> np.ndarray:
        bank = MemoryBank().fit(X).subsample(20, method=method, random_state=seed)
        return bank.embeddings_

    for method in ("greedy", "random", "kmeans"):
        np.testing.assert_array_equal(kept(method, 0), kept(method, 0))
        assert not np.array_equal(kept(method, 0), kept(method, 1))


# --- Copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["flat", "HNSW16", "IVF4,PQ2x4"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_answer_alike_and_stand_alone(index: str, copied: Any) -> None:
    X, Q = data(300, 8), data(20, 8, seed=1)
    bank = MemoryBank(index=index).fit(X)
    expected = bank.kneighbors(Q, 3)
    twin = copied(bank)
    for a, b in zip(twin.kneighbors(Q, 3), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    twin.add(Q)
    for a, b in zip(bank.kneighbors(Q, 3), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not hasattr(clone(bank), "embeddings_")


@pytest.mark.parametrize("index", ["HNSW16", "IVF4,Flat", "PQ2x4"])
def test_a_bank_is_restored_from_its_arrays(index: str) -> None:
    X, Q = data(300, 8), data(20, 8, seed=1)
    bank = MemoryBank(index=index).fit(X)
    serialized = faiss_index.serialize(bank.index_)
    assert serialized.dtype == np.uint8
    again = MemoryBank.restore(X, serialized, index=index, n_neighbors=3)
    for a, b in zip(again.kneighbors(Q), bank.kneighbors(Q, 3), strict=True):
        np.testing.assert_array_equal(a, b)
    for embeddings, held, kind, message in (
        (X[:299], serialized, index, "holds 300 embeddings"),
        (X[:, :7], serialized, index, "of 8 dimensions"),
        (X, serialized[:50], index, "broken"),
        (X, np.zeros(0, np.uint8), index, "broken"),
        (X, None, index, "no serialized index fits"),
        (X, serialized, "flat", "no serialized index fits"),
        (X[0], None, "flat", "shape"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            MemoryBank.restore(embeddings, held, index=kind)


def test_a_fit_that_fails_leaves_the_bank_as_it_was() -> None:
    X = data(100, 8)
    bank = MemoryBank(1).fit(X)
    with pytest.raises(InvalidValueError, match="cannot hold 10 embeddings"):
        bank.set_params(index="IVF64,Flat").fit(data(10, 4))
    assert (bank.kneighbors(X, 1)[1].ravel() == np.arange(100)).all()


@pytest.mark.parametrize("device", ["bogus", "auto", "cuda:99", "mps"])
def test_devices_that_are_not_here(device: str) -> None:
    with pytest.raises(InvalidValueError, match="device"):
        MemoryBank(device=device).fit(data(9, 3))


def test_values_whose_squares_are_no_numbers() -> None:
    for X in (data(9, 3) * np.float32(1e20), data(9, 3) * np.float32(-1e16)):
        with pytest.raises(InvalidValueError, match=r"at most 1e\+15 in size, got \d"):
            MemoryBank().fit(X)


def test_arrays_handed_in_are_not_changed_and_not_shared_by_surprise() -> None:
    X, Q = data(100, 5), data(10, 5, seed=1)
    before = X.copy(), Q.copy()
    bank = MemoryBank().fit(X)
    bank.kneighbors(Q, 3)
    bank.add(Q)
    bank.subsample(0.5, random_state=0)
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(Q, before[1])


# --- What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize("index", ["flatt", "IVF", "", None, 7, "PQ0"])
def test_unknown_indexes_are_refused(index: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^MemoryBank: index.*got|cannot hold"):
        MemoryBank(index=index).fit(data(50, 6))


def test_the_closest_index_is_named() -> None:
    with pytest.raises(InvalidValueError, match=r"got 'HNWS32'. Did you mean 'HNSW32'\?"):
        MemoryBank(index="HNWS32").fit(data(50, 6))


def test_an_index_that_cannot_be_trained_on_so_little_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"'IVF64,Flat' cannot hold 50 embeddings.*'flat'"):
        MemoryBank(index="IVF64,Flat").fit(data(50, 6))
    with pytest.raises(InvalidValueError, match=r"PQ4x4.*6 dimensions"):
        MemoryBank(index="PQ4x4").fit(data(50, 6))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_neighbors": 0}, "n_neighbors must be .* at least 1, got 0"),
        ({"n_neighbors": 2.5}, "n_neighbors must be .*got 2.5"),
        ({"algorithm": "ball_tree"}, "algorithm must be one of .*got 'ball_tree'"),
    ],
)
def test_bad_parameters_are_refused_when_fitted(parameters: dict[str, Any], message: str) -> None:
    bank = MemoryBank(**parameters)  # storing is all that the constructor does
    with pytest.raises(InvalidValueError, match=message):
        bank.fit(data(50, 6))


def test_bad_questions_are_refused() -> None:
    X = data(50, 6)
    bank = MemoryBank().fit(X)
    for k in (0, 51, 1.5, True):
        with pytest.raises(InvalidValueError, match=r"n_neighbors must be .* at most 50, got"):
            bank.kneighbors(X, k)  # type: ignore[arg-type]
    for bad in (X[:, :5], X[0], np.full((2, 6), np.nan), np.full((2, 6), np.inf), X[:0]):
        with pytest.raises(InvalidValueError, match=r"^MemoryBank"):
            bank.kneighbors(bad, 1)
        with pytest.raises(InvalidValueError, match=r"^MemoryBank"):
            bank.add(bad)
    with pytest.raises((InvalidTypeError, InvalidValueError), match=r"^MemoryBank"):
        bank.kneighbors([["a"] * 6], 1)
    np.testing.assert_array_equal(bank.embeddings_, X)


@pytest.mark.parametrize("amount", [0, 51, 0.0, 1.5, -0.1, 0.001, True, None, "half", np.nan])
def test_amounts_that_make_no_sense_are_refused(amount: Any) -> None:
    bank = MemoryBank().fit(data(50, 6))
    with pytest.raises(InvalidValueError, match=r"^MemoryBank.subsample: amount"):
        bank.subsample(amount)
    assert len(bank.embeddings_) == 50


def test_an_empty_bank_says_so() -> None:
    for ask in (lambda b: b.kneighbors(data(2, 3)), lambda b: b.subsample(0.5)):
        with pytest.raises(NotFittedError, match=r"the bank is empty. Call fit") as caught:
            ask(MemoryBank())
        assert isinstance(caught.value, SklearnNotFittedError)


@pytest.mark.parametrize("index", ["PQ19", "IVF4096,PQ76", "OPQ19_76,IVF16,PQ19", "HNSW32,Flat"])
def test_an_index_is_not_refused_for_numbers_that_divide_nothing(index: str) -> None:
    check_index(index, "test")


def test_a_bank_filled_anew_forgets_its_covering_radius() -> None:
    X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    bank = MemoryBank().fit(X).subsample(0.5, random_state=0)
    assert bank.covering_radius_ > 0
    assert not hasattr(bank.fit(X), "covering_radius_")


# --- Effort and recall --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "name", "efforts"),
    [
        ("IVF32,Flat", "nprobe", (1, 4, 32)),
        ("PCA16,IVF32,Flat", "nprobe", (1, 8)),
        ("IVF32,PQ8np", "nprobe", (1, 8)),
        ("HNSW8", "ef_search", (1, 8, 400)),
    ],
)
def test_more_effort_finds_more(index: str, name: str, efforts: tuple[int, ...]) -> None:
    X, Q = spread(2000, 32), spread(400, 32, seed=1)
    recalls = []
    for effort in efforts:
        bank = MemoryBank(5, index=index, **{name: effort}).fit(X)
        recalls.append(bank.recall(Q))
        again = MemoryBank.restore(X, faiss_index.serialize(bank.index_), **bank.get_params())
        np.testing.assert_array_equal(again.kneighbors(Q)[1], bank.kneighbors(Q)[1])
    assert recalls == sorted(recalls)
    assert recalls[-1] > 1.2 * recalls[0]
    if efforts[-1] in (32, 400):  # all there is
        assert recalls[-1] > 0.999


@pytest.mark.parametrize("k", [1, 4])
def test_recall_is_the_share_of_true_neighbours(k: int) -> None:
    X, Q = clustered(1500, 12), clustered(300, 12, seed=1)
    bank = MemoryBank(9, index="IVF32,Flat").fit(X)
    found, true = bank.kneighbors(Q, k)[1], brute(X, Q, k)[1]
    share = np.mean(
        [len({*a} & {*b}) / k for a, b in zip(found.tolist(), true.tolist(), strict=True)]
    )
    assert bank.recall(Q, k) == pytest.approx(share, abs=1e-9)
    assert share < 0.99
    assert MemoryBank().fit(X).recall(Q, k) == 1


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"nprobe": 4}, r"index='flat' has no nprobe to set to 4.*'IVF256,Flat'"),
        ({"index": "HNSW8", "nprobe": 4}, "index='HNSW8' has no nprobe"),
        ({"index": "IVF4,Flat", "ef_search": 4}, "index='IVF4,Flat' has no ef_search"),
        ({"index": "IVF4,Flat", "nprobe": 0}, "nprobe must be"),
        ({"index": "HNSW8", "ef_search": 1.5}, "ef_search must be"),
        ({"index": "HNSW8", "ef_search": True}, "ef_search must be"),
    ],
)
def test_efforts_that_an_index_does_not_have(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        MemoryBank(**parameters).fit(data(100, 8))
