"""GatedCascade(training="finetune"): what is learned, from what, which epoch is kept, and files."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from detector_fixtures import PLAIN, Small, skip_without
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from torch import Tensor, nn

from anomalib_lite import GatedCascade, MahalanobisVFM, PatchCore, load
from anomalib_lite.backbones import Backbone
from anomalib_lite.cascade import _finetuning
from anomalib_lite.cascade._finetuning import FinetuningResult, finetune_gate
from anomalib_lite.cascade.gate import LinearHead, NetworkEncoder, SavedGate
from anomalib_lite.errors import InvalidValueError, ModelFileError
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.metrics import auroc
from anomalib_lite.synthetic import SyntheticAnomalies

HEIGHT, WIDTH = 64, 96
NETWORK = "test_efficientnet"


class Learner(nn.Module):
    """A module of a user's own: one feature map, from weights that can learn."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 8, 3)
        weights = np.random.default_rng(seed).normal(0, 0.2, (8, 16, 3, 3))
        self.conv.weight.data = torch.tensor(weights, dtype=torch.float32)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(self.norm(torch.pixel_unshuffle(x, 4)[:, ::3])))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(timm.create_model(NETWORK, num_classes=0).state_dict(), path)
    return path


def make(**parameters: Any) -> GatedCascade:
    detector = PatchCore(Small(), image_size=32, false_alarm_rate=0.2, coreset_ratio=0.05, **PLAIN)
    gate = parameters.get("gate") or Learner()  # which draws, though its weights are set then
    options = {"gate": gate, "image_size": 64, "max_missed": 0.3, "false_alarm_rate": 0.2}
    options |= {"training": "finetune", "epochs": 2, "detector": detector}
    return GatedCascade(**(options | PLAIN | parameters))


def backbone(network: Any = NETWORK, **options: Any) -> Backbone:
    network = Learner() if network is Learner else network
    defaults: dict[str, Any] = {"strides": (16, 32), "device": "cpu", "dtype": "float32"}
    return Backbone(network, **(defaults | {"trainable": True, "where": "gate"} | options))


def tune(
    network: Backbone, good: np.ndarray, bad: np.ndarray | None, **options: Any
) -> FinetuningResult:
    options = {"image_size": 64, "epochs": 2, "random": np.random.RandomState(0)} | options
    anomalous = None if bad is None else ImageSource(bad)
    return finetune_gate(network, ImageSource(good), anomalous, **options)


def features(network: Backbone, images: Any) -> np.ndarray:
    """What the gate sees of images by a network that was finetuned."""
    return NetworkEncoder(Extractor(network, image_size=64), None)(ImageSource(images))[0]


