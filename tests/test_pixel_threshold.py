"""The threshold of heatmaps: its rate, where it comes from, and the regions above it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_fixtures import PLAIN, Small, good
from safetensors import safe_open
from safetensors.numpy import save_file
from skimage.measure import label, regionprops
from sklearn.base import clone

from anomalib_lite import (
    GatedCascade,
    MahalanobisVFM,
    PaDiM,
    PatchCore,
    ProductRouter,
    SubspaceAD,
    load,
)
from anomalib_lite.calibration import conformal_threshold
from anomalib_lite.detectors import Detections
from anomalib_lite.errors import InvalidValueError

SIZE = (24, 40)
QUICK = PLAIN | {"image_size": SIZE, "false_alarm_rate": 0.2}
DETECTORS: list[Any] = [
    PatchCore(Small(), coreset_ratio=0.5, **QUICK),
    PaDiM(Small(), n_components=8, **QUICK),
    MahalanobisVFM(Small(), **QUICK),
    SubspaceAD(Small(), n_components=3, **QUICK),
    PatchCore(Small(), coreset_ratio=0.5, fusion="per_layer", **QUICK),
    PatchCore(Small(), coreset_ratio=0.5, image_score="structure", **QUICK),
]
NAMES = ["PatchCore", "PaDiM", "MahalanobisVFM", "SubspaceAD", "per_layer", "structure"]


@pytest.fixture(params=DETECTORS, ids=NAMES)
def detector(request: pytest.FixtureRequest) -> Any:
    """A detector to fit."""
    return clone(request.param)


def images_of(n: int, seed: int = 0) -> np.ndarray:
    return good(n, seed, SIZE)


def bad_of(n: int, seed: int = 1) -> np.ndarray:
    images = images_of(n, seed)
    images[:, 6:14, 22:34] = (250, 20, 20)
    return images


def peaks_of(detector: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(detector.anomaly_map(images).max(axis=(1, 2)))


# --- Where it comes from ------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["split", "cross"])
def test_at_most_the_rate_of_normal_images_have_a_pixel_above_it(
    detector: Any, calibration: str
) -> None:
    rates = []
    for seed in range(24):
        one = clone(detector).set_params(random_state=seed, calibration=calibration)
        one.fit(images_of(24, 2 * seed))
        rates.append(np.mean(peaks_of(one, images_of(60, 2 * seed + 1)) > one.pixel_threshold_))
    error = np.std(rates, ddof=1) / len(rates) ** 0.5
    assert np.mean(rates) < 0.2 + 3 * error
    assert np.mean(rates) > 0.02  # nor is it out of reach


@pytest.mark.parametrize("name", ["PaDiM", "MahalanobisVFM", "SubspaceAD"])
def test_it_is_the_threshold_of_the_largest_values_of_heatmaps_held_back(name: str) -> None:
    # These do not learn from the images held back, so the fitted detector gives the same heatmaps.
    detector, images = clone(DETECTORS[NAMES.index(name)]), images_of(40)
    detector.fit(images)
    held_back = [int(text[len("images[") : -1]) for text in detector.calibration_names_]
    peaks = peaks_of(detector, images[held_back])
    np.testing.assert_allclose(detector.calibration_peaks_, peaks, rtol=1e-5)
    assert detector.pixel_threshold_ == conformal_threshold(detector.calibration_peaks_, 0.2)
    detector.set_params(smoothing=0.0).fit(images)
    assert detector.pixel_threshold_ > conformal_threshold(peaks, 0.2)


def test_workers_and_shards_find_the_same(detector: Any) -> None:
    images = images_of(40)
    expected = clone(detector).fit(images)
    apart = clone(detector).set_params(n_jobs=1).fit(images)
    np.testing.assert_allclose(apart.calibration_peaks_, expected.calibration_peaks_, rtol=1e-4)
    budget = clone(detector).set_params(memory_budget="600MB").fit(images)
    assert len(budget.calibration_peaks_) == len(expected.calibration_peaks_)
    if not isinstance(detector, PatchCore):  # whose coreset is another, shard by shard
        np.testing.assert_allclose(budget.calibration_peaks_, apart.calibration_peaks_, rtol=1e-4)


def test_heatmaps_larger_than_the_network_sees_stay_below_what_it_saw() -> None:
    small = images_of(40)
    large = small.repeat(3, axis=1).repeat(3, axis=2)
    detector = PaDiM(Small(), n_components=8, **QUICK).fit(large)
    held_back = [int(text[len("images[") : -1]) for text in detector.calibration_names_]
    heatmaps = detector.anomaly_map(large[held_back])
    assert heatmaps.shape[1:] == (72, 120)
    ratios = heatmaps.max(axis=(1, 2)) / detector.calibration_peaks_
    assert ratios.max() <= 1 + 1e-5
    assert ratios.min() > 0.95


def test_another_rate_and_other_images_move_it(detector: Any) -> None:
    detector.fit(images_of(60))
    peaks = detector.calibration_peaks_
    detector.set_false_alarm_rate(0.4)
    assert detector.pixel_threshold_ == conformal_threshold(peaks, 0.4)
    new = images_of(30, 9)
    detector.recalibrate(new, 0.1)
    np.testing.assert_array_equal(detector.calibration_peaks_, peaks_of(detector, new))
    np.testing.assert_array_equal(detector.calibration_scores_, detector.score(new))
    assert detector.pixel_threshold_ == conformal_threshold(detector.calibration_peaks_, 0.1)


@pytest.mark.parametrize("calibration", ["split", "cross"])
def test_an_update_moves_it_unless_it_is_ones_own(detector: Any, calibration: str) -> None:
    detector.set_params(calibration=calibration).fit(images_of(40))
    first = detector.calibration_peaks_
    own = copy.deepcopy(detector)
    own.pixel_threshold_ = 7.5
    more = images_of(30, 5)
    detector.partial_fit(more)
    peaks = detector.calibration_peaks_
    assert len(peaks) == len(detector.calibration_scores_) == len(detector.calibration_groups_)
    assert detector.pixel_threshold_ == conformal_threshold(peaks, 0.2)
    if len(peaks) > len(first) and detector.image_score != "structure":
        np.testing.assert_array_equal(peaks[: len(first)], first)
    own.partial_fit(more)
    assert own.pixel_threshold_ == 7.5
    np.testing.assert_array_equal(own.calibration_peaks_, peaks)
    assert own.set_false_alarm_rate(0.2).pixel_threshold_ == detector.pixel_threshold_


def test_a_file_holds_it(detector: Any, tmp_path: Path) -> None:
    detector.fit(images_of(40)).save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", backbone=Small())
    np.testing.assert_array_equal(again.calibration_peaks_, detector.calibration_peaks_)
    assert again.pixel_threshold_ == detector.pixel_threshold_
    again.pixel_threshold_ = 3.25
    again.save(tmp_path / "own.safetensors")
    assert load(tmp_path / "own.safetensors", backbone=Small()).pixel_threshold_ == 3.25


def test_of_an_older_file_the_threshold_of_scores_stands_for_it(tmp_path: Path) -> None:
    detector = PaDiM(Small(), n_components=8, **QUICK).fit(images_of(40))
    path = tmp_path / "model.safetensors"
    detector.save(path)
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["anomalib_lite"])
    del tensors["calibration_peaks"], header["state"]["pixel_threshold"]
    save_file(tensors, path, {"anomalib_lite": json.dumps(header)})
    old = load(path, backbone=Small())
    assert old.detect(bad_of(1)).pixel_threshold == old.threshold_
    old.set_false_alarm_rate(0.3)
    assert old.detect(bad_of(1)).pixel_threshold == old.threshold_
    old.save(path)
    assert load(path, backbone=Small()).threshold_ == old.threshold_
    old.recalibrate(images_of(30, 9))
    assert old.pixel_threshold_ == conformal_threshold(old.calibration_peaks_, 0.3)


def test_groups_count_as_in_the_threshold_of_scores() -> None:
    detector = PaDiM(Small(), n_components=8, **QUICK)
    detector.fit(images_of(60), groups=np.arange(60) // 3)
    peaks, groups = detector.calibration_peaks_, detector.calibration_groups_
    assert len(np.unique(groups)) < len(groups)
    assert detector.pixel_threshold_ == conformal_threshold(peaks, 0.2, groups=groups)


# --- Regions ------------------------------------------------------------------------------------


def test_each_anomalous_image_has_a_region_and_no_other_one_has(detector: Any) -> None:
    detector.fit(images_of(40))
    images = np.concatenate([images_of(40, 3), bad_of(6)])
    # Above the highest pixel of some images, so that the rule for these is seen as well.
    detector.threshold_ = float(np.quantile(detector.score(images), 0.5))
    detector.pixel_threshold_ = float(np.quantile(peaks_of(detector, images), 0.8))
    found = detector.detect(images)
    assert 0 < found.labels.sum() < len(images)
    for regions, anomalous in zip(found.regions(), found.labels, strict=True):
        assert bool(regions) == anomalous


def test_regions_are_those_of_scikit_image() -> None:
    heatmap = np.random.default_rng(0).gamma(2, size=(37, 53)).astype(np.float32)
    found = Detections(np.ones(1), np.array([True]), [heatmap], ["a"], pixel_threshold=3.0)
    [regions] = found.regions()
    expected = regionprops(label(heatmap > 3, connectivity=2), heatmap)
    assert len(regions) == len(expected) > 20
    assert [r.peak for r in regions] == sorted((r.peak for r in regions), reverse=True)
    wanted = {
        (r.bbox[1], r.bbox[0], r.bbox[3], r.bbox[2]): (r.area, r.intensity_max, r.intensity_mean)
        for r in expected
    }
    for region in regions:
        assert (region.area, region.peak, region.mean) == pytest.approx(wanted[region.box])
        x, y = region.peak_at
        assert heatmap[y, x] == pytest.approx(region.peak)
    assert found.regions(threshold=100.0) == [[]]


def test_regions_of_what_has_no_heatmap() -> None:
    heatmaps = [np.ones((4, 5), np.float32), None]
    found = Detections(np.ones(2), np.array([False, True]), heatmaps, ["a", "b"])
    with pytest.raises(InvalidValueError, match=r"^regions: the threshold .* is not known"):
        found.regions()
    with pytest.raises(InvalidValueError, match=r"^regions: threshold"):
        found.regions(threshold=float("nan"))
    assert [len(regions) for regions in found.regions(threshold=0.5)] == [1, 0]
    without = Detections(np.ones(2), np.array([False, True]), None, ["a", "b"])
    with pytest.raises(InvalidValueError, match=r"no heatmaps.*maps=True"):
        without.regions()


def test_a_threshold_of_ones_own_moves_the_regions_in_proportion() -> None:
    detector = PaDiM(Small(), n_components=8, **QUICK).fit(images_of(40))
    images = bad_of(2)
    level = detector.detect(images).pixel_threshold
    assert level == detector.pixel_threshold_
    detector.threshold_ = 2 * detector.calibrated_threshold_
    assert detector.detect(images).pixel_threshold == pytest.approx(2 * level)


def test_cascade_and_router_have_regions_where_they_have_heatmaps() -> None:
    images = np.concatenate([images_of(6, 3), bad_of(6)])
    one = PatchCore(Small(), coreset_ratio=0.5, **QUICK)
    cascade = GatedCascade(Small(), one, max_missed=0.3, **(QUICK | {"false_alarm_rate": 0.25}))
    cascade.fit(np.concatenate([images_of(24), bad_of(8, 7)]), [0] * 24 + [1] * 8)
    found = cascade.detect(images, maps="always")
    for regions, anomalous in zip(found.regions(), found.labels, strict=True):
        assert bool(regions) == anomalous
    router = ProductRouter(one, unknown_rate=0.25).fit(
        {"a": images_of(24), "b": 255 - images_of(24, 1)}
    )
    found = router.detect(images)
    assert found.labels.any()
    for regions, anomalous in zip(found.regions(), found.labels, strict=True):
        assert bool(regions) == anomalous
