"""A directory -> the data set in it, by its layout."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

from anomalib_lite._validation import check_choice
from anomalib_lite.datasets._mvtec_layout import TRAIN
from anomalib_lite.datasets.base import Dataset
from anomalib_lite.datasets.folder import Folder
from anomalib_lite.datasets.listing import as_path, check_directory, subdirectories
from anomalib_lite.datasets.mvtec_ad import MVTecAD
from anomalib_lite.datasets.mvtec_ad_2 import MVTecAD2
from anomalib_lite.errors import InvalidValueError

__all__ = ["LAYOUTS", "open_dataset"]

LAYOUTS = ("auto", "folder", "mvtec")

_Path: TypeAlias = str | os.PathLike[str]
_MASKS = ("ground_truth", "masks")  # directories that hold masks and no images


def open_dataset(
    root: _Path,
    layout: str = "auto",
    *,
    normal: _Path | None = None,
    anomalous: _Path | Iterable[_Path] | None = None,
    masks: _Path | None = None,
    test_size: float = 0.2,
    random_state: int | np.random.RandomState | None = 0,
    where: str = "open_dataset",
) -> Dataset:
    """Open the data set in a directory.

    Parameters
    ----------
    root : str or PathLike
        One category of MVTec AD or MVTec AD 2 (with ``train/good``), or a directory with one
        subdirectory of normal images and any number of others.
    layout : {"auto", "folder", "mvtec"}, default="auto"
        ``"auto"`` is ``"mvtec"`` if there is a ``train/good``, else ``"folder"``.
    normal : str or PathLike, optional
        Directory of normal images; ``"good"`` by default. This parameter and those below are for
        the folder layout alone, see :class:`Folder`.
    anomalous : str, PathLike or iterable of these, optional
        Directories of anomalous images. By default all but those of ``normal`` and ``masks``.
    masks : str or PathLike, optional
        Directory of ground truth masks. By default ``ground_truth`` or ``masks``, if there is
        one.
    test_size : float, default=0.2
        Share of the normal images that is kept for testing, in [0, 1).
    random_state : int, RandomState or None, default=0
        Seed of the split.
    where : str
        Caller, named in errors.

    Returns
    -------
    MVTecAD, MVTecAD2 or Folder

    Raises
    ------
    MissingPathError
        If a directory is missing or holds no images, or a mask is missing.
    InvalidValueError
        If directories are named, but the layout is not that of a folder; and for the reasons that
        :class:`Folder` gives.
    InvalidTypeError
        If a path is not a path.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for place in ("good/0.png", "good/1.png", "dent/0.png", "masks/dent/0.png"):
    ...         path = Path(root, "plates", place)
    ...         path.parent.mkdir(parents=True, exist_ok=True)
    ...         Image.new("L", (6, 4)).save(path)
    ...     open_dataset(Path(root, "plates"))
    Folder('plates': 1 train, 2 test (1 good, 1 dent), masks)
    """
    check_choice("layout", layout, LAYOUTS, where)
    home = check_directory("root", as_path("root", root, where), where)
    if home.name in ("", ".."):  # "." and ".." do not say the directory's own name
        home = home.resolve()
    if layout == "auto":
        layout = "mvtec" if (home / TRAIN).is_dir() else "folder"
    if layout == "mvtec":
        if normal is not None or anomalous is not None or masks is not None:
            raise InvalidValueError(
                f"{where}: normal, anomalous and masks are for the folder layout, but {home} is "
                "read as MVTec AD's. Add layout='folder', or leave them out."
            )
        of_layout = MVTecAD2 if (home / "test_public").is_dir() else MVTecAD
        return of_layout(home.parent, home.name)
    kinds = [directory.name for directory in subdirectories(home)]
    normal = "good" if normal is None else normal
    if masks is None:
        masks = next((name for name in _MASKS if name in kinds), None)
    if anomalous is None:
        named = [as_path("normal", normal, where)]
        named += [] if masks is None else [as_path("masks", masks, where)]
        taken = {(home / path).resolve() for path in named}
        anomalous = [kind for kind in kinds if (home / kind).resolve() not in taken]
    return Folder(
        home,
        normal=normal,
        anomalous=anomalous,
        masks=masks,
        test_size=test_size,
        random_state=random_state,
    )
