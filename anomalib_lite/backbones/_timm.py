"""A name -> a timm network with its weights, and the list of its feature stages."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from anomalib_lite._validation import closest
from anomalib_lite.backbones._hub import check_hub, from_hub
from anomalib_lite.backbones._weights import load_by_position, load_state, load_weights
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.networks import NETWORKS, WEIGHTS_VARIABLE, directory_file, package_file

__all__ = ["EMBEDDED", "default_layers", "from_timm"]

# Networks whose weights come as a Python package: our name -> timm's name, name of the package.
EMBEDDED = {name: (n.timm, n.package) for name, n in NETWORKS.items() if n.package}


# A new network draws random weights, which are then replaced; the generator is left as it was.
@torch.random.fork_rng(devices=[])
def from_timm(
    name: str, weights: str | Path | None, state: Mapping[str, Tensor] | None, where: str
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Open a network by timm's name or a short name, and load its weights.

    Parameters
    ----------
    name : str
    weights : str or Path, optional
        File to load. Without it and ``state``, weights come from a Python package, from the
        directory that ANOMALIB_LITE_WEIGHTS names, or from the hub.
    state : mapping of str to tensor, optional
        Weights that are used instead of any other source.
    where : str
        Caller, named in errors.

    Returns
    -------
    network : torch.nn.Module
    stages : list of dict
        timm's feature stages: ``module`` (name), ``num_chs`` (channels), ``reduction`` (stride).
    """
    timm_name = NETWORKS[name].timm if name in NETWORKS else name
    if not timm_name.startswith("hf-hub:") and not timm.is_model(timm_name):
        remedy = " Install a newer version." if name in NETWORKS else _known_names(name)
        raise InvalidValueError(
            f"{where}: backbone {name!r} is not known to timm {timm.__version__}.{remedy}"
        )
    if timm_name.startswith("hf-hub:"):  # the structure comes from there, too
        check_hub(timm_name.removeprefix("hf-hub:"), name, where, files=("config.json",))
    kwargs: dict[str, Any] = {"num_classes": 0}
    try:
        with torch.device("meta"):  # the structure alone: no memory, no weights
            structure: Any = timm.create_model(timm_name, features_only=True)
    except Exception as error:  # hub clients raise their own, for names that begin with hf-hub:
        raise InvalidValueError(
            f"{where}: timm cannot take backbone {name!r} apart into layers: {error}. "
            "Choose another, or pass a module that returns feature maps."
        ) from error
    with contextlib.suppress(TypeError), torch.device("meta"):
        # With this argument, vision transformers resize their position embedding to the image.
        timm.create_model(timm_name, dynamic_img_size=True, **kwargs)
        kwargs["dynamic_img_size"] = True
    if state is None and weights is None and package_file(name) is None:
        weights = directory_file(name, where)
        if weights is None:
            _check_package(name, where)
            return from_hub(timm_name, name, kwargs, where), structure.feature_info.info
    network = timm.create_model(timm_name, **kwargs)
    if state is not None:
        load_state(network, state, where)
    elif weights is not None:
        load_weights(network, Path(weights), where)
    else:
        package: Any = package_file(name)
        load_by_position(network, package, where)
    return network, structure.feature_info.info


def default_layers(stages: list[dict[str, Any]], wanted: Sequence[int]) -> list[str]:
    """Choose the layers for ``layers=None`` by their names.

    Returns
    -------
    list of str
        The stages whose strides are in ``wanted``; of a vision transformer, the blocks at one half
        and three quarters of the depth.
    """
    names = [stage["module"] for stage in stages]
    strides = [stage["reduction"] for stage in stages]
    if len(stages) > 1 and len(set(strides)) == 1:  # a vision transformer
        depth = len(stages)
        return [names[depth // 2 - 1], names[depth * 3 // 4 - 1]]
    return [name for name, stride in zip(names, strides, strict=True) if stride in wanted]


def _known_names(name: str) -> str:
    """Return sentences that name the closest names, and how to list all."""
    near = difflib.get_close_matches(name, NETWORKS, n=3, cutoff=0.3)
    short = f" The closest short names are {', '.join(near)};" if near else ""
    return (
        f"{closest(name, [*NETWORKS, *timm.list_models()])}{short} 'anomalib-lite backbones' lists "
        "all short names, and timm.list_models() all others."
    )


def _check_package(name: str, where: str) -> None:
    """Refuse a network of which only a Python package has the weights, and is not installed."""
    if name in EMBEDDED:
        timm_name, package = EMBEDDED[name]
        raise InvalidValueError(
            f"{where}: the weights of backbone {name!r} are not installed. Install them with pip "
            f"install 'anomalib-lite[lite]' (package {package.replace('_', '-')}), put "
            f"{name}.safetensors or {name}.pth with timm's key names into the directory that the "
            f"environment variable {WEIGHTS_VARIABLE} names, or pass weights='file.safetensors'. "
            f"Other weights of the same network come from the hub: backbone={timm_name!r}."
        )


# timm logs every download; without a handler Python would print that to standard error.
logging.getLogger("timm").addHandler(logging.NullHandler())
