"""Writing files: places checked before long work begins, files that are replaced whole."""

from __future__ import annotations

import contextlib
import csv
import glob
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from anomalib_lite.errors import OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None

__all__ = [
    "RowsFile",
    "check_file",
    "make_directory",
    "quoted",
    "replacing",
    "shortest",
    "unquoted",
    "write_text",
    "writing",
]


# What a spreadsheet takes for a formula, and the mark of a cell that is quoted.
_FORMULAS = ("=", "+", "-", "@", "'")
_ESCAPED = re.compile(r"\\(?:x..|u....|U........|.)", re.DOTALL)


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

    An error in the block, or in replacing, leaves an older file whole and nothing else behind. What
    a killed process leaves is removed by the next call for the same path. A symbolic link stays,
    and the file that it leads to is replaced.

    Parameters
    ----------
    path : Path
    where : str, optional
        Caller, named in errors.

    Yields
    ------
    Path
        An empty file in the same directory; the block writes and closes it.

    Raises
    ------
    OutputError
        If the system refuses to write, or the path is a device or a pipe: names the path and the
        remedy.

    Examples
    --------
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "scores.txt")) as temporary:
    ...         _ = temporary.write_text("0.5")
    ...     Path(folder, "scores.txt").read_text()
    '0.5'
    """
    path = _target(path, where)
    with writing(path, where), _temporary(path) as temporary:
        yield temporary
        _move_into_place(temporary, path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Give the path of a new file beside ``path``, which is locked while it is used.

    One that a killed process has left has no lock any more, and is removed first.
    """
    # In the same directory: renaming is atomic only within one file system.
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            _lock(file)
            left.unlink()
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    with temporary.open("xb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            _lock(file)
        try:
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _lock(file: IO[bytes]) -> None:
    """Lock an open file for as long as it is open; OSError if another process has done so."""
    if fcntl is None:
        raise OSError("this system has no such locks")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _target(path: Path, where: str = "") -> Path:
    """Return the file that ``path`` stands for: a link leads to it, and a device is none."""
    if path.exists() and not path.is_file() and not path.is_dir():
        prefix = f"{where}: " if where else ""
        raise OutputError(
            f"{prefix}cannot write {path}: it is a device or a pipe, and no file. Name a file."
        )
    return path.resolve() if path.is_symlink() else path


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
    path = _target(path)
    make_directory(path.parent)
    return path


def write_text(path: str | os.PathLike[str], text: str, where: str = "") -> None:
    """Write a text file whole or not at all; OutputError as from :func:`replacing`."""
    with replacing(Path(path), where) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


class RowsFile:
    """A CSV file that grows row by row.

    It takes the place of an older file with its first row, which is whole then, and each further
    row is handed to the system at once. So rows stay whatever happens, and without any an older
    file stays.

    Parameters
    ----------
    path : Path
    columns : sequence of str
        Names of the columns, for the first line.
    more : bool, default=False
        Go on behind the rows of an older file with these columns, if there is one. A last row that
        was cut short is removed.

    Attributes
    ----------
    n_rows : int
        Rows written, without those before.
    before : list of dict
        With ``more``: the rows before, by column.

    Raises
    ------
    OutputError
        If the system refuses to write, or with ``more`` if the older file has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, more: bool = False) -> None:
        self.path = path
        self.n_rows = 0
        self.before: list[dict[str, str]] = []
        self._columns, self._more = list(columns), more
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self._more and self.path.exists():
            self._go_on()
        return self

    def _go_on(self) -> None:
        """Read the rows before, and open the file behind the last whole one."""
        with writing(self.path):
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            text = whole.decode(errors="surrogateescape")
            rows = list(csv.reader(text.splitlines(), strict=True))
        if not rows or rows[0] != self._columns:
            raise OutputError(
                f"cannot go on with {self.path}: its columns are {rows[0] if rows else []}, and "
                f"those to write {self._columns}. Choose another directory, or begin anew."
            )
        self.before = [
            {name: unquoted(cell) for name, cell in zip(self._columns, row, strict=True)}
            for row in rows[1:]
        ]
        with writing(self.path):
            os.truncate(self.path, len(whole))
            self._file = self.path.open("a", encoding="utf-8", newline="")

    def write(self, row: Sequence[object]) -> None:
        """Add one row, and hand it to the system at once."""
        cells = [quoted(cell) if isinstance(cell, str) else cell for cell in row]
        if self._file is None:  # the first one takes the place of an older file
            with (
                replacing(self.path) as temporary,
                temporary.open("w", encoding="utf-8", newline="") as file,
            ):
                csv.writer(file, lineterminator="\n").writerows([self._columns, cells])
            with writing(self.path):
                self._file = self.path.open("a", encoding="utf-8", newline="")
        else:
            with writing(self.path):
                csv.writer(self._file, lineterminator="\n").writerow(cells)
                self._file.flush()
        self.n_rows += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with writing(self.path), self._file as file:
                file.flush()
                os.fsync(file.fileno())


def quoted(text: str) -> str:
    r"""Make the text of a cell harmless; :func:`unquoted` reads it back.

    A number stays as it is, and other text unless it begins with one of ``= + - @ '``, which
    spreadsheets take for a formula, or holds a character that cannot be printed: a line break, an
    escape sequence, a byte of a file's name that is no UTF-8. Then it begins with ``'``, and such
    characters and backslashes are written as in a Python string.

    >>> print(quoted("good/1.png"), quoted("=1+1"), quoted("a\nb.png"))
    good/1.png '=1+1 'a\nb.png
    >>> unquoted(quoted("a\nb.png")) == "a\nb.png"
    True
    """
    with contextlib.suppress(ValueError):
        float(text)
        return text
    if text.isprintable() and not text.startswith(_FORMULAS):
        return text
    return "'" + "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def unquoted(cell: str) -> str:
    """Return the text that :func:`quoted` made a cell of."""
    if not cell.startswith("'"):
        return cell
    return _ESCAPED.sub(lambda found: found[0].encode().decode("unicode_escape"), cell[1:])


def shortest(value: float) -> str:
    """Write a float32, the type of scores, with the fewest digits that identify it.

    A score and a threshold that are read back thus compare as they did before.

    Examples
    --------
    >>> shortest(25.884675979614258)
    '25.884676'
    """
    return str(np.float32(value))
