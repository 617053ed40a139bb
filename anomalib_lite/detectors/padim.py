"""PaDiM: how far each patch is from the normal patches at its own position."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anomalib_lite._validation import check_choice, check_int, check_memory, check_number
from anomalib_lite.anomaly_map import IMAGE_SCORES, image_scores
from anomalib_lite.detectors._patch_accumulator import Collector
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.embeddings import Embeddings
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.gaussian import GaussianGrid

__all__ = ["PaDiM"]

REDUCTIONS = ("random", "semi_orthogonal")
# Images whose embeddings are in memory at a time, where no budget says how many.
_SHARD_IMAGES = 32


class PaDiM(BaseDetector):
    """Patches unlike the normal ones at the same place of the image are anomalous.

    For parts that always lie in the same place. All images must come out at one size: give
    ``image_size`` as a pair, unless all have one aspect.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="efficientnet_lite0"
        As in :class:`~anomalib_lite.PatchCore`, and so are ``weights``, ``image_size``,
        ``smoothing``, ``false_alarm_rate``, ``device``, ``dtype``, ``engine``, ``batch_size``,
        ``n_jobs``, ``on_error``, ``max_pixels`` and ``verbose``.
    layers : sequence of str or int, optional
        Layers to use; by default those of stride 4, 8 and 16.
    fusion : {"nearest", "concat"}, default="nearest"
        How layers become one embedding a patch; see :mod:`~anomalib_lite.fusion`.
    n_components : int, optional
        d, the length to which embeddings are reduced; all if there are no more. By default 100,
        or 550 of more than 1,000, as the paper has it for ResNet-18 and WideResNet-50.
    reduction : {"random", "semi_orthogonal"}, default="random"
        Some channels, drawn at random, as in the paper; or a random projection onto orthogonal
        directions [2]_.
    ridge : float, default=0.01
        Epsilon: added to the diagonal of each covariance.
    image_score : {"smoothed", "max", "top1%"}, default="smoothed"
        Largest patch score after smoothing over neighbours (a Gaussian of one patch, which is
        the paper's 4 pixels at stride 4); largest patch score; mean of the largest 1 %.
    calibration : {"split", "leave_one_out"}, default="split"
        ``"split"`` holds images back (as many as the rate needs, a fifth to half of all) and
        takes the threshold from their scores, with a finite-sample guarantee; they are not
        fitted on. ``"leave_one_out"`` fits on all and scores each as if it had been left out;
        it keeps the reduced embeddings of all until then, and its rate is only approximate.
    memory_budget : int or str, optional
        Most memory that :meth:`fit` may take above the idle process, such as "2GB". Embeddings
        are never kept anyway, so this only bounds how many images are under way at a time. Not
        with ``calibration="leave_one_out"``.
    random_state : int, RandomState or None, default=0
        Seed of the channels and of the choice of calibration images.

    Attributes
    ----------
    gaussians_ : GaussianGrid
        Mean and covariance of each position.
    components_ : ndarray of shape (d,), int64, or (D, d), float32
        The channels kept, or the projection.
    threshold_, calibration_scores_, n_features_, backbone_, dtype_, engine_, skipped_
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

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: str | Path | None = None,
        layers: Sequence[str | int] | None = None,
        fusion: str = "nearest",
        image_size: int | tuple[int, int] = 256,
        n_components: int | None = None,
        reduction: str = "random",
        ridge: float = 0.01,
        image_score: str = "smoothed",
        smoothing: float = 4.0,
        false_alarm_rate: float = 0.01,
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
        self.image_size = image_size
        self.n_components = n_components
        self.reduction = reduction
        self.ridge = ridge
        self.image_score = image_score
        self.smoothing = smoothing
        self.false_alarm_rate = false_alarm_rate
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
        check_choice("image_score", self.image_score, IMAGE_SCORES, "PaDiM")
        if check_number("ridge", self.ridge, "PaDiM", "[0, 1000]") == 0:
            raise InvalidValueError(
                "PaDiM: ridge must be above 0, or a covariance may have no inverse. The paper has "
                "0.01."
            )

    def _in_shards(self) -> bool:
        return True

    def _collector(
        self,
        shape: tuple[int, ...],
        n_images: int | None,
        in_flight: int,
        random: np.random.RandomState,
    ) -> GridCollector:
        height, width, n_features = shape
        known: GaussianGrid | None = getattr(self, "gaussians_", None)
        if known is None:
            self.n_features_, self.components_ = n_features, self._draw(n_features, random)
            self._channels = _channels_of(self.components_)
        at_once = _SHARD_IMAGES
        if self.memory_budget is not None:
            budget = check_memory("memory_budget", self.memory_budget, "PaDiM")
            reduced = height * width * self.components_.shape[-1]
            fixed = in_flight + 4 * reduced * self.components_.shape[-1] * (1 if not known else 2)
            per_image = 4 * height * width * n_features + 8 * reduced
            if budget < fixed + per_image:
                raise InvalidValueError(
                    f"PaDiM: memory_budget={budget:,} bytes is too small: the covariances of "
                    f"{height}x{width} positions and the images under way take "
                    f"{fixed + per_image:,}. Raise it, or lower n_components, image_size or "
                    "batch_size."
                )
            at_once = min((budget - fixed) // per_image, at_once)
        grid = known.shape[:2] if known else (height, width)
        collector = GridCollector(grid, self.components_, float(self.ridge), at_once, known)
        collector.kept = [] if self.calibration == "leave_one_out" else None
        return collector

    def _draw(self, n_features: int, random: np.random.RandomState) -> np.ndarray:
        """The channels to keep, or the projection."""
        wanted = self.n_components or (100 if n_features <= 1000 else 550)
        n_kept = min(wanted, n_features)
        if self.reduction == "random":
            return np.sort(random.permutation(n_features)[:n_kept])
        q, r = np.linalg.qr(random.normal(size=(n_features, n_kept)))
        # With these signs, each such matrix is as likely as any other.
        return np.asarray(q * np.sign(np.diag(r)), np.float32)

    def _fit_collected(self, collected: GridCollector, random: np.random.RandomState) -> None:
        assert collected.gaussians is not None
        if collected.gaussians.n < 2:
            raise InvalidValueError(
                "PaDiM: 1 image to fit on has no covariance. Give at least 4; some are held back "
                "for calibration."
            )
        self.gaussians_ = collected.gaussians
        if collected.kept is not None:
            self._left_out = np.empty(0, np.float32)
            if self.gaussians_.n > 2:  # two others, or they would have no covariance
                patch_scores = self.gaussians_.leave_one_out(collected.kept)
                self._left_out = image_scores(patch_scores, self.image_score)
        self.gaussians_.factorize()

    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _check_grid(E.shape[1:3], self.gaussians_.shape[:2])
        patch_scores = self.gaussians_.mahalanobis(_reduced(E, self.components_))
        return patch_scores, image_scores(patch_scores, self.image_score)

    def _score_left_out(self, E: Embeddings) -> np.ndarray:
        left_out: np.ndarray = self.__dict__.pop("_left_out")
        return left_out

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


class GridCollector(Collector):
    """Reduced embeddings of one shard; or, once others were merged, the moments of all these."""

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
        self._is_own = False  # what was known may still be needed as it is
        self.kept: list[np.ndarray] | None = None  # all reduced embeddings, if they are needed
        self.E = np.empty((0, *grid, components.shape[-1]), np.float32)

    def add(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> None:
        """Keep the shard's embeddings, reduced."""
        for one in E:
            _check_grid(one.shape[:2], self.grid)
        self.E = _reduced(np.asarray(E), self.components)

    def merge(self, other: Self) -> None:
        """Let the other's embeddings join the moments."""
        if not self._is_own:
            new = GaussianGrid((self.grid[0], self.grid[1], self.E.shape[-1]), self.ridge)
            self.gaussians = copy.deepcopy(self.gaussians) if self.gaussians else new
            self._is_own = True
        assert self.gaussians is not None
        if self.kept is not None:
            self.kept = [*self.kept, other.E]
        for start in range(0, len(other.E), _SHARD_IMAGES):
            self.gaussians.add(other.E[start : start + _SHARD_IMAGES])


def _channels_of(components: np.ndarray) -> np.ndarray | None:
    """What the backbone may leave out all others of; nothing of the kind for a projection."""
    return components if components.ndim == 1 else None


def _reduced(E: np.ndarray, components: np.ndarray) -> np.ndarray:
    """(..., D) -> (..., d)."""
    if components.ndim == 1:
        if E.shape[-1] == len(components):  # the backbone was asked for these alone
            return E
        return np.take(E, components, axis=-1, mode="clip")  # checking each index takes longer
    return np.asarray(E @ components)


def _check_grid(got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(got) != tuple(expected):
        raise InvalidValueError(
            f"PaDiM: every image must give {expected[0]}x{expected[1]} patches, got "
            f"{got[0]}x{got[1]}: a patch is compared with those at its own place. Set image_size "
            "to a pair (H, W)."
        )
