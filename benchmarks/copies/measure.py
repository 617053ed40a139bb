"""What does find_copies put together on real images, and what does it join wrongly?

    python benchmarks/copies/measure.py --data-root /path/to/data
    python benchmarks/copies/measure.py --data-root /path/to/data --max-images 120

Prints the figures of docs/copies.md, each with its number of images. README.md says what they mean.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from anomalib_lite.datasets import ELPV, Dataset, MVTecAD, Sample, Textile  # noqa: E402
from anomalib_lite.errors import AnomalibLiteError  # noqa: E402
from anomalib_lite.images.copies import find_copies  # noqa: E402

# Photographs of one tile follow each other with rising exposure. Between tiles the numbers jump.
GAP_OF_ONE_TILE, GAP_OF_RUNS = 100, 300
SIDES = 0.08  # two photographs of one tile differ by less, as a share of the larger side
OPEN: dict[str, Callable[[Path], Dataset]] = {
    "tiles": lambda root: MVTecAD(root, "magnetic_tile"),
    "mono cells": lambda root: ELPV("mono", uncertain="anomalous"),
    "poly cells": lambda root: ELPV("poly", uncertain="anomalous"),
    "textile": lambda root: Textile(),
}
COPIED, AMONG = 50, {"mono cells": 200, "tiles": 150, "textile": 100}


def normal(samples: Sequence[Sample]) -> list[Path]:
    """Return the files of the normal images."""
    return [sample.path for sample in samples if sample.label == 0]


def draw(paths: list[Path], n: int, seed: int) -> list[Path]:
    """Draw n of the images, or all if there are fewer."""
    return [paths[i] for i in np.random.RandomState(seed).permutation(len(paths))[:n]]


# --- Photographs of one part ----------------------------------------------------------------------


class Tiles:
    """Photographs of magnetic tiles in order of their number, and what their names tell of them.

    Parameters
    ----------
    paths : list of Path
        Files named ``exp<exposure>_num_<number>.jpg``.

    Attributes
    ----------
    paths : list of Path
    runs : ndarray of shape (N,), int64
        Number of each photograph's run, from 0.
    pairs : ndarray of shape (P, 2), int64
        Photographs that are surely of one tile.
    """

    def __init__(self, paths: list[Path]) -> None:
        about = []
        for path in paths:
            exposure, number = map(int, re.findall(r"\d+", path.stem))
            with Image.open(path) as image:
                about.append((number, exposure, image.size, path))
        about.sort()
        self.paths = [path for *_, path in about]
        runs, tiles = [0], [[0]]
        for i, (before, after) in enumerate(pairwise(about), start=1):
            gap = after[0] - before[0]
            runs.append(runs[-1] + (gap > GAP_OF_RUNS))
            sides = np.array([before[2], after[2]])
            differ = float((1 - sides.min(axis=0) / sides.max(axis=0)).max())
            if gap <= GAP_OF_ONE_TILE and after[1] > before[1] and differ < SIDES:
                tiles[-1].append(i)
            else:
                tiles.append([i])
        self.runs = np.array(runs)
        pairs = [pair for tile in tiles for pair in combinations(tile, 2)]
        self.pairs = np.array(pairs, np.int64).reshape(-1, 2)

    def report(
        self, what: str, chosen: np.ndarray | None = None, strictness: float = 8.0
    ) -> np.ndarray:
        """Print the share of pairs among the chosen photographs that are in one group.

        Parameters
        ----------
        what : str
        chosen : ndarray of shape (N,), bool, optional
            Photographs that find_copies sees; by default all.
        strictness : float, default=8.0

        Returns
        -------
        ndarray of shape (N,), int64
            Group of each photograph; -1 for those not chosen.
        """
        chosen = np.ones(len(self.paths), bool) if chosen is None else chosen
        groups = np.full(len(self.paths), -1)
        paths = [self.paths[i] for i in np.flatnonzero(chosen)]
        groups[chosen] = find_copies(paths, strictness=strictness).groups
        pairs = self.pairs[chosen[self.pairs].all(axis=1)]
        found = groups[pairs[:, 0]] == groups[pairs[:, 1]]
        even = self.runs[pairs[:, 0]] % 2 == 0
        parts = {"all": np.ones_like(even), "even runs": even, "odd runs": ~even}
        shares = [
            f"{name} {found[part].sum() / max(1, part.sum()):.1%} of {part.sum()}"
            for name, part in parts.items()
        ]
        print(f"{what}: {len(paths)} photographs, pairs found: {', '.join(shares)}", flush=True)
        return groups


def report_tiles(dataset: Dataset) -> None:
    """Print the pairs of one tile that are put together, and the groups of several runs."""
    train = normal(dataset.train)
    tiles = Tiles([*train, *normal(dataset.test)])
    groups = tiles.report("tiles")
    tiles.report("tiles of train", np.isin(tiles.paths, train))
    for strictness in (7.0, 9.0):
        tiles.report(f"tiles, strictness {strictness:g}", strictness=strictness)
    for seed in range(3):
        runs = np.random.RandomState(seed).permutation(tiles.runs.max() + 1)[:40]
        tiles.report(f"tiles of 40 runs, draw {seed}", np.isin(tiles.runs, runs))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        if len(set(tiles.runs[members])) > 1:
            names = " ".join(tiles.paths[i].stem for i in members)
            print(f"tiles of several runs in one group: {len(members)} photographs, {names}")


# --- Images that only look alike ------------------------------------------------------------------


def report_look_alikes(what: str, paths: list[Path]) -> None:
    """Print the share of images that are in a group with another, which none should be."""
    copies = find_copies(paths)
    joined = np.bincount(copies.groups)[copies.groups] > 1
    print(f"{what}: {len(paths)} images, {joined.mean():.1%} ({joined.sum()}) in a group with "
          f"another; joined above {copies.threshold:.3f}", flush=True)  # fmt: skip


def report_draws(what: str, dataset: Dataset) -> None:
    """Print the same of the normal images, and of draws of all."""
    every = [sample.path for sample in (*dataset.train, *dataset.test)]
    report_look_alikes(f"{what}, good", normal([*dataset.train, *dataset.test]))
    for n, seeds in ((100, 5), (300, 3)):
        for seed in range(seeds):
            report_look_alikes(f"{what}, draw {seed} of {n}", draw(every, n, seed))


# --- Copies ---------------------------------------------------------------------------------------


def compressed(image: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Return the image (H, W, 3) as a JPEG of quality 75 holds it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def shifted(image: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Return the image, one pixel further to the right."""
    return np.concatenate([image[:, :1], image[:, :-1]], axis=1)


