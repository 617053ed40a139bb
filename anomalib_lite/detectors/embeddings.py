"""Patch embeddings of many images, of one size or of several."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Embeddings", "rows_of", "stack", "take"]

# (N, h, w, D) float32, or a list of N arrays (h, w, D) where images have different sizes.
Embeddings = np.ndarray | list[np.ndarray]


def stack(arrays: list[Any]) -> Any:
    """One array if all have one shape, else the list; either way nothing is held twice."""
    if len({None if a is None else a.shape for a in arrays}) != 1 or arrays[0] is None:
        return arrays
    stacked = np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
    for i in range(len(arrays)):
        stacked[i], arrays[i] = arrays[i], None
    return stacked


def take(E: Embeddings, indices: np.ndarray) -> Embeddings:
    """The embeddings of some of the images."""
    return E[indices] if isinstance(E, np.ndarray) else [E[i] for i in indices]


def rows_of(E: Embeddings) -> np.ndarray:
    """All patches of all images, (N, D), without a copy where one array holds them."""
    if isinstance(E, np.ndarray):
        return E.reshape(-1, E.shape[-1])
    return np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in E])
