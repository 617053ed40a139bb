"""Which patches are background, learned from normal images: they score 0, and nothing else does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from detector_fixtures import HEIGHT, PLAIN, WIDTH, Small, good
from safetensors import safe_open
from scipy.ndimage import binary_dilation, binary_fill_holes

from anomalib_lite import PatchCore, load
from anomalib_lite.detectors._foreground import PatchSample, learn_foreground, object_patches
from anomalib_lite.errors import InvalidTypeError, InvalidValueError

QUICK: dict[str, Any] = PLAIN | {"image_size": 48, "false_alarm_rate": 0.25}
OBJECT = np.s_[12:36, 16:64]  # 6 x 12 of 12 x 20 cells


def make(**parameters: Any) -> PatchCore:
    return PatchCore(Small(), **(QUICK | {"foreground": True} | parameters))


def parts(n: int, seed: int = 0, bright: bool = True) -> np.ndarray:
    """Return images of an object in the middle of a background."""
    rng = np.random.default_rng(seed)
    back, front = (30, 200) if bright else (200, 30)
    images = rng.integers(back - 20, back + 21, (n, HEIGHT, WIDTH, 3))
    images[(slice(None), *OBJECT)] = rng.integers(front - 20, front + 21, (n, 24, 48, 3))
    return images.astype(np.uint8)


def naive_mask(grid: np.ndarray, sample: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Return the patches on the object, written down: PCA by SVD, Otsu by trying every cut."""
    rows = sample.reshape(-1, sample.shape[-1]).astype(np.float64)
    mean = rows.mean(axis=0)
    component = np.linalg.svd(rows - mean, full_matrices=False)[2][0]
    values = (sample.astype(np.float64) - mean) @ component
    if values[:, middle].mean() < values.mean():
        component, values = -component, -values
    cuts = np.unique(values)
    cuts = (cuts[1:] + cuts[:-1]) / 2

    def between(cut: float) -> float:
        low, high = values[values < cut], values[values > cut]
        return float(low.size * high.size * (low.mean() - high.mean()) ** 2)

    cut = max(cuts, key=between)
    mask = (grid.astype(np.float64) - mean) @ component > cut
    return np.stack([binary_dilation(binary_fill_holes(m), np.ones((3, 3))) for m in mask])


@pytest.mark.parametrize("bright", [True, False])
def test_the_mask_is_that_written_down(bright: bool) -> None:
    detector = make(calibration="leave_one_out").fit(parts(6, bright=bright))
    E = detector.backbone_.embed(parts(6, bright=bright))
    new = detector.backbone_.embed(parts(4, 1, bright))
    middle = np.zeros((12, 20), bool)
    middle[3:9, 5:15] = True
    expected = naive_mask(new, E[:, 2:-2, 2:-2], middle[2:-2, 2:-2])
    np.testing.assert_array_equal(object_patches(new, detector.foreground_), expected)
    assert expected[:, 3:9, 4:16].all()  # the object
    assert not expected[:, [0, -1]].any()
    assert not expected[:, :, [0, -1]].any()


def test_background_scores_nothing_and_the_object_as_before() -> None:
    detector, plain = make().fit(parts(16)), make(foreground=False).fit(parts(16))
    images = parts(3, 1)
    images[0, :8, :8] = (250, 0, 0)  # dirt on the background
    images[1, 20:28, 30:40] = (250, 0, 0)  # a defect on the object
    E = detector.backbone_.embed(images)
    mask = object_patches(E, detector.foreground_)
    masked, whole = detector._score_patches(E)[0], plain._score_patches(E)[0]
    assert (masked[~mask] == 0).all()
    np.testing.assert_array_equal(masked[mask], whole[mask])
    scores = detector.score(images)
    assert scores[[0, 2]].max() < 0.7 * scores[1]
    assert plain.score(images)[0] > 0.7 * plain.score(images)[1]
    maps = detector.anomaly_map(images)
    assert maps[0, :4, :4].max() == pytest.approx(0, abs=1e-3)
    calibration = make(calibration="leave_one_out").fit(parts(16)).calibration_scores_
    assert (calibration > 0).all()


def test_a_hole_that_looks_like_background_is_seen() -> None:
    images = parts(2, 1)
    images[0, 20:28, 32:44] = 30
    detector = make().fit(parts(16))
    assert (detector.score(images) > detector.threshold_).tolist() == [True, False]


