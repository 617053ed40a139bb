"""What a person hands over as images -> items, each of which is one image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from anomalib_lite.errors import InvalidTypeError, InvalidValueError, MissingPathError
from anomalib_lite.images._listing import (
    BELOW,
    describe_left_out,
    images_and_masks,
    warn_left_out,
)

__all__ = ["DatasetItem", "as_item", "list_given"]

_ONE = (bytes, bytearray, memoryview, Image.Image)
_IMAGE_KEYS = ("image", "img")  # of rows that are dicts


@dataclass(frozen=True)
class DatasetItem:
    """One image of a map-style data set, such as torchvision's ``ImageFolder``."""

    dataset: Any
    index: int

    def read(self, where: str) -> Any:
        """Return what the data set gives for the image, without its label."""
        row = self.dataset[self.index]
        if isinstance(row, tuple | list) and row:
            row = row[0]
        elif isinstance(row, Mapping):
            row = next((row[key] for key in _IMAGE_KEYS if key in row), row)
        return as_item(row, where)


def list_given(images: Any, where: str, *, recursive: bool = False) -> list[Any]:
    """List what is given as images, if it is no list: a directory, one image, an array, a data set.

    ``recursive`` says whether the subdirectories of a directory are listed too.

    Raises
    ------
    MissingPathError, InvalidValueError, InvalidTypeError
        If a path does not exist, if there is no image, or if the type holds no images.
    """
    if isinstance(images, str | os.PathLike):
        items: list[Any] = _list_path(images, where, recursive)
    elif isinstance(images, _ONE) or hasattr(images, "path") or hasattr(images, "read"):
        items = [images]
    elif hasattr(images, "__array__") or hasattr(images, "detach"):
        items = _list_array(images, where)
    elif isinstance(images, Sequence):
        items = list(images)
    elif (
        hasattr(images, "__getitem__")
        and hasattr(images, "__len__")
        and not isinstance(images, Mapping | Set)
    ):
        items = [DatasetItem(images, index) for index in range(len(images))]
    else:
        remedy = "Wrap a generator in list(...)."
        if hasattr(images, "dataset"):
            remedy = (
                "Give the data set of a DataLoader, loader.dataset, without Normalize; how many "
                "images make a batch is the detector's batch_size."
            )
        raise InvalidTypeError(
            f"{where}: images must be a directory, a path, a PIL image, an array, a tensor, a "
            f"file's content as bytes, an open file, a data set with a length, or a list of these, "
            f"got {type(images).__name__}. {remedy}"
        )
    if not items:
        raise InvalidValueError(f"{where}: images is empty. Give at least one image.")
    return items


def as_item(item: Any, where: str) -> Any:
    """Return the path of a sample, the content of an open file, or the item as it is."""
    if hasattr(item, "path"):
        return item.path
    if isinstance(item, bytearray | memoryview):
        return bytes(item)
    if not hasattr(item, "read") or isinstance(item, DatasetItem):
        return item
    try:
        if hasattr(item, "seek"):
            item.seek(0)  # what was just written is read from its start, as Pillow does
        content = item.read()
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise InvalidValueError(
            f"{where}: images must hold files that are open, got one that cannot be read: {error}. "
            "Open it again, or give its path."
        ) from error
    if isinstance(content, bytes):
        return content
    raise InvalidTypeError(
        f"{where}: images must hold files that are open in binary mode, got one whose read() gives "
        f"{type(content).__name__}. Open it with open(path, 'rb'); await what is asynchronous."
    )


def _list_array(images: Any, where: str) -> list[Any]:
    shape = tuple(images.shape)
    if len(shape) == 4:
        return list(images)
    if len(shape) in (2, 3):
        return [images]
    if len(shape) == 1 and getattr(images, "dtype", None) is not None and images.dtype.kind in "OU":
        return list(images)
    raise InvalidValueError(
        f"{where}: an array of images must have shape (N, H, W, 3), (H, W, 3) or (H, W), "
        f"got {shape}."
    )


def _list_path(given: str | os.PathLike[str], where: str, recursive: bool) -> list[Path]:
    path = Path(given)
    if not os.fspath(given):
        raise InvalidValueError(f"{where}: images is an empty path. Give '.' for this directory.")
    if not os.path.exists(path):  # noqa: PTH110 (of a name that is too long, it says False)
        is_pattern = any(sign in path.name for sign in "*?[")
        remedy = " Give what a pattern finds: sorted(glob.glob(pattern))." if is_pattern else ""
        raise MissingPathError(f"{where}: {path} does not exist.{remedy}")
    if not path.is_dir():
        return [path]
    left_out: dict[str, list[Path]] = {}
    name = f"directory {path}"
    found = images_and_masks(name, path, where, recursive=recursive, left_out=left_out)
    if found and BELOW in left_out:
        remedy = "To take subdirectories too, pass ImageSource(directory, recursive=True)."
        warn_left_out(path, left_out, where, remedy)
    elif found:
        warn_left_out(path, left_out, where)
    if found:
        return [image for image, _ in found]
    remedy = "Known are the suffixes that Pillow reads, such as '.png', '.jpg' and '.tif'."
    if left_out.get(BELOW):
        remedy = f"Its subdirectories {[p.name for p in left_out[BELOW]]} do: name one of them."
    elif left_out:
        remedy = f"It has {describe_left_out(left_out)}. {remedy}"
    raise InvalidValueError(f"{where}: {name} holds no image files. {remedy}")