def stripes(
    n: int, seed: int, *, defect: bool, side: int = 24, contrast: float = 30, noise: float = 20
) -> np.ndarray:
    """Fine stripes of any phase; where there is a defect, they run the other way in a spot.

    Means, and all pixels taken one by one, are alike.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    images = np.empty((n, HEIGHT, WIDTH, 3), np.uint8)
    for image in images:
        phase, level = rng.uniform(0, 2 * np.pi), rng.uniform(110, 140)
        wave = np.sin(2 * np.pi * (x + y) / 6 + phase)
        if defect:
            top, left = rng.integers(0, HEIGHT - side), rng.integers(0, WIDTH - side)
            spot = np.s_[top : top + side, left : left + side]
            wave[spot] = np.sin(2 * np.pi * (x - y) / 6 + phase)[spot]
        gray = level + contrast * wave + rng.normal(0, noise, wave.shape)
        image[:] = np.clip(gray, 0, 255)[..., None]
    return images


def good(n: int, seed: int = 0, **look: float) -> np.ndarray:
    return stripes(n, seed, defect=False, **look)


def bad(n: int, seed: int = 1, **look: float) -> np.ndarray:
    return stripes(n, seed, defect=True, **look)


def labelled(n: int = 40, n_bad: int = 20) -> tuple[np.ndarray, list[int]]:
    return np.concatenate([good(n), bad(n_bad)]), [0] * n + [1] * n_bad


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def last_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """So short a training may make nothing better: let the last epoch count, whatever it is."""
    epochs = itertools.count()
    monkeypatch.setattr(_finetuning, "_rank", lambda entry: (next(epochs), 0))


@pytest.fixture
def fitted(weights: Path, last_is_best: None) -> GatedCascade:
    cascade = make(gate=NETWORK, weights=weights).fit(*labelled())
    frozen = Backbone(NETWORK, weights=weights, strides=(16, 32), device="cpu")
    assert cascade.gate_.backbone.sha256 != frozen.sha256
    return cascade


# --- What is learned --------------------------------------------------------------------------


def test_it_tells_a_defect_that_the_frozen_network_does_not(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This network's weights are random: it has everything to learn and nothing to forget.
    monkeypatch.setattr(_finetuning, "LEARNING_RATE", 3e-3)
    normal, broken = good(100), bad(100, side=32)
    new, truth = np.concatenate([good(60, 7), bad(60, 8, side=32)]), np.repeat([0, 1], 60)
    cascade = make(gate=NETWORK, weights=weights, epochs=6)
    cascade.fit(np.concatenate([normal, broken]), np.repeat([0, 1], 100))
    missorted = [1 - entry["validation_auroc"] for entry in cascade.gate_.history]
    assert min(missorted) < missorted[0] / 4  # the first is of the network as it was
    frozen = backbone(weights=weights, trainable=False)
    head = LinearHead.fit(features(frozen, normal), [features(frozen, broken)], "balanced", "")
    before = 1 - auroc(truth, head.logits(features(frozen, new)))
    after = 1 - auroc(truth, cascade.detect(new, maps=False).probabilities)
    assert after < before / 4
    assert after < 0.1


def test_weights_learn_and_statistics_stay(weights: Path, last_is_best: None) -> None:
    network = backbone(weights=weights)
    before = {name: tensor.clone() for name, tensor in network.network.state_dict().items()}
    tuned = tune(network, good(20), bad(20))
    changed = {name for name in before if not torch.equal(before[name], tuned.state[name])}
    assert {"conv_stem.weight", "bn1.weight", "bn1.bias"} <= changed
    assert not {name for name in changed if "running" in name or "num_batches" in name}
    # What comes after the last layer that is looked at has no part in it.
    assert not {name for name in changed if name.startswith(("conv_head", "bn2"))}
    assert tuned.sha256 == Backbone(NETWORK, state=tuned.state).sha256 != network.sha256
    assert all(t.is_contiguous() and not t.requires_grad for t in tuned.state.values())


def test_the_first_line_is_that_of_the_frozen_features(weights: Path) -> None:
    """Standardized and back again, it is the head of ``LinearHead.fit`` on the gate's features."""
    network = backbone(weights=weights)
    [examples, _] = _finetuning._examples(
        ImageSource(good(20)),
        ImageSource(bad(20)),
        0,
        (64, network.stride),
        np.random.RandomState(0),
    )
    judge = _finetuning.GateNetwork(network, examples, "balanced")
    X = features(backbone(weights=weights, trainable=False), examples.images)
    n = examples.n_normal
    expected = LinearHead.fit(X[:n], [X[n:]], "balanced", "")
    np.testing.assert_allclose(judge.logits(examples), expected.logits(X), atol=1e-3)
    np.testing.assert_allclose(judge.head().logits(X), expected.logits(X), atol=1e-3)


@pytest.mark.parametrize(
    ("areas", "losses", "best"),
    [
        ([0.5, 0.6, 0.9, 0.7], [1, 1, 1, 1], 2),
        ([0.5, 0.9, 0.9, 0.9], [1, 0.5, 0.3, 0.4], 2),
        ([0.5, 0.6, 0.7, 0.8], [1, 2, 3, 4], 3),
        ([0.9, 0.6, 0.7, 0.9], [1, 1, 1, 1], 0),  # not worse than the frozen network
    ],
)
def test_the_best_epoch_is_kept(
    areas: list[float], losses: list[float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict[str, Tensor], LinearHead]] = []

    def validate(judge: Any, *args: Any) -> dict[str, float]:
        seen.append((copy.deepcopy(judge.network.state_dict()), judge.head()))
        k = len(seen) - 1
        return {"validation_auroc": areas[k], "validation_loss": losses[k]}

    monkeypatch.setattr(_finetuning, "_validate", validate)
    tuned = tune(backbone(Learner), good(10), bad(10), epochs=3)
    assert [h["validation_auroc"] for h in tuned.history] == areas
    for k, (state, head) in enumerate(seen):
        assert same_state(state, tuned.state) == (k == best)
        assert np.array_equal(head.weights, tuned.head.weights) == (k == best)
        assert (head.bias == tuned.head.bias) == (k == best)


