"""The layout of MVTec AD and its relatives: categories, normal and anomalous images, masks."""

from __future__ import annotations

import os
from pathlib import Path

from anomalib_lite._validation import closest
from anomalib_lite.datasets.base import GOOD, Sample
from anomalib_lite.datasets.listing import (
    LeftOut,
    as_path,
    check_directory,
    list_images,
    list_images_and_masks,
    list_masks,
    pair,
    subdirectories,
)
from anomalib_lite.errors import MissingPathError

__all__ = [
    "TRAIN",
    "bad_samples",
    "find_category",
    "good_samples",
    "layout_of",
    "list_categories",
]

TRAIN = f"train/{GOOD}"
# Directories that tell the layouts apart; the first that is there counts.
_SIGNS = {
    "test_public": "MVTecAD2",
    "test/logical_anomalies": "MVTecLOCO",
    "test/structural_anomalies": "MVTecLOCO",
    "test": "MVTecAD",
}


def layout_of(home: Path) -> str | None:
    """Return the name of the class that reads a directory with ``train/good``, if there is one."""
    if not (home / TRAIN).is_dir():
        return None
    return next((cls for place, cls in _SIGNS.items() if (home / place).is_dir()), "MVTecAD")


def list_categories(root: str | os.PathLike[str], where: str, train: str = TRAIN) -> list[str]:
    """List the names of the directories in ``root`` that have the directory ``train``."""
    path = check_directory("root", as_path("root", root, where), where)
    return [p.name for p in subdirectories(path) if (p / train).is_dir()]


def find_category(
    root: str | os.PathLike[str], category: str, where: str, train: str = TRAIN
) -> Path:
    """Return the directory of a category; MissingPathError if it has another layout."""
    valid, path = list_categories(root, where, train), as_path("root", root, where)
    if category in valid:
        return _check_layout(path / category, where)
    if valid:
        hint = closest(category, valid)
    elif (path / train).is_dir():
        hint = f" {path} is a category itself: pass its parent as root."
    else:
        hint = f" A category is a directory that has a {train} directory."
    raise MissingPathError(
        f"{where}: category must be one of {valid} in {path}, got {category!r}.{hint}"
    )


def _check_layout(home: Path, where: str) -> Path:
    expected = [place for place, cls in _SIGNS.items() if cls == where]
    got = next((place for place in _SIGNS if (home / place).is_dir()), None)
    if got is None or not expected or _SIGNS[got] == where:
        return home  # if something is missing, reading it will say so
    other = _SIGNS[got]
    raise MissingPathError(
        f"{where}: {home} must have a directory {expected[0]}, got {got}: this is the layout of "
        f"{other}. Use {other} in place of {where}."
    )


def good_samples(
    home: Path, place: str, where: str, left_out: LeftOut | None = None
) -> list[Sample]:
    """List the normal images in ``home/place``; ``left_out`` receives what else is there."""
    found = list_images(place, home / place, where, left_out=left_out)
    return [Sample(path, 0, GOOD) for path in found]


def bad_samples(
    home: Path, place: str, ground_truth: str, where: str, left_out: LeftOut | None = None
) -> list[Sample]:
    """List the anomalous images in ``home/place``, with masks if ``home/ground_truth`` exists."""
    found = list_images_and_masks(place, home / place, where, left_out=left_out)
    kind = Path(place).name
    if not (home / ground_truth).is_dir():
        return [Sample(path, 1, kind, mask) for path, mask in found]
    directory = home / ground_truth / kind
    pairs = pair(
        (path for path, _ in found),
        list_masks(f"{ground_truth}/{kind}", directory, where),
        lambda path: (f"{path.stem}_mask", path.stem),
        lambda path: (
            f"{where}: the anomalous image {path} must have a mask "
            f"{directory / path.stem}_mask.png, got none. Add it, or remove the "
            f"whole {ground_truth} directory to go without masks."
        ),
    )
    return [Sample(path, 1, kind, mask) for path, mask in pairs]
