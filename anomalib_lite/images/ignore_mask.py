"""A mask, a file or polygons -> the regions of an image to ignore."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from anomalib_lite.errors import ImageError, InvalidValueError, MissingPathError
from anomalib_lite.images._pixels import check_one_page

__all__ = ["IgnoreMask", "per_image", "read_ignore_mask"]

# Masks that are kept, of images of one size or of several.
_MOST_KEPT = 8


class IgnoreMask:
    """Regions of an image to ignore: a fixture, a label, a reflection.

    Parameters
    ----------
    mask : array of shape (H, W), bool, optional
        True where pixels are ignored. For images of this size.
    polygons : sequence of K sequences of (x, y), optional
        Corners in pixels, from the left and from the top. For images of any size.

    Examples
    --------
    >>> corner = IgnoreMask(polygons=[[(0, 0), (9, 0), (9, 4), (0, 4)]])
    >>> corner.of((20, 30)).sum()
    np.int64(50)
    >>> corner.cells((20, 30), (4, 3)).astype(int)
    array([[1, 0, 0],
           [0, 0, 0],
           [0, 0, 0],
           [0, 0, 0]])
    """

    def __init__(
        self,
        mask: np.ndarray | None = None,
        polygons: Sequence[Sequence[tuple[float, float]]] | None = None,
    ) -> None:
        self.mask = mask
        self.polygons = polygons
        self._kept: dict[Any, np.ndarray] = {}

    def of(self, size: tuple[int, int], where: str = "IgnoreMask") -> np.ndarray:
        """Return the mask (H, W), bool, of an image of this size.

        Raises
        ------
        InvalidValueError
            If the mask has another size.
        """
        if self.mask is not None:
            height, width = self.mask.shape
            if (height, width) != tuple(size):
                raise InvalidValueError(
                    f"{where}: ignore_mask is {height}x{width} pixels, but the image is "
                    f"{size[0]}x{size[1]}. Draw it on an image of the same size, or give polygons, "
                    "which fit images of any size."
                )
            return self.mask
        return self._keep(tuple(size), lambda: _drawn(self.polygons or [], size))

    def fill(self, image: Any, where: str = "IgnoreMask") -> Any:
        """Return a copy of an image whose regions are gray, so that their content has no effect.

        Parameters
        ----------
        image : PIL image of mode L or RGB, or float32 array of shape (H, W, 3) in [0, 1]
        where : str
            Caller, named in errors.

        Raises
        ------
        InvalidValueError
            If the mask has another size.
        """
        if isinstance(image, np.ndarray):
            return np.where(self.of(image.shape[:2], where)[..., None], np.float32(0.5), image)
        mask, gray = self.of(image.size[::-1], where), 128 if image.mode == "L" else (128,) * 3
        filled = image.copy()
        filled.paste(gray, mask=Image.fromarray(mask.astype(np.uint8) * 255))
        return filled

    def cells(
        self, size: tuple[int, int], grid: tuple[int, int], where: str = "IgnoreMask"
    ) -> np.ndarray:
        """Return which cells (h, w), bool, of a grid over the image are ignored.

        Those of which half or more is in the regions.

        Raises
        ------
        InvalidValueError
            If the mask has another size, or nothing of the image is left.
        """
        return self._keep((tuple(size), tuple(grid)), lambda: self._cells(size, grid, where))

    def _cells(self, size: tuple[int, int], grid: tuple[int, int], where: str) -> np.ndarray:
        share = Image.fromarray(self.of(size, where).astype(np.float32))
        cells = np.asarray(share.resize(grid[::-1], Image.Resampling.BOX)) >= 0.5
        if cells.all():
            raise InvalidValueError(
                f"{where}: ignore_mask leaves nothing of an image of {size[0]}x{size[1]} pixels. "
                "True or white is what is ignored; invert the mask if it shows the part."
            )
        return cells

    def _keep(self, key: Any, make: Any) -> np.ndarray:
        kept: np.ndarray | None = self._kept.get(key)
        if kept is None:
            kept = make()
            if len(self._kept) >= _MOST_KEPT:
                self._kept = {}
            self._kept[key] = kept
        return kept


def read_ignore_mask(given: Any, where: str) -> IgnoreMask:
    """Read what a user gives as the regions to ignore in one image, or in all.

    Parameters
    ----------
    given : array (H, W), PIL image, path, polygon, or list of polygons
        What is not 0 (or False) is ignored. A file is an image, or JSON: a list of polygons, or
        LabelMe's polygons and rectangles, ``{"shapes": [{"points": ...}]}``. A polygon is a list of
        at least three (x, y).
    where : str
        Caller, named in errors.

    Returns
    -------
    IgnoreMask

    Raises
    ------
    InvalidValueError, MissingPathError
        If it holds no regions; if the file does not exist.

    Examples
    --------
    >>> read_ignore_mask([(0, 0), (9, 0), (9, 4)], "fit").of((10, 10)).shape
    (10, 10)
    """
    if isinstance(given, IgnoreMask):
        return given
    if isinstance(given, str | os.PathLike):
        return _from_file(Path(given), where)
    if isinstance(given, Image.Image):
        return IgnoreMask(_pixels(given))
    if hasattr(given, "__array__"):
        mask = np.asarray(given)
        if mask.ndim != 2 or not mask.size:
            raise _wrong(where, f"an array of shape {mask.shape}")
        if mask.shape[1] == 2 and len(mask) > 2 and mask.dtype != bool:
            raise InvalidValueError(
                f"{where}: ignore_mask must be a mask or a polygon, got an array of shape "
                f"{mask.shape}, which may be {len(mask)} corners or a mask 2 pixels wide. Write "
                "corners.tolist() for a polygon, or mask.astype(bool) for a mask."
            )
        return IgnoreMask(mask != 0)
    return _from_polygons(given, where)


def per_image(given: Any, n: int, where: str) -> IgnoreMask | list[IgnoreMask | None] | None:
    """Read the regions to ignore in ``n`` images: one for all, or one for each.

    Parameters
    ----------
    given : None, one of what :func:`read_ignore_mask` takes, or n of them or None
        An array (n, H, W) has one for each image. In a list with one for each, an image with
        several polygons has a list of them.
    n : int
    where : str
        Caller, named in errors.

    Returns
    -------
    IgnoreMask, list of n IgnoreMask or None, or None

    Raises
    ------
    InvalidValueError, MissingPathError
        As :func:`read_ignore_mask`; for another number of them; for n polygons and as many images,
        which may mean all polygons in each image, or one in each.

    Examples
    --------
    >>> per_image([None, np.eye(8)], 2, "fit")[0] is None
    True
    >>> corner, edge = [(0, 0), (9, 0), (9, 4)], [(0, 0), (0, 9), (2, 9)]
    >>> len(per_image([[corner], [corner, edge]], 2, "fit"))
    2
    """
    if given is None:
        return None
    depth = _depth(given) if isinstance(given, list | tuple) else None
    if depth == 3 and len(given) == n > 1:
        raise InvalidValueError(
            f"{where}: ignore_mask has {n} polygons for {n} images, which may mean one for each or "
            "all of them for every image. Write [[polygon], [polygon], ...] for one for each, or "
            "IgnoreMask(polygons=[...]) of anomalib_lite.images.ignore_mask for all."
        )
    is_list = isinstance(given, list | tuple) and depth not in (2, 3)
    if not is_list and getattr(given, "ndim", 2) != 3:
        return read_ignore_mask(given, where)
    if len(given) != n:
        raise InvalidValueError(
            f"{where}: ignore_mask has {len(given)} masks for {n} images. Give one for all, or one "
            "(or None) for each. A polygon is a list of at least three (x, y)."
        )
    return [None if one is None else read_ignore_mask(one, where) for one in given]


def _depth(nested: Any) -> int | None:
    """Count how deep lists are nested down to numbers: 2 for a polygon, 3 for several.

    None if it is not as deep everywhere, or holds something else.
    """
    if isinstance(nested, int | float | np.number):
        return 0
    if isinstance(nested, np.ndarray) and nested.ndim == 1:
        return 1  # a corner
    if not isinstance(nested, list | tuple) or not nested:
        return None
    depths = {_depth(entry) for entry in nested}
    inner = depths.pop()
    return None if depths or inner is None else inner + 1


def _from_file(path: Path, where: str) -> IgnoreMask:
    if not path.is_file():
        reason = "is no file" if path.exists() else "does not exist"
        raise MissingPathError(f"{where}: the ignore_mask {path} {reason}.")
    try:
        if path.suffix.lower() == ".json":
            read = json.loads(path.read_text(encoding="utf-8"))
            shapes = read["shapes"] if isinstance(read, dict) else read
            given = [_points(s) if isinstance(s, dict) else s for s in shapes]
        else:
            with Image.open(path) as image:
                if getattr(image, "is_animated", False):
                    check_one_page(image, f"{where}: the ignore_mask {path}")
                return IgnoreMask(_pixels(image))
    except ImageError:
        raise
    except Exception as error:  # PIL's decoders raise all kinds on broken files
        raise InvalidValueError(
            f"{where}: the ignore_mask {path} is neither an image nor JSON with polygons: {error}."
        ) from error
    return _from_polygons(given, f"{where}: {path}")


def _points(shape: dict[str, Any]) -> Any:
    """Return the corners of one of LabelMe's shapes; of a rectangle it writes two."""
    points = shape["points"]
    if shape.get("shape_type") == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    return points


