"""MahalanobisVFM: what it does beyond the contract, and a reference from its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import timm
import torch
from detector_fixtures import HEIGHT, PLAIN, WIDTH, Small, bad, good
from safetensors.torch import save_file
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn

from anomalib_lite import MahalanobisVFM, load
from anomalib_lite.backbones import Backbone
from anomalib_lite.errors import (
    CalibrationWarning,
    InvalidTypeError,
    InvalidValueError,
)
from anomalib_lite.images import ImageSource
from anomalib_lite.metrics import auroc


def make(**parameters: Any) -> MahalanobisVFM:
    options = {"backbone": Small(), "image_size": 48, "false_alarm_rate": 0.25}
    return MahalanobisVFM(**(PLAIN | options | parameters))


@pytest.fixture(scope="module")
def fitted() -> MahalanobisVFM:
    return make().fit(good(40))


def test_images_of_many_sizes(fitted: MahalanobisVFM) -> None:
    mixed = [*good(3, 7), *good(3, 8, (48, 96)), *good(3, 9, (96, 48))]
    detector = make().fit([*good(10), *good(10, size=(48, 96)), *good(10, size=(96, 48))])
    scores = detector.score(mixed)
    one_by_one = [detector.score(image)[0] for image in mixed]
    np.testing.assert_allclose(scores, one_by_one, rtol=1e-5)
    assert [m.shape for m in detector.anomaly_map(mixed)] == [i.shape[:2] for i in mixed]


def test_workers_and_budgets_do_not_matter(fitted: MahalanobisVFM) -> None:
    images = good(5, 9)
    for options in ({"n_jobs": 2}, {"memory_budget": "80MB"}):
        with joblib.parallel_config("threading"):
            again = make(**options).fit(good(40))
        np.testing.assert_allclose(again.score(images), fitted.score(images), rtol=1e-4)
        np.testing.assert_allclose(again.threshold_, fitted.threshold_, rtol=1e-4)


def test_a_file_holds_a_given_shrinkage(tmp_path: Path) -> None:
    detector = make(shrinkage=0.1, backbone="efficientnet_lite0").fit(good(20))
    detector.save(tmp_path / "line3.safetensors")
    again, later = load(tmp_path / "line3.safetensors"), good(10, 5)
    np.testing.assert_array_equal(again.score(bad(3)), detector.score(bad(3)))
    np.testing.assert_array_equal(
        again.partial_fit(later).score(bad(3)), detector.partial_fit(later).score(bad(3))
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"fusion": "concat"}, "fusion must be one of"),
        ({"image_score": "reweighted"}, "image_score must be one of"),
        ({"global_weight": 1.5}, "global_weight must be"),
        ({"shrinkage": "ledoit"}, "Did you mean 'ledoit_wolf'"),
        ({"normalize": "yes"}, "normalize must be"),
        ({"memory_budget": "10kB"}, "is too small"),
    ],
)
def test_bad_parameters_are_refused_by_fit(parameters: dict[str, Any], message: str) -> None:
    kinds = (InvalidValueError, InvalidTypeError)
    with pytest.raises(kinds, match=f"^MahalanobisVFM: .*{message}"):
        make(**parameters).fit(good(12))


def test_too_few_images() -> None:
    with pytest.warns(CalibrationWarning):
        assert np.isfinite(make(false_alarm_rate=0.01).fit(good(6)).score(good(2))).all()
    with pytest.raises(InvalidValueError, match="has no covariance"):
        make().fit(good(2))
    with pytest.raises(
        InvalidValueError, match="20 images to fit on are too few or too much alike"
    ):
        make(calibration="leave_one_out").fit(np.repeat(good(1), 20, axis=0))


# --- The definition -------------------------------------------------------------------------


def naive(
    fit_on: np.ndarray, Q: np.ndarray, normalize: bool, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Patch scores and image scores by scikit-learn's estimator, in float64."""

    def split(E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = E.shape[-1] // 2
        X, G = E[..., :d].reshape(-1, d).astype(np.float64), E[:, 0, 0, d:].astype(np.float64)
        if normalize:
            X, G = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (X, G))
        return X, G

    (X, G), (Qx, Qg) = split(fit_on), split(Q)
    d = X.shape[1]
    patches = np.sqrt(LedoitWolf().fit(X).mahalanobis(Qx) / d).reshape(Q.shape[:3])
    whole = np.sqrt(LedoitWolf().fit(G).mahalanobis(Qg) / d)
    return patches, weight * whole + (1 - weight) * patches.max(axis=(1, 2))


