"""The sixteen categories that are measured: real photographs that anyone can have on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite.datasets import ELPV, MVTecAD, Textile
from anomalib_lite.datasets.base import Sample

DATA = Path(os.environ.get("ANOMALIB_LITE_DATA", Path(__file__).parents[3] / "shared" / "data"))

# The papers of PIPED; tables give their mean.
PAPERS = (
    *("PA_BDP01_TL", "PA_BFT01_TL", "PA_BRG01_RL", "PA_BRG02_RL", "PA_BRG03_TL", "PA_BTN01_RL"),
    *("PA_FLR01_TL", "PA_FLR02_TL", "PA_FVN01_TL", "PA_FVN02_RL", "PA_GLA01_TL", "PA_ZPB01_RL"),
)
# Tables have one column for each of these: name -> categories.
GROUPS = {
    "tiles": ("magnetic_tile",),
    "papers": PAPERS,
    "solar cells, mono": ("elpv_mono",),
    "solar cells, poly": ("elpv_poly",),
    "textile": ("textile",),
}
CATEGORIES = tuple(name for names in GROUPS.values() for name in names)


@dataclass(frozen=True)
class Images:
    """Images of one category, drawn for one seed."""

    train: list[Sample]
    test: list[Sample]


def draw_images(category: str, seed: int, n_train: int, n_test: int) -> Images:
    """Draw normal images to fit on, and as many normal as anomalous ones to test.

    The seed draws the images to fit on. The images to test are the same for every seed.
    """
    dataset = _open(category)
    normal = [sample for sample in dataset.test if sample.label == 0]
    anomalous = [sample for sample in dataset.test if sample.label == 1]
    test = [*_draw(normal, n_test // 2, 0), *_draw(anomalous, n_test // 2, 0)]
    return Images(_draw(dataset.train, n_train, seed), test)


def _open(category: str) -> Any:
    if category == "magnetic_tile":
        return MVTecAD(DATA, category)
    if category in PAPERS:
        return _Paper(category)
    if category == "textile":
        return Textile()
    return ELPV(category.removeprefix("elpv_"))


class _Paper:
    """A kind of paper in MVTec AD's layout; one writes 01 in an image's name, 1 in its mask's."""

    def __init__(self, name: str) -> None:
        root = DATA / "piped" / name
        good, defect = (sorted((root / "test" / kind).iterdir()) for kind in ("good", "defect"))
        masks = root / "ground_truth" / "defect"
        self.train = [Sample(p, 0, "good", None) for p in sorted((root / "train/good").iterdir())]
        self.test = [Sample(path, 0, "good", None) for path in good]
        for path in defect:
            mask = masks / f"{path.stem}_mask.png"
            if not mask.exists():
                mask = masks / f"{path.stem.replace('_D_0', '_D_')}_mask.png"
            self.test.append(Sample(path, 1, "defect", mask))


def _draw(samples: Sequence[Sample], n: int, seed: int) -> list[Sample]:
    order = np.random.RandomState(seed).permutation(len(samples))[:n]
    return [samples[i] for i in order]
