"""The studies of the promise on false alarms: a few draws, and that a broken promise is seen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pd = pytest.importorskip("pandas", reason="needs the extra benchmarks")

from anomalib_lite.studies import open_study, run_studies  # noqa: E402

FOLDER = Path(__file__).parents[1] / "benchmarks" / "promise"
SIMULATION = f"""
study: {FOLDER}/simulation.py
name: simulation
seeds: [0]
detectors: [PatchCore]
calibrations: [split, leave_one_out]
photographs: [1, 4]
rates: [0.2]
after: [fit, partial_fit, recalibrate, confidence]
draws: 60
new_images: 1000
"""
NEW_PARTS = f"""
study: {FOLDER}/new_parts.py
name: new_parts
categories: [magnetic_tile]
seeds: [0, 1]
parts: "part(..)"
groups: [name, auto, none]
false_alarm_rate: 0.2
detectors:
  small: {{parameters: {{image_size: 32, coreset_size: 500}}}}
"""

POWER = f"""
study: {FOLDER}/power.py
name: power
categories: [magnetic_tile]
seeds: [0, 1]
sizes: [24, 5000]
odd: [0.0, 0.25]
rates: [0.1, 0.3]
calibrations: [cross, split]
max_defects: 10
least_good: 20
detectors:
  small: {{detector: SubspaceAD, parameters: {{image_size: 32}}}}
"""


def run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **instead: Any) -> Any:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    study = open_study(file)
    for name, value in instead.items():
        monkeypatch.setattr(study.module, name, value)
    [experiment] = run_studies([study], tmp_path / "out", data_root=tmp_path).experiments
    assert experiment.error is None
    return pd.read_csv(tmp_path / "out" / study.name / "rows.csv")


def test_the_simulation_counts_false_alarms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(SIMULATION, tmp_path, monkeypatch)
    assert len(rows) == 9  # four times with and without photographs, and leave_one_out once
    promised = rows[rows["calibration"] == "split"]
    assert (promised["realised"] <= 0.2 + 4 * promised["error"]).all()
    confident = rows[rows["what"] == "confidence"]
    assert (confident["above"] <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 60)).all()
    table = pd.read_csv(tmp_path / "out/simulation/table.csv")
    assert len(table) == 9
    assert table["0.2"].str.contains(" ± ").all()


def test_the_simulation_sees_a_broken_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photographs of one part that count as parts, as if ``groups`` were forgotten."""
    forgetful = SIMULATION.replace("photographs: [1, 4]", "photographs: [4]")
    forgetful = re.sub("(?m)^(calibrations|after): .*", "", forgetful)
    forgetful += "calibrations: [split]\nafter: [fit]\n"
    rows = run(forgetful, tmp_path, monkeypatch, fit=lambda method, E, groups: method(E))
    fitted = rows[(rows["what"] == "fit") & (rows["calibration"] == "split")]
    assert (fitted["realised"] > 0.2 + 4 * fitted["error"]).all()


def test_new_parts_of_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    home = tmp_path / "magnetic_tile"
    for kind in ("train/good", "test/good", "test/hole"):
        (home / kind).mkdir(parents=True)
    for part in range(30):
        photo = rng.integers(60, 200, (64, 96), dtype=np.uint8)
        for i in range(3):
            noisy = np.clip(photo + rng.normal(0, 4, photo.shape), 0, 255).astype(np.uint8)
            folder = "train/good" if part < 20 else "test/good"
            Image.fromarray(noisy).save(home / folder / f"part{part:02}_{i}.png")
    bad = rng.integers(60, 200, (64, 96), dtype=np.uint8)
    bad[20:40, 30:60] = 0
    Image.fromarray(bad).save(home / "test/hole/hole.png")
    rows = run(NEW_PARTS, tmp_path, monkeypatch).set_index(["groups", "seed"])
    assert (rows["parts"] == 18).all()
    for groups in ("name", "auto"):
        found = rows.loc[groups]
        assert (found["images_held_back"] == 3 * found["groups_held_back"]).all()
    mean = rows["false_alarm_rate"].groupby("groups").mean()
    assert mean["none"] > mean["name"]
    assert (rows["recall"].between(0, 1)).all()


def test_power_of_the_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    home = tmp_path / "magnetic_tile"
    for kind, n in (("train/good", 30), ("test/good", 30), ("test/hole", 16)):
        (home / kind).mkdir(parents=True)
        for i in range(n):
            photo = rng.integers(60, 200, (64, 96), dtype=np.uint8)
            if kind == "test/hole":
                photo[20:50, 30:80] = 0
            Image.fromarray(photo).save(home / kind / f"{i:02}.png")
    rows = (
        run(POWER, tmp_path, monkeypatch)
        .set_index(["calibration", "odd", "rate", "seed"])
        .sort_index()
    )
    assert len(rows) == 2 * 2 * 2 * 2  # there are not 5,000 images
    assert (rows["n_good"] == 36 + 6 * (rows.index.get_level_values("odd") > 0)).all()
    assert (rows["n_defects"] == 10).all()
    assert (rows.loc["cross", "n_scores"] == 24).all()
    for rate, n in ((0.1, 9), (0.3, 4)):  # as many as 0.1 needs, or a fifth of 24
        assert (rows.loc["split"].xs(rate, level="rate")["n_scores"] == n).all()
    clean = rows.xs(0.0, level="odd")
    assert (clean["image_auroc"] == 1).all()  # the holes are plain
    assert (clean["found_at_rate"] == 1).all()
    assert (clean["false_alarm_rate"] < 0.5).all()
    # Defects among the images to fit on raise the threshold.
    found = rows["false_alarm_rate"].groupby(["odd"]).mean()
    assert found[0.25] < found[0.0]
    table = pd.read_csv(tmp_path / "out/power/table.csv")
    assert set(table.columns) >= {"power", "standard_error", "draws", "categories"}
