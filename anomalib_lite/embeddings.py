"""Patch embeddings of many images, of one size or of several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["Embeddings", "gather", "rows_of", "stack", "stack_embeddings", "take"]

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


def gather(n: int, batches: Iterable[tuple[list[int], np.ndarray]]) -> Embeddings:
    """Embeddings of up to ``n`` images, by their indices; those that never came are left out."""
    grids: dict[int, np.ndarray] = {}
    whole = np.empty((n, 0, 0, 0), np.float32)
    for indices, embeddings in batches:
        if len(indices) == n and indices == list(range(n)):
            return embeddings  # all at once: no copy
        if not grids:  # room for all, in the hope that they have one size; not touched yet
            whole = np.empty((n, *embeddings.shape[1:]), np.float32)
        for index, grid in zip(indices, embeddings, strict=True):
            if grid.shape == whole.shape[1:]:
                whole[index] = grid
                grids[index] = whole[index]
            else:
                grids[index] = grid.copy()
    if len(grids) == n and all(grid.base is whole for grid in grids.values()):
        return whole
    return [grids[index] for index in sorted(grids)]


def stack_embeddings(grids: list[np.ndarray]) -> Embeddings:
    """Move the embeddings (h, w, D) of many images next to each other in memory."""
    if len({grid.shape for grid in grids}) <= 1:
        stacked: Embeddings = stack(grids) if grids else []
        return stacked
    ends = np.cumsum([grid.shape[0] * grid.shape[1] for grid in grids])
    rows = np.empty((ends[-1], grids[0].shape[2]), np.float32)
    for i, end in enumerate(ends):
        height, width, length = grids[i].shape
        mine = rows[end - height * width : end].reshape(height, width, length)
        mine[:], grids[i] = grids[i], mine
    return grids


def rows_of(E: Embeddings) -> np.ndarray:
    """All patches of all images, (N, D), without a copy where they lie next to each other."""
    if isinstance(E, np.ndarray):
        return E.reshape(-1, E.shape[-1])
    rows = E[0].base
    shape = (sum(grid.shape[0] * grid.shape[1] for grid in E), E[0].shape[2])
    if rows is not None and rows.shape == shape and all(grid.base is rows for grid in E):
        return rows
    return np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in E])
