"""Images that are not new: copies, near copies, and further photographs of the same part.

:func:`find_copies` gives each image the number of its group. No network, no label and no file name
is used: only pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from anomalib_lite._validation import check_choice, check_int, check_number
from anomalib_lite.errors import AnomalibLiteError
from anomalib_lite.images import ImageSource

__all__ = ["STRICTNESS", "Copies", "copies_in", "find_copies"]

STRICTNESS = 8.0  # standard deviations, see find_copies
_SIDE = 64  # of a thumbnail, in pixels
_SIGMA = 3.0  # of the high-pass, in pixels of the thumbnail
_SHIFT = 3  # largest shift between two thumbnails, in their pixels
_COARSE = 2  # coarse thumbnails, which propose pairs, are smaller by this factor
_COARSE_SHIFT = 1
_NEIGHBORS = 12  # pairs that are proposed for each image
_BLOCK = 512  # rows in a block of correlations
_DECODERS = 4
# Logarithms of aspect ratios of one part differ by less: crops of one tile differ by some percent.
_ASPECT = 0.15
# Coarse thumbnails above these are one image where the typical pair is estimated, and one kind of
# image where the mean is. Photographs that were compressed or made brighter reach 0.993, different
# solar cells of one module 0.98.
_ALIKE, _KIND = 0.99, 0.9
# Thumbnails above this are copies, also where all images look alike; solar cells reach 0.99. Those
# that may be are looked for among the pairs above _MAYBE.
_SAME, _MAYBE = 0.995, 0.8
# Different images from which "typical" has a meaning; below, _SURE decides alone.
_FEW = 10
_SURE = 0.9
# Never joined below this, however different all others are.
_FLOOR = 0.4
_REFERENCES = 128  # images of which all pairs are compared, to see what is typical
# For a normal distribution: the standard deviations from the median to the quantile 0.8.
_QUANTILE, _DEVIATIONS = 0.8, 0.8416
_TINY = 1e-6  # instead of the length of a plain thumbnail


@dataclass(frozen=True, eq=False)
class Copies:
    """Groups of images that show the same.

    Attributes
    ----------
    groups : ndarray of shape (N,), int64
        Group of each image, numbered from 0 by first appearance.
    exact : ndarray of shape (N,), bool
        Whether the image has exactly the pixels of an earlier one.
    names : tuple of str
        Name of each image: its path, or its place in the input.
    threshold : float
        Correlation in [0, 1] above which two images were joined, after what all share was
        subtracted.
    """

    groups: np.ndarray
    exact: np.ndarray
    names: tuple[str, ...]
    threshold: float

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def n_groups(self) -> int:
        """Number of groups; an image that is like no other is a group of its own."""
        return int(self.groups.max()) + 1

    def largest(self, n: int = 5) -> list[np.ndarray]:
        """Return the largest groups of at least two images, the largest first.

        Parameters
        ----------
        n : int, default=5
            At most so many groups, at least 1.

        Returns
        -------
        list of ndarrays of shape (M,), int64
            Indices of the images of each group, in order. Of equal groups the one that appears
            first comes first.

        Raises
        ------
        InvalidValueError, InvalidTypeError
            If ``n`` is not an int of at least 1.

        Examples
        --------
        >>> groups = np.array([0, 1, 2, 1, 2, 1])
        >>> copies = Copies(groups, np.zeros(6, bool), tuple("abcdef"), 0.5)
        >>> copies.largest()
        [array([1, 3, 5]), array([2, 4])]
        """
        check_int("n", n, "Copies.largest", low=1)
        sizes = np.bincount(self.groups)
        order = np.argsort(-sizes, kind="stable")[:n]
        return [np.flatnonzero(self.groups == group) for group in order if sizes[group] > 1]


def find_copies(
    images: Any,
    *,
    strictness: float = STRICTNESS,
    max_pixels: int = 100_000_000,
    on_error: str = "raise",
) -> Copies:
    r"""Find images that are copies of each other, near copies, or photographs of the same part.

    Parameters
    ----------
    images : images
        Anything that :class:`~anomalib_lite.images.ImageSource` takes.
    strictness : float, default=8
        Standard deviations by which two images must be more alike than images of this set
        typically are; above 0. More joins fewer images.
    max_pixels : int, default=100_000_000
        Largest number of pixels of an image.
    on_error : {"raise", "skip"}, default="raise"
        What happens with an image that cannot be used; ``"skip"`` makes it a group of its own.

    Returns
    -------
    Copies
        Groups, exact copies and names.

    Raises
    ------
    AnomalibLiteError
        If there is no image, one cannot be used (unless ``on_error="skip"``), or a parameter is out
        of range.

    Notes
    -----
    1. Images are exact copies if the SHA-256 of their decoded pixels is the same: whatever their
       file's name, date or lossless format is. Only one of them goes on.
    2. Each image becomes a gray thumbnail of 64 x 64 pixels, :math:`t`, without brightness and
       contrast: with a Gaussian mean :math:`G` of 3 pixels,
       :math:`h = t - G t`, divided by :math:`\sqrt{G h^2}`.
    3. What all thumbnails of one aspect ratio share, their mean, is subtracted: bus bars of solar
       cells, the light of the camera. Images that are alike count once in it.
    4. The similarity :math:`r` of two images is the largest normalised cross-correlation over
       shifts of up to 3 pixels of the thumbnail, and over mirror images. For each image it is
       computed for the 12 images of nearly the same aspect ratio that are the nearest by smaller
       thumbnails.
    5. Two images are joined if :math:`\operatorname{artanh} r` (Fisher's transformation) is above
       the median over pairs of different images by ``strictness`` standard deviations, and r above
       0.4. The deviation comes from the median and the quantile 0.8, which pairs of one
       part hardly change. With fewer than 10 different images nothing is typical, step 3 is left
       out, and r must be above 0.9. Two images whose r without step 3 is above 0.995 are always
       joined.
    6. Groups are the connected components.

    All images are decoded once. An image takes some 80 KB; correlations are computed in blocks of
    512 rows. The time grows with the square of the number of images that are not exact copies.

    References
    ----------
    Lewis, "Fast Normalized Cross-Correlation", Vision Interface 1995. Fisher, "On the 'Probable
    Error' of a Coefficient of Correlation Deduced from a Small Sample", Metron 1, 1921.

    Examples
    --------
    >>> from skimage import data
    >>> brick = data.brick()
    >>> tiles = [brick[y : y + 96, x : x + 128] for y in (0, 130, 260, 390) for x in (9, 180, 350)]
    >>> copies = find_copies([*tiles, tiles[3], tiles[5][:, ::-1]])
    >>> copies.groups
    array([ 0,  1,  2,  3,  4,  5,  6,  7,  8,  9, 10, 11,  3,  5])
    >>> np.flatnonzero(copies.exact)
    array([12])
    """
    where = "find_copies"
    strictness = check_number("strictness", strictness, where, "(0, inf)")
    max_pixels = check_int("max_pixels", max_pixels, where, low=1)
    check_choice("on_error", on_error, ("raise", "skip"), where)
    source = ImageSource(images, max_pixels=max_pixels, where=where)
    return copies_in(source, strictness, on_error)


def copies_in(source: ImageSource, strictness: float, on_error: str) -> Copies:
    """Find copies as :func:`find_copies` does, in images that are listed already."""
    thumbs, aspects, distinct, of = _read(source, on_error)
    if not len(thumbs):
        return Copies(np.arange(len(source)), np.zeros(len(source), bool), tuple(source.names), 1.0)
    pairs, threshold = _similar_pairs(thumbs, aspects, strictness)
    n = len(thumbs)
    edges = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    n_labels, labels = connected_components(edges, directed=False)
    exact = of >= 0
    exact[distinct] = False
    groups = np.where(of >= 0, labels[of], n_labels + np.arange(len(of)))
    return Copies(_by_appearance(groups), exact, tuple(source.names), threshold)


def _read(
    source: ImageSource, on_error: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return thumbnails and log aspect ratios of all distinct images, their index, and whose.

    The last says of each image which of the distinct ones it is; -1 if it cannot be used.
    """

    def look(index: int) -> tuple[bytes, np.ndarray, float] | None:
        try:
            pixels = source[index]
        except AnomalibLiteError:
            if on_error == "skip":
                return None
            raise
        height, width = pixels.shape[:2]
        digest = hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode())
        digest.update(pixels.tobytes())
        return digest.digest(), _thumbnail(pixels), float(np.log(height / width))

    seen: dict[bytes, int] = {}
    thumbs, aspects, distinct, of = [], [], [], []
    with ThreadPoolExecutor(_DECODERS, "copies") as executor:
        # In blocks, so that an image that cannot be read ends the work soon.
        for start in range(0, len(source), _BLOCK):
            block = range(start, min(start + _BLOCK, len(source)))
            for index, looked_at in zip(block, executor.map(look, block), strict=True):
                if looked_at is None:
                    of.append(-1)
                    continue
                digest, thumb, aspect = looked_at
                if digest not in seen:
                    seen[digest] = len(seen)
                    thumbs.append(thumb)
                    aspects.append(aspect)
                    distinct.append(index)
                of.append(seen[digest])
    stacked = np.stack(thumbs) if thumbs else np.empty((0, _SIDE, _SIDE), np.float32)
    return stacked, np.array(aspects), np.array(distinct), np.array(of)


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return the details of an image (H, W, 3), without brightness and contrast: (64, 64)."""
    gray = pixels.mean(axis=2, dtype=np.float32)
    if pixels.dtype != np.uint8:
        gray *= 255
    resized = Image.fromarray(gray).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    small = np.asarray(resized, dtype=np.float32)
    high = small - gaussian_filter(small, _SIGMA, mode="nearest")
    local = np.sqrt(gaussian_filter(high**2, _SIGMA, mode="nearest"))
    # Where an image is plain there is nothing but noise, which is not to be amplified.
    least = 0.1 * float(high.std()) + 1e-3
    return np.asarray(high / (local + np.float32(least)))


def _similar_pairs(
    thumbs: np.ndarray, aspects: np.ndarray, strictness: float
) -> tuple[np.ndarray, float]:
    """Return the pairs (P, 2) of images that are joined, and the correlation they exceed."""
    n = len(thumbs)
    alike = _coarse_pairs(thumbs, aspects, mirrored=False)
    different = _different(n, alike[0][alike[1] > _ALIKE])
    typical = _without_mean(thumbs, aspects, _different(n, alike[0][alike[1] > _KIND]))
    pairs, _ = _coarse_pairs(typical, aspects, mirrored=True)
    threshold = _threshold(typical[different], aspects[different], strictness)
    found = np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        values = _correlations_of_pairs(typical, block)
        joined = values > threshold
        maybe = ~joined & (values > _MAYBE)
        joined[maybe] = _correlations_of_pairs(thumbs, block[maybe]) > _SAME
        found[start : start + _BLOCK] = joined
    return pairs[found], threshold


def _different(n: int, pairs: np.ndarray) -> np.ndarray:
    """Choose images so that no two of them are a pair: those that come first, in order."""
    partners: dict[int, list[int]] = {}
    for i, j in pairs.tolist():
        partners.setdefault(i, []).append(j)
        partners.setdefault(j, []).append(i)
    chosen = np.ones(n, dtype=bool)
    for i in range(n):
        if chosen[i]:
            chosen[[j for j in partners.get(i, []) if j > i]] = False
    return np.flatnonzero(chosen)


def _without_mean(thumbs: np.ndarray, aspects: np.ndarray, different: np.ndarray) -> np.ndarray:
    """Subtract from thumbnails what the different ones of their aspect ratio have in common."""
    typical = thumbs / np.maximum(np.linalg.norm(thumbs, axis=(1, 2), keepdims=True), _TINY)
    kinds = np.round(aspects / _ASPECT).astype(np.int64)
    for kind in np.unique(kinds):
        members = different[kinds[different] == kind]
        if len(members) >= _FEW:
            typical[kinds == kind] -= typical[members].mean(axis=0)
    return np.asarray(typical)


def _threshold(thumbs: np.ndarray, aspects: np.ndarray, strictness: float) -> float:
    """Return the correlation that pairs of different images do not reach."""
    if len(thumbs) < _FEW:
        return _SURE
    steps = np.unique(np.linspace(0, len(thumbs) - 1, _REFERENCES).astype(np.int64))
    thumbs, aspects = thumbs[steps], aspects[steps]
    values = np.full((len(thumbs), len(thumbs)), -1.0, dtype=np.float32)
    for block in _correlations(thumbs, thumbs, _SHIFT, mirrored=True):
        np.maximum(values, block, out=values)
    comparable = np.abs(aspects[:, None] - aspects) < _ASPECT
    pairs = values[np.triu(comparable, 1)]
    if len(pairs) < _FEW * (_FEW - 1) // 2:
        return _SURE
    fisher = np.arctanh(np.clip(pairs.astype(np.float64), -0.9999, 0.9999))
    middle, high = np.quantile(fisher, [0.5, _QUANTILE])
    return max(_FLOOR, float(np.tanh(middle + strictness * (high - middle) / _DEVIATIONS)))


def _coarse_pairs(
    thumbs: np.ndarray, aspects: np.ndarray, *, mirrored: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each image its nearest by coarse thumbnails: pairs (P, 2), i < j, correlations."""
    n, side = len(thumbs), _SIDE // _COARSE
    small = thumbs.reshape(n, side, _COARSE, side, _COARSE).mean(axis=(2, 4))
    k = min(_NEIGHBORS, n - 1)
    found: dict[tuple[int, int], float] = {}
    for start in range(0, n, _BLOCK):
        rows = slice(start, start + _BLOCK)
        best = np.full((len(small[rows]), n), -1.0, dtype=np.float32)
        for values in _correlations(small[rows], small, _COARSE_SHIFT, mirrored=mirrored):
            np.maximum(best, values, out=best)
        best[np.abs(aspects[rows, None] - aspects) >= _ASPECT] = -1
        best[np.arange(len(best)), np.arange(start, start + len(best))] = -1
        if k:
            nearest = np.argpartition(-best, k - 1, axis=1)[:, :k]
            for i, row in enumerate(nearest):
                for j in row[best[i, row] > 0].tolist():
                    pair = (min(start + i, j), max(start + i, j))
                    found[pair] = max(found.get(pair, -1.0), float(best[i, j]))
    pairs = np.array(sorted(found), dtype=np.int64).reshape(-1, 2)
    return pairs, np.array([found[i, j] for i, j in pairs.tolist()])