def test_history_is_measured_on_images_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []
    validate = _finetuning._validate

    def spy(judge: Any, examples: Any, class_weight: Any) -> dict[str, float]:
        asked.append((judge.logits(examples), examples))
        return validate(judge, examples, class_weight)

    monkeypatch.setattr(_finetuning, "_validate", spy)
    monkeypatch.setattr(_finetuning, "LEARNING_RATE", 1e-2)
    clear = {"side": 48, "contrast": 40, "noise": 5}
    normal, broken = good(20, **clear), bad(15, **clear)
    history = tune(backbone(Learner), normal, broken, epochs=3, class_weight=None).history
    assert len(history) == 4
    assert "train_loss" not in history[0]
    for entry, (z, examples) in zip(history, asked, strict=True):
        assert np.bincount(examples.y).tolist() == [4, 3]  # a fifth of each
        p = 1 / (1 + np.exp(-z))
        chosen = np.where(examples.y == 1, p, 1 - p)
        assert entry["validation_loss"] == pytest.approx(-np.log(chosen).mean())
        assert entry["validation_auroc"] == auroc(examples.y, z)
    assert history[-1]["train_loss"] < 0.9 * history[1]["train_loss"]


def test_the_step_gets_smaller_along_half_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    learn = _finetuning._learn

    def spy(judge: Any, optimizer: Any, *args: Any) -> float:
        rates.append(optimizer.param_groups[0]["lr"])
        return learn(judge, optimizer, *args)

    monkeypatch.setattr(_finetuning, "_learn", spy)
    tune(backbone(Learner), good(10), bad(10), epochs=4)
    expected = _finetuning.LEARNING_RATE * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    np.testing.assert_allclose(rates, expected)


