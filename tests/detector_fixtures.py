"""A small network and small images, with and without a defect, for all tests of detectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from anomalib_lite.engines._compiled import refusal

HEIGHT, WIDTH = 48, 80
DEFECT = np.s_[8:20, 48:68]  # right of the middle and above it: swapped sides would show
PLAIN: dict[str, Any] = {"device": "cpu", "dtype": "float32", "engine": "torch"}


class Small(nn.Module):
    """The pixels of 4 x 4 squares at two scales: the same bits in any batch and thread."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.PixelUnshuffle(4)
        self.second = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        h, w = (side // 4 for side in x.shape[2:])
        squares = self.first(x[:, :, : 4 * h, : 4 * w])[:, ::3]  # (B, 16, h, w)
        return [squares, self.second(squares[:, :4])]


def skip_without(engine: str) -> None:
    """Skip the test where an engine cannot run at all, with the reason."""
    if engine != "torch" and (reason := refusal(engine, "cpu", "tests")) is not None:
        pytest.skip(str(reason))


def good(n: int, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Return ``n`` images of noise over a slope, in uint8."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(90, 150, size[1])[:, None]
    return (slope + rng.integers(-12, 13, (n, *size, 3))).astype(np.uint8)


def bad(n: int, seed: int = 1) -> np.ndarray:
    """Return ``n`` images with a red rectangle."""
    images = good(n, seed)
    images[(slice(None), *DEFECT)] = (250, 20, 20)
    return images
