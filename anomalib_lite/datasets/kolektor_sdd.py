"""KolektorSDD: commutators, split by physical part."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from anomalib_lite._validation import check_number
from anomalib_lite.datasets._kolektor import labelled_by_masks
from anomalib_lite.datasets.base import Dataset
from anomalib_lite.datasets.listing import (
    as_path,
    check_directory,
    split_normal,
    subdirectories,
)
from anomalib_lite.errors import InvalidValueError, MissingPathError

__all__ = ["KolektorSDD"]

_PART = re.compile(r"kos\d+")
_LABEL = "_label"


class KolektorSDD(Dataset):
    """KolektorSDD: 399 photographs of 50 commutators, gray, 500 wide and about 1,250 high.

    ::

        <root>/kos01/Part0.jpg
                     Part0_label.bmp

    Each ``kosNN`` is one physical part, photographed all around. Parts are split, not images, as in
    the data set's paper: no part is both in training and in test.

    Parameters
    ----------
    root : str or PathLike
        Directory that holds ``kos01``, ``kos02`` and so on.
    test_size : float, default=1/3
        Share of the parts that is kept for testing, in (0, 1); at least one. The paper has three
        folds, hence the default.
    random_state : int, RandomState or None, default=0
        Seed of the split. The same number gives the same split on every machine.

    Attributes
    ----------
    name : str
        ``"kolektor_sdd"``.
    train : tuple of Sample
        The normal images of the parts for training.
    test : tuple of Sample
        All images of the other parts. Kinds are ``"good"`` and ``"defect"``.
    train_anomalous : tuple of Sample
        The anomalous images of the parts for training: neither in ``train`` nor in ``test``.
    licence, source, citation : str
        Licence of the images (non-commercial), where they come from, and what to cite.

    Raises
    ------
    MissingPathError
        If a directory is missing or empty, or an image has no mask, or a mask no image.
    InvalidValueError
        If there is only one part, ``test_size`` or ``random_state`` is outside of what is allowed,
        two masks belong to one image, or the parts for training hold no normal image.
    InvalidTypeError
        If ``root`` is not a path.
    ImageError
        If a mask cannot be decoded.

    Notes
    -----
    An image is anomalous if its mask is not all zero, so the masks are read here (not the images).
    A normal image has no ``mask_path``.

    Almost every part has one anomalous image. Those of the parts for training are not in ``test``:
    the detector knows these parts, and differences between parts would change the result as much
    as defects do. They are in ``train_anomalous``. To test on all parts, average over several
    values of ``random_state``.

    The authors also offer rectangles instead of masks, in the same layout; pixel metrics depend on
    which of them you use. Their code leaves out ``kos21/Part7``; this class does not.

    References
    ----------
    Tabernik, Šela, Skvarč and Skočaj, "Segmentation-based deep-learning approach for
    surface-defect detection", Journal of Intelligent Manufacturing 31(3), 2020.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for part in ("kos01", "kos02", "kos03"):
    ...         Path(root, part).mkdir()
    ...         for i in range(4):
    ...             Image.new("L", (5, 12)).save(Path(root, part, f"Part{i}.jpg"))
    ...             label = Image.new("L", (5, 12), 255 if i == 3 else 0)
    ...             label.save(Path(root, part, f"Part{i}_label.bmp"))
    ...     ds = KolektorSDD(root)
    >>> ds
    KolektorSDD('kolektor_sdd': 6 train, 4 test (3 good, 1 defect), masks)
    >>> len(ds.train_anomalous)
    2
    """

    licence = "CC BY-NC-SA 4.0"
    source = "https://www.vicos.si/resources/kolektorsdd"
    citation = (
        "Tabernik, Šela, Skvarč and Skočaj, Segmentation-based deep-learning approach for "
        "surface-defect detection, Journal of Intelligent Manufacturing 31(3), 2020, "
        "doi:10.1007/s10845-019-01476-x"
    )

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        test_size: float = 1 / 3,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        where = "KolektorSDD"
        home = check_directory("root", as_path("root", root, where), where)
        share = check_number("test_size", test_size, where, "(0, 1)")
        train_parts, test_parts = split_normal(_find_parts(home), share, random_state, where)
        known = [
            sample for part in train_parts for sample in labelled_by_masks(part, _LABEL, where)
        ]
        test = [sample for part in test_parts for sample in labelled_by_masks(part, _LABEL, where)]
        super().__init__("kolektor_sdd", [s for s in known if not s.label], test)
        self.train_anomalous = tuple(s for s in known if s.label)


def _find_parts(home: Path) -> list[Path]:
    directories = subdirectories(home)
    parts = [path for path in directories if _PART.fullmatch(path.name)]
    if not parts:
        raise MissingPathError(
            "KolektorSDD: root must hold directories kos01, kos02 and so on, got "
            f"{[path.name for path in directories]} in {home}. Pass the directory right above them."
        )
    if len(parts) < 2:
        raise InvalidValueError(
            "KolektorSDD: at least 2 parts must be there to be split, got "
            f"{parts[0].name} alone in {home}. Add the others."
        )
    return parts
