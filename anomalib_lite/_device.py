"""Where the numbers are computed, and in which type: what ``"auto"`` becomes.

torch is imported only where a function needs it: opening a converted graph on the CPU does not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib_lite._validation import check_choice
from anomalib_lite.errors import InvalidValueError

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICES", "DTYPES", "device_of", "resolve_device", "resolve_dtype"]

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def device_of(device: Any, where: str) -> str:
    """Return the device that a parameter means, such as "cpu", without torch if it is the CPU.

    Raises InvalidValueError as :func:`resolve_device` does.
    """
    if str(device) == "cpu" or (str(device) == "auto" and not _may_have_gpu()):
        return "cpu"
    return str(resolve_device(device, where))


def resolve_device(device: str | torch.device, where: str) -> torch.device:
    """Return the device that a parameter means; InvalidValueError if this machine has none."""
    import torch

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
    """Return the number type that a parameter means on this device."""
    import torch

    check_choice("dtype", dtype, DTYPES, where)
    if dtype != "auto":
        return cast("torch.dtype", getattr(torch, dtype))
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _may_have_gpu() -> bool:
    """Tell whether this machine has the driver of a GPU that device="auto" may take."""
    if sys.platform == "win32":
        root = Path(os.environ.get("SYSTEMROOT", "C:/Windows"))
        return (root / "System32" / "nvcuda.dll").exists()
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))


def _cpu_multiplies_bfloat16() -> bool:
    import torch

    # torch's own checks are private. Without them the answer is False: float32 is always right.
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        supported: Any = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return True
    return False
