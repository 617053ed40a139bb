"""Model files: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import anomalib_lite
from anomalib_lite import PatchCore, load, persistence
from anomalib_lite.errors import (
    CalibrationWarning,
    InvalidValueError,
    MissingPathError,
    ModelFileError,
    NotFittedError,
    OutputError,
)

HEIGHT, WIDTH = 32, 48
KEY = "anomalib_lite"
FIXTURES = Path(__file__).resolve().parent / "fixtures"


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 140, (n, HEIGHT, WIDTH, 3)).astype(np.uint8)


def questions() -> np.ndarray:
    asked = images(4, 1)
    asked[3, 8:20, 30:44] = 250
    return asked


def embeddings(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 5, 6)).astype(np.float32)


def make(**parameters: Any) -> PatchCore:
    # Graphs of other engines take seconds to make; ELSEWHERE loads one.
    options = {"image_size": 32, "false_alarm_rate": 0.25, "engine": "torch"}
    return PatchCore(**(options | parameters))


def random_weights(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def embedded() -> PatchCore:
    return make(coreset_ratio=0.5).fit_embeddings(embeddings(12))


@pytest.fixture
def saved(embedded: PatchCore, tmp_path: Path) -> Path:
    embedded.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


# --- There and back -----------------------------------------------------------------------

ELSEWHERE = """
import socket, sys
import numpy as np

class Unreachable(socket.socket):
    def connect(self, *address):
        raise OSError("no network here")
    connect_ex = connect

socket.socket = Unreachable
socket.getaddrinfo = socket.create_connection = Unreachable.connect
from anomalib_lite import load
images = np.load("questions.npy")
for name in sys.argv[1:]:
    found = load(name + ".safetensors").detect(images)
    np.savez(name, scores=found.scores, maps=found.maps, labels=found.labels)
