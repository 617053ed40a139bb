"""PatchCore: the public contract, and a reference written from the paper."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from sklearn.base import clone
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from anomalib_lite import PatchCore
from anomalib_lite.backbones import Backbone
from anomalib_lite.calibration import conformal_threshold
from anomalib_lite.datasets import Sample
from anomalib_lite.errors import (
    AnomalibLiteError,
    CalibrationWarning,
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
    NotFittedError,
)
from anomalib_lite.fusion import patch_embeddings
from anomalib_lite.images import ImageSource

HEIGHT, WIDTH = 48, 80
DEFECT = np.s_[8:20, 48:68]  # right of the middle and above it: swapped sides would show


class Small(nn.Module):
    """A network of two layers: real, and fast."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 4, stride=4)
        self.second = nn.Conv2d(8, 12, 2, stride=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        a = torch.relu(self.first(x))
        return [a, torch.relu(self.second(a))]


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def make(**parameters: Any) -> PatchCore:
    options = {"backbone": small(), "image_size": 48, "dtype": "float32", "device": "cpu"}
    return PatchCore(**(options | {"false_alarm_rate": 0.25} | parameters))


def good(n: int, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Noise over a slope, in uint8."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(90, 150, size[1])[:, None]
    return (slope + rng.integers(-12, 13, (n, *size, 3))).astype(np.uint8)


def bad(n: int, seed: int = 1) -> np.ndarray:
    images = good(n, seed)
    images[(slice(None), *DEFECT)] = (250, 20, 20)
    return images


@pytest.fixture(scope="module")
def fitted() -> PatchCore:
    """Not to be changed by any test."""
    return make().fit(good(16))


# --- What it answers ----------------------------------------------------------------------


def test_scores_are_higher_for_anomalous_images(fitted: PatchCore) -> None:
    normal, anomalous = fitted.score(good(6, 2)), fitted.score(bad(6))
    for scores in (normal, anomalous):
        assert (scores.shape, scores.dtype) == ((6,), np.float32)
    assert anomalous.min() > normal.max()
    assert isinstance(fitted.threshold_, float)
    assert anomalous.min() > fitted.threshold_


def test_maps_show_where(fitted: PatchCore) -> None:
    maps = fitted.anomaly_map(bad(3))
    assert (maps.shape, maps.dtype) == ((3, HEIGHT, WIDTH), np.float32)
    for heatmap in maps:
        y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
        assert 8 <= y < 20
        assert 48 <= x < 68
        outside = np.ones_like(heatmap, bool)
        outside[:30, 38:78] = False
        assert heatmap[outside].max() < heatmap[DEFECT].mean()


def test_every_view_is_a_view_of_detect(fitted: PatchCore) -> None:
    images = np.concatenate([good(4, 2), bad(3)])
    found = fitted.detect(images)
    np.testing.assert_array_equal(found.scores, fitted.score(images))
    np.testing.assert_array_equal(found.maps, fitted.anomaly_map(images))
    assert found.labels.dtype == bool
    np.testing.assert_array_equal(found.labels, found.scores > fitted.threshold_)
    assert found.labels[4:].all()
    assert found.names == [f"images[{i}]" for i in range(7)]
    assert found.skipped == []
    assert fitted.detect(images, maps=False).maps is None
    np.testing.assert_array_equal(fitted.predict(images), np.where(found.labels, -1, 1))
    assert fitted.predict(images).dtype.kind == "i"
    np.testing.assert_array_equal(fitted.score_samples(images), -found.scores)
    decision = fitted.decision_function(images)
    assert decision.dtype == np.float32
    np.testing.assert_array_equal(decision, np.float32(fitted.threshold_) - found.scores)
    np.testing.assert_array_equal(decision < 0, found.labels)


def test_the_threshold_can_be_set(fitted: PatchCore) -> None:
    detector = copy.deepcopy(fitted)
    images = np.concatenate([good(4, 2), bad(3)])
    scores = detector.score(images)
    for threshold in (0.0, float(np.median(scores)), float(scores[0]), math.inf):
        detector.threshold_ = threshold
        np.testing.assert_array_equal(detector.detect(images).labels, scores > threshold)
        np.testing.assert_array_equal(detector.predict(images) == -1, scores > threshold)
        np.testing.assert_array_equal(detector.decision_function(images) < 0, scores > threshold)
        np.testing.assert_array_equal(detector.score(images), scores)


def test_images_of_many_sizes_keep_their_order_and_their_own_maps(fitted: PatchCore) -> None:
    images = [*good(3, 2), *good(2, 3, (60, 48)), *bad(2), *good(2, 4, (96, 200)), *good(1, 5)]
    order = np.random.default_rng(0).permutation(len(images))
    mixed = [images[i] for i in order]
    found = fitted.detect(mixed)
    assert isinstance(found.maps, list)
    assert [m.shape for m in found.maps] == [i.shape[:2] for i in mixed]
    for image, score, heatmap in zip(mixed, found.scores, found.maps, strict=True):
        alone = fitted.detect(image)
        assert score == pytest.approx(alone.scores[0], rel=1e-4)
        np.testing.assert_allclose(heatmap, alone.maps[0], rtol=1e-3, atol=1e-4)


def test_the_map_of_a_resized_image_has_its_own_size_and_place(fitted: PatchCore) -> None:
    large = bad(1).repeat(3, axis=1).repeat(3, axis=2)  # (1, 144, 240, 3)
    (heatmap,) = fitted.anomaly_map(large)
    assert heatmap.shape == (144, 240)
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    assert 24 <= y < 60
    assert 144 <= x < 204


def test_every_kind_of_input_gives_the_same_scores(fitted: PatchCore, tmp_path: Path) -> None:
    images = np.concatenate([good(2, 2), bad(2)])
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    expected = fitted.score(images)
    for form in (
        list(images),
        [Image.fromarray(pixels) for pixels in images],
        torch.from_numpy(images).permute(0, 3, 1, 2),
        tmp_path,
        str(tmp_path),
        paths,
        [str(p) for p in paths],
        tuple(Sample(p, 0, "good") for p in paths),
        ImageSource(images),
        images.astype(np.float32) / 255,
    ):
        np.testing.assert_allclose(fitted.score(form), expected, rtol=1e-3)
    assert fitted.detect(tmp_path).names == [str(p) for p in paths]
    assert fitted.score(images[0]).shape == (1,)


# --- Scikit-learn's contract --------------------------------------------------------------


def test_the_constructor_only_stores() -> None:
    layers = ["first"]
    detector = PatchCore("no such", layers=layers, coreset_ratio=99, index=3, image_size="large")
    assert detector.get_params()["layers"] is layers
    assert detector.get_params()["coreset_ratio"] == 99
    assert detector.set_params(coreset_ratio=0.5, fusion="odd") is detector
    assert (detector.coreset_ratio, detector.fusion) == (0.5, "odd")
    with pytest.raises(ValueError, match="Invalid parameter 'coreset_rate'"):
        detector.set_params(coreset_rate=0.5)
    with pytest.raises(TypeError):
        PatchCore(coreset_rate=0.5)  # type: ignore[call-arg]
    assert "coreset_ratio=0.5" in repr(detector)


def test_clones_are_equal_and_not_fitted(fitted: PatchCore) -> None:
    twin = clone(fitted)
    assert not [name for name in vars(twin) if name.endswith("_")]
    before, after = fitted.get_params(), twin.get_params()
    assert before.keys() == after.keys()
    for name in before.keys() - {"backbone"}:
        assert before[name] == after[name]
    twin.fit(good(16))
    np.testing.assert_array_equal(twin.score(bad(2)), fitted.score(bad(2)))


def test_fit_returns_itself_and_leaves_the_parameters_alone() -> None:
    backbone = small().train()
    detector = make(backbone=backbone)
    before = dict(detector.get_params())
    assert detector.fit(good(6)) is detector
    assert all(detector.get_params()[k] is v for k, v in before.items())
    assert backbone.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_of_a_fitted_detector_answer_alike(fitted: PatchCore, copied: Any) -> None:
    twin = copied(fitted)
    images = np.concatenate([good(3, 2), bad(2)])
    np.testing.assert_array_equal(twin.score(images), fitted.score(images))
    np.testing.assert_array_equal(twin.anomaly_map(images), fitted.anomaly_map(images))
    assert twin.threshold_ == fitted.threshold_


def test_it_is_the_last_step_of_a_pipeline(fitted: PatchCore) -> None:
    pipeline = Pipeline([("detector", make())]).fit(good(16))
    images = np.concatenate([good(3, 2), bad(2)])
    np.testing.assert_array_equal(pipeline.predict(images), fitted.predict(images))
    np.testing.assert_array_equal(pipeline.score_samples(images), fitted.score_samples(images))
    decision = pipeline.decision_function(images)
    np.testing.assert_array_equal(decision, fitted.decision_function(images))


def test_a_grid_search_chooses_parameters() -> None:
    images = [*good(10), *bad(6), *good(6, 5, (60, 48))]  # of two sizes: no array could hold them
    y = np.array([0] * 10 + [1] * 6 + [0] * 6)
    order = np.random.default_rng(0).permutation(len(images))

    def auroc(detector: PatchCore, X: Any, y: Any) -> float:
        return float(roc_auc_score(y, detector.score(X)))

    search = GridSearchCV(
        make(false_alarm_rate=0.3),
        {"coreset_ratio": [0.05, 0.5], "image_score": ["max", "top1%"]},
        scoring=auroc,
        cv=3,
        error_score="raise",
    )
    search.fit([images[i] for i in order], y[order])
    assert search.best_score_ == 1.0
    assert search.predict(bad(2)).tolist() == [-1, -1]


# --- Labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, np.array, lambda y: np.array(y, bool), tuple])
def test_images_labelled_anomalous_are_left_out(form: Callable[[list[int]], Any]) -> None:
    normal, y = good(9), [0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    images = list(normal)
    for i in (1, 5):
        images.insert(i, bad(1)[0])
    labelled, plain = make().fit(images, form(y)), make().fit(normal)
    np.testing.assert_array_equal(labelled.memory_bank_.embeddings_, plain.memory_bank_.embeddings_)
    assert labelled.threshold_ == plain.threshold_


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 0], r"y must hold 6 labels.*shape \(2,\)"),
        ([0, 1, 2, 0, 0, 0], "0 for normal and 1 for anomalous.*2"),
        ([1, 1, 1, -1, 1, 1], "0 for normal"),
        ([1] * 6, "no normal image"),
        ([[0]] * 6, "must hold 6 labels"),
        (["good"] * 6, "0 for normal"),
    ],
)
def test_labels_that_make_no_sense_are_refused(y: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^PatchCore: .*{message}"):
        make().fit(good(6), y)


@pytest.mark.parametrize("kind", [list, tuple])
def test_samples_labelled_anomalous_are_refused_by_fit(kind: Any, tmp_path: Path) -> None:
    samples = []
    for i, pixels in enumerate([*good(8), *bad(1)]):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        samples.append(Sample(tmp_path / f"{i}.png", int(i == 8), "any"))
    with pytest.raises(InvalidValueError, match=r"labelled anomalous.*dataset.train.*y="):
        make().fit(kind(samples))
    with_labels = make().fit(kind(samples), y=[s.label for s in samples])
    plain = make().fit(kind(samples[:8]))
    assert with_labels.threshold_ == plain.threshold_
    assert plain.score(kind(samples)).argmax() == 8


# --- Reading ------------------------------------------------------------------------------


class Lazy:
    """An image that counts how often it is made."""

    lock = threading.Lock()

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.count = pixels, 0

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        with self.lock:
            self.count += 1
        return self.pixels


@pytest.mark.parametrize("wrap", [list, ImageSource])
@pytest.mark.parametrize("calibration", ["split", "leave_one_out"])
def test_no_image_is_decoded_twice(wrap: Any, calibration: str) -> None:
    images = [Lazy(pixels) for pixels in good(9)]
    detector = make(calibration=calibration).fit(wrap(images))
    assert [i.count for i in images] == [1] * 9
    detector.detect(wrap(images))
    assert [i.count for i in images] == [2] * 9


def test_broken_images_are_skipped_in_their_places(fitted: PatchCore, tmp_path: Path) -> None:
    detector = copy.deepcopy(fitted).set_params(on_error="skip")
    normal = good(5, 2)
    images = [normal[0], tmp_path / "gone.png", *normal[1:3], normal[0] * 2.5, *bad(1)]
    found = detector.detect(images)
    assert np.isnan(found.scores).tolist() == [False, True, False, False, True, False]
    assert found.labels.tolist()[1] is found.labels.tolist()[4] is True
    assert [m is None for m in found.maps] == [False, True, False, False, True, False]
    assert [i for i, _ in found.skipped] == [1, 4]
    assert "gone.png" in found.skipped[0][1]
    assert "images[4]" in found.skipped[1][1]
    assert detector.predict(images)[[1, 4]].tolist() == [-1, -1]
    usable = [images[i] for i in (0, 2, 3, 5)]
    np.testing.assert_allclose(found.scores[[0, 2, 3, 5]], fitted.score(usable), rtol=1e-5)
    assert np.isnan(detector.decision_function(images)[1])
    with pytest.raises(MissingPathError, match=r"^PatchCore: .*gone.png"):
        fitted.score(images)
    nothing = detector.detect([tmp_path / "gone.png"])
    assert np.isnan(nothing.scores).all()
    assert nothing.maps == [None]


def test_broken_images_are_skipped_when_fitting(tmp_path: Path) -> None:
    images = [*good(10)]
    for i in (0, 4, 11):
        images.insert(i, tmp_path / f"gone{i}.png")
    detector = make(on_error="skip").fit(images)
    assert sorted(Path(name).name for name, _ in detector.skipped_) == [
        "gone0.png",
        "gone11.png",
        "gone4.png",
    ]
    assert all("does not exist" in reason for _, reason in detector.skipped_)
    assert detector.predict(bad(2)).tolist() == [-1, -1]
    with pytest.raises(MissingPathError, match=r"^PatchCore: .*gone"):
        make().fit(images)
    with pytest.raises(InvalidValueError, match=r"none of 3 images could be used.*does not exist"):
        make(on_error="skip").fit([tmp_path / "gone.png"] * 3)


@pytest.mark.parametrize("seed", range(4))
def test_one_usable_image_is_found_wherever_it_was_dealt(seed: int, tmp_path: Path) -> None:
    images = [good(1)[0], tmp_path / "gone.png"]
    with pytest.warns(CalibrationWarning):
        detector = make(on_error="skip", random_state=seed).fit(images)
    assert len(detector.skipped_) == 1


@pytest.mark.parametrize("index", [0, 7])
def test_a_bad_image_is_named_whatever_the_split(index: int) -> None:
    images: list[Any] = [*good(8)]
    images[index] = np.full((20, 30, 3), np.nan)
    with pytest.raises(ImageError, match=rf"^PatchCore: images\[{index}\] must be finite"):
        make().fit(images)


# --- Before, after and again --------------------------------------------------------------


@pytest.mark.parametrize(
    "ask", ["score", "anomaly_map", "detect", "predict", "score_samples", "decision_function"]
)
def test_nothing_is_answered_before_fit(ask: str) -> None:
    with pytest.raises(NotFittedError, match=r"^PatchCore: not fitted .*fit\(images\)") as caught:
        getattr(make(), ask)(good(1))
    assert isinstance(caught.value, SklearnNotFittedError)
    embedded = make().fit_embeddings(embeddings(8))
    with pytest.raises(NotFittedError, match="score_embeddings"):
        getattr(embedded, ask)(good(1))
    with pytest.raises(NotFittedError, match="fit_embeddings"):
        make().score_embeddings(embeddings(1))


@pytest.mark.parametrize(
    ("parameters", "images", "error"),
    [
        ({}, [*good(7), 3], InvalidTypeError),
        ({}, [*good(7), np.full((20, 30), np.inf)], ImageError),
        ({"coreset_ratio": 1e-9}, good(8, 3), InvalidValueError),
        ({"n_neighbors": 10**6}, good(8, 3), InvalidValueError),
        ({"index": "IVF4096,Flat"}, good(8, 3), InvalidValueError),
        ({"layers": ["third"]}, good(8, 3), InvalidValueError),
        ({"false_alarm_rate": 0.001}, good(8, 3), CalibrationWarning),  # an error in this run
    ],
)
def test_a_failed_fit_leaves_the_old_one_whole(
    fitted: PatchCore, parameters: dict[str, Any], images: Any, error: type[Exception]
) -> None:
    detector = copy.deepcopy(fitted).set_params(**parameters)
    before = {k: v for k, v in vars(detector).items() if k.endswith("_")}
    with pytest.raises(error):
        detector.fit(images)
    assert {k: v for k, v in vars(detector).items() if k.endswith("_")} == before
    detector.set_params(**{k: v for k, v in fitted.get_params().items() if k in parameters})
    np.testing.assert_array_equal(detector.score(bad(3)), fitted.score(bad(3)))


def test_fitting_again_forgets_what_was_before(fitted: PatchCore) -> None:
    detector = make().fit(bad(12))
    detector.fit(good(16))
    np.testing.assert_array_equal(
        detector.memory_bank_.embeddings_, fitted.memory_bank_.embeddings_
    )
    assert detector.threshold_ == fitted.threshold_


def test_the_same_seed_gives_the_same_detector_and_another_another() -> None:
    images = good(12)
    first = make(random_state=3).fit(images)
    np.random.seed(1)  # noqa: NPY002, the global generator must not matter
    second = make(random_state=np.random.RandomState(3)).fit(images)
    np.testing.assert_array_equal(first.memory_bank_.embeddings_, second.memory_bank_.embeddings_)
    np.testing.assert_array_equal(first.score(bad(3)), second.score(bad(3)))
    assert first.threshold_ == second.threshold_
    third = make(random_state=4).fit(images)
    assert not np.array_equal(first.memory_bank_.embeddings_, third.memory_bank_.embeddings_)


def test_the_batch_size_does_not_matter() -> None:
    images, questions = [*good(7), *good(6, 5, (60, 48))], [*good(3, 2), *bad(3)]
    reference = make(batch_size=32).fit(images)
    for batch_size in (1, 3):
        detector = make(batch_size=batch_size).fit(images)
        np.testing.assert_allclose(detector.score(questions), reference.score(questions), rtol=1e-3)
        assert detector.threshold_ == pytest.approx(reference.threshold_, rel=1e-3)


def test_it_is_silent_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    make().fit(good(8)).score(good(2))
    make(verbose=1).fit(good(8)).score(good(2))  # no terminal, no bar
    assert capfd.readouterr() == ("", "")


# --- Against the paper --------------------------------------------------------------------


def timm_maps(images: np.ndarray, backbone: Backbone) -> list[Tensor]:
    network = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3))
    assert not network.load_state_dict(backbone.original_state(), strict=False)[0]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        return list(network.eval()((x - 0.5) / 0.5))