def test_classes_weigh_in_the_loss(weights: Path, last_is_best: None) -> None:
    new = np.concatenate([good(10, 7), bad(10, 8)])
    means = []
    for class_weight in ({0: 1, 1: 50}, {0: 50, 1: 1}):
        tuned = tune(backbone(weights=weights), good(40), bad(40), class_weight=class_weight)
        assert tuned.history[0]["validation_loss"] != tuned.history[1]["validation_loss"]
        network = backbone(weights=weights, state=tuned.state, trainable=False)
        means.append(tuned.head.logits(features(network, new)).mean())
    assert means[0] > means[1] + 0.5
    # A step by itself: with the line and the network as they were, the weights alone differ.
    losses = []
    for class_weight in (None, "balanced", {0: 2, 1: 2}):
        y = np.repeat([0, 1], [30, 10])
        examples = _finetuning._Examples(list(np.concatenate([good(30), bad(10)])), [10])
        judge = _finetuning.GateNetwork(backbone(weights=weights), examples, None)
        stay = torch.optim.SGD(judge.parameters(), lr=0.0)
        random = np.random.RandomState(0)
        losses.append(_finetuning._learn(judge, stay, examples, class_weight, random))
        z = judge.logits(examples)
        by_hand = np.logaddexp(0, np.where(y == 1, -z, z))
        w = np.where(y == 1, 2.0, 2 / 3) if class_weight == "balanced" else np.ones(40)
        assert losses[-1] == pytest.approx(np.average(by_hand, weights=w), rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_images_of_several_sizes() -> None:
    sizes = [(64, 96), (96, 64), (64, 64)]
    images = [np.resize(image, (*sizes[i % 3], 3)) for i, image in enumerate(good(60))]
    y = np.arange(60) % 5 < 2
    examples = _finetuning._Examples(images, [10, 14])
    batches = list(examples.batches(np.random.RandomState(0)))
    groups = [group for batch in batches for group in batch]
    assert sorted(itertools.chain(*groups)) == list(range(60))
    assert all(len({images[i].shape for i in group}) == 1 for group in groups)
    assert [sum(map(len, batch)) for batch in batches] == [15] * 4  # none of them a small rest
    assert list(examples.batches(np.random.RandomState(1))) != batches
    cascade = make().fit(images, y.astype(int))
    assert len(cascade.gate_.history) == 3
    one_by_one = np.concatenate([cascade.detect([i]).probabilities for i in images[:6]])
    np.testing.assert_array_equal(cascade.detect(images[:6]).probabilities, one_by_one)


def test_one_step_for_all_sizes_of_a_batch() -> None:
    """The step for the mean over the whole batch, worked out one image at a time."""
    images = [image[: 96 - 32 * (i % 2)] for i, image in enumerate(np.tile(good(12), (2, 1, 1)))]
    examples = _finetuning._Examples(images, [4])
    expected, judge = (_finetuning.GateNetwork(backbone(Learner), examples, None) for _ in range(2))
    by_step = torch.optim.SGD(judge.parameters(), lr=0.1)
    _finetuning._learn(judge, by_step, examples, "balanced", np.random.RandomState(0))
    w = np.where(examples.y == 1, 12 / 8, 12 / 16)
    losses = [
        w[i] * nn.functional.softplus(-expected([image])[0] if y else expected([image])[0])
        for i, (image, y) in enumerate(zip(images, examples.y, strict=True))
    ]
    torch.stack(losses).mean().backward()
    for parameter, other in zip(expected.parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(parameter - 0.1 * parameter.grad, other, rtol=1e-3, atol=1e-5)


# --- From which images ------------------------------------------------------------------------


@pytest.fixture
def learned_from(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each call of ``_examples`` gives: to learn from, and to validate by."""
    found: list[Any] = []
    divide = _finetuning._examples

    def spy(*args: Any) -> Any:
        parts = list(divide(*args))
        found.append(parts)
        return iter(parts)

    monkeypatch.setattr(_finetuning, "_examples", spy)
    return found


def positions(examples: Any, label: int, images: np.ndarray) -> set[int]:
    """Which of ``images`` are among the examples."""
    known = {image.tobytes(): i for i, image in enumerate(images)}
    chosen = [im for im, y in zip(examples.images, examples.y, strict=True) if y == label]
    return {known[image.tobytes()] for image in chosen if image.tobytes() in known}


def test_labelled_images_are_learned_from_once_each(learned_from: list[Any]) -> None:
    images, y = labelled()
    cascade = make().fit(images, y)
    [(train, validation)] = learned_from
    held = cascade.detect(images, maps=False).probabilities
    used: set[int] = set()
    for examples, sizes in ((train, [20, 8]), (validation, [4, 2])):
        for label in (0, 1):
            found = positions(examples, label, images)
            assert len(found) == sizes[label] == np.count_nonzero(examples.y == label)
            assert not found & used
            assert {y[i] for i in found} == {label}
            used |= found
    # Thresholds come from images that nothing was learned from.
    others = np.setdiff1d(np.arange(60), list(used))
    assert np.isin(cascade.calibration_probabilities_, held[others]).all()
    assert np.isin(cascade.anomaly_probabilities_, held[others]).all()
    assert len(cascade.anomaly_probabilities_) == 10


def test_synthetic_anomalies_are_made_once(
    learned_from: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    class Spy(SyntheticAnomalies):
        def sources(self, images: Any, n: int, at_once: int) -> Iterator[ImageSource]:
            seeds.append(self.random_state)
            return super().sources(images, n, at_once)

    monkeypatch.setattr(_finetuning, "SyntheticAnomalies", Spy)
    images = good(60)
    cascade = make(epochs=3).fit(images)
    [(train, validation)] = learned_from
    assert len(set(seeds)) == len(seeds) == 2  # one for each part
    assert [np.bincount(part.y).tolist() for part in (train, validation)] == [[29, 58], [7, 14]]
    normal = [positions(part, 0, images) for part in (train, validation)]
    assert not normal[0] & normal[1]
    for part, sources in zip((train, validation), normal, strict=True):
        assert positions(part, 1, images) == set()
        originals = images[sorted(sources)].astype(int)
        for image, label in zip(part.images, part.y, strict=True):
            if label:  # what surrounds the defect is of an image of the same part
                assert (image == originals).all(axis=3).mean(axis=(1, 2)).max() > 0.5
    assert len(cascade.anomaly_probabilities_) > 0
    assert len(cascade.gate_.history) == 4


def test_what_cannot_be_read_is_skipped(tmp_path: Path, learned_from: list[Any]) -> None:
    gone = tmp_path / "gone.png"
    images, y = labelled()
    mixed = [*images[:10], gone, *images[10:], gone]
    cascade = make(on_error="skip").fit(mixed, [*y[:10], 0, *y[10:], 1])
    assert [name for name, _ in cascade.skipped_] == [str(gone)] * 2
    assert cascade.detect([gone, images[0]]).routes[0] == "skipped"
    assert len(learned_from) == 1


# --- Seeds, and what is left as it was ----------------------------------------------------------


def test_seeds_give_the_same(weights: Path, last_is_best: None) -> None:
    torch.manual_seed(5)
    state, n_threads = torch.get_rng_state(), torch.get_num_threads()
    tuned = []
    for seed in (0, 0, 1):
        cascade = make(gate=NETWORK, weights=weights, random_state=seed).fit(*labelled())
        tuned.append(cascade.gate_)
        torch.rand(3)  # whatever else draws from torch's generator
        torch.set_rng_state(state)
    states = [gate.backbone.original_state() for gate in tuned]
    assert same_state(states[0], states[1])
    assert not same_state(states[0], states[2])
    assert tuned[0].history == tuned[1].history != tuned[2].history
    np.testing.assert_array_equal(tuned[0].head.weights, tuned[1].head.weights)
    make(gate=NETWORK, weights=weights).fit(*labelled())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == n_threads
    assert torch.is_grad_enabled()


def test_a_module_stays_as_it_was(last_is_best: None) -> None:
    module = Learner().train()
    before = copy.deepcopy(module.state_dict())
    cascade = make(gate=module).fit(*labelled())
    assert same_state(before, module.state_dict())
    assert module.training
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not same_state(before, cascade.gate_.backbone.original_state())
    assert cascade.gate is module


def test_training_head_leaves_the_network_frozen(weights: Path) -> None:
    assert GatedCascade().training == "head"
    cascade = make(gate=NETWORK, weights=weights, training="head").fit(*labelled())
    frozen = Backbone(NETWORK, weights=weights, strides=(16, 32), device="cpu")
    assert cascade.gate_.backbone.sha256 == frozen.sha256
    assert cascade.gate_.history == []
    assert not any(p.requires_grad for p in cascade.gate_.backbone.network.parameters())


@pytest.mark.parametrize("engine", ["torch", "openvino", "onnxruntime"])
def test_the_engine_asked_for_runs_it(engine: str, weights: Path, last_is_best: None) -> None:
    skip_without(engine)
    cascade = make(gate=NETWORK, weights=weights, engine=engine).fit(*labelled())
    network = cascade.gate_.backbone
    assert network.engine == engine
    new = np.concatenate([good(3, 7), bad(3, 8)])
    by_torch = Backbone(NETWORK, state=network.original_state(), strides=(16, 32), device="cpu")
    assert by_torch.sha256 == network.sha256
    np.testing.assert_allclose(network.embed(new), by_torch.embed(new), rtol=1e-3, atol=1e-3)
    again = pickle.loads(pickle.dumps(cascade))
    np.testing.assert_array_equal(again.score(new), cascade.score(new))


# --- Files, copies, scikit-learn ----------------------------------------------------------------


def answers(cascade: GatedCascade) -> tuple[np.ndarray, np.ndarray]:
    found = cascade.detect(np.concatenate([good(5, 7), bad(5, 8)]), maps=False)
    return found.scores, found.probabilities


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_file_holds_it_to_the_bit(
    engine: str, included: bool, weights: Path, tmp_path: Path, last_is_best: None
) -> None:
    skip_without(engine)
    here = tmp_path / "weights.safetensors"
    here.write_bytes(weights.read_bytes())
    detector = PatchCore("efficientnet_lite0", image_size=64, false_alarm_rate=0.2, **PLAIN)
    cascade = make(gate=NETWORK, weights=here, engine=engine, detector=detector)
    cascade.fit(*labelled()).save(tmp_path / "one.safetensors", include_backbone=included)
    names = load_file(tmp_path / "one.safetensors")
    held = {name.partition("backbone.")[0] for name in names if "backbone." in name}
    assert held == ({"", "detector."} if included else {""})
    here.unlink()  # tuned weights are in the file, and others are not needed
    again = load(tmp_path / "one.safetensors")
    again.save(tmp_path / "two.safetensors")
    for other in (again, load(tmp_path / "two.safetensors")):
        np.testing.assert_array_equal(answers(other), answers(cascade))
        assert other.gate_.history == cascade.gate_.history
        assert other.gate_.backbone.sha256 == cascade.gate_.backbone.sha256
        assert (other.training, other.epochs) == ("finetune", 2)
        assert other.gate_.backbone.engine == engine


def test_a_file_of_a_module(tmp_path: Path, last_is_best: None) -> None:
    cascade = make().fit(*labelled())
    cascade.save(tmp_path / "one.safetensors")
    with pytest.raises(InvalidValueError, match="a module of your own"):
        load(tmp_path / "one.safetensors")
    module = Learner(seed=3)  # of the same shape; its own weights do not matter
    before = copy.deepcopy(module.state_dict())
    again = load(tmp_path / "one.safetensors", backbone={"gate": module, "detector": Small()})
    np.testing.assert_array_equal(answers(again), answers(cascade))
    assert same_state(before, module.state_dict())


def test_a_broken_weight_is_noticed(fitted: GatedCascade, tmp_path: Path) -> None:
    cascade = copy.deepcopy(fitted)
    state = cascade.gate_.backbone.original_state()
    state["conv_stem.weight"] = state["conv_stem.weight"] + 1
    cascade.gate_.backbone._origin = (NETWORK, None, state)
    cascade.save(tmp_path / "one.safetensors")
    with pytest.raises(ModelFileError, match="other backbone weights"):
        load(tmp_path / "one.safetensors", backbone=Small())


def test_files_from_before_have_no_history() -> None:
    arrays = {"gate_weights": np.ones(2)}
    state = {"bias": 0.5, "kind": "temperature", "temperature": 2.0}
    assert SavedGate.from_arrays(arrays, state).history == []


def test_copies_and_estimators(fitted: GatedCascade) -> None:
    for copied in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        np.testing.assert_array_equal(answers(copied), answers(fitted))
        assert copied.gate_.history == fitted.gate_.history
    fresh = clone(fitted)
    assert (fresh.get_params()["training"], fresh.get_params()["epochs"]) == ("finetune", 2)
    assert not hasattr(fresh, "gate_")
    np.testing.assert_array_equal(answers(fresh.fit(*labelled())), answers(fitted))


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"training": "fintune"}, "training must be one of .* Did you mean 'finetune'"),
        ({"training": None}, "training must be one of"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 2.5}, "epochs must be a whole number"),
        (
            {"gate": MahalanobisVFM(image_size=32)},
            r"tunes the weights of a network, got the detector gate=Maha.*or training='head'\.$",
        ),
        (
            {"gate": Small()},
            r"\(gate\): training='finetune' .*\(Small\) depend on none. Use another",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^GatedCascade.*{message}"):
        make(**parameters).fit(*labelled())


def test_too_few_to_validate_by_are_told() -> None:
    images, y = labelled(40, 1)
    with pytest.raises(
        InvalidValueError, match=r"at least 2 anomalies to learn.*got 1\. Give more"
    ):
        make().fit(images, y)
    with pytest.raises(InvalidValueError, match="at least 2 normal images to learn from"):
        tune(backbone(Learner), good(1), bad(5))
    assert len(tune(backbone(Learner), good(2), bad(2), epochs=1).history) == 2


def test_a_loss_that_diverges_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_finetuning, "LEARNING_RATE", 1e30)
    with pytest.raises(InvalidValueError, match=r"^gate: training='finetune' diverged in epoch"):
        tune(backbone(Learner), good(40), bad(40), epochs=3)
