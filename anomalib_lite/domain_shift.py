"""Domain shift: how far are new images from those a detector was fitted on?

Four distances between two sets of embeddings, and :func:`feature_drift`, which computes them for
images, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import pdist
from sklearn.utils import check_random_state

from anomalib_lite._validation import (
    check_image_size,
    check_int,
    check_number,
    check_seed,
    check_values,
)
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.images import ImageSource, iter_batches

__all__ = [
    "cosine_distance",
    "feature_drift",
    "frechet_distance",
    "median_distance",
    "mmd",
    "sliced_wasserstein",
]

# Rows in a block of distances or products: two blocks of 1,024 make 8 MB of float64.
_BLOCK = 1024
# Values of all projections of both sets that are in memory at a time (16 MB).
_PROJECTED = 1 << 21
# Rows from which the median distance is taken, of both sets together.
_MEDIAN_ROWS = 1000


def mmd(X: npt.ArrayLike, Y: npt.ArrayLike, *, bandwidth: float | None = None) -> float:
    r"""Maximum mean discrepancy of two samples, squared, with a Gaussian kernel.

    Sees any difference between two distributions, not only one of means or covariances.

    Parameters
    ----------
    X, Y : array-like of shape (N, D) and (M, D)
        Embeddings, float32 or float64; N and M at least 2.
    bandwidth : float, optional
        Width :math:`\sigma` of the kernel, above 0. By default the median distance between rows of
        X and Y together (the median heuristic), taken from at most 1,000 rows at even steps.

    Returns
    -------
    float
        Unbiased estimate of the *squared* discrepancy: at most 2, and 0 on average for equal
        distributions, so that it may be slightly negative. Symmetric in X and Y.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If X or Y is not a finite matrix, they have different numbers of columns or fewer than 2
        rows, or ``bandwidth`` is not above 0.

    Notes
    -----
    With :math:`k(x, y) = \exp(-\|x - y\|^2 / (2 \sigma^2))`,

    .. math:: \frac{1}{N (N - 1)} \sum_{i \ne j} k(x_i, x_j) +
        \frac{1}{M (M - 1)} \sum_{i \ne j} k(y_i, y_j) - \frac{2}{N M} \sum_{i, j} k(x_i, y_j)

    The kernel is computed in blocks, so the memory does not grow with N M; the time does. Values
    with different bandwidths cannot be compared, and the default depends on Y: to follow a stream,
    give ``bandwidth=median_distance(X)`` of a reference X that stays. So does
    :func:`feature_drift`.

    References
    ----------
    Gretton, Borgwardt, Rasch, Schölkopf and Smola, "A Kernel Two-Sample Test", Journal of Machine
    Learning Research 13, 2012, Lemma 6.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(200, 8))
    >>> Y = np.random.default_rng(1).normal(size=(300, 8))
    >>> abs(mmd(X, Y)) < 0.02 < mmd(X, Y + 1)
    True
    """
    X, Y = _check_pair(X, Y, "mmd", low=2)
    if bandwidth is not None:
        bandwidth = check_number("bandwidth", bandwidth, "mmd", "(0, inf)")
    # Distances do not change, and rounding errors of products become small.
    center = (X.mean(axis=0, dtype=np.float64) + Y.mean(axis=0, dtype=np.float64)) / 2
    sigma = _median_distance([X, Y], center) if bandwidth is None else bandwidth
    n, m = len(X), len(Y)
    within_x = _kernel_sum(X, None, center, sigma) / (n * (n - 1))
    within_y = _kernel_sum(Y, None, center, sigma) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(X, Y, center, sigma) / (n * m)


def median_distance(X: npt.ArrayLike) -> float:
    """Median distance between rows of a sample: a bandwidth for :func:`mmd` that X alone decides.

    Parameters
    ----------
    X : array-like of shape (N, D)
        Embeddings, float32 or float64; N at least 2.

    Returns
    -------
    float
        Above 0, Euclidean, taken from at most 1,000 rows at even steps. If more than half of the
        pairs are copies, the mean distance of the others; 1 if all rows are equal.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If X is not a finite matrix of at least 2 rows.

    Examples
    --------
    >>> median_distance([[0.0, 0.0], [3.0, 4.0], [0.0, 5.0]])
    5.0
    """
    X, _ = _check_pair(X, X, "median_distance", low=2)
    return _median_distance([X], X.mean(axis=0, dtype=np.float64))


def sliced_wasserstein(
    X: npt.ArrayLike, Y: npt.ArrayLike, *, n_projections: int = 128, random_state: Any = None
) -> float:
    r"""Sliced Wasserstein distance of order 2 between two samples.

    Parameters
    ----------
    X, Y : array-like of shape (N, D) and (M, D)
        Embeddings, float32 or float64.
    n_projections : int, default=128
        Number of random directions, at least 1.
    random_state : int, RandomState or None, default=None
        Seed of the directions. Compare values of one seed.

    Returns
    -------
    float
        At least 0, in the units of the embeddings; 0 for equal samples. For two samples of one
        distribution it is above 0 and falls as they grow. Symmetric in X and Y.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If X or Y is not a finite matrix, they have different numbers of columns, or a parameter is
        out of range.

    Notes
    -----
    The samples are projected on directions :math:`\theta_l` drawn evenly from the unit sphere. In
    one dimension the distance is that of the quantile functions :math:`F^{-1}`, which is computed
    exactly, also for samples of different sizes:

    .. math:: \Big( \frac{1}{L} \sum_l \int_0^1
        \big(F^{-1}_{X \theta_l}(q) - F^{-1}_{Y \theta_l}(q)\big)^2 dq \Big)^{1/2}

    References
    ----------
    Bonneel, Rabin, Peyré and Pfister, "Sliced and Radon Wasserstein Barycenters of Measures",
    Journal of Mathematical Imaging and Vision 51, 2015.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(200, 1))
    >>> round(sliced_wasserstein(X, X + 3, random_state=0), 6)
    3.0
    """
    where = "sliced_wasserstein"
    X, Y = _check_pair(X, Y, where, low=1)
    n_projections = check_int("n_projections", n_projections, where, low=1)
    check_seed(random_state, where)
    rng = check_random_state(random_state)
    directions = rng.standard_normal((n_projections, X.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # Between two neighbours of these levels both quantile functions are constant.
    n, m = len(X), len(Y)
    levels = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (n m)
    widths = np.diff(levels, prepend=0) / (n * m)
    of_x, of_y = (levels - 1) // m, (levels - 1) // n
    total = 0.0
    at_once = max(1, _PROJECTED // (n + m))
    for start in range(0, n_projections, at_once):
        chosen = directions[start : start + at_once]
        x, y = np.sort(_project(X, chosen)), np.sort(_project(Y, chosen))
        for one_x, one_y in zip(x, y, strict=True):
            total += float(widths @ (one_x[of_x] - one_y[of_y]) ** 2)
    return math.sqrt(total / n_projections)


def cosine_distance(X: npt.ArrayLike, Y: npt.ArrayLike) -> float:
    r"""Cosine distance between the means of two samples.

    Parameters
    ----------
    X, Y : array-like of shape (N, D) and (M, D)
        Embeddings, float32 or float64.

    Returns
    -------
    float
        :math:`1 - \cos(\bar x, \bar y)`, in [0, 2]. It does not depend on the lengths of the
        means, and sees no change that leaves both directions as they are. ``nan`` if a mean is
        zero.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If X or Y is not a finite matrix, or they have different numbers of columns.

    Examples
    --------
    >>> cosine_distance([[1.0, 0.0], [3.0, 0.0]], [[0.0, 5.0]])
    1.0
    """
    X, Y = _check_pair(X, Y, "cosine_distance", low=1)
    x, y = X.mean(axis=0, dtype=np.float64), Y.mean(axis=0, dtype=np.float64)
    lengths = np.linalg.norm(x), np.linalg.norm(y)
    if not all(lengths):
        return math.nan
    # Half the squared distance of the unit vectors: unlike 1 - cos, exact for small angles.
    return float(((x / lengths[0] - y / lengths[1]) ** 2).sum() / 2)


def frechet_distance(X: npt.ArrayLike, Y: npt.ArrayLike) -> float:
    r"""Fréchet distance of the Gaussians of two samples, squared: the formula of the FID.

    Parameters
    ----------
    X, Y : array-like of shape (N, D) and (M, D)
        Embeddings, float32 or float64; N and M at least 2. They may be fewer than D.

    Returns
    -------
    float
        At least 0, *squared* as the Fréchet inception distance (FID) is. It is 0 for equal means
        and covariances. For two samples of one distribution it is above 0 and falls as they grow:
        compare values of equal N and M alone. Symmetric in X and Y.

    Raises
    ------
    InvalidValueError, InvalidTypeError
        If X or Y is not a finite matrix, or they have different numbers of columns or fewer than 2
        rows.

    Notes
    -----
    .. math:: \|\mu_X - \mu_Y\|^2 +
        \mathrm{tr}\big(C_X + C_Y - 2 (C_X C_Y)^{1/2}\big)

    with covariances over N - 1 and M - 1. No matrix root is taken of the product, which is not
    symmetric and whose root becomes complex where covariances are singular. With factors
    :math:`C_X = A^T A` and :math:`C_Y = B^T B`, the trace of the root is the sum of the singular
    values of :math:`A B^T`. The factors are the centred samples themselves, or come from the
    eigenvalues of the covariance if there are more rows than columns.

    References
    ----------
    Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter, "GANs Trained by a Two Time-Scale Update
    Rule Converge to a Local Nash Equilibrium", NeurIPS 2017. Dowson and Landau, "The Fréchet
    distance between multivariate normal distributions", Journal of Multivariate Analysis 12, 1982.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(50, 3))
    >>> round(frechet_distance(X, X + [3, 4, 0]), 6)
    25.0
    """
    X, Y = _check_pair(X, Y, "frechet_distance", low=2)
    x, y = X.mean(axis=0, dtype=np.float64), Y.mean(axis=0, dtype=np.float64)
    A, B = _factor(X, x), _factor(Y, y)
    trace_of_root = np.linalg.svd(A @ B.T, compute_uv=False).sum()
    spread = (A**2).sum() + (B**2).sum() - 2 * trace_of_root
    # The spread of equal covariances is a difference of equal numbers; rounding may leave -1e-16.
    return float(((x - y) ** 2).sum() + max(spread, 0.0))


def feature_drift(
    reference_images: Any,
    new_images: Any,
    *,
    backbone: Any = "efficientnet_lite0",
    weights: str | Path | None = None,
    layers: Sequence[str | int] | None = None,
    image_size: int | tuple[int, int] = 256,
    batch_size: int = 32,
    n_projections: int = 128,
    random_state: Any = 0,
    device: Any = "auto",
) -> dict[str, dict[str, float]]:
    """Compare two sets of images in the features of a backbone, layer by layer.

    Parameters
    ----------
    reference_images, new_images : images
        Such as the images that a detector was fitted on, and those of this week: anything that
        :class:`~anomalib_lite.images.ImageSource` takes, at least 2 of each.
    backbone, weights, layers, device
        As for :class:`~anomalib_lite.backbones.Backbone`. Use those of the detector.
    image_size : int or (H, W), default=256
        As for a detector: the shorter side, or an exact size.
    batch_size : int, default=32
        Images in one batch.
    n_projections : int, default=128
        As for :func:`sliced_wasserstein`.
    random_state : int, RandomState or None, default=0
        Seed of the projections, which are the same for all layers.

    Returns
    -------
    dict of str to dict of str to float
        For each layer ``"mmd"``, ``"sliced_wasserstein"``, ``"cosine_distance"`` and
        ``"frechet_distance"``, as the functions of these names give them. The bandwidth of
        ``"mmd"`` is the :func:`median_distance` of the reference alone, so that values of several
        weeks, each compared with the same reference, can be compared with each other.

    Raises
    ------
    InvalidValueError, InvalidTypeError, ImageError, MissingPathError
        If a set holds fewer than 2 images, an image or the backbone cannot be used, or a parameter
        is out of range.

    Notes
    -----
    Each image is described by the mean of a layer's feature map over all positions, so what counts
    is the look of the whole image: light, focus, material. A small defect hardly changes it. The
    network runs in float32. To know which values are chance, compare two halves of the reference
    with each other.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 200, (8, 64, 64, 3), dtype=np.uint8)
    >>> drift = feature_drift(images, images + 50, image_size=64)
    >>> list(drift)
    ['blocks.2', 'blocks.4']
    >>> sorted(drift["blocks.2"])
    ['cosine_distance', 'frechet_distance', 'mmd', 'sliced_wasserstein']
    """
    where = "feature_drift"
    check_int("batch_size", batch_size, where, low=1)
    check_int("n_projections", n_projections, where, low=1)
    check_seed(random_state, where)
    sources = {}
    for name, images in (("reference_images", reference_images), ("new_images", new_images)):
        sources[name] = ImageSource(images, where=where)
        if len(sources[name]) < 2:
            raise InvalidValueError(f"{where}: {name} must hold at least 2 images, got 1.")
    from anomalib_lite.backbones import Backbone  # loads torch

    network = Backbone(
        backbone, weights=weights, layers=layers, device=device, dtype="float32", where=where
    )
    check_image_size(image_size, where, stride=network.stride)
    described = [_describe(network, source, image_size, batch_size) for source in sources.values()]
    names = network.layers or [f"output {i}" for i in range(len(described[0]))]
    projections = check_random_state(random_state).randint(2**31 - 1)
    return {
        name: {
            "mmd": mmd(X, Y, bandwidth=median_distance(X)),
            "sliced_wasserstein": sliced_wasserstein(
                X, Y, n_projections=n_projections, random_state=projections
            ),
            "cosine_distance": cosine_distance(X, Y),
            "frechet_distance": frechet_distance(X, Y),
        }
        for name, X, Y in zip(names, *described, strict=True)
    }


def _describe(
    network: Any, source: ImageSource, image_size: int | tuple[int, int], batch_size: int
) -> list[np.ndarray]:
    """Return, for each layer, the mean of its map of each image: (N, C) float32."""
    import torch

    parts: list[list[np.ndarray]] = []
    step_of = network.pixels_at_once
    for batch in iter_batches(
        source, image_size=image_size, stride=network.stride, batch_size=batch_size
    ):
        step = max(1, step_of // batch.pixels[0, :, :, 0].size)
        for start in range(0, len(batch.pixels), step):
            with torch.no_grad():
                maps = network(batch.pixels[start : start + step])
            parts.append([m.float().mean(dim=(2, 3)).cpu().numpy() for m in maps])
    return [np.concatenate(layer) for layer in zip(*parts, strict=True)]


def _check_pair(X: Any, Y: Any, where: str, *, low: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both samples as finite matrices of as many columns, float32 or float64."""
    pair = []
    for name, value in (("X", X), ("Y", Y)):
        try:
            array = np.asarray(value)
            array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
        except (TypeError, ValueError) as error:
            array = np.empty(0, object)
            cause: Exception | None = error
        else:
            cause = None
        if array.dtype not in (np.float32, np.float64):
            raise InvalidTypeError(
                f"{where}: {name} must be a numeric array of shape (N, D), "
                f"got {type(value).__name__}."
            ) from cause
        if array.ndim != 2 or array.shape[0] < low or array.shape[1] < 1:
            raise InvalidValueError(
                f"{where}: {name} must have shape (N, D) with N of at least {low} and D of at "
                f"least 1, got {array.shape}. Reshape patches to E.reshape(-1, E.shape[-1])."
            )
        check_values(name, array, where)
        pair.append(array)
    if pair[0].shape[1] != pair[1].shape[1]:
        raise InvalidValueError(
            f"{where}: X and Y must have as many columns, got {pair[0].shape[1]} and "
            f"{pair[1].shape[1]}. Use one backbone and the same layers for both."
        )
    return pair[0], pair[1]


