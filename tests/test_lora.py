"""LoRA: what is learned, what is kept, and the detector that is fitted on it."""

from __future__ import annotations

import importlib.util
import itertools
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from detector_fixtures import skip_without
from safetensors.torch import save_file
from sklearn.covariance import LedoitWolf

from anomalib_lite import MahalanobisVFM, load, lora
from anomalib_lite.backbones import Backbone
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, MissingDependencyError
from anomalib_lite.images import ImageSource
from anomalib_lite.lora import Adapter, _task, _training, adaptive_rank, train_adapter
from anomalib_lite.lora._task import Example, Task, targets_of

SIZE = (64, 96)
LAYERS = ["blocks.2", "blocks.3"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For networks this small, threads that wait for each other take longer than the work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


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


def always_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small a network has little to learn: let each epoch be the best, whatever it is."""
    areas = itertools.count()
    monkeypatch.setattr(Task, "validate", lambda self, *args: next(areas))
    monkeypatch.setattr(_training, "SHARE", 1.0)


@pytest.fixture(scope="module")
def adapter(weights: Path) -> Adapter:
    with pytest.MonkeyPatch.context() as monkeypatch:
        always_better(monkeypatch)
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


class Blind(torch.nn.Module):
    """An attention's layer that sees the texture of a patch, but not how bright it is.

    A network of random weights learns next to nothing that holds on other images, and whether its
    AUROC rises is luck. This one has something to learn, which each seed has to find.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn((3 * 16 * 16, 16), generator=generator)
        bright = torch.ones((3 * 16 * 16, 1))
        weight = torch.linalg.qr(torch.cat([bright, directions], dim=1)).Q[:, 1:].T
        self.attn = torch.nn.Module()
        self.attn.qkv = torch.nn.Linear(3 * 16 * 16, 16, bias=False)
        self.attn.qkv.weight.data.copy_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = torch.pixel_unshuffle(x, 16).permute(0, 2, 3, 1)
        return self.attn.qkv(patches).permute(0, 3, 1, 2)


def blind(seed: int, adapter: Adapter | None = None) -> Backbone:
    return Backbone(Blind(seed), fusion="summary", device="cpu", dtype="float32", adapter=adapter)


def flat(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(108, 133, (n, *SIZE, 3), dtype=np.uint8)


def dark_patches(images: Any, n: int, random: np.random.RandomState) -> Iterator[Example]:
    """Defects of one kind: a patch that is darker."""
    for i in range(n):
        pixels, mask = images[i % len(images)].copy(), np.zeros(SIZE, bool)
        y, x = 16 * random.randint(4), 16 * random.randint(6)
        pixels[y : y + 16, x : x + 16] -= 20
        mask[y : y + 16, x : x + 16] = True
        yield Example(pixels, mask)


def train_blind(seed: int, **options: Any) -> Adapter:
    random = np.random.RandomState(seed)
    options = {"image_size": SIZE, "random": random} | options
    return train_adapter(blind(seed), ImageSource(flat(20, seed)), **options)


@pytest.mark.parametrize("seed", range(3))
def test_it_learns_to_tell_anomalies(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_training, "_anomalies", dark_patches)
    monkeypatch.setattr(_training, "SHARE", 1.0)
    learned = train_blind(seed, epochs=8, learning_rate=3e-3)
    areas = [h["validation_auroc"] for h in learned.history]
    assert "train_loss" not in learned.history[0]  # before anything is learned
    assert max(areas[1:]) > areas[0] + 0.1
    assert learned.history[-1]["train_loss"] < learned.history[1]["train_loss"]
    normal = [Example.normal(image) for image in flat(20, seed)]
    new = flat(40, seed + 100)
    to_tell = [Example.normal(image) for image in new]
    to_tell += dark_patches(new, 80, np.random.RandomState(seed + 100))
    before, after = (
        Task(blind(seed, adapter), [], normal).validate(normal, to_tell)
        for adapter in (None, learned)
    )
    assert after > before + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_features_of_normal_images_stay(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    always_better(monkeypatch)
    monkeypatch.setattr(_training, "_anomalies", dark_patches)
    moved = []
    for keep in (0.0, 100.0):
        monkeypatch.setattr(_task, "KEEP", keep)
        learned, images = train_blind(seed, epochs=6, learning_rate=1e-3), flat(8, seed + 100)
        before, after = (blind(seed, a).embed(images)[..., :16] for a in (None, learned))
        units = [E / np.linalg.norm(E, axis=3, keepdims=True) for E in (before, after)]
        moved.append(np.square(units[0] - units[1]).sum(axis=3).mean())
    assert 0 < moved[1] < 0.2 * moved[0]


def test_seeds_give_the_same(
    weights: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_better(monkeypatch)
    network = backbone(weights)
    torch.rand(3)  # whatever else draws from torch's generator
    state = torch.get_rng_state()
    source, random = ImageSource(good(20)), np.random.RandomState(0)
    again = train_adapter(
        network, source, image_size=SIZE, rank=4, alpha=8.0, epochs=3, random=random
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert again.sha256() == adapter.sha256()
    assert again.history == adapter.history
    other = train(weights, rank=4, alpha=8.0, random=np.random.RandomState(1))
    assert other.sha256() != adapter.sha256()


def test_it_stops_when_nothing_gets_better(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    areas = iter([0.7, 0.6, 0.8, 0.7, 0.8, 0.7, 0.9])
    monkeypatch.setattr(Task, "validate", lambda self, *args: next(areas))
    adapter = train(weights, epochs=9)
    assert [h["validation_auroc"] for h in adapter.history] == [0.7, 0.6, 0.8, 0.7, 0.8, 0.7]
    areas = iter([0.7, 0.8, 0.9])  # what was learned up to the second epoch, and no further
    assert train(weights, epochs=2).sha256() == adapter.sha256()
    areas = iter([0.9, 0.6, 0.5, 0.8])
    assert train(weights, epochs=9).factors == {}  # the network as it was is best


def test_a_share_of_it_is_kept(weights: Path, adapter: Adapter, monkeypatch: Any) -> None:
    always_better(monkeypatch)
    monkeypatch.setattr(_training, "SHARE", 0.25)
    for name, (A, B) in train(weights, rank=4, alpha=8.0).factors.items():
        np.testing.assert_array_equal(A, adapter.factors[name][0])
        np.testing.assert_array_equal(B, adapter.factors[name][1] / 4)


def test_patches_are_judged_by_their_share_of_the_mask() -> None:
    mask = torch.zeros((1, 8, 12), dtype=torch.bool)
    mask[0, :4, :4] = True  # all of the first
    mask[0, 5, 5] = True  # a sixteenth of another
    mask[0, 4:6, 8] = True  # an eighth of a third
    targets, counts = targets_of(mask, (2, 3))
    np.testing.assert_array_equal(targets[0], [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(counts[0], [[True, True, True], [True, False, True]])


def test_the_loss_is_what_it_says(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_task, "resolve_dtype", lambda *args: torch.float32)
    network, images = backbone(weights), good(5)
    mask = np.zeros((5, *SIZE), bool)
    mask[3, :32, :32] = True
    mask[4, 16:48] = True
    torch.manual_seed(0)
    task = Task(network, [], [Example.normal(image) for image in images[:3]])
    with torch.no_grad():
        got = float(task.loss([Example(*e) for e in zip(images, mask, strict=True)]))

    def cross_entropy(z: np.ndarray, y: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-z))
        return -0.5 * np.log(1 - p[~y]).mean() - 0.5 * np.log(p[y]).mean()

    E = network.embed(images).astype(np.float64)
    X, G = E[..., :128].reshape(-1, 128), E[:, 0, 0, 128:]
    X, G = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (X, G))
    y = mask[:, 8::16, 8::16].ravel()
    expected = 0.0
    for f, known, judge, labels in (
        (X, X[: 3 * 24], task.patches, y),
        (G, G[:3], task.images, np.array([0, 0, 0, 1, 1], bool)),
    ):
        estimator = LedoitWolf().fit(known)
        w = (f - estimator.location_) @ np.linalg.cholesky(estimator.precision_)
        z = w
        for layer in judge.head:
            if isinstance(layer, torch.nn.Linear):
                z = z @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
            else:
                z = np.maximum(z, 0)
        expected += 0.5 * cross_entropy(z[:, 0] / 2, labels)
        distances = estimator.mahalanobis(f) / 128  # squared
        np.testing.assert_allclose(np.square(w).mean(axis=1), distances, rtol=1e-6)
        expected += 0.5 * cross_entropy(2 * (distances - 2), labels)
    assert got == pytest.approx(expected, rel=1e-4)


def test_rank_by_participation_ratio(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directions, generator = 0, torch.Generator().manual_seed(0)

    def features(backbone: Any, pixels: np.ndarray) -> Any:
        X = torch.zeros((1, 4, 500, 128))
        X[..., :directions] = torch.randn((1, 4, 500, directions), generator=generator)
        return X, X[:, 0, 0]

    monkeypatch.setattr(_training, "split_patches_and_image", features)
    for directions, expected in ((1, 4), (8, 8), (30, 32), (120, 64)):  # noqa: B007, it is nonlocal
        assert adaptive_rank(backbone(weights), good(3)) == expected


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (3, {}, "3 images are too few to adapt to"),
        (20, {"rank": "auto"}, "rank must be a whole number"),
        (20, {"epochs": 0}, "epochs must be"),
    ],
)
def test_what_cannot_be_learned(
    weights: Path, n: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message):
        train(weights, n, **options)


def test_adapting_to_equal_images_is_refused(weights: Path) -> None:
    source = ImageSource(np.repeat(good(1), 20, axis=0))
    with pytest.raises(InvalidValueError, match="16 images to adapt to are too few or too much"):
        train_adapter(backbone(weights), source, image_size=SIZE)


def test_backbones_of_another_kind(weights: Path) -> None:
    for options in ({"fusion": "concat"}, {"dtype": "bfloat16"}):
        with pytest.raises(InvalidValueError, match="with fusion='summary' and dtype='float32'"):
            train_adapter(backbone(weights, **options), ImageSource(good(20)), image_size=SIZE)


def test_images_of_all_kinds(weights: Path, tmp_path: Path) -> None:
    """Of two sizes, one of them floats, and one that cannot be read."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [*good(8), *(good(8, 1)[:, :, :64] / 255).astype(np.float32), tmp_path / "broken.png"]
    options: dict[str, Any] = {"image_size": 64, "epochs": 1, "on_error": "skip"}
    learned = train_adapter(backbone(weights), ImageSource(images), **options)
    assert len(learned.history) == 2
    assert np.isfinite(learned.history[1]["train_loss"])


# --- The detector -----------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """Attention that reads the weights of its layers past them."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.Module()
        self.attn.qkv = torch.nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = torch.pixel_unshuffle(x, 4).permute(0, 2, 3, 1)
        return torch.nn.functional.linear(patches, self.attn.qkv.weight).permute(0, 3, 1, 2)


def make(weights: Path, **parameters: Any) -> MahalanobisVFM:
    options: dict[str, Any] = {
        "layers": LAYERS,
        "image_size": SIZE,
        "dtype": "float32",
        "device": "cpu",
        "engine": "torch",
        "false_alarm_rate": 0.25,
        "adapt": "lora",
        "rank": 4,
        "alpha": 8.0,
        "epochs": 2,
    }
    return MahalanobisVFM("test_vit", weights=weights, **(options | parameters))


def bad(n: int, seed: int = 1) -> np.ndarray:
    images = good(n, seed)
    images[:, 16:32, 48:80] = (250, 20, 20)
    return images


@pytest.fixture(scope="module")
def fitted(weights: Path) -> MahalanobisVFM:
    with pytest.MonkeyPatch.context() as monkeypatch:
        always_better(monkeypatch)
        return make(weights).fit(good(40))


def test_it_finds_defects(fitted: MahalanobisVFM, weights: Path) -> None:
    assert len(fitted.adapter_.factors) == 8
    found = fitted.detect(np.concatenate([good(6, 9), bad(6)]))
    plain = make(weights, adapt=None).fit(good(40)).score(bad(6))
    assert np.abs(found.scores[6:] / plain - 1).max() > 5e-3  # some may stay by chance
    assert found.scores[6:].min() > found.scores[:6].max()
    assert found.labels[6:].all()
    for heatmap in found.maps[6:]:
        row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
        assert 12 <= row < 36
        assert 44 <= column < 84


@pytest.mark.parametrize("include_backbone", [False, True])
def test_the_file_holds_the_adapter(
    fitted: MahalanobisVFM, include_backbone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted.save(tmp_path / "line3.safetensors", include_backbone=include_backbone)
    monkeypatch.setitem(sys.modules, "peft", None)  # to score needs none
    again = load(tmp_path / "line3.safetensors")
    got, expected = again.detect(bad(3)), fitted.detect(bad(3))
    np.testing.assert_array_equal(got.scores, expected.scores)
    np.testing.assert_array_equal(got.maps, expected.maps)
    assert again.threshold_ == fitted.threshold_
    assert again.adapter_.sha256() == fitted.adapter_.sha256()
    assert again.adapter_.history == fitted.adapter_.history
    copied = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copied.score(bad(3)), expected.scores)


def test_the_adapter_does_not_learn_from_images_held_back(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def watch(network: Backbone, source: ImageSource, **options: Any) -> Adapter:
        seen.extend(source)
        return train_adapter(network, source, **options)

    monkeypatch.setattr(lora, "train_adapter", watch)
    images = good(20)
    detector = make(weights).fit(images)
    taught = {image.tobytes() for image in seen}
    held = [image for image in images if image.tobytes() not in taught]
    assert len(held) == len(detector.calibration_scores_) == 4
    np.testing.assert_array_equal(
        np.sort(detector.score(np.stack(held))), np.sort(detector.calibration_scores_)
    )


@pytest.mark.parametrize("options", [{"engine": "openvino"}, {"n_jobs": 2}])
def test_other_engines_and_workers_have_the_adapter(
    options: dict[str, Any],
    weights: Path,
    fitted: MahalanobisVFM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_without(options.get("engine", "torch"))
    always_better(monkeypatch)
    again, images = make(weights, **options).fit(good(40)), bad(3)
    np.testing.assert_allclose(again.score(images), fitted.score(images), rtol=2e-3)


def test_going_on_keeps_the_adapter(weights: Path) -> None:
    detector = make(weights).fit(good(40))
    before = detector.adapter_
    detector.partial_fit(good(20, 3))
    assert detector.adapter_ is before
    assert detector.images_.moments_.n > 30
    assert make(weights, adapt=None).fit(good(40)).adapter_ is None


def test_adaptive_rank_and_alpha(weights: Path) -> None:
    adapter = make(weights, adaptive=True, epochs=1).fit(good(20)).adapter_
    assert adapter.rank in (4, 8, 16, 32, 64)
    assert adapter.alpha == 2 * adapter.rank


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"adapt": "Lora"}, "adapt must be one of .* Did you mean 'lora'"),
        ({"calibration": "leave_one_out"}, "needs calibration='split'"),
        ({"memory_budget": "2GB"}, "which no memory_budget bounds"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"adapt": None, "adaptive": True}, "Set adapt='lora'"),
        ({"epochs": 0}, "epochs must be"),
        ({"alpha": 0}, "alpha must be"),
        ({"learning_rate": "fast"}, "learning_rate must be"),
        ({"multi_scale": 1}, "multi_scale must be True or False"),
        ({"backbone": "efficientnet_lite0", "weights": None, "layers": None}, "has none"),
        ({"multi_scale": True, "engine": "openvino"}, "can do neither multi_scale"),
        ({"backbone": Fixed(), "weights": None, "layers": None}, "does not use it as a"),
    ],
)
def test_what_it_refuses(weights: Path, parameters: dict[str, Any], message: str) -> None:
    detector = make(weights)
    detector.set_params(**parameters)
    with pytest.raises(
        (InvalidValueError, InvalidTypeError), match=f"^MahalanobisVFM: .*{message}"
    ):
        detector.fit(good(12))


def test_embeddings_and_a_missing_package(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidValueError, match="needs images to adapt to"):
        make(weights).fit_embeddings(np.zeros((8, 4, 6, 16), np.float32))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    with pytest.raises(MissingDependencyError, match=r"pip install 'anomalib-lite\[lora\]'"):
        make(weights).fit(good(12))
