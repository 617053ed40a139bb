"""Files that are images in an unusual way: pages, deep pixels, thin strips, no files at all."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageSequence
from torch.utils.data import DataLoader, Dataset

from anomalib_lite import PatchCore, load
from anomalib_lite.datasets import find_shared, load_mask
from anomalib_lite.errors import (
    AnomalibLiteError,
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
)
from anomalib_lite.images import ImageSource, iter_batches
from anomalib_lite.images._source import NETWORK_PIXELS
from anomalib_lite.images.ignore_mask import read_ignore_mask

HEIGHT, WIDTH = 20, 32
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)


def skipped_in(images: Any, **options: Any) -> list[str]:
    """Return why images are left out with ``on_error="skip"``."""
    skipped: list[tuple[int, str]] = []
    options = {"image_size": 32, "stride": 16, "batch_size": 4} | options
    for _ in iter_batches(ImageSource(images), on_error="skip", skipped=skipped, **options):
        pass
    return [reason for _, reason in skipped]


# --- Pages --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp", "a.png"])
def test_several_pages_are_refused(name: str, tmp_path: Path) -> None:
    pages = [Image.fromarray(pixels) for pixels in (RGB, RGB[::-1], 255 - RGB)]
    path = tmp_path / name
    pages[0].save(path, save_all=True, append_images=pages[1:])
    message = r"Asker: .*a\.\w+ must be one image, got 3 pages.*page\.copy\(\)"
    with pytest.raises(ImageError, match=message):
        ImageSource(path, where="Asker")[0]
    with Image.open(path) as opened:
        with pytest.raises(ImageError, match=r"images\[0\] must be one image, got 3 pages"):
            ImageSource(opened)[0]
        remedy = [page.copy() for page in ImageSequence.Iterator(opened)]
    assert [image.shape for image in ImageSource(remedy)] == [RGB.shape] * 3
    (reason,) = skipped_in([RGB, path])
    assert "3 pages" in reason
    with pytest.raises(ImageError, match="3 pages"):
        load_mask(path)
    with pytest.raises(ImageError, match="3 pages"):
        read_ignore_mask(path, "Asker")


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp", "a.png"])
def test_one_page_that_was_saved_like_several_is_read(name: str, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / name, save_all=True)
    assert ImageSource(tmp_path / name)[0].shape == RGB.shape


def test_what_accompanies_one_photograph_is_no_page(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "thumb.tif") as file:
        file.write(RGB)
        file.write(RGB[::2, ::2], subfiletype=1)  # a thumbnail
    np.testing.assert_array_equal(ImageSource(tmp_path / "thumb.tif")[0], RGB)
    with tifffile.TiffWriter(tmp_path / "first.tif") as file:
        file.write(RGB[::2, ::2], subfiletype=1)
        file.write(RGB)
    with pytest.raises(ImageError, match="2 pages"):
        ImageSource(tmp_path / "first.tif")[0]
    photo, preview = Image.fromarray(RGB), Image.fromarray(RGB[::2, ::2])
    photo.save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "a.mpo") as opened:
        assert opened.n_frames == 2  # type: ignore[attr-defined]
    assert ImageSource(tmp_path / "a.mpo")[0].shape == RGB.shape


# --- Bits ---------------------------------------------------------------------------------


def tiff_of_12_bits(path: Path, values: np.ndarray) -> Path:
    height, width = values.shape
    bits = "".join(f"{v:012b}" for v in values.ravel())
    data = int(bits, 2).to_bytes(values.size * 3 // 2, "big")
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    place = struct.pack("<I", 8 + len(data))
    path.write_bytes(b"II*\0" + place + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def test_12_bits_are_scaled_by_4095(tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(0, 4096, (HEIGHT, WIDTH))
    got = ImageSource(tiff_of_12_bits(tmp_path / "a.tif", values))[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.stack([values / 4095] * 3, -1), atol=1e-6)


@pytest.mark.parametrize("top", [255, 4095, 65535])
@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.int16])
def test_integers_of_unknown_range_are_refused(kind: type, top: int, tmp_path: Path) -> None:
    array = np.linspace(0, min(top, np.iinfo(kind).max), HEIGHT * WIDTH).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", array.reshape(HEIGHT, WIDTH))
    with pytest.raises(ImageError, match=r"a\.tif must be .*got int32.*astype\('uint8'\)"):
        ImageSource(tmp_path / "a.tif")[0]


def test_a_pil_image_of_8_bits_in_32_is_refused() -> None:
    image = Image.fromarray(RGB[..., 0].astype(np.int32))
    with pytest.raises(ImageError, match=r"got int32.*astype\('uint8'\) if it holds 0 to 255"):
        ImageSource(image)[0]


def png_of_16_bits(array: np.ndarray, exif: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        tail = kind + data
        return struct.pack(">I", len(data)) + tail + struct.pack(">I", zlib.crc32(tail))

    colour_type = {2: 4, 3: 2, 4: 6}[array.shape[2]]
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    body = chunk(b"IHDR", header) + (chunk(b"eXIf", exif) if exif else b"")
    body += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of_16_bits(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    extra = {"extrasamples": ["unassalpha"]} if array.shape[2] == 4 else {}
    tifffile.imwrite(file, array, photometric="rgb", **extra, **options)
    return file.getvalue()


SIXTEEN: dict[str, bytes] = {
    "png": png_of_16_bits(DEEP[..., :3]),
    "png with alpha": png_of_16_bits(DEEP),
    "tiff": tiff_of_16_bits(DEEP[..., :3]),
    "tiff, high byte first": tiff_of_16_bits(DEEP[..., :3], byteorder=">"),
    "tiff with alpha": tiff_of_16_bits(DEEP),
    "tiff, compressed": tiff_of_16_bits(DEEP[..., :3], compression="zlib"),
    "tiff, compressed, predicted": tiff_of_16_bits(
        DEEP[..., :3], compression="zlib", predictor=2, byteorder=">"
    ),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_colours_of_16_bits_keep_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(SIXTEEN[kind])
    with Image.open(tmp_path / "a.png") as opened:
        source = ImageSource([tmp_path / "a.png", SIXTEEN[kind], opened, opened])
        if "png" in kind:
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # which is of no matter here
        for got in source:
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, DEEP[..., :3] / 65535, atol=1e-7)


def test_colours_of_16_bits_are_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = png_of_16_bits(DEEP[..., :3], exif.tobytes()[6:])
    expected = np.rot90(DEEP[..., :3], -1) / 65535
    np.testing.assert_allclose(ImageSource(content)[0], expected, atol=1e-7)


def planes_of_16_bits() -> bytes:
    file = io.BytesIO()
    planes = np.ascontiguousarray(np.moveaxis(DEEP[..., :3], -1, 0))
    tifffile.imwrite(file, planes, photometric="rgb", planarconfig="separate")
    return file.getvalue()


UNREAD: dict[str, bytes] = {
    "tiff in planes": planes_of_16_bits(),
    "png, gray and alpha": png_of_16_bits(DEEP[..., :2]),
    "ppm": b"P6 32 20 65535\n" + DEEP[..., :3].astype(">u2").tobytes(),
    "ppm of 12 bits": b"P6 32 20 4095\n" + (DEEP[..., :3] // 16).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_colours_of_which_pillow_reads_8_bits_alone_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match=r"colours of 16 bits.*uint16 array \(H, W, 3\)"):
        ImageSource(UNREAD[kind])[0]


def test_a_ppm_of_8_bits_is_read() -> None:
    content = b"P6 32 20 255\n" + RGB.tobytes()
    np.testing.assert_array_equal(ImageSource(content)[0], RGB)


# --- Thin strips --------------------------------------------------------------------------


def test_a_thin_strip_is_refused_before_it_is_enlarged() -> None:
    strip = np.zeros((8, 20_000), np.uint8)
    message = (
        r"images\[0\] is 8x20000 pixels, and would be 256x640000 at image_size=256, more than "
        r"3,000,000 pixels\. Crop it, cut it into tiles \(tile=...\), give a pair \(H, W\)"
    )
    with pytest.raises(ImageError, match=message):
        ImageSource(strip).load(0, 256, 16)
    assert len(skipped_in([strip, RGB, strip], image_size=256)) == 2
    assert ImageSource(strip).load(0, (32, 640), 16)[0].shape == (32, 640, 3)
    assert ImageSource(strip).load(0, 64, 16, tile=64)[0].shape == (16, 20_000, 3)
    assert ImageSource(strip.T).load(0, 16, 16)[0].shape == (40_000, 16, 3)


def test_four_squares_of_any_size_are_allowed() -> None:
    assert NETWORK_PIXELS < 4 * 1024**2
    wide = np.zeros((16, 64), np.uint8)
    assert ImageSource(wide).load(0, 1024, 16)[0].shape == (1024, 4096, 3)
    with pytest.raises(ImageError, match="1024x4160 at image_size=1024, more than 4,194,304"):
        ImageSource(np.zeros((16, 65), np.uint8)).load(0, 1024, 16)


def test_tiles_are_bounded_by_max_pixels() -> None:
    with pytest.raises(
        ImageError, match=r"80x1600 at image_size=64, more than 100,000 pixels\..*rai"
    ):
        ImageSource(np.zeros((20, 400), np.uint8), max_pixels=100_000).load(0, 64, 16, tile=16)


def test_fewer_thin_images_make_a_batch() -> None:
    images = [np.zeros((16, 16 * 16), np.uint8)] * 9 + [np.zeros((16, 32), np.uint8)] * 9
    lengths: dict[int, list[int]] = {16: [], 2: []}
    for batch in iter_batches(ImageSource(images), image_size=32, stride=16, batch_size=8):
        lengths[batch.pixels.shape[2] // 32].append(len(batch.indices))
    assert lengths == {16: [2, 2, 2, 2, 1], 2: [8, 1]}


def test_a_detector_skips_a_thin_strip() -> None:
    images = np.random.default_rng(3).integers(0, 256, (12, 32, 48, 3), dtype=np.uint8)
    strip = np.zeros((8, 40_000), np.uint8)
    detector = PatchCore(image_size=32, false_alarm_rate=0.2, on_error="skip").fit(
        [*images[:11], strip]
    )
    assert [name for name, _ in detector.skipped_] == ["images[11]"]
    found = detector.detect([images[11], strip])
    assert [index for index, _ in found.skipped] == [1]
    assert found.labels[1]


# --- No files -----------------------------------------------------------------------------


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def listening(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


SPECIAL: dict[str, tuple[Callable[[Path], Path], str]] = {
    "FIFO": (lambda d: fifo(d / "b.png"), "a FIFO"),
    "link to a FIFO": (lambda d: linked(d / "b.png", fifo(d / "pipe")), "a FIFO"),
    "socket": (lambda d: listening(d / "b.png"), "a socket"),
    "device": (lambda d: Path("/dev/zero"), "a device"),
    "link to a device": (lambda d: linked(d / "b.png", Path("/dev/zero")), "a device"),
    "directory": (lambda d: d, "a directory, which can be given alone"),
}


def linked(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.skipif(os.name != "posix", reason="there are no such files elsewhere")
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    make, message = SPECIAL[kind]
    path = make(Path() if kind == "socket" else tmp_path)
    with pytest.raises(ImageError, match=f"Asker: .* must be a file, got {message}.*skip"):
        ImageSource([path], where="Asker")[0]
    (reason,) = skipped_in([RGB, path])
    assert message in reason
    with pytest.raises(AnomalibLiteError):
        ImageSource([path]).size(0)
    if kind != "directory":
        with pytest.raises(MissingPathError, match="there is no file"):
            load_mask(path)
        with pytest.raises(ImageError, match="is no file"):
            find_shared([path], [path])
        with pytest.raises(MissingPathError, match="is no file, but a FIFO, socket or device"):
            load(path)
        with pytest.raises(MissingPathError, match=r"ignore_mask .* is no file"):
            read_ignore_mask(path, "Asker")


# --- In memory ----------------------------------------------------------------------------


def encoded(form: str = "PNG") -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, form)
    return file  # at its end, as it is after writing


IN_MEMORY: dict[str, Callable[[Path], Any]] = {
    "BytesIO": lambda d: encoded(),
    "bytes": lambda d: encoded().getvalue(),
    "bytearray": lambda d: bytearray(encoded().getvalue()),
    "memoryview": lambda d: encoded().getbuffer(),
    "open file": lambda d: (d / "a.png").open("rb"),
}


@pytest.mark.parametrize("in_list", [False, True])
@pytest.mark.parametrize("kind", IN_MEMORY)
def test_encoded_images_are_read(kind: str, in_list: bool, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded().getvalue())
    given = IN_MEMORY[kind](tmp_path)
    source = ImageSource([given, RGB[::-1]] if in_list else given)
    if hasattr(given, "close"):
        given.close()  # what it holds is known by now
    assert len(source) == 1 + in_list
    np.testing.assert_array_equal(source[0], RGB)
    assert source.names[0] == "images[0]"
    assert source.size(0) == RGB.shape[:2]


def test_files_that_cannot_be_read_are_refused() -> None:
    closed = encoded()
    closed.close()
    with pytest.raises(InvalidValueError, match=r"must hold files that are open.*closed"):
        ImageSource([closed])
    with pytest.raises(InvalidTypeError, match=r"binary mode, got one whose read.* gives str"):
        ImageSource(io.StringIO("hello"))
    for content, message in ((b"", r"empty \(0 bytes\)"), (b"hello", "not an image of a known")):
        with pytest.raises(
            ImageError, match=rf"images\[1\] cannot be read: the bytes are {message}"
        ):
            ImageSource([RGB, content])[1]
    with Image.open(encoded()) as image:
        pass
    image.fp = None  # closed, as after a with of its own file
    with pytest.raises(ImageError, match="the PIL image is closed or broken"):
        ImageSource([image])[0]


class Photographs(Dataset[Any]):
    """A map-style data set; ``row`` makes a row of a number."""

    def __init__(self, row: Callable[[int], Any]) -> None:
        self.row = row

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


ROWS: dict[str, Callable[[int], Any]] = {
    "image": lambda i: Image.fromarray(RGB + i),
    "image and label": lambda i: (Image.fromarray(RGB + i), 0),
    "tensor and label": lambda i: (torch.from_numpy(RGB + i).permute(2, 0, 1), 0),
    "dict": lambda i: {"label": 1, "image": RGB + i},
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_map_style_data_set_is_taken(kind: str) -> None:
    source = ImageSource(Photographs(ROWS[kind]))
    assert len(source) == 3
    for i, got in enumerate(source):
        np.testing.assert_array_equal(got, RGB + i)
    assert not skipped_in(Photographs(ROWS[kind]))


def test_a_row_that_is_no_image_is_named() -> None:
    source = ImageSource(Photographs(lambda i: {"label": 1}), where="Asker")
    with pytest.raises(InvalidTypeError, match=r"Asker: images\[1\] must be .* got dict"):
        source[1]
    source = ImageSource(Photographs(lambda i: 1 // 0))
    with pytest.raises(ImageError, match=r"images\[2\] cannot be read: .*zero"):
        source[2]


def test_what_cannot_be_taken_has_a_remedy() -> None:
    loader = DataLoader(Photographs(ROWS["image"]))
    with pytest.raises(InvalidTypeError, match=r"got DataLoader\. .*loader\.dataset.*Normalize"):
        ImageSource(loader)
    with pytest.raises(InvalidTypeError, match=r"got generator\. Wrap a generator in list"):
        ImageSource(RGB for _ in range(3))
    with pytest.raises(InvalidTypeError, match="got dict"):
        ImageSource({"image": RGB})
    with pytest.raises(InvalidTypeError, match=r"got tuple.*\[image for image, _ in pairs\]"):
        ImageSource([(RGB, 0)])[0]
    normalised = (torch.rand(3, 16, 24) - 0.45) / 0.22
    with pytest.raises(ImageError, match=r"Normalize.* leave that out"):
        ImageSource(normalised)[0]


def test_paths_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"images is an empty path.*'\.'"):
        ImageSource("")
    with pytest.raises(MissingPathError, match=r"\*\.png does not exist.*sorted\(glob"):
        ImageSource(str(tmp_path / "*.png"))
    long = "a" * 300 + ".png"
    with pytest.raises(MissingPathError, match="does not exist"):
        ImageSource(long)
    with pytest.raises(ImageError, match=r"cannot be read: .*too long"):
        ImageSource([long])[0]
    with pytest.raises(ImageError, match=r"cannot be read: .*null"):
        ImageSource(["a\0.png"])[0]


def test_drawings_are_not_given_to_other_programs(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(ImageError, match=r"a\.png must hold pixels, not a drawing"):
        ImageSource(tmp_path / "a.png")[0]
