"""The folder of a study's results: rows that are appended case by case, and who made them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite._files import make_directory, write_text, writing
from anomalib_lite.errors import InvalidValueError, OutputError

__all__ = ["Results", "case_id"]

_JSON = (str, int, list, tuple, dict, type(None))  # a bool is an int
_WORDS = {
    "configuration": "the configuration",
    "study": "the Python file of the study",
    "code": "the code of anomalib-lite",
    "version": "the version of anomalib-lite",
    "data": "the data",
}


class Results:
    """A folder with ``rows.jsonl``, one row a line, and ``run.json``, which says who made them.

    Parameters
    ----------
    folder : Path
    identity : mapping of str to str
        What must be the same for rows to be in one table: hashes of configuration, study and code.
    resume : bool
        Whether to go on with rows that are there.

    Attributes
    ----------
    finished : set of str
        Names (:func:`case_id`) of the cases whose rows are in the file.

    Raises
    ------
    OutputError
        If the folder holds rows and ``resume`` is False: nothing is ever overwritten.
    InvalidValueError
        If its rows were made with another identity.

    Notes
    -----
    Each row holds the name of its case and how many rows this has. Rows of a case that is not
    complete, which a killed run may leave at the end, are cut off when the run goes on.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Results(Path(folder), {"code": "1"}, resume=False).append("a", [{"x": 1}, {"x": 2}])
    ...     again = Results(Path(folder), {"code": "1"}, resume=True)
    >>> again.finished
    {'a'}
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], resume: bool) -> None:
        self.folder = make_directory(folder)
        self.rows_file, self._run_file = folder / "rows.jsonl", folder / "run.json"
        self._about: dict[str, Any] = {"identity": dict(identity), "data": {}}
        # A run that ended before its first row has left nothing to lose.
        if self.rows_file.exists() and self.rows_file.stat().st_size:
            if not resume:
                raise OutputError(
                    f"studies: {folder} holds results already. Go on with --resume, name another "
                    "--output, or remove the folder."
                )
            self._take_over(identity)
        self._save()
        self.finished = self._cut_to_finished()

    def append(self, case: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all rows of a case at once, and hand them to the disk.

        Numbers of numpy become Python's, NaN and infinities null, and what JSON cannot hold, such
        as a path, its text.
        """
        head = {"case": case, "case_rows": len(rows)}
        plain = [{key: _plain(value) for key, value in row.items()} | head for row in rows]
        lines = "".join(json.dumps(row, default=_plain) + "\n" for row in plain)
        with writing(self.rows_file), self.rows_file.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        if rows:
            self.finished.add(case)

    def read(self) -> list[dict[str, Any]]:
        """Return all rows."""
        if not self.rows_file.exists():
            return []
        return [json.loads(line) for line in self.rows_file.read_text("utf-8").splitlines()]

    def knows_data(self, name: str) -> bool:
        """Tell whether rows of these images may be here."""
        return name in self._about["data"]

    def check_data(self, name: str, fingerprint: str) -> None:
        """Note the hash of images that rows are of; InvalidValueError if it was another before."""
        known = self._about["data"].get(name)
        if known is None:
            self._about["data"][name] = fingerprint
            self._save()
        elif known != fingerprint:
            raise self._mixed("data", f"{name}: {known}", fingerprint)

    def _take_over(self, identity: Mapping[str, str]) -> None:
        try:
            about = json.loads(self._run_file.read_text("utf-8"))
            before = about["identity"]
            self._about["data"] = about["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidValueError(
                f"studies: {self._run_file} is missing or broken, so nothing says what "
                "the rows beside it are of. Name another --output, or remove the folder."
            ) from error
        for name, now in identity.items():
            if before.get(name) != now:
                raise self._mixed(name, str(before.get(name))[:12], now[:12])

    def _mixed(self, name: str, before: str, now: str) -> InvalidValueError:
        return InvalidValueError(
            f"studies: {self.folder} holds rows made before {_WORDS.get(name, name)} changed "
            f"({before}, now {now}). They are not mixed: name another --output, or remove the "
            "folder."
        )

    def _save(self) -> None:
        write_text(self._run_file, json.dumps(self._about, indent=2) + "\n")

    def _cut_to_finished(self) -> set[str]:
        """Cut off rows of a case that is not complete, and return the names of the others."""
        if not self.rows_file.exists():
            return set()
        content = self.rows_file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be torn
        lines = whole.splitlines(keepends=True)
        rows = [json.loads(line) for line in lines]
        there = Counter(row["case"] for row in rows)
        finished = {row["case"] for row in rows if there[row["case"]] == row["case_rows"]}
        kept = b"".join(
            line for line, row in zip(lines, rows, strict=True) if row["case"] in finished
        )
        if kept != content:
            write_text(self.rows_file, kept.decode())
        return finished


def case_id(case: Mapping[str, Any]) -> str:
    """Return a short name of a case: the same for equal keys and values, in any order.

    >>> case_id({"seed": 0, "category": "textile"}) == case_id({"category": "textile", "seed": 0})
    True
    """
    text = json.dumps(dict(case), sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """Return what JSON can hold: Python's numbers, None for NaN and infinities, or text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, _JSON) else str(value)
