"""One model for each layer, against one detector for each layer by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import timm
import torch
from detector_fixtures import HEIGHT, PLAIN, WIDTH, Small, bad, good
from scipy.spatial.distance import cdist
from sklearn.base import clone

from anomalib_lite import MahalanobisVFM, PaDiM, PatchCore, SubspaceAD, load
from anomalib_lite.errors import AnomalibLiteError, InvalidValueError, ModelFileError

LAYERS = (np.s_[:16], np.s_[16:])  # channels of those of Small
QUICK = PLAIN | {
    "image_size": (HEIGHT, WIDTH),
    "false_alarm_rate": 0.25,
    "fusion": "per_layer",
}
DETECTORS: list[Any] = [
    PatchCore(Small(), **QUICK),
    PaDiM(Small(), n_components=8, **QUICK),
    MahalanobisVFM(Small(), **QUICK),
    SubspaceAD(Small(), n_components=3, **QUICK),
]
TRAIN, QUESTIONS = good(24), np.concatenate([good(3, 8), bad(2)])


@pytest.fixture(params=DETECTORS, ids=lambda detector: type(detector).__name__)
def detector(request: pytest.FixtureRequest) -> Any:
    """A detector to fit."""
    return clone(request.param)


def assert_same(detector: Any, expected: Any, rtol: float = 0.0) -> None:
    found, wanted = detector.detect(QUESTIONS), expected.detect(QUESTIONS)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=rtol)
    np.testing.assert_allclose(found.maps, wanted.maps, rtol=rtol, atol=rtol)
    assert detector.threshold_ == pytest.approx(expected.threshold_, rel=rtol, abs=0)


def split(detector: Any, E: np.ndarray) -> list[np.ndarray]:
    """Return the features of each layer: of MahalanobisVFM those of patches and of the image."""
    if not isinstance(detector, MahalanobisVFM):
        return [E[..., at] for at in LAYERS]
    patches, images = E[..., :20], E[..., 20:]
    return [np.concatenate([patches[..., at], images[..., at]], axis=-1) for at in LAYERS]


# --- Against references ---------------------------------------------------------------------


def test_a_bank_for_each_layer_is_what_loops_give() -> None:
    """All patches of the images that were fitted on, and plain distances in float64."""
    fitted = PatchCore(Small(), coreset_ratio=1.0, **QUICK).fit(TRAIN)
    E, Q = fitted.backbone_.embed(TRAIN), fitted.backbone_.embed(QUESTIONS)
    maps = [
        cdist(Q[..., at].reshape(-1, n).astype(float), E[..., at].reshape(-1, n)).min(axis=1)
        for at, n in zip(LAYERS, (16, 4), strict=True)
    ]
    expected = np.mean(maps, axis=0).reshape(Q.shape[:3])
    patch_scores, scores = fitted._score_raw(Q)
    np.testing.assert_allclose(patch_scores, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scores, expected.max(axis=(1, 2)), rtol=1e-3)
    np.testing.assert_array_equal(fitted.score(QUESTIONS), scores)


def test_each_layer_has_a_model_of_its_own(detector: Any) -> None:
    """Those are what fit_embeddings learns from the features of one layer."""
    detector.set_params(image_score="max")
    if isinstance(detector, PatchCore):
        detector.set_params(coreset_ratio=1.0)  # or each coreset would begin elsewhere
    fitted = detector.fit(TRAIN)
    E, Q = fitted.backbone_.embed(TRAIN), fitted.backbone_.embed(QUESTIONS)
    maps, wholes = [], []
    for own, asked, model in zip(
        split(fitted, E), split(fitted, Q), fitted.layer_models_.models_, strict=True
    ):
        if isinstance(fitted, PaDiM):  # its channels are drawn anew for each layer
            patches, whole = model._score_patches(asked)
            assert model.gaussians_.shape == (12, 20, min(8, own.shape[-1]))
        else:
            alone = clone(detector).set_params(fusion=type(fitted)().fusion)
            if isinstance(alone, MahalanobisVFM):
                alone.set_params(global_weight=1.0)
            alone.fit_embeddings(own)
            patches, whole = alone._score_patches(asked)
        maps.append(patches)
        wholes.append(whole)
    expected = np.mean(np.array(maps, np.float64), axis=0)
    scores = expected.max(axis=(1, 2))
    if isinstance(fitted, MahalanobisVFM):
        scores = 0.5 * scores + 0.5 * np.mean(wholes, axis=0)
    found, scored = fitted._score_raw(Q)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scored, scores, rtol=1e-3)
    np.testing.assert_allclose(fitted.score(QUESTIONS), scores, rtol=1e-3)
    assert fitted.predict(QUESTIONS)[3:].tolist() == [-1, -1]
    assert fitted.n_features_ == E.shape[-1]


@pytest.mark.parametrize("how", ["top4%", "smoothed", "structure"])
def test_images_are_scored_by_the_mean_map(detector: Any, how: str, tmp_path: Path) -> None:
    detector.set_params(image_score=how)
    if isinstance(detector, MahalanobisVFM):
        detector.set_params(global_weight=0.0)
    fitted = detector.fit(good(40))
    Q = fitted.backbone_.embed(QUESTIONS)
    patch_scores, scores = fitted._score_raw(Q)
    plain = clone(fitted).set_params(fusion=type(fitted)().fusion)
    if how == "structure":
        plain.map_statistics_ = fitted.layer_models_.map_statistics_
    none = np.zeros(patch_scores.shape, bool)
    np.testing.assert_array_equal(scores, plain._score_maps(patch_scores, none))
    fitted.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", backbone=Small())
    assert_same(again, fitted)
    assert_same(again.partial_fit(good(20, 5)), fitted.partial_fit(good(20, 5)))


def test_too_few_maps_are_an_error_of_the_detector(detector: Any) -> None:
    detector.set_params(image_score="structure")
    with pytest.raises(InvalidValueError, match=f"^{type(detector).__name__}: image_score="):
        detector.fit(good(5))


def test_no_file_is_written_that_cannot_be_read(detector: Any, tmp_path: Path) -> None:
    path, plain = tmp_path / "model.safetensors", type(detector)().fusion
    for then, now in (("per_layer", plain), (plain, "per_layer")):
        fitted = clone(detector).set_params(fusion=then).fit(good(20)).set_params(fusion=now)
        with pytest.raises(InvalidValueError, match="must stay as it was"):
            fitted.save(path)
        assert not path.exists()
        fitted.set_params(fusion=then).save(path)
        path.unlink()


# --- As every detector ------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"feature_dim": 4, "normalize": True},
    {"whiten": True, "feature_dim": 4},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_saved_and_goes_on(detector: Any, options: dict[str, Any], tmp_path: Path) -> None:
    fitted = detector.set_params(**options).fit(TRAIN)
    fitted.save(tmp_path / "model.safetensors", include_backbone=True)
    again = load(tmp_path / "model.safetensors", backbone=Small())
    assert_same(again, fitted)
    before = fitted.score(QUESTIONS)
    assert_same(again.partial_fit(good(10, 5)), fitted.partial_fit(good(10, 5)))
    assert (fitted.score(QUESTIONS) != before).any()
    again.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", backbone=Small())
    assert_same(again, fitted)
    with pytest.raises(AnomalibLiteError):
        again.partial_fit([*good(4), 3])
    assert_same(again, fitted)
    plain = type(detector)().fusion
    again.set_params(fusion=plain, feature_dim=None, whiten=False).fit(TRAIN)
    assert again.layer_models_ is None
    assert_same(again, clone(again).fit(TRAIN))


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_workers_and_budgets_give_the_same(detector: Any, options: dict[str, Any]) -> None:
    detector.set_params(**options)
    here = clone(detector).fit(TRAIN)
    for budget in (None, "4GB"):
        one = clone(detector).set_params(memory_budget=budget).fit(TRAIN)
        assert_same(one, here, 0.0 if budget is None else 1e-4)
        with joblib.parallel_config("threading"):
            two = clone(detector).set_params(memory_budget=budget, n_jobs=2).fit(TRAIN)
        assert_same(two, one)
    with pytest.raises(InvalidValueError, match=r"share of layer 0, \d+ of \d+ features"):
        clone(detector).set_params(memory_budget="5MB").fit(TRAIN)


def test_images_of_several_sizes() -> None:
    images = [*good(10), *good(8, 3, (64, 64))]
    fitted = PatchCore(Small(), **(QUICK | {"image_size": 48})).fit(images)
    assert fitted.score(bad(2)).min() > fitted.threshold_
    sharded = clone(fitted).set_params(memory_budget="4GB").fit(images)
    np.testing.assert_allclose(sharded.score(bad(2)), fitted.score(bad(2)), rtol=1e-4)


def test_ignored_patches_have_no_score(detector: Any) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, 40:] = True
    fitted = detector.fit(TRAIN, ignore_mask=mask)
    found = fitted.detect(QUESTIONS)
    assert (found.maps[:, :, 40:] == 0).all()
    np.testing.assert_array_equal(fitted.score(bad(2)), fitted.score(good(2, 1)))


def test_the_attention_goes_with_each_layer() -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", dynamic_img_size=True)
    options = QUICK | {"layers": [0, 1], "image_size": (48, 80)}
    fitted = MahalanobisVFM(network, attention_guided=True, shrinkage=0.1, **options).fit(TRAIN)
    lengths = [len(at) for at in fitted.layer_models_.layers]
    assert sum(lengths) == fitted.n_features_ + 1  # the attention is in both


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_weights": (1.0, 2.0)}, "layer_weights go with fusion='weighted'"),
        ({"feature_dim": 5}, "feature_dim=5 is more than the 4"),
    ],
)
def test_what_does_not_fit_is_refused(detector: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^{type(detector).__name__}: .*{message}"):
        detector.set_params(**options).fit(TRAIN)


def test_equation_7_needs_one_bank() -> None:
    with pytest.raises(InvalidValueError, match="image_score='reweighted' needs one model"):
        PatchCore(Small(), image_score="reweighted", **QUICK).fit(TRAIN)
    with pytest.raises(InvalidValueError, match="fusion='per_layer' must know which features"):
        PatchCore(**QUICK).fit_embeddings(np.zeros((8, 4, 6, 5)))


def test_an_update_keeps_the_map(detector: Any) -> None:
    fitted = detector.fit(TRAIN)
    fitted.set_params(fusion=type(fitted)().fusion)
    with pytest.raises(InvalidValueError, match="fusion must stay as it was in fit, 'per_layer'"):
        fitted.partial_fit(good(10, 5))
    fitted.set_params(fusion="per_layer", feature_dim=3)
    with pytest.raises(InvalidValueError, match="feature_dim must stay as it was in fit, None"):
        fitted.partial_fit(good(10, 5))


def test_a_file_with_a_layer_too_few_is_refused(tmp_path: Path) -> None:
    fitted = PatchCore(Small(), **QUICK).fit(TRAIN)
    fitted.layer_models_.models_.pop()
    fitted.save(tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="shorter"):
        load(tmp_path / "model.safetensors", backbone=Small())
