"""PaDiM: how far each patch is from the normal patches at its own position."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anomalib_lite._validation import check_choice, check_int, check_number
from anomalib_lite.anomaly_map import check_image_score
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.fitting import Accumulator, Folding, LeftOut, images_within_budget
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.gaussian import GaussianGrid
from anomalib_lite.images.embeddings import Embeddings

__all__ = ["PaDiM"]

# Gaussians without factors, reduced embeddings, and which patches are ignored (n, h, w).
Fitted = tuple[GaussianGrid, list[np.ndarray], np.ndarray]
REDUCTIONS = ("random", "semi_orthogonal")
# Images whose embeddings are in memory at a time, if no budget says how many.
_SHARD_IMAGES = 32


class PaDiM(BaseDetector):
    """Calls patches anomalous that are unlike the normal ones at the same place of the image.

    Meant for parts that always lie in the same place. All images must come out at one size: give
    ``image_size`` as a pair, unless all have one aspect.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="efficientnet_lite0"
        As in :class:`~anomalib_lite.PatchCore`; so are ``weights``, ``image_size``,
        ``smoothing``, ``false_alarm_rate``, ``false_alarm_confidence``,
        ``device``, ``dtype``, ``engine``, ``batch_size``,
        ``n_jobs``, ``on_error``, ``max_pixels`` and ``verbose``.
    layers : sequence of str or int, optional
        Layers to use; by default those of stride 4, 8 and 16.
    fusion : {"concat", "single", "mean", "nearest", "weighted", "adaptive", "per_layer"}, \
