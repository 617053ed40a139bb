"""Ground truth masks: image files -> pixels that are anomalous, normal, or left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from anomalib_lite.errors import ImageError, InvalidValueError, MissingPathError
from anomalib_lite.images import check_one_page, list_files

__all__ = ["LARGEST_COVER", "N_CLASSES", "load_mask"]

# A mask that marks a larger share of its pixels may be inverted, so load_mask asks.
LARGEST_COVER = 0.95
# Values up to this are class numbers, and so are up to this many colours. Edges that are soft from
# resizing or compression have values all over the scale.
N_CLASSES = 40


def load_mask(
    path: str | os.PathLike[str],
    *,
    inverted: bool | None = None,
    ignore_255: bool | None = None,
) -> npt.NDArray[np.bool_]:
    """Read a ground truth mask from an image file.

    Parameters
    ----------
    path : str or PathLike
        Image file, black where the object is good; or a directory of such files, the masks of one
        image: what any of them marks is anomalous.
    inverted : bool or None, default=None
        True: the mask is black where the object is anomalous. False: the mask is as it should be.
        None: it is too, but a mask that marks more than 95 % of its pixels is an error.
    ignore_255 : bool or None, default=None
        True: 255 (65535 in 16 bits) belongs to neither class. False: it is anomalous. None: beside
        class numbers it belongs to neither class, but if it covers more pixels than all of them
        together, it may be the defect, which is an error. Soft masks have none.

    Returns
    -------
    ndarray of shape (H, W), bool
        True is anomalous. If the file says that some pixels belong to neither class, a masked
        array (:class:`numpy.ma.MaskedArray`) whose mask is True there. All pixel metrics of this
        library leave these pixels out.

    Raises
    ------
    MissingPathError
        If there is no such file, or no image in the directory.
    ImageError
        If a file cannot be decoded, or the files of a directory differ in size.
    InvalidValueError
        If more than 95 % of a mask are marked, and ``inverted`` is None; or if 255 covers more
        pixels than the class numbers beside it, and ``ignore_255`` is None.

    Notes
    -----
    The mask is turned as its EXIF orientation says, as images are.

    0, or black, is normal, and everything else is anomalous. Three kinds of files need more:

    - *Soft masks* were JPEG files or were resized, and have faint specks around every edge; if
      every non-zero pixel counted, each speck would be a defect region of its own. Of more than two
      gray levels, those above half of full scale (127 of 255) are anomalous; in a JPEG file without
      such levels, those above half of its largest value.
    - *Class numbers* 1, 2, ... (at most 40) beside 0 are all anomalous. If 255 is there as well
      (65535 in 16 bits), it means "ignore": the blurred edges of defects, which cover fewer pixels
      than the defects. Where it covers more, nothing in the file tells whether it is the defect and
      the small numbers are specks, so ``ignore_255`` must say it. Without class numbers, 255 is
      anomalous.
    - *Colours*, of a palette or of an RGB file, are classes: all but black are anomalous. For
      number 255 of a palette the same holds. A file with more than 40 colours, and
      a JPEG file, is a soft mask: the largest of red, green and blue counts.

    Where a pixel is fully transparent, nothing is drawn: it is normal.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from PIL import Image
    >>> classes = np.array([[0, 0, 3, 255], [0, 1, 3, 255]], np.uint8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "mask.png")
    ...     Image.fromarray(classes).save(path)
    ...     mask = load_mask(path)
    >>> print(mask)
    [[False False True --]
     [False True True --]]
    """
    path = Path(path)
    files = list_files(path) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise MissingPathError(
            f"load_mask: path must be an image file, or a directory of some, got {path}: "
            f"{'no image is in it' if path.is_dir() else 'there is no file'}."
        )
    anomalous, ignored = _read(files[0], inverted, ignore_255)
    for file in files[1:]:
        more, more_ignored = _read(file, inverted, ignore_255)
        if more.shape != anomalous.shape:
            raise ImageError(
                f"load_mask: the masks of one image must have one size (H, W), got "
                f"{anomalous.shape} of {files[0]} and {more.shape} of {file}."
            )
        anomalous, ignored = anomalous | more, ignored | more_ignored
    if not ignored.any():
        return anomalous
    # What one mask marks is known, whatever another one ignores.
    return np.ma.MaskedArray(anomalous, mask=ignored & ~anomalous)


_Bools = npt.NDArray[np.bool_]


def _read(path: Path, inverted: bool | None, ignore_255: bool | None) -> tuple[_Bools, _Bools]:
    """Read one file: what is anomalous, and what is ignored."""
    try:
        with Image.open(path) as opened:
            lossy = opened.format in {"JPEG", "MPO"}
            if getattr(opened, "is_animated", False):
                check_one_page(opened, f"load_mask: {path}")
            image = ImageOps.exif_transpose(opened)
            anomalous, ignored = _classify(image, lossy, bool(ignore_255))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"load_mask: {path} must be a readable image, got {error}. Export it again as PNG."
        ) from error
    if ignore_255 is False:
        anomalous, ignored = anomalous | ignored, ignored & False
    elif ignore_255 is None and ignored.sum() > anomalous.sum():
        raise InvalidValueError(
            f"load_mask: {path} must say what its largest value means: {ignored.sum()} pixels have "
            f"it (255; 65535 in 16 bits) and {anomalous.sum()} have class numbers, so it may mean "
            "'ignore' or be the defect. Pass ignore_255=True if nobody labelled these pixels, or "
            "ignore_255=False if they are anomalous (evaluate takes the same argument)."
        )
    if inverted:
        anomalous = ~(anomalous | ignored)
    cover = anomalous.sum() / max(1, anomalous.size - ignored.sum())
    if inverted is None and cover > LARGEST_COVER:
        raise InvalidValueError(
            f"load_mask: {path} must mark at most {100 * LARGEST_COVER:g} % of its pixels as "
            f"anomalous, got {100 * cover:.4g} %. Is it inverted, black where the part is "
            "anomalous? Then pass inverted=True (for evaluate: inverted_masks=True). If the defect "
            "is so large, pass inverted=False (for evaluate: inverted_masks=False)."
        )
    return anomalous, ignored


def _classify(image: Image.Image, lossy: bool, alone: bool) -> tuple[_Bools, _Bools]:
    """Apply the rules of :func:`load_mask`: what is anomalous, and what is ignored.

    ``alone`` says that 255 is ignored where it is the only value above 0, too.
    """
    is_void = np.zeros((image.height, image.width), bool)
    if image.mode in {"P", "PA"}:
        numbers = np.asarray(image)
        is_void = (numbers if numbers.ndim == 2 else numbers[..., 0]) == 255
        image = image.convert("RGBA")
    elif image.mode in {"CMYK", "HSV", "LAB", "YCbCr"}:
        image = image.convert("RGB")
    values = np.asarray(image)
    visible = np.ones(values.shape[:2], bool)
    if image.mode in {"LA", "RGBA"}:
        visible, values = values[..., -1] > 0, values[..., :-1]
    if values.dtype == np.bool_:
        return values.copy(), is_void & False
    if values.ndim == 3:
        colored = (values != values[..., :1]).any()
        if colored and not lossy:
            codes = values.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
            if np.unique(codes[codes > 0]).size <= N_CLASSES:
                drawn = (codes > 0) & visible
                ignored = is_void & drawn
                # Alone it is the only class, as 255 is in a gray mask.
                ignored &= alone or bool((drawn & ~ignored).any())
                return drawn & ~ignored, ignored
        values = values.max(-1)
    anomalous, ignored = _classify_levels(values, lossy, alone)
    return anomalous & visible, ignored & visible


def _classify_levels(values: npt.NDArray[Any], lossy: bool, alone: bool) -> tuple[_Bools, _Bools]:
    """Tell the gray levels of a mask apart: what is anomalous, and what is ignored."""
    if values.dtype == np.uint8:  # counting is faster than sorting
        levels = np.flatnonzero(Image.fromarray(values).histogram())
    else:
        levels = np.unique(values)
    levels = levels[levels != 0]
    nothing = np.zeros(values.shape, bool)
    top: Any = levels[-1] if levels.size else 0
    full = 65535 if top > 255 else 255
    if levels.size < 2:
        drawn = np.asarray(values != 0)
        return (nothing, drawn) if alone and top == full else (drawn, nothing)
    numbers = levels[levels != full]
    if not lossy and numbers[-1] <= N_CLASSES and values.dtype.kind in "iu":
        ignored = np.asarray(values == full)
        return (values != 0) & ~ignored, ignored
    half = full // 2
    if top <= half:
        half = top / 2 if lossy or values.dtype.kind == "f" else 0
    return np.asarray(values > half), nothing
