"""The studies of fusion, memories and papers, on miniatures, with networks that know nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_fixtures import light, make_mvtec_ad, make_visa, mask, photo, save

for package in ("pandas", "pydantic", "yaml", "tabulate", "matplotlib"):
    pytest.importorskip(package, reason="needs the extra benchmarks")

import pandas as pd  # noqa: E402
import yaml  # noqa: E402

from anomalib_lite import MemoryBank, PaDiM, PatchCore, SubspaceAD  # noqa: E402
from anomalib_lite.datasets import MVTecAD  # noqa: E402
from anomalib_lite.evaluation import evaluate  # noqa: E402
from anomalib_lite.studies import Run, open_study, run_studies  # noqa: E402
from anomalib_lite.subspace import Subspace  # noqa: E402

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CATEGORIES = ["mvtec_ad/bottle", "mvtec_ad/cable"]
SEARCHES = {
    "cells": {"index": "IVF4,Flat", "nprobe": 2},
    "graph": {"index": "HNSW8", "ef_search": 8},
    "codes": {"index": "PQ4x4"},
    "both": {"index": "IVF4,PQ4x4", "nprobe": 4},
    "rounded": {"index": "SQ8"},
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights of two small networks of timm, drawn at random."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder, files = tmp_path_factory.mktemp("weights"), {}
    for name in ("test_resnet", "test_vit"):
        torch.manual_seed(0)
        files[name] = str(folder / f"{name}.safetensors")
        save_file(timm.create_model(name, pretrained=False).state_dict(), files[name])
    return files


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with two categories of MVTec AD, two of VisA and two of MVTec AD 2."""
    root = tmp_path_factory.mktemp("data")
    make_mvtec_ad(root / "mvtec_ad", ("bottle", "cable"), n=8)
    make_visa(root / "visa", ("candle", "cashew"), n=6)
    for number, name in enumerate(("can", "vial")):
        random, home = np.random.RandomState(number), root / "mvtec_ad_2" / name
        for i in range(6):
            file = f"{i:03d}_regular"
            for place in ("train/good", "validation/good", "test_public/good"):
                save(photo(random), home / place / f"{file}.png")
            save(photo(random, light(number)), home / "test_public/bad" / f"{file}.png")
            save(mask(), home / "test_public/ground_truth/bad" / f"{file}_mask.png")
    return root


def small_fusion(weights: dict[str, str]) -> dict[str, Any]:
    given = yaml.safe_load((BENCHMARKS / "fusion/mvtec.yaml").read_text())
    for strategy in given["strategies"].values():
        strategy.pop("layers", None)
        if "feature_dim" in strategy:
            strategy["feature_dim"] = 5
    network = {"backbone": "test_vit", "weights": weights["test_vit"], "image_size": 160}
    return given | {"network": network, "timed_images": 1, "repeats": 1}


def small_memory_bank(weights: dict[str, str]) -> dict[str, Any]:
    given = yaml.safe_load((BENCHMARKS / "memory_bank/mvtec.yaml").read_text())
    network = {"backbone": "test_resnet", "weights": weights["test_resnet"], "image_size": 64}
    return given | {"network": network, "searches": SEARCHES, "timed_queries": 50, "repeats": 1}


def small_paper(weights: dict[str, str], name: str = "mvtec") -> dict[str, Any]:
    given = yaml.safe_load((BENCHMARKS / f"paper/{name}.yaml").read_text())
    small = {"backbone": "test_resnet", "weights": weights["test_resnet"], "layers": None}
    for method in given["methods"].values():
        more = {"n_components": 8} if method["detector"] == "PaDiM" else {}
        side = (64, 64) if method["detector"] == "PaDiM" else 64
        fusion = {"fusion": "concat"} if method["detector"] == "SubspaceAD" else {}
        own = method.get("parameters") or {}
        method["parameters"] = own | small | more | fusion | {"image_size": list_of(side)}
    return given


def list_of(side: Any) -> Any:
    """Return what YAML can hold."""
    return list(side) if isinstance(side, tuple) else side


SMALL = {"fusion": small_fusion, "memory_bank": small_memory_bank, "paper": small_paper}


