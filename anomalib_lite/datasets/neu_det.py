"""NEU-DET: hot-rolled steel strip with defects in boxes, and no normal images."""

from __future__ import annotations

import math
import os
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from PIL import Image

from anomalib_lite.datasets.base import Dataset, Sample
from anomalib_lite.datasets.listing import as_path, check_directory, list_images, pair
from anomalib_lite.errors import ImageError, InvalidValueError, MissingPathError

__all__ = ["KINDS", "NEUDET"]

KINDS = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
# Directories of images and of their annotations: as published, and as its mirrors divide it.
_PUBLISHED = (("IMAGES", "ANNOTATIONS"),)
_DIVIDED = (
    ("train/images", "train/annotations"),
    ("validation/images", "validation/annotations"),
)


class NEUDET(Dataset):
    """NEU-DET: 1,800 photographs of hot-rolled steel strip, 300 of each of six kinds of defect.

    ::

        <root>/IMAGES/crazing_1.jpg
               ANNOTATIONS/crazing_1.xml

    The layout of its mirrors, ``<root>/{train,validation}/{images/<kind>,annotations}``, is read
    too, as one data set. Images may be missing.

    Parameters
    ----------
    root : str or PathLike
        Directory that holds ``IMAGES`` and ``ANNOTATIONS``.

    Attributes
    ----------
    name : str
        ``"neu_det"``.
    train : tuple of Sample
        Empty: there are no normal images.
    test : tuple of Sample
        All images, sorted by path. The kind is the file name without its number:
        ``"crazing"``, ``"inclusion"``, ``"patches"``, ``"pitted_surface"``,
        ``"rolled-in_scale"`` or ``"scratches"``.
    boxes : dict of Path to ndarray of shape (n, 4), int64
        Boxes of the defects, x_min, y_min, x_max, y_max, by the path of the image.
    licence, source, citation : str
        Licence of the images (none is stated), where they come from, and what to cite.

    Raises
    ------
    MissingPathError
        If a directory is missing or empty, or an image has no annotation.
    InvalidValueError
        If a file name does not begin with one of the six kinds.
    InvalidTypeError
        If ``root`` is not a path.

    Notes
    -----
    Train on images of good strip of your own. Boxes are no masks, since they contain much good
    steel: instead of pixel metrics, test whether the highest value of a heatmap is in a box
    (:func:`~anomalib_lite.metrics.pointing_game`). A box may show another kind of defect than the
    name of its image says.

    References
    ----------
    Song and Yan, "A noise robust method based on completed local binary patterns for hot-rolled
    steel strip surface defects", Applied Surface Science 285, 2013.

    He, Song, Meng and Yan, "An End-to-End Steel Surface Defect Detection Approach via Fusing
    Multiple Hierarchical Features", IEEE Transactions on Instrumentation and Measurement 69(4),
    2020.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> xml = '''<annotation><size><width>200</width><height>100</height></size>
    ...     <object><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>40</xmax><ymax>30</ymax></bndbox>
    ...     </object></annotation>'''
    >>> with tempfile.TemporaryDirectory() as root:
    ...     image, annotation = Path(root, "IMAGES/patches_7.jpg"), Path(root, "ANNOTATIONS")
    ...     image.parent.mkdir()
    ...     annotation.mkdir()
    ...     Image.new("L", (200, 100)).save(image)
    ...     _ = (annotation / "patches_7.xml").write_text(xml)
    ...     ds = NEUDET(root)
    ...     print(ds.boxes[ds.test[0].path])
    [[ 0 10 40 30]]
    >>> ds
    NEUDET('neu_det': 0 train, 1 test (1 patches), no masks)
    """

    licence = "none stated"
    source = "https://ieee-dataport.org/documents/neu-det"
    citation = (
        "Song and Yan, A noise robust method based on completed local binary patterns for "
        "hot-rolled steel strip surface defects, Applied Surface Science 285, 2013, "
        "doi:10.1016/j.apsusc.2013.09.002; "
        "He et al., An End-to-End Steel Surface Defect Detection Approach via Fusing Multiple "
        "Hierarchical Features, IEEE Transactions on Instrumentation and Measurement 69(4), 2020, "
        "doi:10.1109/TIM.2019.2915404"
    )
    _test_only = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        home = check_directory("root", as_path("root", root, "NEUDET"), "NEUDET")
        self._annotations: dict[Path, Path] = {}
        for place, beside in _directories(home):
            self._annotations |= _pairs(place, beside)
        test = [Sample(path, 1, _kind(path)) for path in self._annotations]
        super().__init__("neu_det", train=(), test=test)

    # Read at the first use: image scores need no boxes.
    @cached_property
    def boxes(self) -> dict[Path, npt.NDArray[np.int64]]:
        """Boxes of the defects, x_min, y_min, x_max, y_max, by the path of the image.

        Returns
        -------
        dict of Path to ndarray of shape (n, 4), int64
            In pixels of the image and its heatmap, from 0, without the ends:
            ``heatmap[y_min:y_max, x_min:x_max]`` is the box.

        Raises
        ------
        InvalidValueError
            If a file is no annotation, a box is not inside its image, or a file holds a document
            type definition.
        ImageError
            If an image cannot be read.

        Notes
        -----
        Files in the format of Pascal VOC count from 1 and include the ends. Boxes are scaled from
        the size that the file states to that of the image, and rounded outwards: some mirrors
        have enlarged images with the boxes of the original 200 x 200 pixels.
        """
        return {image: _read_boxes(file, image) for image, file in self._annotations.items()}


