"""Patches compared with those near their own place: against loops over positions in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from detector_fixtures import HEIGHT, PLAIN, WIDTH, Small, bad, good
from safetensors import safe_open

from anomalib_lite import PatchCore, load
from anomalib_lite.calibration import conformal_threshold
from anomalib_lite.detectors._position_window import PatchBank, patch_cells
from anomalib_lite.errors import InvalidValueError

QUICK: dict[str, Any] = PLAIN | {"image_size": 48, "false_alarm_rate": 0.25}


def make(**parameters: Any) -> PatchCore:
    return PatchCore(Small(), **(QUICK | {"position_window": 1} | parameters))


def embeddings(n: int, seed: int = 0, grid: tuple[int, int] = (5, 7), d: int = 6) -> np.ndarray:
    """Return embeddings that differ from place to place, around a point far from zero."""
    rng = np.random.default_rng(seed)
    places = np.random.default_rng(99).normal(size=(*grid, d)) + 20
    return (places + 0.3 * rng.normal(size=(n, *grid, d))).astype(np.float32)


def naive_scores(
    E: np.ndarray, bank: np.ndarray, places: np.ndarray, reach: np.ndarray, k: int = 1
) -> np.ndarray:
    """Score each patch (B, h, w) by loops, on a grid of the same size as the bank's."""
    scores = np.zeros(E.shape[:3])
    for b, r, c in np.ndindex(*E.shape[:3]):
        if np.isnan(E[b, r, c, 0]):
            continue
        near = [
            float(np.linalg.norm(E[b, r, c].astype(np.float64) - row))
            for row, (y, x) in zip(bank, places, strict=True)
            if max(abs(y - r), abs(x - c)) <= reach[r, c]
        ]
        scores[b, r, c] = np.mean(sorted(near)[:k])
    return scores


def naive_reach(places: np.ndarray, grid: tuple[int, int], window: int, k: int) -> np.ndarray:
    reach = np.zeros(grid, int)
    for r, c in np.ndindex(*grid):
        away = sorted(max(abs(y - r), abs(x - c)) for y, x in places)
        reach[r, c] = max(window, away[k - 1])
    return reach


def places_of(detector: PatchCore) -> np.ndarray:
    bank: Any = detector.memory_bank_
    return np.stack(np.divmod(bank.cells_, bank.grid[1]), axis=1)


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("grid", [(5, 7), (11, 9)])
def test_scores_are_those_of_loops(window: int, k: int, grid: tuple[int, int]) -> None:
    parameters: Any = {"position_window": window, "n_neighbors": k, "coreset_ratio": 0.2}
    detector = make(**parameters).fit_embeddings(embeddings(12, grid=grid))
    bank = detector.memory_bank_
    assert bank.grid == grid
    E = embeddings(3, 1, grid)
    E[1, 2, 3] += 4
    E[2, 1:3, 2:4] = np.nan
    places = places_of(detector)
    n = len(places) - detector.n_absorbed_
    np.testing.assert_array_equal(bank.reach_, naive_reach(places[:n], grid, window, k))
    expected = naive_scores(E, bank.embeddings_, places, bank.reach_, k)
    patch_scores, scores = detector._score_patches(E)
    np.testing.assert_allclose(patch_scores, expected, rtol=1e-5)
    np.testing.assert_allclose(scores, expected.max(axis=(1, 2)), rtol=1e-5)
    assert (patch_scores[2, 1:3, 2:4] == 0).all()
    if window == 100:
        whole = PatchCore(**(detector.get_params(deep=False) | {"position_window": None}))
        whole.fit_embeddings(embeddings(12, grid=grid))
        np.testing.assert_allclose(whole.score_embeddings(E[:2]), scores[:2], rtol=1e-5)


def test_the_bank_knows_where_its_patches_lie() -> None:
    """A patch of another place is no excuse, though it is in the bank."""
    E = embeddings(20)
    detector = make(position_window=0, coreset_ratio=1.0).fit_embeddings(E)
    for row, (y, x) in zip(detector.memory_bank_.embeddings_, places_of(detector), strict=True):
        assert (E[:, y, x] == row).all(axis=1).any()
    swapped = E[:1].copy()
    swapped[0, 1, 1], swapped[0, 4, 6] = E[0, 4, 6], E[0, 1, 1]
    whole = make(position_window=None, coreset_ratio=1.0).fit_embeddings(E)
    assert whole.score_embeddings(swapped)[0] == pytest.approx(0, abs=1e-4)
    assert detector.score_embeddings(swapped)[0] > detector.threshold_


def test_large_searches_go_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    E, X = embeddings(12), embeddings(6, 1)
    detector = make(n_neighbors=2, coreset_ratio=1.0).fit_embeddings(E)
    expected = detector._score_patches(X)[0]
    place = "anomalib_lite.detectors._position_window."
    monkeypatch.setattr(f"{place}_BLOCK_ROWS", 7)
    monkeypatch.setattr(f"{place}_VALUES", 40)
    np.testing.assert_allclose(detector._score_patches(X)[0], expected, rtol=1e-6)


