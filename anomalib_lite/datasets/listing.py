"""Files of a data set: listed, paired with their masks, split into training and test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sklearn.utils import check_random_state

from anomalib_lite.errors import InvalidTypeError, InvalidValueError, MissingPathError
from anomalib_lite.images import (
    images_and_masks,
    list_files,
    visible_directories,
)

__all__ = [
    "LeftOut",
    "as_path",
    "check_directory",
    "list_images",
    "list_images_and_masks",
    "list_masks",
    "listed_file",
    "pair",
    "split_normal",
    "subdirectories",
]

_Item = TypeVar("_Item")
LeftOut: TypeAlias = dict[str, list[Path]]  # kind -> what is not taken for an image


def as_path(name: str, value: Any, where: str) -> Path:
    """Return ``value`` as a Path if it is a string or path-like."""
    if isinstance(value, str | os.PathLike):
        return Path(os.fspath(value)).expanduser()
    raise InvalidTypeError(f"{where}: {name} must be a path, got {type(value).__name__}.")


def check_directory(name: str, path: Path, where: str) -> Path:
    """Return ``path`` if it is a directory; otherwise name the first part that is missing."""
    if path.is_dir():
        return path
    if path.exists():
        raise MissingPathError(f"{where}: {name} must be a directory, got the file {path}.")
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    detail = "" if missing == path else f" (already {missing} is missing)"
    raise MissingPathError(
        f"{where}: {name} must be an existing directory, got {path}: no such directory{detail}."
    )


def subdirectories(directory: Path, left_out: LeftOut | None = None) -> list[Path]:
    """List the directories in ``directory`` that may hold images, sorted by name.

    Hidden ones, those of systems and network drives, and overlays of ``predict`` are none;
    ``left_out`` receives the overlays.
    """
    return visible_directories(directory, {} if left_out is None else left_out)


def list_images(
    name: str,
    directory: Path,
    where: str,
    *,
    recursive: bool = False,
    left_out: LeftOut | None = None,
) -> list[Path]:
    """List the image files in ``directory`` without masks; MissingPathError if there is none."""
    others: LeftOut = {} if left_out is None else left_out
    found = list_images_and_masks(
        name, directory, where, recursive=recursive, with_masks=False, left_out=others
    )
    return [image for image, _ in found]


def list_images_and_masks(
    name: str,
    directory: Path,
    where: str,
    *,
    recursive: bool = False,
    with_masks: bool = True,
    left_out: LeftOut | None = None,
) -> list[tuple[Path, Path | None]]:
    """List the images in ``directory``, each with the mask that lies beside it, if there is one.

    As :func:`~anomalib_lite.images.images_and_masks`; MissingPathError if there is no such
    directory, or no image in it.
    """
    found = images_and_masks(
        name,
        check_directory(name, directory, where),
        where,
        recursive=recursive,
        with_masks=with_masks,
        left_out={} if left_out is None else left_out,
    )
    if not found:
        raise _without_images(name, directory, where)
    return found


def _without_images(name: str, directory: Path, where: str) -> MissingPathError:
    return MissingPathError(
        f"{where}: {name} must hold images (.png, .jpg and others that Pillow reads), got none in "
        f"{directory}."
    )


def list_masks(name: str, directory: Path, where: str) -> dict[str, Path]:
    """Map the path of each mask from ``directory``, without its suffix, to the mask."""
    masks: dict[str, Path] = {}
    found = list_files(check_directory(name, directory, where), recursive=True)
    if not found:
        raise _without_images(name, directory, where)
    for path in found:
        key = path.relative_to(directory).with_suffix("").as_posix()
        if key in masks:
            raise InvalidValueError(
                f"{where}: {name} must hold one mask for each image, got {masks[key]} and {path}. "
                "Keep one of them."
            )
        masks[key] = path
    return masks


def pair(
    images: Iterable[Path],
    companions: Mapping[str, Path],
    names: Callable[[Path], Sequence[str]],
    missing: Callable[[Path], str],
) -> list[tuple[Path, Path]]:
    """Pair each image with its companion, such as its mask.

    Parameters
    ----------
    images : iterable of Path
    companions : mapping of str to Path
        All companions, by name.
    names : callable
        Gives the names that the companion of an image may have; the first that exists counts.
    missing : callable
        Gives the error's text for an image without a companion.

    Returns
    -------
    list of (image, companion)

    Raises
    ------
    MissingPathError
        If an image has no companion.

    Examples
    --------
    >>> masks = {"7_mask": Path("masks/7_mask.png")}
    >>> [(image, mask)] = pair([Path("7.jpg")], masks, lambda image: [f"{image.stem}_mask"], str)
    >>> mask.name
    '7_mask.png'
    """
    pairs = []
    for image in images:
        found = next((name for name in names(image) if name in companions), None)
        if found is None:
            raise MissingPathError(missing(image))
        pairs.append((image, companions[found]))
    return pairs


def listed_file(home: Path, name: str, file: Path, where: str) -> Path:
    """Return the path of an image that a file of the data set lists, relative to ``home``."""
    path = home / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InvalidValueError(
            f"{where}: {file} must list paths inside of {home}, got {name!r}. Unpack it again."
        )
    if not path.is_file():
        raise MissingPathError(
            f"{where}: {path} must exist, since {file} lists it, got no such file. Unpack the data "
            "set again."
        )
    return path


def split_normal(
    paths: Sequence[_Item], test_size: float, random_state: Any, where: str
) -> tuple[list[_Item], list[_Item]]:
    """Split paths, or parts, at random into those for training and for test, in the order given."""
    n_test = round(test_size * len(paths))
    if test_size > 0 and len(paths) < 2:
        raise InvalidValueError(
            f"{where}: at least 2 normal images must be there to be split, got {len(paths)}. "
            "Add images, or pass test_size=0 to train on all of them."
        )
    n_test = min(max(n_test, 1 if test_size > 0 else 0), len(paths) - 1)
    try:
        # A RandomState gives the same numbers in every version of NumPy; a Generator may not.
        order = check_random_state(random_state).permutation(len(paths))
    except ValueError as error:
        raise InvalidValueError(
            f"{where}: random_state must be an int, a RandomState or None, got {random_state!r}."
        ) from error
    held_out = set(order[:n_test].tolist())
    train = [path for index, path in enumerate(paths) if index not in held_out]
    return train, [path for index, path in enumerate(paths) if index in held_out]
