"""The benchmark of MahalanobisVFM, run on a miniature of MVTec AD 2."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

RUN = Path(__file__).parents[1] / "benchmarks" / "mahalanobis_vfm" / "run.py"
VARIANTS = ["none", "lora", "adaptive", "multi_scale", "attention_guided"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the benchmark writes about two categories, with a small network of random weights."""
    folder = tmp_path_factory.mktemp("benchmark")
    rng = np.random.default_rng(0)
    for category, base in (("can", 110), ("fabric", 150)):
        for place, n in (("train", 14), ("validation", 3), ("test_public", 5)):
            for i in range(n):
                write(folder / category / place / f"good/{i:03}.png", wall(rng, base))
        for i in range(5):
            image, mask = wall(rng, base), np.zeros((80, 64), np.uint8)
            image[10 + 8 * i : 26 + 8 * i, 20:40] = 250
            mask[10 + 8 * i : 26 + 8 * i, 20:40] = 255
            write(folder / category / f"test_public/bad/{i:03}.png", image)
            truth = f"test_public/ground_truth/bad/{i:03}_mask.png"
            write(folder / category / truth, mask)
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    save_file(network.state_dict(), folder / "vit.safetensors")
    options = (
        f"--root {folder} --backbone test_vit --weights {folder}/vit.safetensors --image-size 64 "
        f"--epochs 1 --seeds 0 1 --out {folder}/out"
    )
    subprocess.run([sys.executable, "-W", "ignore", str(RUN), *options.split()], check=True)
    return folder / "out"


def wall(rng: np.random.Generator, base: int) -> np.ndarray:
    slope = np.linspace(0, 40, 64)
    return np.clip(base + slope + rng.integers(-10, 11, (80, 64)), 0, 255).astype(np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_the_table_has_all_runs(out: Path) -> None:
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((r["dataset"], r["variant"], r["seed"]) for r in rows) == sorted(
        (d, v, s) for d in ("can", "fabric") for v in VARIANTS for s in "01"
    )
    for row in rows:
        for figure in ("image_auroc", "pixel_auroc", "aupro_30", "aupro_05", "seg_f1"):
            assert 0 <= float(row[figure]) <= 1
        assert (row["n_train"], row["n_test"]) == ("14", "10")
        assert float(row["test_ms"]) > 0
    plain = [float(r["image_auroc"]) for r in rows if r["variant"] == "none"]
    assert np.mean(plain) > 0.8  # white squares on gray


def test_the_summary_tells_reported_from_measured(out: Path) -> None:
    summary = (out / "performance_summary.txt").read_text()
    assert re.search(r"can: LoRA \(v1.1\) 0.5528; measured [01]\.", summary)
    assert re.search(r"fabric: LoRA \(v1.1\) 0.6520; measured [01]\.", summary)
    assert "walnuts: LoRA (v1.1) 0.5844\n" in summary
    assert "not measured here" in summary


@pytest.mark.parametrize(
    "name", ["anomaly_scores", "roc_curves", "sample_detections", "feature_analysis"]
)
def test_the_pictures_show_something(out: Path, name: str) -> None:
    pixels = np.asarray(Image.open(out / f"{name}.png").convert("L"))
    assert min(pixels.shape) > 200
    assert pixels.std() > 10
