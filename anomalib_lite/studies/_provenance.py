"""What a row depends on beside its case: version, commit, machine, packages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from anomalib_lite._threads import n_cores
from anomalib_lite._version import __version__

__all__ = ["now", "of_backbones", "processor", "source_hash", "surroundings"]

_PACKAGE = Path(__file__).resolve().parents[1]


def now() -> str:
    """Return the time in UTC, such as ``2025-01-31T12:00:00+00:00``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def surroundings() -> dict[str, Any]:
    """Return version, commit, machine, cores and torch's version, as they are now.

    The number of cores may change while a process runs, as by ``OMP_NUM_THREADS``.

    >>> sorted(surroundings())
    ['commit', 'cores', 'machine', 'torch', 'version']
    """
    return {
        "version": __version__,
        "commit": commit(),
        "machine": processor(),
        "cores": n_cores(),
        "torch": importlib.metadata.version("torch"),
    }


@cache
def commit() -> str | None:
    """Return the commit of the checkout, with ``-dirty`` if files differ; None if installed."""
    if not (_PACKAGE.parent / ".git").exists():
        return None
    git = ["git", "-C", str(_PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return found.stdout.strip() or None


@cache
def processor() -> str:
    """Return the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    except OSError:  # no Linux
        pass
    return platform.processor() or platform.machine()


@cache
def source_hash(*folders: str) -> str:
    """Hash the source files of these folders of the package; of all without any.

    >>> len(source_hash("engines")), source_hash("engines") == source_hash()
    (64, False)
    """
    whole = hashlib.sha256()
    for folder in folders or (".",):
        for path in sorted((_PACKAGE / folder).rglob("*.py")):
            whole.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0")
            whole.update(path.read_bytes())
    return whole.hexdigest()


def of_backbones(opened: Sequence[Any]) -> dict[str, Any]:
    """Return hash of the weights, engine and number type of backbones; several joined by ``+``.

    >>> from types import SimpleNamespace
    >>> backbone = SimpleNamespace(sha256="0123456789abcdef0", engine="torch", dtype="float32")
    >>> of_backbones([backbone, backbone])
    {'weights_sha256': '0123456789abcdef', 'engine': 'torch', 'dtype': 'float32'}
    """
    columns = {
        "weights_sha256": [backbone.sha256[:16] for backbone in opened],
        "engine": [backbone.engine for backbone in opened],
        "dtype": [str(backbone.dtype).removeprefix("torch.") for backbone in opened],
    }
    return {name: "+".join(dict.fromkeys(found)) or None for name, found in columns.items()}
