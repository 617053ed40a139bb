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

_GOOD = "good"


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
        exist), or ``ground_truth`` exists and lacks the mask of an anomalous image.

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
        home = _find_category(as_path("root", root, "MVTecAD"), category)
        train = [
            Sample(path, 0, _GOOD)
            for path in list_images("train/good", home / "train" / _GOOD, "MVTecAD")
        ]
        test = []
        for folder in subdirectories(check_directory("test", home / "test", "MVTecAD")):
            paths = list_images(f"test/{folder.name}", folder, "MVTecAD")
            if folder.name == _GOOD:
                test += [Sample(path, 0, _GOOD) for path in paths]
            else:
                test += _with_masks(paths, folder.name, home / "ground_truth")
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
        path = check_directory("root", as_path("root", root, "MVTecAD"), "MVTecAD")
        return [p.name for p in subdirectories(path) if (p / "train" / _GOOD).is_dir()]


def _find_category(root: Path, category: str) -> Path:
    valid = MVTecAD.categories(root)
    if category in valid:
        return root / category
    if valid:
        hint = closest(category, valid)
    elif (root / "train" / _GOOD).is_dir():
        hint = f" {root} is a category itself: pass its parent as root."
    else:
        hint = " A category is a directory that has a train/good directory."
    raise MissingPathError(
        f"MVTecAD: category must be one of {valid} in {root}, got {category!r}.{hint}"
    )


def _with_masks(paths: list[Path], kind: str, ground_truth: Path) -> list[Sample]:
    if not ground_truth.is_dir():
        return [Sample(path, 1, kind) for path in paths]
    masks = list_masks(f"ground_truth/{kind}", ground_truth / kind, "MVTecAD")
    samples = []
    for path in paths:
        mask = masks.get(f"{path.stem}_mask", masks.get(path.stem))
        if mask is None:
            raise MissingPathError(
                f"MVTecAD: the anomalous image {path} must have a mask "
                f"{ground_truth / kind / path.stem}_mask.png, got none. Add it, or remove the "
                "whole ground_truth directory to go without masks."
            )
        samples.append(Sample(path, 1, kind, mask))
    return samples
