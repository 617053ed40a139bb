"""The benchmark of cascades, run on miniatures of KolektorSDD, MVTec AD and NEU-DET."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from study_fixtures import Noise
from test_benchmark_vfm import wall, write
from test_neu_det import KINDS, annotation

pd = pytest.importorskip("pandas", reason="needs the extra benchmarks")

from anomalib_lite.studies import open_study, run_studies  # noqa: E402

pytestmark = pytest.mark.nightly
FOLDER = Path(__file__).parents[1] / "benchmarks" / "gated_cascade"
NETWORKS = ("resnet18", "tf_efficientnet_b0", "mobilenetv3_small_100")
CASCADES = (
    "gate_lite0_patchcore_lite0",
    "gate_lite0_labels_patchcore_lite0",
    "gate_lite0_finetuned_patchcore_lite0",
    "gate_patchcore128_patchcore_lite0",
    "gate_effnetb0_patchcore_r18",
    "gate_mnv3_patchcore_r18",
)
EXPERIMENTS = {"baseline_patchcore", "baseline_patchcore_r18", *CASCADES}
SPLITS = ("val_mix", "test_mix", "neu_test")
SOURCES = "kolektor: kolektor\nmvtec: mvtec\n"
COLUMNS = (
    "experiment_id,split,accuracy,precision,recall,f1,auroc,pr_auc,latency_ms,heatmap_call_rate"
)


def square(rng: np.random.Generator, base: int) -> tuple[np.ndarray, np.ndarray]:
    """A wall with a white square, and its mask."""
    image, mask = wall(rng, base), np.zeros((80, 64), np.uint8)
    y, x = rng.integers(5, 50, 2)
    mask[y : y + 18, x : x + 14] = 255
    return np.maximum(image, mask), mask


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets in their layouts."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part in range(20):
        for i in range(5):
            good = (wall(rng, 120), np.zeros((80, 64), np.uint8))
            image, mask = square(rng, 120) if i == part % 5 else good
            write(root / f"kolektor/kos{part:02}/Part{i}.jpg", image)
            write(root / f"kolektor/kos{part:02}/Part{i}_label.bmp", mask)
    for category, base in (("cable", 90), ("tile", 150)):
        home = root / "mvtec" / category
        for place, n in (("train", 16), ("test", 5)):
            for i in range(n):
                write(home / place / f"good/{i:03}.png", wall(rng, base))
        for i in range(6):
            image, mask = square(rng, base)
            write(home / f"test/dent/{i:03}.png", image)
            write(home / f"ground_truth/dent/{i:03}_mask.png", mask)
    for kind in KINDS:
        for i in (1, 2):
            write(root / f"neu_det/IMAGES/{kind}_{i}.jpg", square(rng, 60)[0])
            place = root / f"neu_det/ANNOTATIONS/{kind}_{i}.xml"
            place.parent.mkdir(exist_ok=True)
            place.write_text(annotation((1, 1, 9, 9), size=(64, 80)))
    return root


@pytest.fixture(scope="module")
def out(data: Path) -> Path:
    """What the study writes, with networks of random weights for those of the hub."""
    torch.manual_seed(0)
    networks = []
    for name in NETWORKS:
        network = timm.create_model(name, num_classes=0)
        save_file(network.state_dict(), data / f"{name}.safetensors")
        networks.append(f"  {name}: {{backbone: {name}, weights: {name}.safetensors}}")
    more = "max_missed: 0.2\nnetworks:\n" + "\n".join(networks)
    summary = run(data, "cascades", f"{SOURCES}{more}\n")
    assert summary.experiments[0].error is None
    return data / "out/cascades"


def run(data: Path, name: str, more: str) -> Any:
    head = f"study: {FOLDER}/study.py\nname: {name}\nseeds: [3]\nmax_train: 24\nmax_test: 15\n"
    file = data / f"{name}.yaml"
    file.write_text(head + "shrink: 3\nmax_missed: 0.5\nrounds: 1\nengine: torch\n" + more)
    return run_studies([file], data / "out", data_root=data, log_level="ERROR")


def table(out: Path, what: str) -> Any:
    rows = pd.read_csv(out / "rows.csv")
    return rows[rows["what"] == what]


def test_the_rows_have_all_experiments_and_splits(out: Path) -> None:
    assert (out / "table.csv").read_text().splitlines()[0] == COLUMNS
    rows = table(out, "images")
    found = list(zip(rows["experiment_id"], rows["split"], strict=True))
    assert sorted(found) == sorted((e, s) for e in EXPERIMENTS for s in SPLITS)
    assert (rows["latency_ms"] > 0).all()
    # One class alone has no ranking.
    for figure in ("auroc", "pr_auc"):
        assert (rows[figure].isna() == (rows["split"] == "neu_test")).all()
    for figure in ("accuracy", "recall", "heatmap_call_rate"):
        assert rows[figure].between(0, 1).all()
    alone = rows[rows["experiment_id"].str.startswith("baseline")]
    assert (alone["heatmap_call_rate"] == 1).all()
    assert alone["auroc"].iloc[0] > 0.8  # white squares on gray
    counted = rows[[c for c in rows if "_called_" in c]].sum(axis=1)
    assert (counted == rows["n_normal"] + rows["n_anomalous"]).all()


def test_the_splits_are_disjoint_and_two_thirds_normal(data: Path) -> None:
    splits, same, other = draw(data, 3, 3, 4)
    paths = [path for split in splits.values() for path, _ in split]
    assert len(set(paths)) == len(paths)
    assert not any(label for _, label in splits["train_normal"])
    assert all(label for name in ("labelled", "neu_test") for _, label in splits[name])
    assert len(splits["neu_test"]) == 2 * len(KINDS)
    for name in ("val_mix", "test_mix"):
        normal = [1 - label for _, label in splits[name]]
        assert np.mean(normal) == pytest.approx(0.66, abs=0.02)
        for material in ("kolektor", "cable", "tile"):
            labels = {label for path, label in splits[name] if material in path.parts}
            assert labels == {0, 1}
    parts = [
        {path.parent.name for path, _ in splits[name] if "kolektor" in path.parts}
        for name in ("train_normal", "labelled", "val_mix", "test_mix")
    ]
    assert parts[2].isdisjoint(parts[3])
    assert (parts[0] | parts[1]).isdisjoint(parts[2] | parts[3])
    assert splits == same != other


def test_images_of_one_tile_stay_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for tile in range(40):
        place = ("test/dent", "test/good", "train/good", "train/good")[tile % 4]
        for light in range(1, 4):
            name = f"exp{light}_num_{1000 * tile + 40 * light}"
            write(tmp_path / "magnetic_tile" / place / f"{name}.jpg", wall(rng, 120))
    write(tmp_path / "neu_det/IMAGES/crazing_1.jpg", wall(rng, 60))
    (tmp_path / "neu_det/ANNOTATIONS").mkdir()
    (tmp_path / "neu_det/ANNOTATIONS/crazing_1.xml").write_text(annotation((1, 1, 9, 9)))
    (splits,) = draw(tmp_path, 0)
    of = {
        name: {int(path.stem.split("_")[-1]) // 1000 for path, _ in split}
        for name, split in splits.items()
        if name != "neu_test"
    }
    assert sum(map(len, of.values())) == len(set().union(*of.values()))
    for name in ("val_mix", "test_mix"):
        assert len(of[name]) > 4
        normal = [1 - label for _, label in splits[name]]
        assert np.mean(normal) == pytest.approx(0.66, abs=0.05)


def test_a_data_set_can_be_taken_as_it_comes(data: Path) -> None:
    (splits,) = draw(data, 0, delivered=True)
    fitted_on = {path for path, _ in splits["train_normal"] if "mvtec" in path.parts}
    assert fitted_on == set((data / "mvtec").rglob("train/good/*.png"))
    for name in ("val_mix", "test_mix", "labelled"):
        found = {path for path, _ in splits[name] if "mvtec" in path.parts}
        assert found <= set((data / "mvtec").rglob("test/*/*.png"))
    paths = [path for split in splits.values() for path, _ in split]
    assert len(set(paths)) == len(paths)


def draw(
    data: Path, *seeds: int, delivered: bool = False
) -> list[dict[str, list[tuple[Path, int]]]]:
    """Paths and labels, by split, as the benchmark's own module draws them for each seed."""
    code = """
import json, sys
from pathlib import Path
from splits import draw_splits
d, delivered = Path(sys.argv[1]), sys.argv[2] == "True"
for seed in sys.argv[3:]:
    more = {name: d / name for name in ("kolektor", "mvtec") if (d / name).is_dir()}
    found, parts = draw_splits(int(seed), data=d, delivered=delivered, **more)
    assert set(parts) == {s.path for k in ("train_normal", "labelled") for s in found[k]}
    print(json.dumps({k: [(str(s.path), s.label) for s in v] for k, v in found.items()}))
"""
    command = [sys.executable, "-c", code, str(data), str(delivered), *map(str, seeds)]
    said = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True).stdout
    return [
        {k: [(Path(p), y) for p, y in split] for k, split in json.loads(line).items()}
        for line in said.splitlines()
    ]


