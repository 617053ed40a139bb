"""Names of categories -> images to fit on and to test, drawn by a seed."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite._validation import closest
from anomalib_lite.datasets import ELPV, Dataset, MVTecAD, MVTecAD2, Sample, Textile, VisA
from anomalib_lite.errors import InvalidValueError, MissingPathError

__all__ = [
    "PAPERS",
    "Images",
    "category_names",
    "draw_images",
    "fingerprint",
    "open_category",
    "short_name",
]

# The papers of PIPED.
PAPERS = (
    *("PA_BDP01_TL", "PA_BFT01_TL", "PA_BRG01_RL", "PA_BRG02_RL", "PA_BRG03_TL", "PA_BTN01_RL"),
    *("PA_FLR01_TL", "PA_FLR02_TL", "PA_FVN01_TL", "PA_FVN02_RL", "PA_GLA01_TL", "PA_ZPB01_RL"),
)
_MVTEC_AD = (
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut"),
    *("pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper"),
)
_VISA = (
    *("candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2"),
    *("pcb1", "pcb2", "pcb3", "pcb4", "pipe_fryum"),
)
_MVTEC_AD_2 = (
    *("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts"),
)
# Data set -> its categories; those without have one, of the same name.
_KNOWN: dict[str, tuple[str, ...]] = {
    "mvtec_ad": _MVTEC_AD,
    "visa": _VISA,
    "mvtec_ad_2": _MVTEC_AD_2,
    "magnetic_tile": (),
    "piped": PAPERS,
    "elpv": ("mono", "poly"),
    "textile": (),
}
_ALL = tuple(
    f"{name}/{category}" if category else name
    for name, categories in _KNOWN.items()
    for category in categories or ("",)
)
# Directories of the data root that a data set may lie in.
_FOLDERS = {
    "mvtec_ad": ("mvtec_ad", "mvtec", "MVTec_AD", "mvtec_anomaly_detection"),
    "visa": ("visa", "VisA"),
    "mvtec_ad_2": ("mvtec_ad_2", "MVTec_AD_2", "mvtec2"),
    "piped": ("piped",),
}


@dataclass(frozen=True)
class Images:
    """Images of one category, drawn for one seed.

    Attributes
    ----------
    category : str
        Such as ``"mvtec_ad/bottle"``.
    train : list of Sample
        Normal images to fit on.
    test : list of Sample
        Normal and anomalous images; none is in ``train``.
    """

    category: str
    train: list[Sample]
    test: list[Sample]

    @property
    def dataset(self) -> str:
        """Name of the data set: the first half of the category."""
        return self.category.split("/")[0]


def category_names(patterns: Iterable[str]) -> list[str]:
    """List the categories that names and patterns stand for.

    Parameters
    ----------
    patterns : iterable of str
        Names of categories, such as ``"mvtec_ad/bottle"`` (15 categories), ``"visa/candle"`` (12),
        ``"mvtec_ad_2/can"`` (8), ``"magnetic_tile"``, ``"piped/PA_BDP01_TL"`` (12 papers),
        ``"elpv/mono"``, ``"elpv/poly"`` and ``"textile"``; or patterns, such as ``"visa/*"``.

    Returns
    -------
    list of str
        Each once, in the order in which they were asked for.

    Raises
    ------
    InvalidValueError
        If one stands for no category.

    Examples
    --------
    >>> category_names(["elpv/*", "textile"])
    ['elpv/mono', 'elpv/poly', 'textile']
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        found = fnmatch.filter(_ALL, pattern)
        if not found:
            raise InvalidValueError(
                f"studies: categories holds {pattern!r}, which is none.{closest(pattern, _ALL)} "
                f"Data sets: {', '.join(_KNOWN)}; all categories of one: 'visa/*'."
            )
        names |= dict.fromkeys(found)
    return list(names)


def short_name(category: str) -> str:
    """Return the name of a category in figures: without its data set, where that is clear.

    >>> [short_name(name) for name in ("visa/candle", "elpv/mono", "textile")]
    ['candle', 'elpv mono', 'textile']
    """
    dataset, _, part = category.partition("/")
    return f"{dataset} {part}".strip() if dataset in ("elpv", "textile") else part or dataset


