"""PaDiM: what it does beyond the contract, and a reference written from the paper."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from detector_fixtures import DEFECT, HEIGHT, PLAIN, WIDTH, Small
from scipy.ndimage import gaussian_filter

from anomalib_lite import PaDiM, load
from anomalib_lite.calibration import conformal_threshold
from anomalib_lite.detectors.fitting import shards
from anomalib_lite.errors import (
    InvalidValueError,
    ModelFileError,
    NotFittedError,
)
from anomalib_lite.images import ImageSource
from anomalib_lite.metrics import auroc


def make(**parameters: Any) -> PaDiM:
    options = {"backbone": Small(), "image_size": 48, "false_alarm_rate": 0.25, "n_components": 12}
    return PaDiM(**(PLAIN | options | parameters))


def good(n: int, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Noise over a slope, in uint8: what is normal depends on the place."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(60, 180, size[1])[:, None]
    return (slope + rng.integers(-12, 13, (n, *size, 3))).astype(np.uint8)


def bad(n: int, seed: int = 1) -> np.ndarray:
    """What is normal on the right, on the left."""
    images = good(n, seed)
    images[(slice(None), *DEFECT)] = good(n, seed + 1)[:, 8:20, 4:24]
    return images


@pytest.fixture(scope="module")
def fitted() -> PaDiM:
    return make().fit(good(40))


# --- Places ---------------------------------------------------------------------------------


def test_what_is_normal_elsewhere_is_found_where_it_is(fitted: PaDiM) -> None:
    detections = fitted.detect(np.concatenate([good(6, 9), bad(6)]))
    assert auroc([0] * 6 + [1] * 6, detections.scores) == 1
    assert detections.labels[6:].all()
    assert detections.maps.shape == (12, HEIGHT, WIDTH)
    assert detections.maps.dtype == detections.scores.dtype == np.float32
    for heatmap in detections.maps[6:]:
        row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
        assert 8 <= row < 20
        assert 48 <= column < 68


def test_the_workers_do_not_matter(fitted: PaDiM) -> None:
    with joblib.parallel_config("threading"):
        again = make(n_jobs=2).fit(good(40))
    np.testing.assert_allclose(again.score(good(11, 9)), fitted.score(good(11, 9)), rtol=1e-5)
    np.testing.assert_allclose(again.threshold_, fitted.threshold_, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["random", "semi_orthogonal"])
def test_a_file_holds_what_the_reduction_leaves(reduction: str, tmp_path: Path) -> None:
    detector = make(reduction=reduction, backbone="efficientnet_lite0").fit(good(20))
    path = tmp_path / "line3.safetensors"
    detector.save(path)
    again, found = load(path), detector.detect(bad(3))
    np.testing.assert_array_equal(again.detect(bad(3)).scores, found.scores)
    np.testing.assert_array_equal(again.detect(bad(3)).maps, found.maps)
    positions = detector.gaussians_.mean.shape[0]
    assert path.stat().st_size < 4 * positions * 12 * (12 + 3) / 2 + 100_000


def test_a_file_that_does_not_fit_together_is_refused(fitted: PaDiM, tmp_path: Path) -> None:
    broken = copy.copy(fitted)
    broken.components_ = fitted.components_[:-1]
    broken.save(tmp_path / "broken.safetensors")
    with pytest.raises(ModelFileError, match="does not describe a detector"):
        load(tmp_path / "broken.safetensors", backbone=Small())
    broken.components_ = fitted.components_ + 1000
    broken.save(tmp_path / "broken.safetensors")
    with pytest.raises(ModelFileError, match="channels beyond 20"):
        load(tmp_path / "broken.safetensors", backbone=Small())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_components": 0}, "n_components must be"),
        ({"reduction": "pca"}, "reduction must be one of"),
        ({"ridge": 0}, "ridge must be above 0"),
        ({"ridge": -1}, "ridge must be"),
        ({"image_score": "reweighted"}, "image_score must be one of"),
        ({"fusion": "neares"}, "Did you mean 'nearest'"),
        ({"memory_budget": "100kB"}, "is too small: the covariances of 12x20 positions"),
        ({"memory_budget": "1GB", "calibration": "leave_one_out"}, "no memory_budget bounds"),
    ],
)
def test_bad_parameters_are_refused_by_fit(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^PaDiM: .*{message}"):
        make(**parameters).fit(good(12))


def test_images_of_another_size_are_refused(fitted: PaDiM) -> None:
    with pytest.raises(
        InvalidValueError, match=r"must give 12x20 patches, got 12x24: .*image_size"
    ):
        fitted.score(good(2, size=(48, 96)))
    mixed = [*good(6), *good(6, size=(48, 96))]
    with pytest.raises(InvalidValueError, match=r"^PaDiM: every image must give 12x2"):
        make().fit(mixed)
    np.testing.assert_array_equal(make(image_size=(48, 80)).fit(mixed).score(mixed).shape, (12,))
    with pytest.raises(NotFittedError, match="Call fit"):
        make().score(good(1))


# --- The paper ------------------------------------------------------------------------------


def naive_padim(E: np.ndarray, Q: np.ndarray, ridge: float) -> np.ndarray:
    """Patch scores by Equations 1 and 2, in float64."""
    scores = np.empty(Q.shape[:3])
    for i, j in np.ndindex(E.shape[1:3]):
        x = E[:, i, j].astype(np.float64)
        y = x - x.mean(axis=0)
        inverse = np.linalg.inv(y.T @ y / (len(x) - 1) + ridge * np.eye(x.shape[1]))
        q = Q[:, i, j] - x.mean(axis=0)
        scores[:, i, j] = np.sqrt(np.einsum("nd,de,ne->n", q, inverse, q))
    return scores


def embeddings(n: int, d: int = 10, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 6, 9, d)).astype(np.float32) * np.linspace(0.2, 2, d)


@pytest.mark.parametrize("reduction", ["random", "semi_orthogonal"])
@pytest.mark.parametrize("n_components", [None, 4])
def test_scores_are_those_of_the_paper(reduction: str, n_components: int | None) -> None:
    E, Q = embeddings(60), embeddings(5, seed=1)
    detector = make(reduction=reduction, n_components=n_components).fit_embeddings(E)
    order = np.random.RandomState(0).permutation(60)
    kept, held = E[order[:48]], E[order[48:]]
    components = detector.components_
    if reduction == "random":
        assert len(set(components.tolist())) == (n_components or 10)
        reduce = lambda X: X[..., components]  # noqa: E731
    else:
        square = components.T.astype(np.float64) @ components
        np.testing.assert_allclose(square, np.eye(n_components or 10), atol=1e-6)
        reduce = lambda X: X @ components  # noqa: E731

    def naive(X: np.ndarray) -> np.ndarray:
        patch_scores = naive_padim(reduce(kept), reduce(X), 0.01)
        return np.array([gaussian_filter(m, 1.0).max() for m in patch_scores])

    np.testing.assert_allclose(detector.score_embeddings(Q), naive(Q), rtol=1e-4)
    np.testing.assert_allclose(detector.calibration_scores_, naive(held), rtol=1e-4)
    expected = conformal_threshold(naive(held).astype(np.float32), 0.25)
    np.testing.assert_allclose(detector.threshold_, expected, rtol=1e-4)


def test_how_much_is_kept_by_default() -> None:
    for d, kept in ((30, 30), (176, 100), (448, 100), (1792, 550)):
        E = np.random.default_rng(0).normal(size=(6, 2, 2, d)).astype(np.float32)
        assert len(make(n_components=None).fit_embeddings(E).components_) == kept


@pytest.mark.parametrize("image_score", ["smoothed", "max", "top1%"])
def test_leaving_one_out_is_to_fit_without_it(image_score: str) -> None:
    E = embeddings(30)
    options = {"image_score": image_score, "n_components": None}
    detector = make(calibration="leave_one_out", **options).fit_embeddings(E)
    assert len(detector.calibration_scores_) == 30
    for i in (0, 13, 29):
        rest = make(calibration="leave_one_out", **options).fit_embeddings(np.delete(E, i, 0))
        expected = rest.score_embeddings(E[i : i + 1])[0]
        np.testing.assert_allclose(detector.calibration_scores_[i], expected, rtol=2e-3)
    everything = naive_padim(E, E[:3], 0.01)
    if image_score == "max":  # all images are fitted on
        expected = everything.max(axis=(1, 2))
        np.testing.assert_allclose(detector.score_embeddings(E[:3]), expected, rtol=1e-4)


# --- Shards, budgets, going on --------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, "3MB"])
@pytest.mark.parametrize("form", [np.asarray, list])
def test_embeddings_in_any_form_and_budget_give_the_same(budget: Any, form: Any) -> None:
    E, Q = embeddings(90), embeddings(4, seed=1)
    expected = make().fit_embeddings(E).score_embeddings(Q)
    got = make(memory_budget=budget).fit_embeddings(form(E)).score_embeddings(Q)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    stream = make(memory_budget=budget).fit_embeddings(iter(E))
    assert np.isfinite(stream.score_embeddings(Q)).all()


def test_images_are_never_all_embedded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, embed_all = [], shards.embed_all

    def watched(*args: Any, **kwargs: Any) -> Any:
        E, skipped = embed_all(*args, **kwargs)
        at_once.append(len(E))
        return E, skipped

    monkeypatch.setattr(shards, "embed_all", watched)
    make().fit(good(150))
    assert max(at_once) == 32
    assert sum(at_once) == 149  # one was embedded before


@pytest.mark.parametrize("calibration", ["split", "leave_one_out"])
def test_of_images_the_backbone_gives_the_chosen_channels_alone(calibration: str) -> None:
    images = good(40)
    detector = make(calibration=calibration).fit(images)
    E = detector.backbone_.embed(images)
    assert (E.shape[-1], len(detector.components_)) == (20, 12)
    same = make(calibration=calibration).fit_embeddings(E)
    np.testing.assert_array_equal(same.components_, detector.components_)
    np.testing.assert_allclose(same.threshold_, detector.threshold_, rtol=1e-5)
    np.testing.assert_allclose(same.score_embeddings(E), detector.score(images), rtol=1e-5)


def test_going_on_is_to_have_had_all_from_the_start() -> None:
    E, Q = embeddings(60), embeddings(4, seed=1)
    detector = make(n_components=None, false_alarm_rate=0.5).fit_embeddings(E[:40])
    before = detector.gaussians_
    kept_before = before.mean.copy()
    n = before.n
    detector.partial_fit_embeddings(E[40:])
    np.testing.assert_array_equal(before.mean, kept_before)
    assert (before.n, detector.gaussians_.n) == (n, n + 16)
    first = np.random.RandomState(0).permutation(40)[:n]
    later = 40 + np.random.RandomState(0).permutation(20)[:16]
    patch_scores = naive_padim(E[np.concatenate([first, later])], Q, 0.01)
    expected = [gaussian_filter(m, 1.0).max() for m in patch_scores]
    np.testing.assert_allclose(detector.score_embeddings(Q), expected, rtol=1e-3)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(InvalidValueError, match=r"^PaDiM: 1 image to fit on has no covariance"):
        make().fit(good(1))


# --- Real images ----------------------------------------------------------------------------


def test_real_defects_are_found(data_dir: Path) -> None:
    root = data_dir / "magnetic_tile"
    train = sorted((root / "train" / "good").iterdir())[:150]
    kinds = sorted(p for p in (root / "test").iterdir() if p.name != "good")
    broken = [path for kind in kinds for path in sorted(kind.iterdir())[:16]]
    whole = sorted((root / "test" / "good").iterdir())[:60]
    detector = PaDiM(image_size=(128, 128), false_alarm_rate=0.1).fit(train)
    assert detector.n_features_ == 176
    scores = detector.score(ImageSource([*whole, *broken]))
    missorted = 1 - auroc([0] * len(whole) + [1] * len(broken), scores)  # a share of pairs
    assert missorted < 0.2
    assert detector.predict(whole).mean() > 0.6
