"""Fits within a budget of memory, by many workers, and that go on: against naive versions."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from torch import nn

from anomalib_lite import PatchCore, load
from anomalib_lite._validation import check_memory
from anomalib_lite.calibration import conformal_threshold
from anomalib_lite.datasets import MVTecAD
from anomalib_lite.detectors import BaseDetector, plan_patches
from anomalib_lite.detectors._patch_accumulator import Plan
from anomalib_lite.detectors.fitting import Accumulator
from anomalib_lite.detectors.fitting.shards import _NETWORK_BYTES
from anomalib_lite.errors import (
    AnomalibLiteError,
    CalibrationWarning,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
    NotFittedError,
    WorkerError,
)
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.images.embeddings import embed_all
from anomalib_lite.metrics import auroc

HEIGHT, WIDTH = 48, 80
# What remains of it after the fixed part holds a few of the small images here.
TIGHT = 68_000_000


def embeddings(n: int, seed: int = 0, grid: tuple[int, int] = (6, 9), d: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *grid, d)).astype(np.float32)


def images(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    slope = np.linspace(90, 150, WIDTH)[:, None]
    return (slope + rng.integers(-12, 13, (n, HEIGHT, WIDTH, 3))).astype(np.uint8)


def make(**parameters: Any) -> PatchCore:
    """Its patches are 8 x 8 pixels as they are: 192 numbers, the same bits in any batch."""
    options = {"backbone": nn.PixelUnshuffle(8), "image_size": 48, "dtype": "float32"}
    options |= {"device": "cpu", "false_alarm_rate": 0.1, "coreset_ratio": 0.2}
    return PatchCore(**(options | parameters))


def budget_for(n_images: int, patches: int, d: int, *, keep: float, n_at_once: int) -> int:
    """Room for ``n_at_once`` images of a shard beside a bank of ``keep`` of all patches."""
    row, work = 4 * d, 2 * d + 32
    bank = int(keep * n_images * patches * 1.1) + 1
    return 64 * 2**20 + bank * row + 2 * n_at_once * patches * (row + work)


def assert_same(one: PatchCore, other: PatchCore) -> None:
    np.testing.assert_array_equal(one.memory_bank_.embeddings_, other.memory_bank_.embeddings_)
    np.testing.assert_array_equal(one.calibration_scores_, other.calibration_scores_)
    assert one.threshold_ == other.threshold_
    assert one.memory_bank_.covering_radius_ == other.memory_bank_.covering_radius_


def naive_coreset(rows: np.ndarray, n: int, first: int) -> list[int]:
    picks = [first]
    nearest = np.linalg.norm(rows - rows[first], axis=1)
    while len(picks) < n:
        picks.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(rows - rows[picks[-1]], axis=1))
    return sorted(picks)


# --- The budget ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "n_bytes"),
    [
        (1, 1),
        (np.int64(9), 9),
        ("512MB", 512_000_000),
        ("1GiB", 2**30),
        ("1.5 kb", 1500),
        ("2TiB", 2**41),
        ("7B", 7),
    ],
)
def test_memory_in_words(given: Any, n_bytes: int) -> None:
    assert check_memory("memory_budget", given, "PatchCore") == n_bytes


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "512", "MB", "0GB", "1 GB more", "-1GB", []])
def test_an_invalid_memory_budget_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^PatchCore: memory_budget must be .*'512MB'"):
        make(memory_budget=wrong).fit_embeddings(embeddings(8))


@pytest.mark.parametrize("grid_sizes", [1, 2])
def test_a_budget_that_holds_all_changes_nothing(grid_sizes: int) -> None:
    E: Any = embeddings(60)
    if grid_sizes == 2:
        E = [*E[:30], *embeddings(30, 1, (4, 5))]
    free = make().fit_embeddings(E)
    assert_same(make(memory_budget="1GB").fit_embeddings(E), free)
    assert free.memory_bank_.covering_radius_ > 0


@pytest.mark.parametrize("budget", ["1000TB", 10**30])
def test_a_budget_beyond_the_machine_is_a_budget(budget: Any) -> None:
    """No more room is asked for than what comes may need."""
    expected = make().fit(images(20))
    found = make(memory_budget=budget).fit(images(20))
    assert found.threshold_ == expected.threshold_
    np.testing.assert_array_equal(found.score(images(3, 7)), expected.score(images(3, 7)))


def test_each_shard_gives_the_naive_coreset_of_its_patches() -> None:
    n, ratio = 60, 0.2
    E = embeddings(n)
    budget = budget_for(n, 54, 7, keep=ratio, n_at_once=5)
    plan = plan_patches(budget, patches=54, n_features=7, ratio=ratio, n_images=n)
    assert plan == Plan(5, True, plan.capacity)
    detector = make(memory_budget=budget, coreset_ratio=ratio).fit_embeddings(E)
    random = np.random.RandomState(0)
    order, seed = random.permutation(n), copy.deepcopy(random).randint(2**31)
    to_fit = E[order[: n - 12]].astype(np.float64)  # a fifth is held back
    bank = []
    for start in range(0, len(to_fit), 5):
        rows = to_fit[start : start + 5].reshape(-1, 7)
        first = np.random.RandomState((seed + start) % 2**32).randint(len(rows))
        bank.append(rows[naive_coreset(rows, round(ratio * len(rows)), first)])
    expected = np.concatenate(bank)
    found = detector.memory_bank_.embeddings_
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-6)
    held = E[order[n - 12 :]].reshape(12, -1, 7)
    scores = [cdist(rows, expected).min(axis=1).max() for rows in held]
    np.testing.assert_allclose(detector.calibration_scores_, scores, rtol=1e-5)
    assert len(found) == pytest.approx(ratio * n * 54, rel=0.02)
    assert detector.n_absorbed_ == len(found) - len(expected)
    assert detector.n_absorbed_ > 0


@pytest.mark.parametrize("coreset", ["greedy", "random", "kmeans"])
def test_the_radius_said_is_not_exceeded(coreset: str) -> None:
    E = embeddings(80)
    budget = budget_for(80, 54, 7, keep=0.1, n_at_once=8)
    parameters: dict[str, Any] = {"coreset_ratio": 0.1, "coreset": coreset}
    detector = make(memory_budget=budget, **parameters).fit_embeddings(E)
    free = make(**parameters).fit_embeddings(E)
    bank = detector.memory_bank_
    true = cdist(E.reshape(-1, 7), bank.embeddings_).min(axis=1).max()
    assert true <= bank.covering_radius_ * (1 + 1e-5)
    if coreset == "greedy":
        assert true < 1.3 * cdist(E.reshape(-1, 7), free.memory_bank_.embeddings_).min(1).max()
        assert bank.covering_radius_ < 1.7 * free.memory_bank_.covering_radius_


def test_a_budget_too_small_names_one_that_would_do() -> None:
    E = embeddings(80, d=64)
    with pytest.raises(InvalidValueError, match="memory_budget=1,000 bytes is too small") as caught:
        make(memory_budget=1000).fit_embeddings(E)
    enough = re.search(r"Raise it to ([\d,]+MB)", str(caught.value))
    assert enough is not None
    make(memory_budget=enough[1].replace(",", "")).fit_embeddings(E)
    with pytest.raises(InvalidValueError, match="too small"):
        make(memory_budget="50MB").fit(images(8))


def test_a_bank_that_grows_beyond_its_room_is_refused() -> None:
    grids = list(embeddings(80, grid=(60, 9)))
    first = np.random.RandomState(0).permutation(80)[0]
    grids[first] = grids[first][:6]  # it foretells too little
    budget = budget_for(80, 54, 7, keep=0.1, n_at_once=2)
    with pytest.raises(InvalidValueError, match=r"memory_budget has room for .* patches"):
        make(memory_budget=budget, coreset_ratio=0.1).fit_embeddings(grids)


def test_leaving_one_out_has_no_budget() -> None:
    with pytest.raises(InvalidValueError, match=r"no memory_budget bounds.*calibration='split'"):
        make(calibration="leave_one_out", memory_budget="1GB").fit_embeddings(embeddings(8))


PEAK = """
import sys
import numpy as np
from anomalib_lite import PatchCore

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def blocks(n, seed):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield rng.normal(size=(10, 32, 32, 64)).astype(np.float32)

