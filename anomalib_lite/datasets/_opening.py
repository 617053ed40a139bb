"""A directory -> the data set in it, by its layout."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from anomalib_lite._validation import check_choice
from anomalib_lite.datasets import visa
from anomalib_lite.datasets._mvtec_layout import TRAIN, layout_of
from anomalib_lite.datasets.base import GOOD, Dataset
from anomalib_lite.datasets.btad import BTAD
from anomalib_lite.datasets.folder import Folder
from anomalib_lite.datasets.kolektor_sdd import KolektorSDD
from anomalib_lite.datasets.kolektor_sdd_2 import KolektorSDD2
from anomalib_lite.datasets.listing import LeftOut, as_path, check_directory, subdirectories
from anomalib_lite.datasets.magnetic_tile import FREE, MagneticTile
from anomalib_lite.datasets.mvtec_ad import MVTecAD
from anomalib_lite.datasets.mvtec_ad_2 import MVTecAD2
from anomalib_lite.datasets.mvtec_loco import MVTecLOCO
from anomalib_lite.datasets.neu_det import NEUDET
from anomalib_lite.datasets.real_iad import SPLIT, RealIAD
from anomalib_lite.errors import InvalidValueError, MissingPathError
from anomalib_lite.images import warn_left_out

__all__ = ["LAYOUTS", "open_dataset"]

_Path: TypeAlias = str | os.PathLike[str]
_Seed: TypeAlias = int | np.random.RandomState | None
_MASKS = ("ground_truth", "masks")  # directories that hold masks and no images


class _Layout(NamedTuple):
    """How one layout of published data is told from others, and opened."""

    sign: str  # what is there, in words
    fits: Callable[[Path], bool]
    open: Callable[[Path, _Seed], Dataset]


def _open_mvtec(home: Path, seed: _Seed) -> Dataset:
    of_family = {"MVTecAD2": MVTecAD2, "MVTecLOCO": MVTecLOCO}
    return of_family.get(layout_of(home) or "", MVTecAD)(home.parent, home.name)


def _open_real_iad(home: Path, seed: _Seed) -> Dataset:
    size = re.fullmatch(r"realiad_(\w+)", home.parent.name)
    if size is None:
        return RealIAD(home.parent, home.name)
    return RealIAD(home.parent.parent, home.name, size=size[1])


def _has(*places: str) -> Callable[[Path], bool]:
    return lambda home: all((home / place).is_dir() for place in places)


def _is_visa(home: Path) -> bool:
    return (home / "Data/Images").is_dir() and (home.parent / visa.SPLIT).is_file()


def _is_real_iad(home: Path) -> bool:
    root = home.parent.parent if home.parent.name.startswith("realiad_") else home.parent
    return _has("OK", "NG")(home) and (root / SPLIT).is_dir()


def _is_kolektor_sdd(home: Path) -> bool:
    return any(re.fullmatch(r"kos\d+", path.name) for path in subdirectories(home))


def _is_kolektor_sdd_2(home: Path) -> bool:
    return _has("train", "test")(home) and any((home / "test").glob("*_GT.*"))


def _is_neu_det(home: Path) -> bool:
    pairs = (("IMAGES", "ANNOTATIONS"), ("train/images", "train/annotations"))
    return any(_has(*pair)(home) for pair in pairs)


_PUBLISHED = {
    "mvtec": _Layout(TRAIN, _has(TRAIN), _open_mvtec),
    "visa": _Layout(
        f"Data/Images, with {visa.SPLIT} beside the object",
        _is_visa,
        lambda home, _: visa.VisA(home.parent, home.name),
    ),
    "btad": _Layout("train/ok", _has("train/ok"), lambda home, _: BTAD(home.parent, home.name)),
    "real_iad": _Layout(
        f"OK and NG, with {SPLIT} beside the part or one above", _is_real_iad, _open_real_iad
    ),
    "kolektor_sdd": _Layout(
        "kos01 and so on",
        _is_kolektor_sdd,
        lambda home, seed: KolektorSDD(home, random_state=seed),
    ),
    "kolektor_sdd_2": _Layout(
        "train and test with 10000_GT.png and so on",
        _is_kolektor_sdd_2,
        lambda home, _: KolektorSDD2(home),
    ),
    "magnetic_tile": _Layout(
        FREE, _has(FREE), lambda home, seed: MagneticTile(home, random_state=seed)
    ),
    "neu_det": _Layout(
        "IMAGES and ANNOTATIONS, or train/images and train/annotations",
        _is_neu_det,
        lambda home, _: NEUDET(home),
    ),
}
LAYOUTS = ("auto", "folder", *_PUBLISHED)


def open_dataset(
    root: _Path,
    layout: str = "auto",
    *,
    normal: _Path | None = None,
    anomalous: _Path | Iterable[_Path] | None = None,
    masks: _Path | None = None,
    test_size: float = 0.2,
    random_state: _Seed = 0,
    where: str = "open_dataset",
) -> Dataset:
    """Open the data set in a directory.

    Parameters
    ----------
    root : str or PathLike
        Directory of the data set. If it has categories, that of one category, such as
        ``mvtec/bottle`` or ``VisA/candle``.
    layout : str, default="auto"
        ``"folder"``: one subdirectory of normal images and any number of others, see
        :class:`Folder`. ``"mvtec"``: a category of MVTec AD, MVTec AD 2 or MVTec LOCO AD, or of any
        data in their layouts. ``"visa"``, ``"btad"``, ``"real_iad"``, ``"kolektor_sdd"``,
        ``"kolektor_sdd_2"``, ``"magnetic_tile"``, ``"neu_det"``: these data sets as published.
        ``"auto"``: that one of them whose directories are there; the result's ``layout`` says
        which.
    normal : str or PathLike, optional
        Directory of normal images; ``"good"`` by default. This parameter, ``anomalous``, ``masks``
        and ``test_size`` are for the folder layout alone, see :class:`Folder`.
    anomalous : str, PathLike or iterable of these, optional
        Directories of anomalous images. By default all but those of ``normal`` and ``masks``.
    masks : str or PathLike, optional
        Directory of ground truth masks. By default ``ground_truth`` or ``masks``, if there is
        one.
    test_size : float, default=0.2
        Share of the normal images that is kept for testing, in [0, 1).
    random_state : int, RandomState or None, default=0
        Seed of the split, where this library makes it: for the layouts ``"folder"``,
        ``"kolektor_sdd"`` and ``"magnetic_tile"``.
    where : str
        Caller, named in errors.

    Returns
    -------
    Dataset
        Of the class that reads the layout; ``layout`` is its name, never ``"auto"``.

    Raises
    ------
    MissingPathError
        If a directory is missing or holds no images, a mask is missing, or ``layout`` is
        ``"auto"`` and the directory has none of the layouts.
    InvalidValueError
        If directories are named, but the layout is not that of a folder; if ``layout`` is
        ``"auto"`` and the directory has several of the layouts; and for the reasons that the class
        of the layout gives.
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
    ...     ds = open_dataset(Path(root, "plates"))
    >>> ds
    Folder('plates': 1 train, 2 test (1 good, 1 dent), masks)
    >>> ds.layout
    'folder'
    """
    check_choice("layout", layout, LAYOUTS, where)
    home = check_directory("root", as_path("root", root, where), where)
    if home.name in ("", ".."):  # "." and ".." do not say the directory's own name
        home = home.resolve()
    named = any(value is not None for value in (normal, anomalous, masks))
    if layout == "auto":
        layout = _recognise(home, named, where)
    if layout == "folder":
        dataset: Dataset = _open_folder(
            home, normal, anomalous, masks, test_size, random_state, where
        )
    elif named:
        raise InvalidValueError(
            f"{where}: normal, anomalous and masks are for the folder layout, but {home} is read "
            f"in the layout {layout} ({_PUBLISHED[layout].sign}). Add layout='folder', or leave "
            "them out."
        )
    else:
        dataset = _PUBLISHED[layout].open(home, random_state)
    dataset.layout = layout
    return dataset


def _recognise(home: Path, named: bool, where: str) -> str:
    """Return the layout of a directory; raise if it has none or several."""
    found = [name for name, layout in _PUBLISHED.items() if layout.fits(home)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidValueError(
            f"{where}: {home} must have one layout, got the directories of {', '.join(found)}. "
            "Say which by layout, such as layout='folder'."
        )
    if named or (home / GOOD).is_dir():
        return "folder"
    inside = subdirectories(home)
    below = [path.name for path in inside if any(x.fits(path) for x in _PUBLISHED.values())]
    if below:
        raise MissingPathError(
            f"{where}: root must be one data set, got {home}, which holds {below}. "
            f"Pass one of them, such as {home / below[0]}."
        )
    known = "; ".join(f"{name} ({layout.sign})" for name, layout in _PUBLISHED.items())
    raise MissingPathError(
        f"{where}: root must be a directory in a known layout, got {home} with the directories "
        f"{[path.name for path in inside]}. Known are folder (good, and others of anomalous "
        f"images); {known}. If normal images are elsewhere, name their directory, such as "
        "normal='ok'."
    )


def _open_folder(
    home: Path,
    normal: _Path | None,
    anomalous: _Path | Iterable[_Path] | None,
    masks: _Path | None,
    test_size: float,
    random_state: _Seed,
    where: str,
) -> Folder:
    left_out: LeftOut = {}
    kinds = [directory.name for directory in subdirectories(home, left_out)]
    normal = GOOD if normal is None else normal
    if masks is None:
        masks = next((name for name in _MASKS if name in kinds), None)
    if anomalous is None:
        named = [as_path("normal", normal, where)]
        named += [] if masks is None else [as_path("masks", masks, where)]
        taken = {(home / path).resolve() for path in named}
        anomalous = [kind for kind in kinds if (home / kind).resolve() not in taken]
        warn_left_out(home, left_out, where)
    return Folder(
        home,
        normal=normal,
        anomalous=anomalous,
        masks=masks,
        test_size=test_size,
        random_state=random_state,
    )
