"""Projected, whitened and rescaled embeddings, against loops in float64, and in every detector."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from detector_fixtures import HEIGHT, PLAIN, WIDTH, Small, bad, good
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.random_projection import GaussianRandomProjection
from torch import Tensor, nn

from anomalib_lite import MahalanobisVFM, PaDiM, PatchCore, ProductRouter, SubspaceAD, load
from anomalib_lite.detectors import _transforming
from anomalib_lite.engines import open_backbone
from anomalib_lite.errors import AnomalibLiteError, InvalidValueError, NotFittedError
from anomalib_lite.fusion import EmbeddingTransform, patch_embeddings
from anomalib_lite.subspace import Subspace

LAYERS = (16, 4)  # channels of those of Small
QUICK = PLAIN | {"image_size": (HEIGHT, WIDTH), "false_alarm_rate": 0.25}
DETECTORS: list[Any] = [
    PatchCore(Small(), **QUICK),
    PaDiM(Small(), n_components=8, **QUICK),
    MahalanobisVFM(Small(), **QUICK),
    SubspaceAD(Small(), n_components=3, **QUICK),
]
OPTIONS: list[dict[str, Any]] = [
    {"feature_dim": 9},
    {"feature_dim": 9, "projection": "gaussian_random", "normalize": True},
    {"whiten": True},
    {"feature_dim": 9, "whiten": True, "whiten_shrinkage": 0.2},
    {"fusion": "weighted", "layer_weights": (0.5, 3.0)},
    {"fusion": "adaptive", "normalize": True},
]


def embeddings(n: int, seed: int = 0, d: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d)) * np.linspace(0.2, 3, d)
    return (rng.normal(size=(n, 4, 6, d)) @ mixing + 5).astype(np.float32)


def naive_transform(
    train: np.ndarray,
    E: np.ndarray,
    *,
    feature_dim: int | None = None,
    projection: str = "pca",
    whiten: bool = False,
    whiten_shrinkage: float = 0.07,
    normalize: bool = False,
    weights: Any = None,
    channels: tuple[int, ...] = (),
    directions: np.ndarray | None = None,
) -> np.ndarray:
    """Change rows one by one in float64, by scikit-learn's PCA and numpy's covariance."""
    X, rows = train.astype(np.float64), E.astype(np.float64)
    if weights is not None:
        layers = np.repeat(np.arange(len(channels)), channels)
        if weights == "adaptive":
            variances = [X[:, layers == i].var(axis=0, ddof=1).sum() for i in range(len(channels))]
            weights = [(np.mean(variances) / v) ** 0.5 for v in variances]
        X, rows = (Z * np.array([weights[i] for i in layers]) for Z in (X, rows))
    if feature_dim is not None and projection == "pca":
        pca = PCA(feature_dim, svd_solver="full").fit(X)
        X, rows = pca.transform(X), pca.transform(rows)
    elif feature_dim is not None:
        assert directions is not None
        X, rows = X @ directions, rows @ directions
    if whiten:
        covariance, d = np.cov(X.T).reshape(X.shape[1], X.shape[1]), X.shape[1]
        shrunk = (1 - whiten_shrinkage) * covariance
        shrunk += whiten_shrinkage * np.trace(covariance) / d * np.eye(d)
        root = np.linalg.cholesky(np.linalg.inv(shrunk))  # another root: a rotation of ours
        rows = (rows - X.mean(axis=0)) @ root
    if normalize:
        rows = np.array([row / np.linalg.norm(row) for row in rows])
    return rows


def distances(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows[:, None].astype(np.float64) - rows[None], axis=2)


# --- The map itself -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"feature_dim": 5},
        {"feature_dim": 12},
        {"whiten": True},
        {"whiten": True, "whiten_shrinkage": 0.0},
        {"feature_dim": 4, "whiten": True, "whiten_shrinkage": 0.3, "normalize": True},
        {"weights": (0.25, 2.0, 1.0)},
        {"weights": "adaptive", "normalize": True},
        {"weights": "adaptive", "feature_dim": 6, "whiten": True},
        {"normalize": True},
    ],
)
def test_it_is_what_loops_give(options: dict[str, Any]) -> None:
    """Up to a rotation, which no distance sees."""
    train, E, channels = embeddings(9).reshape(-1, 12), embeddings(2, 1).reshape(-1, 12), (3, 4, 5)
    given = {("layer_weights" if k == "weights" else k): v for k, v in options.items()}
    transform = EmbeddingTransform(**given).fit(train, channels=channels)
    found = transform.transform(E)
    expected = naive_transform(train, E, channels=channels, **options)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (48, transform.n_features_)
    np.testing.assert_allclose(distances(found), distances(expected), rtol=2e-4, atol=2e-4)
    if not options.get("whiten") and "feature_dim" not in options:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_principal_components_are_scikit_learns() -> None:
    train = embeddings(9).reshape(-1, 12)
    found = EmbeddingTransform(feature_dim=5).fit(train).transform(train)
    expected = PCA(5).fit(train.astype(np.float64)).transform(train)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-4)


def test_random_directions_are_scikit_learns() -> None:
    train = embeddings(9).reshape(-1, 12)
    transform = EmbeddingTransform(feature_dim=5, projection="gaussian_random", random_state=3)
    expected = GaussianRandomProjection(5, random_state=3).fit(train).transform(train)
    np.testing.assert_allclose(transform.fit(train).transform(train), expected, rtol=1e-4)
    other = clone(transform).set_params(random_state=4).fit(train)
    assert not np.allclose(other.transform(train), expected)
    directions = transform.parts_[0].components
    assert directions is not None
    whitened = transform.set_params(whiten=True).fit(train).transform(train)
    naive = naive_transform(
        train, train, feature_dim=5, projection="random", whiten=True, directions=directions
    )
    np.testing.assert_allclose(distances(whitened), distances(naive), rtol=1e-3, atol=1e-3)


def test_whitened_features_have_the_identity_as_covariance() -> None:
    train = embeddings(20).reshape(-1, 12)
    found = EmbeddingTransform(whiten=True, whiten_shrinkage=0).fit(train).transform(train)
    np.testing.assert_allclose(np.cov(found.T), np.eye(12), atol=1e-3)


def test_adaptive_weights_do_not_see_the_scale_of_a_layer() -> None:
    train = embeddings(9).reshape(-1, 12)
    scaled = train * np.repeat(np.float32([1, 100, 0.01]), (3, 4, 5))
    one, other = (
        EmbeddingTransform(layer_weights="adaptive").fit(X, channels=(3, 4, 5)).transform(X)
        for X in (train, scaled)
    )
    ratio = other / one
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)
    variances = [part.var(axis=0).sum() for part in np.split(one.astype(float), (3, 7), axis=1)]
    np.testing.assert_allclose(variances, variances[0], rtol=1e-4)


def test_each_layer_by_itself_is_each_layer_alone() -> None:
    train, E = embeddings(9), embeddings(2, 1)
    options: dict[str, Any] = {"feature_dim": 2, "whiten": True, "normalize": True}
    found = EmbeddingTransform(per_layer=True, **options).fit(train, channels=(3, 4, 5))
    alone = [
        EmbeddingTransform(**options).fit(train[..., a:b]).transform(E[..., a:b])
        for a, b in ((0, 3), (3, 7), (7, 12))
    ]
    np.testing.assert_allclose(found.transform(E), np.concatenate(alone, axis=-1), atol=1e-5)
    assert [list(at) for at in found.layers_] == [[0, 1], [2, 3], [4, 5]]


def test_the_features_of_the_image_are_changed_as_those_of_a_patch() -> None:
    train, X = embeddings(9), embeddings(2, 1)
    transform = EmbeddingTransform(feature_dim=5, whiten=True).fit(train)
    pair = copy.copy(transform)
    pair.copies_, pair.n_features_in_ = 2, 25
    attention = np.ones((2, 4, 6, 1), np.float32)
    found = pair.transform(np.concatenate([X, X[::-1], attention], axis=-1))
    np.testing.assert_array_equal(found[..., :5], transform.transform(X))
    np.testing.assert_array_equal(found[..., 5:10], transform.transform(X[::-1]))
    np.testing.assert_array_equal(found[..., 10:], attention)
    assert [list(at) for at in pair.layers_] == [list(range(11))]


def test_ignored_rows_stay_nan_and_others_do_not_see_them() -> None:
    transform = EmbeddingTransform(feature_dim=5, whiten=True, normalize=True).fit(embeddings(9))
    E = embeddings(3, 1)
    expected = transform.transform(E)
    for i in range(3):  # whatever images share a batch, to the bit
        np.testing.assert_array_equal(transform.transform(E[i : i + 1])[0], expected[i])
    E[0, 1, 2] = np.nan
    found = transform.transform(E)
    assert np.isnan(found[0, 1, 2]).all()
    expected[0, 1, 2] = np.nan
    np.testing.assert_array_equal(found, expected)


def test_what_it_learned_can_be_taken_apart() -> None:
    train, E = embeddings(9), embeddings(2, 1)
    fitted = EmbeddingTransform(feature_dim=3, layer_weights=(1.0, 2.0), per_layer=True)
    fitted.fit(train, channels=(5, 7))
    arrays, description = fitted.to_arrays()
    assert fitted.n_images_ == 9
    assert fitted.nbytes == 4 * (12 + 12 + 36)
    again = clone(fitted).set_arrays(arrays, description)
    np.testing.assert_array_equal(again.transform(E), fitted.transform(E))
    for name in arrays:
        broken = arrays | {name: arrays[name][:-1]}
        with pytest.raises(ValueError, match="of a transformation has shape"):
            clone(fitted).set_arrays(broken, description)
    with pytest.raises(ValueError, match="no components"):
        clone(fitted).set_arrays({}, description)
    with pytest.raises(ValueError, match="do not fit"):
        clone(fitted).set_arrays(arrays, description | {"channels": [5]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 0}, "feature_dim must be a whole number of at least 1, got 0"),
        ({"feature_dim": 13}, "feature_dim=13 is more than the 12 .*Lower it"),
        (
            {"feature_dim": 13, "projection": "gaussian_random"},
            "feature_dim=13 is more than the 12",
        ),
        ({"projection": "pcs"}, r"projection must be one of .*Did you mean 'pca'"),
        ({"whiten": 1}, "whiten must be True or False, got 1"),
        ({"whiten_shrinkage": 1.1}, r"whiten_shrinkage must be a number in \[0, 1\], got 1.1"),
        ({"normalize": "yes"}, "normalize must be True or False"),
        ({"layer_weights": 2.0}, "layer_weights must be a list of numbers, one a layer, got 2.0"),
        ({"layer_weights": (1.0, 0.0)}, r"layer_weights must be a number in \(0, inf\), got 0.0"),
        ({"layer_weights": (1.0,)}, "one number for each of 2 layers, got 1"),
        ({"random_state": -1}, "random_state must be"),
    ],
)
def test_bad_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AnomalibLiteError, match=f"^EmbeddingTransform: .*{message}"):
        EmbeddingTransform(**options).fit(embeddings(9), channels=(5, 7))


@pytest.mark.parametrize("E", ["E", None, 3.0, np.ones((5, 0)), [[1.0], [1.0, 2.0]]])
def test_what_is_no_array_of_embeddings_is_refused(E: Any) -> None:
    with pytest.raises(AnomalibLiteError, match=r"EmbeddingTransform: E must "):
        EmbeddingTransform(feature_dim=1).fit(E)


def test_it_is_a_step_of_a_pipeline() -> None:
    X = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    transform = EmbeddingTransform(feature_dim=3, whiten=True)
    found = clone(transform).fit_transform(X)
    np.testing.assert_array_equal(found, transform.fit(X).transform(X))
    steps = make_pipeline(clone(transform), Subspace(n_components=2)).fit(X)
    expected = Subspace(n_components=2).fit(found).components_
    np.testing.assert_array_equal(steps[-1].components_, expected)


def test_what_cannot_be_learned_is_refused() -> None:
    flat = embeddings(9)
    flat[..., 5:] = 1
    with pytest.raises(InvalidValueError, match="features of layer 1 of 2 do not vary"):
        EmbeddingTransform(layer_weights="adaptive").fit(flat, channels=(5, 7))
    with pytest.raises(InvalidValueError, match=r"has no inverse .*Raise whiten_shrinkage"):
        EmbeddingTransform(whiten=True, whiten_shrinkage=0).fit(flat)
    EmbeddingTransform(whiten=True).fit(flat)
    with pytest.raises(InvalidValueError, match="feature_dim=8 is more than the 3 that 3 patches"):
        EmbeddingTransform(feature_dim=8).fit(embeddings(1)[0, 0, :3])
    with pytest.raises(InvalidValueError, match="channels must add up to the 12 features"):
        EmbeddingTransform().fit(flat, channels=(5, 8))
    with pytest.raises(NotFittedError, match="not fitted yet"):
        EmbeddingTransform().transform(flat)
    with pytest.raises(InvalidValueError, match=r"shape \(\.\.\., 12\), got \(9, 4, 6, 11\)"):
        EmbeddingTransform().fit(flat).transform(flat[..., 1:])


# --- In detectors -------------------------------------------------------------------------


@pytest.fixture(params=DETECTORS, ids=lambda detector: type(detector).__name__)
def plain(request: pytest.FixtureRequest) -> Any:
    """A detector to fit."""
    return clone(request.param)


def assert_same(detector: Any, expected: Any, rtol: float = 0.0) -> None:
    images = np.concatenate([good(3, 8), bad(2)])
    found, wanted = detector.detect(images), expected.detect(images)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=rtol)
    np.testing.assert_allclose(found.maps, wanted.maps, rtol=rtol, atol=rtol)
    assert detector.threshold_ == pytest.approx(expected.threshold_, rel=rtol, abs=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_detector_sees_changed_embeddings_alone(plain: Any, options: dict[str, Any]) -> None:
    """It gives what the same detector gives on embeddings that were changed before."""
    images, questions = good(24), np.concatenate([good(3, 2), bad(2)])
    fitted = clone(plain).set_params(**options).fit(images)
    transform = fitted.transform_
    assert transform is not None
    assert transform.n_features_in_ == (40 if isinstance(plain, MahalanobisVFM) else 20)
    assert fitted.n_features_ == transform.n_features_
    E, Q = (transform.transform(fitted.backbone_.embed(some)) for some in (images, questions))
    itself = isinstance(plain, PatchCore | MahalanobisVFM)
    alone = plain.set_params(**({"normalize": options.get("normalize", False)} if itself else {}))
    if isinstance(plain, MahalanobisVFM):
        fitted.set_params(normalize=options.get("normalize", False)).fit(images)
    alone.fit_embeddings(E)
    assert alone.transform_ is None
    assert alone.threshold_ == pytest.approx(fitted.threshold_, rel=1e-3)
    np.testing.assert_allclose(fitted.score(questions), alone.score_embeddings(Q), rtol=1e-3)
    assert fitted.predict(questions).tolist()[3:] == [-1, -1]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_saved_and_goes_on(plain: Any, options: dict[str, Any], tmp_path: Path) -> None:
    fitted = plain.set_params(**options).fit(good(24))
    fitted.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", backbone=Small())
    assert_same(again, fitted)
    learned = fitted.transform_
    assert_same(again.partial_fit(good(10, 5)), fitted.partial_fit(good(10, 5)))
    assert fitted.transform_ is learned  # a new one would not fit the patches that are there
    again.save(tmp_path / "model.safetensors")
    assert_same(load(tmp_path / "model.safetensors", backbone=Small()), fitted)
    without = dict.fromkeys(options, None) | {"whiten": False, "projection": "pca"}
    without |= {"whiten_shrinkage": 0.07, "fusion": type(plain)().fusion, "normalize": False}
    assert fitted.set_params(**without).fit(good(24)).transform_ is None


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3], OPTIONS[5]])
@pytest.mark.parametrize("budget", [None, "2GB"])
def test_workers_and_shards_see_the_same(
    plain: Any, options: dict[str, Any], budget: str | None
) -> None:
    plain.set_params(memory_budget=budget, **options)
    here = clone(plain).fit(good(20))
    with joblib.parallel_config("threading"):
        assert_same(clone(plain).set_params(n_jobs=2).fit(good(20)), here)
    assert_same(clone(plain).set_params(batch_size=3).fit(good(20)), here, 1e-5)
    assert_same(here, clone(plain).set_params(memory_budget=None).fit(good(20)), 1e-4)


def test_processes_see_the_same() -> None:
    detector = PatchCore(Small(), memory_budget="2GB", feature_dim=6, whiten=True, **QUICK)
    assert_same(clone(detector).set_params(n_jobs=2).fit(good(12)), detector.fit(good(12)))


def test_nothing_is_learned_from_images_held_back(plain: Any) -> None:
    """Whatever these are, the map is the same; without it their scores guarantee nothing."""
    images, order = good(24), np.random.RandomState(0).permutation(24)
    plain.set_params(feature_dim=6, whiten=True)
    one = clone(plain).fit(images)
    n_held_back = len(one.calibration_scores_)
    assert one.transform_.n_images_ == 24 - n_held_back
    other = images.copy()
    other[order[-n_held_back:]] = good(n_held_back, 77)
    two = clone(plain).fit(other)
    for name, array in one.transform_.to_arrays()[0].items():
        np.testing.assert_array_equal(two.transform_.to_arrays()[0][name], array)
    assert (one.calibration_scores_ != two.calibration_scores_).any()


def test_images_that_are_missing_do_not_mix_them(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first are learned from, the last are held back; where most are gone, these stay apart."""
    order = np.random.RandomState(0).permutation(24)
    images: list[Any] = list(good(24))
    for i in order[12:22]:
        images[i] = tmp_path / "gone.png"
    fitted = plain.set_params(feature_dim=6, on_error="skip", false_alarm_rate=0.4).fit(images)
    assert fitted.transform_.n_images_ + len(fitted.calibration_scores_) == 14
    monkeypatch.setattr(_transforming, "_MOST_IMAGES", 4)
    few = clone(plain).fit(images)
    assert few.transform_.n_images_ == 4
    for i in order[:5]:
        images[i] = tmp_path / "gone.png"
    assert clone(plain).fit(images).transform_.n_images_ == 3  # of the next four
    with pytest.raises(InvalidValueError, match=r"none of 24 images could be used"):
        clone(plain).fit([tmp_path / "gone.png"] * 24)


