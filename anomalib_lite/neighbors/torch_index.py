"""Rows of the coreset and search of the bank on a GPU, or any device of torch, in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["TorchIndex", "TorchRows"]

# Distances held in memory at once.
_VALUES = 1 << 26


class TorchRows:
    """Rows of a coreset on a device; same methods as the rows of ``coreset._k_center``."""

    def __init__(self, X: np.ndarray, device: str) -> None:
        self.x, self.mean = _centred(X, device)
        self._sq = torch.full((len(X),), torch.inf, device=device)

    def update(self, centers: np.ndarray) -> None:
        """Update each row's distance to its nearest centre with new ``centers`` (M, D)."""
        c = torch.from_numpy(centers).to(self.x.device) - self.mean
        step = max(1, _VALUES // max(1, len(c)))
        for start in range(0, len(self.x) if len(c) else 0, step):
            part = slice(start, start + step)
            nearest = _sq_distances(self.x[part], c).amin(dim=1)
            torch.minimum(self._sq[part], nearest, out=self._sq[part])

    def exclude(self, picks: np.ndarray) -> None:
        """Exclude rows from later picks."""
        self._sq[torch.from_numpy(picks).to(self._sq.device)] = -1

    def farthest(self, n: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the ``n`` farthest rows, their squared distances, and a bound on the others."""
        if n >= len(self.x):
            return np.arange(len(self.x)), self._sq.cpu().numpy(), -1.0
        values, indices = torch.topk(self._sq, n + 1)
        pool = indices[:n].sort().values
        return pool.cpu().numpy(), self._sq[pool].cpu().numpy(), float(values[n])

    def sq_distances_between(self, indices: np.ndarray) -> np.ndarray:
        """Compute squared distances (n, n) between some rows."""
        x = self.x[torch.from_numpy(indices).to(self.x.device)]
        return _sq_distances(x, x).cpu().numpy()


class TorchIndex:
    """Search a bank on a device by brute force, in chunks."""

    def __init__(self, X: np.ndarray, device: str) -> None:
        self.x, self.mean = _centred(X, device)

    def search(self, Q: np.ndarray, k: int) -> np.ndarray:
        """Find the ``k`` nearest rows for each row of ``Q`` (n, D): (n, k) int64."""
        found = np.empty((len(Q), k), np.int64)
        step = max(1, _VALUES // len(self.x))
        for start in range(0, len(Q), step):
            part = slice(start, start + step)
            q = torch.from_numpy(Q[part]).to(self.x.device) - self.mean
            nearest = torch.topk(_sq_distances(q, self.x), k, dim=1, largest=False).indices
            found[part] = nearest.cpu().numpy()
        return found


def _centred(X: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    mean = torch.from_numpy(X.mean(axis=0, dtype=np.float64).astype(np.float32)).to(device)
    x = torch.from_numpy(X).to(device)
    return x - mean, mean


def _sq_distances(a: Tensor, b: Tensor) -> Tensor:
    sq = torch.addmm((b**2).sum(dim=1), a, b.T, alpha=-2)
    sq += (a**2).sum(dim=1, keepdim=True)
    return sq.clamp_(min=0)
