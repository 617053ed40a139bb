"""Results of a detector: scores, labels, heatmaps, and the regions that stand out in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from anomalib_lite._validation import check_number
from anomalib_lite.errors import InvalidValueError

__all__ = ["Detections", "Region", "outline_level"]

# Where no pixel of an anomalous image is above the threshold of the heatmaps, its region is around
# its highest pixel: what is above this share of it.
_SHARE_OF_PEAK = 0.9


@dataclass(frozen=True)
class Region:
    """One connected region of a heatmap that stands out.

    Attributes
    ----------
    box : (int, int, int, int)
        Left, top, right and bottom edge in pixels of the image; right and bottom are one past the
        last pixel, as Pillow and NumPy count.
    area : int
        Number of pixels.
    peak, mean : float
        Largest and mean value of the heatmap inside, in its units.
    peak_at : (int, int)
        Column and row of the largest value.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    mean: float
    peak_at: tuple[int, int]


@dataclass(frozen=True)
class Detections:
    """Results of a detector for each image, in the order in which the images were given.

    Attributes
    ----------
    scores : ndarray of shape (N,), float32
        Higher is more anomalous; raw units (a distance). NaN for an image that was skipped.
    labels : ndarray of shape (N,), bool
        True where the score exceeds ``threshold_``: anomalous. Also True for an image that was
        skipped, since nothing shows that it is good.
    maps : ndarray of shape (N, H, W), float32, or list of N arrays (H, W), or None
        Heatmaps at the images' own sizes, in the units of the scores; a list where sizes
        differ or an image was skipped (its entry is None). None if they were not asked for.
    names : list of str
        The image's path, or ``images[i]``.
    skipped : list of (int, str)
        Position and reason of every image left out; only with ``on_error="skip"``.
    p_values : ndarray of shape (N,), float64, or None
        How likely a normal image is to score as high as this one, in (0, 1], by the detector's
        ``calibration_scores_``; see :func:`~anomalib_lite.calibration.conformal_p_values`. NaN for
        an image that was skipped. None for a cascade or a router.
    pixel_threshold : float or None
        Value of the heatmaps above which a pixel stands out: the detector's ``pixel_threshold_``,
        in proportion to a ``threshold_`` of one's own. None if a file of an older version does not
        tell.
    """

    scores: np.ndarray
    labels: np.ndarray
    maps: Any
    names: list[str]
    skipped: list[tuple[int, str]] = field(default_factory=list)
    p_values: np.ndarray | None = field(default=None, kw_only=True)
    pixel_threshold: float | None = field(default=None, kw_only=True)

    def regions(self, threshold: float | None = None) -> list[list[Region]]:
        """List the connected regions of each image whose pixels stand out, the highest peak first.

        Parameters
        ----------
        threshold : float, optional
            Value of the heatmaps that the pixels exceed, in any image. By default those that
            overlays outline: above ``pixel_threshold``, in images called anomalous alone. An
            anomalous image always has one then: if no pixel is above, the region around its highest
            pixel (what is above nine tenths of it).

        Returns
        -------
        list of N lists of Region
            Pixels that touch by a side or a corner are connected. An image that was skipped or has
            no heatmap has no region.

        Raises
        ------
        InvalidValueError
            Without heatmaps, or if no threshold is known or it is no finite number.

        Examples
        --------
        >>> heatmaps = np.zeros((2, 40, 60), np.float32)
        >>> heatmaps[:, 10:20, 30:50] = 3
        >>> labels = np.array([True, False])
        >>> found = Detections(np.ones(2), labels, heatmaps, ["a", "b"], pixel_threshold=2.0)
        >>> found.regions()
        [[Region(box=(30, 10, 50, 20), area=200, peak=3.0, mean=3.0, peak_at=(30, 10))], []]
        """
        if self.maps is None:
            raise InvalidValueError("regions: there are no heatmaps. Call detect(..., maps=True).")
        level = self.pixel_threshold if threshold is None else threshold
        if level is None:
            raise InvalidValueError(
                "regions: the threshold of the heatmaps is not known: an older version saved this "
                "detector. Give regions(threshold=...), or fit again."
            )
        if threshold is not None:
            check_number("threshold", threshold, "regions", "(-inf, inf)")
        found: list[list[Region]] = []
        for heatmap, anomalous in zip(self.maps, self.labels, strict=True):
            if heatmap is None or (threshold is None and not anomalous):
                found.append([])
            else:
                own = level if threshold is not None else outline_level(heatmap, level)
                found.append(_regions(heatmap, heatmap > own))
        return found


def outline_level(heatmap: np.ndarray, pixel_threshold: float) -> float:
    """Return the level above which regions of an anomalous image are outlined.

    >>> outline_level(np.float32([[1, 3]]), 2.0), outline_level(np.float32([[1, 3]]), 4.0)
    (2.0, 2.7)
    """
    peak = float(heatmap.max())
    return pixel_threshold if peak > pixel_threshold else _SHARE_OF_PEAK * peak


def _regions(heatmap: np.ndarray, above: np.ndarray) -> list[Region]:
    numbers, _ = ndimage.label(above, structure=np.ones((3, 3)))
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), 1):
        part = np.where(numbers[rows, columns] == number, heatmap[rows, columns], np.nan)
        y, x = np.unravel_index(np.nanargmax(part), part.shape)
        found.append(
            Region(
                box=(columns.start, rows.start, columns.stop, rows.stop),
                area=int(np.count_nonzero(~np.isnan(part))),
                peak=float(part[y, x]),
                mean=float(np.nanmean(part, dtype=np.float64)),
                peak_at=(int(columns.start + x), int(rows.start + y)),
            )
        )
    return sorted(found, key=lambda region: -region.peak)
