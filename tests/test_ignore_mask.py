"""Regions to ignore: nothing in them has any effect, and they are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from detector_fixtures import HEIGHT, PLAIN, WIDTH, Small, bad, good
from PIL import Image
from sklearn.base import clone
from test_contract import ALL_DETECTORS

from anomalib_lite import PaDiM, PatchCore, load
from anomalib_lite.anomaly_map import image_scores, standardize, structure
from anomalib_lite.errors import AnomalibLiteError, InvalidValueError, MissingPathError
from anomalib_lite.images.ignore_mask import IgnoreMask, per_image, read_ignore_mask

SIZE = (HEIGHT, WIDTH)
REGION = np.s_[6:22, 44:72]  # around the defect of ``bad``
MASK = np.zeros(SIZE, bool)
MASK[REGION] = True
CORNERS = [(44, 6), (71, 6), (71, 21), (44, 21)]  # the same, pixel by pixel

DETECTORS = [d for d in ALL_DETECTORS if hasattr(d, "fit_embeddings")]


@pytest.fixture(params=DETECTORS, ids=lambda detector: type(detector).__name__)
def detector(request: pytest.FixtureRequest) -> Any:
    return clone(request.param)


def test_a_defect_inside_is_never_reported(detector: Any) -> None:
    detector.fit(good(24), ignore_mask=MASK)
    normal, defect = detector.detect(good(6, 9)), detector.detect(bad(6, 9))
    # The same noise under seed 9, but for the defect: the same answers, to the bit.
    np.testing.assert_array_equal(normal.scores, defect.scores)
    np.testing.assert_array_equal(normal.maps, defect.maps)
    assert (defect.maps[:, MASK] == 0).all()
    assert (defect.maps[:, ~MASK] > 0).all()
    plain = clone(detector).fit(good(24))
    assert (plain.score(bad(6, 9)) > plain.score(good(6, 9))).all(), "it would be found"


def test_a_defect_outside_is_found(detector: Any) -> None:
    images = good(6, 9)
    images[:, 30:40, 10:30] = (250, 20, 20)
    detector.fit(good(24), ignore_mask=MASK)
    found = detector.detect(images)
    assert (found.scores > detector.threshold_).all()
    peaks = [np.unravel_index(m.argmax(), m.shape) for m in found.maps]
    assert all(26 < y < 44 and 6 < x < 34 for y, x in peaks)


@pytest.mark.parametrize("kind", ["array", "uint8", "PIL", "png", "polygon", "polygons", "json"])
def test_every_form_of_mask_means_the_same(kind: str, tmp_path: Path) -> None:
    white = Image.fromarray(MASK.astype(np.uint8) * 255)
    white.save(tmp_path / "mask.png")
    labelme = {"shapes": [{"label": "clamp", "points": CORNERS}], "imageHeight": HEIGHT}
    (tmp_path / "mask.json").write_text(json.dumps(labelme))
    given: dict[str, Any] = {
        "array": MASK,
        "uint8": MASK.astype(np.uint8) * 7,
        "PIL": white.convert("RGBA"),
        "png": tmp_path / "mask.png",
        "polygon": CORNERS,
        "polygons": [CORNERS, [(50, 8), (60, 8), (60, 12)]],  # the second lies within the first
        "json": str(tmp_path / "mask.json"),
    }
    np.testing.assert_array_equal(read_ignore_mask(given[kind], "fit").of(SIZE), MASK)


def test_a_rectangle_of_labelme_is_its_four_corners(tmp_path: Path) -> None:
    for corners in ([[8, 4], [20, 12]], [[20, 12], [8, 4]]):  # drawn from either corner
        shape = {"label": "clamp", "shape_type": "rectangle", "points": corners}
        (tmp_path / "mask.json").write_text(json.dumps({"shapes": [shape]}))
        whole = [(8, 4), (20, 4), (20, 12), (8, 12)]
        np.testing.assert_array_equal(
            read_ignore_mask(tmp_path / "mask.json", "fit").of(SIZE),
            read_ignore_mask(whole, "fit").of(SIZE),
        )


def test_it_is_saved_with_the_detector(detector: Any, tmp_path: Path) -> None:
    for given in (MASK, CORNERS):
        detector.fit(good(24), ignore_mask=given).save(tmp_path / "model.safetensors")
        again = load(tmp_path / "model.safetensors", backbone=Small())
        for images in (bad(3), good(3, 5)):
            found, expected = again.detect(images), detector.detect(images)
            np.testing.assert_array_equal(found.scores, expected.scores)
            np.testing.assert_array_equal(found.maps, expected.maps)
    plain = clone(detector).fit(good(24))
    assert plain.ignore_mask_ is None
    np.testing.assert_array_equal(detector.fit(good(24)).score(bad(3)), plain.score(bad(3)))


def test_ignored_patches_are_not_in_the_bank_nor_in_the_calibration() -> None:
    detector = PatchCore(Small(), coreset_ratio=1.0, **PLAIN, image_size=SIZE, false_alarm_rate=0.3)
    images = good(12)
    images[(slice(None), *REGION)] = np.random.default_rng(0).integers(0, 256, (16, 28, 3))
    detector.fit(images, ignore_mask=MASK)
    cells = IgnoreMask(MASK).cells(SIZE, (HEIGHT // 4, WIDTH // 4))
    assert 0 < cells.sum() < cells.size
    assert len(detector.memory_bank_.embeddings_) == 12 * (cells.size - cells.sum())
    np.testing.assert_array_equal(
        detector.calibration_scores_,
        clone(detector).fit(good(12), ignore_mask=MASK).calibration_scores_,
    )


@pytest.mark.parametrize("how", ["top30%", "top30% pixels", "smoothed", "structure"])
@pytest.mark.parametrize("calibration", ["split", "leave_one_out"])
def test_ignored_patches_are_in_no_image_score(detector: Any, how: str, calibration: str) -> None:
    detector.set_params(image_score=how, calibration=calibration, false_alarm_rate=0.2)
    if "global_weight" in detector.get_params():
        detector.set_params(global_weight=0.0)
    corner = np.zeros(SIZE, bool)
    corner[:30, :60] = True
    detector.fit(good(24), ignore_mask=corner)
    images = bad(4) * ~corner[..., None] + 128 * corner[..., None].astype(np.uint8)
    E = detector.backbone_.embed(images)
    cells = IgnoreMask(corner).cells(SIZE, E.shape[1:3])
    E[:, cells] = np.nan
    if detector._channels is not None:
        E = E[..., detector._channels]
    patch_scores = detector._score_patches(E)[0]
    ignored = np.broadcast_to(cells, patch_scores.shape)
    if how == "structure":
        expected = standardize(structure(patch_scores, ignored), detector.map_statistics_)
        with_zeros = standardize(structure(patch_scores), detector.map_statistics_)
    else:
        expected = image_scores(patch_scores, how, ignored)
        with_zeros = image_scores(patch_scores, how)
    scores = detector.score(bad(4))
    np.testing.assert_allclose(scores, expected, rtol=1e-3)
    assert (np.abs(scores - with_zeros) > 0.01 * scores).any()
    if how == "structure":  # few images: what they teach of themselves is too good
        return
    # The images that calibrate are scored in the same way: new ones are like them.
    usual = np.median(detector.calibration_scores_)
    assert 0.5 < np.median(detector.score(good(24, 7))) / usual < 2


def test_the_most_anomalous_patch_is_none_that_is_ignored() -> None:
    detector = PatchCore(
        Small(), **PLAIN, image_size=SIZE, false_alarm_rate=0.3, coreset_ratio=1.0,
        image_score="reweighted",
    ).fit(good(12), ignore_mask=MASK)  # fmt: skip
    E = np.full((1, 3, 5, detector.n_features_), np.nan, np.float32)
    E[0, 2, 4] = detector.memory_bank_.embeddings_[0]  # at no distance, as the ignored ones
    np.testing.assert_array_equal(detector._score_patches(E)[1], [0])


def test_each_image_may_have_its_own() -> None:
    detector = PatchCore(Small(), **PLAIN, image_size=SIZE, false_alarm_rate=0.3).fit(good(20))
    images = np.concatenate([bad(1), bad(1)])
    found = detector.detect(images, ignore_mask=[MASK, None])
    assert found.scores[0] < found.scores[1]
    assert (found.maps[0][MASK] == 0).all()
    np.testing.assert_array_equal(found.scores[1:], detector.score(bad(1)))
    # In fitting too; what holds for one image says nothing about others.
    masks = [MASK if i % 2 else None for i in range(20)]
    mixed = np.concatenate([bad(1) if i % 2 else good(1, i) for i in range(20)])
    detector.fit(mixed, ignore_mask=masks)
    assert detector.ignore_mask_ is None
    assert detector.score(bad(1))[0] > detector.threshold_, "no defect was learned"


@pytest.mark.parametrize("options", [{"n_jobs": 2}, {"memory_budget": "400MB"}, {}])
@pytest.mark.parametrize("calibration", ["split", "leave_one_out"])
def test_ignored_content_has_no_effect_with_workers_or_a_budget(
    options: dict[str, Any], calibration: str
) -> None:
    if options.get("memory_budget") and calibration == "leave_one_out":
        pytest.skip("not to be combined")
    detector = PatchCore(
        Small(), **PLAIN, **options, image_size=SIZE, calibration=calibration,
        false_alarm_rate=0.2, coreset_size=500,
    )  # fmt: skip
    hidden = good(20)
    hidden[(slice(None), *REGION)] = 0
    # Processes are slow to start: leaving one out is left to threads.
    with joblib.parallel_config("loky" if calibration == "split" else "threading"):
        scores = [detector.fit(x, ignore_mask=MASK).score(good(4, 3)) for x in (good(20), hidden)]
    np.testing.assert_array_equal(*scores)
    assert (
        detector.score(bad(4)) <= max(detector.threshold_, detector.score(good(4, 1)).max())
    ).all()


def test_partial_fit_goes_on_with_it(detector: Any) -> None:
    detector.fit(good(24), ignore_mask=MASK).partial_fit(bad(8, 5))
    again = clone(detector).fit(good(24), ignore_mask=MASK).partial_fit(good(8, 5))
    np.testing.assert_array_equal(detector.score(good(4, 3)), again.score(good(4, 3)))


def test_images_of_other_sizes(tmp_path: Path) -> None:
    detector = PatchCore(Small(), **PLAIN, image_size=SIZE, false_alarm_rate=0.3)
    larger = np.asarray([np.kron(image, np.ones((2, 2, 1), np.uint8)) for image in good(2)])
    with pytest.raises(
        InvalidValueError, match=r"ignore_mask is 48x80 pixels, but the image is 96x160"
    ):
        detector.fit([*good(12), *larger], ignore_mask=MASK)
    detector.fit([*good(12), *larger], ignore_mask=CORNERS)
    assert detector.detect([larger[0]]).maps[0].shape == (96, 160)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 5, 3, 2)), "shape"),
        (np.ones(SIZE), "leaves nothing of an image of 48x80 pixels"),
        ([(1, 2), (3, 4)], "at least three"),
        ([[(1, 2), (3, 4), (5, float("nan"))]], "at least three"),
        ([MASK, MASK], "2 masks for 12 images"),
        (7, "must be a mask"),
        ("clamp", "must be|does not exist"),
    ],
)
def test_what_is_no_mask_is_refused(given: Any, message: str) -> None:
    detector = PatchCore(Small(), **PLAIN, image_size=SIZE, false_alarm_rate=0.3)
    with pytest.raises(AnomalibLiteError, match=f"^PatchCore: .*({message})"):
        detector.fit(good(12), ignore_mask=given)
    assert not hasattr(detector, "memory_bank_")


TRIANGLE = [(2, 2), (20, 2), (2, 20)]


def test_what_a_list_means_is_decided_by_all_its_entries() -> None:
    for n in (1, 3, 4, 12):  # corners are never masks, however many images there are
        for corners in (CORNERS, [np.array(corner) for corner in CORNERS]):
            one = per_image(corners, n, "fit")
            assert isinstance(one, IgnoreMask)
            np.testing.assert_array_equal(one.of(SIZE), MASK)
    both = read_ignore_mask([CORNERS, TRIANGLE], "fit").of(SIZE)
    for n in (1, 3, 12):
        np.testing.assert_array_equal(per_image([CORNERS, TRIANGLE], n, "fit").of(SIZE), both)  # type: ignore[union-attr]
    assert isinstance(per_image([CORNERS], 1, "fit"), IgnoreMask)
    for given, expected in (
        ([CORNERS, None], [MASK, None]),
        ([None, CORNERS], [None, MASK]),
        ([[CORNERS], [CORNERS, TRIANGLE]], [MASK, both]),
        ([CORNERS, [CORNERS, TRIANGLE]], [MASK, both]),
        ([CORNERS, MASK], [MASK, MASK]),
        (np.stack([MASK, ~MASK]), [MASK, ~MASK]),
    ):
        found = per_image(given, 2, "fit")
        assert isinstance(found, list)
        for got, mask in zip(found, expected, strict=True):
            assert (got is None) == (mask is None)
            if got is not None:
                np.testing.assert_array_equal(got.of(SIZE), mask)
    all_for_each = per_image(IgnoreMask(polygons=[CORNERS, TRIANGLE]), 2, "fit")
    np.testing.assert_array_equal(all_for_each.of(SIZE), both)  # type: ignore[union-attr]


def test_what_may_mean_two_things_is_asked_about() -> None:
    detector = PatchCore(Small(), **PLAIN, image_size=SIZE, false_alarm_rate=0.3)
    message = r"^PatchCore: ignore_mask has 12 polygons for 12 images.*\[\[polygon\].*IgnoreMask\("
    with pytest.raises(InvalidValueError, match=message):
        detector.fit(good(12), ignore_mask=[CORNERS] * 12)
    for corners in (np.array(CORNERS), np.float32(CORNERS)):
        with pytest.raises(InvalidValueError, match=r"shape \(4, 2\).*corners\.tolist\(\).*bool"):
            detector.fit(good(12), ignore_mask=corners)
    narrow = np.zeros((30, 2), bool)
    np.testing.assert_array_equal(read_ignore_mask(narrow, "fit").mask, narrow)
    with pytest.raises(InvalidValueError, match=r"3 masks for 12 images.*at least three"):
        detector.fit(good(12), ignore_mask=[CORNERS, None, CORNERS])


def test_files_that_are_no_masks(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"the ignore_mask .*no\.png does not exist"):
        read_ignore_mask(tmp_path / "no.png", "fit")
    for name, text in (("a.json", "{}"), ("b.json", "[1"), ("c.png", "text"), ("d.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidValueError, match=rf"^fit: .*{name}"):
            read_ignore_mask(tmp_path / name, "fit")


def test_padim_needs_one_for_all() -> None:
    detector = PaDiM(Small(), n_components=12, **PLAIN, image_size=SIZE, false_alarm_rate=0.3)
    with pytest.raises(InvalidValueError, match="PaDiM: ignore_mask must be one for all images"):
        detector.fit(good(12), ignore_mask=[MASK] * 12)
    detector.fit(good(12), ignore_mask=MASK)
    with pytest.raises(InvalidValueError, match="PaDiM: ignore_mask must be one for all images"):
        detector.partial_fit(good(4), ignore_mask=~MASK)


def test_cells_are_ignored_where_half_of_them_is() -> None:
    mask = np.zeros((40, 60), bool)
    mask[:10, :25] = True  # of cells of 10 x 10: two, and half of a third
    cells = IgnoreMask(mask).cells((40, 60), (4, 6))
    assert cells.astype(int).tolist() == [[1, 1, 1, 0, 0, 0], *[[0] * 6] * 3]
    mask[:10, 24] = False
    assert IgnoreMask(mask).cells((40, 60), (4, 6)).sum() == 2
    assert per_image(None, 3, "fit") is None