detector = PatchCore(coreset_ratio=0.01, false_alarm_rate=0.1, memory_budget=sys.argv[1])
PatchCore(false_alarm_rate=0.1).fit_embeddings(next(blocks(1, 1))[:, ::4, ::4])  # all is loaded
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = resident("VmRSS")
detector.fit_embeddings(blocks(60, 0))
print(resident("VmHWM") - before, len(detector.memory_bank_.embeddings_))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_the_peak_stays_within_the_budget() -> None:
    """157 MB of embeddings in 100 MB."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "100MB"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    taken, n = (int(word) for word in done.stdout.split())
    assert n == pytest.approx(0.01 * 600 * 1024, rel=0.02)
    assert taken <= 100_000_000


# --- Streams ------------------------------------------------------------------------------


def test_every_form_of_embeddings_gives_the_same(tmp_path: Path) -> None:
    E = embeddings(60)
    np.save(tmp_path / "E.npy", E)
    in_file = np.load(tmp_path / "E.npy", mmap_mode="r")
    budget = budget_for(60, 54, 7, keep=0.2, n_at_once=5)
    for memory_budget in (None, budget):
        reference = make(memory_budget=memory_budget).fit_embeddings(E)
        for form in (in_file, list(E), tuple(E), torch.from_numpy(E), E.astype(np.float64)):
            assert_same(make(memory_budget=memory_budget).fit_embeddings(form), reference)
    for blocks in (iter(E), iter([E[:7], E[7], E[8:]]), (b for b in np.split(E, 4))):
        assert_same(make().fit_embeddings(blocks), make().fit_embeddings(E))


@pytest.mark.parametrize("memory_budget", ["1GB", TIGHT])
def test_blocks_of_a_stream_do_not_matter(memory_budget: Any) -> None:
    E = embeddings(300)
    one, other = (
        make(memory_budget=memory_budget).fit_embeddings(blocks)
        for blocks in (iter(E), iter([E[:100], E[100], E[101:]]))
    )
    assert_same(one, other)
    assert len(one.calibration_scores_) == 9  # no more than the rate needs
    assert len(one.memory_bank_.embeddings_) == pytest.approx(0.2 * 300 * 54, rel=0.02)
    true = cdist(E.reshape(-1, 7), one.memory_bank_.embeddings_).min(axis=1).max()
    assert true <= one.memory_bank_.covering_radius_ * (1 + 1e-5)


def test_a_stream_is_never_all_in_memory() -> None:
    alive = [0, 0]  # now, at most

    class Counted(np.ndarray):
        def __del__(self) -> None:
            alive[0] -= 1

    def stream() -> Iterator[np.ndarray]:
        for grid in embeddings(2000, grid=(12, 9), d=32):
            block = grid.copy().view(Counted)
            alive[0] += 1
            alive[1] = max(alive)
            yield block

    budget = budget_for(2000, 108, 32, keep=0.02, n_at_once=60) + 9 * 108 * 32 * 4
    detector = make(memory_budget=budget, coreset_ratio=0.02).fit_embeddings(stream())
    assert alive[1] < 10
    assert len(detector.memory_bank_.embeddings_) == pytest.approx(0.02 * 2000 * 108, rel=0.1)


def test_images_of_a_stream_are_held_back_alike_wherever_they_stand() -> None:
    """Image i holds the number i; an image held back scores its distance to all others, 1."""
    count = np.zeros(30)
    E = np.arange(30, dtype=np.float32)[:, None, None, None] ** 2
    for seed in range(400):
        detector = make(memory_budget="1GB", coreset_ratio=1.0, random_state=seed)
        detector.fit_embeddings(iter(E))
        fitted = detector.memory_bank_.embeddings_[: -detector.n_absorbed_]
        held = np.setdiff1d(E.ravel(), fitted)
        assert len(held) == len(detector.calibration_scores_) == 9
        count[np.sqrt(held).astype(int)] += 1
    # 400 draws of 9 of 30: 120 each, with a standard deviation of 9.2.
    assert np.abs(count - 120).max() < 4 * 9.2


@pytest.mark.parametrize("n", [1, 2, 5])
def test_short_streams_hold_back_half_at_most(n: int) -> None:
    with pytest.warns(CalibrationWarning):
        detector = make(memory_budget="1GB").fit_embeddings(iter(embeddings(n)))
    assert len(detector.calibration_scores_) == n // 2


@pytest.mark.parametrize("memory_budget", [None, "1GB"])
def test_streams_that_hold_no_embeddings(memory_budget: Any) -> None:
    E = embeddings(12)
    detector = make(memory_budget=memory_budget)
    for wrong, error, message in (
        (iter([]), InvalidValueError, "E"),
        (iter([E[:4], E[5, 0]]), InvalidValueError, r"got \(1, 9, 7\)|got \(9, 7\)|for E\[4\]"),
        (iter([E[:4], E[4:, ..., :3]]), InvalidValueError, r"\(N, h, w, 7\), got .* for E\[4\]"),
        (iter([*E[:6], np.full((2, 2, 7), np.nan)]), InvalidValueError, r"E\[6\] must be finite"),
        (iter(["ab"]), InvalidTypeError, "numeric"),
    ):
        with pytest.raises(error, match=f"^PatchCore: .*{message}"):
            detector.fit_embeddings(wrong)
    assert not hasattr(detector, "threshold_")


# --- Images within a budget ---------------------------------------------------------------

# In flight are 32 images, and the network's activations.
IN_FLIGHT = 32 * (4 * 48 * 80 * 3 + 2 * 60 * 192 * 4) + _NETWORK_BYTES * 32 * 48 * 80
SHARDS_OF_8 = budget_for(60, 60, 192, keep=0.2, n_at_once=8) + IN_FLIGHT


@pytest.mark.parametrize("budget", ["1GB", SHARDS_OF_8])
def test_images_give_what_their_embeddings_give(budget: Any) -> None:
    X = images(60)
    E = X.reshape(60, 6, 8, 10, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(60, 6, 10, 192)
    assert np.isfinite(E.astype(float)).all()
    detector = make(memory_budget=budget).fit(X)
    free = make().fit(X)
    assert len(detector.memory_bank_.embeddings_) == pytest.approx(0.2 * 60 * 60, rel=0.05)
    if budget == "1GB":
        assert_same(detector, free)
    bank = detector.memory_bank_
    patches, _ = embed_all(Extractor(free.backbone_, 48), ImageSource(X))
    true = cdist(np.asarray(patches).reshape(-1, 192), bank.embeddings_).min(axis=1).max()
    assert true <= bank.covering_radius_ * (1 + 1e-5)
    assert true < 1.3 * free.memory_bank_.covering_radius_


def of_sizes(sizes: int) -> list[np.ndarray]:
    """Images of one size, or of two, which come out of their batches in another order."""
    return [image[:, : 80 - 16 * (sizes - 1) * (i % 2)] for i, image in enumerate(images(60))]


@pytest.mark.parametrize("budget", [None, SHARDS_OF_8])
@pytest.mark.parametrize("sizes", [1, 2])
def test_neither_workers_nor_batches_matter(budget: int | None, sizes: int) -> None:
    X = of_sizes(sizes)
    reference = make(memory_budget=budget).fit(X)
    for batch_size in (1, 7, 31):
        assert_same(make(memory_budget=budget, batch_size=batch_size).fit(X), reference)
    for n_jobs in (1, 2):
        with joblib.parallel_config("threading"):
            assert_same(make(memory_budget=budget, n_jobs=n_jobs).fit(X), reference)


def test_processes_do_not_matter() -> None:
    X = of_sizes(2)
    for budget in (None, SHARDS_OF_8):
        one, two = (make(memory_budget=budget, n_jobs=n).fit(X) for n in (1, 2))
        assert_same(two, one)


class Mean(BaseDetector):
    """Not a good detector: the distance of an image's mean to the mean of all patches."""

    def __init__(
        self, *, memory_budget: Any = None, calibration: str = "split", random_state: Any = 0
    ) -> None:
        self.memory_budget, self.calibration = memory_budget, calibration
        self.random_state, self.false_alarm_rate, self.batch_size = random_state, 0.1, 4

    def _check_parameters(self) -> None:
        pass

    def _make_accumulator(self, shape: Any, n_images: Any, in_flight: int, random: Any) -> Moments:
        return Moments(2 if self.memory_budget else None)

    def _fit_accumulated(self, accumulated: Moments, random: Any) -> None:
        self.mean_ = accumulated.sum / accumulated.n
        self.most_at_once_ = accumulated.most_at_once

    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distances = np.linalg.norm(E - self.mean_, axis=-1).astype(np.float32)
        return distances, distances.mean(axis=(1, 2))

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {"mean": self.mean_}, {}

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        self.mean_ = arrays["mean"]