def naive_embeddings(maps: list[Tensor]) -> np.ndarray:
    """Locally aware patch features, (N, h, w, D) float64: Section 3.1 as its authors coded it."""
    pooled = []
    for level in maps:
        padded = np.pad(level.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        pooled.append(torch.from_numpy(windows.mean((-1, -2))))
    size = pooled[0].shape[-2:]
    pooled[1] = nn.functional.interpolate(pooled[1], size, mode="bilinear", align_corners=False)
    return np.asarray(torch.cat(pooled, 1).permute(0, 2, 3, 1))


def naive_coreset(rows: np.ndarray, n: int, first: int) -> np.ndarray:
    """Algorithm 1 without the random projection."""
    picks = [first]
    nearest = ((rows - rows[first]) ** 2).sum(1)
    while len(picks) < n:
        picks.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((rows - rows[picks[-1]]) ** 2).sum(1))
    return rows[picks]


def naive_equation_7(bank: np.ndarray, patch: np.ndarray) -> float:
    distances = np.linalg.norm(bank - patch, axis=1)
    m_star = int(distances.argmin())
    support = np.linalg.norm(bank - bank[m_star], axis=1).argsort(kind="stable")[:9]
    weight = 1 - np.exp(distances[m_star]) / sum(np.exp(distances[i]) for i in support)
    return float(weight * distances[m_star])


