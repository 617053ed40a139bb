"""Products of 8-bit integers: what they rule out is ruled out for certain."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_info
from tqdm import tqdm

from anomalib_lite import MemoryBank
from anomalib_lite._threads import n_cores, workers
from anomalib_lite.coreset import _k_center
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.neighbors import int8
from anomalib_lite.neighbors.int8_index import Int8Index
from anomalib_lite.neighbors.torch_index import TorchIndex

RNG = np.random.default_rng(0)


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def with_outliers(n: int, d: int, seed: int = 0) -> np.ndarray:
    """A few channels far larger than the others, as vision transformers have them."""
    X = normal(n, d, seed)
    X[:, [3, d // 2]] *= 40
    return X


def skewed(n: int, d: int, seed: int = 0) -> np.ndarray:
    return normal(n, d, seed) * np.random.default_rng(seed).lognormal(size=(n, 1)).astype("f4")


def far(n: int, d: int, seed: int = 0) -> np.ndarray:
    return normal(n, d, seed) + np.float32(1000)


def twins(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.repeat(normal(-(-n // 50), d, seed), 50, axis=0)[:n]


def saturated(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Every code is 127 or -127: the largest products there can be."""
    return np.sign(normal(n, d, seed)).astype(np.float32) * 7


def sparse(n: int, d: int, seed: int = 0) -> np.ndarray:
    X = normal(n, d, seed)
    X[np.random.default_rng(seed).random(X.shape) < 0.95] = 0
    X[::7] = 0
    return X


KINDS = [normal, with_outliers, skewed, far, twins, saturated, sparse]

needs_exact_products = pytest.mark.skipif(
    int8.fault() is not None, reason=f"no exact 8-bit products: {int8.fault()}"
)
needs_fast_products = pytest.mark.skipif(
    not int8.worthwhile(much=True), reason="no 8-bit products that are exact and in hardware"
)


@needs_exact_products
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [4, 61, 152, 600])
def test_no_score_is_farther_off_than_its_bound(kind: object, d: int) -> None:
    X, Q = kind(700, d), kind(90, d, 1)  # type: ignore[operator]
    frame = int8.QuantizationFrame(X)
    placed = frame.transform(X)
    half = (placed.astype(np.float64) ** 2).sum(axis=1) / 2
    frame.reserve_bias_columns(float(np.ptp(half)) / 2, frame.smallest_step)
    items, queries = frame.items(placed), frame.queries(frame.transform(Q))
    codes = int8.products(queries.codes, items.codes)
    steps = queries.steps.astype(np.float64) * items.step
    got = codes * steps[:, None] + items.shift
    centred = X.astype(np.float64) - frame.mean
    expected = (Q.astype(np.float64) - frame.mean) @ centred.T - (centred**2).sum(axis=1) / 2
    off = np.abs(got - expected)[queries.fits]
    error = items.error(queries)[queries.fits]
    assert (~queries.fits).mean() < 0.1
    assert (off <= error[:, None]).all()
    # And the bound is worth something: a few hundredths of the largest score.
    assert np.median(error) < 0.15 * max(np.abs(expected).max(), 1e-6)


@needs_exact_products
def test_a_product_just_below_the_limit_is_below_the_score() -> None:
    X, Q = normal(300, 32), normal(40, 32, 1)
    frame = int8.QuantizationFrame(X)
    frame.reserve_bias_columns(100.0, frame.smallest_step)
    items, queries = frame.items(frame.transform(X)), frame.queries(frame.transform(Q))
    x, q = X - frame.mean, Q - frame.mean
    scores = q @ x.T - (x**2).sum(axis=1) / 2
    codes = int8.products(queries.codes, items.codes)
    least = np.partition(scores, -5, axis=1)[:, -5]  # the five best must all stay
    kept = codes >= int8.limit(least, queries, items)[:, None]
    assert kept[scores >= least[:, None]].all()
    assert kept.mean() < 0.5


def test_turning_keeps_distances() -> None:
    X = with_outliers(500, 152)
    frame = int8.QuantizationFrame(X)
    assert frame.rotation is not None
    placed = frame.transform(X).astype(np.float64)
    np.testing.assert_allclose(cdist(placed, placed), cdist(X, X), rtol=1e-5, atol=1e-3)
    rms = np.sqrt((placed**2).mean(axis=1))
    assert np.median(np.abs(placed).max(axis=1) / rms) < 4.5
    assert int8.QuantizationFrame(normal(500, 152)).rotation is None


