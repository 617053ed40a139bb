"""MVTec LOCO AD: structural defects, and parts that break a rule though every piece is whole."""

from __future__ import annotations

import os
from pathlib import Path

from anomalib_lite.datasets._mvtec_layout import (
    TRAIN,
    find_category,
    good_samples,
    list_categories,
)
from anomalib_lite.datasets.base import GOOD, Dataset, Sample
from anomalib_lite.datasets.listing import check_directory, list_images, pair, subdirectories

__all__ = ["MVTecLOCO"]

_WHERE = "MVTecLOCO"


class MVTecLOCO(Dataset):
    """One category of MVTec LOCO AD.

    ::

        <root>/<category>/train/good/000.png
                          validation/good/000.png
                          test/good/000.png
                          test/logical_anomalies/000.png
                          test/structural_anomalies/000.png
                          ground_truth/logical_anomalies/000/000.png
                                                             001.png

    Parameters
    ----------
    root : str or PathLike
        Directory that holds the categories.
    category : str
        Name of a category: ``"breakfast_box"``, ``"juice_bottle"``, ``"pushpins"``,
        ``"screw_bag"`` or ``"splicing_connectors"``.

    Attributes
    ----------
    name : str
        The category.
    train : tuple of Sample
        ``train/good``.
    test : tuple of Sample
        ``test``: good, then logical and structural anomalies. ``mask_path`` is the directory of
        the image's masks; what any of them marks is anomalous. It is None for good images, and
        for all images if there is no ``ground_truth`` directory.
    validation : tuple of Sample
        ``validation/good``: further normal images, for thresholds.
    licence, source, citation : str
        Licence of the images (non-commercial), where they come from, and what to cite.

    Raises
    ------
    MissingPathError
        If a directory is missing or empty (for an unknown category the error lists those that
        exist), ``ground_truth`` exists and lacks the masks of an anomalous image, or the category
        has the layout of MVTec AD or MVTec AD 2.
    InvalidTypeError
        If ``root`` is not a path.

    Notes
    -----
    The data set's own pixel metric, sPRO, counts a logical anomaly as found once a part of its
    mask is covered (the saturation thresholds in ``defects_config.json``): where a piece is
    missing, no pixel is more wrong than the others. This library does not compute sPRO and does not
    read that file. Its pixel metrics count all pixels of the masks and cannot be compared with
    published sPRO; the image metrics can.

    Nothing is downloaded.

    References
    ----------
    Bergmann, Batzner, Fauser, Sattlegger and Steger, "Beyond Dents and Scratches: Logical
    Constraints in Unsupervised Anomaly Detection and Localization", International Journal of
    Computer Vision 130, 2022.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> places = ["train/good/0.png", "validation/good/0.png", "test/good/0.png"]
    >>> places += ["test/logical_anomalies/0.png", "ground_truth/logical_anomalies/0/000.png"]
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for place in places:
    ...         path = Path(root, "pushpins", place)
    ...         path.parent.mkdir(parents=True)
    ...         Image.new("L", (6, 4)).save(path)
    ...     ds = MVTecLOCO(root, "pushpins")
    ...     print(ds.test[1].mask().shape)
    (4, 6)
    >>> ds
    MVTecLOCO('pushpins': 1 train, 2 test (1 good, 1 logical_anomalies), masks)
    """

    licence = "CC BY-NC-SA 4.0"
    source = "https://www.mvtec.com/company/research/datasets/mvtec-loco"
    citation = (
        "Bergmann, Batzner, Fauser, Sattlegger and Steger, Beyond Dents and Scratches: Logical "
        "Constraints in Unsupervised Anomaly Detection and Localization, International Journal of "
        "Computer Vision 130, 2022, doi:10.1007/s11263-022-01578-9"
    )

    def __init__(self, root: str | os.PathLike[str], category: str) -> None:
        home = find_category(root, category, _WHERE)
        test = good_samples(home, f"test/{GOOD}", _WHERE)
        for folder in subdirectories(check_directory("test", home / "test", _WHERE)):
            if folder.name != GOOD:
                test += _bad_samples(home, folder.name)
        super().__init__(home.name, good_samples(home, TRAIN, _WHERE), test)
        self.validation = tuple(good_samples(home, f"validation/{GOOD}", _WHERE))

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
        ...     Path(root, "pushpins", "train", "good").mkdir(parents=True)
        ...     MVTecLOCO.categories(root)
        ['pushpins']
        """
        return list_categories(root, _WHERE)


def _bad_samples(home: Path, kind: str) -> list[Sample]:
    paths = list_images(f"test/{kind}", home / "test" / kind, _WHERE)
    if not (home / "ground_truth").is_dir():
        return [Sample(path, 1, kind) for path in paths]
    place = check_directory(f"ground_truth/{kind}", home / "ground_truth" / kind, _WHERE)
    pairs = pair(
        paths,
        {directory.name: directory for directory in subdirectories(place)},
        lambda path: (path.stem,),
        lambda path: (
            f"{_WHERE}: the anomalous image {path} must have masks in the directory "
            f"{place / path.stem}, got none. Add it, or remove the whole ground_truth directory to "
            "go without masks."
        ),
    )
    return [Sample(path, 1, kind, mask) for path, mask in pairs]
