"""How much the class token of a vision transformer attends to each patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_lite.errors import InvalidValueError

__all__ = ["class_attention", "find_attention"]


def find_attention(network: nn.Module, layers: list[str], where: str) -> Any:
    """Return the attention module of the last layer in the network's order.

    Raises
    ------
    InvalidValueError
        If its weights are not determined by its queries and keys alone, or there is no class token.
    """
    last = [name for name, _ in network.named_modules() if name in layers][-1:]
    attention: Any = None
    for name in last:
        attention = getattr(network.get_submodule(name), "attn", None)
    plain = all(hasattr(attention, part) for part in ("qkv", "num_heads", "q_norm", "k_norm"))
    plain = plain and getattr(attention, "q_bias", None) is None
    has_class = getattr(network, "cls_token", None) is not None
    if not plain or not has_class or getattr(network, "rope", None) is not None:
        raise InvalidValueError(
            f"{where}: attention_guided needs a vision transformer with a class token and plain "
            f"attention (as DINOv2 has), and whole blocks as layers; got {type(network).__name__} "
            f"with layers {layers}. Choose others, or attention_guided=False."
        )
    return attention


def class_attention(attention: Any, qkv: Tensor, size: Sequence[int]) -> Tensor:
    """Attention of the class token to each patch: softmax of query and keys, mean over the heads.

    Parameters
    ----------
    attention : torch.nn.Module
        From :func:`find_attention`.
    qkv : tensor of shape (B, tokens, 3 C)
        Output of its ``qkv`` layer; the class token is first, the patches are last.
    size : (h, w)
        Size of the grid of patches.

    Returns
    -------
    tensor of shape (B, 1, h, w), float32
        With mean 1 over the patches of an image.
    """
    batch, n_tokens = qkv.shape[:2]
    parts = qkv.reshape(batch, n_tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(parts[0][:, :, :1]).float(), attention.k_norm(parts[1]).float()
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, 1, tokens)
    weights = torch.softmax(logits, dim=-1).mean(dim=1)[:, 0, n_tokens - size[0] * size[1] :]
    return (weights / weights.mean(dim=1, keepdim=True)).reshape(batch, 1, *size)
