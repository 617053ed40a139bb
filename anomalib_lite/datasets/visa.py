"""VisA: twelve objects, among them circuit boards and several parts in one image."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from anomalib_lite._validation import closest
from anomalib_lite.datasets._mvtec_layout import layout_of, list_categories
from anomalib_lite.datasets.base import GOOD, Dataset, Sample
from anomalib_lite.datasets.listing import as_path, check_directory, listed_file
from anomalib_lite.datasets.mvtec_ad import MVTecAD
from anomalib_lite.errors import InvalidValueError, MissingPathError

__all__ = ["SPLIT", "VisA"]

SPLIT = "split_csv/1cls.csv"
_COLUMNS = ("object", "split", "label", "image", "mask")
_LABELS = {"normal": 0, "anomaly": 1}
_SPLITS = ("train", "test")


class VisA(Dataset):
    """One object of VisA: 10,821 photographs of twelve objects.

    ::

        <root>/split_csv/1cls.csv
               candle/Data/Images/Normal/0000.JPG
                           Images/Anomaly/000.JPG
                           Masks/Anomaly/000.png

    The layout of MVTec AD, into which the authors' program brings the data, is read too: a
    ``<root>/candle/train/good`` is enough.

    Parameters
    ----------
    root : str or PathLike
        Directory that holds ``split_csv`` and the objects.
    category : str
        Name of an object: ``"candle"``, ``"capsules"``, ``"cashew"``, ``"chewinggum"``,
        ``"fryum"``, ``"macaroni1"``, ``"macaroni2"``, ``"pcb1"`` to ``"pcb4"`` or
        ``"pipe_fryum"``.

    Attributes
    ----------
    name : str
        The object.
    train : tuple of Sample
        Normal images that the file of the split gives to training.
    test : tuple of Sample
        The other images: good, then anomalous (of kind ``"anomaly"``; in the layout of MVTec AD,
        the name of the directory). ``mask_path`` is None for good images.
    licence, source, citation : str
        Licence of the images, where they come from, and what to cite.

    Raises
    ------
    MissingPathError
        If a file or directory is missing (for an unknown object the error lists those that exist).
    InvalidValueError
        If the file of the split lacks a column, or holds a value that is not allowed.
    InvalidTypeError
        If ``root`` is not a path.

    Notes
    -----
    ``1cls.csv`` is the split for training on normal images alone: 90 % of them. The masks hold
    class numbers of the defects; every one of them is anomalous. Nothing is downloaded.

    References
    ----------
    Zou, Jeong, Pemula, Zhang and Dabeer, "SPot-the-Difference Self-Supervised Pre-training for
    Anomaly Detection and Segmentation", ECCV 2022.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> rows = ["object,split,label,image,mask", "candle,train,normal,candle/0.JPG,"]
    >>> rows += ["candle,test,anomaly,candle/1.JPG,candle/1.png"]
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("candle", "split_csv"):
    ...         Path(root, name).mkdir()
    ...     _ = Path(root, "split_csv/1cls.csv").write_text("\\n".join(rows))
    ...     for name in ("0.JPG", "1.JPG", "1.png"):
    ...         Image.new("L", (6, 4)).save(Path(root, "candle", name))
    ...     VisA(root, "candle")
    VisA('candle': 1 train, 1 test (1 anomaly), masks)
    """

    licence = "CC BY 4.0"
    source = "https://github.com/amazon-science/spot-diff"
    citation = (
        "Zou, Jeong, Pemula, Zhang and Dabeer, SPot-the-Difference Self-Supervised Pre-training "
        "for Anomaly Detection and Segmentation, ECCV 2022, doi:10.1007/978-3-031-20056-4_23"
    )

    def __init__(self, root: str | os.PathLike[str], category: str) -> None:
        home = check_directory("root", as_path("root", root, "VisA"), "VisA")
        if not (home / SPLIT).is_file() and layout_of(home / category) == "MVTecAD":
            other = MVTecAD(home, category)
            super().__init__(other.name, other.train, other.test)
            return
        rows = [row for row in _read_split(home) if row["object"] == category]
        if not rows:
            valid = VisA.categories(home)
            raise MissingPathError(
                f"VisA: category must be one of {valid}, as in {home / SPLIT}, got {category!r}."
                f"{closest(category, valid)}"
            )
        samples = sorted((_sample(home, row) for row in rows), key=lambda s: (s.label, s.path))
        of_test = {home / row["image"] for row in rows if row["split"] == "test"}
        super().__init__(
            category,
            [s for s in samples if s.path not in of_test],
            [s for s in samples if s.path in of_test],
        )

    @staticmethod
    def categories(root: str | os.PathLike[str]) -> list[str]:
        """List the names of the objects in ``root``.

        Raises
        ------
        MissingPathError
            If ``root`` is not a directory, or holds neither ``split_csv/1cls.csv`` nor objects in
            the layout of MVTec AD.

        Examples
        --------
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "candle", "train", "good").mkdir(parents=True)
        ...     VisA.categories(root)
        ['candle']
        """
        home = check_directory("root", as_path("root", root, "VisA"), "VisA")
        if not (home / SPLIT).is_file() and (found := list_categories(home, "VisA")):
            return found
        return sorted({row["object"] for row in _read_split(home)})


def _read_split(home: Path) -> list[dict[str, str]]:
    """Read the rows of the split, checked."""
    file = home / SPLIT
    if not file.is_file():
        raise MissingPathError(
            f"VisA: root must hold {SPLIT}, or objects in the layout of MVTec AD, got {home} "
            "without them. Pass the directory right above the objects."
        )
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = set(_COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise InvalidValueError(
                f"VisA: {file} must have the columns {', '.join(_COLUMNS)}, got none named "
                f"{', '.join(sorted(missing))}. Unpack it again."
            )
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if row["label"] not in _LABELS or row["split"] not in _SPLITS or not row["image"]:
            raise InvalidValueError(
                f"VisA: line {number} of {file} must say train or test, normal or anomaly, and an "
                f"image, got {row['split']!r}, {row['label']!r}, {row['image']!r}. Unpack it again."
            )
    return rows


def _sample(home: Path, row: dict[str, str]) -> Sample:
    path = listed_file(home, row["image"], home / SPLIT, "VisA")
    label = _LABELS[row["label"]]
    if not label:
        return Sample(path, 0, GOOD)
    mask = listed_file(home, row["mask"], home / SPLIT, "VisA") if row["mask"] else None
    return Sample(path, 1, "anomaly", mask)
