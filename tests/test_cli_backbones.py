"""The command backbones: what it lists is what the registry holds, and it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_fixtures import Refused

from anomalib_lite import cli
from anomalib_lite.networks import NETWORKS, whereabouts


def test_every_network_has_a_row_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backbones"]) == 0
    head, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == list(NETWORKS)
    for row, (name, network) in zip(rows, NETWORKS.items(), strict=True):
        cells = {
            "M": f"{network.millions:.1f}",
            "D": str(network.n_features),
            "image size": str(network.image_size),
            "GFLOPs": f"{network.gflops:.3g}",
        }
        for title, cell in cells.items():  # numbers end where their titles end
            assert row[: head.index(title) + len(title)].endswith(f" {cell}")
        for title, cell in {
            "speed": network.speed,
            "weights": whereabouts(name),
            "network": network.timm,
        }.items():  # texts begin where their titles begin
            assert f"{row[head.index(title) :]}  ".startswith(f"{cell}  ")
    assert "  8, 16  " in rows[0]


def test_networks_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backbones", "clip_vitb32", "dinov3_vits16"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    for part in (
        "clip_vitb32\n",
        "vit_base_patch32_clip_quickgelu_224.openai of timm, 87.5 million parameters",
        "hub: timm/vit_base_patch32_clip_224.openai",
        "blocks.5, blocks.8: 1536 numbers per patch",
        "32 pixels",
        "mean [0.481, 0.458, 0.408]",
        "6.67 GFLOPs for 224x224",
    ):
        assert part in first
    assert "dinov3-license" in second


def test_unknown_names_and_a_missing_directory_are_refused(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Did you mean 'clip_vitb32'?" in refused("backbones", "clip_vit32")
    monkeypatch.setenv("ANOMALIB_LITE_WEIGHTS", str(tmp_path / "gone"))
    assert "ANOMALIB_LITE_WEIGHTS names" in refused("backbones")


def test_listing_loads_nothing_heavy() -> None:
    code = (
        "import sys; from anomalib_lite import cli; cli.main(['backbones']); "
        "sys.exit(str({'torch', 'timm', 'sklearn', 'PIL'} & set(sys.modules) or '') or 0)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
