"""The studies of benchmarks/, on miniatures of the data sets, with networks that know nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_fixtures import Noise, make_mvtec_ad, make_visa

for package in ("pandas", "pydantic", "yaml", "tabulate", "matplotlib"):
    pytest.importorskip(package, reason="needs the extra benchmarks")

import pandas as pd  # noqa: E402
import yaml  # noqa: E402

from anomalib_lite.errors import InvalidValueError  # noqa: E402
from anomalib_lite.studies import (  # noqa: E402
    NetworkConfig,
    Results,
    Run,
    StudyConfig,
    category_names,
    open_study,
    run_studies,
)

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CONFIGURATIONS = sorted(BENCHMARKS.glob("*/*.yaml"))


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of two small networks of timm, drawn at random."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder, files = tmp_path_factory.mktemp("weights"), {}
    for name in ("test_resnet", "test_vit"):
        torch.manual_seed(0)
        files[name] = folder / f"{name}.safetensors"
        save_file(timm.create_model(name, pretrained=False).state_dict(), files[name])
    return files


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with all categories of MVTec AD and four of VisA."""
    root = tmp_path_factory.mktemp("data")
    names = [name.split("/")[1] for name in category_names(["mvtec_ad/*"])]
    make_mvtec_ad(root / "mvtec_ad", tuple(names), n=4)
    make_visa(root / "visa", ("candle", "cashew", "chewinggum", "fryum"), n=4)
    return root


def with_small_networks(
    file: Path, networks: dict[str, Path], folder: Path, most: int = 4, **more: Any
) -> Path:
    """Write a configuration again, with a small network in place of each of its networks."""
    given = yaml.safe_load(file.read_text())
    small = [
        {"backbone": name, "weights": str(path), "image_size": side}
        for (name, path), side in zip(networks.items(), (64, 160), strict=True)
    ]
    if "backbones" in given:
        given["backbones"] = {
            name: small[i % len(small)] for i, name in enumerate([*given["backbones"]][:most])
        }
    else:
        given["network"] = small[0]
    given["study"] = str(file.parent / given["study"])
    written = folder / file.name
    written.write_text(yaml.safe_dump(given | {"seeds": [0], "missing": "refuse"} | more))
    return written


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_configuration_can_be_read(file: Path) -> None:
    study = open_study(file)
    assert study.name == f"{file.parent.name}_{file.stem}"
    draws_its_own = study.name == "promise_simulation"
    assert bool(category_names(study.config.categories)) != draws_its_own
    assert (file.parent / "README.md").is_file()


def test_backbones_run_to_the_end(
    networks: dict[str, Path], miniatures: Path, tmp_path: Path
) -> None:
    file = with_small_networks(BENCHMARKS / "backbones/mvtec.yaml", networks, tmp_path)
    summary = run_studies([file], tmp_path / "out", data_root=miniatures, cache=tmp_path / "cache")
    assert summary.experiments[0].status == "success", summary.experiments[0].error
    folder = tmp_path / "out/backbones_mvtec"
    rows = pd.read_csv(folder / "rows.csv")
    asked = ["backbone", "dataset", "category", "image_auroc", "pixel_auroc", "pixel_pr"]
    assert list(rows.columns[:7]) == [*asked, "timestamp"]
    assert len(rows) == 4 * (19 + 5 + 4)
    assert set(rows["setting"]) == {"own", "in_domain", "cross_domain"}
    assert rows[asked].notna().all(axis=None)
    # Naively: the gap of one backbone.
    gap = pd.read_csv(folder / "gap.csv", index_col=0)
    one = rows[rows["backbone"] == "ResNet50"]
    means = {
        name: one.loc[one["setting"] == name, "image_auroc"].mean() for name in gap.columns[:2]
    }
    assert set(means) == {"in_domain", "cross_domain"}
    expected = means["in_domain"] - means["cross_domain"]
    assert gap.loc["ResNet50", "gap"] == pytest.approx(expected)
    assert (folder / "backbone_comparison.png").stat().st_size > 10_000
    # What others report stands by itself.
    assert "0.9691" not in (folder / "rows.csv").read_text()
    assert "0.9691" in (folder / "table.md").read_text().split("## Reported elsewhere")[1]


def test_rows_of_other_weights_are_not_mixed(networks: dict[str, Path], tmp_path: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    def find(weights: Path) -> Results:
        results = Results(tmp_path / "out", {}, resume=True)
        network = NetworkConfig(backbone="test_resnet", weights=weights)
        Run("weights", StudyConfig(), results).networks({"small": network})
        return results

    find(networks["test_resnet"]).append("case", [{"x": 1}])
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), other)
    with pytest.raises(InvalidValueError, match="weights of small"):
        find(other)
    assert find(networks["test_resnet"]).finished == {"case"}


