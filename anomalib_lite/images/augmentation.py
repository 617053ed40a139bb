"""Images to fit on -> the same and transformed copies of them, for fits on few images.

References
----------
.. [1] Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2",
   WACV 2025 (arXiv:2405.14529): 8 rotations.
.. [2] SuperADD: brightness between 0.8 and 1.2 times that of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from anomalib_lite.errors import InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.images.ignore_mask import IgnoreMask

__all__ = ["AUGMENTATIONS", "AugmentedSource", "check_augment", "n_versions", "refuse_augment"]

# Name -> the amounts of each copy: degrees counterclockwise; axes to reverse; factors.
AUGMENTATIONS: dict[str, tuple[float, ...]] = {
    "rotations": (45, 90, 135, 180, 225, 270, 315),
    "flips": (1, 0),
    "brightness": (0.8, 1.2),
}


def check_augment(augment: Any, where: str) -> None:
    """Raise InvalidValueError unless ``augment`` is None, a name in AUGMENTATIONS, or several."""
    kinds = [augment] if augment is None or isinstance(augment, str) else augment
    known = isinstance(kinds, list | tuple) and all(
        isinstance(kind, str) and kind in AUGMENTATIONS for kind in kinds
    )
    if augment is not None and not (known and 0 < len(kinds) == len(set(kinds))):
        raise InvalidValueError(
            f"{where}: augment must be None, one of {sorted(AUGMENTATIONS)}, or a tuple of these "
            f"without repetition, got {augment!r}."
        )


def refuse_augment(where: str, augment: Any) -> NoReturn:
    """Raise InvalidValueError for embeddings, of which there can be no copies."""
    raise InvalidValueError(
        f"{where}: augment={augment!r} needs images to transform, got embeddings. Call "
        "fit(images), or set augment=None."
    )


def n_versions(augment: Any) -> int:
    """Return how many images one becomes: itself and its copies.

    >>> n_versions(None), n_versions("rotations"), n_versions(("flips", "brightness"))
    (1, 8, 5)
    """
    return 1 + len(_changes(augment))


class AugmentedSource(ImageSource):
    """Images that are each followed by their copies, but for the last ones.

    Parameters
    ----------
    images : ImageSource
    augment : str or sequence of str
        Names in ``AUGMENTATIONS``. The copies of several are put after each other, and are not
        combined.
    n_held_back : int, default=0
        Number of images at the end that get no copies.

    Attributes
    ----------
    origins : ndarray of shape (n,), int64
        Position in ``images`` of what each image here was made of.
    n_versions : int
        Number of images here for each that gets copies.

    Notes
    -----
    A copy has the size of its image, and is made when it is needed, from the decoded image. What a
    rotation would leave empty in the corners is filled by reflection at the borders: black corners
    would be a kind of anomaly in the images to learn from. Pixels are interpolated bilinearly. The
    regions to ignore are transformed alike; any pixel to which one of them contributes is ignored.

    Pass ``list(source)`` where images are wanted: another source of the same files has no copies.

    Examples
    --------
    >>> image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    >>> once, mirrored, upside_down = AugmentedSource(ImageSource(image), "flips")
    >>> bool((mirrored == image[:, ::-1]).all()), bool((upside_down == image[::-1]).all())
    (True, True)
    """

    def __init__(self, images: ImageSource, augment: Any, n_held_back: int = 0) -> None:
        versions = [None, *_changes(augment)]
        n, n_copied = len(images), len(images) - n_held_back
        self.origins = np.concatenate(
            [np.repeat(np.arange(n_copied), len(versions)), np.arange(n_copied, n)]
        )
        vars(self).update(vars(images.take(self.origins)))
        self.changes = versions * n_copied + [None] * n_held_back
        self.n_versions, self._n_held_back = len(versions), n_held_back

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageSource:
        """Return the source of the images at these positions; they keep their names."""
        source = super().take(indices)
        assert isinstance(source, AugmentedSource)
        source.changes = [self.changes[i] for i in indices]
        return source

    def decode(self, index: int, *, gray: bool = False, size_alone: bool = False) -> Any:
        """Decode one image, and transform it if it is a copy; see :meth:`ImageSource.decode`."""
        found = super().decode(index, gray=gray, size_alone=size_alone)
        change = self.changes[index]
        # No copy has another shorter side than its image.
        return found if change is None or size_alone else change.of_image(found)

    def ignored_in(self, index: int) -> IgnoreMask | None:
        """Return the regions of one image to ignore."""
        ignored, change = super().ignored_in(index), self.changes[index]
        return ignored if ignored is None or change is None else _ChangedMask(ignored, change)

    def n_held_back(self, skipped: Sequence[tuple[int, str]]) -> int:
        """Return how many of the images without copies are left, if these were skipped."""
        first = len(self) - self._n_held_back
        n = self._n_held_back - sum(index >= first for index, _ in skipped)
        return max(0, min(n, len(self) - len(skipped) - 1))


@dataclass(frozen=True)
class _Change:
    """One way to transform an image."""

    kind: str
    amount: float

    def of_image(self, image: Any) -> Any:
        """Transform a PIL image of mode L or RGB, or a float32 array (H, W, 3) in [0, 1]."""
        is_pil = isinstance(image, Image.Image)
        pixels = np.asarray(image)
        if self.kind == "brightness":
            top = 255 if is_pil else 1
            bright = np.clip(pixels * np.float64(self.amount), 0, top)
            changed = np.rint(bright).astype(np.uint8) if is_pil else bright.astype(np.float32)
        elif self.kind == "flips":
            changed = np.ascontiguousarray(np.flip(pixels, int(self.amount)))
        else:
            changed = _rotated(pixels, self.amount)
        return Image.fromarray(changed) if is_pil else changed

    def of_mask(self, mask: np.ndarray) -> np.ndarray:
        """Transform the regions to ignore (H, W), bool."""
        if self.kind == "brightness":
            return mask
        return np.asarray(self.of_image(mask.astype(np.float32)[..., None])[..., 0] > 0)


class _ChangedMask(IgnoreMask):
    """The regions to ignore in a copy."""

    def __init__(self, original: IgnoreMask, change: _Change) -> None:
        super().__init__()
        self._original, self._change = original, change

    def of(self, size: tuple[int, int], where: str = "IgnoreMask") -> np.ndarray:
        """Return the mask (H, W), bool, of a copy of this size; see :meth:`IgnoreMask.of`."""
        return self._keep(tuple(size), lambda: self._change.of_mask(self._original.of(size, where)))


def _changes(augment: Any) -> list[_Change]:
    """Return how each copy of an image is made."""
    kinds = [] if augment is None else [augment] if isinstance(augment, str) else augment
    return [_Change(kind, amount) for kind in kinds for amount in AUGMENTATIONS[kind]]


def _rotated(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate pixels (H, W) or (H, W, C), uint8 or float32, counterclockwise about the centre."""
    height, width = pixels.shape[:2]
    sine, cosine = (abs(f(math.radians(degrees))) for f in (math.sin, math.cos))
    wanted = (width * sine + height * cosine, width * cosine + height * sine)
    margins = [
        max(0, math.ceil((reach - side) / 2 - 1e-9)) + 1
        for reach, side in zip(wanted, (height, width), strict=True)
    ]
    around = [(m, m) for m in margins] + [(0, 0)] * (pixels.ndim - 2)
    padded = np.pad(pixels, around, mode="symmetric")
    if padded.dtype == np.uint8:
        turned = _turn(padded, degrees)
    else:  # PIL turns floats one channel at a time
        turned = np.stack([_turn(padded[..., c], degrees) for c in range(padded.shape[2])], axis=-1)
    top, left = margins
    return np.ascontiguousarray(turned[top : top + height, left : left + width])


def _turn(pixels: np.ndarray, degrees: float) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).rotate(degrees, Image.Resampling.BILINEAR))
