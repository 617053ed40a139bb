"""Converted graphs on disk: written whole or not at all, verified by hashes when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_lite._files import replacing, write_text

__all__ = ["cache_dir", "digest", "read", "write"]

# Above this size, the graphs used longest ago are removed.
_MOST_BYTES = 4 << 30
# The process that began a temporary file so long ago is gone.
_UNFINISHED_S = 24 * 60 * 60


def cache_dir() -> Path:
    """Directory of the graphs: ``ANOMALIB_LITE_CACHE``, else the user's cache directory.

    >>> from unittest import mock
    >>> with mock.patch.dict("os.environ", ANOMALIB_LITE_CACHE="somewhere"):
    ...     cache_dir().parts
    ('somewhere',)
    """
    own = os.environ.get("ANOMALIB_LITE_CACHE")
    if own:
        return Path(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "anomalib-lite"


def digest(value: Any) -> str:
    """SHA-256 of bytes, or of a value that JSON can hold."""
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def read(key: dict[str, Any]) -> tuple[dict[str, Any], bytes] | None:
    """Read the description and the graph of a key; None if one is missing or broken."""
    try:
        folder = cache_dir()
        entry = json.loads((folder / f"{digest(key)}.json").read_bytes())
        sealed = {"key": entry["key"], "described": entry["described"], "graph": entry["graph"]}
        path = folder / f"{entry['graph']}.graph"
        graph = path.read_bytes()
        if (
            entry["key"] != key
            or entry["seal"] != digest(sealed)
            or digest(graph) != entry["graph"]
        ):
            return None
        with contextlib.suppress(OSError):
            path.touch()  # used today
        return entry["described"], graph
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):  # gone, broken, or no home
        return None


def write(keys: Sequence[dict[str, Any]], described: dict[str, Any], graph: bytes) -> None:
    """Store a graph under several keys; if it cannot be written, nothing happens."""
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        name = digest(graph)
        with replacing(folder / f"{name}.graph") as temporary:
            temporary.write_bytes(graph)
        for key in keys:
            sealed = {"key": key, "described": described, "graph": name}
            write_text(
                folder / f"{digest(key)}.json", json.dumps(sealed | {"seal": digest(sealed)})
            )
        _forget_oldest(folder, spare=name)
    except (OSError, RuntimeError, ValueError):
        return


def _forget_oldest(folder: Path, spare: str) -> None:
    """Remove the graphs used longest ago, their keys, and temporary files of lost processes."""
    graphs = sorted(folder.glob("*.graph"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in graphs)
    gone = set()
    for path in graphs:
        if total > _MOST_BYTES and path.stem != spare:
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
            gone.add(path.stem)
    for path in folder.glob("*.json") if gone else ():
        if json.loads(path.read_bytes()).get("graph") in gone:
            path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > _UNFINISHED_S:
            path.unlink(missing_ok=True)
