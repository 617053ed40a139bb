"""One run of anomalib in its own process and its own environment.

``worker_anomalib.py job.json``. Tasks: ``patchcore`` (fit and test, through anomalib's Engine or
as its bare model in a plain loop), ``coreset`` (KCenterGreedy alone), ``embed`` (store the
patch embeddings for both coresets), ``store`` (save a fitted bare model for the next two),
``latency`` (single images and batches) and ``start`` (from process start to the first score).
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anomalib_model import (
    LAYERS,
    TIMM_NAME,
    build_model,
    check_backbone,
    load_batch,
    make_transform,
    start_torch,
)
from measuring import (
    PROCESS_START,
    Predictions,
    Stopwatch,
    environment,
    peak_rss_mb,
    reached,
    read_job,
    time_singly,
    write_result,
)

if TYPE_CHECKING:
    import torch
    from anomalib.models import Padim, Patchcore
    from torch import nn

DISTRIBUTIONS = (
    "anomalib", "torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn", "pillow",
)  # fmt: skip


def main() -> None:
    """Do the task and write the result."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    job = read_job()
    tasks = {
        "patchcore": run_patchcore,
        "coreset": run_coreset,
        "embed": run_embed,
        "store": run_store,
        "latency": run_latency,
        "start": run_start,
    }
    result = tasks[job["task"]](job)
    result |= environment(*DISTRIBUTIONS)
    write_result(job, result)


def run_patchcore(job: dict[str, Any]) -> dict[str, Any]:
    """Fit on the training images and score the test images, with ``job["variant"]``."""
    watch = Stopwatch()
    variants: dict[str, type[EngineRun | BareRun]] = {"engine": EngineRun, "bare": BareRun}
    variant = variants[job["variant"]]
    variant.import_peer()
    result: dict[str, Any] = watch.read("import")
    result["rss_after_import_mb"] = peak_rss_mb()
    start_torch(job)

    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        watch = Stopwatch()
        model = build_model(job)
        run = variant(job, model, Path(folder))
        result |= watch.read("build")

        watch = Stopwatch()
        run.fit()
        result |= watch.read("fit")
        result["peak_rss_after_fit_mb"] = peak_rss_mb()

        watch = Stopwatch()
        predictions = Predictions(job["predictions"])
        run.test(predictions)
        result |= watch.read("test")
        result["script_s"] = time.perf_counter() - PROCESS_START
    result["peak_rss_mb"] = peak_rss_mb()  # before anything is stacked, saved or scored

    padim = job["method"] == "padim"
    bank = (model.model.gaussian.mean.T if padim else model.model.memory_bank).numpy()
    result["bank_shape"] = bank.shape
    result["settings"] = settings(job, model)
    result["settings"]["backbone_check_max_abs_difference"] = check_backbone(job, model)
    predictions.finish(bank)
    return result


class EngineRun:
    """anomalib as its documentation shows it: a Folder data module and the Engine.

    All that costs time or memory and is not needed for fit or scores is off: validation (which
    would score the test images inside ``fit``), logging, checkpoints, progress bars,
    visualisation, metrics, and masks (none are passed, so none are read).
    """

    def __init__(self, job: dict[str, Any], model: Patchcore | Padim, folder: Path) -> None:
        from anomalib.data import Folder
        from anomalib.engine import Engine

        link_images(job["train"], folder / "train")
        for label, name in enumerate(("good", "bad")):
            link_images(job["test"], folder / name, [y == label for y in job["labels"]])
        self.model = model
        self.data = Folder(
            name="peer",
            normal_dir=folder / "train",
            normal_test_dir=folder / "good",
            abnormal_dir=folder / "bad",
            train_batch_size=job["batch_size"],
            eval_batch_size=job["batch_size"],
            num_workers=job["num_workers"],
            val_split_mode="none",
        )
        self.collector = collector()
        self.engine = Engine(
            callbacks=[self.collector],
            default_root_dir=folder / "results",
            barebones=True,
            limit_val_batches=0,
            accelerator="cpu",
        )

    @staticmethod
    def import_peer() -> None:
        """Import what this variant uses."""
        import anomalib.data
        import anomalib.engine
        import anomalib.models  # noqa: F401

    def fit(self) -> None:
        """``Engine.fit``: load, embed and keep the coreset."""
        self.engine.fit(model=self.model, datamodule=self.data)

    def test(self, predictions: Predictions) -> None:
        """``Engine.predict``; scores and maps go to ``predictions`` batch by batch."""
        self.collector.predictions = predictions
        self.engine.predict(model=self.model, datamodule=self.data, return_predictions=False)


