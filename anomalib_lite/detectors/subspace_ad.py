"""SubspaceAD: how far patches are from the subspace in which normal ones vary."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anomalib_lite.anomaly_map import check_image_score
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.fitting import Accumulator, images_within_budget
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.gaussian import Moments
from anomalib_lite.images.augmentation import check_augment, refuse_augment
from anomalib_lite.images.embeddings import Embeddings, patch_rows
from anomalib_lite.subspace import Subspace, check_components

__all__ = ["SubspaceAD"]


class SubspaceAD(BaseDetector):
    """Calls patches anomalous that principal components of normal patches cannot describe.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="efficientnet_lite0"
        As in :class:`~anomalib_lite.PatchCore`; so are ``weights``, ``layers``, ``image_size``,
        ``smoothing``, ``false_alarm_rate``, ``false_alarm_confidence``,
        ``device``, ``dtype``, ``engine``, ``batch_size``,
        ``n_jobs``, ``on_error``, ``max_pixels`` and ``verbose``. In the paper:
        ``"vit_giant_patch14_reg4_dinov2.lvd142m"`` with ``image_size=672``.
    fusion : {"concat", "single", "mean", "nearest", "weighted", "adaptive", "per_layer"}, \
default="concat"
        How the maps of several layers become one embedding a patch; see
        :class:`~anomalib_lite.PatchCore`.
    layer_weights, feature_dim, projection, whiten, whiten_shrinkage
        As in :class:`~anomalib_lite.PatchCore`: how embeddings are changed before all else.
    normalize : bool, default=False
        Whether to divide each embedding by its length after that.
    augment : {"rotations", "flips", "brightness"} or tuple of these, optional
        Transformed copies of the images to fit on; see :class:`~anomalib_lite.PatchCore`. The paper
        has 30 rotations of each of few images.
    n_components : int or float in (0, 1), default=0.99
        Number of principal components, or the share of the variance that they hold; see
        :class:`~anomalib_lite.subspace.Subspace`.
    image_score : {"max", "top<p>%", "top<p>% pixels", "smoothed", "structure"}, default="top1%"
        How the patch scores of an image become one; see :class:`~anomalib_lite.PatchCore`. The
        paper has ``"top1% pixels"``.
    calibration : {"auto", "split", "cross", "leave_one_out"}, default="split"
        As in :class:`~anomalib_lite.PaDiM`. ``"leave_one_out"`` finds the components anew for each
        image.
    memory_budget : int or str, optional
        As in :class:`~anomalib_lite.PaDiM`.
    random_state : int, RandomState or None, default=0
        Seed of the choice of calibration images.

    Attributes
    ----------
    subspace_ : Subspace
        Mean and principal components of the normal patches.
    threshold_, pixel_threshold_, calibration_, calibration_scores_, calibration_peaks_, \