@pytest.mark.parametrize("coreset_ratio", [0.1, 1.0])
def test_scores_and_maps_are_those_of_the_paper(coreset_ratio: float) -> None:
    train, test = good(6, 0, (64, 96)), good(4, 1, (64, 96))
    test[2:, 20:40, 60:80] = (240, 30, 30)
    detector = PatchCore(
        image_size=64,
        coreset_ratio=coreset_ratio,
        calibration="leave_one_out",  # nothing is held back: all images are in the bank
        false_alarm_rate=0.2,
        dtype="float32",
        device="cpu",
    ).fit(train)
    rows = naive_embeddings(timm_maps(train, detector.backbone_)).reshape(-1, 152)
    first = int(np.abs(rows - detector.memory_bank_.embeddings_[0]).sum(axis=1).argmin())
    bank = naive_coreset(rows, round(coreset_ratio * len(rows)), first)
    assert detector.memory_bank_.embeddings_.shape == bank.shape
    E = naive_embeddings(timm_maps(test, detector.backbone_))  # (4, 8, 12, 152)
    patch_scores = cdist(E.reshape(-1, 152), bank).min(axis=1).reshape(4, 8, 12)
    scale = patch_scores.max()
    found = detector.detect(test)
    expected = patch_scores.max((1, 2))
    np.testing.assert_allclose(found.scores, expected, atol=1e-4 * scale)
    up = nn.functional.interpolate(torch.from_numpy(patch_scores)[None], (64, 96), mode="bilinear")
    maps = [gaussian_filter(m, 4.0) for m in up[0].numpy()]
    np.testing.assert_allclose(found.maps, maps, atol=1e-4 * scale)
    detector.set_params(image_score="top1%")
    np.testing.assert_allclose(detector.score(test), expected, atol=1e-4 * scale)  # 96 patches
    detector.set_params(image_score="reweighted")
    worst = [e.reshape(-1, 152)[s.argmax()] for e, s in zip(E, patch_scores, strict=True)]
    equation_7 = [naive_equation_7(bank, patch) for patch in worst]
    np.testing.assert_allclose(detector.score(test), equation_7, atol=2e-4 * scale)
    if coreset_ratio == 1.0:
        detector.set_params(image_score="max")
        assert detector.score(train).max() < 1e-3 * scale  # each patch is in the bank itself


