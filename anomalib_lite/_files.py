"""Places to write to: checked before long work begins, and named when they fail."""

from __future__ import annotations

import contextlib
import csv
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from anomalib_lite.errors import OutputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into an OutputError that names it."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write {path}: {reason}. Choose a place that can be written to."
        ) from error


def make_directory(path: Path) -> Path:
    """Return ``path``, made if need be, as a directory in which files can be made."""
    if path.is_file():
        raise OutputError(f"cannot write into {path}: it is a file. Name a directory.")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        # Only making a file tells: permission bits say nothing on network drives or to root.
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def check_file(path: Path) -> Path:
    """Return ``path`` if a file can be written there; its directory is made if need be."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory. Name a file inside it.")
    make_directory(path.parent)
    return path


def write_text(path: str | os.PathLike[str], text: str, where: str) -> None:
    """Write a file whole or not at all: first beside it, then renamed onto it."""
    target = Path(path)
    beside = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise OutputError(
            f"{where}: path must be a file that can be written, got {target} "
            f"({error.strerror}). Its directory must exist."
        ) from error


class RowsFile:
    """A CSV file that grows row by row and appears under its name when closed.

    Whatever ends the writing, the rows written so far are kept. Without any row an older file
    of that name stays.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.n_rows = 0
        self._part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._columns = columns

    def __enter__(self) -> Self:
        with writing(self.path):
            self._file = self._part.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(self._columns)
        return self

    def write(self, row: Sequence[object]) -> None:
        """Add one row, and hand it to the system at once."""
        with writing(self.path):
            self._writer.writerow(row)
            self._file.flush()
        self.n_rows += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with writing(self.path):
            self._file.close()
            if self.n_rows:
                self._part.replace(self.path)
            else:
                self._part.unlink()


def shortest(value: float) -> str:
    """The fewest digits that tell a float32, the type of scores, from its neighbours.

    Comparing a score read back with the threshold read back thus gives the label, always.

    Examples
    --------
    >>> shortest(25.884675979614258)
    '25.884676'
    """
    return str(np.float32(value))
