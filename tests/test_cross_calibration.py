"""Calibration on all images: each is scored by a model without its fold, as separate fits do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_fixtures import PLAIN, Small, good
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.base import clone

from anomalib_lite import MahalanobisVFM, PaDiM, PatchCore, SubspaceAD, load
from anomalib_lite.calibration import conformal_threshold
from anomalib_lite.detectors.fitting import folds_of, order_of_fit
from anomalib_lite.errors import InvalidValueError

SIZE = (24, 40)
QUICK = PLAIN | {"image_size": SIZE, "false_alarm_rate": 0.2, "calibration": "cross"}
# All patches and channels, so that nothing but the images decides.
DETECTORS: list[Any] = [
    PatchCore(Small(), coreset="random", coreset_ratio=1.0, **QUICK),
    PaDiM(Small(), n_components=20, **QUICK),
    MahalanobisVFM(Small(), **QUICK),
    SubspaceAD(Small(), n_components=3, **QUICK),
]
NAMES = [type(detector).__name__ for detector in DETECTORS]
GROUPS = np.repeat(np.arange(12), [1, 2, 3] * 4)  # of 24 images


def images_of(n: int, seed: int = 0) -> np.ndarray:
    return good(n, seed, SIZE)


@pytest.fixture(params=DETECTORS, ids=NAMES)
def detector(request: pytest.FixtureRequest) -> Any:
    """A detector to fit."""
    return clone(request.param)


def folds(n: int, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of fitting, and the fold of each image in it."""
    random = np.random.RandomState(0)
    order = random.permutation(n)
    if groups is None:
        return order, folds_of(np.arange(n), 10)
    order = order_of_fit(order, groups, random)
    return order, folds_of(groups[order], 10)


