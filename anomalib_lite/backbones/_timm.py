"""A name -> a timm network with its weights, and the list of its feature stages."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from anomalib_lite._validation import closest
from anomalib_lite.backbones._weights import load_efficientnet_lite0, load_state, load_weights
from anomalib_lite.errors import InvalidValueError

__all__ = ["EMBEDDED", "default_layers", "from_timm"]

# Networks whose weights come as a Python package: our name -> timm's name, function that loads.
EMBEDDED = {"efficientnet_lite0": ("tf_efficientnet_lite0", load_efficientnet_lite0)}


# A new network draws random weights, which are then replaced; the generator is left as it was.
@torch.random.fork_rng(devices=[])
def from_timm(
    name: str, weights: str | Path | None, state: Mapping[str, Tensor] | None, where: str
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Open a network by timm's name or one of ours, and load its weights.

    Parameters
    ----------
    name : str
    weights : str or Path, optional
        File to load. Without it and ``state``, weights come from the package or the hub.
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
    timm_name = EMBEDDED[name][0] if name in EMBEDDED else name
    if not timm_name.startswith("hf-hub:") and not timm.is_model(timm_name):
        known = [*EMBEDDED, *timm.list_models()]
        raise InvalidValueError(
            f"{where}: backbone {name!r} is not known to timm {timm.__version__}."
            f"{closest(name, known)} timm.list_models() lists all."
        )
    kwargs: dict[str, Any] = {"num_classes": 0}
    try:
        with torch.device("meta"):  # the structure alone: no memory, no weights
            structure = timm.create_model(timm_name, features_only=True)
    except Exception as error:  # hub clients raise their own, for names that begin with hf-hub:
        raise InvalidValueError(
            f"{where}: timm cannot take backbone {name!r} apart into layers: {error}. "
            "Choose another, or pass a module that returns feature maps."
        ) from error
    with contextlib.suppress(TypeError), torch.device("meta"):
        # With this argument, vision transformers resize their position embedding to the image.
        timm.create_model(timm_name, dynamic_img_size=True, **kwargs)
        kwargs["dynamic_img_size"] = True
    if state is not None:
        network = timm.create_model(timm_name, **kwargs)
        load_state(network, state, where)
    elif weights is not None:
        network = timm.create_model(timm_name, **kwargs)
        load_weights(network, Path(weights), where)
    elif name in EMBEDDED:
        network = timm.create_model(timm_name, **kwargs)
        EMBEDDED[name][1](network)
    else:
        network = _from_hub(timm_name, kwargs, where)
    stages: Any = structure.feature_info
    return network, stages.info


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


def _from_hub(name: str, kwargs: dict[str, Any], where: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **kwargs)
    except Exception as error:  # each hub client raises its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidValueError(
            f"{where}: the weights of backbone {name!r} cannot be had from the hub "
            f"({reason}). Without a network pass weights='file.safetensors', or use "
            "backbone='efficientnet_lite0'."
        ) from error


# timm logs every download; without a handler Python would print that to standard error.
logging.getLogger("timm").addHandler(logging.NullHandler())
