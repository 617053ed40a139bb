"""Time of anomalib's coreset in seconds; runs in anomalib's environment.

    python peer_coreset.py embeddings.npy 100 500

prints a line of JSON: seconds for the first and for the second number of picks.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from anomalib.models.components import KCenterGreedy


def main() -> None:
    """Time two sizes; their difference does not contain the one-time work."""
    X = torch.from_numpy(np.load(sys.argv[1]))
    KCenterGreedy(X[:1000].clone(), 0.01).select_coreset_idxs()
    seconds = []
    for n in map(int, sys.argv[2:4]):
        sampler = KCenterGreedy(X, n / len(X))
        start = time.perf_counter()
        sampler.select_coreset_idxs()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