def write(folder: Path, name: str, given: dict[str, Any], **more: Any) -> Path:
    """Write a configuration of a study of benchmarks/ into another folder."""
    whole = {"categories": CATEGORIES, "seeds": [0], "missing": "refuse"} | more
    given = given | whole | {"study": str(BENCHMARKS / name / "study.py"), "name": name}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def measure(file: Path, root: Path, out: Path) -> pd.DataFrame:
    """Run a study to the end, and return its rows."""
    summary = run_studies([file], out, data_root=root, log_level="ERROR")
    assert summary.experiments[0].status == "success", summary.experiments[0].error
    return pd.read_csv(out / file.stem / "rows.csv")


# --- Each study -----------------------------------------------------------------------------------


def test_fusion_runs_to_the_end(weights: dict[str, str], root: Path, tmp_path: Path) -> None:
    rows = measure(write(tmp_path, "fusion", small_fusion(weights)), root, tmp_path / "out")
    folder = tmp_path / "out/fusion"
    asked = ["fusion_strategy", "category", "image_auroc", "pixel_auroc", "feature_dim"]
    assert list(rows.columns[:7]) == [*asked, "inference_time_ms", "timestamp"]
    assert rows[[*asked, "inference_time_ms"]].notna().all(axis=None)
    assert (rows["inference_time_ms"] > 0).all()
    names = {"single", "concat", "weighted", "adaptive", "mean", "per_layer"}
    assert names < set(rows["fusion_strategy"])
    assert len(rows) == 9 * 2
    dims = rows.groupby("fusion_strategy")["feature_dim"].first()
    assert dims["concat"] == dims["weighted"] == dims["per_layer"] == 2 * dims["single"]
    assert dims["mean"] == dims["single"]
    assert dims["adaptive to 128"] == 5
    # Naively: the mean of one strategy, and the numbers in its bank.
    table = pd.read_csv(folder / "table.csv", index_col=0)
    one = rows[rows["fusion_strategy"] == "adaptive"]
    assert table.loc["adaptive", "image_auroc"] == pytest.approx(one["image_auroc"].mean())
    banks = rows.groupby("fusion_strategy")["bank_mb"].first()
    assert banks["concat"] == pytest.approx(2 * banks["single"])
    assert banks["per_layer"] == pytest.approx(banks["concat"])
    assert (folder / "fusion_comparison.png").stat().st_size > 10_000
    # What others report stands by itself.
    assert "0.9832" not in (folder / "table.csv").read_text() + rows.to_csv()
    assert "0.9832" in (folder / "table.md").read_text().split("## Reported elsewhere")[1]


def test_memory_bank_runs_to_the_end(weights: dict[str, str], root: Path, tmp_path: Path) -> None:
    file = write(tmp_path, "memory_bank", small_memory_bank(weights))
    rows = measure(file, root, tmp_path / "out")
    folder = tmp_path / "out/memory_bank"
    assert list(rows.columns[:11]) == [
        *("category", "search_method", "pq_bits", "nprobe", "image_auroc", "memory_mb"),
        *("search_time_ms", "speedup", "memory_reduction", "accuracy_loss_percent", "timestamp"),
    ]
    parts = rows.groupby("part").size()
    assert parts.to_dict() == {"memory": 2 * 3, "coreset": 2 * 7, "search": 2 * (1 + 5)}
    coreset = rows[rows["part"] == "coreset"].set_index(["category", "coreset_ratio"])
    search = rows[rows["part"] == "search"].set_index(["category", "search_method"])
    for first in (coreset.xs(1.0, level=1), search.xs("exact", level=1)):
        assert (first["speedup"] == 1).all()
        assert (first[["memory_reduction", "accuracy_loss_percent"]] == 0).all(axis=None)
    images = MVTecAD(root / "mvtec_ad", "cable")
    whole = PatchCore(
        "test_resnet",
        weights=weights["test_resnet"],
        image_size=64,
        coreset_ratio=1.0,
        calibration="leave_one_out",
        false_alarm_rate=0.5,
    ).fit(list(images.train))
    expected = evaluate(whole, list(images.test)).metrics["image_auroc"]
    assert coreset.loc[("mvtec_ad/cable", 1.0), "image_auroc"] == pytest.approx(expected)
    assert search.loc[("mvtec_ad/cable", "exact"), "image_auroc"] == pytest.approx(expected)
    half = coreset.xs(0.5, level=1)
    assert half["memory_reduction"].to_numpy() == pytest.approx(0.5, abs=0.01)
    assert list(search.loc["mvtec_ad/cable", "pq_bits"].dropna()) == [4, 4]
    # An index is kept beside the rows, so memory is not saved; what is searched is smaller.
    codes = search.xs("codes", level=1)
    assert (codes["memory_reduction"] < 0).all()
    assert (codes["index_reduction"] > 0.5).all()
    assert search["recall"].dropna().between(0, 1).all()
    for part in ("memory", "coreset", "search"):
        table = pd.read_csv(folder / f"{part}.csv", index_col=0)
        assert table["image_auroc"].mean() == pytest.approx(
            rows.loc[rows["part"] == part, "image_auroc"].mean()
        )
    assert (folder / "memory_bank.png").stat().st_size > 10_000


