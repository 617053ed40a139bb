"""Scores of images -> scores that Equation 7 of PatchCore's paper reweights, on a memory bank."""

from __future__ import annotations

import numpy as np

from anomalib_lite.anomaly_map import reweight
from anomalib_lite.memory_bank import MemoryBank

__all__ = ["SUPPORT_SIZE", "reweight_by_bank"]

# b of Equation 7, as in the paper.
SUPPORT_SIZE = 9


def reweight_by_bank(
    scores: np.ndarray, patches: np.ndarray, nearest: np.ndarray, bank: MemoryBank
) -> np.ndarray:
    """Reweight the score of each image by Equation 7.

    ``patches`` (B, D) are the most anomalous ones, ``nearest`` (B,) their neighbours in the bank.
    """
    size = min(SUPPORT_SIZE, len(bank.embeddings_))
    _, support = bank.search(bank.embeddings_[nearest], size)  # (B, b)
    # A twin of the nearest bank point may come first: put the point itself there.
    order = np.argsort(support != nearest[:, None], axis=1, kind="stable")
    support = np.take_along_axis(support, order, axis=1)
    difference = bank.embeddings_[support] - patches[:, None]
    return reweight(scores, np.linalg.norm(difference, axis=2))
