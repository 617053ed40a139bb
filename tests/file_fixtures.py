"""Networks that the model files in ``tests/fixtures`` were fitted with: they stay as they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

LAYERS = ["blocks.0", "blocks.1"]
_WIDTH, _HEADS, _PATCH = 16, 2, 8


class Squares(nn.Module):
    """One feature map, (B, 12, h, w), from weights that can learn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 12, 3, padding=1)
        _draw_weights(self, 0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.pixel_unshuffle(x, 4)[:, ::3]))


class Attention(nn.Module):
    """Attention whose queries, keys and values come from one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.proj = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, n_tokens = x.shape[:2]
        parts = self.qkv(x).reshape(batch, n_tokens, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts)
        mixed: Tensor = self.proj(attended.transpose(1, 2).reshape(x.shape))
        return mixed


class Block(nn.Module):
    """Attention and a small network, both beside an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        tokens: Tensor = x + self.mlp(x)
        return tokens


class Transformer(nn.Module):
    """A vision transformer of two blocks, with a class token."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, _WIDTH, _PATCH, stride=_PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        _draw_weights(self, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


def _draw_weights(network: nn.Module, seed: int) -> None:
    """Draw all weights by numpy, whose generators give the same numbers everywhere."""
    rng = np.random.default_rng(seed)
    for name, weight in network.named_parameters():
        if "norm" not in name:
            scale = max(1, weight[0].numel()) ** -0.5
            weight.data = torch.tensor(rng.normal(0, scale, weight.shape), dtype=torch.float32)
