"""What every layout shares: the record of one image, the train/test pair, and reading masks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.utils import check_random_state

from anomalib_lite._validation import IMAGE_SUFFIXES
from anomalib_lite.errors import (
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set: where it lies and what is known of it. Nothing is decoded.

    Parameters
    ----------
    path : Path
        The image file.
    label : int
        0 is normal, 1 is anomalous.
    kind : str
        What the image shows: ``"good"``, or the kind of defect.
    mask_path : Path or None, default=None
        The image of the ground truth mask; None where there is none.

    Examples
    --------
    >>> from pathlib import Path
    >>> sample = Sample(Path("tiles/test/good/007.png"), label=0, kind="good")
    >>> sample.path.name, sample.mask() is None
    ('007.png', True)
    """

    path: Path
    label: int
    kind: str
    mask_path: Path | None = None

    def mask(self) -> npt.NDArray[np.bool_] | None:
        """Load the ground truth: what the metrics take as a mask.

        Returns
        -------
        ndarray of shape (H, W), bool, or None
            True is anomalous. None for a normal image without a mask file: all of it is good.

        Raises
        ------
        MissingPathError
            If the image is anomalous and has no mask: taking it as all good would be wrong.
        """
        if self.mask_path is not None:
            return load_mask(self.mask_path)
        if self.label == 0:
            return None
        raise MissingPathError(
            f"Sample.mask: an anomalous image must have a mask file, got none for {self.path}. "
            "Without masks only the image metrics can be computed."
        )


class Dataset:
    """A named pair of training and test samples.

    Build one from your own lists of samples if no layout here fits your files.

    Parameters
    ----------
    name : str
        What tables and reports call it.
    train : iterable of Sample
        Normal images only.
    test : iterable of Sample
        Normal and anomalous images, none of them in ``train``.

    Attributes
    ----------
    name : str
    train, test : tuple of Sample
        Both can be handed to a detector as ``images``.

    Raises
    ------
    InvalidValueError
        If ``train`` is empty (only in a data set without normal images it is) or holds an
        anomalous image, or a file occurs twice.

    Examples
    --------
    >>> from pathlib import Path
    >>> train = [Sample(Path("a.png"), 0, "good"), Sample(Path("b.png"), 0, "good")]
    >>> test = [Sample(Path("c.png"), 0, "good"), Sample(Path("d.png"), 1, "scratch")]
    >>> Dataset("plates", train, test)
    Dataset('plates': 2 train, 2 test (1 good, 1 scratch), no masks)
    """

    # Whether this is a published data set without normal images. In any other an empty train is
    # a mistake, such as a pattern that matches no file, and is best told at once.
    _test_only = False

    def __init__(self, name: str, train: Iterable[Sample], test: Iterable[Sample]) -> None:
        self.name = name
        self.train = tuple(train)
        self.test = tuple(test)
        where = type(self).__name__
        if not self.train and not self._test_only:
            raise InvalidValueError(
                f"{where}: train must hold at least one normal image, got none."
            )
        for sample in self.train:
            if sample.label != 0:
                raise InvalidValueError(
                    f"{where}: train must hold normal images only, got {sample.path} "
                    f"of kind {sample.kind!r}."
                )
        files = Counter(os.path.abspath(s.path) for s in self.train + self.test)  # noqa: PTH100
        file, count = files.most_common(1)[0]
        if count > 1:
            raise InvalidValueError(
                f"{where}: every file must occur once, in train or in test, got {file} "
                f"{count} times. Check that no directory contains another."
            )

    @property
    def has_masks(self) -> bool:
        """Whether there are anomalous test images and every one of them has a mask."""
        masks = [s.mask_path is not None for s in self.test if s.label]
        return bool(masks) and all(masks)

    def __repr__(self) -> str:
        kinds = Counter(s.kind for s in self.test)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        return (
            f"{type(self).__name__}({self.name!r}: {len(self.train)} train, {len(self.test)} test"
            f"{f' ({counts})' if counts else ''}, {'masks' if self.has_masks else 'no masks'})"
        )


