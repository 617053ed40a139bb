"""Files are written whole or not at all, whoever writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anomalib_lite._files import RowsFile, replacing, write_text
from anomalib_lite.errors import ImageError, OutputError


def write_bytes(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")


def write_rows(path: Path) -> None:
    with RowsFile(path, ["name", "score"]) as rows:
        rows.write(["a", 1])


WRITERS = [write_bytes, write_rows, lambda path: write_text(path, "new", "Report")]
every_writer = pytest.mark.parametrize("write", WRITERS, ids=["bytes", "rows", "text"])


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@every_writer
def test_an_older_file_is_replaced(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old and longer than the new one")
    write(path)
    assert path.read_bytes() in (b"new", b"name,score\na,1\n")
    assert names_in(tmp_path) == ["out"]


@every_writer
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_older_file_and_nothing_else(
    write: Callable[[Path], None],
    step: str,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(expected) as caught:
            write(path)
    if expected is OutputError:
        message = f"cannot write {path}: No space left on device. Choose a directory that exists"
        assert message in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["out"]


@every_writer
def test_the_content_is_on_the_disk_before_the_name_is(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (steps.append("rename"), replace(self, to))[1]
    )
    write(tmp_path / "out")
    assert steps[:2] == ["fsync", "rename"]


@every_writer
@pytest.mark.parametrize("place", ["no/such/out", "file/out", "directory", "."])
def test_places_that_cannot_be_written_are_named(
    write: Callable[[Path], None], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    Path("directory").mkdir()
    with pytest.raises(OutputError, match=rf"cannot write {place}: .*Choose a directory"):
        write(Path(place))
    assert names_in(tmp_path) == ["directory", "file"]
    assert not names_in(tmp_path / "directory")


def test_an_error_of_the_block_goes_through(tmp_path: Path) -> None:
    def write_half() -> None:
        with replacing(tmp_path / "out") as temporary:
            temporary.write_bytes(b"half")
            raise ImageError("0.png cannot be read")

    with pytest.raises(ImageError, match=r"^0\.png cannot be read$"):
        write_half()
    assert names_in(tmp_path) == []


def test_rows_written_before_an_error_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"

    def write(n_rows: int) -> None:
        with RowsFile(path, ["name", "score"]) as rows:
            for i in range(n_rows):
                rows.write([f"{i}.png", i])
            raise ImageError("the next image cannot be read")

    for n_rows, kept in ((2, b"name,score\n0.png,0\n1.png,1\n"),) * 2 + ((0, None),):
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(ImageError):
            write(n_rows)
        assert path.read_bytes() == (before if kept is None else kept)
        assert names_in(tmp_path) == ["scores.csv"]