def link_images(paths: list[str], folder: Path, wanted: list[bool] | None = None) -> None:
    """Link the wanted images into one folder, named by their position in ``paths``."""
    folder.mkdir()
    for i, path in enumerate(paths):
        if wanted is None or wanted[i]:
            (folder / f"{i:05d}{Path(path).suffix}").symlink_to(path)


def collector() -> Any:
    """Make a Lightning callback that passes on score and map of each image, with its position."""
    from lightning.pytorch import Callback

    class Collector(Callback):  # type: ignore[misc]
        """Keeps no images, unlike ``Engine.predict(return_predictions=True)``."""

        predictions: Predictions

        def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            positions = [int(Path(path).stem) for path in outputs.image_path]
            maps = outputs.anomaly_map.squeeze(1).numpy()
            self.predictions.add(positions, outputs.pred_score.flatten().tolist(), maps)

    return Collector()


class BareRun:
    """anomalib's own PatchcoreModel and pre-processor in a plain loop, without the Engine."""

    def __init__(self, job: dict[str, Any], model: Patchcore | Padim, folder: Path) -> None:
        self.job, self.model = job, model

    @staticmethod
    def import_peer() -> None:
        """Import what this variant uses."""
        import anomalib.models  # noqa: F401

    def fit(self) -> None:
        """Embed every training image, then keep the coreset."""
        import torch

        self.model.train()
        with torch.inference_mode():
            for start in range(0, len(self.job["train"]), self.job["batch_size"]):
                self.model.model(self.batch(self.job["train"], start))
            self.model.fit()

    def test(self, predictions: Predictions) -> None:
        """Score the test images; scores and maps go to ``predictions`` batch by batch."""
        import torch

        self.model.eval()
        with torch.inference_mode():
            for start in range(0, len(self.job["test"]), self.job["batch_size"]):
                found = self.model.model(self.batch(self.job["test"], start))
                scores, maps = (
                    found.pred_score.flatten().tolist(),
                    found.anomaly_map.squeeze(1).numpy(),
                )
                predictions.add(range(start, start + len(scores)), scores, maps)

    def batch(self, paths: list[str], start: int) -> torch.Tensor:
        """Read and pre-process one batch with anomalib's own functions."""
        transform = self.model.pre_processor.transform
        return load_batch(transform, paths[start : start + self.job["batch_size"]])


def settings(job: dict[str, Any], model: Patchcore | Padim) -> dict[str, Any]:
    """Return the settings of the peer."""
    return {
        "variant": job["variant"],
        "backbone": TIMM_NAME,
        "layers": list(LAYERS[job["method"]]),
        "transform": [str(t) for t in model.pre_processor.transform.transforms],
        **(
            {
                "n_features": model.model.n_features,
            }
            if job["method"] == "padim"
            else {
                "coreset_sampling_ratio": model.coreset_sampling_ratio,
                "num_neighbors": model.model.num_neighbors,
            }
        ),
        "batch_size": job["batch_size"],
        "num_workers": job["num_workers"] if job["variant"] == "engine" else None,
        "dtype": "float32",
    }


