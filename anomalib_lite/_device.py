"""Where the numbers are computed, and in which type: what ``"auto"`` becomes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from anomalib_lite._validation import check_choice
from anomalib_lite.errors import InvalidValueError

__all__ = ["DEVICES", "DTYPES", "has_depthwise", "resolve_device", "resolve_dtype"]

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_device(device: str | torch.device, where: str) -> torch.device:
    """The device that a parameter means; InvalidValueError if it is not here."""
    kind = str(device).split(":")[0]
    check_choice("device", kind, DEVICES, where)
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    number = str(device).partition(":")[2]
    too_far = kind == "cuda" and number.isdigit() and int(number) >= torch.cuda.device_count()
    if too_far or (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise InvalidValueError(
            f"{where}: device={device!r} is not available on this machine. Use device='cpu'."
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InvalidValueError(
            f"{where}: device must be one of {list(DEVICES)} or such as 'cuda:1', got {device!r}."
        ) from error


def resolve_dtype(dtype: str, device: torch.device, where: str) -> torch.dtype:
    """The number type that a parameter means on this device."""
    check_choice("dtype", dtype, DTYPES, where)
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def has_depthwise(network: nn.Module) -> bool:
    """Whether a convolution sees each channel by itself.

    Such sums are short, and bfloat16's rounding does not average out in them.
    """
    convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d))
    return any(c.groups == c.in_channels > 1 for c in convolutions)


def _cpu_multiplies_bfloat16() -> bool:
    # torch has no public question for this; where it cannot be asked, float32 is always right.
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        supported: Any = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return True
    return False