@needs_exact_products
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(17, 8), (1024, 152), (5000, 61), (9000, 260)])
@pytest.mark.parametrize("k", [1, 9])
def test_neighbours_are_those_of_brute_force(kind: object, n: int, d: int, k: int) -> None:
    X, Q = kind(n, d), kind(300, d, 1)  # type: ignore[operator]
    distances, found = Int8Index(X).search(Q, k)
    exact = cdist(Q.astype(np.float64), X.astype(np.float64))
    expected = np.sort(exact, axis=1)[:, :k]
    open_ = (found >= 0).all(axis=1)
    found[~open_] = 0
    got = np.take_along_axis(exact, found, 1)
    assert open_.mean() > 0.9 or (n == 17 and kind is twins)  # those are all one
    np.testing.assert_allclose(got[open_], expected[open_], rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(distances[open_], got[open_], rtol=2e-6, atol=1e-5)
    assert all(len(set(row)) == k for row in found[open_].tolist())


@needs_exact_products
def test_a_query_too_large_to_be_rounded_is_left_to_others() -> None:
    X, Q = normal(3000, 16), normal(20, 16, 1)
    Q[3] *= 1e4
    Q[7] = 0
    found = Int8Index(X).search(Q, 2)[1]
    assert (found[3] == -1).all()
    assert (np.delete(found, 3, axis=0) >= 0).all()
    bank = MemoryBank(2, algorithm="int8")
    bank.n_features_in_, bank.embeddings_, bank.index_ = 16, X, None
    bank._fast_index = Int8Index(X)
    distances, indices = bank._search_large(Q, 2)
    np.testing.assert_array_equal(np.delete(indices, 3, axis=0), np.delete(found, 3, axis=0))
    np.testing.assert_allclose(distances, np.sort(cdist(Q, X), axis=1)[:, :2], rtol=1e-5)


@needs_exact_products
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, -3e7])
def test_rows_without_any_range(value: float) -> None:
    X = np.full((2000, 12), value, np.float32)
    X[77, 3] += abs(value) * 0.5 + 1
    found = Int8Index(X).search(X[[77, 5]], 1)[1]
    assert found[0, 0] in (77, -1)  # -1: out of proportion to all the others, FAISS must say
    assert found[1, 0] not in (77, -1)


@needs_fast_products
@pytest.mark.parametrize("k", [1, 9])
def test_a_bank_answers_the_same_whoever_searches(k: int) -> None:
    X, Q = skewed(20_000, 64), skewed(3000, 64, 1)
    by = {a: MemoryBank(k, algorithm=a).fit(X) for a in ("auto", "faiss", "int8")}
    answers = {a: bank.kneighbors(Q) for a, bank in by.items()}
    assert isinstance(by["auto"]._fast_index, Int8Index)
    assert isinstance(by["int8"]._fast_index, Int8Index)
    assert by["faiss"]._fast_index is None
    for a in ("auto", "int8"):
        np.testing.assert_allclose(answers[a][0], answers["faiss"][0], rtol=1e-5)
        same = answers[a][1] == answers["faiss"][1]
        assert same.mean() > 0.999
        # To the bit: a score must not depend on how many images are scored with it.
        np.testing.assert_array_equal(answers[a][0][same], answers["faiss"][0][same])
    more = by["int8"].add(Q[:50])
    np.testing.assert_array_equal(more.kneighbors(Q[:50], 1)[1].ravel(), np.arange(20_000, 20_050))