def test_searches_can_be_measured_on_fewer_categories(
    weights: dict[str, str], root: Path, tmp_path: Path
) -> None:
    more = {"search_categories": ["mvtec_ad/cable"], "coreset_ratios": [1.0], "memories": ["knn"]}
    file = write(tmp_path, "memory_bank", small_memory_bank(weights), **more)
    rows = measure(file, root, tmp_path / "out")
    assert set(rows.loc[rows["part"] == "search", "category"]) == {"mvtec_ad/cable"}
    assert set(rows.loc[rows["part"] == "memory", "category"]) == set(CATEGORIES)


def test_memories_can_be_measured_without_searches(
    weights: dict[str, str], root: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"search_categories": [], "coreset_ratios": [0.5, 1.0]}
    more |= {"memories": ["knn"], "categories": CATEGORIES[:1]}
    file = write(tmp_path, "memory_bank", small_memory_bank(weights), **more)
    rows = measure(file, root, tmp_path / "out")
    assert rows.groupby("part").size().to_dict() == {"memory": 1, "coreset": 2}
    assert not (tmp_path / "out/memory_bank/search.csv").exists()
    assert (tmp_path / "out/memory_bank/memory_bank.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "categories", "limit"),
    [
        ("mvtec", CATEGORIES, 0.3),
        ("visa", ["visa/candle", "visa/cashew"], 0.3),
        ("mvtec_ad_2", ["mvtec_ad_2/can", "mvtec_ad_2/vial"], 0.05),
    ],
)
def test_papers_run_to_the_end(
    weights: dict[str, str],
    root: Path,
    tmp_path: Path,
    name: str,
    categories: list[str],
    limit: float,
) -> None:
    given = small_paper(weights, name)
    rows = measure(write(tmp_path, "paper", given, categories=categories), root, tmp_path / "out")
    folder = tmp_path / "out/paper"
    assert len(rows) == 2 * len(given["methods"])
    assert rows[["image_auroc", "pixel_auroc", "aupro", "pixel_pr"]].notna().all(axis=None)
    assert (rows["fpr_limit"] == limit).all()
    # All images, or as many as the method says.
    n = 8 if name == "mvtec" else 6
    asked = {key: method.get("shots") for key, method in given["methods"].items()}
    for method, shots in asked.items():
        found = rows.loc[rows["method"] == method, "n_train"]
        assert (found == (n if shots is None else min(n, shots))).all()
    assert (rows["n_test"] == 2 * n).all()
    beside = pd.read_csv(folder / "beside_reported.csv", index_col=[0, 1])
    one = rows[rows["category"] == categories[1]].set_index("method")
    for method in asked:
        found = beside.loc[(method, categories[1]), "aupro"]
        assert found == pytest.approx(one.loc[method, "aupro"])
    # Not all categories of the data set are here, so no mean stands beside a published one.
    means = beside[beside.index.get_level_values(1).str.endswith(", mean")]
    assert means["image_auroc"].isna().all()
    if name == "mvtec":
        cable = beside.loc[("PatchCore", "mvtec_ad/cable")]
        assert cable["reported image_auroc"] == 0.9968
        assert cable["image_auroc difference"] == pytest.approx(cable["image_auroc"] - 0.9968)
        assert means.loc["PatchCore", "reported aupro"].item() == 0.9437
    assert (
        "no centre crop" in (folder / "presets.csv").read_text()
        or "The source" in (folder / "presets.csv").read_text()
    )
    assert (folder / "paper_comparison.png").stat().st_size > 10_000


