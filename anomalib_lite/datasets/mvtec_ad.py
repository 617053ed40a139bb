"""The layout of MVTec AD, which many other data sets and tools share."""

from __future__ import annotations

import os
from pathlib import Path

from anomalib_lite._validation import closest
from anomalib_lite.datasets.base import (
    Dataset,
    Sample,
    as_path,
    check_directory,
    list_images,
    list_masks,
    subdirectories,
)
from anomalib_lite.errors import MissingPathError

GOOD = "good"
TRAIN = f"train/{GOOD}"
_TEST = {"MVTecAD": "test", "MVTecAD2": "test_public"}  # tells the layouts apart


class MVTecAD(Dataset):
    """One category of MVTec AD, or of any data set in its layout.

    ::

        <root>/<category>/train/good/000.png
                          test/good/000.png
                          test/<kind>/000.png
                          ground_truth/<kind>/000_mask.png

    Parameters
    ----------
    root : str or PathLike
        The directory that holds the categories.
    category : str
        The name of one of them, as in ``"bottle"``.

    Attributes
    ----------
    name : str
        The category.
    train : tuple of Sample
        ``train/good``.
    test : tuple of Sample
        ``test``, kind after kind in alphabetical order. ``mask_path`` is None for good images,
        and for all where there is no ``ground_truth`` directory.

    Raises
    ------
    MissingPathError
        If a directory is missing or empty (an unknown category is answered with those that
        exist), ``ground_truth`` exists and lacks the mask of an anomalous image, or the category
        is one of MVTec AD 2.

    Notes
    -----
    Images may have any usual suffix, masks any other; ``000.png`` is accepted for
    ``000_mask.png``. Nothing is downloaded.

    References
    ----------
    Bergmann, Fauser, Sattlegger and Steger, "MVTec AD: A Comprehensive Real-World Dataset for
    Unsupervised Anomaly Detection", CVPR 2019.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for place in ("train/good/0.png", "test/dent/1.png", "ground_truth/dent/1_mask.png"):
    ...         path = Path(root, "plate", place)
    ...         path.parent.mkdir(parents=True)
    ...         Image.new("L", (6, 4)).save(path)
    ...     MVTecAD(root, "plate")
    MVTecAD('plate': 1 train, 1 test (1 dent), masks)
    """

    def __init__(self, root: str | os.PathLike[str], category: str) -> None:
        where = "MVTecAD"
        home = find_category(root, category, where)
        train = good_samples(home, TRAIN, where)
        test = []
        for folder in subdirectories(check_directory("test", home / "test", where)):
            place = f"test/{folder.name}"
            if folder.name == GOOD:
                test += good_samples(home, place, where)
            else:
                test += bad_samples(home, place, "ground_truth", where)
        super().__init__(home.name, train, test)

    @staticmethod
    def categories(root: str | os.PathLike[str]) -> list[str]:
        """Names of the categories in ``root``: its directories that have a ``train/good``.

        Raises
        ------
        MissingPathError
            If ``root`` is not a directory.

        Examples
        --------
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "plate", "train", "good").mkdir(parents=True)
        ...     MVTecAD.categories(root)
        ['plate']
        """
        return list_categories(root, "MVTecAD")


def list_categories(root: str | os.PathLike[str], where: str) -> list[str]:
    """Names of the directories in ``root`` that have a ``train/good``."""
    path = check_directory("root", as_path("root", root, where), where)
    return [p.name for p in subdirectories(path) if (p / TRAIN).is_dir()]


def find_category(root: str | os.PathLike[str], category: str, where: str) -> Path:
    """The directory of a category, unless it has the layout of the other data set."""
    valid, path = list_categories(root, where), as_path("root", root, where)
    if category in valid:
        return _check_layout(path / category, where)
    if valid:
        hint = closest(category, valid)
    elif (path / TRAIN).is_dir():
        hint = f" {path} is a category itself: pass its parent as root."
    else:
        hint = " A category is a directory that has a train/good directory."
    raise MissingPathError(
        f"{where}: category must be one of {valid} in {path}, got {category!r}.{hint}"
    )


def _check_layout(home: Path, where: str) -> Path:
    if (home / _TEST[where]).is_dir():
        return home
    for other, test in _TEST.items():
        if (home / test).is_dir():
            raise MissingPathError(
                f"{where}: {home} must have a directory {_TEST[where]}, got {test}: this is the "
                f"layout of {other}. Use {other} in place of {where}."
            )
    return home  # what is missing is named where it is read


def good_samples(home: Path, place: str, where: str) -> list[Sample]:
    """The normal images in ``home/place``."""
    return [Sample(path, 0, GOOD) for path in list_images(place, home / place, where)]


def bad_samples(home: Path, place: str, ground_truth: str, where: str) -> list[Sample]:
    """The anomalous images in ``home/place``, with masks if ``home/ground_truth`` exists."""
    paths, kind = list_images(place, home / place, where), Path(place).name
    if not (home / ground_truth).is_dir():
        return [Sample(path, 1, kind) for path in paths]
    directory = home / ground_truth / kind
    masks = list_masks(f"{ground_truth}/{kind}", directory, where)
    samples = []
    for path in paths:
        mask = masks.get(f"{path.stem}_mask", masks.get(path.stem))
        if mask is None:
            raise MissingPathError(
                f"{where}: the anomalous image {path} must have a mask "
                f"{directory / path.stem}_mask.png, got none. Add it, or remove the "
                f"whole {ground_truth} directory to go without masks."
            )
        samples.append(Sample(path, 1, kind, mask))
    return samples
