"""Where the weights of a network are on this machine, by its name."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path

from anomalib_lite.networks._networks import NETWORKS

__all__ = ["WEIGHTS_VARIABLE", "cached_file", "directory_file", "package_file", "whereabouts"]

WEIGHTS_VARIABLE = "ANOMALIB_LITE_WEIGHTS"
# Files that a repository of the hub may hold; timm prefers the first.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def package_file(name: str) -> Path | None:
    """Return the weights that an installed Python package holds for a short name.

    Parameters
    ----------
    name : str

    Returns
    -------
    Path or None
        None if there is no such package, or it is not installed.

    Examples
    --------
    >>> package_file("efficientnet_lite0").suffix
    '.pth'
    >>> package_file("resnet18") is None
    True
    """
    package = NETWORKS[name].package if name in NETWORKS else ""
    if not package or find_spec(package) is None:
        return None
    model = "".join(word.capitalize() for word in package.removesuffix("_pytorch_model").split("_"))
    holder = getattr(importlib.import_module(package), f"{model}ModelFile")
    return Path(holder.get_model_file_path())


def directory_file(name: str, where: str) -> Path | None:
    """Return the weights of a network in the directory that ANOMALIB_LITE_WEIGHTS names.

    Parameters
    ----------
    name : str
        Short name, or timm's.
    where : str
        Caller, named in errors.

    Returns
    -------
    Path or None
        ``<name>.safetensors`` or ``<name>.pth``, for the name itself, then for the other name
        of the same network; None if there is none, or the variable is not set.

    Raises
    ------
    MissingPathError
        If the variable names no directory.

    Examples
    --------
    >>> directory_file("no such network", "me") is None
    True
    """
    chosen = os.environ.get(WEIGHTS_VARIABLE)
    if not chosen:
        return None
    directory = Path(chosen)
    if not directory.is_dir():
        # Imported here, since it loads scikit-learn, which listing the networks does not need.
        from anomalib_lite.errors import MissingPathError

        raise MissingPathError(
            f"{where}: the environment variable {WEIGHTS_VARIABLE} names {chosen}, which is no "
            "directory. Make it, or unset the variable."
        )
    pairs = [(short, network.timm) for short, network in NETWORKS.items()]
    names = [name, *(timm for short, timm in pairs if short == name)]
    names += [short for short, timm in pairs if timm == name]
    files = (directory / f"{n}{end}" for n in names for end in (".safetensors", ".pth"))
    return next((file for file in files if file.is_file()), None)


def cached_file(repository: str, files: tuple[str, ...] = _HUB_FILES) -> Path | None:
    """Return the first of these files of a repository that the hub's cache on this machine holds.

    Parameters
    ----------
    repository : str
        Such as ``"timm/resnet18.a1_in1k"``; a revision may follow an ``@``.
    files : tuple of str, default=("model.safetensors", "pytorch_model.bin")

    Returns
    -------
    Path or None

    Examples
    --------
    >>> cached_file("timm/no-such-network") is None
    True
    """
    from huggingface_hub import try_to_load_from_cache

    owner_and_name, _, revision = repository.partition("@")
    for file in files:
        found = try_to_load_from_cache(owner_and_name, file, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def whereabouts(name: str, where: str = "whereabouts") -> str:
    """Say where the weights of a short name come from, in the order in which they are looked for.

    Parameters
    ----------
    name : str
        A key of ``NETWORKS``.
    where : str
        Caller, named in errors.

    Returns
    -------
    {"installed", "in ANOMALIB_LITE_WEIGHTS", "in the hub's cache", "to be downloaded", \
    "to be installed"}

    Raises
    ------
    MissingPathError
        If ANOMALIB_LITE_WEIGHTS names no directory.

    Examples
    --------
    >>> whereabouts("efficientnet_lite0")
    'installed'
    """
    if package_file(name) is not None:
        return "installed"
    if directory_file(name, where) is not None:
        return f"in {WEIGHTS_VARIABLE}"
    if NETWORKS[name].package:
        return "to be installed"
    if cached_file(NETWORKS[name].repository) is not None:
        return "in the hub's cache"
    return "to be downloaded"
