"""MVTec AD 2: validation images, a public test, and tests without labels."""

from __future__ import annotations

import os
from pathlib import Path

from anomalib_lite.datasets._mvtec_layout import (
    TRAIN,
    bad_samples,
    find_category,
    good_samples,
    list_categories,
)
from anomalib_lite.datasets.base import Dataset
from anomalib_lite.datasets.listing import list_images

__all__ = ["MVTecAD2"]


class MVTecAD2(Dataset):
    """One category of MVTec AD 2, or of any data set in its layout.

    ::

        <root>/<category>/train/good/000_regular.png
                          validation/good/000_regular.png
                          test_public/good/000_regular.png
                          test_public/bad/000_regular.png
                          test_public/ground_truth/bad/000_regular_mask.png
                          test_private/000_regular.png
                          test_private_mixed/000_mixed.png

    Parameters
    ----------
    root : str or PathLike
        Directory that holds the categories.
    category : str
        Name of a category: ``"can"``, ``"fabric"``, ``"fruit_jelly"``, ``"rice"``,
        ``"sheet_metal"``, ``"vial"``, ``"wallplugs"`` or ``"walnuts"``.

    Attributes
    ----------
    name : str
        The category.
    train : tuple of Sample
        ``train/good``.
    test : tuple of Sample
        ``test_public``: good, then bad. ``mask_path`` is None for good images, and for all images
        if there is no ``ground_truth`` directory.
    validation : tuple of Sample
        ``validation/good``: further normal images, for thresholds.
    test_private, test_private_mixed : tuple of Path
        Images whose labels only the benchmark's server knows; in ``test_private_mixed`` the
        lighting varies more than in ``train``. Empty if there is no such directory.

    Raises
    ------
    MissingPathError
        If a directory is missing or empty (for an unknown category the error lists those that
        exist), ``ground_truth`` exists and lacks the mask of an anomalous image, or the category
        has the layout of MVTec AD.
    InvalidTypeError
        If ``root`` is not a path.

    Notes
    -----
    Private images are paths, since a :class:`Sample` must have a label. Detectors take paths too.

    The paper's threshold for pixels is the mean plus three standard deviations of all pixels in
    the anomaly maps of ``validation``.

    Nothing is downloaded. The data come from
    https://www.mvtec.com/company/research/datasets/mvtec-ad-2 under the licence CC BY-NC-SA 4.0:
    not for commercial use.

    References
    ----------
    Heckler-Kram, Neudeck, Scheler, König and Steger, "The MVTec AD 2 Dataset: Advanced Scenarios
    for Unsupervised Anomaly Detection", arXiv:2503.21622, 2025.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> places = ["train/good/0.png", "validation/good/0.png", "test_public/good/0.png"]
    >>> places += ["test_public/bad/0.png", "test_public/ground_truth/bad/0_mask.png"]
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for place in places:
    ...         path = Path(root, "can", place)
    ...         path.parent.mkdir(parents=True)
    ...         Image.new("L", (6, 4)).save(path)
    ...     ds = MVTecAD2(root, "can")
    >>> ds
    MVTecAD2('can': 1 train, 2 test (1 good, 1 bad), masks)
    >>> len(ds.validation), ds.test_private
    (1, ())
    """

    def __init__(self, root: str | os.PathLike[str], category: str) -> None:
        where = "MVTecAD2"
        home = find_category(root, category, where)
        good = good_samples(home, "test_public/good", where)
        bad = bad_samples(home, "test_public/bad", "test_public/ground_truth", where)
        super().__init__(home.name, good_samples(home, TRAIN, where), good + bad)
        self.validation = tuple(good_samples(home, "validation/good", where))
        self.test_private = _unlabelled(home / "test_private", where)
        self.test_private_mixed = _unlabelled(home / "test_private_mixed", where)

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
        ...     for name in ("vial", "can"):
        ...         Path(root, name, "train", "good").mkdir(parents=True)
        ...     MVTecAD2.categories(root)
        ['can', 'vial']
        """
        return list_categories(root, "MVTecAD2")


def _unlabelled(directory: Path, where: str) -> tuple[Path, ...]:
    # They are of little use without the benchmark's server, so users may leave them out.
    if not directory.exists():
        return ()
    return tuple(list_images(directory.name, directory, where))
