"""KolektorSDD2: production items with scratches, spots and other defects of the surface."""

from __future__ import annotations

import os

from anomalib_lite.datasets._kolektor import labelled_by_masks
from anomalib_lite.datasets.base import Dataset
from anomalib_lite.datasets.listing import as_path, check_directory

__all__ = ["KolektorSDD2"]

_WHERE = "KolektorSDD2"


class KolektorSDD2(Dataset):
    """KolektorSDD2: 3,335 photographs of surfaces, colour, about 230 wide and 630 high.

    ::

        <root>/train/10000.png
                     10000_GT.png
               test/20000.png
                    20000_GT.png

    Parameters
    ----------
    root : str or PathLike
        Directory that holds ``train`` and ``test``.

    Attributes
    ----------
    name : str
        ``"kolektor_sdd_2"``.
    train : tuple of Sample
        The normal images of ``train``.
    test : tuple of Sample
        ``test``, sorted by path. Kinds are ``"good"`` and ``"defect"``.
    train_anomalous : tuple of Sample
        The anomalous images of ``train``: neither in ``train`` nor in ``test``.
    licence, source, citation : str
        Licence of the images (non-commercial), where they come from, and what to cite.

    Raises
    ------
    MissingPathError
        If a directory is missing or empty, or an image has no mask, or a mask no image.
    InvalidValueError
        If two masks belong to one image.
    InvalidTypeError
        If ``root`` is not a path.
    ImageError
        If a mask cannot be decoded.

    Notes
    -----
    The split is the published one. An image is anomalous if its mask is not all zero, so the masks
    are read here (not the images). A normal image has no ``mask_path``.

    References
    ----------
    Božič, Tabernik and Skočaj, "Mixed supervision for surface-defect detection: From weakly to
    fully supervised learning", Computers in Industry 129, 2021.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for place, defect in (("train/1", 0), ("train/2", 0), ("test/3", 0), ("test/4", 255)):
    ...         Path(root, place).parent.mkdir(exist_ok=True)
    ...         Image.new("RGB", (5, 12)).save(Path(root, f"{place}.png"))
    ...         Image.new("L", (5, 12), defect).save(Path(root, f"{place}_GT.png"))
    ...     KolektorSDD2(root)
    KolektorSDD2('kolektor_sdd_2': 2 train, 2 test (1 good, 1 defect), masks)
    """

    licence = "CC BY-NC-SA 4.0"
    source = "https://www.vicos.si/resources/kolektorsdd2"
    citation = (
        "Božič, Tabernik and Skočaj, Mixed supervision for surface-defect detection: From weakly "
        "to fully supervised learning, Computers in Industry 129, 2021, "
        "doi:10.1016/j.compind.2021.103459"
    )

    def __init__(self, root: str | os.PathLike[str]) -> None:
        home = check_directory("root", as_path("root", root, _WHERE), _WHERE)
        known, test = (labelled_by_masks(home / s, "_GT", _WHERE) for s in ("train", "test"))
        super().__init__("kolektor_sdd_2", [s for s in known if not s.label], test)
        self.train_anomalous = tuple(s for s in known if s.label)