def embeddings(n: int, seed: int = 0) -> np.ndarray:
    """Patches (6 numbers) beside what describes the image (6 more, the same in all patches)."""
    rng = np.random.default_rng(seed)
    E = rng.normal(1, 1, (n, 4, 5, 12)) * np.linspace(0.2, 2, 12)
    E[..., 6:] = E[:, :1, :1, 6:]
    return E.astype(np.float32)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_scores_are_as_defined(normalize: bool, weight: float) -> None:
    E, Q = embeddings(60), embeddings(5, seed=1)
    detector = make(normalize=normalize, global_weight=weight).fit_embeddings(E)
    order = np.random.RandomState(0).permutation(60)
    patches, scores = naive(E[order[:48]], Q, normalize, weight)
    np.testing.assert_allclose(detector.score_embeddings(Q), scores, rtol=1e-4)
    np.testing.assert_allclose(detector._score_patches(Q)[0], patches, rtol=1e-4)
    held = naive(E[order[:48]], E[order[48:]], normalize, weight)[1]
    np.testing.assert_allclose(detector.calibration_scores_, held, rtol=1e-4)


def test_leaving_one_out_is_to_fit_without_it() -> None:
    E = embeddings(30)
    detector = make(calibration="leave_one_out").fit_embeddings(E)
    for i in (0, 13, 29):
        expected = naive(np.delete(E, i, 0), E[i : i + 1], True, 0.5)[1]
        np.testing.assert_allclose(detector.calibration_scores_[i : i + 1], expected, rtol=1e-4)


def test_going_on_is_to_have_had_all_from_the_start() -> None:
    E, Q = embeddings(60), embeddings(4, seed=1)
    detector = make(false_alarm_rate=0.5).fit_embeddings(E[:40])
    n = detector.images_.moments_.n
    before = detector.patches_.covariance_.copy()
    old = detector.patches_
    detector.partial_fit_embeddings(E[40:])
    np.testing.assert_array_equal(old.covariance_, before)
    first = np.random.RandomState(0).permutation(40)[:n]
    later = 40 + np.random.RandomState(0).permutation(20)[:16]
    expected = naive(E[np.concatenate([first, later])], Q, True, 0.5)[1]
    np.testing.assert_allclose(detector.score_embeddings(Q), expected, rtol=1e-4)


# --- Whole images in the backbone -----------------------------------------------------------


def test_the_class_token_is_behind_the_patches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    layers = ["blocks.2", "blocks.4"]
    options: dict[str, Any] = {"weights": tmp_path / "vit.safetensors", "layers": layers}
    backbone = Backbone("test_vit", fusion="summary", dtype="float32", device="cpu", **options)
    pixels = good(2, 3, (64, 96))
    E = backbone.embed(pixels)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
    seen: list[Tensor] = []
    for name in layers:
        network.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        network(x)
    d = seen[0].shape[2]
    assert E.shape[3] == 4 * d
    for k, tokens in enumerate(seen):
        got = E[..., (2 + k) * d : (3 + k) * d]
        expected = tokens[:, 0].numpy()[:, None, None]
        np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(network.state_dict(), path)
    return {"backbone": "test_vit", "weights": path, "layers": ["blocks.2", "blocks.4"]}


def test_attention_is_that_of_the_class_token(vit: dict[str, Any]) -> None:
    options = vit | {"fusion": "summary", "dtype": "float32", "device": "cpu"}
    backbone = Backbone(**options, attention=True)
    attention: Any = backbone.network.get_submodule("blocks.4.attn")
    pixels = good(2, 3, (64, 96))
    got = backbone.embed(pixels)
    np.testing.assert_array_equal(got[..., :-1], Backbone(**options).embed(pixels))
    seen: list[Tensor] = []
    attention.fused_attn = False  # timm's own softmax then passes through its dropout
    attention.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o))
    backbone.embed(pixels[:1])
    weights = seen[0][0, :, 0, 1:].mean(dim=0).detach().numpy()
    np.testing.assert_allclose(got[0, ..., -1].ravel(), weights / weights.mean(), rtol=1e-4)


