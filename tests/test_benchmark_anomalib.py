"""The study against anomalib, with workers that this file stands in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_fixtures import make_mvtec_ad

pd = pytest.importorskip("pandas", reason="needs the extra benchmarks")

from anomalib_lite.studies import open_study, run_studies  # noqa: E402

STUDY = Path(__file__).parents[1] / "benchmarks" / "anomalib" / "study.py"
CATEGORIES = ("bottle", "cable", "screw")


def write(folder: Path, more: str = "") -> Path:
    names = ", ".join(f"mvtec_ad/{name}" for name in CATEGORIES)
    file = folder / "peer.yaml"
    file.write_text(f"study: {STUDY}\nname: peer\ncategories: [{names}]\nseeds: [0, 1]\n{more}")
    make_mvtec_ad(folder / "mvtec_ad", CATEGORIES, n=12)
    return file


def stand_in(study: Any, monkeypatch: pytest.MonkeyPatch, better: str) -> list[str]:
    """Let workers say noise; those of ``better`` also know the labels. Return who was asked."""
    import measuring  # the study has made the folder of the workers known

    asked, random = [], np.random.RandomState(0)

    def work(who: str, job: dict[str, Any], scratch: Path, **_: Any) -> dict[str, Any]:
        asked.append(who)
        n = len(job["test"])
        scores = random.rand(n) + (np.array(job["labels"]) if who == better else 0)
        predictions = measuring.Predictions(job["predictions"])
        predictions.add(range(n), scores, random.rand(n, 20, 24))
        predictions.finish(np.zeros((7, 3)))
        ours = who == "ours"
        return {
            "fit_s": 1.0 if ours else 3.0,
            "test_s": 0.1 * n,
            "peak_rss_mb": 100.0 if ours else 400.0,
            "import_s": 1.0,
            "bank_shape": [7, 3],
            "settings": {"engine_": "torch", "dtype_": "float32"} if ours else {"dtype": "float32"},
            "versions": {"torch": "2", "anomalib-lite": "0", "anomalib": "0"},
        }

    monkeypatch.setattr(study.module, "work", work)
    monkeypatch.setattr(study.module, "check_peer", lambda python: python)
    return asked


@pytest.mark.parametrize("better", ["", "ours", "peer"])
def test_tables_tell_who_is_better(
    better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(write(tmp_path, "detectors: [padim]\nrounds: 2\n"))
    asked = stand_in(study, monkeypatch, better)
    summary = run_studies([study], tmp_path / "out", data_root=tmp_path, log_level="ERROR")
    assert summary.experiments[0].error is None
    assert asked[:8] == ["ours", "peer", "peer", "ours", "peer", "ours", "ours", "peer"]
    folder = tmp_path / "out/peer"
    rows = pd.read_csv(folder / "rows.csv")
    assert len(rows) == 2 * 2 * len(CATEGORIES)
    ours = rows[rows["library"] == "anomalib-lite"]
    sign = {"": 0, "ours": 1, "peer": -1}[better]
    assert ours["difference"].mean() == pytest.approx(0.5 * sign, abs=0.2)
    assert ((ours["p_value"] < 0.01) == (better != "")).all()
    if not better:
        assert rows[["image_auroc", "pixel_auroc"]].mean().between(0.4, 0.6).all()
    over = pd.read_csv(folder / "over_categories.csv").set_index("metric")
    assert over.loc["image_auroc", "categories"] == len(CATEGORIES)
    expected = ours.groupby("category")["difference"].mean().mean()
    assert over.loc["image_auroc", "mean_difference"] == pytest.approx(expected)
    each = pd.read_csv(folder / "per_category.csv").set_index("category")
    assert set(each.index) == {f"mvtec_ad/{name}" for name in CATEGORIES}
    costs = pd.read_csv(folder / "costs.csv").set_index("method")
    assert costs.loc["padim, anomalib", "peak_mb"] == 400
    assert (folder / "anomalib_comparison.png").stat().st_size > 10_000


def test_without_anomalib_it_says_how_to_make_its_environment(tmp_path: Path) -> None:
    file = write(tmp_path, f"peer_python: {tmp_path}/gone/python\n")
    [experiment] = run_studies([file], tmp_path / "out", data_root=tmp_path).experiments
    assert experiment.status == "failed"
    assert "has no anomalib" in str(experiment.error)
    assert "python benchmarks/peers/surroundings.py" in str(experiment.error)