def run_coreset(job: dict[str, Any]) -> dict[str, Any]:
    """Pick ``n_samples`` rows of the stored embeddings, after a small warm-up call."""
    watch = Stopwatch()
    import torch
    from anomalib.models.components import KCenterGreedy

    result: dict[str, Any] = watch.read("import")
    start_torch(job)
    X = torch.from_numpy(np.load(job["embeddings"])[: job["n_rows"]])
    KCenterGreedy(X[:1000].clone(), 0.01).select_coreset_idxs()
    rss_before = peak_rss_mb()

    watch = Stopwatch()
    sampler = KCenterGreedy(X, (job["n_samples"] + 0.5) / len(X))
    picks = sampler.select_coreset_idxs()
    result |= watch.read("coreset")
    result |= {"rss_before_mb": rss_before, "peak_rss_mb": peak_rss_mb()}
    result["projected_to"] = int(sampler.model.n_components)
    result["picks"] = picks
    return result


def run_embed(job: dict[str, Any]) -> dict[str, Any]:
    """Store the patch embeddings (N, D) of the training images, from the peer's own model."""
    import torch

    start_torch(job)
    model = build_model(job)
    run = BareRun(job, model, Path())
    model.train()
    with torch.inference_mode():
        for start in range(0, len(job["train"]), job["batch_size"]):
            model.model(run.batch(job["train"], start))
    X = torch.vstack(model.model.embedding_store).numpy()
    np.save(job["embeddings"], X)
    return {"shape": X.shape}


def run_store(job: dict[str, Any]) -> dict[str, Any]:
    """Fit and store the whole bare model, which loads faster than weights into a new model."""
    import torch

    start_torch(job)
    model = build_model(job)
    check_backbone(job, model)
    BareRun(job, model, Path()).fit()
    bare = model.model.eval()
    torch.save(bare, job["stored"])
    score, _ = Bare(job, bare).detect(job["test"][0])
    return {"score": score, "settings": settings(job, model)}


class Bare:
    """The stored bare model with anomalib's reader and transform: the minimum to score."""

    def __init__(self, job: dict[str, Any], model: nn.Module) -> None:
        self.model, self.transform = model, make_transform(job)

    @classmethod
    def load(cls, job: dict[str, Any]) -> Bare:
        """Load the model that ``run_store`` stored."""
        import torch

        return cls(job, torch.load(job["stored"], weights_only=False))

    def detect(self, path: str) -> tuple[float, np.ndarray]:
        """Return score and map of one image; the model makes no score without a map."""
        scores, maps = self.detect_batch([path])
        return scores[0], maps[0]

    def detect_batch(self, paths: list[str]) -> tuple[list[float], np.ndarray]:
        """Return scores and maps (B, H, W)."""
        import torch

        with torch.inference_mode():
            found = self.model(load_batch(self.transform, paths))
            return found.pred_score.flatten().tolist(), found.anomaly_map.squeeze(1).numpy()


def run_latency(job: dict[str, Any]) -> dict[str, Any]:
    """Score images one by one, then the test images in batches, from paths each time."""
    start_torch(job)
    model, size = Bare.load(job), job["batch_size"]
    result: dict[str, Any] = time_singly("detect", model.detect, job["single"], job["n_warm_up"])
    model.detect_batch(job["test"][:size])
    watch = Stopwatch()
    for start in range(0, len(job["test"]), size):
        model.detect_batch(job["test"][start : start + size])
    return result | watch.read("batches") | {"peak_rss_mb": peak_rss_mb()}


def run_start(job: dict[str, Any]) -> dict[str, Any]:
    """Import, load and score one image, then another."""
    from anomalib.models.image.patchcore import torch_model  # noqa: F401

    result: dict[str, Any] = reached(job, "imports")
    result["rss_after_import_mb"] = peak_rss_mb()
    model = Bare.load(job)
    result |= reached(job, "loaded")
    result["score"], _ = model.detect(job["test"][0])
    result |= reached(job, "score")
    watch = Stopwatch()
    model.detect(job["test"][1])
    return result | watch.read("second") | {"peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    main()
