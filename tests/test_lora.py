"""LoRA: what is learned, what is kept, and the detector that is fitted on it."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from anomalib_lite import MahalanobisVFM, load, lora
from anomalib_lite.backbones import Backbone
from anomalib_lite.errors import InvalidValueError, MissingDependencyError
from anomalib_lite.images import ImageSource
from anomalib_lite.lora import Adapter, adaptive_rank, targets_of, train_adapter

SIZE = (64, 96)
LAYERS = ["blocks.2", "blocks.3"]


def good(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    slope = np.linspace(90, 150, SIZE[1])[:, None]
    return (slope + rng.integers(-12, 13, (n, *SIZE, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(network.state_dict(), path)
    return path


def backbone(weights: Path, **options: Any) -> Backbone:
    options = {"layers": LAYERS, "fusion": "summary", "device": "cpu", "dtype": "float32"} | options
    return Backbone("test_vit", weights=weights, **options)


def train(weights: Path, n: int = 20, **options: Any) -> Adapter:
    options = {"epochs": 3, "learning_rate": 1e-3, "random": np.random.RandomState(0)} | options
    return train_adapter(backbone(weights), ImageSource(good(n)), image_size=SIZE, **options)


@pytest.fixture(scope="module")
def adapter(weights: Path) -> Adapter:
    return train(weights, rank=4, alpha=8.0)


# --- What is learned --------------------------------------------------------------------------


def test_only_the_attention_up_to_the_last_layer_changes(weights: Path, adapter: Adapter) -> None:
    parts = ("qkv", "proj")
    assert sorted(adapter.factors) == sorted(
        f"blocks.{i}.attn.{part}" for i in range(4) for part in parts
    )
    plain, adapted = backbone(weights), backbone(weights, adapter=adapter)
    assert plain.sha256 == adapted.sha256
    before, after = plain.network.state_dict(), adapted.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in adapter.factors}
    for name, (A, B) in adapter.factors.items():
        assert A.shape[0] == B.shape[1] == adapter.rank == 4
        change = (after[f"{name}.weight"] - before[f"{name}.weight"]).numpy()
        np.testing.assert_allclose(change, B @ A, atol=1e-6)
        assert 1 <= np.linalg.matrix_rank(B @ A) <= 4
    for name, tensor in adapted.original_state().items():
        assert torch.equal(tensor, before[name])


def test_it_learns_to_tell_anomalies(weights: Path) -> None:
    history = train(weights, n=40, epochs=6).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert min(h["validation_loss"] for h in history) < history[0]["validation_loss"]
    assert max(h["validation_auroc"] for h in history) > 0.75


def test_features_of_normal_images_stay(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved() -> float:
        learned = train(weights, learning_rate=3e-3)
        images = good(8, 5)
        before, after = (
            backbone(weights, adapter=a).embed(images)[..., :128] for a in (None, learned)
        )
        units = [E / np.linalg.norm(E, axis=3, keepdims=True) for E in (before, after)]
        return float(np.square(units[0] - units[1]).sum(axis=3).mean())

    kept = moved()
    monkeypatch.setattr(lora, "KEEP", 0.0)
    assert kept < 0.5 * moved()


def test_seeds_give_the_same(weights: Path, adapter: Adapter) -> None:
    torch.rand(3)  # whatever else draws from torch's generator
    state = torch.get_rng_state()
    again = train(weights, rank=4, alpha=8.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.sha256() == adapter.sha256()
    assert again.history == adapter.history
    assert train(weights, random=np.random.RandomState(1)).sha256() != adapter.sha256()


def test_it_stops_when_nothing_gets_better(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.5, 0.4, 0.41, 0.42, 0.4, 0.1])
    monkeypatch.setattr(
        lora._Task, "validate", lambda self, examples: {"validation_loss": next(losses)}
    )
    adapter = train(weights, epochs=9)
    assert [h["validation_loss"] for h in adapter.history] == [0.5, 0.4, 0.41, 0.42, 0.4]
    losses = iter([0.5, 0.4, 0.3])  # what was learned up to the second epoch, and no further
    assert train(weights, epochs=2).sha256() == adapter.sha256()


def test_patches_are_judged_by_their_share_of_the_mask() -> None:
    mask = torch.zeros((1, 8, 12), dtype=torch.bool)
    mask[0, :4, :4] = True  # all of the first
    mask[0, 5, 5] = True  # a sixteenth of another
    mask[0, 4:6, 8] = True  # an eighth of a third
    targets, counts = targets_of(mask, (2, 3))
    np.testing.assert_array_equal(targets[0], [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(counts[0], [[True, True, True], [True, False, True]])


def test_the_loss_is_what_it_says(weights: Path) -> None:
    network, images = backbone(weights), good(3)
    mask = np.zeros((3, *SIZE), bool)
    mask[2, :32, :32] = True
    task = lora._Task(network, [], images)
    with torch.no_grad():
        got = float(task.loss([lora._Example(*e) for e in zip(images, mask, strict=True)])[0])
        E = torch.from_numpy(network.embed(images))
        X, G = E[..., :128], E[:, 0, 0, 128:]
        units = [x / x.norm(dim=-1, keepdim=True) * 128**0.5 for x in (X, G)]
        z = [
            h(x)[..., 0] / 2 for h, x in zip((task.patch_head, task.image_head), units, strict=True)
        ]
    p, q = (1 / (1 + np.exp(-v.numpy().astype(np.float64))) for v in z)
    y = mask[:, 8::16, 8::16]
    patches = -0.5 * np.log(1 - p[~y]).mean() - 0.5 * np.log(p[y]).mean()
    whole = -(np.log(1 - q[:2]).sum() + np.log(q[2])) / 3
    assert got == pytest.approx((patches + whole) / 2, rel=1e-4)


def test_rank_by_participation_ratio(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directions = 0

    def features(backbone: Any, pixels: np.ndarray) -> Any:
        X = torch.zeros((1, 4, 500, 128))
        X[..., :directions] = torch.randn((1, 4, 500, directions))
        return X, X[:, 0, 0]

    monkeypatch.setattr(lora, "_features", features)
    for directions, expected in ((1, 4), (8, 8), (30, 32), (120, 64)):  # noqa: B007, it is nonlocal
        assert adaptive_rank(backbone(weights), good(3)) == expected


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [(3, {}, "3 images are too few to adapt to"), (12, {"rank": 0}, "rank")],
)
def test_what_cannot_be_learned(
    weights: Path, n: int, options: dict[str, Any], message: str
) -> None:
    if "rank" in options:
        detector = MahalanobisVFM("test_vit", weights=weights, adapt="lora", rank=0)
        with pytest.raises(InvalidValueError, match="rank must be a whole number"):
            detector.fit(good(n))
    else:
        with pytest.raises(InvalidValueError, match=message):
            train(weights, n, **options)
