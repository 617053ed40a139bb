"""The demonstration, on a few photographs: its files, and a page that loads nothing."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli_fixtures import Refused, read
from PIL import Image

from anomalib_lite import cli, load
from anomalib_lite.datasets import ELPV, elpv


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the demonstration writes, on a few photographs."""
    if importlib.util.find_spec("elpv_dataset") is None:
        pytest.skip("elpv-dataset is not installed")
    path = tmp_path_factory.mktemp("demo") / "out"
    small = "--n-train 24 --n-test 40 --false-alarm-rate 0.3"
    assert cli.main(["demo", "-o", str(path), *small.split()]) == 0
    return path


class TestDemo:
    def test_writes_all_files(self, output: Path) -> None:
        assert sorted(path.name for path in output.iterdir()) == [
            "index.html",
            "overlays.png",
            "report.json",
            "scores.csv",
            "solar-cells.safetensors",
        ]
        rows = read(output / "scores.csv")
        assert len(rows) == 40
        for row in rows:
            above = float(row["score"]) > float(row["threshold"])
            assert row["label"] == ("anomalous" if above else "normal")
        report = json.loads((output / "report.json").read_text())
        assert report["metrics"]["image_auroc"] > 0.8
        assert load(output / "solar-cells.safetensors").threshold_ == report["threshold"]

    def test_the_page_loads_nothing(self, output: Path) -> None:
        html = (output / "index.html").read_text(encoding="utf-8")
        assert "<script" not in html
        assert "<link" not in html
        assert not re.search(r"@import|url\(", html)
        assert all(src.startswith("data:image/") for src in re.findall(r'src="([^"]*)"', html))

    def test_the_page_names_licence_and_source(self, output: Path) -> None:
        html = (output / "index.html").read_text(encoding="utf-8")
        assert ELPV.licence in html
        assert ELPV.source in html
        assert "Buerhop-Lutz" in html

    def test_the_page_shows_what_was_missed_as_well(self, output: Path) -> None:
        html = (output / "index.html").read_text(encoding="utf-8")
        rows = read(output / "scores.csv")
        outcomes = {
            "Defects found": ("defect", "anomalous"),
            "Defects missed": ("defect", "normal"),
            "False alarms": ("normal", "anomalous"),
            "Typical good cells": ("normal", "normal"),
        }
        for title, (truth, label) in outcomes.items():
            names = [
                Path(row["image"]).stem
                for row in rows
                if (row["truth"], row["label"]) == (truth, label)
            ]
            section = re.search(rf"<h2>{title}</h2>.*?</section>", html, re.DOTALL)
            assert section is not None
            shown = re.findall(r'alt="(\w+), photograph"', section[0])
            assert len(shown) == min(6, len(names))
            assert set(shown) <= set(names)
            if names:
                assert f"{len(shown)} of {len(names)} shown" in section[0]
            else:
                assert "None in this run" in section[0]
        assert html.count('<figure><div class="pair">') > 6

    def test_the_histogram_counts_every_cell_and_cuts_nothing_off(self, output: Path) -> None:
        html = (output / "index.html").read_text(encoding="utf-8")
        figures = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)".*?</svg>', html, re.DOTALL)
        assert len(figures) == 2
        for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
            width, height = map(int, re.findall(r"viewBox=\"0 0 (\d+) (\d+)", svg)[0])
            for x, y, w, h in re.findall(
                r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg
            ):
                assert float(x) + float(w) <= width
                assert float(y) + float(h) <= height
            for x, y in re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)"', svg):
                assert 8 <= float(x) <= width - 8
                assert 12 <= float(y) <= height - 4
            for words in ("Normal", "Defective", "anomaly score", "cells", "threshold"):
                assert words in svg

    def test_nothing_on_the_sheet_is_cut_off(self, output: Path) -> None:
        with Image.open(output / "overlays.png") as sheet:
            pixels = np.asarray(sheet)
        assert pixels.shape[1] == 6 * (190 + 12) + 12
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge == 255).all()

    def test_the_error_says_how_to_get_the_photographs(
        self, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(elpv.importlib.util, "find_spec", lambda *_: None)
        said = refused("demo", "-o", tmp_path)
        assert 'pip install "anomalib-lite[demo]"' in said

    def test_a_directory_that_cannot_be_written_is_named(
        self, tmp_path: Path, refused: Refused
    ) -> None:
        (tmp_path / "file").touch()
        assert str(tmp_path / "file") in refused("demo", "-o", tmp_path / "file")

    def test_a_number_that_is_too_large_is_named(
        self, output: Path, tmp_path: Path, refused: Refused
    ) -> None:
        said = refused("demo", "-o", tmp_path, "--n-test", 510)
        assert "n_test must be a whole number of at least 2 and at most 509, got 510" in said