class Moments(Accumulator):
    def __init__(self, at_once: int | None) -> None:
        self.images_per_shard = at_once or sys.maxsize
        self.n, self.sum, self.most_at_once = 0, np.float64(0), 0

    def accumulate(self, E: Any, position: int, existing: Any = None) -> Self:
        shard, rows = copy.copy(self), np.asarray(E).reshape(-1, E[0].shape[-1])
        shard.n, shard.sum, shard.most_at_once = len(rows), rows.sum(0, np.float64), len(E)
        return shard

    def merge(self, other: Self) -> None:
        self.n, self.sum = self.n + other.n, self.sum + other.sum
        self.most_at_once = max(self.most_at_once, other.most_at_once)


@pytest.mark.parametrize("form", [lambda E: E, list, iter])
def test_a_detector_of_running_moments_needs_no_more_than_the_hooks(form: Any) -> None:
    E = embeddings(40)
    whole = Mean().fit_embeddings(E)
    bounded = Mean(memory_budget="1GB").fit_embeddings(form(E))
    assert (whole.most_at_once_, bounded.most_at_once_) == (31, 2)
    if form is not iter:  # of a stream others are held back
        np.testing.assert_allclose(bounded.mean_, whole.mean_, rtol=1e-12)
        np.testing.assert_allclose(bounded.calibration_scores_, whole.calibration_scores_)
    assert np.isfinite(bounded.threshold_)


