"""Writing files: places checked before long work begins, files that are replaced whole."""

from __future__ import annotations

import contextlib
import csv
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from anomalib_lite.errors import OutputError

__all__ = [
    "RowsFile",
    "check_file",
    "make_directory",
    "replacing",
    "shortest",
    "write_text",
    "writing",
]


@contextmanager
def writing(path: Path, where: str = "") -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into an OutputError that names it."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        prefix = f"{where}: " if where else ""
        raise OutputError(
            f"{prefix}cannot write {path}: {reason}. Choose a directory that exists and can be "
            "written to."
        ) from error


@contextmanager
def replacing(path: Path, where: str = "") -> Iterator[Path]:
    """Give the path of a temporary file, which replaces ``path`` when the block ends.

    An error in the block, or in replacing, leaves an older file whole and nothing else behind.

    Parameters
    ----------
    path : Path
    where : str, optional
        Caller, named in errors.

    Yields
    ------
    Path
        In the same directory, where no file lies yet; the block writes and closes it.

    Raises
    ------
    OutputError
        If the system refuses to write: names the path and the remedy.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "scores.txt")) as temporary:
    ...         _ = temporary.write_text("0.5")
    ...     Path(folder, "scores.txt").read_text()
    '0.5'
    """
    temporary = _temporary_name(path)
    with writing(path, where):
        try:
            yield temporary
            _move_into_place(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    # In the same directory: renaming is atomic only within one file system.
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"


def _move_into_place(temporary: Path, path: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())  # or a power cut could leave a renamed file without its content
    temporary.replace(path)


def make_directory(path: Path) -> Path:
    """Make a directory if there is none, and return it if files can be made in it."""
    if path.is_file():
        raise OutputError(f"cannot write into {path}: it is a file. Name a directory.")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        # Only a trial tells: permission bits say nothing on network drives, or about root.
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def check_file(path: Path) -> Path:
    """Return ``path`` if a file can be written there; make its directory if there is none."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory. Name a file inside it.")
    make_directory(path.parent)
    return path


def write_text(path: str | os.PathLike[str], text: str, where: str = "") -> None:
    """Write a text file whole or not at all; OutputError as from :func:`replacing`."""
    with replacing(Path(path), where) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


class RowsFile:
    """A CSV file that grows row by row and appears under its name when closed.

    Also after an error, the rows written so far are kept. Without any row an older file of that
    name stays.

    Parameters
    ----------
    path : Path
    columns : sequence of str
        Names of the columns, for the first line.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.n_rows = 0
        self._temporary = _temporary_name(path)
        self._columns = columns

    def __enter__(self) -> Self:
        with writing(self.path):
            self._file = self._temporary.open("w", encoding="utf-8", newline="")
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
            try:
                self._file.close()
                if self.n_rows:
                    _move_into_place(self._temporary, self.path)
            finally:
                with contextlib.suppress(OSError):
                    self._temporary.unlink(missing_ok=True)


def shortest(value: float) -> str:
    """Write a float32, the type of scores, with the fewest digits that identify it.

    A score and a threshold that are read back thus compare as they did before.

    Examples
    --------
    >>> shortest(25.884675979614258)
    '25.884676'
    """
    return str(np.float32(value))
