"""Your own directories: one of normal images and, if you have them, some of anomalous ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from anomalib_lite._validation import check_number
from anomalib_lite.datasets.base import GOOD, Dataset, Sample
from anomalib_lite.datasets.listing import (
    LeftOut,
    as_path,
    check_directory,
    list_images,
    list_images_and_masks,
    list_masks,
    pair,
    split_normal,
)
from anomalib_lite.errors import InvalidValueError, MissingPathError
from anomalib_lite.images import MASK_ENDINGS, warn_left_out

__all__ = ["Folder"]

_Path: TypeAlias = str | os.PathLike[str]


class Folder(Dataset):
    """Images in directories of your own.

    Parameters
    ----------
    root : str or PathLike
        Directory that holds the others. Every other path is relative to it, or absolute.
    normal : str or PathLike, default="good"
        Directory of normal images, subdirectories included, also those behind links.
    anomalous : str, PathLike, iterable of these, or None, default=None
        Directories of anomalous images, subdirectories included; used for testing only. The kind
        of an image is the name of its directory.
    normal_test : str, PathLike or None, default=None
        Separate directory of normal images for testing. With it, all images of ``normal`` are
        for training and ``test_size`` is not used.
    masks : str, PathLike or None, default=None
        Directory of ground truth masks, one for each anomalous image: the mask of
        ``scratch/007.jpg`` is ``007_mask.png``, ``007_GT.png``, ``007_label.png`` or ``007.png``
        (any image suffix), in ``<masks>/scratch`` or directly in ``<masks>``. None: masks beside
        the images, if there are any.
    test_size : float, default=0.2
        Share of the images in ``normal`` that is kept for testing, in [0, 1); at least one
        image, unless it is 0.
    random_state : int, RandomState or None, default=0
        Seed of the split. The same number gives the same split on every machine.
    name : str or None, default=None
        Name in tables and reports; None is the name of ``root``.

    Attributes
    ----------
    name : str
    train : tuple of Sample
        Normal images, sorted by path.
    test : tuple of Sample
        The normal images that are kept for testing, of kind "good", then the anomalous ones.

    Raises
    ------
    MissingPathError
        If a directory is missing or holds no images, or an anomalous image has no mask although
        ``masks`` is given.
    InvalidValueError
        If a file is in two of the directories, ``test_size`` is outside [0, 1), there are too
        few images to split, or one mask would belong to two images.
    InvalidTypeError
        If a path is not a path.

    Notes
    -----
    A random split assumes that the images are independent. If one part was photographed several
    times, its images are in training and in test, and the result looks too good. In that case keep
    the images of one part, day or batch together, and name the test directory with
    ``normal_test``.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for kind, n in (("good", 10), ("scratch", 3)):
    ...         Path(root, kind).mkdir()
    ...         for i in range(n):
    ...             Image.new("RGB", (64, 48)).save(Path(root, kind, f"{i:03d}.png"))
    ...     Folder(root, anomalous="scratch", name="line 3")
    Folder('line 3': 8 train, 5 test (2 good, 3 scratch), no masks)
    """

    def __init__(
        self,
        root: _Path,
        *,
        normal: _Path = GOOD,
        anomalous: _Path | Iterable[_Path] | None = None,
        normal_test: _Path | None = None,
        masks: _Path | None = None,
        test_size: float = 0.2,
        random_state: int | np.random.RandomState | None = 0,
        name: str | None = None,
    ) -> None:
        home = check_directory("root", as_path("root", root, "Folder"), "Folder")
        mask_root = None if masks is None else home / as_path("masks", masks, "Folder")
        good = home / as_path("normal", normal, "Folder")
        left_out: LeftOut = {}
        train = list_images("normal", good, "Folder", recursive=True, left_out=left_out)
        if normal_test is None:
            share = check_number("test_size", test_size, "Folder", "[0, 1)")
            train, test = split_normal(train, share, random_state, "Folder")
        else:
            place = home / as_path("normal_test", normal_test, "Folder")
            test = list_images("normal_test", place, "Folder", recursive=True, left_out=left_out)
        bad: list[Sample] = []
        for directory in _listed(anomalous):
            place = home / as_path("anomalous", directory, "Folder")
            bad += _anomalous(place, good, mask_root, left_out)
        warn_left_out(home, left_out, "Folder")
        super().__init__(
            home.resolve().name if name is None else name,
            [Sample(path, 0, GOOD) for path in train],
            [Sample(path, 0, GOOD) for path in test] + _add_masks(bad, mask_root),
        )


def _listed(anomalous: _Path | Iterable[_Path] | None) -> list[_Path]:
    if anomalous is None:
        return []
    return [anomalous] if isinstance(anomalous, str | os.PathLike) else list(anomalous)


def _anomalous(
    directory: Path, good: Path, mask_root: Path | None, left_out: LeftOut
) -> list[Sample]:
    found = list_images_and_masks(
        "anomalous", directory, "Folder", recursive=True, left_out=left_out
    )
    place, masks = directory.resolve(), None if mask_root is None else mask_root.resolve()
    if masks is not None and place in masks.parents:
        found = [
            (path, mask)
            for path, mask in found
            if masks not in (place / path.relative_to(directory)).parents
        ]
    if not found:
        raise MissingPathError(
            f"Folder: anomalous must hold images outside of masks, got none in {directory}."
        )
    samples = [Sample(path, 1, path.parent.name, mask) for path, mask in found]
    for sample in samples:
        if sample.kind in {GOOD, good.name}:
            raise InvalidValueError(
                f"Folder: anomalous must name directories of bad parts only, got {directory}, "
                f"which holds {sample.path}. Name the directories inside one by one."
            )
    return samples


def _add_masks(samples: list[Sample], mask_root: Path | None) -> list[Sample]:
    """Give each anomalous sample its mask; InvalidValueError if two would share one."""
    if mask_root is None:
        return samples
    images = {sample.path.absolute() for sample in samples}  # they may lie beside their masks
    masks = list_masks("masks", mask_root, "Folder")
    pairs = pair(
        (sample.path for sample in samples),
        {name: mask for name, mask in masks.items() if mask.absolute() not in images},
        _mask_names,
        lambda path: (
            f"Folder: the anomalous image {path} must have a mask, got none at "
            f"{mask_root / _mask_names(path)[0]}.png. Add it, or leave masks out."
        ),
    )
    image_of: dict[Path, Path] = {}
    for image, mask in pairs:
        if image_of.setdefault(mask, image) != image:
            raise InvalidValueError(
                f"Folder: every mask must belong to one image, got {mask} for both "
                f"{image_of[mask]} and {image}. Put the masks into {mask_root / image.parent.name}."
            )
    return [Sample(image, 1, image.parent.name, mask) for image, mask in pairs]


def _mask_names(image: Path) -> list[str]:
    endings = [e for ending in MASK_ENDINGS for e in (ending, ending.upper())]
    names = [image.stem + ending for ending in ["_mask", *endings, ""]]
    return [f"{image.parent.name}/{name}" for name in names] + names
