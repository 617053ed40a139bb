"""Does it help to adapt a foundation model? MahalanobisVFM in five variants on several data sets.

    python benchmarks/mahalanobis_vfm/run.py --weights dinov2_vits14_saliency.safetensors
    python benchmarks/mahalanobis_vfm/run.py --root /path/to/mvtec_ad_2 --full
    python benchmarks/mahalanobis_vfm/run.py --quick

README.md says what is measured; report.py makes the tables and pictures from what this writes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

BACKBONE = "vit_small_patch14_dinov2.lvd142m"
# The source's versions, and their parameters here.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "lora": {"adapt": "lora"},
    "adaptive": {"adapt": "lora", "adaptive": True},
    "multi_scale": {"adapt": "lora", "multi_scale": True},
    "attention_guided": {"adapt": "lora", "attention_guided": True},
}
# Small, so that all is measured on two cores in an hour; textile's defects are some ten pixels of
# 250 wide.
SIZES = {"magnetic_tile": 126, "textile": 182, "solar_cells": 126}
# Number of images in the pictures.
N_SHOWN = 6


def measure(options: dict[str, Any], name: str, seed: int, out: Path) -> None:
    """Measure all variants on one data set with one seed: figures as JSON, arrays for pictures."""
    from sources import open_source

    from anomalib_lite import MahalanobisVFM

    root = Path(options["root"]) if options["root"] else None
    source = open_source(name, seed, options["train"], options["test"], root)
    runs: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {"labels": [s.label for s in source.test]}
    with tempfile.TemporaryDirectory() as folder:
        adapted: Path | None = None
        for variant in options["variants"]:
            parameters = dict(VARIANTS[variant])
            weights = options["weights"]
            shares = adapted is not None and variant in ("multi_scale", "attention_guided")
            if shares:
                # The adaptation would equal, to the bit, that of "lora" with this seed.
                del parameters["adapt"]
                weights = str(adapted)
            detector = MahalanobisVFM(
                options["backbone"],
                weights=weights,
                image_size=options["image_size"] or SIZES[name],
                false_alarm_rate=0.05,
                epochs=options["epochs"],
                random_state=seed,
                **parameters,
            )
            began = time.perf_counter()
            detector.fit(source.train)
            fit_s = time.perf_counter() - began
            record, more = judge(detector, source)
            adapter = detector.adapter_
            if adapter is not None and variant == "lora":
                adapted = Path(folder, "adapted.safetensors")
                write_adapted(detector, options, adapted)
            runs.append(
                {
                    "dataset": name,
                    "variant": variant,
                    "seed": seed,
                    "fit_s": None if shares else fit_s,
                    **record,
                    "rank": adapter and adapter.rank,
                    "epochs": adapter and len(adapter.history),
                    "history": adapter and adapter.history,
                }
            )
            arrays |= {f"{variant}.{key}": value for key, value in more.items()}
            print(name, seed, variant, json.dumps(record), f"fit {fit_s:.0f} s", flush=True)
    write(out, name, seed, source, {"options": options, "runs": runs}, arrays)


def judge(detector: Any, source: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures of a fitted detector, and the arrays for its pictures."""
    import numpy as np

    from anomalib_lite.metrics import aupro, auroc, pixel_auroc, seg_f1

    began = time.perf_counter()
    found = detector.detect(source.test)
    ms = 1000 * (time.perf_counter() - began) / len(source.test)
    labels = np.array([s.label for s in source.test])
    record: dict[str, Any] = {
        "image_auroc": auroc(labels, found.scores),
        "false_alarm_rate": float(found.labels[labels == 0].mean()),
        "recall": float(found.labels[labels == 1].mean()),
        "test_ms": ms,
    }
    if source.has_masks:
        masks = [mask_of(s) for s in source.test]
        # The threshold of the data set's paper, from normal images that nothing was fitted on.
        normal = np.concatenate([np.ravel(m) for m in detector.anomaly_map(source.validation)])
        threshold = float(normal.mean() + 3 * normal.std())
        record |= {
            "pixel_auroc": pixel_auroc(masks, found.maps),
            "aupro_30": aupro(masks, found.maps, 0.3),
            "aupro_05": aupro(masks, found.maps, 0.05),
            "seg_f1": seg_f1(masks, found.maps, threshold),
        }
    whole, patch = distances(detector, source.test)
    more = {
        "scores": found.scores,
        "threshold": detector.threshold_,
        "whole": whole,
        "patch": patch,
    }
    for i in shown(labels):
        more[f"map.{i}"] = found.maps[i]
    return record, more


def shown(labels: Any) -> list[int]:
    """Choose the test images in the pictures: anomalous ones, and one normal one."""
    normal = [i for i, y in enumerate(labels) if y == 0][:1]
    return [i for i, y in enumerate(labels) if y == 1][: N_SHOWN - 1] + normal