def test_a_mean_of_all_categories_stands_beside_the_published_one() -> None:
    study = open_study(BENCHMARKS / "paper/mvtec.yaml").module
    names = study.category_names(["mvtec_ad/*"])
    rows = pd.DataFrame({"method": "PatchCore", "dataset": "mvtec_ad", "category": names})
    rows["image_auroc"] = np.linspace(0.5, 1, len(names))
    beside = study.beside_reported(rows.assign(pixel_auroc=0.9, aupro=0.8))
    mean = beside.loc[("PatchCore", "mvtec_ad, mean")]
    assert mean["image_auroc"] == pytest.approx(0.75)
    assert mean["reported image_auroc"] == 0.9916
    assert mean["image_auroc difference"] == pytest.approx(0.75 - 0.9916)


def test_every_published_figure_has_a_source() -> None:
    for file in BENCHMARKS.glob("*/reported.csv"):
        reported = pd.read_csv(file)
        assert len(reported)
        if "value" in reported:
            assert reported["value"].between(0, 1).all()
        assert reported["source"].str.len().gt(10).all()
        known = reported.columns.drop(["value", "feature_dim"], errors="ignore")
        assert not reported.duplicated(list(known.drop("source"))).any()


# --- What a table shows of a detector that knows nothing, and of labels that are wrong ------------


def know_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every detector, bank and subspace return noise."""
    random = np.random.RandomState(0)

    def score_patches(self: Any, E: np.ndarray, *_: Any) -> tuple[np.ndarray, np.ndarray]:
        noise = random.rand(*E.shape[:3]).astype(np.float32)
        return noise, random.rand(len(E)).astype(np.float32)

    def search(self: Any, X: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return random.rand(len(X), k).astype(np.float32), np.zeros((len(X), k), np.int64)

    for detector in (PatchCore, PaDiM, SubspaceAD):
        monkeypatch.setattr(detector, "_score_patches", score_patches)
    monkeypatch.setattr(MemoryBank, "search", search)
    monkeypatch.setattr(Subspace, "residual", lambda self, X: random.rand(len(X)))


@pytest.mark.nightly
@pytest.mark.parametrize("name", SMALL)
def test_noise_has_an_auroc_of_a_half(
    name: str, weights: dict[str, str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_nothing(monkeypatch)
    given = SMALL[name](weights)
    rows = measure(write(tmp_path, name, given, seeds=[0, 1]), root, tmp_path / "out")
    # 16 images a test: the deviation of one AUROC is 0.15, that of a mean of 32 is 0.03.
    assert rows["image_auroc"].mean() == pytest.approx(0.5, abs=0.1)
    assert rows["pixel_auroc"].mean() == pytest.approx(0.5, abs=0.1)
    tables = [path for path in (tmp_path / "out" / name).glob("*.csv") if path.stem != "reported"]
    columns = 0
    for path in tables:
        table = pd.read_csv(path)
        for column in {"image_auroc", "pixel_auroc"} & set(table):
            assert table[column].mean() == pytest.approx(0.5, abs=0.1), path.name
            if path.stem not in ("rows", "beside_reported"):
                columns += 1
                assert table[column].between(0.2, 0.8).all(), path.name
    assert columns >= 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", SMALL)
def test_swapped_labels_are_seen(
    name: str, weights: dict[str, str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, name, SMALL[name](weights), categories=CATEGORIES[1:])
    right = measure(file, root, tmp_path / "right")
    opened = Run.open

    def swapped(self: Run, category: str, seed: int = 0) -> Any:
        images = opened(self, category, seed)
        test = [replace(s, label=1 - s.label, mask_path=None) for s in images.test]
        return replace(images, test=test)

    monkeypatch.setattr(Run, "open", swapped)
    wrong = measure(file, root, tmp_path / "wrong")
    assert wrong["image_auroc"].to_numpy() == pytest.approx(1 - right["image_auroc"].to_numpy())
    assert wrong["pixel_auroc"].isna().all()  # no masks, no number
