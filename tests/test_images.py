"""Everything that is an image comes out with the right pixels; everything else is refused."""

from __future__ import annotations

import os
import random
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_lite.errors import (
    AnomalibLiteError,
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
)
from anomalib_lite.images import ImageSource, iter_batches, list_files

HEIGHT, WIDTH = 21, 34  # never square: swapped sides must show
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
OTHER = RNG.integers(0, 256, (HEIGHT + 4, WIDTH + 9, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
UNIT = RNG.random((HEIGHT, WIDTH, 3), dtype=np.float32)
del RNG  # no test draws from it: what one sees depends on no other


def three(gray: np.ndarray) -> np.ndarray:
    return np.stack([gray] * 3, axis=-1)


def rgba() -> np.ndarray:
    return np.concatenate([RGB, ALPHA[..., None]], axis=-1)


def png(path: Path, pixels: np.ndarray = RGB) -> Path:
    Image.fromarray(pixels).save(path)
    return path


# --- Kinds of input ---------------------------------------------------------------------


def directory(tmp_path: Path) -> Any:
    for name, pixels in (("b.PNG", RGB), ("a.png", OTHER), ("c.bmp", RGB)):
        png(tmp_path / name, pixels)
    return tmp_path


PATHS: dict[str, tuple[Callable[[Path], Any], list[np.ndarray]]] = {
    "directory": (directory, [OTHER, RGB, RGB]),
    "directory as str": (lambda d: str(directory(d)), [OTHER, RGB, RGB]),
    "file": (lambda d: png(d / "a.png"), [RGB]),
    "file as str": (lambda d: str(png(d / "a.png")), [RGB]),
    "list of files": (lambda d: [png(d / "b.png"), png(d / "a.png", OTHER)], [RGB, OTHER]),
    "tuple of str": (lambda d: (str(png(d / "b.png")), str(png(d / "a.png", OTHER))), [RGB, OTHER]),
    "array of str": (lambda d: np.array([str(png(d / "a.png"))]), [RGB]),
    "array of objects": (lambda d: np.array([png(d / "a.png"), OTHER], dtype=object), [RGB, OTHER]),
    "samples": (lambda d: [SimpleNamespace(path=png(d / "a.png"), label=0)], [RGB]),
    "one sample": (lambda d: SimpleNamespace(path=png(d / "a.png"), label=0), [RGB]),
    "mixed list": (lambda d: [png(d / "a.png"), Image.fromarray(OTHER), GRAY], [RGB, OTHER, GRAY]),
    "gray file": (lambda d: png(d / "a.png", GRAY), [GRAY]),
    "16-bit file": (lambda d: png(d / "a.png", DEEP), [DEEP]),
    "tiff of floats": (lambda d: png(d / "a.tif", UNIT[..., 0]), [UNIT[..., 0]]),
}


@pytest.mark.parametrize("kind", PATHS)
def test_files_give_their_pixels(kind: str, tmp_path: Path) -> None:
    make, expected = PATHS[kind]
    source = ImageSource(make(tmp_path))
    assert len(source) == len(expected)
    for got, pixels in zip(source, expected, strict=True):
        check_pixels(got, pixels)


def check_pixels(got: np.ndarray, pixels: np.ndarray) -> None:
    """Compare what a source gives with the pixels (H, W) or (H, W, 3) that went in."""
    if pixels.ndim == 2:
        pixels = three(pixels)
    if pixels.dtype == np.uint16:
        pixels = (pixels.astype(np.float64) / 65535).astype(np.float32)
    assert got.dtype == (np.uint8 if pixels.dtype == np.uint8 else np.float32)
    assert got.shape == pixels.shape
    np.testing.assert_allclose(got, pixels, atol=1e-7)


def palette() -> tuple[Image.Image, np.ndarray]:
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(GRAY, mode=None).convert("P")
    image.putpalette(colours.tobytes())
    image.frombytes(GRAY.tobytes())
    return image, colours[GRAY]


def ink() -> tuple[Image.Image, np.ndarray]:
    """CMYK: each colour is what is left of white after the ink and after the black."""
    cmyk = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    left = 1 - cmyk.astype(np.float64) / 255
    return Image.fromarray(cmyk, "CMYK"), 255 * left[..., :3] * left[..., 3:]


def bits() -> tuple[Image.Image, np.ndarray]:
    return Image.fromarray(GRAY > 127), three(np.where(GRAY > 127, 255, 0).astype(np.uint8))


def from_bytes(mode: str, array: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, (WIDTH, HEIGHT), array.tobytes())


MODES: dict[str, Callable[[], tuple[Image.Image, np.ndarray]]] = {
    "L": lambda: (Image.fromarray(GRAY), GRAY),
    "RGB": lambda: (Image.fromarray(RGB), RGB),
    "RGBA": lambda: (Image.fromarray(rgba()), RGB),
    "LA": lambda: (from_bytes("LA", np.stack([GRAY, ALPHA], -1)), GRAY),
    "P": palette,
    "1": bits,
    "I;16": lambda: (from_bytes("I;16", DEEP.astype("<u2")), DEEP),
    "I;16B": lambda: (from_bytes("I;16B", DEEP.astype(">u2")), DEEP),
    "I": lambda: (Image.fromarray(DEEP.astype(np.int32)), DEEP),
    "F": lambda: (Image.fromarray(UNIT[..., 0]), UNIT[..., 0]),
}


@pytest.mark.parametrize("mode", MODES)
def test_pil_modes_give_their_pixels(mode: str) -> None:
    image, pixels = MODES[mode]()
    assert image.mode == mode
    check_pixels(ImageSource(image)[0], pixels)
    check_pixels(ImageSource([Image.fromarray(OTHER), image])[1], pixels)


def test_cmyk_gives_what_is_left_of_white() -> None:
    image, pixels = ink()
    np.testing.assert_allclose(ImageSource(image)[0], pixels, atol=1)


def test_a_palette_with_transparency_is_read_like_any_other(tmp_path: Path) -> None:
    image, pixels = palette()
    image.save(tmp_path / "a.png", transparency=bytes([0, 128, 255]))
    check_pixels(ImageSource(tmp_path / "a.png")[0], pixels)


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    pixels = rgba()
    pixels[..., 3] = 0  # wholly transparent
    check_pixels(ImageSource(png(tmp_path / "a.png", pixels))[0], RGB)


ARRAYS: dict[str, tuple[Callable[[], Any], list[np.ndarray]]] = {
    "(H, W, 3)": (lambda: RGB, [RGB]),
    "(H, W)": (lambda: GRAY, [GRAY]),
    "(H, W, 1)": (lambda: GRAY[..., None], [GRAY]),
    "(H, W, 4)": (rgba, [RGB]),
    "(N, H, W, 3)": (lambda: np.stack([RGB, RGB[::-1]]), [RGB, RGB[::-1]]),
    "(N, H, W, 1)": (lambda: np.stack([GRAY, GRAY[::-1]])[..., None], [GRAY, GRAY[::-1]]),
    "list of sizes": (lambda: [RGB, OTHER, GRAY], [RGB, OTHER, GRAY]),
    "not contiguous": (lambda: RGB[::-1, ::2], [RGB[::-1, ::2]]),
    "uint16": (lambda: DEEP, [DEEP]),
    "uint16, colour": (lambda: np.stack([DEEP] * 3, -1), [DEEP]),
    "uint16, other byte order": (lambda: DEEP.astype(">u2"), [DEEP]),
    "float32": (lambda: UNIT, [UNIT]),
    "float32, gray": (lambda: UNIT[..., 1], [UNIT[..., 1]]),
    "float64": (lambda: UNIT.astype(np.float64), [UNIT]),
    "float16": (lambda: UNIT.astype(np.float16), [UNIT.astype(np.float16).astype(np.float32)]),
    "read-only": (lambda: np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape), [RGB]),
    "tensor (3, H, W)": (lambda: torch.from_numpy(RGB).permute(2, 0, 1), [RGB]),
    "tensor (3, H, W), float": (lambda: torch.from_numpy(UNIT).permute(2, 0, 1), [UNIT]),
    "tensor (H, W, 3)": (lambda: torch.from_numpy(RGB), [RGB]),
    "tensor (H, W)": (lambda: torch.from_numpy(GRAY), [GRAY]),
    "tensor (1, H, W)": (lambda: torch.from_numpy(GRAY)[None], [GRAY]),
    "tensor (4, H, W)": (lambda: torch.from_numpy(rgba()).permute(2, 0, 1), [RGB]),
    "tensor (N, 3, H, W)": (
        lambda: torch.from_numpy(np.stack([RGB, RGB[:, ::-1]])).permute(0, 3, 1, 2),
        [RGB, RGB[:, ::-1]],
    ),
    "tensor (N, H, W, 3)": (lambda: torch.from_numpy(np.stack([RGB, RGB])), [RGB, RGB]),
    "tensor with gradient": (lambda: torch.from_numpy(UNIT.copy()).requires_grad_(), [UNIT]),
    "list of tensors": (
        lambda: [torch.from_numpy(RGB).permute(2, 0, 1), torch.from_numpy(OTHER).permute(2, 0, 1)],
        [RGB, OTHER],
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_and_tensors_give_their_pixels(kind: str) -> None:
    make, expected = ARRAYS[kind]
    source = ImageSource(make())
    assert len(source) == len(expected)
    for got, pixels in zip(source, expected, strict=True):
        check_pixels(got, pixels)


def test_the_given_images_are_not_changed() -> None:
    image, array, tensor = Image.fromarray(RGB), UNIT.copy(), torch.from_numpy(UNIT.copy())
    for batch in batches([image, array, tensor], image_size=(HEIGHT, WIDTH)):
        batch.pixels[...] = 0
    np.testing.assert_array_equal(np.asarray(image), RGB)
    np.testing.assert_array_equal(array, UNIT)
    np.testing.assert_array_equal(tensor.numpy(), UNIT)


def test_a_source_slices_and_takes_with_its_names() -> None:
    source = ImageSource(np.stack([RGB, RGB[::-1], RGB[:, ::-1]]))
    part = source[1:]
    assert isinstance(part, ImageSource)
    assert part.names == ["images[1]", "images[2]"]
    check_pixels(part[0], RGB[::-1])
    taken = source.take([2, 0])
    assert taken.names == ["images[2]", "images[0]"]
    check_pixels(taken[0], RGB[:, ::-1])
    check_pixels(source[-1], RGB[:, ::-1])


# --- EXIF -------------------------------------------------------------------------------

# What a viewer must do to the stored pixels, by value of the EXIF orientation.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_undone(orientation: int, tmp_path: Path) -> None:
    # Six flat blocks survive JPEG; no two are alike, so every turn shows.
    colours = np.uint8(
        [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[250, 250, 0], [0] * 3, [250] * 3]]
    )
    stored = colours.repeat(16, axis=0).repeat(16, axis=1)  # (32, 48, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    upright = UPRIGHT[orientation](stored)
    source = ImageSource(tmp_path / "a.jpg")
    np.testing.assert_allclose(source[0].astype(int), upright, atol=6)
    pixels, size = source.load(0, (64, 96), 1)
    assert size == upright.shape[:2]
    assert pixels.shape == (64, 96, 3)


# --- Sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (480, 640), (33, 250)])
@pytest.mark.parametrize("image_size", [48, 64, 256])
@pytest.mark.parametrize("stride", [1, 14, 16, 32])
def test_an_int_is_the_shorter_side_and_keeps_the_aspect(
    size: tuple[int, int], image_size: int, stride: int
) -> None:
    pixels, own = ImageSource(np.zeros(size, np.uint8)).load(0, image_size, stride)
    assert own == size
    for got, side in zip(pixels.shape, size, strict=False):
        assert got % stride == 0
        assert abs(got - side * image_size / min(size)) <= stride / 2


def test_no_side_is_rounded_to_zero() -> None:
    pixels, _ = ImageSource(np.zeros((60, 100), np.uint8)).load(0, 16, 64)
    assert pixels.shape == (64, 64, 3)


def test_a_pair_is_exact_whatever_the_stride() -> None:
    pixels, own = ImageSource(RGB).load(0, (37, 55), 16)
    assert pixels.shape == (37, 55, 3)
    assert own == (HEIGHT, WIDTH)


@pytest.mark.parametrize("size", [(12, 17), (50, 90)])
@pytest.mark.parametrize("pixels", [RGB, UNIT], ids=["uint8", "float32"])
def test_resizing_is_bilinear_and_averages_when_shrinking(
    pixels: np.ndarray, size: tuple[int, int]
) -> None:
    got, _ = ImageSource(pixels).load(0, size, 1)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
    tolerance = 1.0 if pixels.dtype == np.uint8 else 1e-5
    np.testing.assert_allclose(got, expected[0].permute(1, 2, 0), atol=tolerance)


def test_gray_images_are_resized_as_if_they_had_colours() -> None:
    got, _ = ImageSource(Image.fromarray(GRAY)).load(0, (12, 17), 1)
    expected, _ = ImageSource(three(GRAY)).load(0, (12, 17), 1)
    np.testing.assert_array_equal(got, expected)


# --- Batches ----------------------------------------------------------------------------


def batches(images: Any, **options: Any) -> list[Any]:
    options = {"image_size": 32, "stride": 16, "batch_size": 4} | options
    return list(iter_batches(ImageSource(images), **options))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_image_comes_once_in_batches_of_one_size(batch_size: int) -> None:
    sizes = [(32, 48), (48, 32), (32, 80)]
    order = np.random.default_rng(0).integers(0, 3, 50)
    images = [np.full((*sizes[s], 3), i, np.uint8) for i, s in enumerate(order)]
    seen: list[int] = []
    for batch in batches(images, batch_size=batch_size):
        assert 1 <= len(batch.indices) <= batch_size
        assert batch.indices == sorted(batch.indices)
        assert batch.pixels.shape == (len(batch.indices), *sizes[order[batch.indices[0]]], 3)
        assert batch.sizes == [sizes[order[i]] for i in batch.indices]
        np.testing.assert_array_equal(batch.pixels[:, 5, 7, 1], batch.indices)
        seen += batch.indices
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("n_sizes", [1, 3])
@pytest.mark.parametrize("tile", [None, 16, 64])
def test_no_image_is_dropped_with_tiles(batch_size: int, n_sizes: int, tile: int | None) -> None:
    """Nor twice there, whatever is skipped between, and at the end."""
    sizes = [(32, 48), (48, 32), (32, 80)][:n_sizes]
    images: list[Any] = [np.full((*sizes[i % n_sizes], 3), i, np.uint8) for i in range(13)]
    images[4] = images[12] = "no such file.png"
    skipped: list[tuple[int, str]] = []
    options = {"tile": tile, "batch_size": batch_size, "on_error": "skip", "skipped": skipped}
    seen: list[int] = []
    for batch in batches(images, **options):
        assert 1 <= len(batch.indices) == len(batch.pixels) == len(batch.sizes) <= batch_size
        assert (batch.pixels == np.reshape(batch.indices, (-1, 1, 1, 1))).all()
        seen += batch.indices
    assert sorted(seen) == [i for i in range(13) if i not in (4, 12)]
    assert [i for i, _ in skipped] == [4, 12]


def test_images_of_one_size_come_in_full_batches_and_in_order() -> None:
    images = np.zeros((10, 32, 48, 3), np.uint8)
    assert [b.indices for b in batches(images)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_bytes_and_floats_are_in_different_batches() -> None:
    images = [RGB, UNIT, RGB, UNIT]
    for batch in batches(images):
        assert {images[i].dtype for i in batch.indices} == {batch.pixels.dtype}


class Lazy:
    """An image that counts how often it is made."""

    lock = threading.Lock()

    def __init__(self, counts: list[int], index: int, shape: tuple[int, ...]) -> None:
        self.counts, self.index, self.shape = counts, index, shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        with self.lock:
            self.counts[self.index] += 1
        return np.zeros(self.shape, np.uint8)


def test_nothing_is_decoded_before_it_is_asked_for() -> None:
    counts = [0] * 1000
    source = ImageSource([Lazy(counts, i, (16, 24, 3)) for i in range(1000)])
    assert sum(counts) == 0
    source[7]
    assert counts[7] == sum(counts) == 1


@pytest.mark.parametrize("n_sizes", [1, 7])
def test_at_most_four_batches_are_decoded_ahead_and_each_image_once(n_sizes: int) -> None:
    n, batch_size = 300, 4
    counts = [0] * n
    images = [Lazy(counts, i, (32, 48 + 16 * (i % n_sizes), 3)) for i in range(n)]
    handed_out = 0
    for batch in iter_batches(ImageSource(images), image_size=32, stride=16, batch_size=batch_size):
        assert sum(counts) - handed_out <= 4 * batch_size
        handed_out += len(batch.indices)
    assert counts == [1] * n


def test_leaving_early_ends_the_decoding() -> None:
    counts = [0] * 200
    images = [Lazy(counts, i, (32, 48, 3)) for i in range(200)]
    before = threading.active_count()
    iterator = iter_batches(ImageSource(images), image_size=32, stride=16, batch_size=2)
    next(iterator)
    iterator.close()
    assert sum(counts) <= 8
    assert threading.active_count() == before


def test_one_lazily_opened_image_may_occur_many_times(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (300, 450, 3), dtype=np.uint8)
    path = png(tmp_path / "a.png", pixels)
    for _ in range(8):
        image = Image.open(path)  # decodes when first looked at, here by several threads
        for batch in batches([image] * 8, image_size=(300, 450)):
            for got in batch.pixels:
                np.testing.assert_array_equal(got, pixels)


# --- What is refused --------------------------------------------------------------------


def header_only_png(path: Path, height: int, width: int) -> Path:
    """A file of some 70 bytes that claims to hold a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def truncated(path: Path) -> Path:
    Image.fromarray(OTHER).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


FILES: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "missing": (lambda d: d / "gone.png", FileNotFoundError, "does not exist"),
    "truncated": (lambda d: truncated(d / "cut.jpg"), ValueError, "truncated.*Replace"),
    "text": (lambda d: written(d / "a.png", b"hello"), ValueError, "known format.*Replace"),
    "empty": (lambda d: written(d / "a.png", b""), ValueError, "empty.*0 bytes.*Replace"),
    "1x1": (lambda d: png(d / "a.png", RGB[:1, :1]), ValueError, "1x1 pixels.*at least 8"),
    "too thin": (lambda d: png(d / "a.png", RGB[:7]), ValueError, "7x34 pixels.*at least 8"),
    "huge": (
        lambda d: header_only_png(d / "a.png", 30_000, 20_000),
        ValueError,
        "30000x20000 pixels.*Raise max_pixels",
    ),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_file_that_cannot_be_used_is_named(fault: str, tmp_path: Path) -> None:
    make, builtin, message = FILES[fault]
    path = make(tmp_path)
    source = ImageSource([png(tmp_path / "good.png"), path], where="Asker")
    with pytest.raises(AnomalibLiteError, match=f"(?s)Asker: .*{path.name}.*{message}") as caught:
        source[1]
    assert isinstance(caught.value, builtin)
    assert isinstance(caught.value, MissingPathError if fault == "missing" else ImageError)
    with pytest.raises(type(caught.value)):
        batches([path, png(tmp_path / "good.png")])


ITEMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "NaN": (lambda: np.where(UNIT > 0.9, np.nan, UNIT), ValueError, "finite.*nan_to_num"),
    "infinity": (lambda: np.where(UNIT > 0.9, np.inf, UNIT), ValueError, "finite.*nan_to_num"),
    "floats to 255": (lambda: UNIT * 255, ValueError, r"in \[0, 1\].*Divide by 255"),
    "negative floats": (lambda: UNIT * 2 - 1, ValueError, r"in \[0, 1\].*leave that out"),
    "float PIL to 255": (lambda: Image.fromarray(UNIT[..., 0] * 255), ValueError, r"in \[0, 1\]"),
    "two channels": (lambda: RGB[..., :2], ValueError, "channels"),
    "five channels": (lambda: np.zeros((16, 24, 5), np.uint8), ValueError, "channels"),
    "channels first": (lambda: np.zeros((3, 16, 24), np.uint8), ValueError, "channels.*moveaxis"),
    "5-D": (lambda: np.zeros((1, 1, 16, 24, 3), np.uint8), ValueError, "shape"),
    "int64": (lambda: RGB.astype(np.int64), ValueError, "int64.*astype"),
    "int32": (lambda: RGB.astype(np.int32), ValueError, "int32.*astype"),
    "bool": (lambda: RGB > 127, ValueError, "bool"),
    "complex": (lambda: UNIT.astype(complex), ValueError, "complex"),
    "int64 tensor": (lambda: torch.zeros((3, 16, 24), dtype=torch.int64), ValueError, "int64"),
    "number": (lambda: 7, TypeError, "a path, a PIL image, an array or a tensor.*got int"),
    "None": (lambda: None, TypeError, "got NoneType"),
    "nested list": (lambda: [[1, 2], [3, 4]], TypeError, "got list"),
    "1x1": (lambda: RGB[:1, :1], ValueError, "1x1 pixels"),
}


@pytest.mark.parametrize("fault", ITEMS)
def test_an_item_that_is_no_image_is_named_by_its_index(fault: str) -> None:
    make, builtin, message = ITEMS[fault]
    source = ImageSource([RGB, make()], where="Asker")
    with pytest.raises(AnomalibLiteError, match=rf"(?s)Asker: images\[1\] .*{message}") as caught:
        source[1]
    assert isinstance(caught.value, builtin)


WHOLE: dict[str, tuple[Callable[[Path], Any], type[AnomalibLiteError], str]] = {
    "missing": (lambda d: d / "gone", MissingPathError, "gone does not exist"),
    "empty directory": (lambda d: d, InvalidValueError, "holds no image files.*Known are.*'.png'"),
    "empty list": (lambda d: [], InvalidValueError, "images is empty"),
    "no images in array": (lambda d: np.zeros((0, 8, 8, 3), np.uint8), InvalidValueError, "empty"),
    "vector": (lambda d: np.zeros(9), InvalidValueError, r"must have shape.*got \(9,\)"),
    "generator": (lambda d: (x for x in [RGB]), InvalidTypeError, r"generator.*list\("),
    "set": (lambda d: {"a.png"}, InvalidTypeError, "got set"),
    "number": (lambda d: 3, InvalidTypeError, "got int"),
    "None": (lambda d: None, InvalidTypeError, "got NoneType"),
}


@pytest.mark.parametrize("fault", WHOLE)
def test_what_holds_no_images_is_refused_at_once(fault: str, tmp_path: Path) -> None:
    make, expected, message = WHOLE[fault]
    with pytest.raises(expected, match=f"(?s)^Asker: .*{message}") as caught:
        ImageSource(make(tmp_path), where="Asker")
    assert isinstance(caught.value, TypeError if expected is InvalidTypeError else ValueError)


def test_a_directory_of_directories_names_those_with_images(tmp_path: Path) -> None:
    for name in ("good", "scratch"):
        (tmp_path / name).mkdir()
        png(tmp_path / name / "0.png")
    (tmp_path / "logs").mkdir()
    with pytest.raises(InvalidValueError, match=r"\['good', 'scratch'\].*name one"):
        ImageSource(tmp_path)


@pytest.mark.parametrize("recursive", [False, True])
def test_files_are_listed_by_name_without_hidden_ones(recursive: bool, tmp_path: Path) -> None:
    places = ["b.png", "C.PNG", "a-b/1.jpg", "a/1.jpg", "a/x/0.tif", "a.png", "notes.txt"]
    places += [".c.png", "._b.png", ".cache/2.png", "a/.thumbs/3.png", "z.png/4.png"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    expected = ["C.PNG", "a.png", "b.png"]
    if recursive:
        expected = sorted([*expected, "a-b/1.jpg", "a/1.jpg", "a/x/0.tif", "z.png/4.png"])
    found = list_files(tmp_path, recursive=recursive)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == expected


def test_relative_paths_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").touch()
    monkeypatch.chdir(tmp_path)
    assert list_files(Path(), recursive=True) == [Path("a/0.png")]
    assert list_files(Path("a")) == [Path("a/0.png")]


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_a_link_to_nowhere_is_listed_and_refused_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(MissingPathError, match=r"gone\.png does not exist"):
        ImageSource(tmp_path)[0]


def test_the_limit_on_pixels_can_be_moved(tmp_path: Path) -> None:
    for image in (png(tmp_path / "a.png"), RGB, Image.fromarray(RGB)):
        with pytest.raises(ImageError, match=r"21x34 pixels.*max_pixels=713\b"):
            ImageSource(image, max_pixels=HEIGHT * WIDTH - 1)[0]
        check_pixels(ImageSource(image, max_pixels=HEIGHT * WIDTH)[0], RGB)


def test_the_limit_of_pil_neither_matters_nor_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    check_pixels(ImageSource(png(tmp_path / "a.png"))[0], RGB)
    assert Image.MAX_IMAGE_PIXELS == 100
    for bad in (header_only_png(tmp_path / "b.png", 30_000, 30_000), written(tmp_path / "c", b"x")):
        with pytest.raises(ImageError):
            ImageSource(bad)[0]
        assert Image.MAX_IMAGE_PIXELS == 100
    batches([tmp_path / "a.png"] * 40)  # many threads at once
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_skipping_leaves_out_what_is_broken_and_says_why(batch_size: int, tmp_path: Path) -> None:
    bad = [make(tmp_path_of(tmp_path, fault)) for fault, (make, _, _) in FILES.items()]
    items: list[Any] = [RGB] * 12 + bad + [3, UNIT * 255]
    random.Random(0).shuffle(items)
    broken = [i for i, item in enumerate(items) if item is not RGB]
    skipped: list[tuple[int, str]] = []
    seen: list[int] = []
    for batch in iter_batches(
        ImageSource(items),
        image_size=32,
        stride=16,
        batch_size=batch_size,
        on_error="skip",
        skipped=skipped,
    ):
        seen += batch.indices
    assert [i for i, _ in skipped] == broken
    assert sorted(seen) == [i for i in range(len(items)) if i not in broken]
    for index, reason in skipped:
        item = items[index]
        assert (item.name if isinstance(item, Path) else f"images[{index}]") in reason


def tmp_path_of(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name.replace(" ", "_")
    path.mkdir()
    return path


def test_all_images_may_be_skipped(tmp_path: Path) -> None:
    skipped: list[tuple[int, str]] = []
    assert batches([tmp_path / "gone.png"] * 9, on_error="skip", skipped=skipped) == []
    assert len(skipped) == 9


def test_a_rotated_image_of_16_bits_keeps_its_size(tmp_path: Path) -> None:
    array = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 100
    image = Image.fromarray(array)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    (decoded,) = ImageSource([tmp_path / "a.png"])
    assert decoded.shape == (30, 20, 3)
    np.testing.assert_allclose(decoded[..., 0], np.rot90(array, -1) / 65535, atol=1e-6)