def open_category(category: str, data_root: Path | None) -> Dataset:
    """Open a category; no image is decoded.

    Parameters
    ----------
    category : str
        As in :func:`category_names`.
    data_root : Path or None
        Directory that holds ``mvtec_ad``, ``visa``, ``mvtec_ad_2``, ``magnetic_tile`` and
        ``piped``, as far as they are there. ELPV and textile are Python packages.

    Returns
    -------
    Dataset

    Raises
    ------
    MissingPathError, MissingDependencyError
        If it is not on this machine; the message says why.

    Examples
    --------
    >>> open_category("visa/candle", None)
    Traceback (most recent call last):
    ...
    anomalib_lite.errors.MissingPathError: studies: visa needs the directory that holds it. Give ...
    """
    name, _, part = category.partition("/")
    if name == "elpv":
        return ELPV(part)
    if name == "textile":
        return Textile()
    if data_root is None:
        raise MissingPathError(
            f"studies: {name} needs the directory that holds it. Give --data-root, or set "
            "ANOMALIB_LITE_DATA."
        )
    if name == "magnetic_tile":
        return MVTecAD(data_root, name)
    folders = [data_root / folder for folder in _FOLDERS[name]]
    root = next((folder for folder in folders if folder.is_dir()), None)
    if root is None:
        raise MissingPathError(
            f"studies: {data_root} holds no {name}. Give the --data-root that holds "
            f"{' or '.join(_FOLDERS[name])}."
        )
    opened: dict[str, Callable[..., Dataset]] = {
        "mvtec_ad": MVTecAD,
        "visa": VisA,
        "mvtec_ad_2": MVTecAD2,
        "piped": _open_paper,
    }
    return opened[name](root, part)


def _open_paper(root: Path, name: str) -> Dataset:
    """Open a paper in MVTec AD's layout; one writes 01 in an image's name, 1 in its mask's."""
    home, masks = root / name, root / name / "ground_truth" / "defect"
    if not home.is_dir():
        raise MissingPathError(f"studies: {root} holds no {name}.")

    def images(place: str) -> list[Path]:
        return sorted((home / place).iterdir())

    train = [Sample(path, 0, "good") for path in images("train/good")]
    test = [Sample(path, 0, "good") for path in images("test/good")]
    for path in images("test/defect"):
        mask = masks / f"{path.stem}_mask.png"
        if not mask.exists():
            mask = masks / f"{path.stem.replace('_D_0', '_D_')}_mask.png"
        test.append(Sample(path, 1, "defect", mask))
    return Dataset(name, train, test)


def draw_images(
    dataset: Dataset, seed: int, max_train: int | None = None, max_test: int | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Draw images to fit on, and as many normal as anomalous ones to test.

    Parameters
    ----------
    dataset : Dataset
    seed : int
        Draws the images to fit on. Those to test are the same for every seed, so that seeds are
        compared on the same images.
    max_train, max_test : int, optional
        Most images of each; None for all, in the data set's order.

    Returns
    -------
    train, test : list of Sample
        ``test`` holds normal images first.

    Examples
    --------
    >>> normal = [Sample(Path(f"{i}.png"), 0, "good") for i in range(9)]
    >>> bad = [Sample(Path(f"b{i}.png"), 1, "dent") for i in range(3)]
    >>> train, test = draw_images(Dataset("plate", normal[:6], normal[6:] + bad), 0, 2, 4)
    >>> len(train), [sample.label for sample in test]
    (2, [0, 0, 1, 1])
    """
    train = _draw(dataset.train, max_train, seed)
    half = None if max_test is None else max_test // 2
    by_label = ([s for s in dataset.test if s.label == label] for label in (0, 1))
    return train, [sample for part in by_label for sample in _draw(part, half, 0)]


def _draw(samples: Sequence[Sample], n: int | None, seed: int) -> list[Sample]:
    if n is None:
        return list(samples)
    order = np.random.RandomState(seed).permutation(len(samples))[:n]
    return [samples[i] for i in order]


def fingerprint(samples: Iterable[Sample]) -> str:
    """Hash the content of images and masks, in their order."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(_hash_file(sample.path) + bytes([sample.label]))
        if sample.mask_path is not None and sample.mask_path.is_file():
            whole.update(_hash_file(sample.mask_path))
    return whole.hexdigest()[:16]


def _hash_file(path: Path) -> bytes:
    stat = path.stat()
    return _hash_once(path, stat.st_size, stat.st_mtime_ns)


@cache
def _hash_once(path: Path, *changes: Any) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