@pytest.mark.parametrize(
    ("options", "n"),
    [
        ({"whiten": True}, 18),
        ({"feature_dim": 4}, 18),
        ({"fusion": "adaptive"}, 18),
        ({"fusion": "weighted", "layer_weights": (1.0, 2.0)}, 1),
        ({"fusion": "per_layer"}, 1),
        ({"feature_dim": 4, "projection": "gaussian_random"}, 1),
    ],
)
def test_no_more_images_are_read_twice_than_teach(
    plain: Any, options: dict[str, Any], n: int
) -> None:
    fitted = plain.set_params(false_alarm_rate=0.15, **options).fit(good(24))
    assert fitted.transform_.n_images_ == n
    assert len(fitted.calibration_scores_) == 6


def test_one_left_out_learns_from_all_of_the_list(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_transforming, "_MOST_IMAGES", 4)
    plain.set_params(feature_dim=6, calibration="leave_one_out")
    images = good(13)
    changed = images.copy()
    changed[12] = good(1, 77)[0]
    one, two = clone(plain).fit(images), clone(plain).fit(changed)
    assert one.transform_.n_images_ == 4
    assert (one.transform_.parts_[0].mean != two.transform_.parts_[0].mean).any()


def test_ignored_patches_teach_nothing(plain: Any) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, 40:] = True
    images = good(24)
    odd = images.copy()
    odd[:, :, 40:] = 255 - odd[:, :, 40:]
    plain.set_params(feature_dim=6, whiten=True)
    one, two = (clone(plain).fit(some, ignore_mask=mask) for some in (images, odd))
    assert_same(two, one)
    assert (one.detect(bad(2)).maps[:, :, 40:] == 0).all()


