"""Normal images -> images with synthetic defects, and exact masks of the changed pixels.

Three stages make three sorts of defects. *Texture*: a region looks like other material, as in
DRAEM [1]_. *Structural*: the surface is damaged by scratches, cracks, stains, pits and chips.
*Contextual*: normal material lies in the wrong place, as in CutPaste [2]_ and NSA [3]_.

References
----------
.. [1] Zavrtanik, Kristan, Skočaj, "DRAEM: A discriminatively trained reconstruction embedding for
   surface anomaly detection", ICCV 2021.
.. [2] Li, Sohn, Yoon, Pfister, "CutPaste: Self-supervised learning for anomaly detection and
   localization", CVPR 2021.
.. [3] Schlüter, Tan, Hou, Kainz, "Natural synthetic anomalies for self-supervised anomaly
   detection and localization", ECCV 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from scipy.ndimage import binary_closing, label
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state

from anomalib_lite._validation import check_choice, check_int, check_number, check_seed
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.images import ImageSource, to_uint8
from anomalib_lite.synthetic._defects import MAKERS, Place

__all__ = ["KINDS", "SyntheticAnomalies", "SyntheticAnomaly", "SyntheticSet"]

KINDS = {
    "texture": ("noise", "texture"),
    "structural": ("scratch", "crack", "stain", "pit", "chip"),
    "contextual": ("paste", "transplant"),
}

# Smallest change that counts: in gray levels, and as a share of the largest change.
_VISIBLE, _VISIBLE_SHARE = 3.0, 0.1


@dataclass(frozen=True)
class SyntheticAnomaly:
    """One normal image with one defect.

    Attributes
    ----------
    image : ndarray of shape (H, W, 3), uint8
        At the source image's own size, in [0, 255].
    mask : ndarray of shape (H, W), bool
        True exactly where ``image`` differs from its source; never empty.
    kind : str
        One of the kinds in :data:`KINDS`, such as ``"scratch"``.
    source : int
        Index of the normal image.
    """

    image: np.ndarray
    mask: np.ndarray
    kind: str
    source: int


@dataclass(frozen=True)
class SyntheticSet:
    """Several synthetic anomalies, as four lists of the same length.

    Attributes
    ----------
    images, masks, kinds, sources : list
        The attributes of each :class:`SyntheticAnomaly`.
    """

    images: list[np.ndarray]
    masks: list[np.ndarray]
    kinds: list[str]
    sources: list[int]


class SyntheticAnomalies(BaseEstimator):
    """Makes defects on normal images, with exact masks.

    Parameters
    ----------
    stages : sequence of {"texture", "structural", "contextual"}, or one of them
        Sorts of defects to make; they take turns, and so do the kinds of each in :data:`KINDS`.
        By default all three.
    severity : float or (low, high), default=(0.3, 1.0)
        Contrast of the defects, in (0, 1]; with a pair, each anomaly draws its own uniformly.
        At 1 they differ from their surroundings by 25 gray levels plus 1.5 of the standard
        deviations there (of at most 40 levels); at 0.3 they are faint.
    random_state : int, RandomState or None, default=None
        Seed. An int gives the same bits at each call, a RandomState goes on at each call, None
        takes numpy's global one.

    Notes
    -----
    Areas of spots are log-uniform between 0.02 % and 5 % of the image, and at least 6 pixels;
    noise and the image's border then change them. Lines are as long as four times the square root
    of such an area, and as wide as about 0.4 % of the image's side. Intensities follow the mean and
    deviation of the surroundings.

    Defects are centred on the object, not on the background: pixels that are locally flat (a
    standard deviation below 5 levels in 5 x 5 pixels) and within 12 levels of the border's median
    colour. If this leaves less than 2 % of the image, defects lie anywhere.

    Noise has the shapes of DRAEM (Perlin-like noise, thresholded), but colours of the image itself
    or of other normal images: no other data set is needed. Pieces for the contextual stage have
    such shapes too, not the rectangles of CutPaste. The Poisson blending of NSA is approximated by
    spreading the difference along the seam inwards.

    Examples
    --------
    >>> import numpy as np
    >>> normal = np.random.RandomState(0).randint(90, 150, (4, 64, 96, 3)).astype(np.uint8)
    >>> made = SyntheticAnomalies(random_state=0).generate(normal, 6)
    >>> made.kinds
    ['noise', 'scratch', 'paste', 'texture', 'crack', 'transplant']
    >>> changed = made.images[1] != normal[made.sources[1]]
    >>> bool((changed.any(axis=2) == made.masks[1]).all())
    True
    """

    def __init__(
        self,
        stages: Sequence[str] = ("texture", "structural", "contextual"),
        *,
        severity: float | tuple[float, float] = (0.3, 1.0),
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.stages = stages
        self.severity = severity
        self.random_state = random_state

    def generate(self, images: Any, n: int) -> SyntheticSet:
        """Make ``n`` anomalies.

        Parameters
        ----------
        images : directory, paths, arrays, PIL images, tensors or data set samples
            Normal images, as :class:`~anomalib_lite.images.ImageSource` takes them, of any
            sizes from 8 x 8 on. One is enough.
        n : int
            Number of anomalies, at least 1.

        Returns
        -------
        SyntheticSet

        Raises
        ------
        InvalidValueError
            For an unknown stage, a severity outside (0, 1], ``n`` below 1, or a bad seed.
        ImageError, MissingPathError, InvalidTypeError
            If there are no images, or one that is needed cannot be read.

        Examples
        --------
        >>> import numpy as np
        >>> made = SyntheticAnomalies("structural", random_state=0).generate(
        ...     np.full((40, 60), 128, np.uint8), 2
        ... )
        >>> made.images[0].shape, made.masks[0].shape, made.kinds, made.sources
        ((40, 60, 3), (40, 60), ['scratch', 'crack'], [0, 0])
        """
        made = list(self.iterate(images, n))
        return SyntheticSet(
            [a.image for a in made],
            [a.mask for a in made],
            [a.kind for a in made],
            [a.source for a in made],
        )

    def iterate(self, images: Any, n: int) -> Iterator[SyntheticAnomaly]:
        """Make the same ``n`` anomalies one after the other, each when it is asked for.

        Parameters and errors are those of :meth:`generate`; arguments are checked at once. At
        most two images are held at a time.

        Yields
        ------
        SyntheticAnomaly

        Examples
        --------
        >>> import numpy as np
        >>> normal = np.full((40, 60), 128, np.uint8)
        >>> for anomaly in SyntheticAnomalies("contextual", random_state=0).iterate(normal, 2):
        ...     print(anomaly.kind, anomaly.image.dtype, anomaly.mask.any())
        paste uint8 True
        transplant uint8 True
        """
        where = type(self).__name__
        check_int("n", n, where, low=1)
        kinds = _take_turns(self.stages, where)
        severity = _check_severity(self.severity, where)
        check_seed(self.random_state, where)
        source = ImageSource(images, where=where)
        random = check_random_state(self.random_state)
        seed = random.randint(2**32, size=4, dtype=np.uint64).tolist()
        return (_make(source, kinds, severity, seed, i) for i in range(n))

    def sources(self, images: Any, n: int, at_once: int) -> Iterator[ImageSource]:
        """Make the images of the same ``n`` anomalies, ``at_once`` in memory at a time.

        Parameters and errors are those of :meth:`generate`; arguments are checked at once.

        Yields
        ------
        ImageSource
            Up to ``at_once`` images.

        Examples
        --------
        >>> import numpy as np
        >>> made = SyntheticAnomalies(random_state=0)
        >>> [len(source) for source in made.sources(np.full((40, 60), 128, np.uint8), 5, 2)]
        [2, 2, 1]
        """
        check_int("at_once", at_once, type(self).__name__, low=1)
        where = images.where if isinstance(images, ImageSource) else type(self).__name__
        made = self.iterate(images, n)

        def batches() -> Iterator[ImageSource]:
            while some := [anomaly.image for anomaly in islice(made, at_once)]:
                yield ImageSource(some, where=where)

        return batches()


def _check_severity(severity: Any, where: str) -> tuple[float, float]:
    ends = severity if isinstance(severity, tuple | list) else (severity, severity)
    if len(ends) == 2:
        low, high = (check_number("severity", end, where, "(0, 1]") for end in ends)
        if low <= high:
            return low, high
    raise InvalidValueError(
        f"{where}: severity must be a number in (0, 1] or a pair (low, high) of such, "
        f"got {severity!r}."
    )


def _take_turns(stages: Any, where: str) -> list[str]:
    """Return the kinds in order: stage by stage, each with its next kind."""
    names = list(stages) if isinstance(stages, list | tuple) else [stages]
    if not names:
        raise InvalidValueError(f"{where}: stages is empty. Name at least one of {sorted(KINDS)}.")
    kinds = [KINDS[check_choice("stages", name, KINDS, where)] for name in names]
    n_turns = math.lcm(*map(len, kinds))
    return [k[turn % len(k)] for turn in range(n_turns) for k in kinds]


def _make(
    source: ImageSource,
    kinds: list[str],
    severity: tuple[float, float],
    seed: list[int],
    i: int,
) -> SyntheticAnomaly:
    # Each anomaly has a generator of its own, so it does not depend on how many are made.
    bits = np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(i,)))
    random = np.random.RandomState(bits)
    index = int(random.randint(len(source)))
    image = to_uint8(source[index])

    def donor() -> np.ndarray:
        """Return another normal image, or the only one."""
        if len(source) == 1:
            return image
        return to_uint8(source[(index + random.randint(1, len(source))) % len(source)])

    kind = kinds[i % len(kinds)]
    place = Place(random, image, kind, random.uniform(*severity), donor)
    changed, mask = _apply(image, place, MAKERS[kind](place))
    return SyntheticAnomaly(changed, mask, kind, index)


def _apply(image: np.ndarray, place: Place, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add a change (h, w, 3) or (h, w, 1), in gray levels, where it is visible: in the mask."""
    crop = place.crop
    if (crop == crop[..., :1]).all():  # gray stays gray
        change = change.mean(axis=2, keepdims=True)
    change = change * max(1.0, 1.5 * _VISIBLE / max(float(np.abs(change).max()), 1e-9))
    # Black cannot be darkened, nor white brightened; a change towards gray is always possible.
    for attempt in (change, -change, np.where(crop < 128, 1, -1) * np.abs(change)):
        changed = np.clip(np.rint(crop + attempt), 0, 255)
        size = np.abs(changed - crop).max(axis=2)
        seen = size >= max(_VISIBLE, _VISIBLE_SHARE * size.max())
        if seen.any():
            break
    seen = _without_specks(seen)
    # A pixel in the defect may be unchanged by chance: a change of one level makes the mask exact.
    same = seen & (changed == crop).all(axis=2)
    changed[same] += np.where(crop[same] < 128, 1, -1)
    result, mask = image.copy(), np.zeros(image.shape[:2], bool)
    mask[place.window] = seen
    result[mask] = changed[seen].astype(np.uint8)
    return result, mask


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Close gaps of up to four pixels, and drop regions below a fiftieth of the largest."""
    margin = 4
    padded = np.pad(mask, margin)
    closed = binary_closing(padded, np.ones((3, 3)), iterations=2)
    closed = closed[margin:-margin, margin:-margin] | mask
    labels, _ = label(closed, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray((sizes >= sizes.max() / 50)[labels] & closed)