def test_a_detector_that_cannot_leave_one_out_says_so() -> None:
    with pytest.raises(InvalidValueError, match=r"^Mean: .*Use calibration='split'"):
        Mean(calibration="leave_one_out").fit_embeddings(embeddings(8))


# --- Workers ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -2, 1.5, "2", True])
def test_a_number_of_workers_that_is_none(wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^PatchCore: n_jobs must be"):
        make(n_jobs=wrong).fit(images(8))


def test_a_backend_that_cannot_give_results_one_by_one() -> None:
    with (
        joblib.parallel_config("multiprocessing"),
        pytest.raises(InvalidValueError, match=r"^PatchCore: this backend .* Use 'loky'"),
    ):
        make(n_jobs=2).fit(images(8))


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_images_are_skipped_by_workers_too(backend: str, tmp_path: Path) -> None:
    X: list[Any] = list(images(90))
    for i in (0, 5, 40, 89):
        X[i] = tmp_path / f"gone{i}.png"
    budgets = [None, SHARDS_OF_8 + 2_000_000]
    if backend == "loky":  # an error ends its processes, which are slow to start
        budgets = budgets[1:]
    for budget in budgets:
        one = make(memory_budget=budget, on_error="skip").fit(X)
        with joblib.parallel_config(backend):
            two = make(memory_budget=budget, on_error="skip", n_jobs=2).fit(X)
            assert_same(one, two)
            assert two.skipped_ == one.skipped_
            names = [Path(name).name for name, _ in two.skipped_]
            assert names == ["gone0.png", "gone5.png", "gone40.png", "gone89.png"]
            with pytest.raises(InvalidValueError, match="none of 3 images could be used"):
                make(memory_budget=budget, on_error="skip", n_jobs=2).fit([tmp_path / "gone"] * 3)
    for budget in budgets:  # last, as joblib ends its processes, slow to start, at an error
        with (
            joblib.parallel_config(backend),
            pytest.raises(MissingPathError, match=r"^PatchCore: .*gone\d+.png does not exist"),
        ):
            make(memory_budget=budget, n_jobs=2).fit(X)


@pytest.mark.parametrize("seed", range(4))
def test_one_usable_image_is_found_within_a_budget(seed: int, tmp_path: Path) -> None:
    X = [images(1)[0], tmp_path / "gone.png"]
    detector = make(on_error="skip", random_state=seed, memory_budget="1GB")
    with pytest.warns(CalibrationWarning):
        detector.fit(X)
    assert len(detector.skipped_) == 1


class Exits:
    """An image that ends the process that it is sent to."""

    shape = (HEIGHT, WIDTH, 3)

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return images(1)[0]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of joblib's resource tracker
def test_a_worker_that_ends_is_one_clear_error() -> None:
    X: list[Any] = [*images(20), Exits()]
    detector = make().fit(X)  # fine here
    before = detector.memory_bank_.embeddings_
    with pytest.raises(WorkerError, match=r"^PatchCore: a worker ended.*n_jobs=None") as caught:
        detector.set_params(n_jobs=2).fit(X)
    assert isinstance(caught.value, AnomalibLiteError)
    assert detector.memory_bank_.embeddings_ is before


def reader_of(path: Path) -> int | None:
    """Which other process has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it may have gone
            pid = int(link.parts[2])
            if pid != os.getpid() and str(link.readlink()) == str(path):
                return pid
    return None


def wait_for_reader(path: Path, other_than: int | None = None) -> int:
    while (pid := reader_of(path)) in (None, other_than):
        time.sleep(0.02)
    assert pid is not None
    return pid


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers, each a process."""
    distributed = pytest.importorskip("distributed", reason="needs dask[distributed]")
    options = {"threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    before = dict(os.environ)
    with (
        distributed.LocalCluster(n_workers=2, **options) as local,
        distributed.Client(local) as client,
    ):
        yield client
    # It leaves OMP_NUM_THREADS=1 behind, which tests that follow would obey.
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_gives_the_same(cluster: Any, tmp_path: Path) -> None:
    X: list[Any] = [*images(70), tmp_path / "gone.png"]
    with joblib.parallel_config("dask"):
        assert_same(make(n_jobs=8).fit(X[:70]), make().fit(X[:70]))
        with pytest.raises(MissingPathError, match=r"^PatchCore: .*gone.png does not exist"):
            make(n_jobs=8).fit(X)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the reader through /proc")
@pytest.mark.filterwarnings("ignore")  # distributed and its servers warn of what we do to them
@pytest.mark.parametrize("budget", [None, SHARDS_OF_8 + 2_000_000])
def test_a_worker_of_a_cluster_is_killed_at_work(
    budget: int | None, cluster: Any, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(90)]
    for path, pixels in zip(paths, images(90), strict=True):
        Image.fromarray(pixels).save(path)
    alone = make(memory_budget=budget).fit(paths)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)

    class Piped:  # workers are sent local classes as they are
        """An image that waits until we write it; meanwhile, who reads it can be found."""

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(pipe.read_bytes())))

    place = int(np.random.RandomState(0).permutation(90)[20])
    content = paths[place].read_bytes()
    given = [Piped() if path == paths[place] else path for path in paths]
    killed: list[int] = []

    def kill_the_first_reader() -> None:
        writer = os.open(pipe, os.O_RDWR)  # does not wait, and keeps readers waiting
        killed.append(wait_for_reader(pipe))
        os.kill(killed[0], signal.SIGKILL)
        killed.append(wait_for_reader(pipe, other_than=killed[0]))
        os.write(writer, content)
        os.close(writer)

    cluster.wait_for_workers(2)
    pids = list(cluster.run(os.getpid).values())
    killer = threading.Thread(target=kill_the_first_reader, daemon=True)
    killer.start()
    with joblib.parallel_config("dask"):
        detector = make(memory_budget=budget, n_jobs=8).fit(given)
    killer.join(10)
    assert killed[0] in pids
    assert killed[1] != killed[0]
    assert_same(detector, alone)


