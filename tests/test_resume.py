"""What is kept whatever happens: rows and pictures of a predict that is stopped, and odd names."""

from __future__ import annotations

import csv
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from anomalib_lite import cli
from anomalib_lite._files import RowsFile, quoted, replacing, unquoted
from anomalib_lite.errors import OutputError

# Slow enough that there is a row to wait for; a parent may ignore the signal of Ctrl-C.
PREDICT = """
import signal, sys, time
from anomalib_lite import PatchCore, cli
signal.signal(signal.SIGINT, signal.default_int_handler)
detect = PatchCore.detect
PatchCore.detect = lambda *args, **options: (time.sleep(0.05), detect(*args, **options))[1]
sys.exit(cli.main(sys.argv[1:]))
"""


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def many(wall: Path, tmp_path: Path) -> list[str]:
    """Return 150 photographs."""
    photos = sorted((wall / "train/good").iterdir())
    paths = [tmp_path / f"photos/{i:03d}.jpg" for i in range(150)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        path.write_bytes(photos[i % len(photos)].read_bytes())
    return [str(path) for path in paths]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on(
    how: signal.Signals, model: Path, many: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["predict", str(model), str(tmp_path / "photos"), "-o", str(out), "--batch-size", "1"]
    run = subprocess.Popen([sys.executable, "-c", PREDICT, *command], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < end:
        if (out / "scores.csv").exists() and len(rows_of(out)) > 5:
            break
        time.sleep(0.005)
    run.send_signal(how)
    run.wait(60)
    kept = rows_of(out)
    assert 5 < len(kept) < len(many)
    assert [row["path"] for row in kept] == many[: len(kept)]
    for row in kept:  # their pictures are whole
        with Image.open(out / row["overlay"]) as picture:
            picture.load()
    assert cli.main([*command, "--resume"]) == 0
    whole = rows_of(out)
    assert [row["path"] for row in whole] == many
    assert whole[: len(kept)] == kept
    names = sorted(path.name for path in (out / "overlays").iterdir())
    assert names == sorted(Path(row["overlay"]).name for row in whole)
    assert sorted(path.name for path in out.iterdir()) == ["overlays", "scores.csv"]


def test_resume_says_what_was_there(
    model: Path, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = ["predict", str(model), "-o", str(tmp_path), "--resume"]
    command = [*predict, str(wall / "test/good")]
    assert cli.main(command) == 0  # with nothing there it begins
    assert cli.main([*command, str(wall / "test/scratch")]) == 0
    assert "6 of 10 images had their row already" in capsys.readouterr().out
    assert len(rows_of(tmp_path)) == 10
    before = (tmp_path / "scores.csv").read_bytes()
    assert cli.main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "scores.csv").read_bytes() == before
    assert cli.main([*command, "--threshold", "40"]) == 2
    assert "was made with the threshold" in capsys.readouterr().err
    (tmp_path / "scores.csv").write_text("path,score\na,1\n")
    assert cli.main(command) == 2
    assert "its columns are ['path', 'score']" in capsys.readouterr().err


def test_pictures_of_an_earlier_run_go(model: Path, wall: Path, tmp_path: Path) -> None:
    for folder, n in (("test/good", 6), ("test/scratch", 4)):
        assert cli.main(["predict", str(model), str(wall / folder), "-o", str(tmp_path)]) == 0
        (tmp_path / "overlays/mine.png").write_bytes(b"not of a table")
        assert len(list((tmp_path / "overlays").iterdir())) == n + 1


def test_a_row_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"name,score\na,1\nb")
    with RowsFile(path, ["name", "score"], more=True) as rows:
        assert rows.before == [{"name": "a", "score": "1"}]
        rows.write(["b", 2])
    assert path.read_bytes() == b"name,score\na,1\nb,2\n"


NAMES = [
    *("good/1.png", "ä b.png", "C:\\photos\\1.png", 'a,b"c.png', "-1.5", "1e5", ""),
    *("=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "'quoted", "\tx", "a\rb\nc.png"),
    *("\x1b[31mred", "\u202egnp.exe", os.fsdecode(b"caf\xe9.png"), "=\\n\\x41\\", "\U000e0001"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_cell_is_harmless_and_read_back(name: str, tmp_path: Path) -> None:
    cell = quoted(name)
    assert cell.isprintable()
    assert cell[:1] not in ("=", "+", "@")
    assert not cell.startswith("-") or float(cell) == float(name)
    assert unquoted(cell) == name
    with RowsFile(tmp_path / "rows.csv", ["name"]) as rows:
        rows.write([name])
    with RowsFile(tmp_path / "rows.csv", ["name"], more=True) as rows:
        assert rows.before == [{"name": name}]


def test_a_name_that_is_no_text_gets_its_row(model: Path, wall: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"caf\xe9.png", b"=1+1.png", b"plain.png"):
        try:
            Path(os.fsdecode(os.fsencode(photos) + b"/" + name)).write_bytes(
                (wall / "test/good/000.png").read_bytes()
            )
        except OSError:
            pytest.skip("this file system takes no such names")
    out = tmp_path / "out"
    assert cli.main(["predict", str(model), str(photos), "-o", str(out)]) == 0
    found = {os.fsencode(Path(unquoted(row["path"])).name) for row in rows_of(out)}
    assert found == {b"caf\xe9.png", b"=1+1.png", b"plain.png"}


def test_what_a_killed_save_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    left = tmp_path / ".model.safetensors.0badcafe.tmp"
    left.write_bytes(b"half")
    other = tmp_path / ".another.safetensors.0badcafe.tmp"
    other.write_bytes(b"half")
    with replacing(path) as one:
        with replacing(path) as two:
            assert not left.exists()
            assert one.exists()
            two.write_bytes(b"two")
        one.write_bytes(b"one")
    assert path.read_bytes() == b"one"
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, path.name]


def test_links_stay_and_devices_are_no_files(model: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, Path(os.devnull)):
        kind = stat.S_IFMT(place.stat().st_mode)
        refused = pytest.raises(OutputError, match=r"is a device or a pipe, and no file")
        with refused, replacing(place, "save"):
            pass
        assert stat.S_IFMT(place.stat().st_mode) == kind
