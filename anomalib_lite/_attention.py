"""How much the class token of a vision transformer attends to each patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_lite.errors import InvalidValueError

__all__ = ["class_attention", "find_attention"]


def find_attention(network: nn.Module, layers: list[str], where: str) -> tuple[str, nn.Module]:
    """Name and module of the attention in the last of the layers.

    Raises
    ------
    InvalidValueError
        Unless it is one whose weights can be told from its queries and keys alone.
    """
    name = f"{layers[-1]}.attn" if layers else ""
    try:
        attention: Any = network.get_submodule(name)
    except AttributeError:
        attention = None
    prefix = int(getattr(network, "num_prefix_tokens", 0))
    plain = hasattr(attention, "qkv") and hasattr(attention, "num_heads")
    if not plain or prefix < 1 or getattr(network, "rope", None) is not None:
        raise InvalidValueError(
            f"{where}: attention_guided needs a vision transformer with a class token and plain "
            f"attention (as DINOv2 has), got {type(network).__name__}. Choose another backbone, "
            "or attention_guided=False."
        )
    return name, attention


def class_attention(attention: Any, qkv: Tensor, size: Sequence[int]) -> Tensor:
    """Softmax of the class token's query with all keys, mean over the heads.

    Parameters
    ----------
    attention : torch.nn.Module
        As :func:`find_attention` gives it.
    qkv : tensor of shape (B, tokens, 3 C)
        What its ``qkv`` layer gave; the class token stands first, the patches stand last.
    size : (h, w)
        Of the grid of patches.

    Returns
    -------
    tensor of shape (B, 1, h, w), float32
        With mean 1 over the patches of an image.
    """
    batch, n_tokens = qkv.shape[:2]
    parts = qkv.reshape(batch, n_tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(parts[0][:, :, :1]), attention.k_norm(parts[1])
    logits = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5  # (B, heads, 1, tokens)
    weights = torch.softmax(logits, dim=-1).mean(dim=1)[:, 0, n_tokens - size[0] * size[1] :]
    return (weights / weights.mean(dim=1, keepdim=True)).reshape(batch, 1, *size)