@pytest.mark.parametrize("algorithm", ["auto", "int8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 9])
def test_a_bank_is_exact_on_every_processor(
    algorithm: str, kind: Callable[..., np.ndarray], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anomalib_lite.memory_bank._MANY", 0)
    X, Q = kind(2500, 61), kind(300, 61, 1)
    bank = MemoryBank(k, algorithm=algorithm)
    if algorithm == "int8" and int8.fault() is not None:
        with pytest.raises(InvalidValueError, match=r"needs exact products.*torch\._int_mm"):
            bank.fit(X)
        return
    distances, found = bank.fit(X).kneighbors(Q)
    exact = cdist(Q.astype(np.float64), X.astype(np.float64))
    got = np.take_along_axis(exact, found, 1)
    np.testing.assert_allclose(got, np.sort(exact, axis=1)[:, :k], rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(distances, got, rtol=2e-6, atol=1e-5)
    wanted = algorithm == "int8" or int8.worthwhile(much=False)
    assert isinstance(bank._fast_index, Int8Index) == wanted


@needs_exact_products
def test_rows_that_are_all_equal_have_distance_zero() -> None:
    X = np.ones((3072, 8), np.float32)  # every pair stays open, to the last tile
    distances, indices = Int8Index(X).search(X[:1024], 1)
    assert (distances == 0).all()
    assert (indices >= 0).all()


@needs_fast_products
def test_a_copy_does_not_carry_what_only_this_processor_can() -> None:
    bank = MemoryBank(1, algorithm="int8").fit(normal(20_000, 64))
    expected = bank.kneighbors(normal(1000, 64, 1))
    assert bank._fast_index is not None
    again = pickle.loads(pickle.dumps(bank))
    assert again._fast_index is None
    np.testing.assert_array_equal(again.kneighbors(normal(1000, 64, 1)), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("k", [1, 9])
def test_the_search_of_a_device(device: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    monkeypatch.setattr("anomalib_lite.neighbors.torch_index._VALUES", 2000 * 100)  # several chunks
    X, Q = far(2000, 40), far(310, 40, 1)
    found = TorchIndex(X, device).search(Q, k)
    exact = cdist(Q.astype(np.float64), X.astype(np.float64))
    got = np.take_along_axis(exact, found, 1)
    np.testing.assert_allclose(got, np.sort(exact, axis=1)[:, :k], rtol=1e-5)
    # To a bank, "cpu" alone means that torch is not needed.
    bank = MemoryBank(k, device="cpu:0" if device == "cpu" else device).fit(X)
    np.testing.assert_allclose(bank.kneighbors(Q)[0], np.sort(exact, axis=1)[:, :k], rtol=1e-5)


@needs_exact_products
def test_real_embeddings_have_the_neighbours_that_faiss_finds(data_dir: Path) -> None:
    from anomalib_lite import PatchCore

    files = sorted((data_dir / "magnetic_tile" / "train" / "good").iterdir())[:12]
    detector = PatchCore(coreset_ratio=1.0, false_alarm_rate=0.3, dtype="float32").fit(files)
    X = detector.memory_bank_.embeddings_
    Q = X[::5] + RNG.normal(scale=X.std() / 10, size=X[::5].shape).astype(np.float32)
    found, expected = Int8Index(X).search(Q, 9)[1], faiss.knn(Q, X, 9)[1]
    assert (found == expected).mean() > 0.999


def test_workers_compute_alone_and_leave_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    seen = set()
    barrier = threading.Barrier(n_cores())

    def look(_: int) -> None:
        barrier.wait()
        seen.add(torch.get_num_threads())

    with workers() as executor:
        list(executor.map(look, range(n_cores())))
    assert seen == {1}
    assert torch.get_num_threads() == before
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before]


def test_limits_of_threads_may_end_in_any_order() -> None:
    def n_blas_threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    before = n_blas_threads()
    first, second = workers(), workers()
    first.__enter__()
    second.__enter__()
    assert n_blas_threads() == {1}
    first.__exit__(None, None, None)
    assert n_blas_threads() == {1}, "one is still within"
    second.__exit__(None, None, None)
    assert n_blas_threads() == before


# --- Products that are not exact ----------------------------------------------------------


def saturating(a: np.ndarray, b: np.ndarray, left: bool = True) -> np.ndarray:
    """``a @ b.T`` as oneDNN has it where there is no VNNI (``vpmaddubsw``).

    One side becomes unsigned, by 128 more; products are added up in pairs that saturate at
    16 bits; and what the 128 have added is taken off again.
    """
    if not left:
        return saturating(b, a).T
    unsigned, signed = a.astype(np.int32) + 128, b.astype(np.int32)
    total = np.zeros((len(a), len(b)), np.int32)
    for k in range(0, a.shape[1], 2):
        pair = unsigned[:, k : k + 2] @ signed[:, k : k + 2].T
        total += np.clip(pair, -(2**15), 2**15 - 1)
    return total - 128 * signed.sum(axis=1)


def exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int32)


Multiply = Callable[[np.ndarray, np.ndarray], np.ndarray]


@pytest.fixture
def multiply_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Multiply, Multiply], None]:
    """Set how torch multiplies, when it is checked and then in searches; all is fast."""

    def set_to(at_first: Multiply, then: Multiply) -> None:
        monkeypatch.setattr(int8, "_multiply", at_first)
        found = int8._fault_of_patterns.__wrapped__()
        monkeypatch.setattr(int8, "_fault_of_patterns", lambda: found)
        monkeypatch.setattr(int8, "_multiply", then)
        monkeypatch.setattr(int8, "_seen_wrong", [])
        monkeypatch.setattr(int8, "_is_fast", lambda: True)
        monkeypatch.setattr("anomalib_lite.memory_bank._MANY", 0)
        monkeypatch.setattr(_k_center, "_MANY", 0)

    return set_to


FAULTY: dict[str, Multiply] = {
    "left": saturating,
    "right": lambda a, b: saturating(a, b, left=False),
    "vectors alone": lambda a, b: saturating(a, b) if len(b) == 1 else exact(a, b),
    "matrices alone": lambda a, b: exact(a, b) if min(len(a), len(b)) == 1 else saturating(a, b),
    "what is left of 64": lambda a, b: (
        exact(a, b) + (saturating(a, b) - exact(a, b)) * (a.shape[1] % 64 > 0)
    ),
    "one place in 16": lambda a, b: exact(a, b) + (np.arange(len(b)) % 16 == 11),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_product_is_found_before_any_search(
    name: str, multiply_by: Callable[[Multiply, Multiply], None]
) -> None:
    multiply_by(FAULTY[name], FAULTY[name])
    assert "torch._int_mm gives" in str(int8.fault())
    assert not int8.worthwhile(much=True)
    X, Q = saturated(1500, 20), normal(200, 20, 1)
    with pytest.raises(
        InvalidValueError,
        match=r"^MemoryBank: algorithm='int8' needs exact.* but here torch\._int_mm gives -?\d+ "
        r"where -?\d+ is right\. Set algorithm='auto'",
    ):
        MemoryBank(algorithm="int8").fit(X)
    bank = MemoryBank(3).fit(X)
    np.testing.assert_array_equal(
        bank.kneighbors(Q)[1], MemoryBank(3).fit(X)._search_large(Q, 3)[1]
    )
    assert bank._fast_index is None
    with pytest.raises(int8.WrongProductError):
        Int8Index(X).search(Q, 3)


def test_exact_products_are_found_exact(
    multiply_by: Callable[[Multiply, Multiply], None],
) -> None:
    multiply_by(exact, exact)
    assert int8.fault() is None
    assert int8.worthwhile(much=True)
    X, Q = normal(900, 20), normal(50, 20, 1)
    bank = MemoryBank(3).fit(X)
    expected = MemoryBank(3, algorithm="faiss").fit(X).kneighbors(Q)
    np.testing.assert_array_equal(bank.kneighbors(Q)[1], expected[1])
    assert isinstance(bank._fast_index, Int8Index)


def test_a_product_that_goes_wrong_in_a_search_makes_no_wrong_neighbour(
    multiply_by: Callable[[Multiply, Multiply], None],
) -> None:
    X, Q = saturated(3000, 20), saturated(700, 20, 1)
    expected = MemoryBank(3, algorithm="faiss").fit(X).kneighbors(Q)
    multiply_by(exact, saturating)
    auto, by_name = MemoryBank(3).fit(X), MemoryBank(3, algorithm="int8").fit(X)
    for _ in range(2):
        np.testing.assert_array_equal(auto.kneighbors(Q), expected)
        assert auto._fast_index is None
        assert "torch._int_mm gives" in str(int8.fault())
    for _ in range(2):
        with pytest.raises(InvalidValueError, match=r"^MemoryBank: algorithm='int8' needs exact"):
            by_name.kneighbors(Q)
    np.testing.assert_array_equal(by_name.set_params(algorithm="auto").kneighbors(Q), expected)


def test_the_search_itself_finds_what_goes_wrong(
    multiply_by: Callable[[Multiply, Multiply], None],
) -> None:
    X, Q = saturated(3000, 20), saturated(700, 20, 1)
    multiply_by(exact, saturating)
    bank = MemoryBank(3, algorithm="int8").fit(X)
    with pytest.raises(InvalidValueError, match=r"torch\._int_mm gives"):
        bank.kneighbors(Q)
    assert bank._fast_index is None


@pytest.mark.parametrize("first", [exact, saturating])
def test_a_coreset_is_exact_whatever_the_products_are(
    first: Multiply, multiply_by: Callable[[Multiply, Multiply], None]
) -> None:
    X = skewed(2300, 20)
    bar = tqdm(total=90, disable=True)
    picks, radius = _k_center.greedy(X, 90, 7, None, bar, int8=False)
    multiply_by(first, saturating)
    assert int8.worthwhile(much=True) == (first is exact)
    for use in (None, True):
        got = _k_center.greedy(X, 90, 7, None, bar, int8=use)
        assert got[0].tolist() == picks.tolist()
        assert got[1] == radius
    assert int8.fault() is not None
    assert _k_center.radius(X, X[picks]) == radius


def test_each_sample_of_a_product_is_another(
    multiply_by: Callable[[Multiply, Multiply], None],
) -> None:
    def wrong_in_one_row(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product = np.full((len(a), len(b)), a.shape[1], np.int32)
        product[517] += 1
        return product

    multiply_by(exact, wrong_in_one_row)
    ones = np.ones((1024, 256), np.int8)
    found: list[str] = []

    def search() -> None:
        try:
            for _ in range(64):
                int8.products(ones, ones)
        except int8.WrongProductError as error:
            found.append(str(error))

    # Threads come and go with searches; two of them together look at every row.
    for _ in range(2):
        thread = threading.Thread(target=search)
        thread.start()
        thread.join()
    assert found
    assert all("gives 257 where 256 is right" in reason for reason in found)


UNDER_ANOTHER_PROCESSOR = """
import numpy as np
import torch
from test_int8 import exact, saturating, skewed, tqdm
from anomalib_lite import MemoryBank, memory_bank
from anomalib_lite.coreset import _k_center
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.neighbors import int8

codes = np.random.default_rng(0).integers(-127, 128, (2, 300, 388)).astype(np.int8)
product = torch._int_mm(torch.from_numpy(codes[0]), torch.from_numpy(codes[1]).T).numpy()
is_exact = np.array_equal(product, exact(*codes))
assert is_exact or np.array_equal(product, saturating(*codes)), "the simulation is another"
assert is_exact == (int8.fault() is None), int8.fault()

memory_bank._MANY = _k_center._MANY = 0
X, Q = skewed(9000, 384), skewed(2100, 384, 1)
expected = MemoryBank(1, algorithm="faiss").fit(X).kneighbors(Q)
bank = MemoryBank(1).fit(X)
np.testing.assert_array_equal(bank.kneighbors(Q), expected)
bank.set_params(algorithm="int8")  # as one that comes from elsewhere
if is_exact:
    np.testing.assert_array_equal(MemoryBank(1, algorithm="int8").fit(X).kneighbors(Q), expected)
else:
    for ask in (lambda: bank.kneighbors(Q), lambda: MemoryBank(algorithm="int8").fit(X)):
        try:
            ask()
        except InvalidValueError as error:
            assert "needs exact products of 8-bit integers" in str(error)
        else:
            raise AssertionError("not refused")

bar = tqdm(disable=True)
picks, radius = _k_center.greedy(X, 200, 0, None, bar, int8=False)
for use in (None, True):
    got = _k_center.greedy(X, 200, 0, None, bar, int8=use)
    np.testing.assert_array_equal(got[0], picks)
    np.testing.assert_allclose(got[1], radius, rtol=1e-5)
print("exact" if is_exact else "saturating")
"""


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT"])
def test_neighbours_and_coresets_are_exact_under_another_processor(isa: str) -> None:
    """oneDNN reads the variable once in a process, so each has its own."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", UNDER_ANOTHER_PROCESSOR]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if isa == "DEFAULT" and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        assert done.stdout.strip() == ("exact" if int8.fault() is None else "saturating")