calibration_groups_, calibration_names_, n_features_, backbone_, dtype_, engine_, skipped_, \
ignore_mask_, map_statistics_
        As in :class:`~anomalib_lite.PatchCore`.

    Notes
    -----
    Lendering, Akdag and Bondarev, "SubspaceAD: Training-Free Few-Shot Anomaly Detection via
    Subspace Modeling", 2026, arXiv:2602.23013: with the mean m of the normal patches and their
    principal components V, a patch x has the score :math:`|(I - V^T V)(x - m)|^2`. It is squared,
    so scores, maps and threshold are in squares of the features' units. We deviate in that layers
    are put side by side and not averaged, that images are rotated only with ``augment``, and that
    the image score is a mean of patches.

    D (D + 1) / 2 numbers of 8 bytes are kept in the file, whatever the number of images.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite import SubspaceAD
    >>> rng = np.random.default_rng(0)
    >>> good = rng.integers(100, 140, (30, 64, 96, 3), dtype=np.uint8)
    >>> bad = good[:1].copy()
    >>> bad[0, 20:40, 30:60] = 255
    >>> detector = SubspaceAD(image_size=64, false_alarm_rate=0.2).fit(good)
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
        fusion: str = "concat",
        layer_weights: Sequence[float] | None = None,
        feature_dim: int | None = None,
        projection: str = "pca",
        whiten: bool = False,
        whiten_shrinkage: float = 0.07,
        normalize: bool = False,
        image_size: int | tuple[int, int] | str = 256,
        augment: str | Sequence[str] | None = None,
        n_components: int | float = 0.99,
        image_score: str = "top1%",
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
        self.augment = augment
        self.n_components = n_components
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
        check_components(self.n_components, "SubspaceAD")
        check_image_score(self.image_score, "SubspaceAD", "structure")
        if self.augment is not None:
            check_augment(self.augment, "SubspaceAD")

    def _check_fit_on_embeddings(self) -> None:
        super()._check_fit_on_embeddings()
        if self.augment is not None:
            refuse_augment("SubspaceAD", self.augment)

    def _fits_in_shards(self) -> bool:
        return self._calibrates_by == "split"

    def _make_accumulator(
        self,
        shape: tuple[int, ...],
        n_images: int | None,
        in_flight: int,
        random: np.random.RandomState,
    ) -> PatchMoments:
        n_features = shape[2]
        known = self.subspace_.moments_ if hasattr(self, "subspace_") else Moments(n_features)
        accumulator = PatchMoments(known)
        if self.memory_budget is not None:
            accumulator.images_per_shard = images_within_budget(
                "SubspaceAD",
                self.memory_budget,
                fixed=in_flight + 6 * 8 * n_features**2,
                per_image=4 * int(np.prod(shape)) * 4,
                at_most=PatchMoments.images_per_shard,
                for_what="the scatter of the patches and the images under way",
            )
        return accumulator

    def _fit_accumulated(self, accumulated: PatchMoments, random: np.random.RandomState) -> None:
        self.subspace_ = self._find(accumulated.moments)

    def _find(self, moments: Moments) -> Subspace:
        """Find the subspace of patches; it must not be all of space, or no patch is far from it."""
        n_features = len(moments.mean)
        try:
            subspace = Subspace(self.n_components).fit_moments(moments)
        except InvalidValueError as error:
            message = str(error).removeprefix("Subspace: ")
            raise InvalidValueError(f"SubspaceAD: {message}") from error
        if subspace.n_components_ == n_features:
            raise InvalidValueError(
                f"SubspaceAD: n_components={self.n_components} takes all {n_features} directions "
                "of the embeddings, and leaves none in which a patch could differ. Lower it."
            )
        return subspace

    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ignored = np.isnan(E[..., 0])
        patch_scores = np.zeros(E.shape[:3], np.float32)
        patch_scores[~ignored] = self.subspace_.sq_residual(patch_rows(E))
        return patch_scores, self._score_maps(patch_scores, ignored)

    def _without(self, own: Embeddings, first: int, fitted: None) -> Self | None:
        all_images = self.subspace_.moments_
        left_out = Moments(len(all_images.mean))
        left_out.add(patch_rows(own))
        if left_out.n == all_images.n:
            return None
        rest = copy.copy(self)
        rest.subspace_ = self._find(all_images.without(left_out))
        return rest

    def _summary_lines(self) -> list[tuple[str, str]]:
        k, n = self.subspace_.n_components_, self.subspace_.n_samples_seen_
        return [("subspace", f"{k} of {self.n_features_} directions, of {n:,} patches")]

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        moments = self.subspace_.moments_
        lower = np.tril_indices(self.n_features_)  # the scatter is symmetric
        arrays = {"mean": moments.mean, "scatter": moments.scatter[lower]}
        return arrays, {"n_features": self.n_features_, "n": moments.n}

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        self.n_features_ = d = int(state["n_features"])
        moments, lower = Moments(d), np.tril_indices(d)
        moments.n = int(state["n"])
        for name, shape in (("mean", (d,)), ("scatter", lower[0].shape)):
            if arrays[name].shape != shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}")
        moments.mean = arrays["mean"]
        moments.scatter[lower] = arrays["scatter"]
        moments.scatter.T[lower] = arrays["scatter"]
        self.subspace_ = self._find(moments)


class PatchMoments(Accumulator):
    """Moments of patches.

    Parameters
    ----------
    moments : Moments
        Moments to which those of the shards are added.
    """

    images_per_shard = 32  # images whose embeddings are in memory, if no budget says how many

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def accumulate(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> Self:
        """Return an accumulator of the moments of the shard alone."""
        shard = copy.copy(self)
        shard.moments = Moments(len(self.moments.mean))
        # Together if they have one size: each sum of moments costs d x d numbers.
        for block in [E] if isinstance(E, np.ndarray) else E:
            shard.moments.add(patch_rows(block[None] if block.ndim == 3 else block))
        return shard

    def merge(self, other: Self) -> None:
        """Add the moments of the other."""
        self.moments = self.moments.merged_with(other.moments)