def test_a_pooled_detector_of_other_categories_is_not_mixed(
    networks: dict[str, Path], tmp_path: Path
) -> None:
    categories = ["mvtec_ad/bottle", "mvtec_ad/cable", "visa/candle"]
    file = with_small_networks(
        BENCHMARKS / "backbones/mvtec.yaml",
        networks,
        tmp_path,
        most=1,
        categories=categories,
        in_domain=categories[:2],
        cross_domain=categories[2:],
        missing="skip",
    )
    root, out = tmp_path / "data", tmp_path / "out"
    make_mvtec_ad(root / "mvtec_ad", ("bottle",), n=4)
    make_visa(root / "visa", ("candle",), n=4)
    options: dict[str, Any] = {"data_root": root, "resume": True, "log_level": "ERROR"}
    for _ in range(2):  # the same categories: nothing is refused
        assert run_studies([file], out, **options).failed == 0
    make_mvtec_ad(root / "mvtec_ad", ("bottle", "cable"), n=4)  # bottle is as it was
    [experiment] = run_studies([file], out, **options).experiments
    assert "made before the data changed" in str(experiment.error)
    assert "mvtec_ad/bottle, mvtec_ad/cable, tested on visa/candle" in str(experiment.error)


def test_cross_domain_runs_to_the_end(
    networks: dict[str, Path], miniatures: Path, tmp_path: Path
) -> None:
    categories = ["mvtec_ad/bottle", "mvtec_ad/screw", "mvtec_ad/tile", "visa/candle", "visa/fryum"]
    file = with_small_networks(
        BENCHMARKS / "cross_domain/mvtec.yaml", networks, tmp_path, categories=categories
    )
    summary = run_studies([file], tmp_path / "out", data_root=miniatures, cache=tmp_path / "cache")
    assert summary.experiments[0].status == "success", summary.experiments[0].error
    folder = tmp_path / "out/cross_domain_mvtec"
    rows = pd.read_csv(folder / "rows.csv")
    assert list(rows.columns[:7]) == [
        *("train_category", "test_category", "image_auroc", "pixel_auroc"),
        *("domain_shift_distance", "feature_drift", "timestamp"),
    ]
    pairs = rows.set_index(["train_category", "test_category"])
    assert len(pairs) == len(set(pairs.index)) == 25
    matrix = pd.read_csv(folder / "image_auroc_matrix.csv", index_col=0)
    found = pairs.loc[("mvtec_ad/screw", "visa/candle"), "image_auroc"]
    assert matrix.loc["screw", "candle"] == pytest.approx(found)
    table = pd.read_csv(folder / "table.csv", index_col=0)
    is_own = rows["train_category"] == rows["test_category"]
    assert table.loc["in-domain", "image_auroc"] == pytest.approx(
        rows["image_auroc"][is_own].mean()
    )
    assert table.loc["cross-domain", "pairs"] == 20
    correlation = pd.read_csv(folder / "correlation_with_loss.csv", index_col=0)
    own = rows[is_own].set_index("test_category")["image_auroc"]
    cross = rows[~is_own]
    loss = cross["test_category"].map(own) - cross["image_auroc"]
    expected = np.corrcoef(cross["cosine_distance"], loss)[0, 1]
    assert correlation.loc["cosine", "pearson"] == pytest.approx(expected)
    assert (folder / "domain_shift_analysis.png").stat().st_size > 10_000


def test_noise_is_noise_in_every_table(
    networks: dict[str, Path], miniatures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 images and 12 seeds: an AUROC deviates by 0.2, the mean of a category's by 0.06."""
    own = ["mvtec_ad/bottle", "mvtec_ad/cable", "visa/candle"]
    seeds = {"seeds": list(range(12)), "categories": own}
    parts = {"in_domain": own[:2], "cross_domain": own[2:]}
    backbones = open_study(
        with_small_networks(
            BENCHMARKS / "backbones/mvtec.yaml", networks, tmp_path, 2, **seeds, **parts
        )
    )
    cross = open_study(
        with_small_networks(BENCHMARKS / "cross_domain/local.yaml", networks, tmp_path, **seeds)
    )
    for study in (backbones, cross):
        monkeypatch.setattr(study.module, "PatchCore", Noise)
    random = np.random.RandomState(0)
    monkeypatch.setattr(cross.module, "describe", lambda *_: [random.normal(size=(4, 3))])
    summary = run_studies([backbones, cross], tmp_path / "out", data_root=miniatures)
    assert [experiment.error for experiment in summary.experiments] == [None, None]

    def read(name: str) -> Any:
        return pd.read_csv(tmp_path / "out" / name, index_col=0)

    def about(values: Any, middle: float, most: float = 0.15) -> bool:
        return bool((np.abs(np.asarray(values, float) - middle) < most).all())

    table = read("backbones_mvtec/table.csv")
    assert about(table[["image_auroc", "pixel_auroc"]], 0.5)
    assert about(read("backbones_mvtec/per_category.csv"), 0.5, 0.2)
    gap = read("backbones_mvtec/gap.csv")
    assert about(gap[["in_domain", "cross_domain", "cross_domain_own"]], 0.5, 0.2)
    assert about(gap[["gap", "loss"]], 0.0, 0.25)
    assert about(read("cross_domain_local/table.csv")[["image_auroc", "pixel_auroc"]], 0.5)
    assert about(read("cross_domain_local/image_auroc_matrix.csv"), 0.5, 0.2)
