"""Header and tensors <-> one safetensors file: arrays and JSON, nothing that can run."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from anomalib_lite._files import replacing
from anomalib_lite._version import __version__
from anomalib_lite.errors import InvalidValueError, MissingPathError, ModelFileError

__all__ = [
    "ADAPTER",
    "BACKBONE",
    "FORMAT_VERSION",
    "VERSIONS",
    "describe_backbone",
    "is_of_torch",
    "read_model",
    "select",
    "to_json",
    "write_model",
]

FORMAT_VERSION = 1
# The first entries of every header, also of those of the members of a cascade.
VERSIONS = {"format_version": FORMAT_VERSION, "library_version": __version__}

BACKBONE = "backbone."  # prefix of the backbone's tensors, if they are included
ADAPTER = "adapter."  # prefix of the tensors of a LoRA adapter

_KEY = "anomalib_lite"  # key of the header in the file's metadata
_WEIGHT = re.compile(r"(gate\.|detector\.)?backbone\.")  # also in the members of a cascade


def write_model(
    path: str | os.PathLike[str], tensors: dict[str, Any], header: dict[str, Any], where: str
) -> None:
    """Write a model file whole or not at all.

    Parameters
    ----------
    path : str or Path
    tensors : dict of str to ndarray or torch.Tensor
    header : dict
        Values that JSON can hold, with the entries of ``VERSIONS``.
    where : str
        Caller, named in errors.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    content = _serialize(tensors, {_KEY: json.dumps(header)})
    with replacing(Path(path), where) as temporary:
        temporary.write_bytes(content)


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the tensors and the header of a model file.

    Parameters
    ----------
    path : Path

    Returns
    -------
    tensors : dict of str to ndarray
        Weights of a backbone are ``torch.Tensor``: numpy lacks some of their number types.
    header : dict

    Raises
    ------
    MissingPathError
        If there is no such file.
    ModelFileError
        If the file is cut short, of another kind, or of a newer format.
    """
    if path.is_dir():
        raise MissingPathError(f"load: {path} is a directory. Give the model file that fit wrote.")
    if not path.is_file():
        reason = "is no file, but a FIFO, socket or device" if path.exists() else "does not exist"
        raise MissingPathError(f"load: model file {path} {reason}.")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata.get(_KEY, "null"))
            names = list(file.keys())
            arrays = {k: file.get_tensor(k) for k in names if not _WEIGHT.match(k)}
        if any(a.dtype.isbuiltin != 1 for a in arrays.values()):  # such as ml_dtypes' bfloat16
            raise TypeError("a number type that numpy does not have")
        if len(arrays) < len(names):
            with safe_open(path, "pt") as file:
                arrays |= {k: file.get_tensor(k) for k in names if _WEIGHT.match(k)}
    except (SafetensorError, json.JSONDecodeError, OSError, TypeError) as error:
        raise ModelFileError(
            f"load: {path} is cut short or not a model file ({error}). Copy it again from where "
            "it was saved."
        ) from error
    if not isinstance(header, dict) or not isinstance(header.get("format_version"), int):
        raise ModelFileError(
            f"load: {path} is a safetensors file, but not one that anomalib-lite wrote. Expected "
            "a file from detector.save(path)."
        )
    if header["format_version"] > FORMAT_VERSION:
        raise ModelFileError(
            f"load: {path} has format version {header['format_version']}; this version of "
            f"anomalib-lite ({__version__}) reads up to {FORMAT_VERSION}. Upgrade "
            "with: pip install --upgrade anomalib-lite"
        )
    return arrays, header


def select(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Select the tensors whose names begin with ``prefix``, and take it off the names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def describe_backbone(
    backbone: Any, include_weights: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file holds of a backbone: tensors by name, and its part of the header.

    ``include_weights`` puts its weights among the tensors; an adapter's always are.
    """
    names = ("layers", "stride", "mean", "std", "engine", "sha256")
    header = {key: getattr(backbone, key) for key in names}
    header["dtype"] = str(backbone.dtype).removeprefix("torch.")
    tensors: dict[str, Any] = {}
    if backbone.adapter is not None:
        factors, header["adapter"] = backbone.adapter.to_arrays()
        tensors |= {ADAPTER + k: v for k, v in factors.items()}
    if include_weights:
        tensors |= {BACKBONE + k: v for k, v in backbone.original_state().items()}
    return tensors, header


def to_json(name: str, value: object, where: str) -> object:
    """Convert a constructor's argument to a value that JSON can hold; a module becomes None.

    Raises
    ------
    InvalidValueError
        For any other object, such as a ``RandomState``.
    """
    if is_of_torch(value, "nn.Module"):
        return None
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike) or is_of_torch(value, "device"):
        return str(value)
    if isinstance(value, list | tuple):
        return [to_json(name, v, where) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InvalidValueError(
        f"{where}: {name}={value!r} cannot be saved; expected a number, a string, None or a list "
        f"of these. Fit with a plain {name} first."
    )


def is_of_torch(value: object, name: str) -> bool:
    """Tell whether a value is an instance of torch's class ``name``, without importing torch."""
    kind: Any = sys.modules.get("torch")
    for attribute in name.split("."):
        kind = getattr(kind, attribute, None)
    return kind is not None and isinstance(value, kind)


def _serialize(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """Return a file's content; torch is imported only if some tensors are torch's."""
    # Of a view, safetensors would write other numbers without a word.
    tensors = {
        key: np.asarray(one, order="C") if isinstance(one, np.ndarray) else one
        for key, one in tensors.items()
    }
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save as save_arrays

        return save_arrays(tensors, metadata)
    import torch
    from safetensors.torch import save as save_tensors

    return save_tensors({key: torch.as_tensor(t) for key, t in tensors.items()}, metadata)
