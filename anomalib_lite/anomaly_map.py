"""Patch scores (B, h, w) -> heatmaps at the images' own size, and one score per image."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.special import softmax

from anomalib_lite._threads import one_blas_thread
from anomalib_lite._validation import check_choice
from anomalib_lite.errors import InvalidValueError

__all__ = [
    "IMAGE_SCORES",
    "anomaly_maps",
    "check_image_score",
    "image_scores",
    "reweight",
    "standardize",
    "structure",
]

# Those without parameters, and two of the shares there can be.
IMAGE_SCORES = ("max", "smoothed", "top1%", "top1% pixels")
_SHARE = re.compile(r"top(\d*\.?\d+)%( pixels)?")
# Pixels are those of a map with so many on each side of a patch, smoothed by a Gaussian of half a
# patch: the heatmap at a stride of 8 and the default smoothing of 4.
_PIXELS_PER_PATCH = 8


def image_scores(
    patch_scores: np.ndarray, how: str, ignored: np.ndarray | None = None
) -> np.ndarray:
    """Compute one score per image from the scores of its patches.

    Parameters
    ----------
    patch_scores : array of shape (B, h, w), float32
        Scores of the patches of each image.
    how : {"max", "top<p>%", "top<p>% pixels", "smoothed"}
        The largest patch score; the mean of the largest p % of patch scores (of at least one), with
        p in (0, 100], for example ``"top1%"``; the same of the pixels of the map, which has 8 x 8
        of them a patch and is smoothed with a Gaussian of half a patch; or the largest patch score
        after smoothing with a Gaussian of one patch (reflecting at the borders). PatchCore's
        ``"reweighted"`` is ``"max"`` followed by :func:`reweight`; ``"structure"`` is
        :func:`structure` followed by :func:`standardize`.
    ignored : array of shape (B, h, w), bool, optional
        True for patches that have no effect on the score: a share is one of the other patches (or
        of their pixels), and smoothing averages over these alone. Some must be left in each image.

    Returns
    -------
    ndarray of shape (B,), float32

    Raises
    ------
    InvalidValueError
        If ``how`` is unknown, or its share is not in (0, 100].

    Notes
    -----
    AnomalyDINO averages patches, RAD and SubspaceAD average pixels. Interpolation and smoothing
    make a peak lower and wider, so pixels give a lower score to a single odd patch.

    Examples
    --------
    >>> import numpy as np
    >>> scores = np.arange(200, dtype=np.float32).reshape(1, 10, 20)
    >>> image_scores(scores, "top1%")
    array([198.5], dtype=float32)
    >>> bool(image_scores(scores, "top1% pixels")[0] < 198.5)
    True
    """
    check_image_score(how, "image_scores", name="how")
    share = _SHARE.fullmatch(how)
    smooth = _pixel_maps if share and share[2] else _smoothed if how == "smoothed" else None
    if smooth is not None and ignored is None:
        patch_scores = smooth(patch_scores)
    elif smooth is not None and ignored is not None:
        # Divided by the weight of the patches that count, so that the others are not zeros.
        weight = smooth((~ignored).astype(np.float32))
        total = smooth(np.where(ignored, np.float32(0), patch_scores))
        side = weight.shape[1] // ignored.shape[1]  # pixels a patch
        ignored = ignored.repeat(side, axis=1).repeat(side, axis=2)
        patch_scores = total / np.where(ignored, np.float32(1), weight)
    if share is not None:
        return _mean_of_top(patch_scores, float(share[1]) / 100, ignored)
    if ignored is not None:
        patch_scores = np.where(ignored, np.float32(-np.inf), patch_scores)
    return np.asarray(patch_scores.max(axis=(1, 2)))


def _pixel_maps(patch_scores: np.ndarray) -> np.ndarray:
    """Return maps (B, 8 h, 8 w), smoothed by a Gaussian of half a patch."""
    height, width = (_PIXELS_PER_PATCH * n for n in patch_scores.shape[1:])
    sizes = [(height, width)] * len(patch_scores)
    maps = anomaly_maps(patch_scores, (height, width), sizes, _PIXELS_PER_PATCH / 2)
    return np.stack(maps) if maps else np.empty((0, height, width), np.float32)


def _smoothed(patch_scores: np.ndarray) -> np.ndarray:
    """Return the maps (B, h, w), smoothed by a Gaussian of one patch."""
    rows = gaussian_filter1d(patch_scores, 1.0, axis=1)
    return np.asarray(gaussian_filter1d(rows, 1.0, axis=2))


def check_image_score(how: object, where: str, *more: str, name: str = "image_score") -> None:
    """Raise InvalidValueError unless :func:`image_scores` takes ``how``, or it is in ``more``."""
    share = _SHARE.fullmatch(how) if isinstance(how, str) else None
    if share is None:
        check_choice(name, how, (*IMAGE_SCORES, *more), where)
    elif not 0 < float(share[1]) <= 100:
        raise InvalidValueError(
            f"{where}: the share of {name} must be above 0 % and at most 100 %, got {how!r}."
        )


def _mean_of_top(maps: np.ndarray, share: float, ignored: np.ndarray | None = None) -> np.ndarray:
    """Return the mean (B,) of the largest share of each map (B, h, w), of at least one value."""
    if ignored is not None:  # each image has as many values as are left of it
        left = [m[~i][None, None] for m, i in zip(maps, ignored, strict=True)]
        return np.array([_mean_of_top(values, share)[0] for values in left], maps.dtype)
    rows = maps.reshape(len(maps), maps.shape[1] * maps.shape[2])
    n_top = max(1, round(rows.shape[1] * share))
    return np.asarray(np.partition(rows, -n_top, axis=1)[:, -n_top:].mean(axis=1))


def structure(patch_scores: np.ndarray, ignored: np.ndarray | None = None) -> np.ndarray:
    r"""Describe each map by its spread, its peak and its roughness.

    Parameters
    ----------
    patch_scores : array of shape (B, h, w), float32
        Scores of the patches of each image.
    ignored : array of shape (B, h, w), bool, optional
        True for patches that are left out, and with them each pair of neighbours that has one.
        Some must be left in each image.

    Returns
    -------
    ndarray of shape (B, 3), float32
        The standard deviation of all patch scores; the mean of the largest 1 % of them (at least
        one); and the total variation, the mean of :math:`|a - b|` over all pairs of neighbours.

    Raises
    ------
    ValueError
        For an array of another shape.

    Notes
    -----
    The three numbers of StructCore. It takes them of pixels; here they are of patches, which costs
    less and does not depend on how a map is smoothed.

    Examples
    --------
    >>> import numpy as np
    >>> structure(np.float32([[[0, 1], [0, 1]]]))
    array([[0.5, 1. , 0.5]], dtype=float32)
    """
    counts: np.ndarray | bool = True if ignored is None else ~ignored
    n_steps: np.ndarray | int = 0
    total = np.zeros(len(patch_scores), np.float32)
    for axis in (1, 2):
        steps = np.abs(np.diff(patch_scores, axis=axis))
        if isinstance(counts, np.ndarray):
            begins = np.arange(steps.shape[axis])
            both = counts.take(begins, axis) & counts.take(begins + 1, axis)
            steps = np.where(both, steps, np.float32(0))
            n_steps = n_steps + np.count_nonzero(both, axis=(1, 2))
        else:
            n_steps += steps.shape[1] * steps.shape[2]
        total += steps.sum(axis=(1, 2))
    spread = patch_scores.std(axis=(1, 2), where=counts)
    peak, roughness = _mean_of_top(patch_scores, 0.01, ignored), total / np.maximum(n_steps, 1)
    return np.stack([spread, peak, roughness], axis=1, dtype=np.float32)


def standardize(described: np.ndarray, statistics: np.ndarray) -> np.ndarray:
    r"""Compute how far the description of each map is from those of normal maps.

    Parameters
    ----------
    described : array of shape (B, 3), float32
        What :func:`structure` gives.
    statistics : array of shape (2, 3), float32
        Means and standard deviations of the description of normal maps.

    Returns
    -------
    ndarray of shape (B,), float32
        :math:`\sqrt{\sum_i ((d_i - \mu_i) / \sigma_i)^2}`, the Mahalanobis distance with a
        diagonal covariance, in standard deviations.

    Raises
    ------
    ValueError
        For arrays of other shapes.

    Examples
    --------
    >>> import numpy as np
    >>> standardize(np.float32([[3, 4, 0]]), np.float32([[0, 0, 0], [1, 1, 1]]))
    array([5.], dtype=float32)
    """
    mean, deviation = statistics
    smallest = np.maximum(1e-6 * np.abs(mean), np.finfo(np.float32).tiny)
    return np.asarray(np.linalg.norm((described - mean) / np.maximum(deviation, smallest), axis=1))


def reweight(scores: np.ndarray, distances: np.ndarray) -> np.ndarray:
    r"""Raise scores where the memory bank is sparse: Equation 7 of PatchCore.

    Parameters
    ----------
    scores : array of shape (B,), float32
        :math:`s^*`, the largest patch score of each image: the distance of its patch
        :math:`m^{test,*}` to the nearest bank point :math:`m^*`.
    distances : array of shape (B, b), float32
        Rooted distances of :math:`m^{test,*}` to the b bank points nearest to :math:`m^*`,
        :math:`m^*` itself first.

    Returns
    -------
    ndarray of shape (B,), float32

    Notes
    -----
    .. math:: s = \Bigl(1 - \frac{\exp \|m^{test,*} - m^*\|}
              {\sum_{m \in N_b(m^*)} \exp \|m^{test,*} - m\|}\Bigr) s^*

    Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022. As
    in the paper, the distances are rooted.

    Examples
    --------
    >>> import numpy as np
    >>> reweight(np.float32([2]), np.float32([[2, 2, 2, 2]]))
    array([1.5], dtype=float32)
    """
    weights = 1 - softmax(distances, axis=1)[:, 0]
    return np.asarray(weights * scores, dtype=np.float32)


def anomaly_maps(
    patch_scores: np.ndarray,
    input_size: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    smoothing: float,
) -> list[np.ndarray]:
    """Compute heatmaps at the images' own sizes.

    Parameters
    ----------
    patch_scores : array of shape (B, h, w), float32
        Scores of the patches of each image.
    input_size : (H, W)
        Size in pixels of the images in the backbone.
    sizes : sequence of B pairs (H, W)
        The images' own sizes in pixels.
    smoothing : float
        Standard deviation of the Gaussian, in pixels of ``input_size``; 0 for none.

    Returns
    -------
    list of B ndarrays of shape (H, W), float32

    Notes
    -----
    Patch scores are upsampled bilinearly to ``input_size``, smoothed there (reflecting at the
    borders), and resized bilinearly to the image's own size. Each step is linear and separable, so
    all three together are one matrix per side: ``A_H @ patch_scores @ A_W.T``. Positions are the
    centres of cells in all steps and nothing is cropped, so nothing is shifted.

    Examples
    --------
    >>> import numpy as np
    >>> maps = anomaly_maps(np.ones((1, 4, 6), np.float32), (32, 48), [(100, 150)], 4.0)
    >>> maps[0].shape, bool(np.allclose(maps[0], 1))
    ((100, 150), True)
    """
    height, width = patch_scores.shape[1:]
    with one_blas_thread():
        return [
            _resize_and_smooth(height, input_size[0], size[0], smoothing)
            @ scores
            @ _resize_and_smooth(width, input_size[1], size[1], smoothing).T
            for scores, size in zip(patch_scores, sizes, strict=True)
        ]


@lru_cache(maxsize=256)
def _resize_and_smooth(n_patches: int, n_input: int, n_output: int, smoothing: float) -> np.ndarray:
    """Return the matrix (n_output, n_patches) from patches to pixels along one side."""
    matrix = _smooth(n_patches, n_input, smoothing)
    if n_output != n_input:
        matrix = _resized(matrix, n_output)
    return np.ascontiguousarray(matrix, dtype=np.float32)


@lru_cache(maxsize=16)  # images of many sizes mostly have one size in the network
def _smooth(n_patches: int, n_input: int, smoothing: float) -> np.ndarray:
    """Return the matrix (n_input, n_patches) from patches to pixels of the input."""
    matrix = _resized(np.eye(n_patches), n_input)
    if smoothing > 0:
        matrix = gaussian_filter1d(matrix, smoothing, axis=0, mode="reflect")
    return matrix


def _resized(rows: np.ndarray, n: int) -> np.ndarray:
    """Resize (m, k) to (n, k) bilinearly; shrinking averages all covered rows."""
    scale = len(rows) / n
    reach = max(scale, 1.0)
    centers = (np.arange(n) + 0.5) * scale - 0.5
    first = np.floor(centers - reach).astype(np.int64) + 1
    covered = first[:, None] + np.arange(math.ceil(2 * reach))  # (n, few): rows with a weight
    weights = 1 - np.abs(covered - centers[:, None]) / reach
    weights[(weights < 0) | (covered < 0) | (covered >= len(rows))] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    taken = rows[covered.clip(0, len(rows) - 1)]  # (n, few, k)
    return np.asarray(weights[:, None, :] @ taken)[:, 0]