def test_tiles_are_changed_as_whole_images_are() -> None:
    detector = PatchCore(
        Small(), **(QUICK | {"image_size": 48}), tile=48, overlap=16, feature_dim=6, whiten=True
    )
    fitted = detector.fit(good(12))
    assert fitted.score(bad(3)).min() > fitted.threshold_
    assert fitted.memory_bank_.embeddings_.shape[1] == 6
    adaptive = clone(detector).set_params(fusion="adaptive").fit(good(12))
    assert adaptive.transform_.channels_ == LAYERS


def blocks(E: np.ndarray) -> Iterator[np.ndarray]:
    yield from (E[i : i + 5] for i in range(0, len(E), 5))


@pytest.mark.parametrize("options", OPTIONS[:4])
def test_embeddings_of_ones_own(plain: Any, options: dict[str, Any], tmp_path: Path) -> None:
    plain.set_params(**options)
    fitted = clone(plain).fit(good(24))
    E, Q = (fitted.backbone_.embed(images) for images in (good(24), bad(3)))
    np.save(tmp_path / "E.npy", E)
    for budget in (None, "2GB"):
        for form in (E, list(E), np.load(tmp_path / "E.npy", mmap_mode="r")):
            own = clone(plain).set_params(memory_budget=budget).fit_embeddings(form)
            np.testing.assert_allclose(own.score_embeddings(Q), fitted.score(bad(3)), rtol=1e-3)
            np.testing.assert_allclose(own.score_embeddings(list(Q)), own.score_embeddings(Q))
            assert own.threshold_ == pytest.approx(fitted.threshold_, rel=1e-3)
    with pytest.raises(InvalidValueError, match=r"must be there twice.*Give an array"):
        clone(plain).set_params(memory_budget="2GB").fit_embeddings(blocks(E))
    known = own.transform_
    more = fitted.backbone_.embed(good(10, 5))
    own.partial_fit_embeddings(blocks(more))
    own.partial_fit_embeddings(more).partial_fit_embeddings(list(more))
    assert own.transform_ is known
    with pytest.raises(InvalidValueError, match=rf"shape \(N, h, w, {E.shape[3]}\)"):
        own.score_embeddings(Q[..., 1:])
    with pytest.raises(InvalidValueError, match=rf"shape \(N, h, w, {E.shape[3]}\)"):
        own.partial_fit_embeddings(more[..., 1:])
    own.save(tmp_path / "own.safetensors")
    again = load(tmp_path / "own.safetensors")
    np.testing.assert_array_equal(again.score_embeddings(Q), own.score_embeddings(Q))


