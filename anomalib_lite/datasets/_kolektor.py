"""Layout of KolektorSDD and KolektorSDD2: every image has a mask beside it, which labels it."""

from __future__ import annotations

from pathlib import Path

from anomalib_lite.datasets.base import GOOD, Sample
from anomalib_lite.datasets.listing import list_images_and_masks
from anomalib_lite.datasets.masks import load_mask
from anomalib_lite.errors import MissingPathError

__all__ = ["labelled_by_masks"]


def labelled_by_masks(directory: Path, ending: str, where: str) -> list[Sample]:
    """List the images in ``directory``; one is anomalous if its mask is not all zero.

    ``ending`` is how the names of masks end.
    """
    samples = []
    for path, mask in list_images_and_masks(directory.name, directory, where):
        if mask is None:
            missing = "an image" if path.stem.endswith(ending) else "a mask"
            raise MissingPathError(
                f"{where}: {path} must have {missing} beside it, got none. Without both it is not "
                "known whether the part is good: add it, or remove this file."
            )
        # Published masks are as they should be, so how much they cover is no question.
        if load_mask(mask, inverted=False, ignore_255=False).any():
            samples.append(Sample(path, 1, "defect", mask))
        else:
            samples.append(Sample(path, 0, GOOD))
    return samples
