"""Tensors and text -> one safetensors file, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.errors import OutputError

__all__ = ["serialize", "write"]


def serialize(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """The content of a file; torch is imported only for tensors that numpy does not have."""
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save as save_arrays

        return save_arrays(tensors, metadata)
    import torch  # weights may be of types that numpy does not have
    from safetensors.torch import save as save_tensors

    return save_tensors({key: torch.as_tensor(t) for key, t in tensors.items()}, metadata)


def write(content: bytes, path: Path, where: str) -> None:
    """Write all of it, or leave what was there; OutputError if that cannot be done."""
    # Beside its place: renaming is atomic only within one file system.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"{where}: cannot write {path}: {error}. Choose a directory that exists and can be "
            "written to."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