def _correlations(
    A: np.ndarray, B: np.ndarray, shift: int, *, mirrored: bool
) -> Iterator[np.ndarray]:
    """Yield the correlations (N, M) of the middles of A with B at each shift and mirror image."""
    middles = [
        view.reshape(len(A), view.shape[1] * view.shape[2]) for view in _middles(A, shift, mirrored)
    ]
    size = B.shape[1] - 2 * shift
    lengths = _window_lengths(B, size)
    for y in range(2 * shift + 1):
        for x in range(2 * shift + 1):
            windows = B[:, y : y + size, x : x + size].reshape(len(B), size * size)
            for rows in middles:
                yield (rows @ windows.T) / lengths[:, y, x]


def _correlations_of_pairs(thumbs: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the largest correlation (P,) of each pair (P, 2), over shifts and mirror images."""
    best = np.full(len(pairs), -1.0, dtype=np.float32)
    if not len(pairs):
        return best
    (first, i), (second, j) = (np.unique(side, return_inverse=True) for side in pairs.T)
    spectra = scipy.fft.rfft2(thumbs[second])
    at = slice(0, 2 * _SHIFT + 1)
    lengths = _window_lengths(thumbs[second], _SIDE - 2 * _SHIFT)[j]
    for view in _middles(thumbs[first], _SHIFT, mirrored=True):
        # A middle ends _SHIFT pixels before the thumbnail on both sides: no shift wraps around.
        other = np.conj(scipy.fft.rfft2(view, s=(_SIDE, _SIDE)))
        products = scipy.fft.irfft2(other[i] * spectra[j], s=(_SIDE, _SIDE))[:, at, at]
        np.maximum(best, (products / lengths).max(axis=(1, 2)), out=best)
    return best


def _middles(thumbs: np.ndarray, shift: int, mirrored: bool) -> list[np.ndarray]:
    """Return the middles of thumbnails and of their mirror images, with mean 0 and length 1."""
    middle = thumbs[:, shift:-shift, shift:-shift]
    middle = middle - middle.mean(axis=(1, 2), keepdims=True)
    middle /= np.maximum(np.linalg.norm(middle, axis=(1, 2), keepdims=True), _TINY)
    if not mirrored:
        return [middle]
    return [middle, middle[:, :, ::-1], middle[:, ::-1], middle[:, ::-1, ::-1]]


def _window_lengths(thumbs: np.ndarray, size: int) -> np.ndarray:
    """Return the length of each square window (N, y, x) of a side, less its mean."""
    of_squares = _window_sums(thumbs.astype(np.float64) ** 2, size)
    squared = of_squares - _window_sums(thumbs.astype(np.float64), size) ** 2 / size**2
    return np.sqrt(np.maximum(squared, _TINY**2)).astype(np.float32)


def _window_sums(values: np.ndarray, size: int) -> np.ndarray:
    sums = np.pad(values.cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    rows = sums[:, size:] - sums[:, :-size]
    return np.asarray(rows[:, :, size:] - rows[:, :, :-size])


def _by_appearance(labels: np.ndarray) -> np.ndarray:
    """Number groups from 0 by first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)
