"""MahalanobisVFM: how far an image and its patches are from the Gaussians of normal ones."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anomalib_lite._validation import (
    check_bool,
    check_choice,
    check_image_size,
    check_int,
    check_number,
)
from anomalib_lite.anomaly_map import check_image_score
from anomalib_lite.detectors._transforming import BY_LAYER
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.fitting import Accumulator, images_within_budget
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.gaussian import Gaussian, Moments, check_shrinkage
from anomalib_lite.images import ImageSource
from anomalib_lite.images.augmentation import check_augment, n_versions, refuse_augment
from anomalib_lite.images.embeddings import Embeddings

__all__ = ["MahalanobisVFM"]


class MahalanobisVFM(BaseDetector):
    """Calls images and patches anomalous that are far from the mean of normal ones.

    Meant for vision foundation models, whose features of normal images are nearly Gaussian; any
    backbone can be used. There are two Gaussians: one of whole images (the class token of a
    transformer, the mean over all positions of a CNN), which sees that something is odd, and
    one of patches, which sees where.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="efficientnet_lite0"
        As in :class:`~anomalib_lite.PatchCore`; so are ``weights``, ``layers``,
        ``image_size``, ``smoothing``, ``false_alarm_rate``, ``false_alarm_confidence``,
        ``device``, ``dtype``, ``engine``,
        ``batch_size``, ``n_jobs``, ``on_error``, ``max_pixels`` and ``verbose``. For a
        foundation model: ``"vit_base_patch14_dinov2.lvd142m"``, with ``weights`` if there is
        no network.
    fusion : {"summary", "weighted", "adaptive", "per_layer"}, default="summary"
        How features become embeddings: those of a patch beside those of its image; see
        :mod:`~anomalib_lite.fusion`. ``"weighted"`` and ``"adaptive"`` multiply those of each layer
        by a weight, and ``"per_layer"`` fits Gaussians to each layer, as in
        :class:`~anomalib_lite.PatchCore`; not with ``multi_scale``.
    layer_weights, feature_dim, projection, whiten, whiten_shrinkage
        As in :class:`~anomalib_lite.PatchCore`. They are learned from patches, and change those and
        the features of images alike.
    augment : {"rotations", "flips", "brightness"} or tuple of these, optional
        Transformed copies of the images to fit on; see :class:`~anomalib_lite.PatchCore`. ``adapt``
        sees the images without their copies.
    adapt : {None, "lora"}, default=None
        ``"lora"`` adapts the attention of a vision transformer to the images to fit on, against
        synthetic anomalies, before the Gaussians are fitted; see
        :func:`~anomalib_lite.lora.train_adapter` (docs/lora.md says what it costs). Needs peft,
        ``calibration="split"`` and images; scoring and loading need no peft.
    rank : int, default=16
        Rank of the LoRA update.
    alpha : float, optional
        Scale of the LoRA update, which is multiplied by ``alpha / rank``; by default twice the
        ``rank``.
    epochs : int, default=10
        Maximum number of LoRA training epochs.
    learning_rate : float, default=1e-3
        Learning rate of the LoRA training.
    adaptive : bool, default=False
        An experiment: with ``adapt``, choose rank and alpha from the features of the images,
        instead of ``rank`` and ``alpha``; see :func:`~anomalib_lite.lora.adaptive_rank`.
    multi_scale : bool, default=False
        An experiment: embed each image at a quarter, a half and the whole of ``image_size``
        (126, 252 and 518 with patches of 14 pixels and ``image_size=518``), and put the features
        side by side.
    attention_guided : bool, default=False
        An experiment: multiply the distance of each patch by the attention that the class token
        pays to it in the last layer, in units of its mean over the image.
    normalize : bool, default=True
        Whether to divide features by their length, patch by patch and image by image.
    shrinkage : {"ledoit_wolf", "oas"} or float in [0, 1], default="ledoit_wolf"
        Shrinkage of both covariances; see :class:`~anomalib_lite.gaussian.Gaussian`.
    global_weight : float in [0, 1], default=0.5
        Weight of the whole image's distance in the image score; the patches have the rest.
    image_score : {"max", "top<p>%", "top<p>% pixels", "smoothed", "structure"}, default="max"
        How the patch scores of an image become one; see :class:`~anomalib_lite.PatchCore`.
        ``"structure"`` counts in standard deviations and not in distances, so it needs
        ``global_weight=0``.
    calibration : {"auto", "split", "cross", "leave_one_out"}, default="split"
        As in :class:`~anomalib_lite.PaDiM`.
    memory_budget : int or str, optional
        As in :class:`~anomalib_lite.PaDiM`.
    random_state : int, RandomState or None, default=0
        Seed of the choice of calibration images.

    Attributes
    ----------
    patches_, images_ : Gaussian
        Gaussians of patches and of whole images; each has D / 2 features.
    adapter_ : Adapter or None
        The LoRA update that ``adapt`` learned; ``adapter_.history`` has the losses of each epoch.
    threshold_, pixel_threshold_, calibration_, calibration_scores_, calibration_peaks_, \
