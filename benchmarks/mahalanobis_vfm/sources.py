"""The data sets of the benchmark: normal images to fit on and to validate with, images to test."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anomalib_lite.datasets import ELPV, MVTecAD, MVTecAD2, Textile
from anomalib_lite.datasets.base import Sample

DATA = Path(os.environ.get("ANOMALIB_LITE_DATA", Path(__file__).parents[3] / "shared" / "data"))

# Measured by default; --root measures the eight categories of MVTec AD 2.
NAMES = ("magnetic_tile", "textile", "solar_cells")


@dataclass
class Source:
    """Samples of one data set, drawn for one seed."""

    name: str
    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]

    @property
    def has_masks(self) -> bool:
        return any(sample.mask_path for sample in self.test)


def open_source(
    name: str, seed: int, n_train: int | None, n_test: int | None, root: Path | None
) -> Source:
    """Draw the training images by ``seed``; the test images are always the same."""
    dataset = _open(name, root)
    validation = list(getattr(dataset, "validation", ()))
    train = _draw(dataset.train, None, seed)
    if not validation:  # MVTec AD 2 has its own
        n = max(2, len(train[:n_train]) // 5)
        validation, train = train[:n], train[n:]
    return Source(name, train[:n_train], validation, _draw(dataset.test, n_test, 0))


def _open(name: str, root: Path | None) -> MVTecAD | MVTecAD2 | ELPV | Textile:
    if root is not None:
        return MVTecAD2(root, name)
    if name == "magnetic_tile":
        return MVTecAD(DATA, name)
    if name == "solar_cells":
        return ELPV()
    return Textile()


def _draw(samples: Sequence[Sample], n: int | None, seed: int) -> list[Sample]:
    order = np.random.RandomState(seed).permutation(len(samples))[:n]
    return [samples[i] for i in order]
