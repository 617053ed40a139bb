"""The layout of MVTec AD and MVTec AD 2: categories, normal images, anomalous images, masks."""

from __future__ import annotations

import os
from pathlib import Path

from anomalib_lite._validation import closest
from anomalib_lite.datasets.base import Sample
from anomalib_lite.datasets.listing import (
    as_path,
    check_directory,
    list_images,
    list_images_and_masks,
    list_masks,
    pair,
    subdirectories,
)
from anomalib_lite.errors import MissingPathError

__all__ = ["GOOD", "TRAIN", "bad_samples", "find_category", "good_samples", "list_categories"]

GOOD = "good"
TRAIN = f"train/{GOOD}"
_TEST = {"MVTecAD": "test", "MVTecAD2": "test_public"}  # distinguishes the layouts


def list_categories(root: str | os.PathLike[str], where: str) -> list[str]:
    """List the names of the directories in ``root`` that have a ``train/good``."""
    path = check_directory("root", as_path("root", root, where), where)
    return [p.name for p in subdirectories(path) if (p / TRAIN).is_dir()]


def find_category(root: str | os.PathLike[str], category: str, where: str) -> Path:
    """Return the directory of a category; MissingPathError if it has the other layout."""
    valid, path = list_categories(root, where), as_path("root", root, where)
    if category in valid:
        return _check_layout(path / category, where)
    if valid:
        hint = closest(category, valid)
    elif (path / TRAIN).is_dir():
        hint = f" {path} is a category itself: pass its parent as root."
    else:
        hint = " A category is a directory that has a train/good directory."
    raise MissingPathError(
        f"{where}: category must be one of {valid} in {path}, got {category!r}.{hint}"
    )


def _check_layout(home: Path, where: str) -> Path:
    if (home / _TEST[where]).is_dir():
        return home
    for other, test in _TEST.items():
        if (home / test).is_dir():
            raise MissingPathError(
                f"{where}: {home} must have a directory {_TEST[where]}, got {test}: this is the "
                f"layout of {other}. Use {other} in place of {where}."
            )
    return home  # reading it will name what is missing


def good_samples(home: Path, place: str, where: str) -> list[Sample]:
    """List the normal images in ``home/place``."""
    return [Sample(path, 0, GOOD) for path in list_images(place, home / place, where)]


def bad_samples(home: Path, place: str, ground_truth: str, where: str) -> list[Sample]:
    """List the anomalous images in ``home/place``, with masks if ``home/ground_truth`` exists."""
    found, kind = list_images_and_masks(place, home / place, where), Path(place).name
    if not (home / ground_truth).is_dir():
        return [Sample(path, 1, kind, mask) for path, mask in found.items()]
    directory = home / ground_truth / kind
    pairs = pair(
        found,
        list_masks(f"{ground_truth}/{kind}", directory, where),
        lambda path: (f"{path.stem}_mask", path.stem),
        lambda path: (
            f"{where}: the anomalous image {path} must have a mask "
            f"{directory / path.stem}_mask.png, got none. Add it, or remove the "
            f"whole {ground_truth} directory to go without masks."
        ),
    )
    return [Sample(path, 1, kind, mask) for path, mask in pairs]
