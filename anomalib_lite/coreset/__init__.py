"""Embeddings -> the rows to keep."""

from anomalib_lite.coreset._selection import (
    METHODS,
    Coreset,
    check_device,
    coreset_size,
    covering_radius,
    greedy_k_center,
    select_coreset,
)

__all__ = [
    "METHODS",
    "Coreset",
    "check_device",
    "coreset_size",
    "covering_radius",
    "greedy_k_center",
    "select_coreset",
]
