"""The benchmark of MahalanobisVFM, run on a miniature of MVTec AD 2."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from study_fixtures import Noise, make_mvtec_ad

pd = pytest.importorskip("pandas", reason="needs the extra benchmarks")

from anomalib_lite.studies import open_study, run_studies  # noqa: E402

STUDY = Path(__file__).parents[1] / "benchmarks" / "mahalanobis_vfm" / "study.py"
VARIANTS = ["none", "lora", "adaptive", "multi_scale", "attention_guided"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the weights of a small network, drawn at random."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """What the benchmark writes about two categories, with a small network of random weights."""
    root = tmp_path_factory.mktemp("benchmark")
    folder = root / "mvtec_ad_2"
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
    (root / "vfm.yaml").write_text(
        f"{{study: {STUDY}, name: vfm, categories: [mvtec_ad_2/can, mvtec_ad_2/fabric], "
        "seeds: [0], epochs: 1, "
        f"network: {{backbone: test_vit, weights: {weights}, image_size: 64}}}}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images, and an update that gains nothing
        summary = run_studies([root / "vfm.yaml"], root / "out", data_root=root, log_level="ERROR")
    assert summary.experiments[0].error is None
    return root / "out/vfm"


def wall(rng: np.random.Generator, base: int) -> np.ndarray:
    slope = np.linspace(0, 40, 64)
    return np.clip(base + slope + rng.integers(-10, 11, (80, 64)), 0, 255).astype(np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_the_table_has_all_runs(out: Path) -> None:
    rows = pd.read_csv(out / "rows.csv")
    found = sorted(rows[["category", "variant", "seed"]].itertuples(index=False, name=None))
    categories = ("mvtec_ad_2/can", "mvtec_ad_2/fabric")
    assert found == sorted((c, v, 0) for c in categories for v in VARIANTS)
    for figure in ("image_auroc", "pixel_auroc", "aupro", "aupro_05", "seg_f1"):
        assert rows[figure].between(0, 1).all()
    assert set(rows["n_train"]) == {14}
    assert set(rows["n_test"]) == {10}
    assert (rows["test_ms"] > 0).all()
    assert rows[rows["variant"] == "none"]["image_auroc"].mean() > 0.8  # white squares on gray
    # Variants that share the adaptation of "lora" open its weights.
    weights = rows.set_index(["category", "seed", "variant"])["weights_sha256"]
    for case in weights.index.droplevel("variant").unique():
        assert weights[(*case, "multi_scale")] == weights[(*case, "attention_guided")]
        assert weights[(*case, "none")] == weights[(*case, "lora")]


def test_the_summary_tells_reported_from_measured(out: Path) -> None:
    measured, reported = (out / "table.md").read_text().split("Reported elsewhere, not measured")
    assert "0.5528" in reported
    assert "0.5528" not in measured
    gains = pd.read_csv(out / "gain_of_image_auroc_over_none.csv")
    rows = pd.read_csv(out / "rows.csv").set_index(["category", "seed", "variant"])["image_auroc"]
    first = gains.iloc[0]
    case = (first["category"], first["seed"])
    assert first["lora"] == pytest.approx(rows[(*case, "lora")] - rows[(*case, "none")])


class NoisyDetector(Noise):
    adapter_ = None
    backbone_ = SimpleNamespace(sha256="0" * 64)

    def _with_options(self, **options: Any) -> Any:
        return self

    def score(self, images: Any) -> np.ndarray:
        return 1 + self.random.rand(len(images))

    def anomaly_map(self, images: Any) -> np.ndarray:
        return self.random.rand(len(images), 40, 48)


def test_noise_is_noise_in_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    """An AUROC of 8 images deviates by 0.2, the mean of 40 by 0.03."""
    make_mvtec_ad(tmp_path / "mvtec_ad", ("bottle",), n=4)
    seeds = ", ".join(map(str, range(40)))
    (tmp_path / "vfm.yaml").write_text(
        f"{{study: {STUDY}, name: vfm, categories: [mvtec_ad/bottle], seeds: [{seeds}], "
        f"network: {{backbone: test_vit, weights: {weights}}}}}"
    )
    study = open_study(tmp_path / "vfm.yaml")
    monkeypatch.setattr(study.module, "MahalanobisVFM", NoisyDetector)
    summary = run_studies([study], tmp_path / "out", data_root=tmp_path, log_level="ERROR")
    assert summary.experiments[0].error is None
    for name in ("table", "per_category"):
        table = pd.read_csv(tmp_path / "out/vfm" / f"{name}.csv")
        for column in ("image_auroc", "pixel_auroc"):
            assert ((table[column] - 0.5).abs() < 0.15).all()
    gains = pd.read_csv(tmp_path / "out/vfm/gain_of_image_auroc_over_none.csv")
    assert (gains[VARIANTS[1:]].mean().abs() < 0.2).all()


@pytest.mark.parametrize(
    "name", ["anomaly_scores", "roc_curves", "sample_detections", "feature_analysis"]
)
def test_the_pictures_show_something(out: Path, name: str) -> None:
    pixels = np.asarray(Image.open(out / f"{name}.png").convert("L"))
    assert min(pixels.shape) > 200
    assert pixels.std() > 10