def test_scales_see_the_image_smaller(vit: dict[str, Any]) -> None:
    options = vit | {"fusion": "summary", "dtype": "float32", "device": "cpu"}
    plain, several = Backbone(**options), Backbone(**options, scales=(0.25, 0.5, 1.0))
    pixels = good(2, 3, (64, 128))
    maps, whole = several(pixels), plain(pixels)
    assert [tuple(m.shape[2:]) for m in maps[:6]] == [(1, 2)] * 2 + [(2, 4)] * 2 + [(4, 8)] * 2
    assert [tuple(m.shape[2:]) for m in maps[6:]] == [(1, 1)] * 6
    for got, expected in zip([*maps[4:6], *maps[10:]], whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    half = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    half = nn.functional.interpolate(half, (32, 64), mode="bilinear", antialias=True)
    for got, expected in zip(maps[2:4], plain(half.permute(0, 2, 3, 1))[:2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert several.embed(pixels).shape == (2, 4, 8, 3 * plain.embed(pixels).shape[3])


@pytest.mark.parametrize("option", ["multi_scale", "attention_guided"])
def test_variants_keep_the_contract(option: str, vit: dict[str, Any], tmp_path: Path) -> None:
    detector = make(**vit, image_size=(64, 96), **{option: True}, engine="auto").fit(good(40))
    found = detector.detect(np.concatenate([good(6, 9), bad(6)]))
    assert detector.engine_ == "torch"
    assert auroc([0] * 6 + [1] * 6, found.scores) == 1
    assert found.maps.shape == (12, HEIGHT, WIDTH)
    detector.save(tmp_path / "line3.safetensors")
    again = load(tmp_path / "line3.safetensors")
    np.testing.assert_array_equal(again.score(bad(3)), detector.score(bad(3)))
    assert getattr(again, option)
    before = detector.score(bad(1))
    assert (detector.partial_fit(good(10, 5)).score(bad(1)) != before).all()


def test_attention_weighs_the_patches() -> None:
    E = embeddings(40)
    weights = np.random.default_rng(5).gamma(2.0, size=(*E.shape[:3], 1)).astype(np.float32)
    guided = make(attention_guided=True, global_weight=0)
    guided.fit_embeddings(np.concatenate([E, weights], axis=3))
    plain = make(global_weight=0).fit_embeddings(E)
    patches = plain._score_patches(E[:5])[0]
    got = guided.score_embeddings(np.concatenate([E, weights], axis=3)[:5])
    expected = (patches * weights[:5, ..., 0]).max(axis=(1, 2))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_attention_needs_a_transformer(vit: dict[str, Any]) -> None:
    for options in ({"backbone": "efficientnet_lite0"}, vit | {"layers": ["blocks.2.norm1"]}):
        with pytest.raises(InvalidValueError, match="needs a vision transformer with a class"):
            make(attention_guided=True, **options).fit(good(12))


def test_registers_are_no_class_token() -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
    network = timm.models.VisionTransformer(
        class_token=False, reg_tokens=4, num_classes=0, global_pool="avg", num_heads=2, **sizes
    )
    options: dict[str, Any] = {
        "layers": ["blocks.1"],
        "fusion": "summary",
        "dtype": "float32",
        "device": "cpu",
    }
    backbone = Backbone(network, **options)
    E = backbone.embed(good(1, size=(32, 32)))
    np.testing.assert_allclose(E[0, 0, 0, 16:], E[0, ..., :16].mean(axis=(0, 1)), atol=1e-5)
    with pytest.raises(InvalidValueError, match="with a class token"):
        Backbone(network, **options, attention=True)


def test_embeddings_of_another_kind_are_refused() -> None:
    E = embeddings(40)
    with pytest.raises(InvalidValueError, match="and the attention; got 12 numbers"):
        make(attention_guided=True).fit_embeddings(E)
    with pytest.raises(InvalidValueError, match="got 11 numbers with attention_guided=False"):
        make().fit_embeddings(E[..., :11])


def test_gradients_of_a_module_of_ones_own_do_not_matter() -> None:
    class Scaled(Small):
        factor = torch.ones(1, requires_grad=True)  # no parameter, so nothing freezes it

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer * self.factor for layer in super().forward(x)]

    backbone = Backbone(Scaled(), fusion="summary", dtype="float32", device="cpu")
    assert backbone.embed(good(1)).shape == (1, 12, 20, 40)


def test_without_a_class_token_it_is_the_mean() -> None:
    backbone = Backbone(Small(), fusion="summary", dtype="float32", device="cpu")
    E = backbone.embed(good(2))
    assert E.shape == (2, 12, 20, 40)
    np.testing.assert_allclose(E[:, 5, 7, 20:], E[..., :20].mean(axis=(1, 2)), rtol=1e-5)


def test_real_defects_are_found(data_dir: Path) -> None:
    root = data_dir / "magnetic_tile"
    train = sorted((root / "train" / "good").iterdir())[:150]
    kinds = sorted(p for p in (root / "test").iterdir() if p.name != "good")
    broken = [path for kind in kinds for path in sorted(kind.iterdir())[:16]]
    whole = sorted((root / "test" / "good").iterdir())[:60]
    detector = MahalanobisVFM(image_size=128, false_alarm_rate=0.1).fit(train)
    scores = detector.score(ImageSource([*whole, *broken]))
    missorted = 1 - auroc([0] * len(whole) + [1] * len(broken), scores)  # a share of pairs
    assert missorted < 0.25
