"""MVTec AD, and the many data sets in its layout."""

from __future__ import annotations

import os

from anomalib_lite.datasets._mvtec_layout import (
    TRAIN,
    bad_samples,
    find_category,
    good_samples,
    list_categories,
)
from anomalib_lite.datasets.base import GOOD, Dataset
from anomalib_lite.datasets.listing import LeftOut, check_directory, subdirectories
from anomalib_lite.images import warn_left_out

__all__ = ["MVTecAD"]


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
        Directory that holds the categories.
    category : str
        Name of a category, such as ``"bottle"``.

    Attributes
    ----------
    name : str
        The category.
    train : tuple of Sample
        ``train/good``.
    test : tuple of Sample
        ``test``, sorted by kind. ``mask_path`` is None for good images, and for all images if
        there is no ``ground_truth`` directory.

    Raises
    ------
    MissingPathError
        If a directory is missing or empty (for an unknown category the error lists those that
        exist), ``ground_truth`` exists and lacks the mask of an anomalous image, or the category
        has the layout of MVTec AD 2.

    Notes
    -----
    Images and masks may have any common suffix, and different ones; ``000.png`` is accepted for
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
        left_out: LeftOut = {}
        train = good_samples(home, TRAIN, where, left_out)
        test = []
        for folder in subdirectories(check_directory("test", home / "test", where), left_out):
            place = f"test/{folder.name}"
            if folder.name == GOOD:
                test += good_samples(home, place, where, left_out)
            else:
                test += bad_samples(home, place, "ground_truth", where, left_out)
        warn_left_out(home, left_out, where)
        super().__init__(home.name, train, test)

    @staticmethod
    def categories(root: str | os.PathLike[str]) -> list[str]:
        """List the names of the categories in ``root``: directories that have a ``train/good``.

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