def mirrored(image: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Return the image with left and right exchanged."""
    return image[:, ::-1]


def brighter(image: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Return the image with 15 % more light, as far as 255 reaches."""
    return np.clip(np.round(1.15 * image), 0, 255).astype(np.uint8)


def noisy(image: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Return the image with Gaussian noise of 4 gray levels."""
    return np.clip(np.round(image + random.normal(0, 4, image.shape)), 0, 255).astype(np.uint8)


CHANGES = {
    "JPEG of quality 75": compressed,
    "shifted by a pixel": shifted,
    "mirrored": mirrored,
    "brighter by 15 %": brighter,
    "noise of 4 gray levels": noisy,
}


def report_changed(what: str, dataset: Dataset) -> None:
    """Print the share of changed copies that are in the group of their image."""
    paths = draw(normal([*dataset.train, *dataset.test]), AMONG[what], seed=0)
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    copied = images[:COPIED]
    for name, change in CHANGES.items():
        random = np.random.RandomState(0)
        copies = [change(image, random) for image in copied]
        groups = find_copies([*images, *copies]).groups
        found = groups[len(images) :] == groups[: len(copied)]
        print(f"copies, {what}, {name}: {found.mean():.0%} of {len(copied)} among "
              f"{len(images)} images", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True, help="holds magnetic_tile/")
    parser.add_argument("--max-images", type=int, help="of each split, to try it; default: all")
    args = parser.parse_args()
    for what, open_it in OPEN.items():
        try:
            dataset = open_it(args.data_root)
        except AnomalibLiteError as error:  # it is not on this machine
            print(f"{what} are left out: {error}", flush=True)
            continue
        some = slice(args.max_images)
        dataset = Dataset(what, dataset.train[some], dataset.test[some])
        if what == "tiles":
            report_tiles(dataset)
        else:
            paths = [sample.path for sample in (*dataset.train, *dataset.test)]
            report_look_alikes(f"{what}, all", paths)
        if what == "mono cells":
            report_draws(what, dataset)
        if what in AMONG:
            report_changed(what, dataset)


if __name__ == "__main__":
    main()