def _directories(home: Path) -> list[tuple[Path, Path]]:
    for layout in (_PUBLISHED, _DIVIDED):
        found = [(home / a, home / b) for a, b in layout if (home / a).is_dir()]
        if found:
            return found
    raise MissingPathError(
        "NEUDET: root must hold the directories IMAGES and ANNOTATIONS, or train/images and "
        f"train/annotations, got {home} without them. Pass the directory right above them."
    )


def _pairs(images: Path, annotations: Path) -> dict[Path, Path]:
    """Map each image to its annotation."""
    paths = list_images(images.name, images, "NEUDET", recursive=True)
    check_directory(annotations.name, annotations, "NEUDET")
    pairs = pair(
        paths,
        {path.stem: path for path in annotations.glob("*.xml")},
        lambda image: (image.stem,),
        lambda image: (
            f"NEUDET: the image {image} must have an annotation, got none at "
            f"{annotations / image.stem}.xml. Add it, or remove the image."
        ),
    )
    return dict(pairs)


def _kind(path: Path) -> str:
    kind, _, number = path.stem.rpartition("_")
    if kind in KINDS and number.isdecimal():
        return kind
    raise InvalidValueError(
        f"NEUDET: an image must be named after its kind, one of {list(KINDS)}, and a number, as "
        f"in crazing_1.jpg, got {path}. Remove what does not belong to the data set."
    )


def _read_boxes(file: Path, image: Path) -> npt.NDArray[np.int64]:
    """Read boxes (n, 4) in pixels of the image, from 0, without the ends."""
    root, (width, height) = _parse(file), _size(image)
    size = _numbers(root.find("size"), ("width", "height"), file, low=1)
    boxes = []
    for entry in root.iterfind("object"):
        box = _numbers(entry.find("bndbox"), ("xmin", "ymin", "xmax", "ymax"), file, low=0)
        x_min, y_min, x_max, y_max = box
        if not (x_min <= x_max <= size[0] and y_min <= y_max <= size[1]):
            raise InvalidValueError(
                f"NEUDET: a box must lie in the {size[0]:g} x {size[1]:g} pixels (width x height) "
                f"that {file} states, got xmin, ymin, xmax, ymax = {box}. Correct the file."
            )
        left, right = _scaled(x_min, x_max, width, size[0])
        top, bottom = _scaled(y_min, y_max, height, size[1])
        boxes.append((left, top, right, bottom))
    return np.array(boxes, np.int64).reshape(-1, 4)  # (0, 4) without any box


def _scaled(first: float, last: float, pixels: int, stated: float) -> tuple[int, int]:
    """Convert the first and last pixel of a stated size to start and end in the image's size."""
    # Some tools count from 0 although the format counts from 1: such a box begins at the edge.
    start = max(first - 1, 0)
    return math.floor(start * pixels / stated), math.ceil(max(last, 1) * pixels / stated)


def _parse(file: Path) -> ElementTree.Element:
    """Return the root of an XML file; refuse a file that could do harm."""
    # The parser takes a decoded string as it is, whatever encoding it declares, so that it sees the
    # text that is searched here. Without a document type, no entity can be declared that expands to
    # gigabytes or names another file. Only numbers are used, so undecodable characters may be
    # replaced.
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    if "<!DOCTYPE" in text:
        raise InvalidValueError(
            f"NEUDET: {file} must hold no document type definition, got one. An annotation needs "
            "none: remove it, unless the file comes from someone you do not trust."
        )
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise InvalidValueError(
            f"NEUDET: {file} must be an XML file of boxes, got {error}. Unpack it again."
        ) from error


def _numbers(
    parent: ElementTree.Element | None, names: tuple[str, ...], file: Path, *, low: float
) -> tuple[float, ...]:
    texts = [None if parent is None else parent.findtext(name) for name in names]
    try:
        numbers = tuple(float(text or "") for text in texts)
        if all(low <= number < math.inf for number in numbers):
            return numbers
    except ValueError:
        pass  # the same remedy
    raise InvalidValueError(
        f"NEUDET: {file} must state {', '.join(names)} as numbers of at least {low:g}, in the "
        f"format of Pascal VOC, got {texts}. Correct the file, or unpack it again."
    )


def _size(image: Path) -> tuple[int, int]:
    """Read width and height from the header of the file."""
    try:
        with Image.open(image) as opened:
            return opened.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"NEUDET: {image} must be a readable image, got {error}. Unpack it again."
        ) from error