def squares(n: int) -> np.ndarray:
    """Return images that look alike everywhere."""
    small = np.random.default_rng(0).integers(30, 220, (n, 6, 10, 3)).astype(np.uint8)
    return small.repeat(8, axis=1).repeat(8, axis=2)


@pytest.mark.parametrize("images", [good(16), squares(16)], ids=["slope", "squares"])
def test_without_an_object_it_is_refused(images: np.ndarray) -> None:
    detector = make()
    with pytest.raises(InvalidValueError, match=r"^PatchCore: foreground=True finds no object: "):
        detector.fit(images)
    assert not hasattr(detector, "threshold_")


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (1, 9)])
def test_grids_without_a_middle_are_refused(shape: tuple[int, int]) -> None:
    E = np.random.default_rng(0).normal(size=(12, *shape, 3)).astype(np.float32)
    with pytest.raises(InvalidValueError, match="finds no object"):
        make().fit_embeddings(E)


def test_a_large_grid_is_sampled() -> None:
    E = np.zeros((40, 100, 70, 2), np.float32)
    E[:, 30:70, 20:50] = 1
    sample = PatchSample.of(E, 3)
    assert len(sample.rows) == 29 * 30 * 20
    component = learn_foreground(sample, "test")
    mask = object_patches(E[:1], component)[0]
    assert mask[29:71, 19:51].all()
    assert mask.sum() == 42 * 32


@pytest.mark.parametrize("normalize", [False, True])
def test_workers_and_budgets_do_not_matter(normalize: bool) -> None:
    images = [image[:, : WIDTH - 16 * (i % 2)] for i, image in enumerate(parts(40))]
    parameters: dict[str, Any] = {"normalize": normalize, "coreset_size": 500}
    reference = make(**parameters).fit(images)
    for options in ({"memory_budget": "1GB"}, {"n_jobs": 2}, {"memory_budget": "1GB", "n_jobs": 2}):
        with joblib.parallel_config("threading"):
            other = make(**parameters, **options).fit(images)
        np.testing.assert_array_equal(other.foreground_, reference.foreground_)
        np.testing.assert_array_equal(other.score(parts(3, 1)), reference.score(parts(3, 1)))
        assert other.threshold_ == reference.threshold_
    if normalize:  # processes are slow to start
        two = make(**parameters, n_jobs=2, memory_budget="1GB").fit(images)
        np.testing.assert_array_equal(two.foreground_, reference.foreground_)


def test_it_stays_when_more_is_learned() -> None:
    detector = make().fit(parts(16))
    before = detector.foreground_
    scores = detector.score(parts(6, 2))
    detector.partial_fit(parts(8, 3))
    assert detector.foreground_ is before
    assert (detector.score(parts(6, 2)) <= scores + 1e-6).all()


def test_with_regions_to_ignore() -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, :8] = True
    detector = make().fit(parts(16), ignore_mask=mask)
    images = parts(2, 1)
    images[0, 20:28, 30:40] = (250, 0, 0)
    assert (detector.score(images) > detector.threshold_).tolist() == [True, False]


def test_a_file_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    detector = make(position_window=1).fit(parts(16))
    detector.save(path)
    again, images = load(path, backbone=Small()), parts(4, 1)
    np.testing.assert_array_equal(again.score(images), detector.score(images))
    np.testing.assert_array_equal(again.anomaly_map(images), detector.anomaly_map(images))
    with safe_open(path, "np") as file:
        assert "foreground" in set(file.keys())
    broken = copy.copy(detector)
    broken.foreground_ = detector.foreground_[1:]
    arrays, state = broken._get_state()
    with pytest.raises(ValueError, match="foreground has shape"):
        make(position_window=1)._set_state(arrays, state)


@pytest.mark.parametrize("foreground", ["yes", 1, None])
def test_other_values_are_refused(foreground: Any) -> None:
    with pytest.raises(InvalidTypeError, match="foreground must be True or False"):
        make(foreground=foreground).fit(parts(8))


def test_layers_of_their_own_have_no_foreground() -> None:
    detector = PatchCore(foreground=True, fusion="per_layer")
    with pytest.raises(InvalidValueError, match=r"foreground=True needs one model.*another fusion"):
        detector.fit(np.zeros((4, 64, 64, 3), np.uint8))
    with pytest.raises(InvalidValueError, match="whiten=True makes all directions vary alike"):
        PatchCore(foreground=True, whiten=True).fit(np.zeros((4, 64, 64, 3), np.uint8))
