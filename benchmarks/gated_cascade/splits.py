"""Data sets -> normal images to fit on, two mixed splits to judge by, and one of another material.

In the mixed splits 66 % of the images are normal, of each material, as in the source system.
All images of one physical part are on one side: they are near copies of each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from anomalib_lite.datasets import NEUDET, Dataset, KolektorSDD, MVTecAD
from anomalib_lite.datasets.base import Sample
from anomalib_lite.errors import InvalidValueError

SPLITS = ("val_mix", "test_mix", "neu_test")
MIXED = ("test_mix", "val_mix")
NORMAL_SHARE = 0.66
N_LABELLED, LABELLED_A_PART = 20, 2
# Magnetic tiles: a tile is photographed under several lights, and files are numbered as they were
# taken. Numbers of one tile are some tens apart, those of the next tile hundreds or thousands.
_TILE = re.compile(r"exp\d_num_(\d+)")
_NEXT_TILE = 300

Part = list[Sample]


@dataclass
class Material:
    """Physical parts of one material.

    ``lendable`` is how many normal images may still leave those to fit on.
    """

    train: list[Sample] = field(default_factory=list)
    spare: list[Part] = field(default_factory=list)
    sides: dict[str, list[Part]] = field(default_factory=lambda: {side: [] for side in MIXED})
    lendable: int = 0


def draw_splits(
    seed: int,
    *,
    data: Path,
    kolektor: Path | None = None,
    mvtec: Path | None = None,
    neu: Path | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    delivered: bool = False,
) -> tuple[dict[str, list[Sample]], dict[Path, str]]:
    """``train_normal``, ``labelled`` (anomalies to learn from) and those of :data:`SPLITS`; and the
    part that each image of the first two shows.

    Magnetic tiles, or KolektorSDD and the categories of MVTec AD where these are given. No image
    is in two splits. The numbers are limits for ``train_normal``, and for each split to judge by.
    With ``delivered``, the data set's own ``train`` is what is fitted on, its ``test`` what is
    judged by, and each image counts as a part of its own.
    """
    random = np.random.RandomState(seed)
    datasets: list[tuple[Dataset, Callable[[Path], str]]] = []
    if kolektor is not None:
        datasets.append((KolektorSDD(kolektor), _folder))
    if mvtec is not None:
        datasets += [(MVTecAD(mvtec, category), str) for category in MVTecAD.categories(mvtec)]
    if not datasets:
        tiles = MVTecAD(data, "magnetic_tile")
        datasets.append((tiles, _tiles(tiles)))
    divide = _as_delivered if delivered else _divide
    materials = [divide(dataset, part_of, random) for dataset, part_of in datasets]
    labelled = _take_labelled(materials, random)
    groups = [_mixed(material) for material in materials]
    splits = {name: [s for group in groups for s in group[name]] for name in groups[0]}
    foreign = NEUDET(neu if neu is not None else data / "neu_det")
    splits["neu_test"] = _named(foreign)
    splits["train_normal"] = _thin(splits["train_normal"], n_train)
    for name in SPLITS:
        splits[name] = _limited(splits[name], n_test)
    splits["labelled"] = labelled
    shown = {
        s.path: str(s.path) if delivered else f"{dataset.name}/{part_of(s.path)}"
        for dataset, part_of in datasets
        for s in _every(dataset)
    }
    return splits, {s.path: shown[s.path] for s in [*splits["train_normal"], *labelled]}


def counts(splits: dict[str, list[Sample]]) -> dict[str, dict[str, int]]:
    """Normal and anomalous images of each split."""
    return {
        name: {"normal": _n_good(split), "anomalous": len(split) - _n_good(split)}
        for name, split in splits.items()
    }


def _folder(path: Path) -> str:
    return str(path.parent)


def _tiles(dataset: Dataset) -> Callable[[Path], str]:
    """Which tile an image shows, by its path."""
    numbers: dict[int, list[Path]] = {}
    for sample in _every(dataset):
        found = _TILE.match(sample.path.name)
        if found is None:
            raise InvalidValueError(
                "magnetic tiles must be named as they are published, as in exp1_num_4727.jpg, to "
                f"tell one tile from the next, got {sample.path}."
            )
        numbers.setdefault(int(found[1]), []).append(sample.path)
    ordered, tile = sorted(numbers), 0
    tiles = dict.fromkeys(numbers[ordered[0]], "0")
    for before, number in pairwise(ordered):
        tile += number - before > _NEXT_TILE
        tiles |= {path: str(tile) for path in numbers[number]}
    return tiles.__getitem__


def _divide(
    dataset: Dataset, part_of: Callable[[Path], str], random: np.random.RandomState
) -> Material:
    """Parts with anomalies by turns to either side; half of the normal images stay to fit on."""
    parts: dict[str, Part] = {}
    for sample in _named(dataset):
        parts.setdefault(part_of(sample.path), []).append(sample)
    shuffled = [parts[name] for name in random.permutation(sorted(parts))]
    to_train = {s.path for s in dataset.train}
    # Those of the data set's own test are lent first.
    good = sorted(
        (p for p in shuffled if _n_good(p) == len(p)), key=lambda p: p[0].path in to_train
    )
    bad = sorted(
        (p for p in shuffled if _n_good(p) < len(p)), key=lambda p: max(s.kind for s in _bad(p))
    )
    material = Material(spare=good, lendable=sum(map(_n_good, shuffled)) // 2)
    for i, part in enumerate(bad):
        if _n_good(part) <= material.lendable:
            material.lendable -= _n_good(part)
            material.sides[MIXED[i % 2]].append(part)
        else:
            material.train += _good(part)
    return material


def _as_delivered(
    dataset: Dataset, part_of: Callable[[Path], str], random: np.random.RandomState
) -> Material:
    """What the data set fits on and tests by, as it says."""
    del part_of
    named = {s.path: s for s in _named(dataset)}
    test = [named[s.path] for s in dataset.test]
    test = [test[i] for i in random.permutation(len(test))]
    good = [[s] for s in _good(test)]
    train = _good(named[s.path] for s in dataset.train)
    material = Material(train=train, spare=good, lendable=len(good))
    for i, sample in enumerate(sorted(_bad(test), key=lambda s: s.kind)):
        material.sides[MIXED[i % 2]].append([sample])
    return material


def _take_labelled(materials: list[Material], random: np.random.RandomState) -> list[Sample]:
    """Anomalies of parts that leave ``val_mix`` for it, as many as a quarter of its anomalies."""
    places = [(m, part) for m in materials for part in m.sides["val_mix"]]
    most = min(N_LABELLED, sum(len(_bad(part)) for _, part in places) // 4)
    labelled: list[Sample] = []
    for i in random.permutation(len(places)):
        material, part = places[i]
        if len(labelled) < most:
            labelled += _bad(part)[: min(LABELLED_A_PART, most - len(labelled))]
            material.sides["val_mix"].remove(part)
            material.train += _good(part)
            material.lendable += _n_good(part)
    return labelled


def _mixed(material: Material) -> dict[str, list[Sample]]:
    """As many images in the mixed splits as the normal ones allow, the rest to fit on."""
    sides = {name: [s for part in parts for s in part] for name, parts in material.sides.items()}
    train = list(material.train)
    for part in material.spare:
        missing = {name: _good_for(len(_bad(s))) - _n_good(s) for name, s in sides.items()}
        name = max(missing, key=lambda name: missing[name])
        if missing[name] > 0.5 and len(part) <= material.lendable:
            material.lendable -= len(part)
            sides[name] += part
        else:
            train += part
    for name, samples in sides.items():
        good, bad = _good(samples), _bad(samples)
        n_bad = min(len(bad), round(len(good) / _good_for(1)))
        sides[name] = _thin(good, round(_good_for(n_bad))) + _thin(bad, n_bad)
    return {"train_normal": train, **sides}


def _good_for(n_bad: int) -> float:
    return n_bad * NORMAL_SHARE / (1 - NORMAL_SHARE)


def _limited(samples: list[Sample], n: int | None) -> list[Sample]:
    """At most ``n``, with the share of normal images that there was."""
    if n is None or len(samples) <= n:
        return samples
    n_bad = round(n * len(_bad(samples)) / len(samples))
    return _thin(_good(samples), n - n_bad) + _thin(_bad(samples), n_bad)


def _thin(samples: list[Sample], n: int | None) -> list[Sample]:
    """``n`` of them at even steps, so that kinds keep their shares."""
    if n is None or n >= len(samples):
        return samples
    return [samples[i * len(samples) // n] for i in range(n)]


def _every(dataset: Dataset) -> list[Sample]:
    return [*dataset.train, *getattr(dataset, "train_anomalous", ()), *dataset.test]


def _named(dataset: Dataset) -> list[Sample]:
    """All samples, with the name of their data set before that of their kind."""
    return [replace(s, kind=f"{dataset.name}/{s.kind}") for s in _every(dataset)]


def _good(samples: Iterable[Sample]) -> list[Sample]:
    return [s for s in samples if s.label == 0]


def _bad(samples: Iterable[Sample]) -> list[Sample]:
    return [s for s in samples if s.label == 1]


def _n_good(samples: Iterable[Sample]) -> int:
    return len(_good(samples))
