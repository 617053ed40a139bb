"""The benchmark of options: rows, and that a stopped run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("ANOMALIB_LITE_DATA", ROOT.parent / "shared" / "data"))


@pytest.mark.skipif(not (DATA / "piped").is_dir(), reason="no photographs of paper on this machine")
def test_rows_are_measured_once(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    run = [
        sys.executable,
        str(ROOT / "benchmarks/options/run.py"),
        "--quick",
        "--output",
        str(rows),
    ]
    for options in (["default"], ["default", "image_score='smoothed'"]):
        subprocess.run([*run, "--options", *options], check=True, capture_output=True)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["option"] for row in found] == ["default", "image_score='smoothed'"]
    for row in found:
        # Half of 16 images are anomalous, with impurities that are plain to see.
        assert row["image_auroc"] > 0.9
        assert 0.9 < row["pixel_auroc"] < 1
        assert (row["n_train"], row["n_test"], row["seed"]) == (16, 16, 0)
        assert row["ms"] > 0
    assert found[0]["pixel_auroc"] == found[1]["pixel_auroc"]  # the same heatmaps