def load_mask(path: str | os.PathLike[str]) -> npt.NDArray[np.bool_]:
    """Read a ground truth mask from an image file.

    Parameters
    ----------
    path : str or PathLike
        An image of one or more channels, black where the part is good. Transparency is ignored.

    Returns
    -------
    ndarray of shape (H, W), bool
        True is anomalous.

    Raises
    ------
    MissingPathError
        If there is no such file.
    ImageError
        If the file cannot be decoded.

    Notes
    -----
    A pixel is anomalous above half of full scale, 127 of 255. Masks that once were JPEG files, or
    were resized, carry faint specks around every edge; with "non-zero" each speck would count as
    a defect region of its own. Masks that stay at or below half of full scale hold class indices
    (0, 1, 2, ...): there, every non-zero pixel is anomalous.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "mask.png")
    ...     Image.new("L", (4, 3), 255).save(path)
    ...     load_mask(path).shape
    (3, 4)
    """
    path = Path(path)
    if not path.is_file():
        raise MissingPathError(f"load_mask: path must be an image file, got {path}: no such file.")
    try:
        with Image.open(path) as image:
            # A palette's indices say nothing; its colours are what the annotator saw.
            values = np.asarray(image.convert("RGB") if image.mode in {"P", "PA"} else image)
            has_alpha = image.mode in {"LA", "RGBA"}
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"load_mask: {path} must be a readable image, got {error}. Export it again as PNG."
        ) from error
    if values.ndim == 3:
        values = values[..., :-1].max(-1) if has_alpha else values.max(-1)
    if values.dtype == np.bool_:
        return values.copy()
    half = 32767 if values.max() > 255 else 127
    return np.asarray(values > half if values.max() > half else values > 0)


def as_path(name: str, value: Any, where: str) -> Path:
    """Return ``value`` as a Path if it is a string or path-like."""
    if isinstance(value, str | os.PathLike):
        return Path(os.fspath(value)).expanduser()
    raise InvalidTypeError(f"{where}: {name} must be a path, got {type(value).__name__}.")


def check_directory(name: str, path: Path, where: str) -> Path:
    """Return ``path`` if it is a directory; otherwise name the first part that is missing."""
    if path.is_dir():
        return path
    if path.exists():
        raise MissingPathError(f"{where}: {name} must be a directory, got the file {path}.")
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    detail = "" if missing == path else f" (already {missing} is missing)"
    raise MissingPathError(
        f"{where}: {name} must be an existing directory, got {path}: no such directory{detail}."
    )


def subdirectories(directory: Path) -> list[Path]:
    """The visible directories in ``directory``, sorted by name."""
    found = (p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
    return sorted(found, key=lambda p: p.name)


def list_images(name: str, directory: Path, where: str, *, recursive: bool = False) -> list[Path]:
    """The image files in ``directory``, in an order that is the same on every machine."""
    check_directory(name, directory, where)
    found = [
        path
        for path in (directory.rglob("*") if recursive else directory.iterdir())
        # Hidden files are no images, even as "._007.png" that macOS leaves on shared drives.
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
        and path.is_file()
    ]
    if not found:
        raise MissingPathError(
            f"{where}: {name} must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}), "
            f"got none in {directory}."
        )
    return sorted(found, key=lambda path: path.relative_to(directory).as_posix())


def list_masks(name: str, directory: Path, where: str) -> dict[str, Path]:
    """The masks below ``directory`` by their relative path without suffix."""
    masks: dict[str, Path] = {}
    for path in list_images(name, directory, where, recursive=True):
        key = path.relative_to(directory).with_suffix("").as_posix()
        if key in masks:
            raise InvalidValueError(
                f"{where}: {name} must hold one mask for each image, got {masks[key]} and {path}. "
                "Keep one of them."
            )
        masks[key] = path
    return masks


def split_normal(
    paths: Sequence[Path], test_size: float, random_state: Any, where: str
) -> tuple[list[Path], list[Path]]:
    """Split ``paths`` at random into train and test, both in their former order."""
    n_test = round(test_size * len(paths))
    if test_size > 0 and len(paths) < 2:
        raise InvalidValueError(
            f"{where}: at least 2 normal images must be there to be split, got {len(paths)}. "
            "Add images, or pass test_size=0 to train on all of them."
        )
    n_test = min(max(n_test, 1 if test_size > 0 else 0), len(paths) - 1)
    try:
        # RandomState and not Generator: its streams are frozen, so a split outlives NumPy.
        order = check_random_state(random_state).permutation(len(paths))
    except ValueError as error:
        raise InvalidValueError(
            f"{where}: random_state must be an int, a RandomState or None, got {random_state!r}."
        ) from error
    held_out = set(order[:n_test].tolist())
    train = [path for index, path in enumerate(paths) if index not in held_out]
    return train, [path for index, path in enumerate(paths) if index in held_out]
