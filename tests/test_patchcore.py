"""PatchCore: what it does beyond the contract, and a reference written from the paper."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from detector_fixtures import HEIGHT, PLAIN, WIDTH, Small, bad, good
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from anomalib_lite import PatchCore, load
from anomalib_lite.backbones import Backbone
from anomalib_lite.calibration import conformal_threshold
from anomalib_lite.errors import (
    AnomalibLiteError,
    CalibrationWarning,
    ImageError,
    InvalidValueError,
)
from anomalib_lite.images import ImageSource


def make(**parameters: Any) -> PatchCore:
    options = {"backbone": Small(), "image_size": 48, "false_alarm_rate": 0.25}
    return PatchCore(**(PLAIN | options | parameters))


@pytest.fixture(scope="module")
def fitted() -> PatchCore:
    """Not to be changed by any test."""
    return make().fit(good(16))


# --- Reading ------------------------------------------------------------------------------


def test_images_of_many_sizes_go_through_the_network_in_their_own_shapes(fitted: PatchCore) -> None:
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


# --- Again --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters", [{"coreset_ratio": 1e-9}, {"n_neighbors": 10**6}, {"index": "IVF4096,Flat"}]
)
def test_a_bank_that_cannot_be_built_leaves_the_old_one_whole(
    fitted: PatchCore, parameters: dict[str, Any]
) -> None:
    detector = copy.deepcopy(fitted).set_params(**parameters)
    before = {k: v for k, v in vars(detector).items() if k.endswith("_")}
    with pytest.raises(InvalidValueError):
        detector.fit(good(8, 3))
    assert {k: v for k, v in vars(detector).items() if k.endswith("_")} == before
    detector.set_params(**{k: v for k, v in fitted.get_params().items() if k in parameters})
    np.testing.assert_array_equal(detector.score(bad(3)), fitted.score(bad(3)))


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
    detector = detector._with_options(image_score="top1%")
    np.testing.assert_allclose(detector.score(test), expected, atol=1e-4 * scale)  # 96 patches
    detector = detector._with_options(image_score="reweighted")
    worst = [e.reshape(-1, 152)[s.argmax()] for e, s in zip(E, patch_scores, strict=True)]
    equation_7 = [naive_equation_7(bank, patch) for patch in worst]
    np.testing.assert_allclose(detector.score(test), equation_7, atol=2e-4 * scale)
    if coreset_ratio == 1.0:
        detector = detector._with_options(image_score="max")
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
    assert conformal_threshold(scores, 0.5) == np.sort(scores)[len(scores) // 2]


def test_enough_images_are_held_back_for_the_rate() -> None:
    E = embeddings(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PatchCore(false_alarm_rate=0.05).fit_embeddings(E)  # 19 are needed
    with pytest.warns(CalibrationWarning, match="needs 24 normal images .*got 20"):
        PatchCore(false_alarm_rate=0.04).fit_embeddings(E)


# --- Embeddings of one's own --------------------------------------------------------------


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
        ({"coreset": "gredy"}, "got 'gredy'. Did you mean 'greedy'"),
        ({"image_score": "top_1%"}, r"image_score must be one of .*Did you mean 'top1%'"),
        ({"image_score": "reweighted", "n_neighbors": 2}, "defined for n_neighbors=1, got 2"),
        ({"index": "flatt"}, r"index must be 'flat'.*got 'flatt'. Did you mean 'flat'"),
        ({"index": "IVF4096,Flat"}, r"'IVF4096,Flat' cannot hold \d+ embeddings.*'flat'"),
        ({"calibration": "leave_one_out", "index": "SQ8"}, "needs index='flat', got 'SQ8'. Use"),
        ({"backbone": "resnet81"}, "backbone 'resnet81' is not known.*Did you mean 'resnet"),
        ({"backbone": 18}, "backbone must be a name or a torch.nn.Module, got int"),
        ({"layers": [3]}, "layer 3 does not exist"),
        ({"layers": 1}, "layers must be a list .*got 1"),
        ({"backbone": "test_resnet", "weights": "gone.pth"}, "gone.pth does not exist"),
    ],
)
def test_bad_parameters_are_refused_by_fit(parameters: dict[str, Any], message: str) -> None:
    detector = make(**parameters)
    with pytest.raises(AnomalibLiteError, match=f"^(PatchCore|MemoryBank): .*{message}") as caught:
        detector.fit(good(6))
    assert isinstance(caught.value, TypeError | ValueError)
    assert not [name for name in vars(detector) if name.endswith("_")]


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {"position_window": 1}),
        ({"position_window": 1}, {"position_window": None}),
        ({"position_window": 1}, {"position_window": 2}),
        ({}, {"foreground": True}),
        ({}, {"normalize": True}),
        ({"normalize": True}, {"normalize": False}),
        ({}, {"index": "HNSW8"}),
        ({}, {"fusion": "per_layer"}),
        ({"fusion": "per_layer"}, {"fusion": "concat"}),
        ({"fusion": "per_layer"}, {"position_window": 1}),
    ],
)
def test_a_bank_is_not_used_with_parameters_of_another(
    then: dict[str, Any], now: dict[str, Any], tmp_path: Path
) -> None:
    """Each gave scores of no meaning, an error far from its cause, or a file without a way back."""
    path, images = tmp_path / "model.safetensors", good(16)
    detector = make(**then).fit(images)
    scores = detector.score(good(3, 7))
    detector.set_params(**now)
    with pytest.raises(InvalidValueError, match="must stay as it was"):
        detector.partial_fit(images)
    with pytest.raises(InvalidValueError, match="must stay as it was"):
        detector.save(path)
    assert not path.exists()
    with pytest.raises(InvalidValueError, match="must stay as it was"):
        detector.score(images[:1])
    detector.set_params(**{name: then.get(name, getattr(PatchCore(), name)) for name in now})
    np.testing.assert_array_equal(detector.score(good(3, 7)), scores)
    detector.save(path)
    again = load(path, backbone=Small())
    with pytest.raises(InvalidValueError, match="must stay as it was"):
        again.set_params(**now).partial_fit(images)
    detector.set_params(**now)
    if "foreground" not in now:  # these images show no object
        detector.fit(images).score(images[:1])


def test_an_image_size_below_the_stride_is_refused() -> None:
    detector = PatchCore(layers=[-1], image_size=16, engine="torch")
    with pytest.raises(InvalidValueError, match=r"at least the backbone's stride of 32.*got 16"):
        detector.fit(good(6))


@pytest.mark.parametrize("image_size", [(48, 80), [32, 64], np.int64(40)])
def test_image_sizes_of_every_form(image_size: Any) -> None:
    detector = make(image_size=image_size).fit(good(12))
    maps = detector.anomaly_map([*bad(1), good(1, 2, (60, 48))[0]])
    assert [m.shape for m in maps] == [(HEIGHT, WIDTH), (60, 48)]
    assert detector.predict(bad(2)).tolist() == [-1, -1]


@pytest.mark.parametrize("memory_budget", [None, "200MB"])
@pytest.mark.parametrize("calibration", ["split", "leave_one_out"])
def test_normalized_patches_are_compared_by_their_direction(
    memory_budget: str | None, calibration: str, tmp_path: Path
) -> None:
    if memory_budget and calibration == "leave_one_out":
        pytest.skip("not to be combined")
    rng = np.random.default_rng(0)
    E = rng.normal(size=(30, 4, 5, 8)).astype(np.float32) * rng.lognormal(size=(30, 4, 5, 1))
    new = rng.normal(size=(6, 4, 5, 8)).astype(np.float32)
    detector = PatchCore(
        normalize=True, coreset_ratio=1.0, false_alarm_rate=0.2, calibration=calibration,
        memory_budget=memory_budget,
    ).fit_embeddings(E)  # fmt: skip
    bank = E.reshape(-1, 8) / np.linalg.norm(E.reshape(-1, 8), axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(detector.memory_bank_.embeddings_, axis=1), 1, 1e-6)
    unit = new.reshape(-1, 8) / np.linalg.norm(new.reshape(-1, 8), axis=1, keepdims=True)
    cosine = (unit.astype(np.float64) @ bank.T).max(axis=1).reshape(6, -1)
    expected = np.sqrt(2 - 2 * cosine).max(axis=1)
    np.testing.assert_allclose(detector.score_embeddings(new), expected, rtol=1e-4)
    np.testing.assert_allclose(detector.score_embeddings(7 * new), expected, rtol=1e-4)
    detector.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.score_embeddings(new), detector.score_embeddings(new))
    with pytest.raises(TypeError, match="PatchCore: normalize must be True or False, got 1"):
        PatchCore(normalize=1).fit_embeddings(E)