calibration_groups_, calibration_names_, n_features_, backbone_, dtype_, engine_, skipped_, \
ignore_mask_, map_statistics_
        As in :class:`~anomalib_lite.PatchCore`.

    Notes
    -----
    With the rooted Mahalanobis distances g of the image and :math:`p_{ij}` of its patches, the
    map shows :math:`p_{ij} / \\sqrt{d}` and the score is

    .. math:: w \\, \\frac{g}{\\sqrt{d}} + (1 - w) \\max_{ij} \\frac{p_{ij}}{\\sqrt{d}}

    with d features and w the ``global_weight``. A normal vector has a squared distance of about
    d, so both terms are about 1 for normal images, and can be added. Gaussians of deep features:
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
        layer_weights: Sequence[float] | None = None,
        feature_dim: int | None = None,
        projection: str = "pca",
        whiten: bool = False,
        whiten_shrinkage: float = 0.07,
        image_size: int | tuple[int, int] | str = 256,
        augment: str | Sequence[str] | None = None,
        adapt: str | None = None,
        rank: int = 16,
        alpha: float | None = None,
        epochs: int = 10,
        learning_rate: float = 1e-3,
        adaptive: bool = False,
        multi_scale: bool = False,
        attention_guided: bool = False,
        normalize: bool = True,
        shrinkage: str | float = "ledoit_wolf",
        global_weight: float = 0.5,
        image_score: str = "max",
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
        self.image_size = image_size
        self.augment = augment
        self.adapt = adapt
        self.rank = rank
        self.alpha = alpha
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.adaptive = adaptive
        self.multi_scale = multi_scale
        self.attention_guided = attention_guided
        self.normalize = normalize
        self.shrinkage = shrinkage
        self.global_weight = global_weight
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

    _fusions = ("summary", *BY_LAYER)
    _layout = "summary"
    _copies = 2
    _asking = ("feature_dim", "whiten")

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_image_score(self.image_score, "MahalanobisVFM", "structure")
        check_number("global_weight", self.global_weight, "MahalanobisVFM", "[0, 1]")
        if self.image_score == "structure" and self.global_weight != 0:
            raise InvalidValueError(
                "MahalanobisVFM: image_score='structure' cannot be averaged with the distance of "
                f"the whole image. Set global_weight=0, got {self.global_weight!r}."
            )
        check_bool("normalize", self.normalize, "MahalanobisVFM")
        check_shrinkage(self.shrinkage, "MahalanobisVFM")
        if self.augment is not None:
            check_augment(self.augment, "MahalanobisVFM")
        self._check_adaptation()

    def _check_adaptation(self) -> None:
        where = "MahalanobisVFM"
        for name in ("adaptive", "multi_scale", "attention_guided"):
            check_bool(name, getattr(self, name), where)
        check_int("rank", self.rank, where, low=1)
        check_int("epochs", self.epochs, where, low=1)
        if self.alpha is not None:
            check_number("alpha", self.alpha, where, "(0, inf)")
        check_number("learning_rate", self.learning_rate, where, "(0, 1)")
        if self.multi_scale and self.fusion in BY_LAYER:
            raise InvalidValueError(
                f"{where}: fusion={self.fusion!r} needs one map a layer, which multi_scale=True "
                "does not give. Set one of them only."
            )
        if self.adapt is None:
            if self.adaptive:
                raise InvalidValueError(
                    f"{where}: adaptive=True chooses the rank of an adaptation, got adapt=None. "
                    "Set adapt='lora'."
                )
            return
        check_choice("adapt", self.adapt, ("lora",), where)
        if self.calibration == "leave_one_out":
            raise InvalidValueError(
                f"{where}: adapt='lora' needs calibration='split': an image that the adapter has "
                "learned from cannot be left out afterwards."
            )
        if self.memory_budget is not None:
            raise InvalidValueError(
                f"{where}: adapt='lora' holds up to 512 images and the gradients of a network, "
                "which no memory_budget bounds. Use adapt=None, or no memory_budget."
            )

    def _cannot_cross(self) -> str | None:
        if self.adapt is not None:
            return "leaves out images that the adapter of adapt='lora' has learned from"
        return super()._cannot_cross()

    def _check_fit_on_embeddings(self) -> None:
        super()._check_fit_on_embeddings()
        if self.augment is not None:
            refuse_augment("MahalanobisVFM", self.augment)
        if self.adapt is not None:
            raise InvalidValueError(
                "MahalanobisVFM: adapt='lora' needs images to adapt to, got embeddings. Call "
                "fit(images), or set adapt=None."
            )

    def _open_backbone(self, **instead: Any) -> AnyBackbone:
        scales = (0.25, 0.5, 1.0) if self.multi_scale else (1.0,)
        options = {"scales": scales, "attention": self.attention_guided}
        return super()._open_backbone(**(options | instead))

    def _open_to_fit(
        self, images: ImageSource, size: int | tuple[int, int], random: np.random.RandomState
    ) -> AnyBackbone:
        if self.adapt is None:
            return super()._open_to_fit(images, size, random)
        from anomalib_lite.lora import check_peft, train_adapter  # torch, only for those who ask

        check_peft("MahalanobisVFM")
        plain = {"scales": (1.0,), "attention": False}
        network: Any = self._open_backbone(engine="torch", dtype="float32", **plain)
        check_image_size(size, "MahalanobisVFM", stride=network.stride)
        n_held_back = self._n_to_hold_back(len(images), images.groups)
        to_fit = images.take(range(len(images) - n_held_back))
        adapter = train_adapter(
            network,
            to_fit,
            image_size=size,
            rank="adaptive" if self.adaptive else self.rank,
            alpha=None if self.adaptive else self.alpha,
            shrinkage=self.shrinkage,
            normalize=bool(self.normalize),
            dtype=self.dtype,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            on_error=self.on_error,
            random=random,
            verbose=self.verbose,
        )
        sha256 = network.sha256
        del network
        gc.collect()  # its hooks and itself hold each other
        return self._open_backbone(adapter=adapter, sha256=sha256)

    def _take_backbone(self, backbone: AnyBackbone) -> None:
        super()._take_backbone(backbone)
        self.adapter_ = backbone.adapter

    def _fits_in_shards(self) -> bool:
        return self._calibrates_by == "split"

    def _make_accumulator(
        self,
        shape: tuple[int, ...],
        n_images: int | None,
        in_flight: int,
        random: np.random.RandomState,
    ) -> MomentsAccumulator:
        n_features = shape[2] // 2
        if shape[2] % 2 != int(self.attention_guided):
            attention = ", and the attention" if self.attention_guided else ""
            raise InvalidValueError(
                "MahalanobisVFM: embeddings must have the features of a patch, as many of its image"
                f"{attention}; got {shape[2]} numbers with "
                f"attention_guided={self.attention_guided}."
            )
        patches, images = Moments(n_features), Moments(n_features)
        if hasattr(self, "patches_"):
            patches, images = self.patches_.moments_, self.images_.moments_
        accumulator = MomentsAccumulator(patches, images, bool(self.normalize))
        if self.memory_budget is not None:
            accumulator.images_per_shard = images_within_budget(
                "MahalanobisVFM",
                self.memory_budget,
                fixed=in_flight + 6 * 8 * n_features**2,
                per_image=4 * int(np.prod(shape)) * 4,
                at_most=MomentsAccumulator.images_per_shard,
                for_what="the covariances and the images under way",
            )
        return accumulator

    def _fit_accumulated(
        self, accumulated: MomentsAccumulator, random: np.random.RandomState
    ) -> None:
        n = accumulated.images.n
        if n < 2:
            raise InvalidValueError(
                f"MahalanobisVFM: {n} image to fit on has no covariance. Give at least 4; some "
                "are held back for calibration."
            )
        try:
            patches = Gaussian(self.shrinkage).fit_moments(accumulated.patches)
            images = Gaussian(self.shrinkage).fit_moments(accumulated.images)
        except InvalidValueError as error:
            raise InvalidValueError(
                f"MahalanobisVFM: the {n} images to fit on are too few or too much alike for "
                f"shrinkage={self.shrinkage!r}. Give more that differ, or shrinkage=0.1."
            ) from error
        self.patches_, self.images_ = patches, images

    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        X, G = split_patches_and_image(E, bool(self.normalize))
        unit = X.shape[1] ** -0.5
        ignored = np.isnan(E[..., 0])
        patch_scores = np.zeros(E.shape[:3], np.float32)
        patch_scores[~ignored] = self.patches_.mahalanobis(X) * unit
        if self.attention_guided:
            patch_scores = np.where(ignored, np.float32(0), patch_scores * E[..., -1])
        whole = np.asarray(self.images_.mahalanobis(G) * unit, np.float32)
        weight = np.float32(self.global_weight)
        scores = self._score_maps(patch_scores, ignored)
        return patch_scores, scores if weight == 0 else weight * whole + (1 - weight) * scores

    def _without(self, own: Embeddings, first: int, fitted: None) -> Self | None:
        patches, images = self.patches_.moments_, self.images_.moments_
        n_features = len(patches.mean)
        empty = MomentsAccumulator(Moments(n_features), Moments(n_features), bool(self.normalize))
        left_out = empty.accumulate(own, first)
        if images.n - left_out.images.n < 3 * n_versions(self.augment):
            return None
        rest = copy.copy(self)
        rest.patches_ = Gaussian(self.shrinkage).fit_moments(patches.without(left_out.patches))
        rest.images_ = Gaussian(self.shrinkage).fit_moments(images.without(left_out.images))
        return rest

    def _summary_lines(self) -> list[tuple[str, str]]:
        patches, images = self.patches_.moments_.n, self.images_.moments_.n
        return [("gaussians", f"of {patches:,} patches and {images:,} images")]

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


