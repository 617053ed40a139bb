"""Data sets -> normal images to fit on, two mixed splits to judge by, and one of another material.

In the mixed splits 66 % of the images are normal, of each material, as in the source system.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from anomalib_lite.datasets import NEUDET, KolektorSDD, MVTecAD
from anomalib_lite.datasets.base import Sample

SPLITS = ("val_mix", "test_mix", "neu_test")
NORMAL_SHARE = 0.66
N_LABELLED = 20


@dataclass
class Material:
    """Images of one material, for each side: to fit on, to validate by, to test by.

    ``spare`` are normal images to fit on that may go to the other sides where normal ones lack.
    """

    train: list[Sample]
    spare: list[Sample]
    good: dict[str, list[Sample]]
    bad: dict[str, list[Sample]]


def draw_splits(
    seed: int,
    *,
    data: Path,
    kolektor: Path | None = None,
    mvtec: Path | None = None,
    neu: Path | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
) -> dict[str, list[Sample]]:
    """``train_normal``, ``labelled`` (anomalies to learn from) and those of :data:`SPLITS`.

    Magnetic tiles, or KolektorSDD and the categories of MVTec AD where these are given. No image
    is in two splits. The numbers are limits for ``train_normal``, and for each split to judge by.
    """
    random = np.random.RandomState(seed)
    materials = []
    if kolektor is not None:
        materials.append(_by_part(kolektor, random))
    if mvtec is not None:
        materials += [_category(MVTecAD(mvtec, c), random) for c in MVTecAD.categories(mvtec)]
    if not materials:
        materials.append(_category(MVTecAD(data, "magnetic_tile"), random))
    held = [s for material in materials for s in material.bad["val_mix"]]
    labelled = _thin(held, min(N_LABELLED, len(held) // 4))
    parts = [_mixed(material, {s.path for s in labelled}) for material in materials]
    splits = {name: [s for part in parts for s in part[name]] for name in parts[0]}
    splits["labelled"] = labelled
    foreign = NEUDET(neu if neu is not None else data / "neu_det")
    splits["neu_test"] = [replace(s, kind=f"{foreign.name}/{s.kind}") for s in foreign.test]
    splits["train_normal"] = _thin(splits["train_normal"], n_train)
    for name in SPLITS:
        splits[name] = _limited(splits[name], n_test)
    return splits


def counts(splits: dict[str, list[Sample]]) -> dict[str, dict[str, int]]:
    """Normal and anomalous images of each split."""
    return {
        name: {"normal": sum(s.label == 0 for s in split), "anomalous": sum(s.label for s in split)}
        for name, split in splits.items()
    }


def _category(dataset: MVTecAD, random: np.random.RandomState) -> Material:
    """Normal images for testing first; what lacks, from at most half of those for training."""
    bad = _halves([s for s in dataset.test if s.label], random)
    good = _halves([s for s in dataset.test if not s.label], random)
    train = _shuffled(dataset.train, random)
    return _named(dataset.name, train[len(train) // 2 :], train[: len(train) // 2], good, bad)


def _by_part(root: Path, random: np.random.RandomState) -> Material:
    """Whole physical parts: half of them to fit on, a quarter each for the mixed splits."""
    dataset = KolektorSDD(root)
    every = [*dataset.train, *dataset.train_anomalous, *dataset.test]
    parts = [str(p) for p in random.permutation(sorted({str(s.path.parent) for s in every}))]
    n_train = len(parts) // 2
    sides = [set(parts[:n_train]), set(parts[n_train::2]), set(parts[n_train + 1 :: 2])]
    on = [[s for s in every if str(s.path.parent) in side] for side in sides]
    train = [s for s in on[0] if not s.label]
    mixed = dict(zip(("test_mix", "val_mix"), on[1:], strict=True))
    good, bad = (
        {name: _shuffled([s for s in side if s.label == y], random) for name, side in mixed.items()}
        for y in (0, 1)
    )
    return _named(dataset.name, train, [], good, bad)


def _named(
    name: str,
    train: list[Sample],
    spare: list[Sample],
    good: dict[str, list[Sample]],
    bad: dict[str, list[Sample]],
) -> Material:
    def of(samples: list[Sample]) -> list[Sample]:
        return [replace(s, kind=f"{name}/{s.kind}") for s in samples]

    sides = [{side: of(samples) for side, samples in group.items()} for group in (good, bad)]
    return Material(of(train), of(spare), *sides)


def _halves(samples: Sequence[Sample], random: np.random.RandomState) -> dict[str, list[Sample]]:
    """Every second of each kind to either side."""
    ordered = _shuffled(samples, random)
    return {"test_mix": ordered[0::2], "val_mix": ordered[1::2]}


def _shuffled(samples: Sequence[Sample], random: np.random.RandomState) -> list[Sample]:
    """In random order within each kind, kind after kind."""
    order = random.permutation(len(samples))
    return sorted((samples[i] for i in order), key=lambda s: s.kind)


def _mixed(material: Material, labelled: set[Path]) -> dict[str, list[Sample]]:
    """As many images in the mixed splits as the normal ones allow, the rest to fit on."""
    spare, parts = list(material.spare), {}
    for left, side in ((2, "test_mix"), (1, "val_mix")):
        lent = len(spare) // left
        good = material.good[side] + spare[:lent]
        bad = [s for s in material.bad[side] if s.path not in labelled]
        n_bad = min(len(bad), int(len(good) / _good_for(1)))
        n_good = min(len(good), round(_good_for(n_bad)))
        n_own = min(n_good, len(material.good[side]))
        parts[side] = _thin(material.good[side], n_own) + spare[: n_good - n_own]
        parts[side] += _thin(bad, n_bad)
        spare = spare[n_good - n_own :]
    return {"train_normal": material.train + spare, **parts}


def _good_for(n_bad: int) -> float:
    return n_bad * NORMAL_SHARE / (1 - NORMAL_SHARE)


def _limited(samples: list[Sample], n: int | None) -> list[Sample]:
    """At most ``n``, with the share of normal images that there was."""
    if n is None or len(samples) <= n:
        return samples
    bad = [s for s in samples if s.label]
    n_bad = round(n * len(bad) / len(samples))
    return _thin([s for s in samples if not s.label], n - n_bad) + _thin(bad, n_bad)


def _thin(samples: list[Sample], n: int | None) -> list[Sample]:
    """``n`` of them at even steps, so that kinds keep their shares."""
    if n is None or n >= len(samples):
        return samples
    return [samples[i * len(samples) // n] for i in range(n)]


def kinds(samples: Sequence[Sample]) -> dict[str, int]:
    """How many of each kind."""
    return dict(sorted(Counter(s.kind for s in samples).items()))