@pytest.mark.parametrize("k", [1, 3])
def test_a_patch_is_as_far_as_its_neighbours_are_in_the_mean(k: int) -> None:
    E, questions = embeddings(6), embeddings(3, 1)
    detector = make(n_neighbors=k, coreset_ratio=0.5).fit_embeddings(E)
    bank = detector.memory_bank_.embeddings_
    distances = np.sort(cdist(questions.reshape(-1, 5), bank), axis=1)[:, :k].mean(axis=1)
    expected = distances.reshape(3, -1).max(axis=1)
    np.testing.assert_allclose(detector.score_embeddings(questions), expected, rtol=1e-5)


@pytest.mark.parametrize("image_score", ["max", "top1%", "reweighted"])
def test_every_image_score_tells_good_from_bad(image_score: str) -> None:
    detector = make(image_score=image_score).fit(good(16))
    assert detector.score(bad(4)).min() > detector.score(good(8, 2)).max()
    assert detector.predict(bad(4)).tolist() == [-1] * 4


@pytest.mark.parametrize("coreset", ["greedy", "random", "kmeans"])
@pytest.mark.parametrize("index", ["flat", "HNSW16", "SQ8"])
def test_every_coreset_and_index_tells_good_from_bad(coreset: str, index: str) -> None:
    detector = make(coreset=coreset, index=index).fit(good(16))
    assert detector.score(bad(4)).min() > detector.score(good(8, 2)).max()


