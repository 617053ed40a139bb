"""SubspaceAD: what it does beyond the contract, and a reference from its paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from detector_fixtures import PLAIN, Small, bad, good
from sklearn.decomposition import PCA

from anomalib_lite import SubspaceAD, load
from anomalib_lite.errors import InvalidValueError, ModelFileError
from anomalib_lite.images import ImageSource
from anomalib_lite.metrics import auroc
from anomalib_lite.model_file import read_model, write_model


def make(**parameters: Any) -> SubspaceAD:
    options = {"backbone": Small(), "image_size": 48, "false_alarm_rate": 0.25, "n_components": 4}
    return SubspaceAD(**(PLAIN | options | parameters))


@pytest.fixture(scope="module")
def fitted() -> SubspaceAD:
    return make().fit(good(40))


def embeddings(n: int, seed: int = 0, h: int = 10, w: int = 20) -> np.ndarray:
    """Return embeddings whose variance falls from direction to direction, away from the origin."""
    rng = np.random.default_rng(seed)
    E = rng.normal(size=(n, h, w, 12)) * 0.6 ** np.arange(12)
    return (E + np.linspace(-3, 3, 12)).astype(np.float32)


def naive(fit_on: np.ndarray, Q: np.ndarray, n_components: float) -> np.ndarray:
    """Return the squared reconstruction errors of patches by scikit-learn, in float64."""
    pca = PCA(n_components, svd_solver="full").fit(fit_on.reshape(-1, 12).astype(np.float64))
    rows = Q.reshape(-1, 12).astype(np.float64)
    errors = ((rows - pca.inverse_transform(pca.transform(rows))) ** 2).sum(axis=1)
    return np.asarray(errors.reshape(Q.shape[:3]))


def top(patches: np.ndarray) -> np.ndarray:
    """Return the mean of the largest two of 200 patches."""
    return np.sort(patches.reshape(len(patches), -1), axis=1)[:, -2:].mean(axis=1)


@pytest.mark.parametrize("n_components", [0.5, 0.99, 1, 11])
def test_scores_are_as_in_the_paper(n_components: float) -> None:
    E, Q = embeddings(30), embeddings(5, seed=1)
    detector = make(n_components=n_components).fit_embeddings(E)
    order = np.random.RandomState(0).permutation(30)
    to_fit, held = E[order[:24]], E[order[24:]]
    patches = naive(to_fit, Q, n_components)
    np.testing.assert_allclose(detector._score_patches(Q)[0], patches, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(detector.score_embeddings(Q), top(patches), rtol=1e-5)
    expected = top(naive(to_fit, held, n_components))
    np.testing.assert_allclose(detector.calibration_scores_, expected, rtol=1e-5)


@pytest.mark.parametrize("n_components", [0.9, 3])
def test_leaving_one_out_is_to_fit_without_it(n_components: float) -> None:
    E = embeddings(20)
    detector = make(calibration="leave_one_out", n_components=n_components).fit_embeddings(E)
    for i in (0, 13, 19):
        expected = top(naive(np.delete(E, i, 0), E[i : i + 1], n_components))
        np.testing.assert_allclose(detector.calibration_scores_[i : i + 1], expected, rtol=1e-5)


def test_going_on_is_to_have_had_all_from_the_start() -> None:
    E, Q = embeddings(60), embeddings(4, seed=1)
    detector = make(false_alarm_rate=0.5).fit_embeddings(E[:40])
    n = detector.subspace_.n_samples_seen_ // 200
    old = detector.subspace_
    before = old.components_.copy()
    detector.partial_fit_embeddings(E[40:])
    np.testing.assert_array_equal(old.components_, before)
    first = np.random.RandomState(0).permutation(40)[:n]
    later = 40 + np.random.RandomState(0).permutation(20)[:16]
    expected = top(naive(E[np.concatenate([first, later])], Q, 4))
    np.testing.assert_allclose(detector.score_embeddings(Q), expected, rtol=1e-4)


def test_images_of_many_sizes() -> None:
    mixed = [*good(3, 7), *good(3, 8, (48, 96)), *good(3, 9, (96, 48))]
    for calibration in ("split", "leave_one_out"):
        detector = make(calibration=calibration)
        detector.fit([*good(10), *good(10, size=(48, 96)), *good(10, size=(96, 48))])
        scores = detector.score(mixed)
        one_by_one = [detector.score(image)[0] for image in mixed]
        np.testing.assert_allclose(scores, one_by_one, rtol=1e-5)
        assert [m.shape for m in detector.anomaly_map(mixed)] == [i.shape[:2] for i in mixed]


def test_workers_and_budgets_do_not_matter(fitted: SubspaceAD) -> None:
    images = good(5, 9)
    for options in ({"n_jobs": 2}, {"memory_budget": "80MB"}):
        with joblib.parallel_config("threading"):
            again = make(**options).fit(good(40))
        np.testing.assert_allclose(again.score(images), fitted.score(images), rtol=1e-4)
        np.testing.assert_allclose(again.threshold_, fitted.threshold_, rtol=1e-4)


def test_the_file_holds_half_of_the_scatter(fitted: SubspaceAD, tmp_path: Path) -> None:
    path = tmp_path / "line3.safetensors"
    fitted.save(path)
    tensors, header = read_model(path)
    assert tensors["scatter"].shape == (20 * 21 // 2,)
    again, later = load(path, backbone=Small()), good(10, 5)
    moments, read = fitted.subspace_.moments_, again.subspace_.moments_
    np.testing.assert_array_equal(read.scatter, moments.scatter)
    expected = make().fit(good(40)).partial_fit(later).score(bad(3))
    np.testing.assert_array_equal(again.partial_fit(later).score(bad(3)), expected)
    write_model(path, tensors | {"scatter": tensors["scatter"][:-1]}, header, "test")
    with pytest.raises(ModelFileError, match="scatter has shape"):
        load(path, backbone=Small())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"fusion": "summary"}, r"fusion must be one of \[.*'concat'"),
        ({"image_score": "reweighted"}, "image_score must be one of"),
        ({"n_components": 1.0}, r"n_components must be a number in \(0, 1\), got 1.0"),
        ({"n_components": 0}, "n_components must be a whole number of at least 1, got 0"),
        ({"n_components": "all"}, "n_components must be .* got 'all'"),
        ({"n_components": 21}, "n_components=21 is more than the 20 directions"),
        ({"n_components": 20}, "takes all 20 directions .*Lower it"),
        ({"n_components": 0.99999}, "takes all 20 directions .*Lower it"),
        ({"memory_budget": "10kB"}, "is too small"),
    ],
)
def test_bad_parameters_are_refused_by_fit(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^SubspaceAD: .*{message}"):
        make(**parameters).fit(good(12))


def test_one_image_is_enough_to_fit_on(fitted: SubspaceAD) -> None:
    detector = make(false_alarm_rate=0.5).fit(good(2))
    assert detector.score(bad(3)).min() > detector.score(good(3, 4)).max()


def test_real_defects_are_found(data_dir: Path) -> None:
    root = data_dir / "magnetic_tile"
    train = sorted((root / "train" / "good").iterdir())[:60]
    kinds = sorted(p for p in (root / "test").iterdir() if p.name != "good")
    broken = [path for kind in kinds for path in sorted(kind.iterdir())[:8]]
    whole = sorted((root / "test" / "good").iterdir())[: len(broken)]
    detector = SubspaceAD(image_size=128, false_alarm_rate=0.1).fit(train)
    scores = detector.score(ImageSource([*whole, *broken]))
    assert auroc([0] * len(whole) + [1] * len(broken), scores) > 0.75