# --- Going on -----------------------------------------------------------------------------


def test_the_first_partial_fit_is_a_fit() -> None:
    X, E = images(30), embeddings(30)
    assert_same(make().partial_fit(X), make().fit(X))
    assert_same(make().partial_fit_embeddings(E), make().fit_embeddings(E))
    y = np.zeros(30, int)
    y[3] = 1
    assert_same(make().partial_fit(X, y), make().fit(np.delete(X, 3, axis=0)))


def naive_partial_fits(parts: list[np.ndarray], rate: float, seed: int) -> tuple[Any, ...]:
    """Patches fitted on, patches absorbed and calibration scores, all patches being kept."""
    d = parts[0].shape[-1]
    fitted, absorbed, scores = np.empty((0, d)), np.empty((0, d)), np.empty(0)
    for E in parts:
        order, n = np.random.RandomState(seed).permutation(len(E)), len(E)
        lacking = int(np.ceil(1 / rate - 1 - 1e-9)) - len(scores)
        n_held = min(max(lacking, n // 5), n // 2)
        new, held = E[order[: n - n_held]], E[order[n - n_held :]]
        fitted = np.concatenate([fitted, new.reshape(-1, d)])
        told = [cdist(image.reshape(-1, d), fitted).min(axis=1).max() for image in held]
        scores = np.concatenate([scores, told])
        absorbed = np.concatenate([absorbed, held.reshape(-1, d)])
    return fitted, absorbed, scores


@pytest.mark.parametrize("budget", [None, "1GB"])
@pytest.mark.parametrize("coreset", ["greedy", "random"])
def test_partial_fit_equals_a_naive_one(budget: Any, coreset: str) -> None:
    parts = [embeddings(40), embeddings(15, 1), embeddings(1, 2), embeddings(8, 3)]
    detector = make(coreset_ratio=1.0, coreset=coreset, random_state=3, memory_budget=budget)
    for E in parts:
        detector.partial_fit_embeddings(E)
    fitted, absorbed, scores = naive_partial_fits(parts, 0.1, 3)
    bank, n = detector.memory_bank_.embeddings_, len(fitted)
    assert (len(bank), detector.n_absorbed_) == (64 * 54, len(absorbed))

    def in_order(rows: np.ndarray) -> np.ndarray:
        return rows[np.lexsort(rows.T)]

    np.testing.assert_array_equal(in_order(bank[:n]), in_order(fitted))
    np.testing.assert_array_equal(in_order(bank[n:]), in_order(absorbed))
    np.testing.assert_allclose(detector.calibration_scores_, scores, rtol=1e-5)
    assert detector.threshold_ == conformal_threshold(detector.calibration_scores_, 0.1)


def test_what_is_new_is_kept_and_what_is_known_is_not() -> None:
    E = embeddings(40)
    detector = make(coreset_ratio=0.05).fit_embeddings(E)
    new = E[:10].copy()
    new[:, 2, 3] += 50  # nothing like it is there yet
    before = len(detector.memory_bank_.embeddings_)
    detector.partial_fit_embeddings(new)
    bank = detector.memory_bank_.embeddings_
    assert len(bank) == before + round(0.05 * 8 * 54) + round(0.05 * 2 * 54)
    assert cdist(new.reshape(-1, 7), bank).min(axis=1).max() < detector.threshold_ + 1
    assert (bank > 30).any()


@pytest.mark.parametrize("image_score", ["max", "top1%"])
def test_no_score_rises_by_going_on(image_score: str) -> None:
    questions = embeddings(100, 9)
    detector = make(image_score=image_score).fit_embeddings(embeddings(40))
    before = detector.score_embeddings(questions)
    detector.partial_fit_embeddings(embeddings(20, 1))
    risen = detector.score_embeddings(questions) - before
    assert risen.max() <= 1e-6
    assert risen.min() < -1e-3


@pytest.mark.parametrize("parameters", [{}, {"image_score": "reweighted"}])
def test_future_false_alarms_stay_below_the_rate_after_going_on(parameters: Any) -> None:
    rate, alarms, n_draws = 0.2, [], 40
    for draw in range(n_draws):
        detector = make(false_alarm_rate=rate, random_state=draw, coreset_ratio=0.5, **parameters)
        for part in range(3):
            E = embeddings(12, 10 * draw + part, (2, 3), 3)
            detector.partial_fit_embeddings(E)
        future = detector.score_embeddings(embeddings(100, 10 * draw + 9, (2, 3), 3))
        alarms.append((future > detector.threshold_).mean())
    # At least 4 are held back: over draws the rate is at worst distributed as Beta(1, 4).
    assert np.mean(alarms) <= rate + 4 * np.sqrt((0.2 * 0.8 / 6 + 0.16 / 100) / n_draws)
    assert np.mean(alarms) > 0.01


@pytest.mark.parametrize("parameters", [{"index": "HNSW16"}, {"image_score": "reweighted"}])
def test_where_scores_may_rise_only_new_ones_count(parameters: dict[str, Any]) -> None:
    detector = make(**parameters).fit_embeddings(embeddings(40))
    old = copy.copy(detector)
    n, questions = len(old.memory_bank_.embeddings_), embeddings(5, 9)
    answers = old.score_embeddings(questions)
    detector.partial_fit_embeddings(embeddings(20, 1))
    assert len(detector.calibration_scores_) == 9
    order = np.random.RandomState(0).permutation(20)
    held = embeddings(20, 1)[order[11:]]
    np.testing.assert_allclose(
        detector.score_embeddings(held), detector.calibration_scores_, rtol=1e-5
    )
    assert len(detector.memory_bank_.embeddings_) == n + round(0.2 * 11 * 54)
    if "index" in parameters:
        assert detector.memory_bank_.index_.ntotal == len(detector.memory_bank_.embeddings_)
    assert len(old.memory_bank_.embeddings_) == n
    np.testing.assert_array_equal(old.score_embeddings(questions), answers)
    with pytest.warns(CalibrationWarning, match="got 2"):
        detector.partial_fit_embeddings(embeddings(4, 2))


def test_images_of_a_new_kind_stop_being_alarms() -> None:
    bright = np.clip(images(60, 5).astype(int) + 60, 0, 255).astype(np.uint8)
    detector = make().fit(images(40))
    assert (detector.predict(bright[40:]) == -1).all()
    detector.partial_fit(bright[:40])
    assert (detector.predict(bright[40:]) == 1).mean() >= 0.8
    scratched = images(4, 7)
    scratched[:, 20:28, 30:60] = (250, 20, 20)
    assert (detector.predict(scratched) == -1).all()


@pytest.mark.parametrize("index", ["flat", "HNSW16"])
def test_going_on_after_loading_is_as_without(index: str, tmp_path: Path) -> None:
    X, more = images(30), images(24, 1)
    detector = make(backbone="efficientnet_lite0", index=index).fit(X)
    detector.save(tmp_path / "model.safetensors", include_backbone=True)
    again = load(tmp_path / "model.safetensors")
    assert again.n_absorbed_ == detector.n_absorbed_
    assert_same(again.partial_fit(more), detector.partial_fit(more))


def test_files_that_say_nothing_of_calibration_images_can_go_on() -> None:
    path = Path(__file__).parent / "fixtures" / "patchcore_v1.safetensors"
    detector = load(path)
    n = len(detector.memory_bank_.embeddings_)
    detector.partial_fit_embeddings(embeddings(10, grid=(3, 5), d=6))
    assert len(detector.memory_bank_.embeddings_) > n


@pytest.mark.parametrize(
    ("new", "error"),
    [
        ([*images(7), np.full((20, 30, 3), np.nan)], AnomalibLiteError),
        ([], InvalidValueError),
        ([Path("gone.png")], MissingPathError),
    ],
)
def test_a_failure_leaves_it_as_it_was(new: Any, error: type[Exception]) -> None:
    detector = make().fit(images(30))
    before = {k: v for k, v in vars(detector).items() if k.endswith("_")}
    n = len(detector.memory_bank_.embeddings_)
    with pytest.raises(error):
        detector.partial_fit(new)
    assert {k: v for k, v in vars(detector).items() if k.endswith("_")} == before
    assert len(detector.memory_bank_.embeddings_) == n


def test_partial_fit_refuses_other_input_and_leave_one_out() -> None:
    detector = make().fit_embeddings(embeddings(30))
    with pytest.raises(NotFittedError, match="partial_fit_embeddings"):
        detector.partial_fit(images(4))
    with pytest.raises(InvalidValueError, match=r"\(N, h, w, 7\), got \(6, 9, 3\)"):
        detector.partial_fit_embeddings(embeddings(4, d=3))
    detector = make(calibration="leave_one_out").fit_embeddings(embeddings(30))
    with pytest.raises(InvalidValueError, match="needs a fit with calibration='split'"):
        detector.partial_fit_embeddings(embeddings(4))


def test_images_left_out_are_added_to_the_list(tmp_path: Path) -> None:
    detector = make(on_error="skip").fit([*images(30), tmp_path / "one.png"])
    detector.partial_fit([*images(8, 1), tmp_path / "two.png"])
    assert [Path(name).name for name, _ in detector.skipped_] == ["one.png", "two.png"]


# --- Real photographs ---------------------------------------------------------------------


@pytest.mark.nightly
def test_a_budget_costs_no_accuracy_on_real_images(data_dir: Path) -> None:
    if not (data_dir / "magnetic_tile").is_dir():
        pytest.skip(f"no magnetic_tile in {data_dir}")
    dataset = MVTecAD(data_dir, "magnetic_tile")
    train, test = dataset.train[::2], dataset.test[::2]
    y = [sample.label for sample in test]
    # Hardly two are of one size, and torch needs no graph for each.
    parameters: dict[str, Any] = {"image_size": 128, "coreset_ratio": 0.02, "dtype": "float32"}
    parameters["engine"] = "torch"
    with pytest.raises(InvalidValueError) as caught:
        PatchCore(memory_budget=1, **parameters).fit(train)
    least = re.search(r"Raise it to ([\d,]+)MB", str(caught.value))
    assert least is not None
    budget = int(least[1].replace(",", "")) * 10**6 + 12_000_000
    free, bounded = (
        PatchCore(memory_budget=memory, **parameters).fit(train) for memory in (None, budget)
    )
    assert bounded.memory_bank_.covering_radius_ != free.memory_bank_.covering_radius_
    expected = auroc(y, free.score(test))
    assert expected > 0.8
    assert auroc(y, bounded.score(test)) == pytest.approx(expected, abs=0.02)
