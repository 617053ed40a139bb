"""Does it help to adapt a foundation model? MahalanobisVFM in five variants, with several seeds."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from anomalib_lite import MahalanobisVFM
from anomalib_lite.backbones import Backbone
from anomalib_lite.metrics import aupro, auroc, pixel_auroc, seg_f1
from anomalib_lite.studies import NetworkConfig, StudyConfig, open_category

from . import pictures

# The source's versions, and their parameters here.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "lora": {"adapt": "lora"},
    "adaptive": {"adapt": "lora", "adaptive": True},
    "multi_scale": {"adapt": "lora", "multi_scale": True},
    "attention_guided": {"adapt": "lora", "attention_guided": True},
}
METRICS = ("image_auroc", "pixel_auroc", "aupro", "aupro_05", "seg_f1")
COLUMNS = ("category", "variant", "seed", *METRICS, "fit_s", "test_ms")
COMPARED = "variant"
QUICK = {"epochs": 1}
# Number of images in the pictures.
N_SHOWN = 6


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    network: NetworkConfig
    image_sizes: dict[str, int] = Field(default_factory=dict)
    variants: list[Literal[tuple(VARIANTS)]] = Field(  # type: ignore[valid-type]
        default_factory=lambda: list(VARIANTS)
    )
    epochs: int = 10


def measure(config: Config, run: Any) -> Any:
    """Yield a row for each category, variant and seed."""
    [network] = run.networks({config.network.backbone: config.network}).values()
    (run.results.folder / "arrays").mkdir(exist_ok=True)
    for case in run.cases(
        {"category": category, "seed": seed} for seed in run.seeds for category in run.categories
    ):
        images = run.open(case["category"], case["seed"])
        train, validation = divide(images, run)
        labels = np.array([sample.label for sample in images.test])
        arrays: dict[str, Any] = about_images(images.test, labels)
        with tempfile.TemporaryDirectory() as folder, run.without_cache():
            adapted: Path | None = None
            for variant in config.variants:
                size = config.image_sizes.get(images.dataset, network.image_size)
                options = {**network.parameters(), "image_size": size, **VARIANTS[variant]}
                shares = adapted is not None and variant in ("multi_scale", "attention_guided")
                if shares:
                    # The adaptation would equal, to the bit, that of "lora" with this seed.
                    del options["adapt"]
                    options["weights"] = adapted
                detector = MahalanobisVFM(
                    **options,
                    false_alarm_rate=0.05,
                    epochs=config.epochs,
                    random_state=case["seed"],
                    n_jobs=config.n_jobs,
                )
                began = time.perf_counter()
                run.fit(detector, train)
                row = {"variant": variant, "fit_s": None if shares else time.perf_counter() - began}
                found, more = judge(detector, images.test, labels, validation)
                adapter = detector.adapter_
                if adapter is not None and variant == "lora":
                    adapted = Path(folder, "adapted.safetensors")
                    write_adapted(detector, network, adapted)
                row |= {"rank": adapter and adapter.rank}
                row |= {"epochs": adapter and len(adapter.history), "n_train": len(train)}
                arrays |= {f"{variant}.{key}": value for key, value in more.items()}
                yield row | found
        np.savez_compressed(arrays_file(run.results.folder, **case), **arrays)


def divide(images: Any, run: Any) -> tuple[list[Any], list[Any]]:
    """Return images to fit on and normal ones for the threshold of pixels.

    The latter are those that the data set has for this, or a sixth of the images drawn.
    """
    dataset = open_category(images.category, run.data_root)
    validation = list(getattr(dataset, "validation", ()))
    if validation:
        return images.train, validation
    n = max(2, len(images.train) // 6)
    return images.train[n:], images.train[:n]


def judge(detector: Any, test: Any, labels: Any, validation: Any) -> tuple[Any, Any]:
    """Return the figures of a fitted detector, and the arrays for its pictures."""
    began = time.perf_counter()
    found = detector.detect(test)
    row: dict[str, Any] = {"test_ms": 1000 * (time.perf_counter() - began) / len(test)}
    row |= {
        "image_auroc": auroc(labels, found.scores),
        "false_alarm_rate": float(found.labels[labels == 0].mean()),
        "recall": float(found.labels[labels == 1].mean()),
        "n_test": len(test),
        "weights_sha256": detector.backbone_.sha256[:16],
    }
    if any(sample.mask_path for sample in test):
        masks = [sample.mask() for sample in test]
        # The threshold of the data set's paper, from normal images that nothing was fitted on.
        normal = np.concatenate([np.ravel(m) for m in detector.anomaly_map(validation)])
        threshold = float(normal.mean() + 3 * normal.std())
        row |= {
            "pixel_auroc": pixel_auroc(masks, found.maps),
            "aupro": aupro(masks, found.maps, 0.3),
            "aupro_05": aupro(masks, found.maps, 0.05),
            "seg_f1": seg_f1(masks, found.maps, threshold),
        }
    whole, patch = distances(detector, test)
    arrays = {"scores": found.scores, "threshold": detector.threshold_}
    arrays |= {"whole": whole, "patch": patch}
    return row, arrays | {f"map.{i}": found.maps[i] for i in shown(labels)}


def shown(labels: Any) -> list[int]:
    """Choose the test images in the pictures: anomalous ones, and one normal one."""
    normal = [i for i, y in enumerate(labels) if y == 0][:1]
    return [i for i, y in enumerate(labels) if y == 1][: N_SHOWN - 1] + normal


def about_images(test: Any, labels: Any) -> dict[str, Any]:
    """Return labels, and which images are in the pictures, with their files."""
    chosen = shown(labels)
    masks = [str(test[i].mask_path or "") for i in chosen]
    paths = [str(test[i].path) for i in chosen]
    return {"labels": labels, "shown": chosen, "paths": paths, "masks": masks}


def distances(detector: Any, samples: Any) -> tuple[Any, Any]:
    """Compute for each image the distance of the whole, and the largest of its patches."""
    whole, patch = (detector._with_options(global_weight=weight) for weight in (1.0, 0.0))
    return np.asarray(whole.score(samples)), np.asarray(patch.score(samples))


def write_adapted(detector: Any, network: NetworkConfig, path: Path) -> None:
    """Save the backbone's weights with the LoRA update added to them."""
    from safetensors.torch import save_file

    backbone = Backbone(
        network.backbone,
        weights=network.weights,
        adapter=detector.adapter_,
        device="cpu",
        dtype="float32",
    )
    save_file({k: v.contiguous() for k, v in backbone.network.state_dict().items()}, path)