def test_noise_is_noise_in_the_table(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An AUROC of 24 images deviates by 0.12, the mean of 20 by 0.03."""
    file = data / "noise.yaml"
    file.write_text(
        f"study: {FOLDER}/study.py\nname: noise\nseeds: [{', '.join(map(str, range(20)))}]\n"
        f"max_train: 4\nmax_test: 24\nexperiments: [baseline_patchcore]\n{SOURCES}"
    )
    study = open_study(file)
    monkeypatch.setattr(study.module, "build", lambda _, seed, *__: Noise(random_state=seed))
    nothing = Image.new("RGB", (8, 8))
    monkeypatch.setattr(study.module.pictures, "samples", lambda *_: nothing)
    [experiment] = run_studies([study], data / "out", data_root=data).experiments
    assert experiment.error is None
    found = pd.read_csv(data / "out/noise/table.csv").set_index("split")
    for split in ("val_mix", "test_mix"):
        for figure in ("auroc", "accuracy", "recall"):
            assert found.loc[split, figure] == pytest.approx(0.5, abs=0.15)
    assert found.loc["neu_test", "recall"] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("name", CASCADES)
def test_each_sweep_has_the_grid_of_the_source(out: Path, name: str) -> None:
    rows = table(out, "sweep")
    rows = rows[rows["experiment_id"] == name]
    for split in ("val_mix", "test_mix"):
        some = rows[rows["split"] == split]
        grid = some[some["grid"] == "source"]
        assert len(grid) == len(grid[["t_low", "t_high"]].drop_duplicates()) == 88
        assert (grid["t_low"].min(), grid["t_low"].max()) == (0.001, 0.05)
        assert (grid["t_high"].min(), grid["t_high"].max()) == (0.01, 0.5)
        assert (some["grid"] == "automatic").sum() == 1
        own = some[some["grid"] == "own"]
        assert (own["heatmap_call_rate"] > 0).any()
        both = pd.concat([grid, own])
        assert (both["heatmap_call_rate"][both["t_low"] > both["t_high"]] == 0).all()
        front = both[both["pareto"].astype(str) == "True"]
        assert (front["false_alarm_rate"] <= 0.1).all()


def test_the_line_weights_normal_images_nineteen_to_one(out: Path) -> None:
    lines = table(out, "line").set_index("experiment_id")
    assert set(lines.index) == set(CASCADES)
    for name, line in lines.iterrows():
        assert line["alone"] == f"baseline_patchcore{'_r18' * name.endswith('r18')}"
        assert line["ms"] > 0
        assert line["ms_alone"] > 0
        # The thresholds compared make the same false alarms, unless scores are equal.
        assert line["false_alarm_rate_alone_equal"] == pytest.approx(line["false_alarm_rate"])
        assert 0 <= line["recall_alone_equal"] <= 1
        assert 0 <= line["heatmap_call_rate"] <= 1


def test_the_text_tells_reported_from_measured(out: Path) -> None:
    measured, reported = (out / "table.md").read_text().split("Reported elsewhere, not measured")
    assert "padim_baseline" not in measured
    assert "SWcapstone" in reported
    for name in ("on a line", "grid of the source", "thresholds by val mix"):
        assert f"## {name}" in measured


def test_what_cannot_run_is_named(data: Path) -> None:
    gone = "networks: {mobilenetv3_small_100: {backbone: mobilenetv3_small_100, weights: gone.pt}}"
    names = "experiments: [gate_mnv3_patchcore_r18, baseline_patchcore]"
    resnet = "resnet18: {backbone: resnet18, weights: gone.pt}}"
    summary = run(data, "other", f"{SOURCES}{gone[:-1]}, {resnet}\n{names}\n")
    [experiment] = summary.experiments
    assert experiment.status == "success"
    assert set(experiment.left_out) == {"mobilenetv3_small_100", "resnet18"}
    found = set(table(data / "out/other", "images")["experiment_id"])
    assert found == {"baseline_patchcore"}


@pytest.mark.parametrize(
    "name",
    [
        "confusion",
        *(f"sweep_{c}" for c in CASCADES),
        *(f"samples_{e}" for e in sorted(EXPERIMENTS)),
    ],
)
def test_the_pictures_show_something(out: Path, name: str) -> None:
    pixels = np.asarray(Image.open(out / f"{name}.png").convert("L"))
    assert min(pixels.shape) > 200
    assert pixels.std() > 10