def test_reweighting_with_a_bank_of_fewer_than_nine() -> None:
    E, questions = embeddings(8), embeddings(2, 1)
    detector = make(image_score="reweighted", coreset_ratio=0.1).fit_embeddings(E)
    bank = detector.memory_bank_.embeddings_.astype(np.float64)
    assert len(bank) < 9
    for score, grid in zip(detector.score_embeddings(questions), questions, strict=True):
        rows = grid.reshape(-1, 5).astype(np.float64)
        worst = rows[cdist(rows, bank).min(axis=1).argmax()]
        assert score == pytest.approx(naive_equation_7(bank, worst), rel=1e-4)


# --- Calibration --------------------------------------------------------------------------


def embeddings(n: int, seed: int = 0, grid: tuple[int, int] = (3, 5), d: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *grid, d)).astype(np.float32)


class NeverAbsorbs(PatchCore):
    def _add_calibration_patches(self, removed: Any, accumulated: Any, random: Any) -> None:
        pass


@pytest.mark.parametrize("coreset", ["greedy", "random", "kmeans"])
@pytest.mark.parametrize(("n_neighbors", "image_score"), [(1, "max"), (3, "top1%")])
def test_no_score_rises_when_the_calibration_images_join(
    coreset: str, n_neighbors: int, image_score: str
) -> None:
    parameters: dict[str, Any] = {
        "coreset": coreset,
        "n_neighbors": n_neighbors,
        "image_score": image_score,
        "false_alarm_rate": 0.1,
        "coreset_ratio": 0.3,
    }
    E, questions = embeddings(40), embeddings(200, 1)
    joined = PatchCore(**parameters).fit_embeddings(E)
    apart = NeverAbsorbs(**parameters).fit_embeddings(E)
    assert joined.threshold_ == apart.threshold_
    n = len(apart.memory_bank_.embeddings_)
    assert len(joined.memory_bank_.embeddings_) > n
    np.testing.assert_array_equal(
        joined.memory_bank_.embeddings_[:n], apart.memory_bank_.embeddings_
    )
    risen = joined.score_embeddings(questions) - apart.score_embeddings(questions)
    assert risen.max() <= 1e-6
    assert risen.min() < -1e-3  # joining is good for something


