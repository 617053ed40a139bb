"""What every detector promises: a new one gets all of these tests by one line in ALL_DETECTORS."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector_fixtures import DEFECT, HEIGHT, PLAIN, WIDTH, Small, bad, good
from PIL import Image
from safetensors import safe_open
from sklearn.base import clone
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, ShuffleSplit, cross_val_predict
from sklearn.pipeline import Pipeline
from sklearn.utils import estimator_checks
from torch import nn

import anomalib_lite
from anomalib_lite import (
    GatedCascade,
    MahalanobisVFM,
    PaDiM,
    PatchCore,
    SubspaceAD,
    load,
    persistence,
)
from anomalib_lite.anomaly_map import anomaly_maps
from anomalib_lite.calibration import conformal_threshold
from anomalib_lite.datasets import Sample
from anomalib_lite.detectors import BaseDetector
from anomalib_lite.errors import (
    AnomalibLiteError,
    CalibrationWarning,
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
    ModelFileError,
    NotFittedError,
    OutputError,
)
from anomalib_lite.images import ImageSource

QUICK = PLAIN | {"image_size": (HEIGHT, WIDTH), "false_alarm_rate": 0.25}

ALL_DETECTORS: list[Any] = [
    PatchCore(Small(), **QUICK),
    PaDiM(Small(), n_components=12, **QUICK),
    MahalanobisVFM(Small(), **QUICK),
    SubspaceAD(Small(), n_components=4, **QUICK),
    GatedCascade(Small(), PatchCore(Small(), **QUICK), max_missed=0.3, **QUICK),
]

NORMAL = good(24)
MIXED = np.concatenate([good(4, 2), bad(3)])
ASKS = ("detect", "score", "anomaly_map", "predict", "score_samples", "decision_function")


@pytest.fixture(scope="session", params=ALL_DETECTORS, ids=lambda detector: name_of(detector))
def prototype(request: pytest.FixtureRequest) -> Any:
    """One of ALL_DETECTORS, which nobody fits."""
    return request.param


@pytest.fixture
def detector(prototype: Any) -> Any:
    """A detector to fit."""
    return clone(prototype)


@pytest.fixture(scope="session")
def fitted(prototype: Any) -> Any:
    """A detector fitted on NORMAL, which no test may change."""
    detector = clone(prototype).fit(NORMAL)
    parameters, state, scores = detector.get_params(), state_of(detector), detector.score(MIXED)
    yield detector
    assert detector.get_params() == parameters
    assert changed_since(state, detector) == []
    np.testing.assert_array_equal(detector.score(MIXED), scores)


@pytest.fixture
def twin(fitted: Any) -> Any:
    """A copy of the fitted detector, which a test may change."""
    return copy.deepcopy(fitted)


def name_of(detector: Any) -> str:
    return type(detector).__name__


def state_of(detector: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(detector).items() if name.endswith("_")}


def changed_since(state: dict[str, Any], detector: Any) -> list[str]:
    """Return the names of the fitted attributes that are not the same objects as in ``state``."""
    now = state_of(detector)
    return [name for name in now | state if now.get(name) is not state.get(name)]


def needs(detector: Any, method: str) -> None:
    if not hasattr(detector, method):
        pytest.skip(f"{name_of(detector)} has no {method}")


def assert_alike(detector: Any, expected: Any, images: Any = MIXED) -> None:
    """Assert that two detectors answer alike, to the bit."""
    found, wanted = detector.detect(images, maps=True), expected.detect(images, maps=True)
    np.testing.assert_array_equal(found.scores, wanted.scores)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_array_equal(found.maps, wanted.maps)
    assert detector.threshold_ == expected.threshold_


def test_every_detector_is_held_to_the_contract() -> None:
    public = {
        name for name in anomalib_lite.__all__ if hasattr(getattr(anomalib_lite, name), "fit")
    }
    others = {"MemoryBank", "ProductRouter"}  # which learn from something else than images
    assert {name_of(detector) for detector in ALL_DETECTORS} == public - others
    assert persistence.DETECTORS.keys() == public - {"MemoryBank"}


# --- What it answers ----------------------------------------------------------------------


def test_scores_are_higher_for_anomalous_images(fitted: Any) -> None:
    normal, anomalous = fitted.score(good(6, 2)), fitted.score(bad(6))
    for scores in (normal, anomalous):
        assert (scores.shape, scores.dtype) == ((6,), np.float32)
    assert anomalous.min() > normal.max()
    assert isinstance(fitted.threshold_, float)
    assert anomalous.min() > fitted.threshold_


def test_maps_show_where(fitted: Any) -> None:
    maps = fitted.anomaly_map(bad(3))
    assert (maps.shape, maps.dtype) == ((3, HEIGHT, WIDTH), np.float32)
    for heatmap in maps:
        y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
        assert 8 <= y < 20
        assert 48 <= x < 68
        outside = np.ones_like(heatmap, bool)
        outside[:30, 38:78] = False
        assert heatmap[outside].max() < heatmap[DEFECT].mean()


def test_every_view_is_a_view_of_detect(fitted: Any) -> None:
    found = fitted.detect(MIXED, maps=True)
    np.testing.assert_array_equal(fitted.score(MIXED), found.scores)
    np.testing.assert_array_equal(fitted.anomaly_map(MIXED), found.maps)
    assert found.labels.dtype == bool
    np.testing.assert_array_equal(found.labels, found.scores > fitted.threshold_)
    assert found.labels[4:].all()
    assert found.names == [f"images[{i}]" for i in range(7)]
    assert found.skipped == []
    assert fitted.detect(MIXED, maps=False).maps is None
    predicted = fitted.predict(MIXED)
    np.testing.assert_array_equal(predicted, np.where(found.labels, -1, 1))
    assert predicted.dtype.kind == "i"
    np.testing.assert_array_equal(fitted.score_samples(MIXED), -found.scores)
    decision = fitted.decision_function(MIXED)
    assert decision.dtype == np.float32
    np.testing.assert_array_equal(decision, np.float32(fitted.threshold_) - found.scores)
    np.testing.assert_array_equal(decision < 0, found.labels)


def test_the_threshold_can_be_set(twin: Any) -> None:
    scores = twin.score(MIXED)
    for threshold in (0.0, float(np.median(scores)), float(scores[0]), math.inf):
        twin.threshold_ = threshold
        np.testing.assert_array_equal(twin.detect(MIXED).labels, scores > threshold)
        np.testing.assert_array_equal(twin.predict(MIXED) == -1, scores > threshold)
        np.testing.assert_array_equal(twin.decision_function(MIXED) < 0, scores > threshold)
        np.testing.assert_array_equal(twin.score(MIXED), scores)


@pytest.mark.parametrize("threshold", [float("nan"), "400", None])
def test_a_threshold_that_is_no_number_is_refused(twin: Any, threshold: Any) -> None:
    twin.threshold_ = threshold
    message = f"^{name_of(twin)}: threshold_ must be a number, got"
    for ask in ASKS:
        with pytest.raises(InvalidValueError, match=message):
            getattr(twin, ask)(MIXED)


# --- What it is asked ---------------------------------------------------------------------


def save(images: Any, directory: Path) -> list[Path]:
    paths = [directory / f"{i:02d}.png" for i in range(len(images))]
    for pixels, path in zip(images, paths, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def test_every_kind_of_input_gives_the_same_scores(fitted: Any, tmp_path: Path) -> None:
    paths, expected = save(MIXED, tmp_path), fitted.score(MIXED)
    for form in (
        list(MIXED),
        [Image.fromarray(pixels) for pixels in MIXED],
        torch.from_numpy(MIXED).permute(0, 3, 1, 2),
        tmp_path,
        str(tmp_path),
        paths,
        [str(p) for p in paths],
        tuple(Sample(p, 0, "good") for p in paths),
        ImageSource(MIXED),
        MIXED.astype(np.float32) / 255,
    ):
        np.testing.assert_allclose(fitted.score(form), expected, rtol=1e-3)
    assert fitted.detect(tmp_path).names == [str(p) for p in paths]
    for one in (MIXED[0], paths[0], Image.fromarray(MIXED[0])):
        np.testing.assert_array_equal(fitted.score(one), expected[:1])


def test_a_gray_image_is_one_of_three_equal_channels(fitted: Any) -> None:
    gray = MIXED[..., 0]
    expected = fitted.score(np.repeat(gray[..., None], 3, axis=3))
    np.testing.assert_array_equal(fitted.score(list(gray)), expected)
    np.testing.assert_array_equal(fitted.score([Image.fromarray(g) for g in gray]), expected)


def test_images_of_many_sizes_keep_their_order_and_their_own_maps(fitted: Any) -> None:
    images = [*good(2, 2), *good(2, 3, (80, 48)), *bad(2), *good(2, 4, (96, 200)), *good(1, 5)]
    order = np.random.default_rng(0).permutation(len(images))
    mixed = [images[i] for i in order]
    found = fitted.detect(mixed, maps=True)
    assert isinstance(found.maps, list)
    assert [m.shape for m in found.maps] == [i.shape[:2] for i in mixed]
    for image, score, heatmap in zip(mixed, found.scores, found.maps, strict=True):
        alone = fitted.detect(image, maps=True)
        assert score == pytest.approx(alone.scores[0], rel=1e-4)
        np.testing.assert_allclose(heatmap, alone.maps[0], rtol=1e-3, atol=1e-4)


def test_the_map_of_a_resized_image_has_its_own_size_and_place(fitted: Any) -> None:
    large = bad(1).repeat(3, axis=1).repeat(3, axis=2)  # (1, 144, 240, 3)
    (heatmap,) = fitted.anomaly_map(large)
    assert heatmap.shape == (144, 240)
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    assert 24 <= y < 60
    assert 144 <= x < 204


@pytest.mark.parametrize("nothing", [[], (), np.empty((0, HEIGHT, WIDTH, 3), np.uint8)], ids=repr)
def test_no_images_are_refused(fitted: Any, detector: Any, nothing: Any) -> None:
    for ask in (*(getattr(fitted, name) for name in ASKS), detector.fit):
        with pytest.raises(InvalidValueError, match=f"^{name_of(detector)}: images is empty"):
            ask(nothing)


# --- Scikit-learn's contract --------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
    ],
    ids=lambda check: check.__name__,
)
def test_checks_of_scikit_learn(check: Any, detector: Any) -> None:
    check(name_of(detector), detector)


def test_the_constructor_only_stores(prototype: Any) -> None:
    kind = type(prototype)
    given = {name: object() for name in inspect.signature(kind).parameters}
    detector = kind(**given)
    assert vars(detector) == given
    assert detector.get_params(deep=False) == given
    assert detector.set_params(batch_size="odd") is detector
    assert detector.batch_size == "odd"
    assert "batch_size='odd'" in repr(detector)
    with pytest.raises(ValueError, match="Invalid parameter 'batch_sise'"):
        prototype.set_params(batch_sise=3)
    with pytest.raises(TypeError):
        kind(batch_sise=3)


def test_a_clone_is_not_fitted_and_learns_the_same(fitted: Any) -> None:
    fresh = clone(fitted)
    assert state_of(fresh) == {}
    before, after = fitted.get_params(), fresh.get_params()
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, str | float | int | tuple | None):
            assert after[name] == value
        else:
            assert type(after[name]) is type(value)
    assert_alike(fresh.fit(NORMAL), fitted)


def test_fit_returns_itself_and_leaves_the_parameters_alone(detector: Any) -> None:
    before = detector.get_params()
    modules = [value.train() for value in before.values() if isinstance(value, nn.Module)]
    members = [value for value in before.values() if hasattr(value, "fit")]
    assert modules
    assert detector.fit(NORMAL) is detector
    after = detector.get_params()
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())
    assert all(module.training for module in modules)
    assert all(state_of(member) == {} for member in members)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_answer_alike(fitted: Any, copied: Any) -> None:
    assert_alike(copied(fitted), fitted)


def test_it_is_the_last_step_of_a_pipeline(fitted: Any, detector: Any) -> None:
    pipeline = Pipeline([("detector", detector)]).fit(NORMAL)
    for ask in ("predict", "score_samples", "decision_function"):
        np.testing.assert_array_equal(getattr(pipeline, ask)(MIXED), getattr(fitted, ask)(MIXED))


def test_parameters_can_be_chosen_and_judged_by_cross_validation(detector: Any) -> None:
    images = [*good(16), *bad(6), *good(8, 5, (60, 48))]  # of two sizes: no array could hold them
    y = np.array([0] * 16 + [1] * 6 + [0] * 8)
    order = np.random.default_rng(0).permutation(len(images))
    images, y = [images[i] for i in order], y[order]

    def auroc(detector: Any, X: Any, y: Any) -> float:
        return float(roc_auc_score(y, detector.score(X)))

    rates, once = {"false_alarm_rate": [0.25, 0.4]}, ShuffleSplit(1, test_size=0.5, random_state=0)
    search = GridSearchCV(detector, rates, scoring=auroc, cv=once, error_score="raise")
    search.fit(images, y)
    assert search.best_score_ == 1.0
    assert search.predict(bad(2)).tolist() == [-1, -1]
    predicted = cross_val_predict(detector, images, y, cv=2)
    assert (predicted[y == 1] == -1).all()
    assert (predicted[y == 0] == 1).mean() > 0.5


# --- Parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"false_alarm_rate": 0}, r"false_alarm_rate must be a number in \(0, 1\), got 0"),
        ({"false_alarm_rate": 1}, r"false_alarm_rate must be a number in \(0, 1\), got 1"),
        ({"false_alarm_rate": "0.1"}, "false_alarm_rate must be a number"),
        ({"smoothing": -1}, "smoothing must be a number .*got -1"),
        ({"image_size": 8}, "image_size must be a whole number of at least 16 .*got 8"),
        ({"image_size": 48.0}, "image_size must be .*got 48.0"),
        ({"image_size": (48,)}, r"int \(the shorter side\) or a pair \(H, W\), got \(48,\)"),
        ({"image_size": (48, 80, 3)}, r"or a pair \(H, W\)"),
        ({"image_size": (48, 0)}, "image_size must be .*got 0"),
        ({"image_size": None}, "image_size must be .*got None"),
        ({"image_size": 10**6}, "image_size must be .*at most 8192, got 1000000"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"max_pixels": 0}, "max_pixels must be a whole number of at least 1, got 0"),
        ({"max_pixels": 1000}, r"48x80 pixels, more than max_pixels=1,000"),
        ({"on_error": "rais"}, r"on_error must be one of .*got 'rais'. Did you mean 'raise'"),
        ({"engine": "openvnio"}, "engine must be one of .*Did you mean 'openvino'"),
        ({"device": "gpu"}, "device must be one of .*got 'gpu'"),
        ({"dtype": "float8"}, "dtype must be one of .*got 'float8'. Did you mean 'float"),
        ({"weights": "gone.pth"}, "weights"),
        ({"random_state": "seed"}, "random_state.*got 'seed'"),
        ({"random_state": -1}, "random_state.*got -1"),
        ({"fusion": "summry"}, "fusion must be one of .*got 'summry'"),
        ({"fusion": "weighted"}, "layer_weights go with fusion='weighted'"),
        ({"feature_dim": 0}, "feature_dim must be a whole number of at least 1, got 0"),
        ({"projection": "pcs"}, "projection must be one of .*Did you mean 'pca'"),
        ({"whiten": "yes"}, "whiten must be True or False, got 'yes'"),
        ({"whiten_shrinkage": 2}, r"whiten_shrinkage must be a number in \[0, 1\], got 2"),
        ({"image_score": "mx"}, "image_score must be one of .*got 'mx'. Did you mean 'max'"),
        ({"image_score": None}, "image_score must be one of .*got None"),
        ({"calibration": "loo"}, "calibration must be one of .*got 'loo'"),
        ({"layers": ["frist"]}, "layer 'frist' does not exist.*'first'.*Did you mean 'first'"),
        ({"layers": "first"}, "layers must be a list .*got 'first'"),
        ({"memory_budget": "much"}, "memory_budget must be a number of bytes .*got 'much'"),
        ({"n_jobs": 0}, "n_jobs must be a whole number of at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused_by_fit(
    detector: Any, parameters: dict[str, Any], message: str
) -> None:
    for parameter in parameters.keys() - detector.get_params().keys():
        pytest.skip(f"{name_of(detector)} has no {parameter}")
    detector.set_params(**parameters)
    with pytest.raises(
        AnomalibLiteError, match=rf"^{name_of(detector)}\b.*: .*{message}"
    ) as caught:
        detector.fit(NORMAL)
    assert isinstance(caught.value, TypeError | ValueError)
    assert state_of(detector) == {}


def test_every_parameter_refuses_an_object_of_another_type(prototype: Any) -> None:
    # Whatever is true may be verbose; weights go with the name of a backbone alone.
    for parameter in prototype.get_params(deep=False).keys() - {"verbose", "weights"}:
        detector = clone(prototype).set_params(**{parameter: object()})
        with pytest.raises(AnomalibLiteError, match=rf"^{name_of(detector)}\b.*: .*{parameter}"):
            detector.fit(NORMAL)


def test_the_same_seed_gives_the_same_detector_and_another_another(
    fitted: Any, detector: Any
) -> None:
    detector.set_params(random_state=1).fit(NORMAL)
    assert (detector.score(MIXED) != fitted.score(MIXED)).any()
    detector.set_params(random_state=np.random.RandomState(0))
    np.random.seed(1)  # noqa: NPY002, the global generator must not matter
    assert_alike(detector.fit(NORMAL), fitted)  # nor what was learned before


def test_the_batch_size_does_not_matter(fitted: Any, detector: Any) -> None:
    detector.set_params(batch_size=7).fit(NORMAL)
    np.testing.assert_allclose(detector.score(MIXED), fitted.score(MIXED), rtol=1e-4)
    assert detector.threshold_ == pytest.approx(fitted.threshold_, rel=1e-4)


def test_it_is_silent_where_there_is_no_terminal(
    fitted: Any, detector: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    fitted.score(MIXED)
    names = [name for name in detector.get_params() if name.endswith("verbose")]
    detector.set_params(**dict.fromkeys(names, 1)).fit(NORMAL).score(MIXED)
    assert capfd.readouterr() == ("", "")


# --- Labels -------------------------------------------------------------------------------


def labelled() -> tuple[list[np.ndarray], list[int]]:
    """NORMAL, with two images between them that are anomalous."""
    images, y = list(NORMAL), [0] * len(NORMAL)
    for i in (1, 5):
        images.insert(i, bad(1)[0])
        y.insert(i, 1)
    return images, y


def test_labels_and_samples_tell_which_images_are_anomalous(
    prototype: Any, fitted: Any, tmp_path: Path
) -> None:
    images, y = labelled()
    by_array, by_samples = clone(prototype), clone(prototype)
    by_array.fit(np.stack(images), np.array(y, bool))
    paths = save(images, tmp_path)
    samples = [Sample(path, label, "any") for path, label in zip(paths, y, strict=True)]
    for some in (samples, tuple(samples)):
        with pytest.raises(InvalidValueError, match=r"labelled anomalous.*y=\[sample.label"):
            by_samples.fit(some)
    assert_alike(by_samples.fit(samples, y=[sample.label for sample in samples]), by_array)
    if isinstance(fitted, BaseDetector):
        assert_alike(by_array, fitted)  # those that are anomalous are left out
    assert by_array.score(samples)[[1, 5]].min() > by_array.score(NORMAL).max()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 0], r"y must hold 24 labels.*shape \(2,\)"),
        ([0, 1, 2] * 8, "0 for normal and 1 for anomalous.*2"),
        ([1, 1, 1, -1] * 6, "0 for normal"),
        ([1] * 24, "no normal image"),
        ([[0]] * 24, "must hold 24 labels"),
        ([[0], [0, 1]] * 12, "must hold 24 labels"),
        (["good"] * 24, "0 for normal"),
    ],
)
def test_labels_that_make_no_sense_are_refused(detector: Any, y: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^{name_of(detector)}: .*{message}"):
        detector.fit(NORMAL, y)


# --- Images that cannot be used -----------------------------------------------------------


def test_broken_images_are_skipped_in_their_places(fitted: Any, twin: Any, tmp_path: Path) -> None:
    twin.set_params(on_error="skip")
    normal = good(5, 2)
    images = [normal[0], tmp_path / "gone.png", *normal[1:3], normal[0] * 2.5, *bad(1)]
    found = twin.detect(images, maps=True)
    assert np.isnan(found.scores).tolist() == [False, True, False, False, True, False]
    assert found.labels.tolist()[1] is found.labels.tolist()[4] is True
    assert [m is None for m in found.maps] == [False, True, False, False, True, False]
    assert [i for i, _ in found.skipped] == [1, 4]
    assert "gone.png" in found.skipped[0][1]
    assert "images[4]" in found.skipped[1][1]
    assert twin.predict(images)[[1, 4]].tolist() == [-1, -1]
    assert np.isnan(twin.decision_function(images)[[1, 4]]).all()
    usable = [images[i] for i in (0, 2, 3, 5)]
    np.testing.assert_allclose(found.scores[[0, 2, 3, 5]], fitted.score(usable), rtol=1e-5)
    nothing = twin.detect([tmp_path / "gone.png"], maps=True)
    assert np.isnan(nothing.scores).all()
    assert nothing.maps == [None]
    with pytest.raises(MissingPathError, match=rf"^{name_of(twin)}\b.*: .*gone.png"):
        fitted.score(images)


def test_broken_images_are_skipped_when_fitting(prototype: Any, tmp_path: Path) -> None:
    images: list[Any] = list(NORMAL)
    for i in (0, 4, 26):
        images.insert(i, tmp_path / f"gone{i}.png")
    patient = clone(prototype).set_params(on_error="skip").fit(images)
    names = [Path(name).name for name, _ in patient.skipped_]
    assert names == ["gone0.png", "gone4.png", "gone26.png"]
    assert all("does not exist" in reason for _, reason in patient.skipped_)
    assert patient.predict(bad(2)).tolist() == [-1, -1]
    with pytest.raises(MissingPathError, match=rf"^{name_of(prototype)}\b.*: .*gone"):
        clone(prototype).fit(images)
    with pytest.raises(InvalidValueError, match=r"none of \d+ images.*does not exist"):
        patient.fit([tmp_path / "gone.png"] * 20)


# --- Before, after and again --------------------------------------------------------------


@pytest.mark.parametrize("ask", ASKS)
def test_nothing_is_answered_before_fit(detector: Any, ask: str) -> None:
    message = rf"^{name_of(detector)}: not fitted .*fit\(images\)"
    with pytest.raises(NotFittedError, match=message) as caught:
        getattr(detector, ask)(MIXED)
    assert isinstance(caught.value, SklearnNotFittedError)


def test_what_is_not_fitted_is_not_written(detector: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFittedError, match=rf"^{name_of(detector)}: not fitted .*before save"):
        detector.save(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


WAYS_TO_FAIL: list[tuple[dict[str, Any], Any, type[Exception]]] = [
    ({}, [*NORMAL, 3], InvalidTypeError),
    ({}, [*NORMAL, np.full((HEIGHT, WIDTH), np.inf)], ImageError),
    ({"batch_size": 0}, NORMAL, InvalidValueError),
    ({"false_alarm_rate": 0.001}, NORMAL, CalibrationWarning),  # an error in this run
]


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize(("parameters", "images", "error"), WAYS_TO_FAIL)
def test_a_failure_leaves_what_was_fitted_whole(
    fitted: Any, twin: Any, method: str, parameters: dict[str, Any], images: Any, error: Any
) -> None:
    needs(twin, method)
    twin.set_params(**parameters)
    before = state_of(twin)
    with pytest.raises(error):
        getattr(twin, method)(images)
    assert changed_since(before, twin) == []
    twin.set_params(**{name: fitted.get_params()[name] for name in parameters})
    assert_alike(twin, fitted)


def test_partial_fit_begins_as_fit_does_and_goes_on(fitted: Any, detector: Any) -> None:
    needs(detector, "partial_fit")
    assert detector.partial_fit(NORMAL) is detector
    assert_alike(detector, fitted)
    assert detector.partial_fit(good(10, 5)) is detector
    assert (detector.score(MIXED) != fitted.score(MIXED)).any()
    assert detector.predict(bad(2)).tolist() == [-1, -1]


@pytest.mark.parametrize("method", ["fit", "partial_fit", "fit_embeddings"])
def test_a_warning_names_the_line_that_called(twin: Any, method: str) -> None:
    needs(twin, method)
    data = twin.backbone_.embed(NORMAL) if method == "fit_embeddings" else NORMAL
    twin.set_params(false_alarm_rate=0.001)
    with pytest.warns(CalibrationWarning, match="needs 999 normal images") as caught:
        getattr(twin, method)(data)
    assert {warning.filename for warning in caught} == {__file__}


def test_what_is_fitted_answers_by_what_it_was_fitted_with(
    fitted: Any, twin: Any, tmp_path: Path
) -> None:
    """Each gave scores of no meaning, or a file of another detector."""
    path, given = tmp_path / "model.safetensors", twin.get_params()
    free = {"batch_size", "max_pixels", "memory_budget", "n_jobs", "on_error", "random_state"}
    free |= {"verbose", "maps"}
    methods = [lambda: twin.detect(MIXED), lambda: twin.save(path)]
    if hasattr(twin, "set_false_alarm_rate"):
        methods += [lambda: twin.recalibrate(NORMAL), lambda: twin.partial_fit(NORMAL)]
    of_itself = {"false_alarm_rate", "false_alarm_confidence"}  # the last two take another promise
    names = [name for name in given if name.split("__")[-1] not in free]
    for name in names if len(names) < 50 else names[:: len(names) // 25]:
        if name in ("gate", "detector"):  # whose own parameters come one by one
            continue
        twin.set_params(**{name: "another"})
        before = state_of(twin)
        for method in methods[: 2 if name in of_itself else None]:
            with pytest.raises(AnomalibLiteError, match=name.split("__")[-1]):
                method()
        assert changed_since(before, twin) == []
        twin.set_params(**{name: given[name]})
    assert not path.exists()
    assert_alike(twin, fitted)
    twin.save(path)
    loaded = load(path, backbone=Small()).set_params(engine="another")
    with pytest.raises(InvalidValueError, match=r"engine must stay as it was in fit.* or call fit"):
        loaded.score(MIXED)


def test_another_rate_says_how() -> None:
    detector = PatchCore(Small(), **QUICK).fit(NORMAL)
    detector.false_alarm_rate = 0.5
    with pytest.raises(InvalidValueError, match=r"call set_false_alarm_rate\(0.5\), or call fit"):
        detector.score(MIXED)
    before = detector.threshold_
    detector.set_false_alarm_rate(0.5)
    assert detector.threshold_ < before
    assert detector.detect(MIXED).labels.any()


# --- Embeddings of one's own --------------------------------------------------------------


def test_embeddings_give_what_their_images_give(fitted: Any, detector: Any) -> None:
    needs(detector, "fit_embeddings")
    E, questions = (fitted.backbone_.embed(images) for images in (NORMAL, MIXED))
    for form in (E, list(E)):
        assert detector.fit_embeddings(form) is detector
        assert detector.threshold_ == pytest.approx(fitted.threshold_, rel=1e-4)
        scores = detector.score_embeddings(questions)
        assert (scores.shape, scores.dtype) == ((7,), np.float32)
        np.testing.assert_allclose(scores, fitted.score(MIXED), rtol=1e-4)
    np.testing.assert_allclose(detector.score_embeddings(list(questions)), scores, rtol=1e-5)
    assert detector.n_features_ == fitted.n_features_ == E.shape[3]
    detector.fit_embeddings(iter(E))  # what is held back may be drawn as they come
    np.testing.assert_allclose(detector.score_embeddings(questions)[4:], scores[4:], rtol=0.1)


def test_after_embeddings_no_image_can_be_asked(fitted: Any, twin: Any, detector: Any) -> None:
    needs(detector, "fit_embeddings")
    E = twin.backbone_.embed(NORMAL)
    with pytest.raises(NotFittedError, match=rf"^{name_of(detector)}: .*fit_embeddings"):
        detector.score_embeddings(E)
    twin.fit_embeddings(E)
    assert not hasattr(twin, "backbone_")
    for ask in ASKS:
        with pytest.raises(NotFittedError, match=rf"^{name_of(detector)}: .*score_embeddings"):
            getattr(twin, ask)(MIXED)
    assert_alike(twin.fit(NORMAL), fitted)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda E: [], InvalidValueError, "N of at least 1"),
        (lambda E: E[:0], InvalidValueError, "N of at least 1"),
        (lambda E: E[0], InvalidValueError, r"shape \(N, h, w"),
        (lambda E: E.reshape(len(E), -1), InvalidValueError, r"shape \(N, h, w"),
        (lambda E: E[..., :0], InvalidValueError, "shape"),
        (lambda E: 7.0, InvalidValueError, "shape"),
        (
            lambda E: np.where(E.max() == E, np.nan, E),
            InvalidValueError,
            r"E\[\d+\] must be finite",
        ),
        (
            lambda E: np.where(E.max() == E, np.inf, E),
            InvalidValueError,
            r"E\[\d+\] must be finite",
        ),
        (lambda E: [*E[:6], E[6][..., :18]], InvalidValueError, r"got \(12, 20, \d+\) for E\[\d\]"),
        (lambda E: "text", InvalidTypeError, "numeric"),
        (lambda E: None, InvalidValueError, "E"),
        (lambda E: [["a"]], InvalidTypeError, "must (be|hold) numeric"),
    ],
)
def test_embeddings_that_are_none_are_refused(
    fitted: Any, twin: Any, spoil: Any, error: type[Exception], message: str
) -> None:
    needs(twin, "fit_embeddings")
    E = fitted.backbone_.embed(MIXED)
    for ask in (twin.fit_embeddings, twin.score_embeddings):
        with pytest.raises(error, match=f"^{name_of(twin)}: .*{message}"):
            ask(spoil(E))
    d = E.shape[3]
    with pytest.raises(
        InvalidValueError, match=rf"shape \(N, h, w, {d}\), got \(12, 20, {d + 2}\)"
    ):
        twin.score_embeddings(np.concatenate([E, E[..., :2]], axis=3))
    assert_alike(twin, fitted)


# --- Files --------------------------------------------------------------------------------


@pytest.mark.parametrize("include_backbone", [False, True])
def test_a_file_holds_it_to_the_bit(twin: Any, include_backbone: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    twin.threshold_ = float(np.median(twin.score(MIXED)))
    twin.save(path, include_backbone=include_backbone)
    again = load(path, backbone=Small())
    assert_alike(again, twin)
    for name, value in twin.get_params().items():
        if not isinstance(value, nn.Module) and not hasattr(value, "fit"):
            read = again.get_params()[name]
            assert tuple(read) == value if isinstance(value, tuple) else read == value
    again.save(path)  # a loaded detector can be saved as well
    assert_alike(load(path, backbone=Small()), twin)


@pytest.mark.parametrize("how", ["top4%", "top0.5% pixels", "smoothed", "structure"])
def test_any_image_score_fits_scores_and_is_saved(detector: Any, how: str, tmp_path: Path) -> None:
    if "image_score" not in detector.get_params():
        pytest.skip(f"{name_of(detector)} scores maps by its members")
    detector.set_params(image_score=how, false_alarm_rate=0.2)
    if "global_weight" in detector.get_params():
        detector.set_params(global_weight=0.0)
    detector.fit(good(40))
    assert detector.score(bad(4)).min() > detector.threshold_
    # Four scores may set the threshold: a rate above 0.8 has a chance of 0.2 ** 4.
    assert (detector.score(good(40, 7)) > detector.threshold_).mean() < 0.8
    detector.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", backbone=Small())
    assert_alike(again, detector)
    if hasattr(detector, "partial_fit"):
        assert_alike(again.partial_fit(good(20, 5)), detector.partial_fit(good(20, 5)))
    one_by_one = [detector.score(image[None])[0] for image in MIXED]
    np.testing.assert_allclose(detector.score(MIXED), one_by_one, rtol=1e-5)
    if how == "structure":
        assert detector.map_statistics_.shape == (2, 3)
        # Heatmaps are distances, scores are standard deviations.
        assert load(tmp_path / "model.safetensors", backbone=Small()).pixel_threshold_ > 0
        highest = np.median(detector.anomaly_map(good(40, 7)).max(axis=(1, 2)))
        assert 0.3 < highest / detector.pixel_threshold_ < 1.5  # which four images set
        assert detector.anomaly_map(bad(4)).max() > 0.9 * detector.pixel_threshold_
        for n, calibration in ((6, "split"), (1, "split"), (1, "leave_one_out")):
            few = clone(detector).set_params(calibration=calibration)
            with pytest.raises(InvalidValueError, match=r"covariance|'structure' needs at least"):
                few.fit(good(n))


@pytest.mark.parametrize("n_images", [40, 300])
def test_structure_keeps_the_false_alarm_rate(n_images: int) -> None:
    E = np.random.default_rng(0).gamma(2, size=(n_images + 2000, 5, 7, 3)).astype(np.float32)
    detector = PatchCore(image_score="structure", false_alarm_rate=0.1, coreset_ratio=0.02)
    detector.fit_embeddings(E[:n_images])
    # As many teach how maps vary as calibrate; none of them is fitted on.
    n = len(detector.calibration_scores_)
    assert n == {40: 9, 300: 30}[n_images]
    assert detector.n_absorbed_ == 0
    rate = (detector.score_embeddings(E[n_images:]) > detector.threshold_).mean()
    assert rate < 0.1 + 4 * (0.1 * 0.9 / n) ** 0.5
    # The same images tell the threshold of heatmaps: that of their largest values.
    patch_scores, size = detector._score_patches(E[n_images:])[0], (40, 56)  # 8 pixels a patch
    heatmaps = anomaly_maps(patch_scores, size, [size] * len(patch_scores), detector.smoothing)
    peaks = np.array([heatmap.max() for heatmap in heatmaps])
    rate = (peaks > detector.pixel_threshold_).mean()
    assert 0 < rate < 0.1 + 4 * (0.1 * 0.9 / n) ** 0.5


@pytest.mark.parametrize("fusion", ["concat", "per_layer"])
def test_after_an_update_both_thresholds_of_a_structure_score_are_of_the_new_images(
    fusion: str, tmp_path: Path
) -> None:
    detector = PatchCore(Small(), **PLAIN, image_score="structure", false_alarm_rate=0.2)
    detector.set_params(image_size=(48, 80), fusion=fusion, coreset_ratio=0.1).fit(good(40))
    assert len(detector.calibration_scores_) == 4
    taught, level = detector._learner().map_statistics_, detector._map_threshold
    more = good(60, 3)
    detector.partial_fit(more)
    # Of 4 that the rate needs and a fifth, 12; all of them calibrate, as the statistics stay.
    held = more[np.random.RandomState(0).permutation(60)[-12:]]
    np.testing.assert_array_equal(detector._learner().map_statistics_, taught)
    np.testing.assert_allclose(detector.calibration_scores_, detector.score(held), rtol=1e-4)
    peaks = detector.anomaly_map(held).max(axis=(1, 2))
    assert detector._map_threshold == pytest.approx(conformal_threshold(peaks, 0.2), rel=1e-4)
    assert detector._map_threshold < level  # the bank has grown
    detector.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", backbone=Small())
    assert again._map_threshold == detector._map_threshold
    with pytest.warns(CalibrationWarning, match="threshold_ is infinite"):
        detector.partial_fit(good(1, 4))
    assert detector._map_threshold == detector.threshold_ == np.inf


def test_heatmaps_of_an_older_file_with_a_structure_score(tmp_path: Path) -> None:
    detector = PatchCore(Small(), **PLAIN, image_score="structure", false_alarm_rate=0.2)
    detector.set_params(image_size=(48, 80)).fit(good(30))
    level, detector.pixel_threshold_ = detector.pixel_threshold_, None
    detector.save(tmp_path / "model.safetensors")
    old = load(tmp_path / "model.safetensors", backbone=Small())
    assert old.detect(bad(1)).labels[0]
    with pytest.raises(InvalidValueError, match=r"^PatchCore: the threshold of the heatmaps .*set"):
        _ = old._map_threshold
    old.pixel_threshold_ = level
    assert old._map_threshold == level
    old.pixel_threshold_ = None
    assert old.partial_fit(good(30, 3))._map_threshold > 0


def test_a_loaded_detector_learns_as_the_one_saved(fitted: Any, twin: Any, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", backbone=Small())
    if hasattr(fitted, "partial_fit"):
        assert_alike(again.partial_fit(good(10, 5)), twin.partial_fit(good(10, 5)))
    assert_alike(again.fit(NORMAL), fitted)


def test_a_file_holds_arrays_and_json_alone(fitted: Any, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert list(file.metadata()) == ["anomalib_lite"]
        header = json.loads(file.metadata()["anomalib_lite"])
        assert all(file.get_tensor(name).dtype.kind in "fiu" for name in file.keys())  # noqa: SIM118
    assert header["format_version"] == persistence.FORMAT_VERSION
    assert header["library_version"] == anomalib_lite.__version__
    assert header["detector"] == name_of(fitted)
    assert header["parameters"].keys() == fitted.get_params(deep=False).keys()
    assert header["backbone"]["engine"] == "torch"
    assert header["state"]["threshold"] == fitted.threshold_


def test_a_file_that_does_not_fit_is_refused(fitted: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(OutputError, match=rf"^{name_of(fitted)}: cannot write "):
        fitted.save(tmp_path / "no" / "such" / "model.safetensors")
    fitted.save(path)
    with pytest.raises(InvalidValueError, match=r"a module of your own.*load\(path, backbone="):
        load(path)
    other = Small()
    other.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ModelFileError, match="other backbone weights"):
        load(path, backbone=other)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelFileError, match=r"model.safetensors is cut short"):
        load(path, backbone=Small())


@pytest.mark.parametrize("detector", [PatchCore(), PaDiM(), SubspaceAD()], ids=name_of)
def test_patches_alone_are_fused(detector: Any) -> None:
    """A summary of the image in each patch is for MahalanobisVFM, which takes them apart."""
    with pytest.raises(InvalidValueError, match=r"fusion must be one of .* got 'summary'"):
        detector.set_params(fusion="summary").fit(NORMAL)
