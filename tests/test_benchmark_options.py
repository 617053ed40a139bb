"""The study of options: rows, the front, and that a stopped run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from study_fixtures import Noise, make_mvtec_ad

pd = pytest.importorskip("pandas", reason="needs the extra benchmarks")

from anomalib_lite.errors import InvalidValueError  # noqa: E402
from anomalib_lite.studies import open_study, run_studies  # noqa: E402

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "options"
DATA = Path(os.environ.get("ANOMALIB_LITE_DATA", ROOT.parent / "shared" / "data"))
HEAD = (
    f"study: {FOLDER}/study.py\nname: options\ncategories: [piped/PA_BDP01_TL]\nseeds: [0]\n"
    "max_train: 16\nmax_test: 16\n"
)
FRONT = """front: true
rounds: 2
timed: [piped/PA_BDP01_TL]
timed_test: 4
baseline: "256, 10 %"
options:
  "256, 10 %": {image_size: 256, coreset_ratio: 0.1}
  "auto, 5,000": {image_score: smoothed}
"""


@pytest.mark.skipif(not (DATA / "piped").is_dir(), reason="no photographs of paper on this machine")
def test_rows_are_measured_once(tmp_path: Path) -> None:
    file, out = tmp_path / "options.yaml", tmp_path / "out"
    file.write_text(HEAD + FRONT)
    [experiment] = run(file, out)
    assert (experiment.status, experiment.error) == ("success", None)
    lines = (out / "options/rows.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    tests, times = rows[:2], rows[2:]
    assert [row["option"] for row in tests] == ["256, 10 %", "auto, 5,000"]
    for row in tests:
        # Half of 16 images are anomalous, with impurities that are plain to see.
        assert row["image_auroc"] > 0.9
        assert 0.9 < row["pixel_auroc"] < 1
        assert (row["n_train"], row["n_test"], row["seed"]) == (16, 16, 0)
        assert row["bank_rows"] > 0
    for row in times:
        assert row["ms"] > 0
        assert "image_auroc" not in row
    table = pd.read_csv(out / "options/table.csv")
    assert list(table["papers"]) == [row["image_auroc"] for row in tests]
    pixels = np.asarray(Image.open(out / "options/front.png").convert("L"))
    assert min(pixels.shape) > 200
    assert pixels.std() > 10
    # Stopped after the first row, the run goes on with the same rows, and measures no other again.
    (out / "options/rows.jsonl").write_text(lines[0] + lines[1][:40])
    run(file, out)
    again = (out / "options/rows.jsonl").read_text().splitlines(keepends=True)
    assert again[0] == lines[0]
    assert json.loads(again[1])["pixel_auroc"] == tests[1]["pixel_auroc"]
    assert len(again) == 4


def run(file: Path, out: Path) -> Any:
    return run_studies([file], out, data_root=DATA, resume=True, log_level="ERROR").experiments


class NoisyDetector(Noise):
    engine_, dtype_ = "none", "float32"

    def save(self, path: Path) -> None:
        path.write_bytes(b"nothing")


def test_noise_is_noise_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An AUROC of 12 images deviates by 0.17, the mean of 40 by 0.03."""
    make_mvtec_ad(tmp_path, ("magnetic_tile",))
    file = tmp_path / "options.yaml"
    seeds = ", ".join(map(str, range(40)))
    more = f"categories: [magnetic_tile]\nseeds: [{seeds}]\noptions: {{default: {{}}}}\n"
    file.write_text(f"study: {FOLDER}/study.py\nname: options\n{more}")
    study = open_study(file)
    monkeypatch.setitem(study.module.DETECTORS, "PatchCore", NoisyDetector)
    [experiment] = run_studies([study], tmp_path / "out", data_root=tmp_path).experiments
    assert experiment.error is None
    table = pd.read_csv(tmp_path / "out/options/table.csv")
    for column in ("tiles", "mean", "pixel_auroc, tiles"):
        assert table[column].iloc[0] == pytest.approx(0.5, abs=0.15)


def test_a_wrong_option_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(HEAD + "options: {colour: {colour: red}}\n")
    with pytest.raises(InvalidValueError, match=r"colour: .*unexpected keyword"):
        open_study(file)


@pytest.mark.parametrize("name", ["front", "options"])
def test_rows_that_are_kept_give_their_table(name: str) -> None:
    study = open_study(FOLDER / f"{name}.yaml")
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("options_report", FOLDER / "report.py")
    assert spec is not None
    assert spec.loader is not None
    report = module_from_spec(spec)
    spec.loader.exec_module(report)
    rows = report.read(str(ROOT / "docs/options/rows.csv"), name)
    table = study.module.tables(rows, study.config)["table"]
    assert set(table.index) <= set(study.config.options)
    assert table["mean"].between(0.7, 1).all()
    if name == "options":  # and the page shows it
        page = (ROOT / "docs/options.md").read_text()
        assert report.table_of(str(ROOT / "docs/options/rows.csv"), name) in page