def arrays_file(folder: Path, category: str, seed: int) -> Path:
    """Return the file of what the pictures of a category show."""
    return folder / "arrays" / f"{category.replace('/', '-')}-{seed}.npz"


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return means by category, and the gain of each variant over none with the same seed."""
    columns = [name for name in (*METRICS, "fit_s", "test_ms") if name in table]
    groups = table.groupby(["category", "variant"], sort=False)[columns]
    made = {"per_category": groups.mean(), "spread": groups.std()}
    by_variant = table.pivot_table(
        index=["category", "seed"], columns="variant", values="image_auroc", sort=False
    )
    others = [name for name in config.variants if name != "none" and name in by_variant]
    if "none" in by_variant and others:
        gains = by_variant[others].sub(by_variant["none"], axis=0)
        made["gain_of_image_auroc_over_none"] = gains
    return made


def draw(table: Any, folder: Path, config: Config) -> None:
    """Draw scores, ROC curves, distances and examples of the first seed."""
    seed = table["seed"].iloc[0]
    variants = [name for name in config.variants if name in set(table["variant"])]
    arrays = {
        category: np.load(arrays_file(folder, category, seed))
        for category in table[table["seed"] == seed]["category"].unique()
    }
    means = table.groupby(["category", "variant"])["image_auroc"].mean()
    pictures.anomaly_scores(folder / "anomaly_scores.png", arrays, variants)
    pictures.roc_curves(folder / "roc_curves.png", arrays, variants, means)
    pictures.feature_analysis(folder / "feature_analysis.png", arrays, variants)
    pictures.sample_detections(folder / "sample_detections.png", arrays, variants)