default="nearest"
        How the maps of several layers become one embedding a patch; see
        :class:`~anomalib_lite.PatchCore`.
    layer_weights, feature_dim, projection, whiten, whiten_shrinkage
        As in :class:`~anomalib_lite.PatchCore`: how embeddings are changed before all else.
    normalize : bool, default=False
        Whether to divide each embedding by its length after that.
    n_components : int, optional
        d, the length to which embeddings are reduced; shorter embeddings stay as they are. By
        default 100, or 550 if they have more than 1,000 channels, as in the paper for ResNet-18
        and WideResNet-50.
    reduction : {"random", "semi_orthogonal"}, default="random"
        How embeddings are reduced: to some channels, drawn at random, as in the paper; or by a
        random projection onto orthogonal directions [2]_.
    ridge : float, default=0.01
        Epsilon, which is added to the diagonal of each covariance.
    image_score : {"max", "top<p>%", "top<p>% pixels", "smoothed", "structure"}, default="smoothed"
        How the patch scores of an image become one: the largest after smoothing over neighbours
        (a Gaussian of one patch, which is the paper's 4 pixels at stride 4); or another way of
        :class:`~anomalib_lite.PatchCore`.
    calibration : {"auto", "split", "cross", "leave_one_out"}, default="split"
        ``"split"`` holds images back (as many as the rate needs, a fifth to half of all) and
        takes the threshold from their scores, with a finite-sample guarantee; they are not
        fitted on. ``"cross"`` fits on all images, and scores each of ten parts of them (whole
        groups) by Gaussians of the others; ``"leave_one_out"`` does so with each image by itself.
        Both keep the reduced embeddings of all images until then, and less is known of their rates;
        see docs/calibration.md. ``"auto"`` is ``"cross"`` for at most 500 images, where no other
        parameter forbids it, else ``"split"``.
    memory_budget : int or str, optional
        Most memory that :meth:`fit` may take above the idle process, such as "2GB". Embeddings
        are never kept anyway, so this only bounds how many images are processed at a time. Not
        with ``calibration="cross"`` or ``"leave_one_out"``.
    random_state : int, RandomState or None, default=0
        Seed of the channels and of the choice of calibration images.

    Attributes
    ----------
    gaussians_ : GaussianGrid
        Mean and covariance of each position.
    components_ : ndarray of shape (d,), int64, or (D, d), float32
        The channels kept, or the projection.
    threshold_, pixel_threshold_, calibration_, calibration_scores_, calibration_peaks_, \
calibration_groups_, calibration_names_, n_features_, backbone_, dtype_, engine_, skipped_, \
ignore_mask_, map_statistics_
        As in :class:`~anomalib_lite.PatchCore`.

    Notes
    -----
    Defard et al. [1]_: a patch at position (i, j) has the score
    :math:`\\sqrt{(x - \\mu_{ij})^T \\Sigma_{ij}^{-1} (x - \\mu_{ij})}` with
    :math:`\\Sigma_{ij} = \\frac{1}{N - 1} \\sum_k (x_k - \\mu_{ij})(x_k - \\mu_{ij})^T +
    \\epsilon I`. We deviate in that images are not cropped.

    h w d^2 numbers of 4 bytes are kept, whatever the number of images, and as many written to
    the file (half, since they are triangles): 160 MB for 64 x 64 positions and d = 100.

    References
    ----------
    .. [1] Defard, Setkov, Loesch and Audigier, "PaDiM: a Patch Distribution Modeling Framework
       for Anomaly Detection and Localization", ICPR 2021 workshops, arXiv:2011.08785.
    .. [2] Kim, Kim, Yi and Lee, "Semi-orthogonal Embedding for Efficient Unsupervised Anomaly
       Segmentation", arXiv:2105.14737.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite import PaDiM
    >>> rng = np.random.default_rng(0)
    >>> good = rng.integers(100, 140, (30, 64, 96, 3), dtype=np.uint8)
    >>> bad = good[:1].copy()
    >>> bad[0, 20:40, 30:60] = 255
    >>> detector = PaDiM(image_size=64, n_components=30, false_alarm_rate=0.2).fit(good)
    >>> bool(detector.score(bad)[0] > detector.threshold_)
    True
    >>> detector.anomaly_map(bad).shape
    (1, 64, 96)
    """

    _strides = (4, 8, 16)
    _one_mask = True

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: str | Path | None = None,
        layers: Sequence[str | int] | None = None,
        fusion: str = "nearest",
        layer_weights: Sequence[float] | None = None,
        feature_dim: int | None = None,
        projection: str = "pca",
        whiten: bool = False,
        whiten_shrinkage: float = 0.07,
        normalize: bool = False,
        image_size: int | tuple[int, int] | str = 256,
        n_components: int | None = None,
        reduction: str = "random",
        ridge: float = 0.01,
        image_score: str = "smoothed",
        smoothing: float = 4.0,
        false_alarm_rate: float = 0.01,
        false_alarm_confidence: float | None = None,
        calibration: str = "split",
        device: str = "auto",
        dtype: str = "auto",
        engine: str = "auto",
        batch_size: int = 32,
        memory_budget: int | str | None = None,
        n_jobs: int | None = None,
        on_error: str = "raise",
        max_pixels: int = 100_000_000,
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layers = layers
        self.fusion = fusion
        self.layer_weights = layer_weights
        self.feature_dim = feature_dim
        self.projection = projection
        self.whiten = whiten
        self.whiten_shrinkage = whiten_shrinkage
        self.normalize = normalize
        self.image_size = image_size
        self.n_components = n_components
        self.reduction = reduction
        self.ridge = ridge
        self.image_score = image_score
        self.smoothing = smoothing
        self.false_alarm_rate = false_alarm_rate
        self.false_alarm_confidence = false_alarm_confidence
        self.calibration = calibration
        self.device = device
        self.dtype = dtype
        self.engine = engine
        self.batch_size = batch_size
        self.memory_budget = memory_budget
        self.n_jobs = n_jobs
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.random_state = random_state
        self.verbose = verbose

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.n_components is not None:
            check_int("n_components", self.n_components, "PaDiM", low=1)
        check_choice("reduction", self.reduction, REDUCTIONS, "PaDiM")
        check_image_score(self.image_score, "PaDiM", "structure")
        if check_number("ridge", self.ridge, "PaDiM", "[0, 1000]") == 0:
            raise InvalidValueError(
                "PaDiM: ridge must be above 0, or a covariance may have no inverse. The paper has "
                "0.01."
            )

    def _fits_in_shards(self) -> bool:
        return True

    def _make_accumulator(
        self,
        shape: tuple[int, ...],
        n_images: int | None,
        in_flight: int,
        random: np.random.RandomState,
    ) -> GridAccumulator:
        height, width, n_features = shape
        known: GaussianGrid | None = getattr(self, "gaussians_", None)
        components = self._draw_components(n_features, random) if not known else self.components_
        at_once = _SHARD_IMAGES
        if self.memory_budget is not None:
            reduced = height * width * components.shape[-1]
            at_once = images_within_budget(
                "PaDiM",
                self.memory_budget,
                fixed=in_flight + 4 * reduced * components.shape[-1] * (1 if not known else 2),
                per_image=4 * height * width * n_features + 8 * reduced,
                at_most=_SHARD_IMAGES,
                for_what=f"the covariances of {height}x{width} positions and the images under way",
                lower="n_components, ",
            )
        grid = known.shape[:2] if known else (height, width)
        return GridAccumulator(grid, components, float(self.ridge), at_once, known)

    def _draw_components(self, n_features: int, random: np.random.RandomState) -> np.ndarray:
        """Draw the channels to keep, or the projection."""
        wanted = self.n_components or (100 if n_features <= 1000 else 550)
        n_kept = min(wanted, n_features)
        if self.reduction == "random":
            return np.sort(random.permutation(n_features)[:n_kept])
        q, r = np.linalg.qr(random.normal(size=(n_features, n_kept)))
        # With these signs, each such matrix is as likely as any other.
        return np.asarray(q * np.sign(np.diag(r)), np.float32)

    def _fit_accumulated(
        self, accumulated: GridAccumulator, random: np.random.RandomState
    ) -> Fitted | None:
        """Take over the Gaussians; return them before they had factors, and what was kept."""
        gaussians = accumulated.gaussians
        assert gaussians is not None
        if gaussians.n < 2:
            raise InvalidValueError(
                "PaDiM: 1 image to fit on has no covariance. Give at least 4; some are held back "
                "for calibration."
            )
        self.gaussians_, self.components_ = gaussians, accumulated.components
        self._channels = accumulated.channels
        before = copy.deepcopy(gaussians) if accumulated.kept else None
        gaussians.factorize()  # which overwrites the scatters
        if before is None:
            return None
        return before, accumulated.kept, np.concatenate(accumulated.kept_ignored)

    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _check_grid(E.shape[1:3], self.gaussians_.shape[:2])
        patch_scores = self.gaussians_.mahalanobis(_reduced(E, self.components_))
        patch_scores[ignored := np.isnan(E[..., 0])] = 0
        return patch_scores, self._score_maps(patch_scores, ignored)

    def _left_out(
        self, E: Embeddings, fitted: Fitted, folding: Folding, copies: int
    ) -> Iterator[LeftOut | None]:
        gaussians, kept, ignored = fitted
        folds = folding(len(ignored))
        sizes = np.bincount(folds)
        if gaussians.n - sizes.max(initial=0) < 2:  # one other image alone has no covariance
            yield None
            return
        if (sizes == 1).all():
            distances = gaussians.leave_one_out(kept)
        else:
            ends = np.cumsum(sizes)
            folded = (_between(kept, end - n, end) for n, end in zip(sizes, ends, strict=True))
            distances = np.concatenate([gaussians.without(x).mahalanobis(x) for x in folded])
        distances[ignored] = 0
        yield distances, self._score_maps(distances, ignored), ignored

    def _summary_lines(self) -> list[tuple[str, str]]:
        height, width, length = self.gaussians_.shape
        return [("gaussians", f"{height} x {width} positions of {length} numbers")]

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        grid = self.gaussians_
        arrays = {"mean": grid.mean, "factors": grid.packed(), "components": self.components_}
        state = {"grid": list(grid.shape[:2]), "n_images": grid.n, "n_features": self.n_features_}
        return arrays, state

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        self.n_features_, self.components_ = int(state["n_features"]), arrays["components"]
        self._channels = _channels_of(self.components_)
        height, width = state["grid"]
        if self.components_.ndim == 1 and not self.components_.max() < self.n_features_:
            raise ValueError(f"components name channels beyond {self.n_features_}")
        shape = (int(height), int(width), self.components_.shape[-1])
        self.gaussians_ = GaussianGrid(shape, float(self.ridge))
        self.gaussians_.restore(int(state["n_images"]), arrays["mean"], arrays["factors"])


class GridAccumulator(Accumulator):
    """Reduced embeddings of one shard; after a merge, the moments of all shards merged.

    Parameters
    ----------
    grid : (h, w)
        Number of positions.
    components : ndarray of shape (d,), int64, or (D, d), float32
        The channels kept, or the projection.
    ridge : float
        Epsilon, which is added to the diagonal of each covariance.
    images_per_shard : int
        Number of images whose embeddings are in memory at a time.
    known : GaussianGrid or None
        Moments of the images that were fitted on before.

    Attributes
    ----------
    kept : list of ndarray (n, h, w, d), float32
        All reduced embeddings; none unless ``keeps_images``.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        components: np.ndarray,
        ridge: float,
        images_per_shard: int,
        known: GaussianGrid | None,
    ) -> None:
        self.grid, self.components, self.ridge = grid, components, ridge
        self.channels = _channels_of(components)
        self.images_per_shard = images_per_shard
        self.gaussians = known
        self._owns_gaussians = False  # those known may still be needed as they are
        self.kept: list[np.ndarray] = []
        self.kept_ignored: list[np.ndarray] = []  # which patches of those kept are ignored
        self.E = np.empty((0, *grid, components.shape[-1]), np.float32)

    def accumulate(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> Self:
        """Return an accumulator of the shard's embeddings, reduced."""
        for one in E:
            _check_grid(one.shape[:2], self.grid)
        shard = copy.copy(self)
        shard.E = _reduced(np.asarray(E), self.components)
        if self.keeps_images:
            shard.kept_ignored = [np.isnan(np.stack([one[..., 0] for one in E]))]
        return shard

    def merge(self, other: Self) -> None:
        """Add the other's embeddings to the moments."""
        if not self._owns_gaussians:
            new = GaussianGrid((self.grid[0], self.grid[1], self.E.shape[-1]), self.ridge)
            self.gaussians = copy.deepcopy(self.gaussians) if self.gaussians else new
            self._owns_gaussians = True
        assert self.gaussians is not None
        if other.keeps_images:
            self.kept = [*self.kept, other.E]
            self.kept_ignored = [*self.kept_ignored, *other.kept_ignored]
        for start in range(0, len(other.E), _SHARD_IMAGES):
            self.gaussians.add(other.E[start : start + _SHARD_IMAGES])


def _between(blocks: list[np.ndarray], begin: int, end: int) -> np.ndarray:
    """Return images ``begin`` to ``end`` of those that are in blocks (n, h, w, d)."""
    starts = np.cumsum([0, *map(len, blocks[:-1])])
    both = zip(blocks, starts, strict=True)
    return np.concatenate([x[max(0, begin - at) : max(0, end - at)] for x, at in both])


def _channels_of(components: np.ndarray) -> np.ndarray | None:
    """Return the channels that the backbone must give; None for a projection, which needs all."""
    return components if components.ndim == 1 else None


def _reduced(E: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Reduce embeddings (..., D) to (..., d); ignored patches become zeros."""
    ignored = np.isnan(E[..., 0])
    if components.ndim == 2:
        E = np.asarray(E @ components)
    elif E.shape[-1] != len(components):  # else the backbone gave these alone
        E = np.take(E, components, axis=-1, mode="clip")  # to check each index takes longer
    return np.where(ignored[..., None], np.float32(0), E) if ignored.any() else E


def _check_grid(got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise unless an image gives as many patches as the others."""
    if tuple(got) != tuple(expected):
        raise InvalidValueError(
            f"PaDiM: every image must give {expected[0]}x{expected[1]} patches, got "
            f"{got[0]}x{got[1]}: a patch is compared with those at its own place. Set image_size "
            "to a pair (H, W)."
        )