class MomentsAccumulator(Accumulator):
    """Moments of patches and of whole images.

    Parameters
    ----------
    patches, images : Moments
        Moments to which those of the shards are added.
    normalize : bool
        Whether features are divided by their length.
    """

    images_per_shard = 32  # images whose embeddings are in memory, if no budget says how many

    def __init__(self, patches: Moments, images: Moments, normalize: bool) -> None:
        self.patches, self.images, self.normalize = patches, images, normalize

    def accumulate(self, E: Embeddings, position: int, existing: np.ndarray | None = None) -> Self:
        """Return an accumulator of the moments of the shard alone."""
        shard, n_features = copy.copy(self), len(self.patches.mean)
        shard.patches, shard.images = Moments(n_features), Moments(n_features)
        # Together if they have one size: each sum of moments costs d x d numbers.
        for block in [E] if isinstance(E, np.ndarray) else [grid[None] for grid in E]:
            X, G = split_patches_and_image(block, self.normalize)
            shard.patches.add(X)
            shard.images.add(G)
        return shard

    def merge(self, other: Self) -> None:
        """Add the moments of the other."""
        self.patches = self.patches.merged_with(other.patches)
        self.images = self.images.merged_with(other.images)


def split_patches_and_image(E: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Split embeddings (B, h, w, 2 d) into patches (n, d) and whole images (B, d).

    With ``normalize`` each has length 1. The attention, which may come last, is left out; so are
    ignored patches.
    """
    n_features = E.shape[3] // 2
    X = E[..., :n_features].reshape(-1, n_features)
    seen = ~np.isnan(X[:, 0])
    first = seen.reshape(len(E), -1).argmax(axis=1)  # every patch that is seen names its image
    G = E.reshape(len(E), -1, E.shape[3])[np.arange(len(E)), first, n_features : 2 * n_features]
    X = X if seen.all() else X[seen]
    if normalize:
        X, G = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (X, G))
    return X, G
