"""Engines: torch's numbers, the same bits in any batch, and a warm start without torch."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from detector_fixtures import skip_without
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import anomalib_lite
from anomalib_lite import PatchCore, load
from anomalib_lite._threads import requested_threads
from anomalib_lite.datasets import MVTecAD
from anomalib_lite.engines import (
    FUSIONS,
    CompiledBackbone,
    _cache,
    _compiled,
    open_backbone,
)
from anomalib_lite.engines._runtimes import OpenVinoGraph, import_openvino
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, MissingDependencyError
from anomalib_lite.fusion import STRATEGIES
from anomalib_lite.metrics import aupro, auroc, pixel_auroc

PACKAGE = Path(anomalib_lite.__file__).parent
COMPILED = ("openvino", "onnxruntime")
RUNS = [engine for engine in COMPILED if _compiled.refusal(engine, "cpu", "tests") is None]
# Engine of tests that need one, whichever it is.
SOME_ENGINE = (RUNS or COMPILED)[0]
LITE0 = "efficientnet_lite0"


def pixels(n: int, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def open_cpu(backbone: Any = LITE0, engine: str = "openvino", **options: Any) -> Any:
    """Open a network on the CPU; a test whose engine cannot run here is skipped."""
    if engine in COMPILED:
        skip_without(engine)
    return open_backbone(backbone, engine=engine, **({"device": "cpu"} | options))


def capabilities() -> list[str]:
    """What OpenVINO says that this processor has units for; nothing if it is kept from some."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        return []
    return list(import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ANOMALIB_LITE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights files of small networks, by timm's names."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for name in ("test_resnet", "test_vit"):
        torch.manual_seed(0)
        files[name] = folder / f"{name}.safetensors"
        save_file(timm.create_model(name).state_dict(), files[name])
    return files


# --- The same numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("name", [LITE0, "test_resnet", "test_vit"])
def test_embeddings_are_those_of_torch(name: str, engine: str, weights: dict[str, Path]) -> None:
    options = {"weights": weights.get(name), "dtype": "float32"}
    reference = open_cpu(name, "torch", **options)
    compiled = open_cpu(name, engine, **options)
    assert (compiled.engine, compiled.device, compiled.dtype) == (engine, "cpu", "float32")
    for key in ("layers", "stride", "mean", "std", "sha256"):
        assert getattr(compiled, key) == getattr(reference, key)
    for size in ((64, 96), (160, 64), (128, 128)):
        images = pixels(2, *size)
        expected, got = reference.embed(images), compiled.embed(images)
        assert got.dtype == np.float32
        assert got.shape == expected.shape
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
        floats = compiled.embed(images.astype(np.float32) / 255)
        assert np.linalg.norm(floats - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("engine", ["torch", *COMPILED])
def test_wanted_channels_are_equal_to_those_among_all(engine: str) -> None:
    backbone, channels = open_cpu(engine=engine, dtype="float32"), np.array([0, 3, 90, 151])
    expected = backbone.embed(pixels(3))[..., channels]
    np.testing.assert_array_equal(backbone.embed(pixels(3), channels), expected)
    np.testing.assert_array_equal(backbone.embed(pixels(1), channels), expected[:1])


@pytest.mark.parametrize("engine", COMPILED)
def test_a_size_that_is_no_multiple_of_the_stride(engine: str) -> None:
    images = pixels(1, 67, 101)
    expected = open_cpu(LITE0, "torch", dtype="float32").embed(images)
    got = open_cpu(LITE0, engine, dtype="float32").embed(images)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_size_that_the_network_refuses(engine: str, weights: dict[str, Path]) -> None:
    backbone = open_cpu("test_vit", engine, weights=weights["test_vit"], where="Asker")
    with pytest.raises(
        InvalidValueError, match=r"^Asker: the backbone cannot take images of 70x90"
    ):
        backbone.embed(pixels(1, 70, 90))


def test_a_call_gives_the_feature_maps_and_the_state_is_the_original() -> None:
    compiled, reference = open_cpu(dtype="float32"), open_cpu(engine="torch", dtype="float32")
    for got, expected in zip(compiled(pixels(1)), reference(pixels(1)), strict=True):
        torch.testing.assert_close(got, expected)
    assert compiled.original_state().keys() == reference.original_state().keys()


class Own(nn.Module):
    """A user's module, which returns feature maps itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("layers", [None, ["conv"]])
def test_a_module(engine: str, layers: Any, cache: Path) -> None:
    expected = open_cpu(Own(), "torch", layers=layers, dtype="float32").embed(pixels(3))
    got = open_cpu(Own(), engine, layers=layers, dtype="float32").embed(pixels(3))
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    assert not cache.exists(), "its code cannot be told from another's"


class Fickle(Own):
    """Uses the width as a Python number, which becomes a constant in a graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * int(x.shape[3])


@pytest.mark.parametrize("engine", COMPILED)
def test_a_network_that_cannot_be_converted(engine: str) -> None:
    with pytest.raises(
        InvalidValueError,
        match=f"^Asker: engine='{engine}' cannot run this backbone: .*. Use engine='torch'",
    ):
        open_cpu(Fickle(), engine, where="Asker")
    assert open_cpu(Fickle(), "auto").engine == "torch"
    detector = PatchCore(Fickle(), image_size=32, false_alarm_rate=0.4).fit(pixels(8))
    assert detector.engine_ == "torch"


class Baked(Own):
    """Slices its position embeddings by Python numbers, which become constants in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.rand(1, 8, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.place[:, :, : int(x.shape[2]), : int(x.shape[3])]


@pytest.mark.parametrize("engine", COMPILED)
def test_a_network_whose_graph_fails_at_other_sizes(engine: str) -> None:
    with pytest.raises(InvalidValueError, match=f"engine='{engine}' cannot run this backbone"):
        open_cpu(Baked(), engine)
    assert open_cpu(Baked(), "auto").engine == "torch"


@pytest.mark.parametrize("engine", COMPILED)
def test_a_refused_image_does_not_change_later_results(engine: str) -> None:
    module = Own()
    module.conv = nn.Conv2d(3, 8, 32, stride=8)
    backbone = open_cpu(module, engine)
    expected = backbone.embed(pixels(3))
    for _ in range(2):
        with pytest.raises(InvalidValueError, match="cannot take images of 16x16"):
            backbone.embed(pixels(2, 16, 16))
        np.testing.assert_array_equal(backbone.embed(pixels(3)), expected)
        np.testing.assert_array_equal(backbone.embed(pixels(3)[:1]), expected[:1])


# --- The same bits --------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", *COMPILED])
@pytest.mark.parametrize("name", [LITE0, "test_vit"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_batch_does_not_matter(
    engine: str, name: str, dtype: str, weights: dict[str, Path]
) -> None:
    if engine == "torch" and name == "test_vit":
        dtype = "float32"  # as documented: torch's bfloat16 does depend on the batch
    backbone = open_cpu(name, engine, dtype=dtype, weights=weights.get(name))
    images = pixels(70, 64, 80)
    alone = np.concatenate([backbone.embed(image[None]) for image in images[:40]])
    for batch_size in (1, 7, 32, 40):
        parts = [backbone.embed(images[i : i + batch_size]) for i in range(0, 40, batch_size)]
        np.testing.assert_array_equal(np.concatenate(parts)[:40], alone)
    backbone.embed(images)  # by now OpenVINO has a graph for this very size
    turned = np.ascontiguousarray(images[::-1])
    np.testing.assert_array_equal(backbone.embed(turned)[::-1][:40], alone)
    backbone.embed(pixels(3, 96, 64))
    np.testing.assert_array_equal(backbone.embed(images[:1]), alone[:1])


def test_frequent_sizes_get_their_own_graph_up_to_a_limit() -> None:
    compiled = open_cpu()
    runtime: OpenVinoGraph = compiled._runtime
    sizes = [(64, 16 * n) for n in range(4, 11)]
    for size in sizes:
        compiled.embed(pixels(80, *size))
    own = [size for (size, _), queue in runtime._queues.items() if size and queue]
    assert len(own) <= 4
    # Which kernels a graph of one size has, and so whether it is used, is up to the processor.
    other = [size for (size, _), queue in runtime._queues.items() if size and queue is None]
    if other:
        pytest.skip(f"on this processor, graphs of the sizes {other} alone give other bits")
    assert sizes[-1] in own


def test_threads_at_once(weights: dict[str, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    backbone = open_cpu("test_resnet", weights=weights["test_resnet"])
    batches = [pixels(3, 64, 64 + 32 * (i % 3), seed=i) for i in range(12)]
    expected = [backbone.embed(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(backbone.embed, batches), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("engine", COMPILED)
def test_copies(engine: str) -> None:
    backbone = open_cpu(engine=engine)
    for again in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        np.testing.assert_array_equal(again.embed(pixels(2)), backbone.embed(pixels(2)))
        assert again.sha256 == backbone.sha256


def test_a_copy_where_the_engine_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pickle.dumps(open_cpu())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="engine='openvino' is not installed"):
        pickle.loads(packed)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_layers_of_a_wrong_type(engine: str, cache: Path, weights: dict[str, Path]) -> None:
    with pytest.raises(InvalidTypeError, match="layers"):
        open_cpu("test_resnet", engine, weights=weights["test_resnet"], layers=3)


def test_omp_num_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runtime = open_cpu()._runtime
    compiled = runtime._standard[0].get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    for value in ("all", "0", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert requested_threads() is None


# --- Which engine, which numbers --------------------------------------------------------------


def test_auto() -> None:
    skip_without("openvino")
    assert open_cpu(engine="auto").engine == "openvino"
    detector = PatchCore(image_size=32, false_alarm_rate=0.4, device="cpu").fit(pixels(8))
    assert (detector.engine_, detector.dtype_) == ("openvino", "float32")  # depthwise
    assert isinstance(detector.backbone_, CompiledBackbone)


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", "BF16"), ("float16", "FP16")])
def test_number_types_are_those_that_the_processor_has(dtype: str, unit: str) -> None:
    """OpenVINO asked by name computes in that type or refuses, and torch stands in for "auto"."""
    skip_without("openvino")
    opened = open_cpu(engine="auto", dtype=dtype)
    assert str(opened.dtype).removeprefix("torch.") == dtype
    if opened.engine == "openvino":
        assert unit in capabilities()
        expected = open_cpu(dtype="float32").embed(pixels(2))
        got = open_cpu(dtype=dtype).embed(pixels(2))
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert 1e-5 < error < 0.15  # this network's convolutions are depthwise
    else:  # the processor cannot, or what it gives is wrong, as in float16 on some
        message = f"cannot compute in {dtype} on this processor[.:]"
        with pytest.raises(InvalidValueError, match=message) as raised:
            open_cpu(dtype=dtype)
        assert ("embeddings differ" in str(raised.value)) == (unit in capabilities())


def test_bfloat16_for_networks_without_depthwise_convolutions(weights: dict[str, Path]) -> None:
    file = weights["test_resnet"]
    half, full = (open_cpu("test_resnet", weights=file, dtype=d) for d in ("auto", "float32"))
    able = "BF16" in capabilities()
    assert half.dtype == ("bfloat16" if able else "float32")
    expected = full.embed(pixels(2))
    error = np.linalg.norm(half.embed(pixels(2)) - expected) / np.linalg.norm(expected)
    assert error < 0.02
    assert (error > 1e-4) == able
    assert open_cpu(engine="torch").dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "openvnio"}, "engine must be one of .*Did you mean 'openvino'"),
        ({"device": "cuda"}, "(engine='openvino' runs on the CPU, got )?device='cuda'"),
        ({"engine": "onnxruntime", "device": "mps"}, "(engine='onnxruntime' .*)?device='mps'"),
        ({"engine": "onnxruntime", "dtype": "bfloat16"}, "cannot compute in bfloat16"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"backbone": "efficientnet_lite00"}, "not known to timm"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^Asker: .*{message}"):
        open_cpu(**({"where": "Asker"} | options))


def test_names_are_read_without_torch() -> None:
    names = "_device", "networks", "engines", "fusion", "model_file"
    code = f"import sys, {', '.join(f'anomalib_lite.{name}' for name in names)}\n"
    code += "from anomalib_lite.engines import ENGINES, FUSIONS\n"
    code += "sys.exit(str({'torch', 'timm'} & set(sys.modules) or '') or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
    assert tuple(STRATEGIES) == FUSIONS


@pytest.mark.parametrize("engine", COMPILED)
def test_an_engine_that_is_missing(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(engine)
    images = pixels(8, 32, 48)
    by_name = PatchCore(image_size=32, false_alarm_rate=0.4, engine=engine, device="cpu")
    by_name.fit(images).save(tmp_path / "by_name.safetensors")
    auto = PatchCore(image_size=32, false_alarm_rate=0.4, device="cpu").fit(images)
    auto.save(tmp_path / "auto.safetensors")
    with safe_open(tmp_path / "by_name.safetensors", "np") as file:
        header = json.loads(file.metadata()["anomalib_lite"])
    assert header["backbone"]["engine"] == engine
    np.testing.assert_array_equal(
        load(tmp_path / "by_name.safetensors").score(images), by_name.score(images)
    )
    monkeypatch.setitem(sys.modules, engine, None)  # as if it were not installed
    message = rf"load: engine='{engine}' is not installed.*pip install 'anomalib-lite\["
    with pytest.raises(MissingDependencyError, match=message):
        load(tmp_path / "by_name.safetensors")
    if auto.engine_ == engine:
        again = load(tmp_path / "auto.safetensors")
        assert again.engine_ == "torch"
        # As documented: float32 engines differ by the order of sums. A patch of the bank has a
        # distance of zero to itself, in which that order is all there is.
        np.testing.assert_allclose(again.score(images), auto.score(images), rtol=1e-4, atol=0.05)


# --- The cache ------------------------------------------------------------------------------

WARM = """
import sys
import numpy as np
from anomalib_lite import PatchCore, load

images, engine = np.load("images.npy"), sys.argv[1]
for step in sys.argv[2:]:
    what, name = step.split("-")
    if what == "fit":
        detector = PatchCore(image_size=32, false_alarm_rate=0.4, device="cpu", engine=engine)
        detector.fit(images).save(name + ".safetensors")
    else:
        detector = load(name + ".safetensors")
    found = detector.detect(images)
    np.savez(step, scores=found.scores, maps=found.maps)
    print(step, detector.engine_, sorted({"torch", "timm", "torchvision"} & set(sys.modules)))
print([name for name in sys.modules if name.startswith("openvino_telemetry")])
"""


def test_weights_of_the_directory_are_known_without_torch(
    weights: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANOMALIB_LITE_WEIGHTS", str(weights["test_resnet"].parent))
    expected = open_cpu("test_resnet", SOME_ENGINE).embed(pixels(1))
    monkeypatch.setattr("anomalib_lite.backbones.Backbone", None)  # torch's network
    np.testing.assert_array_equal(open_cpu("test_resnet", SOME_ENGINE).embed(pixels(1)), expected)
    with pytest.raises(TypeError, match="NoneType"):  # so it would have been missed
        open_cpu("test_vit", SOME_ENGINE)


@pytest.mark.parametrize("engine", COMPILED)
def test_with_a_warm_cache_torch_is_not_imported(engine: str, tmp_path: Path) -> None:
    skip_without(engine)
    np.save(tmp_path / "images.npy", pixels(8, 32, 48))
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {
        "ANOMALIB_LITE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(anomalib_lite.__file__).parents[1]),
        "HOME": str(home),
    }

    def run(*steps: str) -> list[str]:
        command = [sys.executable, "-W", "error", "-c", WARM, engine, *steps]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.splitlines()

    assert run("fit-cold") == [f"fit-cold {engine} ['timm', 'torch', 'torchvision']", "[]"]
    steps = ("load-cold", "fit-warm", "load-warm")
    assert run(*steps) == [*(f"{step} {engine} []" for step in steps), "[]"]
    cold = np.load(tmp_path / "fit-cold.npz")
    for step in steps:
        warm = np.load(tmp_path / f"{step}.npz")
        np.testing.assert_array_equal(warm["scores"], cold["scores"])
        np.testing.assert_array_equal(warm["maps"], cold["maps"])
    assert not (home / "intel").exists(), "OpenVINO would report its use from here"


def is_cached(**options: Any) -> bool:
    """Open a network, and tell whether its graph was in the cache."""
    before = _made()
    open_cpu(**{"engine": SOME_ENGINE} | options)
    return _made() == before


_conversions: list[str] = []


def _made() -> int:
    return len(_conversions)


@pytest.fixture
def _count_conversions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from anomalib_lite.engines import _conversion

    real = _conversion.convert_backbone
    monkeypatch.setattr(
        _conversion, "convert_backbone", lambda *a: (_conversions.append(a[1]), real(*a))[1]
    )
    yield
    _conversions.clear()


@pytest.mark.usefixtures("_count_conversions")
def test_the_key_holds_all_that_changes_a_graph(
    cache: Path, tmp_path: Path, weights: dict[str, Path]
) -> None:
    options: dict[str, Any] = {"backbone": "test_resnet", "weights": weights["test_resnet"]}
    assert not is_cached(**options)
    assert is_cached(**options)
    assert is_cached(**options, dtype="float32")  # one graph for all number types
    assert is_cached(**options, layers=["layer2", "layer3"])  # which are the default
    assert not is_cached(**options, layers=["layer2"])
    if RUNS[1:]:
        assert not is_cached(**options, engine=RUNS[1])
    copied = tmp_path / "moved.safetensors"
    copied.write_bytes(weights["test_resnet"].read_bytes())
    assert is_cached(**options | {"weights": copied})
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet").state_dict(), copied)
    assert not is_cached(**options | {"weights": copied})
    state = open_cpu(engine=SOME_ENGINE, **options).original_state()
    assert is_cached(backbone="test_resnet", state=state)  # told by its SHA-256
    assert {path.suffix for path in cache.iterdir()} == {".json", ".graph"}


@pytest.fixture
def copied_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package's code, in which the key of graphs looks for its sources."""
    copied = shutil.copytree(PACKAGE, tmp_path / "package", ignore=lambda *_: ["__pycache__"])
    monkeypatch.setattr(_compiled, "_PACKAGE", copied)
    yield copied
    _compiled._made_by.cache_clear()


def hash_of_sources() -> str:
    _compiled._made_by.cache_clear()
    return _compiled._made_by(SOME_ENGINE)["sources"]


def test_sources_of_graphs_exist() -> None:
    found = {path.relative_to(PACKAGE).as_posix() for path in _compiled.sources()}
    assert all((PACKAGE / name).is_file() for name in found)
    needed = ("engines/_conversion.py", "backbones/_backbone.py", "backbones/_folding.py")
    assert {*needed, "fusion/_strategies.py", "networks/adapter.py", "_device.py"} <= found


def test_any_change_of_a_source_changes_the_key(copied_sources: Path) -> None:
    seen = {hash_of_sources()}
    paths = _compiled.sources()
    assert all(path.is_relative_to(copied_sources) for path in paths)
    for path in paths:
        path.write_text(path.read_text("utf-8") + "# edited\n", "utf-8")
        seen.add(hash_of_sources())
    for folder in ("backbones", "engines", "fusion", "networks"):
        (copied_sources / folder / "_added.py").touch()
        seen.add(hash_of_sources())
        (copied_sources / folder / "_added.py").rename(copied_sources / folder / "_renamed.py")
        seen.add(hash_of_sources())
    assert len(seen) == 1 + len(paths) + 8
    (copied_sources / "calibration.py").write_text("")  # makes no graph
    assert hash_of_sources() in seen


@pytest.mark.parametrize("name", ["_device.py"])
def test_a_listed_source_that_is_gone_is_noticed(name: str, copied_sources: Path) -> None:
    (copied_sources / name).rename(copied_sources / "moved.py")
    with pytest.raises(FileNotFoundError, match=name):
        hash_of_sources()


@pytest.mark.usefixtures("_count_conversions")
@pytest.mark.parametrize(
    ("kind", "damage"),
    [("json", "cut"), ("json", "other"), ("graph", "flipped"), ("graph", "gone")],
)
def test_a_broken_cache_entry_is_not_used(kind: str, damage: str, cache: Path) -> None:
    module: dict[str, Any] = {"backbone": "test_resnet", "engine": SOME_ENGINE}
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=0)
    module["state"] = network.state_dict()
    expected = open_cpu(**module).embed(pixels(1))
    for path in cache.glob(f"*.{kind}"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        cut = path.read_bytes()[: len(content) // 2]
        broken = {"cut": cut, "flipped": bytes(content), "other": b'{"key": 1}'}
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(broken[damage])
    assert not is_cached(**module)
    assert is_cached(**module)  # and mended
    np.testing.assert_array_equal(open_cpu(**module).embed(pixels(1)), expected)


def test_where_no_cache_can_be_written_nothing_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Path]
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("ANOMALIB_LITE_CACHE", str(tmp_path / "file" / "below"))
    backbone = open_cpu("test_resnet", SOME_ENGINE, weights=weights["test_resnet"])
    assert backbone.engine == SOME_ENGINE
    assert (tmp_path / "file").read_text() == "no directory"


def test_the_graphs_used_longest_ago_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache, "_MOST_BYTES", 250)
    for i in range(3):
        _cache.write([{"n": i}], {"is": i}, bytes([i]) * 100)
        for path in cache.glob("*.graph"):
            if path.read_bytes()[0] == i:
                os.utime(path, (1000 + i, 1000 + i))
    assert _cache.read({"n": 0}) is None
    assert _cache.read({"n": 1}) == ({"is": 1}, b"\1" * 100)
    assert _cache.read({"n": 2}) == ({"is": 2}, b"\2" * 100)
    assert len(list(cache.glob("*.json"))) == 2
    (cache / ".old.tmp").write_bytes(b"")
    (cache / ".new.tmp").write_bytes(b"")
    os.utime(cache / ".old.tmp", (1000, 1000))
    _cache.write([{"n": 2}], {"is": 2}, b"\2" * 100)
    assert [path.name for path in cache.glob(".*")] == [".new.tmp"]


def test_the_cache_is_in_the_user_s_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANOMALIB_LITE_CACHE", raising=False)
    for platform, variable in (("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA")):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv(variable, "base")
        assert _cache.cache_dir() == Path("base", "anomalib-lite")
        monkeypatch.delenv(variable)
        assert _cache.cache_dir().is_relative_to(Path.home())


# --- On real photographs ----------------------------------------------------------------------


def read_mask(sample: Any) -> np.ndarray:
    with Image.open(sample.path) as image:
        size = image.size[::-1]
    if sample.mask_path is None:
        return np.zeros(size, bool)
    with Image.open(sample.mask_path) as mask:
        return np.asarray(mask.convert("L")) > 0


def test_metrics_do_not_depend_on_the_engine(data_dir: Path) -> None:
    """Neither engine nor ``dtype="auto"`` moves a metric by more than 0.002 against float32."""
    if not (data_dir / "magnetic_tile").is_dir():
        pytest.skip(f"no photographs of magnetic tiles in {data_dir}")
    dataset = MVTecAD(data_dir, "magnetic_tile")
    train, test = list(dataset.train)[::8], list(dataset.test)[::6]
    labels, masks = [s.label for s in test], [read_mask(s) for s in test]

    def measured(engine: str, dtype: str) -> np.ndarray:
        options = {"device": "cpu", "engine": engine, "dtype": dtype}
        detector = PatchCore(image_size=128, coreset_ratio=0.02, false_alarm_rate=0.1, **options)
        found = detector.fit(train).detect(test)
        return np.array(
            [auroc(labels, found.scores), pixel_auroc(masks, found.maps), aupro(masks, found.maps)]
        )

    reference = measured("torch", "float32")
    assert reference[0] > 0.8
    for engine, dtype in (("auto", "auto"), ("torch", "auto"), *((e, "auto") for e in RUNS[1:])):
        np.testing.assert_allclose(measured(engine, dtype), reference, atol=0.002, rtol=0)


ON_ANOTHER_PROCESSOR = """
import numpy as np
from anomalib_lite import PatchCore
from anomalib_lite.errors import InvalidValueError

images = np.random.default_rng(0).integers(0, 256, (8, 64, 96, 3), dtype=np.uint8)
options = {"image_size": 64, "false_alarm_rate": 0.3, "device": "cpu", "dtype": "float32"}
expected = PatchCore(engine="torch", **options).fit(images)
auto = PatchCore(engine="auto", **options).fit(images)
np.testing.assert_allclose(auto.score(images), expected.score(images), rtol=1e-3, atol=1e-3)
try:
    PatchCore(engine="openvino", **options).fit(images)
except InvalidValueError as error:
    assert auto.engine_ == "torch"
    assert "engine='openvino' needs a processor with AVX2" in str(error)
else:
    assert auto.engine_ == "openvino"
print(auto.engine_)
"""


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE"])
def test_a_graph_from_another_processor_runs_or_torch_does(isa: str, cache: Path) -> None:
    """OpenVINO reads the variable once in a process, so each has its own; the graph is one."""
    skip_without("openvino")
    open_cpu(engine="auto", dtype="float32").embed(pixels(1))
    made = sorted(cache.rglob("*"))
    command = [sys.executable, "-c", ON_ANOTHER_PROCESSOR]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("openvino", "torch")
    assert made
    assert sorted(cache.rglob("*")) == made, "the graph was in the cache"
