"""Images other than 8-bit files of one page: arrays, tensors, deep pixels, several pages."""

from __future__ import annotations

import io
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from anomalib_lite.errors import (
    AnomalibLiteError,
    ImageError,
    InvalidTypeError,
    MissingPathError,
)

__all__ = [
    "check_one_page",
    "deep_pixels",
    "explain",
    "refuse_special",
    "to_array",
    "unit_floats",
]

CHANNELS = (1, 3, 4)
# Tags of TIFF files.
_SUBFILE, _BITS, _PLANES = 254, 258, 284
_REDUCED_OR_MASK = 0b101  # bits of the tag 254
# Pillow's names of the byte orders of 16-bit colours, and the name of the other order.
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_DEEP = re.compile(r";16[BLN]")
_COLOURS = re.compile(r"RGB[AX]?;16[BLN]")  # those that can be read in another order


def refuse_special(item: Any, where: str) -> ImageError:
    """Return the error for a path that is no file with content, such as a FIFO or a device."""
    mode = os.stat(item).st_mode  # noqa: PTH116
    kinds = {
        stat.S_IFDIR: "a directory, which can be given alone, not in a list",
        stat.S_IFIFO: "a FIFO, which has no end",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return ImageError(
        f"{where} must be a file, got {kinds.get(stat.S_IFMT(mode), 'something else')}. Leave it "
        "out, or go on without it by on_error='skip'."
    )


def check_one_page(image: Image.Image, where: str) -> None:
    """Raise ImageError if an opened image has several pages or frames.

    What only accompanies one photograph is no page: thumbnails and masks of a TIFF file, layers of
    a PSD file (the whole is read), gain maps, depth maps and previews in a JPEG file (MPO).
    """
    n = _count_pages(image)
    if n > 1:
        raise ImageError(
            f"{where} must be one image, got {n} pages or frames: a defect on another page would "
            "not be seen. Save each as a file of its own, or pass them as a list: "
            "[page.copy() for page in PIL.ImageSequence.Iterator(PIL.Image.open(path))]."
        )


def _count_pages(image: Any) -> int:
    n: int = image.n_frames
    if image.format == "PSD":
        return 1
    if image.format == "MPO":
        kinds = [entry["Attribute"]["MPType"] for entry in image.mpinfo.get(0xB002, ())]
        return n if any(str(kind).startswith("Multi-Frame") for kind in kinds) else 1
    if image.format == "TIFF":
        here, kinds = image.tell(), []
        for page in range(n):
            image.seek(page)
            kinds.append(int(image.tag_v2.get(_SUBFILE, 0)) & _REDUCED_OR_MASK)
        image.seek(here)
        return 1 if not kinds[0] and all(kinds[1:]) else n
    return n


def deep_pixels(image: Image.Image, where: str) -> Any:
    """Return the pixels of an image of more than 8 bits, turned as its EXIF orientation says.

    Parameters
    ----------
    image : PIL image
    where : str
        Caller and image, named in errors.

    Returns
    -------
    ndarray of shape (H, W, 1), (H, W, 3) or (H, W, 4), uint16 or floats in [0, 1]; or PIL image
        Numbers of 12 bits are divided by 4095. The image itself, turned, if it has 8 bits.

    Raises
    ------
    ImageError
        If the largest possible value is not known, or not all bits can be read.
    """
    tags, form = getattr(image, "tag_v2", {}), image.format
    bits = max(np.atleast_1d(tags.get(_BITS, 8)))
    if image.mode[0] not in "FI":
        tiles = getattr(image, "tile", ())  # what is still to be decoded, and how
        forms = str([tile[3] for tile in tiles])
        scaled = any(tile[0] == "ppm" and tile[3][1] > 255 for tile in tiles)
        if not (bits > 8 or scaled or _DEEP.search(forms)):
            return ImageOps.exif_transpose(image)
        if _COLOURS.search(forms) and tags.get(_PLANES, 1) == 1:
            return _colours_of_16_bits(image)
        raise ImageError(
            f"{where} has colours of 16 bits in a form of which Pillow reads only 8. Save it "
            "with 8 bits, or read it with another library and pass its uint16 array (H, W, 3)."
        )
    array = np.asarray(ImageOps.exif_transpose(image))
    if image.mode == "I;16" and bits == 12:
        return array[..., None].astype(np.float32) / np.float32(4095)
    # 16-bit files of some formats are int32 in Pillow, but there are files of 32 bits, too.
    is_16_bit = form in {"PNG", "PPM"} or (form is None and array.max() > 255)
    if is_16_bit and array.dtype == np.int32 and 0 <= array.min() <= array.max() <= 65535:
        array = array.astype(np.uint16)
    return to_array(array, where)


def _colours_of_16_bits(image: Any) -> np.ndarray:
    """Read an opened file twice, since Pillow gives the high bytes of its colours alone.

    Read in the other byte order, the low bytes are the high ones.
    """
    image.fp.seek(0)
    content = image.fp.read()
    read = []
    for swap in (False, True):
        again = type(image)(io.BytesIO(content))  # its format is known, and its size is checked
        if swap:
            again.tile = [
                # A plain tuple in older versions of Pillow.
                getattr(tile, "_make", tuple)([*tile[:3], _in_other_order(tile[3])])
                for tile in again.tile
            ]
        read.append(np.asarray(ImageOps.exif_transpose(again)).astype(np.uint16))
    high, low = read
    return (high << 8) | low


def _in_other_order(args: Any) -> Any:
    if isinstance(args, str):
        return args[:-1] + _OTHER_ORDER[args[-1]]
    return (_in_other_order(args[0]), *args[1:])


def to_array(image: Any, where: str) -> np.ndarray:
    """Return one image as an array (H, W, C); a tensor may have its channels first."""
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
        if image.ndim == 3 and image.shape[0] in CHANNELS and image.shape[2] not in CHANNELS:
            image = np.moveaxis(image, 0, -1)
    elif not hasattr(image, "__array__"):
        pairs = " Of pairs (image, label), give the images alone: [image for image, _ in pairs]."
        raise InvalidTypeError(
            f"{where} must be a path, a PIL image, an array or a tensor, or a file's content as "
            f"bytes, got {type(image).__name__}.{pairs if isinstance(image, tuple) else ''}"
        )
    array = np.asarray(image)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in CHANNELS:
        remedy = "Give a stack of gray images as list(stack) or stack[..., None]."
        if array.ndim == 3 and array.shape[0] in CHANNELS:
            remedy = "Move channels that come first to the end: numpy.moveaxis(image, 0, -1)."
        raise ImageError(
            f"{where} must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"got {np.shape(image)}: a wrong number of channels. {remedy}"
        )
    if array.dtype.kind != "f" and array.dtype not in (np.uint8, np.uint16):
        raise ImageError(
            f"{where} must be uint8, uint16, or floats in [0, 1], got {array.dtype}, whose largest "
            "value is not known. Convert it with .astype('uint8') if it holds 0 to 255, with "
            ".astype('uint16') if it holds 0 to 65535; otherwise divide by the largest value."
        )
    return array


def unit_floats(array: np.ndarray, where: str) -> np.ndarray:
    """Return floats as float32; ImageError unless they are in [0, 1]."""
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise ImageError(
            f"{where} must be finite, got NaN or infinity. "
            "Mend it first, for example with numpy.nan_to_num."
        )
    if low < 0 or high > 1:
        remedy = "Divide by 255 if they are 8-bit values."
        if low < 0:
            remedy = (
                "If a mean was subtracted, as Normalize does, leave that out: the detector does "
                "what its network needs."
            )
        raise ImageError(
            f"{where} must be floats in [0, 1], got values from {low:g} to {high:g}. {remedy}"
        )
    return array.astype(np.float32, copy=False)


def explain(error: Exception, item: Any, where: str) -> AnomalibLiteError:
    """Return the error of this library for what Pillow or the system raised."""
    if isinstance(error, FileNotFoundError):
        return MissingPathError(f"{where} does not exist.")
    reason = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        is_path = isinstance(item, str | os.PathLike)
        size = Path(item).stat().st_size if is_path else len(item)
        reason = f"the {'file is' if is_path else 'bytes are'} not an image of a known format"
        if size == 0:
            reason = f"the {'file is' if is_path else 'bytes are'} empty (0 bytes)"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    elif isinstance(item, Image.Image):
        reason = f"the PIL image is closed or broken ({reason}). Open it again, or load() it first"
    return ImageError(
        f"{where} cannot be read: {reason}. Replace it, or go on without it by on_error='skip'."
    )