def distances(detector: Any, samples: list[Any]) -> tuple[Any, Any]:
    """Compute for each image the distance of the whole, and the largest of its patches."""
    import copy

    import numpy as np

    whole, patch = copy.copy(detector), copy.copy(detector)
    whole.global_weight, patch.global_weight = 1.0, 0.0
    return tuple(np.asarray(d.score(samples)) for d in (whole, patch))


def mask_of(sample: Any) -> Any:
    import numpy as np
    from PIL import Image

    if sample.mask_path is None:
        return None
    return np.asarray(Image.open(sample.mask_path).convert("L")) > 127


def write_adapted(detector: Any, options: dict[str, Any], path: Path) -> None:
    """Save the backbone's weights with the LoRA update added to them."""
    from safetensors.torch import save_file

    from anomalib_lite.backbones import Backbone

    backbone = Backbone(
        options["backbone"],
        weights=options["weights"],
        adapter=detector.adapter_,
        device="cpu",
        dtype="float32",
    )
    save_file({k: v.contiguous() for k, v in backbone.network.state_dict().items()}, path)


def write(out: Path, name: str, seed: int, source: Any, found: dict[str, Any], arrays: Any) -> None:
    import numpy as np

    for run in found["runs"]:
        run |= {"n_train": len(source.train), "n_test": len(source.test)}
    labels = arrays["labels"]
    arrays["paths"] = [str(source.test[i].path) for i in shown(labels)]
    arrays["masks"] = [str(source.test[i].mask_path or "") for i in shown(labels)]
    arrays["shown"] = shown(labels)
    np.savez_compressed(out / f"{name}-{seed}.npz", **{k: np.asarray(v) for k, v in arrays.items()})
    (out / f"{name}-{seed}.json").write_text(json.dumps(found))


def main() -> None:
    from report import report
    from sources import NAMES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--datasets", nargs="+", help="default: all, or all categories of --root")
    parser.add_argument("--root", help="MVTec AD 2's folder: its categories are measured instead")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--backbone", default=BACKBONE, help="any ViT of timm's (default: %(default)s)"
    )
    parser.add_argument("--weights", help="its weights file; default: from the hub")
    parser.add_argument("--image-size", type=int, help="default: small, see SIZES")
    parser.add_argument("--train", type=int, default=80, help="normal images to fit on, at most")
    parser.add_argument("--test", type=int, default=200, help="images to test on, at most")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="512 px, all images, ViT-B/14")
    parser.add_argument("--quick", action="store_true", help="does it all work? a minute or two")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of one thread")
    parser.add_argument("--out", type=Path, default=Path("mahalanobis_vfm-output"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.full:
        arguments.backbone = "vit_base_patch14_dinov2.lvd142m"
        arguments.image_size, arguments.train, arguments.test = 512, None, None
    if arguments.quick:
        arguments.image_size, arguments.train, arguments.test = 70, 30, 24
        arguments.epochs, arguments.seeds = 1, [0]
    options = {k: v for k, v in vars(arguments).items() if k not in ("out", "worker", "jobs")}
    if arguments.worker:
        measure(options, arguments.worker[0], int(arguments.worker[1]), arguments.out)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = arguments.datasets
    if arguments.root and not arguments.image_size:
        parser.error("--root needs --image-size or --full")
    if not names and arguments.root:
        from anomalib_lite.datasets import MVTecAD2

        names = MVTecAD2.categories(arguments.root)
    names = names or list(NAMES)
    jobs = [(n, s) for s in arguments.seeds for n in names]
    jobs = [job for job in jobs if not is_done(arguments.out, *job, options)]
    run_all(jobs, arguments.jobs)
    options["sizes"] = options["image_size"] or ", ".join(f"{n} {SIZES[n]}" for n in names)
    options["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    report(arguments.out, names, options)


def is_done(out: Path, name: str, seed: int, options: dict[str, Any]) -> bool:
    """Tell whether the figures of an earlier run with the same options exist."""
    path = out / f"{name}-{seed}.json"
    if not path.exists():
        return False
    then = json.loads(path.read_text())["options"]
    return all(then[k] == options[k] for k in options if k not in ("datasets", "seeds"))


def run_all(jobs: list[tuple[str, int]], n_at_once: int) -> None:
    """Run each data set and seed in a process of one thread, ``n_at_once`` at a time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    waiting = list(jobs)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < n_at_once:
            name, seed = waiting.pop(0)
            command = [sys.executable, *sys.argv, "--worker", name, str(seed)]
            running.append(subprocess.Popen(command, env=environment))
        time.sleep(0.2)
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode:
                for other in running:
                    other.kill()
                sys.exit(f"{process.args[-2]} with seed {process.args[-1]} failed")


if __name__ == "__main__":
    main()
