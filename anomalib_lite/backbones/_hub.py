"""Weights from the hub: from its cache on this machine, or over the network, if there is one."""

from __future__ import annotations

import os
import threading
from typing import Any

import timm
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from anomalib_lite.errors import InvalidValueError
from anomalib_lite.networks import NETWORKS, WEIGHTS_VARIABLE, cached_file

__all__ = ["check_hub", "from_hub"]

_WEIGHTS = "model.safetensors"
# Without a network the hub's client tries each file six times and sleeps 23 seconds in between;
# one request shows as well whether the hub answers. A network that swallows requests would keep
# it for as long as its system looks up a name, which no setting of the client bounds.
_SECONDS = 8.0


def from_hub(timm_name: str, name: str, kwargs: dict[str, Any], where: str) -> nn.Module:
    """Open a network with weights from the hub, or from the hub's cache without asking the hub.

    Parameters
    ----------
    timm_name : str
    name : str
        What the caller asked for, named in errors.
    kwargs : dict
        Arguments of ``timm.create_model``.
    where : str
        Caller, named in errors.

    Raises
    ------
    InvalidValueError
        If the weights cannot be had: within 8 seconds if the hub does not answer (or as many as
        the hub's own variable HF_HUB_ETAG_TIMEOUT says). The error says how to bring them.
    """
    if timm_name.startswith("hf-hub:"):
        repository, files = timm_name.removeprefix("hf-hub:"), ()
    else:
        config: Any = timm.get_pretrained_cfg(timm_name)
        repository = getattr(config, "hf_hub_id", None) or ""
        files = tuple(filter(None, [getattr(config, "hf_hub_filename", None)]))
    cached = None
    if repository:
        cached = check_hub(repository, name, where, files=(*files, _WEIGHTS, "pytorch_model.bin"))
    if cached is not None and not timm_name.startswith("hf-hub:"):
        kwargs = kwargs | {"pretrained_cfg_overlay": {"file": str(cached)}}
    try:
        return timm.create_model(timm_name, pretrained=True, **kwargs)
    except Exception as error:  # each hub client raises its own
        raise _not_to_be_had(repository, name, error, where) from error


def check_hub(repository: str, name: str, where: str, files: tuple[str, ...]) -> Any:
    """Return the path of the first of these files that the hub's cache has.

    If it has none, return None, provided that the hub answers.

    Raises
    ------
    InvalidValueError
        If it does not; the error says how to bring the weights of the backbone ``name``.
    """
    cached = cached_file(repository, files)
    if cached is None:
        error = _silence(repository, files[0])
        if error is not None:
            raise _not_to_be_had(repository, name, error, where) from error
    return cached


def _silence(repository: str, file: str) -> Exception | None:
    """Return why the hub does not answer a question about a file; None if it does."""
    chosen = "HF_HUB_ETAG_TIMEOUT" in os.environ
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if chosen else _SECONDS
    owner_and_name, _, revision = repository.partition("@")
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            url = hf_hub_url(owner_and_name, file, revision=revision or None)
            get_hf_file_metadata(url, timeout=seconds)
        except HfHubHTTPError as error:  # an answer, such as that there is no such file
            status = getattr(error.response, "status_code", 0)
            answers.append(error if status >= 500 else None)
        except Exception as error:  # each hub client raises its own
            answers.append(error)
        else:
            answers.append(None)

    thread = threading.Thread(target=ask, daemon=True)  # may hang in the system's look-up
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else TimeoutError(f"no answer within {seconds:g} seconds")


def _not_to_be_had(repository: str, name: str, error: Exception, where: str) -> InvalidValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    short = next((s for s, network in NETWORKS.items() if network.timm == name), name)
    directory = (
        f"or name the file {short}.safetensors, put it into a directory and let the environment "
        f"variable {WEIGHTS_VARIABLE} name this directory"
    )
    if name.startswith("hf-hub:"):  # its structure is on the hub as well
        directory = "with timm's own name of the network, such as 'resnet18', as backbone"
    source = f"save the weights of timm.create_model({name!r}, pretrained=True)"
    if repository:
        page = f"{constants.ENDPOINT}/{repository.partition('@')[0]}"
        source = f"download {_WEIGHTS} from {page}"
    return InvalidValueError(
        f"{where}: the weights of backbone {name!r} cannot be had from the hub ({reason}). To "
        f"bring them, {source} on a machine with a network connection; then pass "
        f"weights='file.safetensors', {directory}. Or use backbone='efficientnet_lite0', whose "
        "weights are installed."
    )
