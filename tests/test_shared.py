"""The same image in training and in test, by content and through links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anomalib_lite.datasets import Folder, Sample, find_shared, shared
from anomalib_lite.errors import ImageError, InvalidValueError, MissingPathError


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_equal_files_are_paired_in_the_order_of_the_test(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"train/{name}.png", name.encode() * 50) for name in "abc")
    again = write(tmp_path / "train/z.png", a.read_bytes())
    x, y, z = (write(tmp_path / f"test/{n}.png", n.encode() * 50) for n in "cya")
    assert find_shared([a, b, c, again], [x, y, z]) == [(c, x), (a, z)]
    samples = [Sample(path, 0, "good") for path in (x, y, z)]
    assert find_shared([str(a), str(c)], samples) == [(c, x), (a, z)]


@pytest.mark.parametrize("size", [0, 1, shared._HEAD, shared._HEAD + 1, 3 * shared._BLOCK + 5])
def test_files_that_differ_in_one_byte_are_not_shared(tmp_path: Path, size: int) -> None:
    content = bytes(size)
    a, b = write(tmp_path / "a", content), write(tmp_path / "b", content)
    assert find_shared([a], [b]) == [(a, b)]
    for position in {0, size // 2, size - 1} if size else ():
        changed = bytearray(content)
        changed[position] = 1
        assert find_shared([a], [write(b, bytes(changed))]) == []
    assert find_shared([a], [write(b, content + b"0")]) == []


def test_copies_on_one_side_are_no_matter(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", b"same"), write(tmp_path / "b", b"same")
    assert find_shared([a, b], []) == find_shared([], [a, b]) == []


def test_files_that_cannot_be_equal_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write(tmp_path / "a", bytes(9)), write(tmp_path / "b", bytes(10))
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("a file was read"))
    assert find_shared([a], [b]) == []


def test_links(tmp_path: Path) -> None:
    a = write(tmp_path / "train/a.png", b"same")
    link = tmp_path / "test/b.png"
    link.parent.mkdir()
    link.symlink_to(a)
    assert find_shared([a], [link]) == [(a, link)]
    link.unlink()
    os.link(a, link)
    assert find_shared([a], [link]) == [(a, link)]
    link.unlink()
    link.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(MissingPathError, match=r"find_shared: .*b\.png does not exist"):
        find_shared([a], [link])


def test_files_that_are_absent_can_be_skipped(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.png", b"same"), write(tmp_path / "b.png", b"same")
    gone, folder = tmp_path / "gone.png", tmp_path / "folder.png"
    folder.mkdir()
    same_size = folder.stat().st_size
    other = write(tmp_path / "c.png", bytes(same_size))  # so that the folder is to be read
    assert find_shared([a, gone], [b, gone], on_error="skip") == [(a, b)]
    assert find_shared([a, other], [folder, b], on_error="skip") == [(a, b)]
    with pytest.raises(MissingPathError, match=r"gone\.png does not exist"):
        find_shared([a, gone], [b])
    with pytest.raises(ImageError, match=r"find_shared: .*folder\.png cannot be read"):
        find_shared([other], [folder])
    with pytest.raises(InvalidValueError, match="find_shared: on_error must be one of"):
        find_shared([a], [b], on_error="ignore")


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_data_set_refuses_a_link_to_an_image_that_it_has(tmp_path: Path, what: str) -> None:
    for i in range(3):
        write(tmp_path / f"good/{i}.png", bytes([i]))
    if what == "directory":
        (tmp_path / "other").symlink_to(tmp_path / "good")
    else:
        (tmp_path / "other").mkdir()
        (tmp_path / "other/x.png").symlink_to(tmp_path / "good/1.png")
    with pytest.raises(InvalidValueError, match=r"must occur once.*good.\d\.png 2 times.*links"):
        Folder(tmp_path, normal_test="other")
