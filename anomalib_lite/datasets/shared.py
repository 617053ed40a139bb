"""Test images that are among the training images: found by the content of their files."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path

from anomalib_lite._validation import check_choice
from anomalib_lite.datasets.base import Sample
from anomalib_lite.errors import ImageError, InvalidValueError, MissingPathError

__all__ = ["find_shared"]

_HEAD = 1 << 14  # bytes; photographs of one size differ in their first rows
_BLOCK = 1 << 20


def find_shared(
    train: Iterable[Sample | str | os.PathLike[str]],
    test: Iterable[Sample | str | os.PathLike[str]],
    *,
    on_error: str = "raise",
) -> list[tuple[Path, Path]]:
    """Find test images whose file has the content of a training image's file.

    Parameters
    ----------
    train, test : iterable of Sample, str or PathLike
        Such as the ``train`` and ``test`` of a data set. Links are followed.
    on_error : {"raise", "skip"}, default="raise"
        What to do about a file that does not exist or cannot be read: raise, or leave it out, as
        a detector does.

    Returns
    -------
    list of (Path, Path)
        The training image and the test image, in the order of ``test``. Of several equal training
        images the first is given.

    Raises
    ------
    MissingPathError, ImageError
        If a file does not exist or cannot be read, unless ``on_error="skip"``.
    InvalidValueError
        If ``on_error`` is neither.

    Notes
    -----
    Files are the same if all their bytes are: an image that was saved again, cut or resized is not
    found. Only files of equal size are read, first their beginnings, and only those with equal
    beginnings as a whole (BLAKE2b). So most files of most data sets are never read.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, content in (("a.png", b"one"), ("b.png", b"two"), ("c.png", b"one")):
    ...         _ = Path(folder, name).write_bytes(content)
    ...     a, b, c = sorted(Path(folder).iterdir())
    ...     [(first.name, second.name) for first, second in find_shared([a], [b, c])]
    [('a.png', 'c.png')]
    """
    check_choice("on_error", on_error, ("raise", "skip"), "find_shared")
    trained, tested = _paths(train), _paths(test)
    # Each round looks closer, at the files that the rounds before could not tell apart.
    groups: dict[Hashable, tuple[list[Path], list[Path]]] = {None: (trained, tested)}
    for look in (_size, _head, _content):
        closer: dict[Hashable, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
        for key, sides in groups.items():
            for side, paths in enumerate(sides):
                for path in paths:
                    try:
                        closer[key, look(path)][side].append(path)
                    except OSError as error:
                        if on_error == "raise":
                            raise _unreadable(path, error) from error
        groups = {key: sides for key, sides in closer.items() if all(sides)}
    first = {path: same[0] for same, paths in groups.values() for path in paths}
    return [(first[path], path) for path in tested if path in first]


def _paths(images: Iterable[Sample | str | os.PathLike[str]]) -> list[Path]:
    return [Path(image.path if isinstance(image, Sample) else image) for image in images]


def _unreadable(path: Path, error: OSError) -> InvalidValueError:
    if isinstance(error, FileNotFoundError):
        return MissingPathError(f"find_shared: {path} does not exist.")
    return ImageError(f"find_shared: {path} cannot be read: {error.strerror or error}.")


def _size(path: Path) -> int:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a FIFO would not end
        raise OSError("it is no file")
    return status.st_size


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(_HEAD)).digest()


def _content(path: Path) -> Hashable:
    if path.stat().st_size <= _HEAD:
        return None  # all of it was in the head
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()