"""


def fit_and_save(directory: Path) -> dict[str, PatchCore]:
    """One detector of each kind, in files of their names."""
    weights = random_weights(directory / "weights.safetensors")
    fitted = {
        "embedded": make(engine="auto").fit(images(12)),
        "hnsw": make(index="HNSW8", n_neighbors=2, image_size=(32, 64)).fit(images(12)),
        "included": make(backbone="test_resnet", weights=weights, layers=(1, -2)).fit(images(12)),
    }
    for name, detector in fitted.items():
        detector.save(directory / f"{name}.safetensors", include_backbone=name == "included")
    weights.unlink()  # the last detector must do without
    return fitted


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PatchCore, Any]]:
    """Each detector, and the results of another process that loads its file without a network."""
    directory = tmp_path_factory.mktemp("elsewhere")
    fitted = fit_and_save(directory)
    np.save(directory / "questions.npy", questions())
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory)}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", ELSEWHERE, *fitted],
        cwd=directory,
        env=environment | {"PYTHONPATH": str(Path(anomalib_lite.__file__).parents[1])},
        check=True,
    )
    found = {}
    for name in fitted:
        with np.load(directory / f"{name}.npz") as file:
            found[name] = dict(file)
    return {name: (detector, found[name]) for name, detector in fitted.items()}


@pytest.mark.parametrize("name", ["embedded", "hnsw", "included"])
def test_another_process_gives_the_same_to_the_bit(
    elsewhere: dict[str, tuple[PatchCore, Any]], name: str
) -> None:
    detector, found = elsewhere[name]
    here = detector.detect(questions())
    np.testing.assert_array_equal(found["scores"], here.scores)
    np.testing.assert_array_equal(found["maps"], here.maps)
    np.testing.assert_array_equal(found["labels"], here.labels)
    assert here.labels[3]


@pytest.mark.parametrize("index", ["flat", "HNSW8", "IVF2,Flat", "SQ8"])
@pytest.mark.parametrize("image_score", ["max", "top1%", "reweighted"])
def test_embeddings_are_scored_alike(index: str, image_score: str, tmp_path: Path) -> None:
    E, asked = embeddings(40), embeddings(9, 1)
    detector = make(index=index, image_score=image_score, coreset_ratio=0.5).fit_embeddings(E)
    detector.save(str(tmp_path / "model"))  # any name will do
    again = load(str(tmp_path / "model"))
    np.testing.assert_array_equal(again.score_embeddings(asked), detector.score_embeddings(asked))
    assert again.threshold_ == detector.threshold_
    np.testing.assert_array_equal(again.calibration_scores_, detector.calibration_scores_)
    assert again.n_features_ == 6
    assert again.memory_bank_.covering_radius_ == detector.memory_bank_.covering_radius_
    with pytest.raises(NotFittedError, match="score_embeddings"):
        again.score(questions())


def test_parameters_and_state_come_back(tmp_path: Path) -> None:
    detector = make(
        weights=random_weights(tmp_path / "w.safetensors"),
        backbone="test_resnet",
        layers=[1, "layer3"],
        image_size=(np.int64(32), 48),
        coreset_ratio=np.float32(0.25),
        on_error="skip",
        dtype="float32",
    ).fit([*images(12), tmp_path / "gone.png"])
    detector.threshold_ = 1 / 3
    detector.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    for name, value in detector.get_params().items():
        read = again.get_params()[name]
        if isinstance(value, tuple | list):
            assert list(read) == list(value)
        else:
            assert read == (str(value) if isinstance(value, Path) else value)
    assert again.threshold_ == 1 / 3
    assert again.skipped_ == detector.skipped_
    assert len(again.skipped_) == 1
    assert again.dtype_ == "float32"
    assert again.backbone_.sha256 == detector.backbone_.sha256
    again.save(tmp_path / "again.safetensors")  # a loaded detector can be saved as well
    third = load(tmp_path / "again.safetensors", device="cpu")
    np.testing.assert_array_equal(third.score(questions()), detector.score(questions()))


def test_a_loaded_detector_can_be_fitted_again(saved: Path, embedded: PatchCore) -> None:
    again = load(saved).fit_embeddings(embeddings(12))
    assert again.threshold_ == embedded.threshold_


def test_an_infinite_threshold_comes_back(tmp_path: Path) -> None:
    with pytest.warns(CalibrationWarning):
        make().fit_embeddings(embeddings(1)).save(tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").threshold_ == math.inf


def test_the_file_holds_arrays_and_json_alone(saved: Path, embedded: PatchCore) -> None:
    with safe_open(saved, "np") as file:
        assert list(file.metadata()) == [KEY]
        header = json.loads(file.metadata()[KEY])
        assert sorted(file.keys()) == ["calibration_peaks", "calibration_scores", "embeddings"]
        np.testing.assert_array_equal(
            file.get_tensor("embeddings"), embedded.memory_bank_.embeddings_
        )
    assert header["format_version"] == persistence.FORMAT_VERSION == 1
    assert header["library_version"] == anomalib_lite.__version__
    assert header["detector"] == "PatchCore"
    assert header["parameters"].keys() == embedded.get_params().keys()
    assert header["backbone"] is None
    assert header["state"]["threshold"] == embedded.threshold_


# --- Weights ------------------------------------------------------------------------------


def test_other_weights_than_at_fit_are_refused(tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "weights.safetensors")
    detector = make(backbone="test_resnet", weights=weights).fit(images(12))
    model = tmp_path / "model.safetensors"
    detector.save(model)
    moved = weights.rename(tmp_path / "moved.safetensors")
    with pytest.raises(MissingPathError, match=r"weights.safetensors does not exist"):
        load(model)
    again = load(model, weights=moved)
    np.testing.assert_array_equal(again.score(questions()), detector.score(questions()))
    random_weights(weights, seed=1)
    message = r"model.safetensors was fitted with other backbone weights.*weights=.*fit again"
    with pytest.raises(ModelFileError, match=message):
        load(model)
    with pytest.raises(InvalidValueError, match="have changed since fit"):
        detector.save(tmp_path / "other.safetensors", include_backbone=True)


def test_the_layers_are_those_of_fit_even_if_the_default_has_changed(tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "weights.safetensors")
    model = tmp_path / "model.safetensors"
    make(backbone="test_resnet", weights=weights).fit(images(12)).save(model)
    assert load(model).backbone_.layers == ["layer2", "layer3"]
    other = make(backbone="test_resnet", weights=weights, layers=["layer1"]).fit(images(12))
    described = {"layers": ["layer1"], "stride": other.backbone_.stride}
    rewrite(model, header=lambda h: h | {"backbone": h["backbone"] | described})
    assert load(model).backbone_.layers == ["layer1"]


def test_other_preprocessing_than_at_fit_is_refused(tmp_path: Path) -> None:
    model, detector = tmp_path / "model.safetensors", make().fit(images(12))
    for name, other in (("mean", [0.1, 0.2, 0.3]), ("std", None), ("stride", 3)):
        detector.save(model)
        rewrite(model, header=lambda h: h | {"backbone": h["backbone"] | {name: other}})  # noqa: B023
        with pytest.raises(ModelFileError, match=f"was fitted with {name} "):
            load(model)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


@pytest.mark.parametrize("include_backbone", [False, True])
@pytest.mark.parametrize("layers", [None, ["conv"]])
def test_a_module_must_be_passed_to_load(
    include_backbone: bool, layers: Any, tmp_path: Path
) -> None:
    detector = make(backbone=Own(), layers=layers).fit(images(12))
    model = tmp_path / "model.safetensors"
    detector.save(model, include_backbone=include_backbone)
    with pytest.raises(InvalidValueError, match=r"a module of your own.*load\(path, backbone="):
        load(model)
    again = load(model, backbone=Own())
    np.testing.assert_array_equal(again.score(questions()), detector.score(questions()))
    other = Own()
    nn.init.zeros_(other.conv.bias)
    if include_backbone:  # then the file's weights count
        again = load(model, backbone=other)
        np.testing.assert_array_equal(again.score(questions()), detector.score(questions()))
    else:
        with pytest.raises(ModelFileError, match="other backbone weights"):
            load(model, backbone=other)


# --- Broken files -------------------------------------------------------------------------


def rewrite(
    path: Path,
    header: Callable[[dict[str, Any]], Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
) -> None:
    """Change the JSON or the tensors of a model file in place."""
    held = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata[KEY])
    if header is not None:
        described = header(described)
    if tensors is not None:
        held = tensors(held)
    save_file(held, path, {KEY: described if isinstance(described, str) else json.dumps(described)})


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 0.3, 0.9, -1])
def test_a_file_cut_short_is_refused(saved: Path, length: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(length * len(content)) if 0 < length < 1 else int(length)])
    with pytest.raises(ModelFileError, match=r"model.safetensors is cut short or not a model"):
        load(saved)


@pytest.mark.parametrize("content", [b"hello\n" * 50, b"\x80\x04\x95" + bytes(99), b"\xff" * 99])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"a.txt is cut short or not a model file"):
        load(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        *({KEY: j} for j in ("null", "3", "[]", "{}", '{"format_version":"1"}')),
    ],
)
def test_another_safetensors_file_is_refused(tmp_path: Path, metadata: Any) -> None:
    save_file({"embeddings": torch.zeros(3, 4)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ModelFileError, match=r"other.safetensors is a safetensors file, but not"):
        load(tmp_path / "other.safetensors")


def test_a_header_that_is_not_json_is_refused(saved: Path) -> None:
    for text in ("{", "", "{'format_version': 1}"):
        rewrite(saved, header=lambda _, text=text: text)
        with pytest.raises(ModelFileError, match=r"model.safetensors"):
            load(saved)
        save_file(load_file(saved), saved, {KEY: "{}"})


def test_a_newer_format_is_refused_with_a_remedy(saved: Path) -> None:
    rewrite(saved, header=lambda h: h | {"format_version": 2})
    with pytest.raises(ModelFileError, match=r"format version 2.*reads up to 1.*pip install --up"):
        load(saved)


@pytest.mark.parametrize("key", ["detector", "parameters", "backbone", "state"])
def test_every_key_of_the_header_is_needed(saved: Path, key: str) -> None:
    rewrite(saved, header=lambda h: {k: v for k, v in h.items() if k != key})
    with pytest.raises(ModelFileError, match=f"model.safetensors .*{key}"):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"detector": "PatchCores"},
        {"detector": None},
        {"detector": ["PatchCore"]},
        {"parameters": None},
        {"parameters": []},
        {"parameters": {"coreset_rate": 0.1}},
        {"state": None},
        {"state": []},
        {"state": {}},
        {"state": {"threshold": 1.0}},
        {"state": {"threshold": "high", "covering_radius": 1.0}},
        {"state": {"threshold": None, "covering_radius": 1.0}},
        {"state": {"threshold": 1.0, "covering_radius": "large"}},
        {"backbone": 3},
        {"backbone": {}},
        {"backbone": {"layers": 3, "sha256": "0"}},
    ],
    ids=str,
)
def test_a_header_that_describes_no_detector_is_refused(
    saved: Path, change: dict[str, Any]
) -> None:
    rewrite(saved, header=lambda h: h | change)
    with pytest.raises(ModelFileError, match=r"model.safetensors does not describe a detector"):
        load(saved)


def test_the_closest_detector_is_named(saved: Path) -> None:
    rewrite(saved, header=lambda h: h | {"detector": "Patchcore"})
    with pytest.raises(ModelFileError, match=r"Did you mean 'PatchCore'\?"):
        load(saved)


ROWS = torch.arange(12.0).reshape(3, 4)


def without_embeddings(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "embeddings"}


def test_other_embeddings_of_the_right_kind_are_read(saved: Path) -> None:
    rewrite(saved, tensors=lambda held: without_embeddings(held) | {"embeddings": ROWS})
    np.testing.assert_array_equal(load(saved).memory_bank_.embeddings_, ROWS)


def test_calibration_scores_are_needed(saved: Path) -> None:
    rewrite(saved, tensors=lambda held: {"embeddings": held["embeddings"]})
    with pytest.raises(ModelFileError, match=r"model.safetensors .*calibration_scores"):
        load(saved)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"embedding": ROWS},
        {"embeddings": ROWS[0]},
        {"embeddings": ROWS[None]},
        {"embeddings": ROWS[:0]},
        {"embeddings": ROWS[:, :0]},
        {"embeddings": torch.tensor(1.0)},
        {"embeddings": ROWS / 0},
        {"embeddings": ROWS.bfloat16()},
        {"embeddings": ROWS, "index": torch.zeros(9, dtype=torch.uint8)},
    ],
    ids=lambda t: str({k: (tuple(v.shape), v.dtype) for k, v in t.items()}),
)
def test_embeddings_of_the_wrong_kind_are_refused(saved: Path, tensors: dict[str, Tensor]) -> None:
    rewrite(saved, tensors=lambda held: without_embeddings(held) | tensors)
    with pytest.raises(ModelFileError, match=r"model.safetensors"):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda held: {k: v for k, v in held.items() if k != "index"},
        lambda held: held | {"index": held["index"][:-50].clone()},
        lambda held: held | {"index": held["index"][:3].clone()},
        lambda held: held | {"index": torch.zeros(0, dtype=torch.uint8)},
        lambda held: held | {"index": held["index"].float()},
        lambda held: held | {"index": held["index"][None]},
        lambda held: held | {"embeddings": held["embeddings"][1:].clone()},
        lambda held: held | {"embeddings": held["embeddings"][:, 1:].contiguous()},
    ],
)
def test_an_index_that_does_not_fit_the_embeddings_is_refused(tmp_path: Path, change: Any) -> None:
    model = tmp_path / "model.safetensors"
    make(index="HNSW8", coreset_ratio=0.5).fit_embeddings(embeddings(12)).save(model)
    rewrite(model, tensors=change)
    with pytest.raises(ModelFileError, match=r"model.safetensors"):
        load(model)


def test_included_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "weights.safetensors")
    model = tmp_path / "model.safetensors"
    detector = make(backbone="test_resnet", weights=weights).fit(images(12))
    name = "backbone.conv1.0.weight"
    for change in (
        lambda held: {k: v for k, v in held.items() if k != name},
        lambda held: held | {name: held[name][:, :2].contiguous()},
        lambda held: held | {name: held[name] + 1},
    ):
        detector.save(model, include_backbone=True)
        rewrite(model, tensors=change)
        with pytest.raises(ModelFileError, match=r"model.safetensors"):
            load(model)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(
            MissingPathError, match=rf"{path.name} (does not exist|is a dir)"
        ) as caught:
            load(path)
        assert isinstance(caught.value, FileNotFoundError)


# --- Writing ------------------------------------------------------------------------------


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fail(error: BaseException) -> Callable[..., None]:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise error

    return failing


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_crash_while_writing_leaves_the_old_file_whole(
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    before = saved.read_bytes()
    detector = make().fit_embeddings(embeddings(30, 5))
    with monkeypatch.context() as patch:
        patch.setattr(step, fail(error))
        with pytest.raises(raised) as caught:
            detector.save(saved)
    if raised is OutputError:
        assert "No space left" in str(caught.value)
        assert str(saved) in str(caught.value)
    assert saved.read_bytes() == before
    assert names_in(saved.parent) == [saved.name]
    detector.save(saved)
    assert saved.read_bytes() != before
    assert names_in(saved.parent) == [saved.name]


@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix resource limits")
def test_a_disk_that_fills_up_leaves_the_old_file_whole(saved: Path) -> None:
    import resource

    before = saved.read_bytes()
    larger = make().fit_embeddings(embeddings(30, 5))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(OutputError, match="File too large"):
            larger.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert saved.read_bytes() == before
    assert names_in(saved.parent) == [saved.name]


@pytest.mark.parametrize("place", ["no/such/model", "file/model", "directory"])
def test_places_that_cannot_be_written_are_named(
    embedded: PatchCore, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "directory").mkdir()
    with pytest.raises(
        OutputError, match=r"PatchCore: cannot write .*Choose a directory"
    ) as caught:
        embedded.save(tmp_path / place)
    assert isinstance(caught.value, OSError)
    assert place in str(caught.value)
    assert names_in(tmp_path) == ["directory", "file"]
    assert not names_in(tmp_path / "directory")


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has file modes")
def test_the_file_has_the_mode_of_any_new_file(saved: Path) -> None:
    (saved.parent / "plain").touch()
    assert saved.stat().st_mode == (saved.parent / "plain").stat().st_mode


def test_parameters_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    detector = make(random_state=np.random.RandomState(0)).fit_embeddings(embeddings(12))
    with pytest.raises(InvalidValueError, match=r"random_state=RandomState.*cannot be saved"):
        detector.save(tmp_path / "model.safetensors")
    assert not names_in(tmp_path)


# --- Files of released versions -----------------------------------------------------------


def answers_of(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


EMBEDDED = ["patchcore_v1", "patchcore_v1_hnsw", "padim_v1", "mahalanobis_vfm_v1"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_files_of_version_1_are_read(name: str) -> None:
    answers = answers_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector = load(FIXTURES / f"{name}.safetensors")
    assert detector.threshold_ == float(answers["threshold"])
    np.testing.assert_allclose(
        detector.score_embeddings(answers["E"]), answers["scores"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["patchcore_v1_images", "gated_cascade_v1_images"])
def test_files_of_version_1_score_images(name: str) -> None:
    answers = answers_of(name)
    detector = load(FIXTURES / f"{name}.safetensors")
    assert detector.threshold_ == float(answers["threshold"])
    found = detector.detect(answers["images"])
    # Another machine's convolutions add up in another order.
    np.testing.assert_allclose(found.scores, answers["scores"], rtol=1e-3)
    np.testing.assert_allclose(found.maps, answers["maps"], rtol=1e-2, atol=1e-2)
    if "routes" in answers:
        assert list(found.routes) == list(answers["routes"])
        assert found.labels.tolist() == [False, False, True, True]
    else:
        assert found.labels.tolist() == [False, True]


@pytest.mark.parametrize("name", [*EMBEDDED[2:], "gated_cascade_v1_images"])
def test_a_file_of_version_1_is_written_as_it_was(name: str, tmp_path: Path) -> None:
    before, after = FIXTURES / f"{name}.safetensors", tmp_path / "again.safetensors"
    load(before).save(after)
    headers = []
    for path in (before, after):
        with safe_open(path, "np") as file:
            headers.append(json.loads(file.metadata()[KEY]))
    expected, got = headers
    for member in (got, *got.get("parts", {}).values()):
        assert member.pop("library_version") == anomalib_lite.__version__
    for member in (expected, *expected.get("parts", {}).values()):
        assert member.pop("library_version") == "0.1.0"
    for new, old in zip(
        (got, *got.get("parts", {}).values()),
        (expected, *expected.get("parts", {}).values()),
        strict=True,
    ):  # parameters that came later have their defaults
        later = new["parameters"].keys() - old["parameters"].keys()
        defaults = (
            inspect.signature(getattr(anomalib_lite, new["detector"])).parameters if later else {}
        )
        for parameter in later:
            assert new["parameters"].pop(parameter) == defaults[parameter].default
    assert got == expected
    tensors = load_file(before)
    assert load_file(after).keys() == tensors.keys()
    for key, tensor in load_file(after).items():
        assert torch.equal(tensor, tensors[key]), key
