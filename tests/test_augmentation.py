"""Transformed copies of the images to fit on: which they are, and that nothing else sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from detector_fixtures import HEIGHT, PLAIN, WIDTH, Small, bad, good
from PIL import Image
from scipy.ndimage import rotate
from sklearn.base import clone

from anomalib_lite import MahalanobisVFM, PatchCore, SubspaceAD, load
from anomalib_lite.calibration import calibration_size
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.images.augmentation import AUGMENTATIONS, AugmentedSource, n_versions
from anomalib_lite.images.ignore_mask import IgnoreMask

QUICK: dict[str, Any] = PLAIN | {"image_size": (HEIGHT, WIDTH), "false_alarm_rate": 0.25}
DETECTORS: list[Any] = [
    PatchCore(Small(), coreset_ratio=0.05, **QUICK),
    SubspaceAD(Small(), n_components=4, **QUICK),
    MahalanobisVFM(Small(), **QUICK),
]
KINDS = [*AUGMENTATIONS, ("flips", "brightness"), ["brightness", "rotations"]]


@pytest.fixture(params=DETECTORS, ids=lambda detector: type(detector).__name__)
def detector(request: pytest.FixtureRequest) -> Any:
    return clone(request.param)


def copies(image: np.ndarray, augment: Any) -> list[np.ndarray]:
    return [np.asarray(copy) for copy in AugmentedSource(ImageSource(image), augment)]


def naive_copies(image: np.ndarray, augment: Any) -> list[np.ndarray]:
    """Return an image (uint8) and its flipped and brighter copies, written down."""
    found = [image]
    for kind in [augment] if isinstance(augment, str) else augment:
        if kind == "flips":
            found += [image[:, ::-1], image[::-1]]
        elif kind == "brightness":
            found += [
                np.minimum(np.rint(image * factor), 255).astype(np.uint8) for factor in (0.8, 1.2)
            ]
        else:
            found += copies(image, "rotations")[1:]
    return found


def assert_alike(one: Any, other: Any) -> None:
    found, expected = (d.detect(np.concatenate([good(3, 7), bad(3)])) for d in (one, other))
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.maps, expected.maps)
    np.testing.assert_array_equal(one.calibration_scores_, other.calibration_scores_)
    assert one.threshold_ == other.threshold_


# --- Which copies -------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["flips", "brightness", ("brightness", "flips")])
def test_copies_are_those_written_down(augment: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    found, expected = copies(image, augment), naive_copies(image, augment)
    assert len(found) == n_versions(augment)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    floats = copies((image / 255).astype(np.float32), augment)
    for one, other in zip(floats, expected, strict=True):
        np.testing.assert_allclose(255 * one, other, atol=0.51)


@pytest.mark.parametrize("size", [(40, 40), (31, 48), (50, 20), (9, 64)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rotations_are_those_of_scipy(size: tuple[int, int], dtype: Any) -> None:
    """Corners come from the image as it is continued by reflection."""
    rng = np.random.default_rng(0)
    image = rng.random((size[0] // 4 + 2, size[1] // 4 + 2, 3)).repeat(4, 0).repeat(4, 1)
    image = image[: size[0], : size[1]].astype(np.float32)
    given = (255 * image).astype(np.uint8) if dtype == np.uint8 else image
    found = copies(given, "rotations")
    assert len(found) == 8
    np.testing.assert_array_equal(found[0], given)
    far = np.pad(given, ((80, 80), (80, 80), (0, 0)), mode="symmetric").astype(np.float64)
    for turned, degrees in zip(found[1:], range(45, 360, 45), strict=True):
        assert turned.shape == given.shape
        expected = rotate(far, degrees, order=1, reshape=False)[80:-80, 80:-80]
        tolerance = 1.01 if dtype == np.uint8 else 1e-2
        # At an edge between squares a difference of a hundredth of a pixel is seen.
        assert np.median(np.abs(turned - expected)) <= tolerance
        assert (np.abs(turned - expected) > 5 * tolerance).mean() < 0.05


def test_half_and_quarter_turns_are_exact() -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    found = copies(image, "rotations")
    for turned, quarters in ((found[2], 1), (found[4], 2), (found[6], 3)):
        np.testing.assert_array_equal(turned, np.rot90(image, quarters))


def test_no_corner_is_black() -> None:
    image = np.full((30, 50, 3), 200, np.uint8)
    assert all((turned == 200).all() for turned in copies(image, "rotations"))


def test_gray_images_and_files_too(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "0.png")
    for augment in KINDS:
        source = AugmentedSource(ImageSource(tmp_path), augment)
        whole = copies(np.stack([gray] * 3, axis=-1), augment)
        for i, expected in enumerate(whole):
            np.testing.assert_array_equal(source.load(i, (20, 30), 1)[0], expected)
    assert source.names == [str(tmp_path / "0.png")] * 10


# --- What is learned from them ------------------------------------------------------------


@pytest.mark.parametrize("augment", KINDS)
def test_it_is_a_fit_on_a_list_of_copies(detector: Any, augment: Any) -> None:
    images = good(6)
    by_hand = [copy for image in images for copy in naive_copies(image, augment)]
    detector.set_params(calibration="leave_one_out", image_score="max")
    # One by one the images are in the order in which they are given.
    found = clone(detector).set_params(augment=augment).fit(images)
    expected = clone(detector).fit(by_hand)
    questions = np.concatenate([good(3, 7), bad(3)])
    np.testing.assert_array_equal(found.score(questions), expected.score(questions))
    assert len(found.calibration_scores_) == 6  # of images without their copies
    assert (found.calibration_scores_ > 0).all()


def test_an_image_is_left_out_with_its_copies() -> None:
    """A mirror image is in the bank of its own image alone, and would score 0 with it."""
    images = good(5)
    detector = clone(DETECTORS[0]).set_params(
        calibration="leave_one_out", augment="flips", coreset_ratio=1.0
    )
    scores = detector.fit(images).calibration_scores_
    for i, score in enumerate(scores):
        rest = [c for j in range(5) if j != i for c in naive_copies(images[j], "flips")]
        others = clone(detector).set_params(augment=None).fit(rest)
        assert score == pytest.approx(others.score(images[i])[0], rel=1e-5)


def test_images_held_back_have_no_copies() -> None:
    images = good(12)
    detector = clone(DETECTORS[0]).set_params(augment="flips", coreset_ratio=1.0).fit(images)
    n = calibration_size(0.25, 12)
    order = np.random.RandomState(0).permutation(12)
    by_hand = [c for i in order[:-n] for c in naive_copies(images[i], "flips")]
    fitted_on = clone(detector).set_params(augment=None, calibration="leave_one_out").fit(by_hand)
    np.testing.assert_allclose(
        np.sort(detector.calibration_scores_),
        np.sort(fitted_on.score(images[order[-n:]])),
        rtol=1e-5,
    )
    assert len(detector.memory_bank_.embeddings_) == (3 * (12 - n) + n) * 12 * 20
    assert detector.n_absorbed_ == n * 12 * 20


def test_going_on_makes_copies_of_new_images() -> None:
    detector = clone(DETECTORS[0]).set_params(augment="flips", coreset_ratio=1.0)
    detector.fit(good(12)).partial_fit(good(5, 3))
    held = len(detector.calibration_scores_)
    assert len(detector.memory_bank_.embeddings_) == (3 * (17 - held) + held) * 12 * 20


@pytest.mark.parametrize("sizes", [1, 2])
def test_neither_workers_nor_budgets_matter(detector: Any, sizes: int) -> None:
    images = [image[:, : WIDTH - 16 * (i % sizes)] for i, image in enumerate(good(20))]
    size = 48 if isinstance(detector, PatchCore) else (HEIGHT, WIDTH)
    detector.set_params(augment=("rotations", "brightness"), image_size=size)
    reference = clone(detector).fit(images)
    for options in ({"n_jobs": 2}, {"memory_budget": "1GB"}, {"n_jobs": 2, "memory_budget": "1GB"}):
        with joblib.parallel_config("threading"):
            assert_alike(clone(detector).set_params(**options).fit(images), reference)
    if sizes == 2:  # processes are slow to start
        assert_alike(clone(detector).set_params(n_jobs=2).fit(images), reference)


def test_what_is_learned_from_copies_costs_no_image_held_back() -> None:
    """The copies that teach are more than the images: those held back stay so."""
    detector = clone(DETECTORS[0]).set_params(augment="rotations", feature_dim=4)
    reference = clone(detector).fit(good(20))
    assert reference.transform_.n_images_ > 20
    assert len(reference.calibration_scores_) == calibration_size(0.25, 20)
    assert_alike(clone(detector).set_params(memory_budget="1GB").fit(good(20)), reference)


def test_images_that_cannot_be_read_are_named_once(tmp_path: Path) -> None:
    images = [*good(14), tmp_path / "gone.png", tmp_path / "away.png"]
    for budget in (None, "1GB"):
        detector = clone(DETECTORS[0]).set_params(
            augment="flips", on_error="skip", memory_budget=budget, coreset_ratio=1.0
        )
        detector.fit(images)
        assert sorted(name for name, _ in detector.skipped_) == sorted(map(str, images[14:]))
        held = len(detector.calibration_scores_)
        assert len(detector.memory_bank_.embeddings_) == (3 * (14 - held) + held) * 12 * 20


def test_regions_to_ignore_turn_with_their_image(detector: Any) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:20, 8:30] = True
    first, second = good(16), good(16)
    second[:, mask] = np.random.default_rng(5).integers(0, 256, (16, mask.sum(), 3))
    for augment in KINDS:
        detector.set_params(augment=augment)
        one, other = (clone(detector).fit(images, ignore_mask=mask) for images in (first, second))
        assert_alike(one, other)
    source = ImageSource(first[:1])
    source.ignored = IgnoreMask(mask)
    turned = AugmentedSource(source, "flips").ignored_in(1)
    assert turned is not None
    np.testing.assert_array_equal(turned.of((HEIGHT, WIDTH)), mask[:, ::-1])


def test_a_file_says_which_copies(tmp_path: Path) -> None:
    detector = clone(DETECTORS[0]).set_params(augment=("flips", "brightness")).fit(good(12))
    detector.save(tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors", backbone=Small())
    assert_alike(again, detector)
    assert_alike(again.partial_fit(good(5, 3)), detector.partial_fit(good(5, 3)))


def test_turned_parts_are_normal_after_few_shots() -> None:
    """One picture of a part and its rotations teach what the turned part looks like."""
    rng = np.random.default_rng(0)

    def part(quarters: int) -> np.ndarray:
        image = rng.integers(100, 110, (48, 48, 3)).astype(np.uint8)
        image[8:40, 20:22], image[8:40, 22:24] = (200, 30, 30), (30, 30, 200)
        return np.rot90(image, quarters).copy()

    plain = clone(DETECTORS[0]).set_params(image_size=48, calibration="leave_one_out")
    upright, turned = [part(0) for _ in range(4)], [part(1) for _ in range(4)]
    without = plain.fit(upright).score(turned)
    rotated = clone(plain).set_params(augment="rotations").fit(upright).score(turned)
    assert rotated.max() < 0.5 * without.min()


@pytest.mark.parametrize(
    "augment", ["rotation", "", (), ["flips", "flips"], ("flips", "x"), 8, True, {"flips": 1}]
)
def test_unknown_copies_are_refused(detector: Any, augment: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"augment must be None, one of .* got "):
        detector.set_params(augment=augment).fit(good(8))


def test_embeddings_cannot_be_transformed(detector: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"augment='flips' needs images to transform"):
        detector.set_params(augment="flips").fit_embeddings(np.ones((8, 2, 3, 4), np.float32))


def test_positions_move_with_rotations() -> None:
    detector = clone(DETECTORS[0]).set_params(position_window=1)
    for augment in ("rotations", "flips", ("brightness", "flips")):
        with pytest.raises(InvalidValueError, match="moves patches to other places"):
            detector.set_params(augment=augment).fit(good(8))
    assert detector.set_params(augment="brightness").fit(good(12)).memory_bank_.grid == (12, 20)
