"""MahalanobisVFM: how far an image and its patches are from the Gaussians of normal ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anomalib_lite._moments import Moments
from anomalib_lite._validation import check_choice, check_memory, check_number
from anomalib_lite.anomaly_map import image_scores
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.collecting import Collector
from anomalib_lite.detectors.embeddings import Embeddings
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.gaussian import Gaussian, check_shrinkage

__all__ = ["MahalanobisVFM"]

IMAGE_SCORES = ("max", "top1%")
# Images whose embeddings are in memory at a time, where no budget says how many.
_SHARD_IMAGES = 32


class MahalanobisVFM(BaseDetector):
    """Images and patches far from the mean of normal ones are anomalous.

    Meant for vision foundation models, whose features of normal images are nearly Gaussian; any
    backbone will do. There are two Gaussians: one of whole images (the class token of a
    transformer, the mean over all positions of a CNN), which sees that something is odd, and
    one of patches, which sees where.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="efficientnet_lite0"
        As in :class:`~anomalib_lite.PatchCore`, and so are ``weights``, ``layers``,
        ``image_size``, ``smoothing``, ``false_alarm_rate``, ``device``, ``dtype``, ``engine``,
        ``batch_size``, ``n_jobs``, ``on_error``, ``max_pixels`` and ``verbose``. For a
        foundation model: ``"vit_base_patch14_dinov2.lvd142m"``, with ``weights`` where there is
        no network.
    fusion : {"summary"}, default="summary"
        Patches and image together; see :mod:`~anomalib_lite.fusion`.
    normalize : bool, default=True
        Whether features are divided by their length, patch by patch and image by image.
    shrinkage : {"ledoit_wolf", "oas"} or float in [0, 1], default="ledoit_wolf"
        Of both covariances; see :class:`~anomalib_lite.gaussian.Gaussian`.
    global_weight : float in [0, 1], default=0.5
        Share of the whole image's distance in the image score; the rest is that of its patches.
    image_score : {"max", "top1%"}, default="max"
        How the patches of an image become one number: the largest, or the mean of the largest
        1 %.
    calibration : {"split", "leave_one_out"}, default="split"
        As in :class:`~anomalib_lite.PaDiM`.
    memory_budget : int or str, optional
        As in :class:`~anomalib_lite.PaDiM`.
    random_state : int, RandomState or None, default=0
        Seed of the choice of calibration images.

    Attributes
    ----------
    patches_, images_ : Gaussian
        Of patches and of whole images; each has D / 2 features.
    threshold_, calibration_scores_, n_features_, backbone_, dtype_, engine_, skipped_
        As in :class:`~anomalib_lite.PatchCore`.

    Notes
    -----
    With the rooted Mahalanobis distances g of the image and :math:`p_{ij}` of its patches, the
    map shows :math:`p_{ij} / \\sqrt{d}` and the score is

    .. math:: w \\, \\frac{g}{\\sqrt{d}} + (1 - w) \\max_{ij} \\frac{p_{ij}}{\\sqrt{d}}

    with d features and w the ``global_weight``. A normal vector has a squared distance of about
    d, so both terms are about 1 for what is normal, and can be added. Gaussians of deep features:
    Rippel, Mertens and Merhof, "Modeling the Distribution of Normal Data in Pre-Trained Deep
    Features for Anomaly Detection", ICPR 2020, arXiv:2005.14140.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite import MahalanobisVFM
    >>> rng = np.random.default_rng(0)
    >>> good = rng.integers(100, 140, (30, 64, 96, 3), dtype=np.uint8)
    >>> bad = good[:1].copy()
    >>> bad[0, 20:40, 30:60] = 255
    >>> detector = MahalanobisVFM(image_size=64, false_alarm_rate=0.2).fit(good)
    >>> bool(detector.score(bad)[0] > detector.threshold_)
    True
    >>> detector.anomaly_map(bad).shape
    (1, 64, 96)
    """

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: str | Path | None = None,
        layers: Sequence[str | int] | None = None,
        fusion: str = "summary",
        image_size: int | tuple[int, int] = 256,
        normalize: bool = True,
        shrinkage: str | float = "ledoit_wolf",
        global_weight: float = 0.5,
        image_score: str = "max",
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
        self.normalize = normalize
        self.shrinkage = shrinkage
        self.global_weight = global_weight
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
        check_choice("fusion", self.fusion, ("summary",), "MahalanobisVFM")
        check_choice("image_score", self.image_score, IMAGE_SCORES, "MahalanobisVFM")
        check_number("global_weight", self.global_weight, "MahalanobisVFM", "[0, 1]")
        if not isinstance(self.normalize, bool | np.bool_):
            raise InvalidTypeError(
                f"MahalanobisVFM: normalize must be True or False, got {self.normalize!r}."
            )
        check_shrinkage(self.shrinkage, "MahalanobisVFM")

    def _in_shards(self) -> bool:
        return self.calibration != "leave_one_out"

    def _collector(
        self,
        shape: tuple[int, ...],
        n_images: int | None,
        in_flight: int,
        random: np.random.RandomState,
    ) -> MomentsCollector:
        known = (self.patches_.moments_, self.images_.moments_) if hasattr(self, "patches_") else ()
        self.n_features_ = shape[2]
        collector = MomentsCollector(shape[2] // 2, bool(self.normalize), known)
        if self.memory_budget is not None:
            budget = check_memory("memory_budget", self.memory_budget, "MahalanobisVFM")
            per_image = 4 * int(np.prod(shape)) * 4
            fixed = in_flight + 6 * 8 * (shape[2] // 2) ** 2
            if budget < fixed + per_image:
                raise InvalidValueError(
                    f"MahalanobisVFM: memory_budget={budget:,} bytes is too small: the "
                    f"covariances and the images under way take {fixed + per_image:,}. Raise it, "
                    "or lower image_size or batch_size."
                )
            collector.images_per_shard = min((budget - fixed) // per_image, _SHARD_IMAGES)
        return collector

    def _fit_collected(self, collected: MomentsCollector, random: np.random.RandomState) -> None:
        if collected.images.n < 2:
            raise InvalidValueError(
                f"MahalanobisVFM: {collected.images.n} image to fit on has no covariance. Give at "
                "least 4; some are held back for calibration."
            )
        try:
            patches = Gaussian(self.shrinkage).fit_moments(collected.patches)
            images = Gaussian(self.shrinkage).fit_moments(collected.images)
        except InvalidValueError as error:
            raise InvalidValueError(
                f"MahalanobisVFM: the {collected.images.n} images to fit on are too few or too "
                f"much alike for shrinkage={self.shrinkage!r}. Give more that differ, or "
                "shrinkage=0.1."
            ) from error
        self.patches_, self.images_ = patches, images

    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._distances(E, self.patches_, self.images_)

    def _distances(
        self, E: np.ndarray, patches: Gaussian, images: Gaussian
    ) -> tuple[np.ndarray, np.ndarray]:
        X, G = _split(E, bool(self.normalize))
        unit = X.shape[1] ** -0.5
        patch_scores = np.asarray(patches.mahalanobis(X) * unit, np.float32).reshape(E.shape[:3])
        whole = np.asarray(images.mahalanobis(G) * unit, np.float32)
        weight = np.float32(self.global_weight)
        return patch_scores, weight * whole + (1 - weight) * image_scores(
            patch_scores, self.image_score
        )

    def _score_left_out(self, E: Embeddings) -> np.ndarray:
        if len(E) < 4:
            return np.empty(0, np.float32)
        scores = np.empty(len(E), np.float32)
        for i in range(len(E)):
            grid = E[i][None]
            mine = MomentsCollector(grid.shape[3] // 2, bool(self.normalize))
            mine.add(grid, i)
            patches = self.patches_.moments_.without(mine.patches)
            images = self.images_.moments_.without(mine.images)
            scores[i] = self._distances(
                grid,
                Gaussian(self.shrinkage).fit_moments(patches),
                Gaussian(self.shrinkage).fit_moments(images),
            )[1][0]
        return scores

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays: dict[str, np.ndarray] = {}
        state: dict[str, Any] = {"n_features": self.n_features_}
        for name, gaussian in (("patches", self.patches_), ("images", self.images_)):
            moments = gaussian.moments_
            for part in ("mean", "scatter", "cubic"):
                arrays[f"{name}.{part}"] = getattr(moments, part)
            state[name] = {"n": moments.n, "quartic": moments.quartic}
        return arrays, state

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        self.n_features_ = int(state["n_features"])
        for name in ("patches", "images"):
            moments = Moments(self.n_features_ // 2)
            moments.n, moments.quartic = int(state[name]["n"]), float(state[name]["quartic"])
            for part in ("mean", "scatter", "cubic"):
                array = arrays[f"{name}.{part}"]
                if array.shape != getattr(moments, part).shape:
                    raise ValueError(f"{name}.{part} has shape {array.shape}")
                setattr(moments, part, array)
            setattr(self, f"{name}_", Gaussian(self.shrinkage).fit_moments(moments))


class MomentsCollector(Collector):
    """Moments of patches and of whole images."""

    images_per_shard = _SHARD_IMAGES

    def __init__(self, n_features: int, normalize: bool, known: Sequence[Moments] = ()) -> None:
        self.normalize = normalize
        self.patches, self.images = known or (Moments(n_features), Moments(n_features))

    def add(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> None:
        """The moments of one shard alone."""
        n_features = len(self.patches.mean)
        self.patches, self.images = Moments(n_features), Moments(n_features)
        # All at once where they have one size: each sum that joins costs d x d numbers.
        for part in [E] if isinstance(E, np.ndarray) else [grid[None] for grid in E]:
            X, G = _split(part, self.normalize)
            self.patches.add(X)
            self.images.add(G)

    def merge(self, other: Self) -> None:
        """Let those of the other join."""
        self.patches = self.patches.with_(other.patches)
        self.images = self.images.with_(other.images)


def _split(E: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """(B, h, w, 2 d) -> patches (B h w, d) and whole images (B, d), of length 1 if asked."""
    n_features = E.shape[3] // 2
    X = E[..., :n_features].reshape(-1, n_features)
    G = E[:, 0, 0, n_features:]
    if normalize:
        X, G = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (X, G))
    return X, G