def _from_polygons(given: Any, where: str) -> IgnoreMask:
    polygons = [given] if _depth(given) == 2 else given
    try:
        corners = [[(float(x), float(y)) for x, y in polygon] for polygon in polygons]
    except (TypeError, ValueError):
        raise _wrong(where, repr(given)[:80]) from None
    if not corners or any(len(c) < 3 or not np.isfinite(c).all() for c in corners):
        raise _wrong(where, f"polygons {corners!r}"[:80])
    return IgnoreMask(polygons=corners)


def _pixels(image: Image.Image) -> np.ndarray:
    """Return where an image is not black, whatever its mode; transparency does not count."""
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands():
        image = image.convert("RGB")
    pixels = np.asarray(image)
    return np.asarray(pixels.any(axis=2) if pixels.ndim == 3 else pixels != 0)


def _drawn(polygons: Any, size: tuple[int, int]) -> np.ndarray:
    canvas = Image.new("L", size[::-1])
    draw = ImageDraw.Draw(canvas)
    for corners in polygons:
        draw.polygon(corners, fill=1)
    return np.asarray(canvas) > 0


def _wrong(where: str, got: str) -> InvalidValueError:
    return InvalidValueError(
        f"{where}: ignore_mask must be a mask (H, W), an image file, or polygons of at least three "
        f"finite (x, y), got {got}."
    )