@pytest.mark.parametrize("parameters", [{"index": "HNSW16"}, {"image_score": "reweighted"}])
def test_nothing_joins_where_a_score_could_rise(parameters: dict[str, Any]) -> None:
    joined, apart = (
        cls(false_alarm_rate=0.1, **parameters).fit_embeddings(embeddings(40)).memory_bank_
        for cls in (PatchCore, NeverAbsorbs)
    )
    np.testing.assert_array_equal(joined.embeddings_, apart.embeddings_)


@pytest.mark.parametrize("image_score", ["max", "reweighted"])
def test_future_false_alarms_stay_below_the_rate(image_score: str) -> None:
    rate, alarms, n_draws, n_future = 0.2, 0.0, 40, 100
    for draw in range(n_draws):
        detector = PatchCore(
            false_alarm_rate=rate, coreset_ratio=0.5, image_score=image_score, random_state=draw
        ).fit_embeddings(embeddings(20, 2 * draw, (2, 3), 3))
        future = detector.score_embeddings(embeddings(n_future, 2 * draw + 1, (2, 3), 3))
        alarms += float((future > detector.threshold_).mean()) / n_draws
    # Held back are 4 of 20: over draws the rate is distributed as Beta(1, 4).
    assert alarms <= rate + 4 * math.sqrt(0.2 * 0.8 / 6 / n_draws + 0.16 / n_draws / n_future)
    assert alarms > 0.02


