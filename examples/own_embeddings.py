"""Detect anomalies in any vectors, without images.

The vectors are scikit-learn's handwritten digits, 64 numbers each. Eights are normal, all other
digits are anomalous. Your vectors may be windows of a sensor signal, spectra, or the output of a
network.

    python own_embeddings.py
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from anomalib_lite import MemoryBank, PatchCore
from anomalib_lite.calibration import conformal_threshold
from anomalib_lite.metrics import auroc


def main() -> None:
    X, digit = load_digits(return_X_y=True)
    X = X.astype(np.float32)  # (1797, 64)
    eights, others = X[digit == 8], X[digit != 8]
    eights = np.random.default_rng(0).permutation(eights)
    normal, later = eights[:120], eights[120:]  # for the fit, and for the test
    y = np.array([0] * len(later) + [1] * len(others))

    # 1. Step by step: a bank of normal vectors, distances to it, and a threshold from vectors
    # that are normal but not in the bank.
    bank = MemoryBank(n_neighbors=1).fit(normal[:60])
    threshold = conformal_threshold(bank.kneighbors(normal[60:])[0][:, 0], false_alarm_rate=0.05)
    scores = bank.kneighbors(np.concatenate([later, others]))[0][:, 0]
    print("memory bank   AUROC", round(auroc(y, scores), 3))
    report(scores > threshold, y)

    # 2. The same with one object, which can be saved: each vector is an image with one patch.
    detector = PatchCore(coreset_ratio=1.0, false_alarm_rate=0.05)
    detector.fit_embeddings(as_patches(normal))
    scores = detector.score_embeddings(as_patches(np.concatenate([later, others])))
    print("PatchCore     AUROC", round(auroc(y, scores), 3))
    report(scores > detector.threshold_, y)


def as_patches(X: np.ndarray) -> np.ndarray:
    """Reshape (N, D) -> (N, 1, 1, D), the shape of patch embeddings."""
    return X[:, None, None, :]


def report(anomalous: np.ndarray, y: np.ndarray) -> None:
    print(f"  eights called anomalous: {anomalous[y == 0].sum()} of {(y == 0).sum()}")
    print(f"  others found:            {anomalous[y == 1].sum()} of {(y == 1).sum()}")


if __name__ == "__main__":
    main()
