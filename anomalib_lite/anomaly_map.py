"""Patch scores (B, h, w) -> heatmaps at the images' own size, and one score per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.special import softmax

from anomalib_lite._threads import one_blas_thread
from anomalib_lite._validation import check_choice

__all__ = ["IMAGE_SCORES", "anomaly_maps", "image_scores", "reweight"]

IMAGE_SCORES = ("max", "top1%", "smoothed")


def image_scores(patch_scores: np.ndarray, how: str) -> np.ndarray:
    """Compute one score per image from the scores of its patches.

    Parameters
    ----------
    patch_scores : array of shape (B, h, w), float32
        Scores of the patches of each image.
    how : {"max", "top1%", "smoothed"}
        The largest patch score; the mean of the largest 1 % of them (at least one); or the
        largest after smoothing with a Gaussian of one patch (reflecting at the borders).
        PatchCore's ``"reweighted"`` is ``"max"`` followed by :func:`reweight`.

    Returns
    -------
    ndarray of shape (B,), float32

    Raises
    ------
    InvalidValueError
        If ``how`` is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> image_scores(np.arange(200, dtype=np.float32).reshape(1, 10, 20), "top1%")
    array([198.5], dtype=float32)
    """
    check_choice("how", how, IMAGE_SCORES, "image_scores")
    if how == "smoothed":
        patch_scores = gaussian_filter1d(gaussian_filter1d(patch_scores, 1.0, axis=1), 1.0, axis=2)
    flat = patch_scores.reshape(len(patch_scores), -1)
    if how != "top1%":
        return np.asarray(flat.max(axis=1))
    n_top = max(1, round(flat.shape[1] / 100))
    return np.asarray(np.partition(flat, -n_top, axis=1)[:, -n_top:].mean(axis=1))


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