@pytest.mark.parametrize("image_score", ["max", "top1%", "reweighted"])
def test_leaving_one_out_scores_each_image_against_the_others(image_score: str) -> None:
    E = embeddings(12)
    parameters: dict[str, Any] = {"coreset_ratio": 1.0, "image_score": image_score}
    detector = make(calibration="leave_one_out", false_alarm_rate=0.2, **parameters)
    detector.fit_embeddings(E)
    assert len(detector.memory_bank_.embeddings_) == 12 * 15
    expected = []
    for i in range(12):
        bank = np.delete(E, i, axis=0).reshape(-1, 5).astype(np.float64)
        rows = E[i].reshape(-1, 5).astype(np.float64)
        distances = cdist(rows, bank).min(axis=1)
        worst = rows[distances.argmax()]
        reweighted = image_score == "reweighted"
        expected.append(naive_equation_7(bank, worst) if reweighted else distances.max())
    assert detector.threshold_ == pytest.approx(conformal_threshold(expected, 0.2), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("calibration", ["split", "leave_one_out"])
def test_a_few_images_are_enough_to_fit_and_too_few_to_promise(n: int, calibration: str) -> None:
    detector = make(calibration=calibration, false_alarm_rate=0.01)
    with pytest.warns(CalibrationWarning, match=r"needs 99 normal images") as caught:
        detector.fit(good(n))
    assert len(caught) == 1
    assert math.isinf(detector.threshold_) == (n == 1)
    assert detector.score(bad(1))[0] > detector.score(good(1, 2))[0]
    assert detector.predict(bad(1)).tolist() == [1 if n == 1 else -1]


@pytest.mark.parametrize("calibration", ["split", "leave_one_out"])
def test_the_threshold_can_be_taken_again_for_another_rate(calibration: str) -> None:
    detector = make(calibration=calibration, false_alarm_rate=0.1).fit_embeddings(embeddings(30))
    scores = detector.calibration_scores_
    assert (scores.shape, scores.dtype) == ((9 if calibration == "split" else 30,), np.float32)
    assert conformal_threshold(scores, 0.1) == detector.threshold_
    assert conformal_threshold(scores, 0.5) < detector.threshold_


def test_enough_images_are_held_back_for_the_rate() -> None:
    E = embeddings(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PatchCore(false_alarm_rate=0.05).fit_embeddings(E)  # 19 are needed
    with pytest.warns(CalibrationWarning, match="needs 24 normal images .*got 20"):
        PatchCore(false_alarm_rate=0.04).fit_embeddings(E)


# --- Embeddings of one's own --------------------------------------------------------------


def test_embeddings_give_what_their_images_give(fitted: PatchCore) -> None:
    backbone = Backbone(small(), dtype="float32", device="cpu")
    E = patch_embeddings(backbone(good(16))).numpy()
    detector = make().fit_embeddings(E)
    assert detector.threshold_ == pytest.approx(fitted.threshold_, rel=1e-4)
    np.testing.assert_allclose(
        detector.memory_bank_.embeddings_, fitted.memory_bank_.embeddings_, atol=1e-5
    )
    questions = patch_embeddings(backbone(bad(3))).numpy()
    np.testing.assert_allclose(
        detector.score_embeddings(questions), fitted.score(bad(3)), rtol=1e-4
    )
    assert detector.n_features_ == fitted.n_features_ == 20


def test_embeddings_of_many_sizes() -> None:
    grids = [*embeddings(8), *embeddings(8, 1, (2, 7))]
    detector = make().fit_embeddings(grids)
    scores = detector.score_embeddings(grids)
    assert (scores.shape, scores.dtype) == ((16,), np.float32)
    np.testing.assert_allclose(
        scores[:8], detector.score_embeddings(np.stack(grids[:8])), rtol=1e-5
    )
    as_lists = make().fit_embeddings([g.tolist() for g in grids])
    assert as_lists.threshold_ == pytest.approx(detector.threshold_, rel=1e-6)


def test_fitting_on_embeddings_after_images_forgets_the_backbone(fitted: PatchCore) -> None:
    detector = copy.deepcopy(fitted).fit_embeddings(embeddings(8))
    assert not hasattr(detector, "backbone_")
    assert detector.n_features_ == 5
    detector.fit(good(16))
    np.testing.assert_array_equal(detector.score(bad(2)), fitted.score(bad(2)))


E = embeddings(4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([], InvalidValueError, "N of at least 1"),
        (E[:0], InvalidValueError, "N of at least 1"),
        (E[0], InvalidValueError, r"shape \(N, h, w"),
        (E.reshape(4, -1), InvalidValueError, r"shape \(N, h, w"),
        (E[..., :0], InvalidValueError, "shape"),
        (7.0, InvalidValueError, "shape"),
        (np.where(E > 1.5, np.nan, E), InvalidValueError, r"E\[\d\] must be finite"),
        (np.where(E > 1.5, np.inf, E), InvalidValueError, r"E\[\d\] must be finite"),
        ([E[0], E[1][..., :3]], InvalidValueError, r"got \(3, 5, 3\) for E\[1\]"),
        ("text", InvalidTypeError, "numeric"),
        (None, InvalidValueError, "E"),
        ([["a"]], InvalidTypeError, "must be numeric"),
    ],
)
def test_embeddings_that_are_none(wrong: Any, error: type[Exception], message: str) -> None:
    detector = make().fit_embeddings(embeddings(8))
    for ask in (detector.fit_embeddings, detector.score_embeddings):
        with pytest.raises((error, AnomalibLiteError), match=f"^PatchCore: .*{message}"):
            ask(wrong)
    with pytest.raises(InvalidValueError, match=r"shape \(N, h, w, 5\), got \(3, 5, 7\)"):
        detector.score_embeddings(embeddings(2, d=7))


# --- Parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"coreset_ratio": 0}, r"coreset_ratio must be a number in \(0, 1\], got 0"),
        ({"coreset_ratio": 1.5}, r"coreset_ratio must be a number in \(0, 1\], got 1.5"),
        ({"coreset_ratio": "0.1"}, "coreset_ratio must be a number"),
        ({"coreset_ratio": True}, "coreset_ratio must be a number"),
        ({"coreset_ratio": math.nan}, "coreset_ratio must be a number"),
        ({"coreset_ratio": 1e-9}, r"coreset_ratio=1e-09 of \d+ patches keeps none. Ask for"),
        ({"n_neighbors": 0}, "n_neighbors must be a whole number of at least 1, got 0"),
        ({"n_neighbors": 1.0}, "n_neighbors must be a whole number .*got 1.0"),
        ({"n_neighbors": 10**6}, r"n_neighbors=1000000 is more than the \d+ patches"),
        ({"fusion": "conct"}, r"fusion must be one of \[.*\], got 'conct'. Did you mean 'concat'"),
        ({"coreset": "gredy"}, "got 'gredy'. Did you mean 'greedy'"),
        ({"image_score": "top_1%"}, r"image_score must be one of .*Did you mean 'top1%'"),
        ({"image_score": None}, "image_score must be one of .*got None"),
        ({"image_score": "reweighted", "n_neighbors": 2}, "defined for n_neighbors=1, got 2"),
        ({"index": "flatt"}, r"index must be 'flat'.*got 'flatt'. Did you mean 'flat'"),
        ({"index": "IVF4096,Flat"}, r"'IVF4096,Flat' cannot hold \d+ embeddings.*'flat'"),
        ({"calibration": "loo"}, "calibration must be one of .*'leave_one_out'.*got 'loo'"),
        ({"calibration": "leave_one_out", "index": "SQ8"}, "needs index='flat', got 'SQ8'. Use"),
        ({"false_alarm_rate": 0}, r"false_alarm_rate must be a number in \(0, 1\), got 0"),
        ({"false_alarm_rate": 1}, r"false_alarm_rate must be a number in \(0, 1\), got 1"),
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
        ({"on_error": "ignore"}, r"on_error must be one of \['raise', 'skip'\], got 'ignore'"),
        ({"engine": "openvnio"}, "engine must be one of .*got 'openvnio'"),
        ({"device": "gpu"}, "device must be one of .*got 'gpu'"),
        ({"dtype": "float8"}, r"dtype must be one of .*got 'float8'. Did you mean 'float"),
        ({"backbone": "resnet81"}, "backbone 'resnet81' is not known.*Did you mean 'resnet"),
        ({"backbone": 18}, "backbone must be a name or a torch.nn.Module, got int"),
        ({"layers": ["frist"]}, "layer 'frist' does not exist.*'first'.*Did you mean 'first'"),
        ({"layers": [3]}, "layer 3 does not exist"),
        ({"layers": "first"}, "layers must be a list .*got 'first'"),
        ({"layers": 1}, "layers must be a list .*got 1"),
        ({"backbone": "test_resnet", "weights": "gone.pth"}, "gone.pth does not exist"),
        ({"random_state": "seed"}, "random_state.*got 'seed'"),
        ({"random_state": -1}, "random_state.*got -1"),
    ],
)
def test_bad_parameters_are_refused_by_fit(parameters: dict[str, Any], message: str) -> None:
    detector = make(**parameters)
    with pytest.raises(AnomalibLiteError, match=f"^(PatchCore|MemoryBank): .*{message}") as caught:
        detector.fit(good(6))
    assert isinstance(caught.value, TypeError | ValueError)
    assert not [name for name in vars(detector) if name.endswith("_")]


def test_an_image_size_below_the_stride_is_refused() -> None:
    detector = PatchCore(layers=[-1], image_size=16)
    with pytest.raises(InvalidValueError, match=r"at least the backbone's stride of 32.*got 16"):
        detector.fit(good(6))


@pytest.mark.parametrize("image_size", [(48, 80), [32, 64], np.int64(40)])
def test_image_sizes_of_every_form(image_size: Any) -> None:
    detector = make(image_size=image_size).fit(good(12))
    maps = detector.anomaly_map([*bad(1), good(1, 2, (60, 48))[0]])
    assert [m.shape for m in maps] == [(HEIGHT, WIDTH), (60, 48)]
    assert detector.predict(bad(2)).tolist() == [-1, -1]
