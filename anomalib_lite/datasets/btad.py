"""BTAD: three industrial products, with defects of body and surface."""

from __future__ import annotations

import os

from anomalib_lite.datasets._mvtec_layout import (
    bad_samples,
    find_category,
    good_samples,
    list_categories,
)
from anomalib_lite.datasets.base import Dataset

__all__ = ["BTAD"]

_TRAIN = "train/ok"


class BTAD(Dataset):
    """One product of BTAD, the beanTech Anomaly Detection data set: three products.

    ::

        <root>/01/train/ok/0000.bmp
                  test/ok/0000.bmp
                  test/ko/0000.bmp
                  ground_truth/ko/0000.png

    Parameters
    ----------
    root : str or PathLike
        Directory that holds the products; ``BTech_Dataset_transformed`` as published.
    category : str
        Name of a product: ``"01"``, ``"02"`` or ``"03"``.

    Attributes
    ----------
    name : str
        ``"btad_"`` and the product.
    train : tuple of Sample
        ``train/ok``.
    test : tuple of Sample
        ``test``: ok (of kind ``"good"``), then ko (of kind ``"ko"``). ``mask_path`` is None for
        good images, and for all images if there is no ``ground_truth`` directory.
    licence, source, citation : str
        Licence of the images (none was found at the source; others state a non-commercial one),
        where they come from, and what to cite.

    Raises
    ------
    MissingPathError
        If a directory is missing or empty (for an unknown product the error lists those that
        exist), or ``ground_truth`` exists and lacks the mask of an anomalous image.
    InvalidTypeError
        If ``root`` is not a path.

    Notes
    -----
    Images and masks may have any common suffix, and different ones. Nothing is downloaded.

    References
    ----------
    Mishra, Verk, Fornasier, Piciarelli and Foresti, "VT-ADL: A Vision Transformer Network for Image
    Anomaly Detection and Localization", IEEE ISIE, 2021.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> places = ["train/ok/0.bmp", "test/ok/0.bmp", "test/ko/0.bmp", "ground_truth/ko/0.png"]
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for place in places:
    ...         path = Path(root, "01", place)
    ...         path.parent.mkdir(parents=True)
    ...         Image.new("L", (6, 4)).save(path)
    ...     BTAD(root, "01")
    BTAD('btad_01': 1 train, 2 test (1 good, 1 ko), masks)
    """

    licence = "CC BY-NC-SA 4.0, as others state; none was found at the source"
    source = "https://github.com/pankajmishra000/VT-ADL"
    citation = (
        "Mishra, Verk, Fornasier, Piciarelli and Foresti, VT-ADL: A Vision Transformer Network for "
        "Image Anomaly Detection and Localization, IEEE ISIE, 2021, "
        "doi:10.1109/ISIE45552.2021.9576231"
    )

    def __init__(self, root: str | os.PathLike[str], category: str) -> None:
        home = find_category(root, category, "BTAD", _TRAIN)
        good = good_samples(home, "test/ok", "BTAD")
        bad = bad_samples(home, "test/ko", "ground_truth", "BTAD")
        super().__init__(f"btad_{home.name}", good_samples(home, _TRAIN, "BTAD"), good + bad)

    @staticmethod
    def categories(root: str | os.PathLike[str]) -> list[str]:
        """List the names of the products in ``root``: directories that have a ``train/ok``.

        Raises
        ------
        MissingPathError
            If ``root`` is not a directory.

        Examples
        --------
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "01", "train", "ok").mkdir(parents=True)
        ...     BTAD.categories(root)
        ['01']
        """
        return list_categories(root, "BTAD", _TRAIN)