def naive_scores(detector: Any, images: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Fit on all other folds, once for each, and score the fold."""
    order, of_fold = folds(len(images), groups)
    one = clone(detector).set_params(calibration="leave_one_out")  # which fits on all it is given
    scores = [
        copy.copy(one).fit(images[order[of_fold != fold]]).score(images[order[of_fold == fold]])
        for fold in range(of_fold.max() + 1)
    ]
    return np.concatenate(scores)


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["images", "groups"])
@pytest.mark.parametrize("fusion", [None, "per_layer"])
def test_each_fold_is_scored_by_a_fit_on_the_others(
    detector: Any, fusion: str | None, groups: np.ndarray | None
) -> None:
    images = images_of(24)
    detector.set_params(fusion=fusion or detector.fusion).fit(images, groups=groups)
    expected = naive_scores(detector, images, groups)
    np.testing.assert_allclose(detector.calibration_scores_, expected, rtol=2e-4)
    order, of_fold = folds(24, groups)
    ids = order if groups is None else groups[order]
    _, positions = np.unique(detector.calibration_groups_, return_inverse=True)
    assert len(set(zip(positions.tolist(), ids.tolist(), strict=True))) == len(np.unique(ids))
    for group in np.unique(ids):  # no group is in two folds
        assert len(set(of_fold[ids == group])) == 1


def test_all_images_are_fitted_on(detector: Any) -> None:
    images, questions = images_of(24), images_of(6, 8)
    detector.fit(images)
    everything = clone(detector).set_params(calibration="leave_one_out").fit(images)
    found, wanted = detector.score(questions), everything.score(questions)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert detector.calibration_ == "cross"
    assert len(detector.calibration_scores_) == 24


@pytest.mark.parametrize("which", [0, 2, 3])
def test_copies_are_left_out_with_their_image(which: int) -> None:
    images, detector = images_of(24), clone(DETECTORS[which])
    detector.set_params(augment="flips").fit(images)
    np.testing.assert_allclose(
        detector.calibration_scores_, naive_scores(detector, images, None), rtol=2e-4
    )


def test_a_bank_without_a_fold_covers_the_others_as_well() -> None:
    """Without new rows around those taken out, images would be far from a coreset of others."""
    rng = np.random.default_rng(0)
    detector = PatchCore(coreset_ratio=0.05, calibration="cross", false_alarm_rate=0.2)
    E = rng.normal(size=(40, 6, 6, 8)).astype(np.float32)
    detector._calibrates_by = "cross"
    accumulated = detector._make_accumulator((6, 6, 8), 40, 0, np.random.RandomState(0))
    accumulated.keeps_images = True
    accumulated.merge(accumulated.accumulate(E, 0))
    fitted: Any = detector._fit_accumulated(accumulated, np.random.RandomState(0))
    whole = detector.memory_bank_
    radii, bare = [], []
    for first in range(0, 40, 4):
        rest = detector._without(E[first : first + 4], first, fitted)
        assert rest is not None
        bank = rest.memory_bank_.embeddings_
        assert len(bank) == len(whole.embeddings_)
        others = np.delete(E, range(first, first + 4), axis=0).reshape(-1, 8)
        of_part = E[first : first + 4].reshape(-1, 8)
        assert cdist(of_part, bank).min() > 0  # none of its patches
        radii.append(cdist(others, bank).min(axis=1).max())
        left = [row for row in whole.embeddings_ if not (of_part == row).all(axis=1).any()]
        bare.append(cdist(others, left).min(axis=1).max())
    assert max(radii) <= 1.1 * whole.covering_radius_
    assert np.mean(radii) < np.mean(bare)


def test_the_rate_of_a_coreset_is_near_the_one_asked_for() -> None:
    rates = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        images = (rng.normal(size=(260, 1, 1, 12)) + rng.normal(size=(260, 5, 6, 12))).astype(
            np.float32
        )
        detector = PatchCore(
            coreset_ratio=0.05, calibration="cross", false_alarm_rate=0.2, random_state=seed
        ).fit_embeddings(images[:60])
        rates.append(np.mean(detector.score_embeddings(images[60:]) > detector.threshold_))
    # 60 scores have a rate of 0.2 with a deviation of 0.05, and the mean of 12 one of 0.015.
    assert 0.1 < np.mean(rates) < 0.2 + 4 * 0.015


def test_images_that_cannot_be_read_are_in_no_fold(tmp_path: Path) -> None:
    images = images_of(24)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    paths = sorted(tmp_path.glob("*.png"))
    for broken in (3, 17):
        paths[broken].write_bytes(b"no image")
    detector = clone(DETECTORS[0]).set_params(on_error="skip")
    detector.fit(paths, groups=GROUPS)
    names = [int(Path(name).stem) for name in detector.calibration_names_]
    assert sorted(names) == sorted(set(range(24)) - {3, 17})
    for group in np.unique(GROUPS):
        ids = {
            int(of)
            for name, of in zip(names, detector.calibration_groups_, strict=True)
            if GROUPS[name] == group
        }
        assert len(ids) == 1


def test_folds_are_ten_of_about_one_size() -> None:
    assert np.bincount(folds_of(np.arange(44), 10)).tolist() == [5, 4, 5, 4, 4] * 2
    of = folds_of(np.repeat(np.arange(20), 3), 10)
    assert np.bincount(of).tolist() == [6] * 10
    assert folds_of(np.arange(3), 10).tolist() == [0, 1, 2]


def test_what_forbids_it_later(detector: Any) -> None:
    detector.set_params(calibration="auto").fit(images_of(24))
    with pytest.raises(InvalidValueError, match=r"no confidence is known. Call recalibrate"):
        detector.set_false_alarm_rate(0.3, confidence=0.9)
    with pytest.raises(InvalidValueError, match=r"partial_fit goes on with calibration='cross'"):
        detector.set_params(memory_budget="1GB").partial_fit(images_of(8, 5))
    detector.set_params(memory_budget=None)
    assert len(detector.partial_fit(images_of(8, 5)).calibration_scores_) == 32
    detector.recalibrate(images_of(12, 6), 0.3, confidence=0.9)
    assert detector.calibration_ == "split"


def test_some_regions_are_ignored(detector: Any) -> None:
    images = images_of(24)
    mask = np.zeros(images.shape[1:3], bool)
    mask[:10, :16] = True
    marked = images.copy()
    marked[::2, :10, :16] = 255
    detector.set_params(smoothing=0)
    plain = clone(detector).fit(images, ignore_mask=mask).calibration_scores_
    np.testing.assert_array_equal(detector.fit(marked, ignore_mask=mask).calibration_scores_, plain)


def test_an_update_adds_scores_of_new_images(detector: Any) -> None:
    first, more = images_of(24), images_of(8, 5)
    detector.fit(first)
    before = detector.calibration_scores_
    updated = copy.copy(detector).partial_fit(more)
    np.testing.assert_array_equal(updated.calibration_scores_[:24], before)
    new = updated.calibration_scores_[24:]
    order, of_fold = folds(8, None)
    for fold in range(8):  # fewer images than folds: each is left out by itself
        others = more[order[of_fold != fold]]
        everything = clone(detector).set_params(calibration="leave_one_out")
        everything.fit(np.concatenate([first, others]))
        expected = everything.score(more[order[fold]])
        np.testing.assert_allclose(new[fold], expected[0], rtol=1e-3)
    assert len(np.unique(updated.calibration_groups_)) == 32
    assert updated.threshold_ == conformal_threshold(updated.calibration_scores_, 0.2)


def test_saved_and_loaded(detector: Any, tmp_path: Path) -> None:
    detector.set_params(calibration="auto", backbone="efficientnet_lite0", image_size=(64, 64))
    detector.set_params(layers=None, weights=None).fit(images_of(24), groups=GROUPS)
    detector.save(tmp_path / "model.safetensors")
    other = load(tmp_path / "model.safetensors")
    assert (other.calibration, other.calibration_) == ("auto", "cross")
    assert other.threshold_ == detector.threshold_
    np.testing.assert_array_equal(other.calibration_groups_, detector.calibration_groups_)
    more = images_of(4, 9)
    detector.partial_fit(more)
    np.testing.assert_allclose(
        other.partial_fit(more).calibration_scores_, detector.calibration_scores_, rtol=1e-3
    )


# --- What "auto" stands for -----------------------------------------------------------------------

E = np.random.default_rng(0).normal(size=(30, 3, 4, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({}, "cross"),
        ({"memory_budget": "1GB"}, "split"),
        ({"false_alarm_confidence": 0.9}, "split"),
        ({"index": "IVF2,Flat"}, "split"),
    ],
)
def test_auto(options: dict[str, Any], way: str) -> None:
    plain = {"false_alarm_rate": 0.2, "coreset_ratio": 0.5}
    detector = PatchCore(calibration="auto", **plain, **options).fit_embeddings(E)
    assert detector.calibration_ == way
    asked = PatchCore(calibration=way, **plain, **options).fit_embeddings(E)
    assert detector.threshold_ == asked.threshold_
    if way == "split":
        with pytest.raises(InvalidValueError, match=r"calibration='cross' .*'split'"):
            PatchCore(calibration="cross", **plain, **options).fit_embeddings(E)


def test_many_images_are_split() -> None:
    rng = np.random.default_rng(0)
    many = rng.normal(size=(501, 1, 1, 4)).astype(np.float32)
    for n, way in ((500, "cross"), (501, "split")):
        detector = SubspaceAD(calibration="auto", n_components=2)
        assert detector.fit_embeddings(many[:n]).calibration_ == way
    stream = SubspaceAD(calibration="auto", n_components=2, false_alarm_rate=0.2)
    assert stream.fit_embeddings(iter(E)).calibration_ == "split"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_images_have_no_scores_or_warn(n: int) -> None:
    detector = PatchCore(coreset_ratio=1.0, calibration="cross", false_alarm_rate=0.2)
    with pytest.warns(UserWarning, match="needs 4 normal images for calibration"):
        detector.fit_embeddings(E[:n])
    assert len(detector.calibration_scores_) == (n if n > 1 else 0)
    assert (detector.threshold_ == np.inf) == (n == 1)


def test_structure_is_learned_from_all_images() -> None:
    detector = clone(DETECTORS[0]).set_params(image_score="structure").fit(images_of(24))
    assert len(detector.calibration_scores_) == 24
    assert np.isfinite(detector.threshold_)
    assert len(detector.partial_fit(images_of(8, 4)).calibration_scores_) == 8


def test_lora_cannot_leave_images_out() -> None:
    with pytest.raises(InvalidValueError, match=r"adapt='lora' has learned from.*'split'"):
        MahalanobisVFM(adapt="lora", calibration="cross").fit(images_of(8))
