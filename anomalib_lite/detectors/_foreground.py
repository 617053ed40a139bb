"""Patches of normal images -> which patches of an image belong to the object, not its background.

References
----------
.. [1] Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2",
   WACV 2025 (arXiv:2405.14529): a mask from the first principal component.
.. [2] Otsu, "A Threshold Selection Method from Gray-Level Histograms", IEEE Transactions on
   Systems, Man, and Cybernetics 9, 1979.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation, binary_fill_holes

from anomalib_lite._validation import check_bool
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.fusion import unit_rows
from anomalib_lite.images.embeddings import Embeddings

__all__ = ["PatchSample", "check_foreground", "learn_foreground", "object_patches", "sample_bytes"]

# Images of which patches are kept to learn from, and patches of each, at most.
_IMAGES, _PATCHES = 32, 1024
# By how much more of the middle than of the border must lie on the object.
_LEAST_DIFFERENCE = 0.6
_BORDER, _MIDDLE = 1, 2
_MARGIN = 2  # outermost patches that nothing is learned from


def check_foreground(foreground: object, fusion: str, whiten: bool, where: str) -> None:
    """Raise InvalidValueError if the parameter cannot be used, or not with these others."""
    check_bool("foreground", foreground, where)
    if foreground and fusion == "per_layer":
        raise InvalidValueError(
            f"{where}: foreground=True needs one model, and fusion='per_layer' has one for each "
            "layer, which would differ on what is background. Set another fusion."
        )
    if foreground and whiten:
        raise InvalidValueError(
            f"{where}: foreground=True looks for the direction in which patches vary most, and "
            "whiten=True makes all directions vary alike. Set one of them."
        )


@dataclass(frozen=True)
class PatchSample:
    """Patches of the first images that were fitted on, and where they lie.

    Attributes
    ----------
    rows : ndarray of shape (m, D), float32
    places : ndarray of shape (m,), int8
        1 near the border of its image, 2 in the middle, 0 between. The outermost are left out.
    """

    rows: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, E: Embeddings, position: int, normalize: bool = False) -> PatchSample:
        """Take a sample of embeddings whose first image has this position among all."""
        length = E[0].shape[-1]
        rows, places = [np.empty((0, length), np.float32)], [np.empty(0, np.int8)]
        for grid in E[: max(0, _IMAGES - position)]:
            step = math.ceil(math.sqrt(grid.shape[0] * grid.shape[1] / _PATCHES))
            some, where = grid[::step, ::step], _places(grid.shape)[::step, ::step]
            seen = ~np.isnan(some[..., 0]) & (where >= 0)  # the others are ignored
            rows.append(some[seen])
            places.append(where[seen])
        together = np.concatenate(rows)
        return cls(unit_rows(together) if normalize else together, np.concatenate(places))

    def merged_with(self, other: PatchSample) -> PatchSample:
        """Return both, one after the other."""
        return PatchSample(
            np.concatenate([self.rows, other.rows]), np.concatenate([self.places, other.places])
        )


def sample_bytes(n_features: int) -> int:
    """Return the bytes that a sample takes at most, with the copies that learning from it makes."""
    return _IMAGES * _PATCHES * n_features * (4 + 4 + 8) + 3 * 8 * n_features**2


def learn_foreground(sample: PatchSample, where: str) -> np.ndarray:
    """Learn the direction in which patches of an object differ from those of its background.

    Parameters
    ----------
    sample : PatchSample
    where : str
        Caller, named in errors.

    Returns
    -------
    ndarray of shape (D + 1,), float32
        The first principal component v of the patches, of length 1; and the cut t. A patch x with
        ``v . x > t`` lies on the object.

    Raises
    ------
    InvalidValueError
        If the images show no object in their middle that differs from what is at their border.

    Notes
    -----
    The sign of v is the one with which patches in the middle half of the images have more than
    those at the border. The cut is Otsu's, over all patches of the sample: with shares a and b of
    them below and above, and means m and n, it has the largest :math:`a b (m - n)^2`. The object
    is clear if its share in the middle exceeds that at the border by 60 % of all or more.
    """
    rows, places = sample.rows, sample.places
    shares = (0.0, 0.0)
    if (places == _BORDER).any() and (places == _MIDDLE).any():
        centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
        component = np.linalg.eigh(centred.T @ centred)[1][:, -1].astype(np.float32)
        values = rows @ component
        if values[places == _MIDDLE].mean() < values[places == _BORDER].mean():
            component, values = -component, -values
        cut = _otsu(values)
        shares = (
            float((values[places == _MIDDLE] > cut).mean()),
            float((values[places == _BORDER] > cut).mean()),
        )
    if shares[0] - shares[1] < _LEAST_DIFFERENCE:
        raise InvalidValueError(
            f"{where}: foreground=True finds no object: {shares[0]:.0%} of the patches in the "
            f"middle of the images and {shares[1]:.0%} of those at the border lie on one side, "
            f"which must differ by {_LEAST_DIFFERENCE:.0%} or more. Set foreground=False, as for "
            "textures and for objects that fill the image or are not in its middle."
        )
    return np.append(component, np.float32(cut)).astype(np.float32)


def object_patches(E: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Return which patches lie on the object.

    Parameters
    ----------
    E : array of shape (B, h, w, D), float32
    foreground : array of shape (D + 1,), float32
        What :func:`learn_foreground` gave.

    Returns
    -------
    ndarray of shape (B, h, w), bool
        With holes filled, and one patch of surroundings: a defect may look like background, and
        it may lie at the edge.
    """
    masks = E @ foreground[:-1] > foreground[-1]
    square = np.ones((3, 3), bool)
    for i, mask in enumerate(masks):
        masks[i] = binary_dilation(binary_fill_holes(mask), square)
    return np.asarray(masks)


def _places(shape: tuple[int, ...]) -> np.ndarray:
    """Say of each patch (h, w) of a grid whether it is at the border (1) or in the middle half (2).

    The outermost patches are -1: a network fills the surroundings of an image with zeros, so these
    differ from all others whatever they show.
    """
    places = np.zeros(shape[:2], np.int8)
    away, ring = [], []
    for axis, n in enumerate(shape[:2]):
        line = np.arange(n)
        nearest = np.minimum(line, n - 1 - line)  # distance from the nearer side
        margin = max(_MARGIN, n // 16)
        side = np.digitize(nearest, [margin, margin + max(1, n // 16)])
        away.append(np.expand_dims(side, 1 - axis))
        ring.append(np.expand_dims(np.abs(2 * line + 1 - n) <= n / 2, 1 - axis))
    depth = np.minimum(*away)  # 0: outermost, 1: border, 2: further inside
    places[(depth == 2) & ring[0] & ring[1]] = _MIDDLE
    places[depth == 1] = _BORDER
    places[depth == 0] = -1
    return places


def _otsu(values: np.ndarray) -> float:
    """Return the cut between values (n,) with the largest variance between both sides."""
    ordered = np.sort(values.astype(np.float64))
    n, below = len(ordered), np.arange(1, len(ordered))
    total = np.cumsum(ordered)
    means = total[:-1] / below, (total[-1] - total[:-1]) / (n - below)
    between = below * (n - below) * (means[0] - means[1]) ** 2
    best = int(between.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)
