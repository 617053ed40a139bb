"""Which images belong together: given by the user, told by file names, or found in the pixels."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomalib_lite._validation import check_groups
from anomalib_lite.errors import (
    AnomalibLiteError,
    CopiesWarning,
    InvalidValueError,
    MissingPathError,
)
from anomalib_lite.images import ImageSource
from anomalib_lite.images._given import DatasetItem
from anomalib_lite.images.copies import STRICTNESS, copies_in

__all__ = ["default_groups", "group_ids", "groups_of_files"]

# Photographs of one part are looked for among at most so many images: all pairs are compared.
_MOST_COMPARED = 2000

_RUNS = re.compile(r"runs:(\d+)")
_LAST_NUMBER = re.compile(r"(\d+)\D*$")


def group_ids(source: ImageSource, groups: Any, on_error: str = "raise") -> np.ndarray:
    """Number the groups of images from 0.

    Parameters
    ----------
    source : ImageSource
    groups : sequence of N whole numbers or strings, "auto", or None
        None if each image is a group of its own.
        ``"auto"`` finds them by :func:`~anomalib_lite.images.copies.find_copies`.
    on_error : {"raise", "skip"}, default="raise"
        For ``"auto"``: whether an image that cannot be used is an error, or its own group.

    Returns
    -------
    ndarray of shape (N,), int64

    Raises
    ------
    InvalidValueError, InvalidTypeError
        For groups of another number or type.

    Examples
    --------
    >>> group_ids(ImageSource(np.zeros((3, 8, 8, 3), np.uint8)), ["b", "a", "b"])
    array([0, 1, 0])
    """
    if groups is None:
        return np.arange(len(source))
    if isinstance(groups, str) and groups == "auto":
        return copies_in(source, STRICTNESS, on_error).groups
    return check_groups(groups, len(source), source.where)


def default_groups(
    source: ImageSource, on_error: str, *, exact_alone: bool = False, stacklevel: int = 2
) -> np.ndarray | None:
    """Group copies of which nobody has said that they are copies.

    Parameters
    ----------
    source : ImageSource
        N normal images.
    on_error : {"raise", "skip"}
    exact_alone : bool, default=False
        Look for exact copies alone, as for more than 2,000 images, or where some are objects that
        make their pixels when they are asked.
    stacklevel : int, default=2
        Of the warning.

    Returns
    -------
    ndarray of shape (N,), int64, or None
        Images of equal content are a group; None if there are none.

    Warns
    -----
    CopiesWarning
        Of these, and of images that look like copies, or like photographs of one part.

    Examples
    --------
    >>> images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    >>> source = ImageSource([*images, images[1]])
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     default_groups(source, on_error="raise")
    array([0, 1, 2, 1])
    >>> str(caught[0].message)[:57]
    'ImageSource: 1 of 4 images has the same content as anothe'
    """
    first: dict[str, int] = {}
    exact = np.array([first.setdefault(_content(source, i), i) for i in range(len(source))])
    n, told = len(exact), []
    copies = np.flatnonzero(exact != np.arange(n))
    if len(copies):
        told.append(
            f"{len(copies):,} of {n:,} images {'has' if len(copies) == 1 else 'have'} the same "
            f"content as another ({source.names[copies[0]]} and {source.names[exact[copies[0]]]}): "
            "such images count as one"
        )
    if not exact_alone and n <= _MOST_COMPARED and all(map(_is_at_hand, source.items)):
        alike = copies_in(source, STRICTNESS, on_error).groups
        distinct = np.unique(exact)
        numbers, counts = np.unique(alike[distinct], return_counts=True)
        near = distinct[np.isin(alike[distinct], numbers[counts > 1])]
        if len(near):
            pair = [i for i in near if alike[i] == alike[near[0]]][:2]
            told.append(
                f"{len(near):,} of {n:,} images look like copies, or like photographs of the same "
                f"part ({' and '.join(source.names[i] for i in pair)}), and count as if each "
                "showed another: new parts may then exceed the threshold more often than asked. "
                "Pass groups, the part of each image, or groups='auto' to hold such images back "
                f"together; groups=range({n}) if each shows another part"
            )
    if told:
        text = f"{source.where}: {'. '.join(told)}."
        warnings.warn(text, CopiesWarning, stacklevel=stacklevel)
    return np.unique(exact, return_inverse=True)[1] if len(copies) else None


def _is_at_hand(item: Any) -> bool:
    """Tell whether an image may be read twice: a file, or pixels in memory, but no other object.

    Such an object may compute or fetch its pixels each time that it is asked for them, and what a
    pipe gave is gone.
    """
    path = getattr(item, "path", item)
    if isinstance(path, str | os.PathLike):
        return Path(path).is_file() or not Path(path).exists()
    in_memory = isinstance(item, np.ndarray | Image.Image | bytes | DatasetItem)
    return in_memory or type(item).__module__.startswith("torch")


def _content(source: ImageSource, index: int) -> str:
    """Return a hash of a file, or of the pixels of an image that is in memory."""
    item = source.items[index]
    if not _is_at_hand(item):
        return f"not looked at: {index}"
    path = getattr(item, "path", item)
    if isinstance(path, str | os.PathLike):
        try:
            if Path(path).is_file():
                with Path(path).open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            pass
        return f"cannot be read: {index}"  # which the fit will say
    try:
        pixels = source[index]
    except AnomalibLiteError:
        return f"cannot be used: {index}"
    head = f"{pixels.shape} {pixels.dtype} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def groups_of_files(
    paths: Sequence[str | os.PathLike[str]], rule: str, where: str = "groups_of_files"
) -> list[str]:
    """Tell by their names which files show the same part.

    Parameters
    ----------
    paths : sequence of N paths
    rule : str
        - ``"folder"``: files of one folder are a group;
        - ``"runs:100"``: files of one folder whose last numbers are at most 100 apart, each from
          the next;
        - ``"parts.csv:serial"``: the column ``serial`` of a CSV file, whose first column holds the
          names of the files;
        - anything else is a regular expression, which must be found in each file's name: files are
          a group where its parenthesised parts are equal, or without these all that it matches.
    where : str
        Caller, named in errors.

    Returns
    -------
    list of N str
        Pass it as ``groups`` to ``fit``.

    Raises
    ------
    MissingPathError
        If there is no such CSV file.
    InvalidValueError
        If a file has no number, is not in the CSV file, or is not matched; or for a rule that is no
        regular expression.

    Examples
    --------
    >>> groups_of_files(["part7_top.png", "part7_side.png", "part8_top.png"], r"part(\\d+)")
    ['7', '7', '8']
    >>> groups_of_files(["img_001.png", "img_003.png", "img_250.png"], "runs:100")
    ['./1', './1', './250']
    """
    files = [Path(os.fspath(path)) for path in paths]
    if rule == "folder":
        return [str(file.parent) for file in files]
    if runs := _RUNS.fullmatch(rule):
        return _by_runs(files, int(runs[1]), where)
    table, _, column = rule.rpartition(":")
    if table.lower().endswith(".csv"):
        return _by_table(files, Path(table), column, where)
    return _by_pattern(files, rule, where)


def _by_runs(files: list[Path], gap: int, where: str) -> list[str]:
    places = []
    for file in files:
        found = _LAST_NUMBER.search(file.stem)
        if found is None:
            raise InvalidValueError(
                f"{where}: groups by runs need a number in each file name, got {file.name}. Use a "
                "regular expression or a CSV file."
            )
        places.append((str(file.parent), int(found[1])))
    groups: dict[tuple[str, int], str] = {}
    before: tuple[str, int] | None = None
    for place in sorted(set(places)):
        goes_on = before is not None and place[0] == before[0] and place[1] - before[1] <= gap
        groups[place] = groups[before] if goes_on and before else "{}/{}".format(*place)
        before = place
    return [groups[place] for place in places]


def _by_table(files: list[Path], table: Path, column: str, where: str) -> list[str]:
    if not table.is_file():
        raise MissingPathError(f"{where}: there is no file {table} with the groups.")
    with table.open(newline="", encoding="utf-8-sig") as opened:
        rows = csv.DictReader(opened)
        names = list(rows.fieldnames or ())
        if column not in names:
            raise InvalidValueError(
                f"{where}: {table} has no column {column!r}. Its columns: {', '.join(names)}."
            )
        group_of = {Path(row[names[0]] or "").name: row[column] or "" for row in rows}
    for file in files:
        if file.name not in group_of:
            raise InvalidValueError(
                f"{where}: {table} does not say the group of {file.name}. Its first column, "
                f"{names[0]!r}, must name every file."
            )
    return [group_of[file.name] for file in files]


def _by_pattern(files: list[Path], pattern: str, where: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InvalidValueError(
            f"{where}: groups={pattern!r} is no regular expression: {error}. It may also be "
            "'folder', 'runs:100' or 'table.csv:column'."
        ) from error
    groups = []
    for file in files:
        found = compiled.search(file.name)
        if found is None:
            raise InvalidValueError(
                f"{where}: the regular expression {pattern!r} for groups is not found in "
                f"{file.name}. It must match the part of every name that tells the part shown."
            )
        groups.append(" ".join(part or "" for part in found.groups() or (found[0],)))
    return groups