def _blocks(X: np.ndarray, center: Any = 0.0) -> Iterator[np.ndarray]:
    """Yield some rows at a time, in float64, less ``center``."""
    for start in range(0, len(X), _BLOCK):
        yield X[start : start + _BLOCK].astype(np.float64) - center


def _kernel_sum(X: np.ndarray, Y: np.ndarray | None, center: np.ndarray, sigma: float) -> float:
    """Return the sum of the kernel over all pairs; without Y, over pairs of different rows of X."""
    total = 0.0
    for i, x in enumerate(_blocks(X, center)):
        # The kernel is symmetric: the blocks below the diagonal are those above it.
        for j, y in enumerate(_blocks(X[i * _BLOCK :] if Y is None else Y, center)):
            kernel = x @ y.T
            kernel *= -2
            kernel += (x**2).sum(axis=1)[:, None]
            kernel += (y**2).sum(axis=1)
            np.maximum(kernel, 0, out=kernel)
            kernel *= -1 / (2 * sigma**2)
            np.exp(kernel, out=kernel)
            if Y is None and j == 0:
                np.fill_diagonal(kernel, 0)
            total += float(kernel.sum()) * (2 if Y is None and j > 0 else 1)
    return total


def _median_distance(samples: Sequence[np.ndarray], center: np.ndarray) -> float:
    """Return the median distance between rows of all samples, or 1 if all rows are equal."""
    share = min(1.0, _MEDIAN_ROWS / sum(map(len, samples)))
    rows = []
    for sample in samples:
        n = max(1, round(share * len(sample)))
        chosen = np.arange(n) * len(sample) // n
        rows.append(sample[chosen].astype(np.float64) - center)
    distances = pdist(np.concatenate(rows))
    median = float(np.median(distances))
    if median > 0:
        return median
    # More than half of the pairs are copies: the mean of the others.
    return float(distances[distances > 0].mean()) if distances.any() else 1.0


def _project(X: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return the products (n_directions, N), in float64."""
    products = np.empty((len(directions), len(X)))
    for i, x in enumerate(_blocks(X)):
        products[:, i * _BLOCK : i * _BLOCK + len(x)] = directions @ x.T
    return products


def _factor(X: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return A (n, D) with A^T A equal to the covariance of X."""
    if len(X) <= X.shape[1]:
        return np.asarray((X - mean) / math.sqrt(len(X) - 1))
    covariance = np.zeros((X.shape[1], X.shape[1]))
    for x in _blocks(X, mean):
        covariance += x.T @ x
    values, vectors = np.linalg.eigh(covariance / (len(X) - 1))
    # Rounding leaves tiny negative eigenvalues where columns depend on each other.
    return np.asarray(np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)
