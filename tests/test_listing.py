"""Directories: what is taken for an image, what is not, and that it is said."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from PIL import Image, features

from anomalib_lite.datasets import Folder, MVTecAD, open_dataset
from anomalib_lite.errors import InvalidValueError, LeftOutWarning
from anomalib_lite.images import ImageSource, image_suffixes, list_files


def draw(path: Path, form: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9)).save(path, format=form)
    return path


def names(source: ImageSource) -> list[str]:
    return [Path(name).name for name in source.names]


FORMS = {
    "a.jpg": "JPEG",
    "b.jfif": "JPEG",
    "c.JPE": "JPEG",
    "d.jp2": "JPEG2000",
    "e.tga": "TGA",
    "f.dib": "BMP",
    "g.TIFF": "TIFF",
    "h.webp": "WEBP",
    "i.pnm": "PPM",
    "j.mpo": "JPEG",
}


def test_every_suffix_that_pillow_reads_is_taken(tmp_path: Path) -> None:
    forms = FORMS | ({"k.avif": "AVIF"} if features.check("avif") else {})
    for name, form in forms.items():
        draw(tmp_path / name, form)
    source = ImageSource(tmp_path)  # no warning, which would be an error
    assert names(source) == sorted(forms)
    assert {image.shape for image in source} == {(9, 12, 3)}


def test_suffixes_of_plugins_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not image_suffixes() & {".eps", ".ico", ".h5", ".heic", ".txt", ""}
    Image.init()
    monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")  # as pillow-heif does
    draw(tmp_path / "a.heic", "PNG")
    assert names(ImageSource(tmp_path)) == ["a.heic"]


def test_what_is_left_out_is_said_once(tmp_path: Path) -> None:
    draw(tmp_path / "today/a.png")
    draw(tmp_path / "today/shift2/cam1/g.jpg")
    (tmp_path / "today/logs").mkdir()
    for name in ("notes.txt", "more.TXT", "IMG_0007", "p.heic"):
        (tmp_path / "today" / name).touch()
    message = (
        r"Asker: not looked at in .*today: without a suffix: 1 \(IMG_0007\); "
        r"subdirectories with images: 1 \(shift2\); \.txt: 2 \(more\.TXT \.\.\.\); "
        r"\.heic: 1 \(p\.heic\)\. "
        r"To take subdirectories too, pass ImageSource\(directory, recursive=True\)"
    )
    with pytest.warns(LeftOutWarning, match=message) as caught:
        assert names(ImageSource(tmp_path / "today", where="Asker")) == ["a.png"]
    assert len(caught) == 1
    with pytest.warns(LeftOutWarning, match=r"without a suffix: 1 .*If images are among them"):
        both = ImageSource(tmp_path / "today", recursive=True)
    assert names(both) == ["a.png", "g.jpg"]
    assert ImageSource(both).names == both.names


LITTER = ("._a.png", ".hidden/a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg")


@pytest.mark.parametrize("place", LITTER)
def test_what_systems_leave_is_no_image(place: str, tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / f"good/{i}.png")
    (tmp_path / "good/deeper").mkdir()
    for folder in ("good", "good/deeper"):
        draw(tmp_path / folder / place, "JPEG")
    first = place.split("/", maxsplit=1)[0]
    with pytest.warns(LeftOutWarning, match=rf"hidden or of the system: 1 \({first}\)\. If"):
        assert names(ImageSource(tmp_path / "good")) == ["0.png", "1.png", "2.png"]
    with pytest.warns(LeftOutWarning, match=r"Folder: .*hidden or of the system: 2"):
        ds = Folder(tmp_path, test_size=0)
    assert len(ds.train) == 3


@pytest.mark.parametrize("place", [".DS_Store", "Thumbs.db", "desktop.ini", ".git/config"])
def test_nobody_misses_what_holds_no_images(place: str, tmp_path: Path) -> None:
    draw(tmp_path / "good/0.png")
    (tmp_path / "good" / place).parent.mkdir(exist_ok=True)
    (tmp_path / "good" / place).write_bytes(b"of a system")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(ImageSource(tmp_path / "good")) == ["0.png"]


def test_thumbnails_are_no_kinds(tmp_path: Path) -> None:
    for kind in ("good", "dent"):
        for i in range(3):
            draw(tmp_path / kind / f"{i}.png")
            draw(tmp_path / kind / f"@eaDir/{i}.png/THUMB.jpg")
    draw(tmp_path / "@eaDir/good/THUMB.jpg")
    with pytest.warns(LeftOutWarning):
        ds = open_dataset(tmp_path)
    assert repr(ds).endswith("2 train, 4 test (1 good, 3 dent), no masks)")


def with_overlays(root: Path) -> Path:
    """Make what ``predict test/good test/dent -o test`` leaves."""
    for kind in ("good", "dent"):
        for i in range(2):
            draw(root / kind / f"{i}.png")
            draw(root / f"overlays/{kind}-{i}.png")
    (root / "scores.csv").touch()
    return root


def test_overlays_of_predict_are_no_kind_of_defect(tmp_path: Path) -> None:
    root = with_overlays(tmp_path / "test")
    with pytest.warns(LeftOutWarning, match=r"overlays of predict: 1 \(overlays\)"):
        ds = open_dataset(root, test_size=0)
    assert {sample.kind for sample in ds.test} == {"dent"}
    draw(tmp_path / "train/good/0.png")
    with pytest.warns(LeftOutWarning, match="overlays of predict: 1"):
        category = MVTecAD(tmp_path.parent, tmp_path.name)
    assert {sample.kind for sample in category.test} == {"good", "dent"}
    assert len(list_files(root, recursive=True)) == 4
    (root / "scores.csv").unlink()  # then they may be anything
    assert len(list_files(root, recursive=True)) == 8


def test_masks_beside_images_are_no_images(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / f"{i}.png")
    draw(tmp_path / "0_GT.png")
    draw(tmp_path / "1_mask.bmp")
    draw(tmp_path / "front_label.png")
    with pytest.warns(LeftOutWarning, match=r"masks beside images: 2 \(0_GT\.png \.\.\.\)"):
        found = names(ImageSource(tmp_path))
    assert found == ["0.png", "1.png", "2.png", "front_label.png"]
    draw(tmp_path / "2.jpg")
    with pytest.raises(
        InvalidValueError, match=r"one file for each image, got .*2\.jpg and .*2\.png"
    ):
        ImageSource(tmp_path)


def test_defects_beside_their_masks_stay(tmp_path: Path) -> None:
    for i in range(4):
        draw(tmp_path / f"good/{i}.png")
        draw(tmp_path / f"bad/{i}.png")
        draw(tmp_path / f"bad/{i}_mask.png")
    ds = Folder(tmp_path, anomalous="bad", masks="bad")
    assert repr(ds).endswith("3 train, 5 test (1 good, 4 bad), masks)")


@pytest.mark.skipif(os.name != "posix", reason="there are no such files elsewhere")
def test_a_fifo_in_a_directory_is_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "d.png").symlink_to("/dev/zero")
    with pytest.warns(LeftOutWarning, match=r"FIFOs, sockets or devices: 3 \(b\.png"):
        assert names(ImageSource(tmp_path)) == ["a.png"]


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_linked_directories_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    for i in range(5):
        draw(tmp_path / f"store/{i}.png")
    for i in range(3):
        draw(tmp_path / f"good/a{i}.png")
    (tmp_path / "good/monday").symlink_to(tmp_path / "store")
    assert len(Folder(tmp_path, test_size=0).train) == 8
    (tmp_path / "store/up").symlink_to(tmp_path / "good")
    with pytest.warns(LeftOutWarning, match=r"links to a directory above: 1 \(up\)"):
        assert len(Folder(tmp_path, test_size=0).train) == 8
    (tmp_path / "good/tuesday").symlink_to(tmp_path / "store")  # all of it twice
    (tmp_path / "store/up").unlink()
    with pytest.raises(InvalidValueError, match="must occur once"):
        Folder(tmp_path, test_size=0)


def test_a_directory_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    draw(tmp_path / "good/a.png")
    monkeypatch.setattr("os.scandir", refuse)  # root may read all
    for listing in (lambda: ImageSource(tmp_path / "good"), lambda: Folder(tmp_path)):
        with pytest.raises(InvalidValueError, match=r"can be read, got .*good: Permission denied"):
            listing()


def test_a_directory_without_images_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "p.heic").touch()
    with pytest.raises(
        InvalidValueError, match=r"no image files\. It has \.heic: 1 \(p\.heic\)\. Known"
    ):
        ImageSource(tmp_path)
    draw(tmp_path / "deep/deeper/a.png")
    with pytest.raises(InvalidValueError, match=r"Its subdirectories \['deep'\] do: name one"):
        ImageSource(tmp_path)
