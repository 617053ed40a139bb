"""Magnetic tiles: surfaces of motor magnets, with five kinds of defect."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from anomalib_lite._validation import check_number
from anomalib_lite.datasets.base import GOOD, Dataset, Sample
from anomalib_lite.datasets.listing import (
    as_path,
    check_directory,
    pair,
    split_normal,
    subdirectories,
)
from anomalib_lite.errors import InvalidValueError, MissingPathError
from anomalib_lite.images import list_files

__all__ = ["FREE", "MagneticTile"]

FREE = "MT_Free"
_WHERE = "MagneticTile"
_NAME = re.compile(r"exp\d+_num_(\d+)")


class MagneticTile(Dataset):
    """Magnetic tiles: 1,344 photographs, gray, of many sizes; 952 of them without a defect.

    ::

        <root>/MT_Free/Imgs/exp1_num_10903.jpg
               MT_Crack/Imgs/exp1_num_3191.jpg
                             exp1_num_3191.png

    A photograph's name has the number of its exposure and of its part. The split is ours, since the
    authors publish none. It is by part: of the parts without any anomalous photograph, a share is
    kept for testing, with all photographs. Parts that have an anomalous one are in the test alone.
    So no part is on both sides.

    Parameters
    ----------
    root : str or PathLike
        Directory that holds ``MT_Free``, ``MT_Crack`` and so on.
    test_size : float, default=1/3
        Share of the parts without anomalous photographs that is kept for testing, in (0, 1); at
        least one.
    random_state : int, RandomState or None, default=0
        Seed of the split. The same number gives the same split on every machine.

    Attributes
    ----------
    name : str
        ``"magnetic_tile"``.
    train : tuple of Sample
        Normal photographs.
    test : tuple of Sample
        Normal photographs of other parts, then the anomalous ones. Kinds are ``"good"``,
        ``"blowhole"``, ``"break"``, ``"crack"``, ``"fray"`` and ``"uneven"``.
    licence, source, citation : str
        Licence of the images (none is stated), where they come from, and what to cite.

    Raises
    ------
    MissingPathError
        If a directory is missing or empty, or an anomalous photograph has no mask.
    InvalidValueError
        If a name does not say the part, there are fewer than 2 parts to split, or ``test_size`` or
        ``random_state`` is outside of what is allowed.
    InvalidTypeError
        If ``root`` is not a path.

    Notes
    -----
    Photographs are the ``.jpg`` files, masks the ``.png`` files; those of normal photographs are
    empty and not used. Nothing is decoded here, and nothing is downloaded.

    References
    ----------
    Huang, Qiu and Yuan, "Surface defect saliency of magnetic tile", The Visual Computer 36, 2020.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for kind, parts in (("Free", range(6)), ("Crack", range(6, 8))):
    ...         Path(root, f"MT_{kind}/Imgs").mkdir(parents=True)
    ...         for part in parts:
    ...             for suffix in (".jpg", ".png"):
    ...                 path = Path(root, f"MT_{kind}/Imgs/exp1_num_{part}{suffix}")
    ...                 Image.new("L", (6, 4)).save(path)
    ...     MagneticTile(root)
    MagneticTile('magnetic_tile': 4 train, 4 test (2 good, 2 crack), masks)
    """

    licence = "none stated"
    source = "https://github.com/abin24/Magnetic-tile-defect-datasets."
    citation = (
        "Huang, Qiu and Yuan, Surface defect saliency of magnetic tile, The Visual Computer 36, "
        "2020, doi:10.1007/s00371-018-1588-5"
    )

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        test_size: float = 1 / 3,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        home = check_directory("root", as_path("root", root, _WHERE), _WHERE)
        share = check_number("test_size", test_size, _WHERE, "(0, 1)")
        good = {path: _part(path) for path in _photographs(home / FREE)}
        bad = [sample for place in _kinds(home) for sample in _bad_samples(place)]
        with_defect = {_part(sample.path) for sample in bad}
        parts = sorted(set(good.values()) - with_defect, key=int)
        trained = set(split_normal(parts, share, random_state, _WHERE)[0])
        super().__init__(
            "magnetic_tile",
            [Sample(path, 0, GOOD) for path, part in good.items() if part in trained],
            [Sample(path, 0, GOOD) for path, part in good.items() if part not in trained] + bad,
        )


def _kinds(home: Path) -> list[Path]:
    found = subdirectories(home)
    kinds = [p for p in found if p.name.startswith("MT_") and p.name != FREE]
    if not kinds:
        raise MissingPathError(
            "MagneticTile: root must hold directories such as MT_Crack beside MT_Free, got "
            f"{[path.name for path in found]} in {home}. Pass the directory right above them."
        )
    return kinds


def _files(place: Path, suffix: str) -> list[Path]:
    home = check_directory(place.name, place / "Imgs", _WHERE)
    return [path for path in list_files(home) if path.suffix.lower() == suffix]


def _photographs(place: Path) -> list[Path]:
    found = _files(place, ".jpg")
    if not found:
        raise MissingPathError(
            f"{_WHERE}: {place.name} must hold photographs (.jpg), got none in {place / 'Imgs'}."
        )
    return found


def _part(path: Path) -> str:
    named = _NAME.fullmatch(path.stem)
    if named is None:
        raise InvalidValueError(
            f"{_WHERE}: a photograph must be named after its exposure and its part, as in "
            f"exp1_num_3191.jpg, got {path}. Remove what does not belong to the data set."
        )
    return named[1]


def _bad_samples(place: Path) -> list[Sample]:
    kind = place.name.removeprefix("MT_").lower()
    pairs = pair(
        _photographs(place),
        {path.stem: path for path in _files(place, ".png")},
        lambda path: (path.stem,),
        lambda path: (
            f"{_WHERE}: the photograph {path} must have a mask beside it, got no "
            f"{path.stem}.png. Unpack the data set again."
        ),
    )
    return [Sample(path, 1, kind, mask) for path, mask in pairs]