def test_a_cell_without_patches_looks_further() -> None:
    """A region is ignored in fitting, and looked at afterwards."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:16, :24] = True  # 4 x 6 cells
    detector = make(position_window=0, coreset_ratio=1.0).fit(good(12), ignore_mask=mask)
    bank: Any = detector.memory_bank_
    np.testing.assert_array_equal(
        bank.reach_, naive_reach(np.unique(places_of(detector), axis=0), bank.grid, 0, 1)
    )
    assert (bank.reach_[0, 0], bank.reach_[0, 5], bank.reach_[5, 8]) == (4, 1, 0)
    scores = detector.detect(good(3, 2), ignore_mask=[None] * 3).scores
    assert np.isfinite(scores).all()


def test_a_window_beyond_all_grids_sees_all() -> None:
    E, Q = embeddings(20), embeddings(3, 5)
    found = make(position_window=2**40).fit_embeddings(E).score_embeddings(Q)
    np.testing.assert_array_equal(
        found, make(position_window=7).fit_embeddings(E).score_embeddings(Q)
    )


def test_cells_of_another_grid_are_where_the_centre_lies() -> None:
    for height, width in ((5, 7), (10, 14), (3, 4), (8, 5), (1, 1)):
        E = np.zeros((2, height, width, 1), np.float32)
        E[1, 0, 0] = np.nan
        expected = [
            int((r + 0.5) / height * 5) * 7 + int((c + 0.5) / width * 7)
            for b in range(2)
            for r in range(height)
            for c in range(width)
            if (b, r, c) != (1, 0, 0)
        ]
        assert patch_cells(E, (5, 7)).tolist() == expected
        assert patch_cells(list(E), (5, 7)).tolist() == expected


def test_images_of_other_sizes_are_scaled_to_the_grid_of_the_first() -> None:
    sizes = [(HEIGHT, WIDTH), (60, 48), (96, 200)]
    images = [image for i, size in enumerate(sizes) for image in good(5, i, size)]
    detector = make(random_state=3).fit(images)
    first = np.random.RandomState(3).permutation(15)[0]
    bank: Any = detector.memory_bank_
    assert bank.grid == [(12, 20), (15, 12), (12, 25)][first // 5]
    found = detector.detect([*good(2, 9), *good(2, 9, (60, 48))])
    assert np.isfinite(found.scores).all()


@pytest.mark.parametrize("n_neighbors", [1, 2])
def test_leaving_one_out_leaves_its_places_out(n_neighbors: int) -> None:
    E = embeddings(6)
    detector = make(
        calibration="leave_one_out", coreset_ratio=1.0, position_window=0, n_neighbors=n_neighbors
    ).fit_embeddings(E)
    for i, score in enumerate(detector.calibration_scores_):
        others = np.delete(E, i, axis=0)
        distances = np.sort(np.linalg.norm(others - E[i].astype(np.float64), axis=-1), axis=0)
        assert score == pytest.approx(distances[:n_neighbors].mean(axis=0).max(), rel=1e-5)


def test_no_score_rises_by_more_patches() -> None:
    """The reach stays as it was, though nearer patches have come, at a greater distance."""
    E = embeddings(12, grid=(1, 5))
    E[:, 0, 1:4] = np.nan
    detector = make(position_window=0, coreset_ratio=1.0)
    accumulated = detector._make_accumulator((1, 5, 6), 12, 0, np.random.RandomState(0))
    detector._fit_accumulated(accumulated.accumulate(E, 0), np.random.RandomState(0))
    bank: Any = detector.memory_bank_
    assert bank.reach_.tolist() == [[0, 1, 2, 1, 0]]
    question = np.repeat(E[:1, :, :1], 5, axis=2)
    before = detector._score_patches(question)[0]
    assert before[0, 0, :3].max() < 1e-4
    far = embeddings(3, 1, (1, 5)) + 50
    detector._fit_accumulated(accumulated.accumulate(far, 0), np.random.RandomState(0))
    assert detector.memory_bank_.reach_.tolist() == [[0, 1, 2, 1, 0]]  # type: ignore[attr-defined]
    assert (detector._score_patches(question)[0] <= before).all()


@pytest.mark.parametrize("budget", [None, "1GB"])
def test_going_on(budget: Any) -> None:
    parts = [embeddings(20), embeddings(9, 1), embeddings(5, 2)]
    detector = make(coreset_ratio=1.0, memory_budget=budget)
    questions = embeddings(8, 9)
    before = None
    for E in parts:
        detector.partial_fit_embeddings(E)
        scores = detector.score_embeddings(questions)
        assert before is None or (scores <= before + 1e-6).all()
        before = scores
    bank: Any = detector.memory_bank_
    assert len(bank.embeddings_) == len(bank.cells_) == 34 * 35
    assert (np.bincount(bank.cells_) == 34).all()
    everything = np.concatenate(parts)
    for row, (y, x) in zip(bank.embeddings_, places_of(detector), strict=True):
        assert (everything[:, y, x] == row).all(axis=1).any()
    assert detector.threshold_ == conformal_threshold(detector.calibration_scores_, 0.25)


@pytest.mark.parametrize("sizes", [1, 2])
def test_workers_and_shards_keep_the_places(sizes: int) -> None:
    images = [image[:, : WIDTH - 16 * (i % sizes)] for i, image in enumerate(good(24))]
    parameters: dict[str, Any] = {"coreset_ratio": 1.0, "batch_size": 5}
    free = make(**parameters).fit(images)
    for options in (
        {"memory_budget": "1GB"},
        {"n_jobs": 2},
        {"memory_budget": "1GB", "n_jobs": 2},
    ):
        # Processes are slow to start: images of one size are left to threads.
        with joblib.parallel_config("loky" if sizes == 2 else "threading"):
            other: Any = make(**parameters, **options).fit(images)
        by_row = [
            np.lexsort(bank.embeddings_.T) for bank in (other.memory_bank_, free.memory_bank_)
        ]
        bank: Any = free.memory_bank_
        np.testing.assert_array_equal(
            other.memory_bank_.embeddings_[by_row[0]], bank.embeddings_[by_row[1]]
        )
        np.testing.assert_array_equal(other.memory_bank_.cells_[by_row[0]], bank.cells_[by_row[1]])
        np.testing.assert_array_equal(other.memory_bank_.reach_, bank.reach_)
        np.testing.assert_allclose(other.threshold_, free.threshold_, rtol=1e-6)


def test_thinned_shards_keep_the_places() -> None:
    E = embeddings(400, grid=(12, 9), d=32)
    budget = 64 * 2**20 + 3 * 2**20
    one, two = (
        make(memory_budget=budget, coreset_ratio=0.05).fit_embeddings(given)
        for given in (E, list(E))
    )
    bank: Any = one.memory_bank_
    assert one._make_accumulator((12, 9, 32), 400, 0, np.random.RandomState(0)).thinned
    cells = np.tile(np.arange(108), 400)
    cell_of = {row.tobytes(): cell for row, cell in zip(E.reshape(-1, 32), cells, strict=True)}
    assert [cell_of[row.tobytes()] for row in bank.embeddings_] == bank.cells_.tolist()
    np.testing.assert_array_equal(bank.cells_, two.memory_bank_.cells_)  # type: ignore[attr-defined]


def test_tiles_lie_in_the_whole_image() -> None:
    detector = make(tile=32, overlap=16, image_size=32, coreset_ratio=0.5).fit(good(12))
    bank: Any = detector.memory_bank_
    assert bank.grid == (HEIGHT // 4, WIDTH // 4)
    assert np.unique(bank.cells_).size > 0.9 * bank.reach_.size
    assert (detector.score(bad(3)) > detector.threshold_).all()


def test_a_file_keeps_the_places(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    detector = make().fit(good(16))
    detector.save(path)
    again = load(path, backbone=Small())
    images = np.concatenate([good(3, 2), bad(3)])
    found, expected = again.detect(images), detector.detect(images)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.maps, expected.maps)
    with safe_open(path, "np") as file:
        tensors = set(file.keys())
    assert tensors == {
        "calibration_peaks",
        "calibration_scores",
        "embeddings",
        "positions",
        "reach",
    }
    going_on = [copy.deepcopy(d).partial_fit(good(5, 7)) for d in (again, detector)]
    np.testing.assert_array_equal(*(d.score(images) for d in going_on))
    make(position_window=None).fit(good(16)).save(path)
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {"calibration_peaks", "calibration_scores", "embeddings"}


@pytest.mark.parametrize(
    ("positions", "reach"),
    [
        (np.zeros(3, np.int32), np.zeros((5, 7), np.int32)),
        (np.zeros(4, np.int32), np.zeros(35, np.int32)),
        (np.full(4, 35, np.int32), np.zeros((5, 7), np.int32)),
        (np.full(4, -1, np.int32), np.zeros((5, 7), np.int32)),
        (np.zeros(4, np.int32), np.full((5, 7), -1, np.int32)),
    ],
)
def test_places_that_do_not_fit_are_refused(positions: np.ndarray, reach: np.ndarray) -> None:
    bank = PatchBank().fit(np.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match="positions"):
        bank.place(positions, reach)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"position_window": -1}, "position_window must be a whole number of at least 0"),
        ({"position_window": 1.5}, "position_window must be a whole number"),
        ({"position_window": True}, "position_window must be a whole number"),
        ({"index": "HNSW32"}, "position_window .* needs index='flat', got 'HNSW32'"),
        ({"image_score": "reweighted"}, "image_score='reweighted' .* no position_window bounds"),
    ],
)
def test_what_it_cannot_go_with_is_refused(parameters: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^PatchCore: {message}"):
        make(**parameters).fit_embeddings(embeddings(8))