@pytest.mark.parametrize("fusion", ["weighted", "adaptive"])
def test_embeddings_do_not_tell_their_layers(plain: Any, fusion: str) -> None:
    weights = (1.0, 2.0) if fusion == "weighted" else None
    plain.set_params(fusion=fusion, layer_weights=weights)
    with pytest.raises(InvalidValueError, match=rf"fusion='{fusion}' must know.*fit\(images\)"):
        plain.fit_embeddings(embeddings(20))


def test_weights_scale_the_layers_of_concat() -> None:
    fitted = PatchCore(Small(), fusion="weighted", layer_weights=[0.5, 3.0], **QUICK).fit(good(12))
    maps = fitted.backbone_(good(2, 3))
    E = patch_embeddings(maps).numpy()
    expected = np.concatenate([0.5 * E[..., :16], 3 * E[..., 16:]], axis=-1)
    np.testing.assert_array_equal(fitted.transform_.transform(E), expected)
    assert [m.shape[1] for m in maps] == list(LAYERS)


class Named(nn.Module):
    """A module with layers of its own, which does not say how many channels they have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.PixelUnshuffle(4), nn.PixelUnshuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


@pytest.mark.parametrize(
    ("backbone", "layers", "engine", "expected"),
    [
        (Named(), ["a", "b"], "torch", (48, 192)),
        ("test_vit", [0, 1], "torch", None),
        ("efficientnet_lite0", None, "auto", (40, 112)),
    ],
)
def test_channels_come_from_the_network(
    backbone: Any, layers: Any, engine: str, expected: Any
) -> None:
    if backbone == "test_vit":
        import timm

        backbone = timm.create_model("test_vit", dynamic_img_size=True)
        expected = (backbone.embed_dim,) * 2
    options = {"layers": layers, "engine": engine, "device": "cpu", "image_size": (64, 96)}
    detector = PatchCore(backbone, fusion="adaptive", false_alarm_rate=0.4, **options)
    assert detector.fit(good(6, 0, (64, 96))).transform_.channels_ == expected
    opened = open_backbone(backbone, layers=layers, engine=engine, device="cpu")
    assert opened.channels in (list(expected), None)


def test_a_router_changes_the_embeddings_of_each_product() -> None:
    detector = PatchCore(Small(), feature_dim=6, whiten=True, **QUICK)
    images = {"slope": good(20), "turned": good(20, 3)[:, :, ::-1].copy()}
    router = ProductRouter(detector, unknown_rate=0.1).fit(images)
    assert router.detect(bad(2, 3)).labels.all()
    alone = router.detectors_["slope"]
    E = router.backbone_.embed(bad(2, 3))
    patch_scores, scores = alone._score_raw(E)
    np.testing.assert_allclose(scores, alone.score_embeddings(E), rtol=1e-6)
    assert patch_scores.shape == E.shape[:3]
    with pytest.raises(InvalidValueError, match="must know which features are of which layer"):
        ProductRouter(PatchCore(Small(), fusion="adaptive", **QUICK)).fit(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 1.5}, "feature_dim must be a whole number"),
        ({"feature_dim": 41}, "feature_dim=41 is more than the 20 .*Lower it"),
        ({"projection": "random"}, "projection must be one of"),
        ({"whiten": "yes"}, "whiten must be True or False"),
        ({"whiten_shrinkage": -0.1}, r"whiten_shrinkage must be a number in \[0, 1\]"),
        ({"normalize": 2}, "normalize must be True or False"),
        ({"fusion": "weighted"}, "layer_weights go with fusion='weighted'.*Set both, or neither"),
        ({"layer_weights": (1.0, 2.0)}, "layer_weights go with fusion='weighted'"),
        ({"fusion": "weighted", "layer_weights": "adaptive"}, "fusion='adaptive' learns them"),
        ({"fusion": "weighted", "layer_weights": (1.0, 2.0, 3.0)}, "each of 2 layers, got 3"),
        ({"fusion": "weighted", "layer_weights": (1.0, -2.0)}, r"layer_weights must .* got -2.0"),
        ({"whiten": True, "memory_budget": "1kB"}, "memory_budget=1,000 bytes is too small"),
    ],
)
def test_bad_options_are_refused_by_fit(plain: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AnomalibLiteError, match=f"^{type(plain).__name__}: .*{message}"):
        plain.set_params(**options).fit(good(12))


def test_scales_have_no_layers_of_their_own() -> None:
    detector = MahalanobisVFM(Small(), multi_scale=True, fusion="adaptive", **QUICK)
    with pytest.raises(InvalidValueError, match="needs one map a layer, which multi_scale=True"):
        detector.fit(good(12))


def test_a_file_whose_map_does_not_fit_is_refused(tmp_path: Path) -> None:
    fitted = PatchCore(Small(), feature_dim=6, **QUICK).fit(good(12))
    fitted.transform_ = EmbeddingTransform(feature_dim=5).fit(embeddings(9, d=20))
    fitted = fitted._with_options(feature_dim=5)  # that of the map, but not of the bank
    fitted.save(tmp_path / "model.safetensors")
    with pytest.raises(AnomalibLiteError, match="does not give 6 features"):
        load(tmp_path / "model.safetensors", backbone=Small())
