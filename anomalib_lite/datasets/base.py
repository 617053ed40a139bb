"""The record of one image, and a data set of training and test images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anomalib_lite.datasets.masks import load_mask
from anomalib_lite.errors import InvalidValueError, MissingPathError

__all__ = ["GOOD", "Dataset", "Sample"]

GOOD = "good"  # the usual kind of normal images, and name of their directory


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set: its file, its label and its mask. Nothing is decoded.

    Parameters
    ----------
    path : Path
        The image file.
    label : int
        0 is normal, 1 is anomalous.
    kind : str
        Kind of defect, or ``"good"``.
    mask_path : Path or None, default=None
        Image file of the ground truth mask, or directory of several; None if there is no mask.

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

    def mask(
        self, *, inverted: bool | None = None, ignore_255: bool | None = None
    ) -> npt.NDArray[np.bool_] | None:
        """Load the ground truth mask.

        Parameters
        ----------
        inverted : bool or None, default=None
            Whether the mask is black where the part is anomalous, see :func:`load_mask`.
        ignore_255 : bool or None, default=None
            Whether 255 belongs to neither class, see :func:`load_mask`.

        Returns
        -------
        ndarray of shape (H, W), bool, or None
            True is anomalous. None for a normal image without a mask file: all pixels are good.

        Raises
        ------
        MissingPathError
            If the image is anomalous and has no mask.
        ImageError, InvalidValueError
            For the reasons that :func:`load_mask` gives.
        """
        if self.mask_path is not None:
            return load_mask(self.mask_path, inverted=inverted, ignore_255=ignore_255)
        if self.label == 0:
            return None
        raise MissingPathError(
            f"Sample.mask: an anomalous image must have a mask file, got none for {self.path}. "
            "Without masks only the image metrics can be computed."
        )


class Dataset:
    """A data set: a name, training samples and test samples.

    Make one from your own lists of samples if no other class fits your files.

    Parameters
    ----------
    name : str
        Name in tables and reports.
    train : iterable of Sample
        Normal images only.
    test : iterable of Sample
        Normal and anomalous images, none of them in ``train``.

    Attributes
    ----------
    name : str
    train, test : tuple of Sample
        Both can be used as the ``images`` of a detector.
    layout : str or None
        Layout that :func:`open_dataset` took the directory for; None if it was not used.

    Raises
    ------
    InvalidValueError
        If ``train`` is empty (except in a published data set without normal images) or holds an
        anomalous image, or a file occurs twice, be it through a link.

    Examples
    --------
    >>> from pathlib import Path
    >>> train = [Sample(Path("a.png"), 0, "good"), Sample(Path("b.png"), 0, "good")]
    >>> test = [Sample(Path("c.png"), 0, "good"), Sample(Path("d.png"), 1, "scratch")]
    >>> Dataset("plates", train, test)
    Dataset('plates': 2 train, 2 test (1 good, 1 scratch), no masks)
    """

    # Whether this is a published data set without normal images. In any other, an empty train is a
    # mistake, such as a pattern that matches no file, and is reported at once.
    _test_only = False
    layout: str | None = None

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
        files = Counter(_real_paths(self.train + self.test))
        file, count = files.most_common(1)[0]
        if count > 1:
            raise InvalidValueError(
                f"{where}: every file must occur once, in train or in test, got {file} "
                f"{count} times. Check that no directory contains another, or links to it."
            )

    @property
    def has_masks(self) -> bool:
        """Whether there are anomalous test images and all of them have masks."""
        masks = [s.mask_path is not None for s in self.test if s.label]
        return bool(masks) and all(masks)

    def __repr__(self) -> str:
        kinds = Counter(s.kind for s in self.test)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        return (
            f"{type(self).__name__}({self.name!r}: {len(self.train)} train, {len(self.test)} test"
            f"{f' ({counts})' if counts else ''}, {'masks' if self.has_masks else 'no masks'})"
        )


def _real_paths(samples: Iterable[Sample]) -> Iterator[str]:
    """Yield the path of each image with all links resolved; each directory is looked up once."""
    directories: dict[str, str] = {}
    for sample in samples:
        directory, name = os.path.split(sample.path)
        if directory not in directories:
            directories[directory] = os.path.realpath(directory)
        path = os.path.join(directories[directory], name)  # noqa: PTH118 (a third of Path's time)
        yield os.path.realpath(path) if os.path.islink(path) else path  # noqa: PTH114
