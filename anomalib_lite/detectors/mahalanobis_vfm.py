"""MahalanobisVFM: how far an image and its patches are from the Gaussians of normal ones."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anomalib_lite._validation import (
    check_choice,
    check_image_size,
    check_int,
    check_memory,
    check_number,
)
from anomalib_lite.anomaly_map import IMAGE_SCORES, image_scores
from anomalib_lite.detectors._patch_accumulator import MomentsCollector, split_summary
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.embeddings import Embeddings
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.gaussian import Gaussian, Moments, check_shrinkage
from anomalib_lite.images import ImageSource

__all__ = ["MahalanobisVFM"]


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
    adapt : {None, "lora"}, default=None
        ``"lora"`` adapts the attention of a vision transformer to the images to fit on, against
        synthetic anomalies, before the Gaussians are fitted; see
        :func:`~anomalib_lite.lora.train_adapter` (with what it costs, in docs/lora.md). Needs
        peft, ``calibration="split"`` and images; to score and to load needs no peft.
    rank : int, default=16
        Of the low-rank changes that ``adapt`` learns.
    alpha : float, optional
        They are multiplied by ``alpha / rank``; twice the ``rank`` by default, which is 32 for 16.
    epochs : int, default=10
        Of the adaptation, at most.
    learning_rate : float, default=1e-3
        Of the adaptation.
    adaptive : bool, default=False
        An experiment: with ``adapt``, choose rank and alpha from the features of the images, in
        place of ``rank`` and ``alpha``; see :func:`~anomalib_lite.lora.adaptive_rank`.
    multi_scale : bool, default=False
        An experiment: let each image pass at a quarter, a half and the whole of ``image_size``
        (126, 252 and 518 with patches of 14 pixels and ``image_size=518``), the features side by
        side.
    attention_guided : bool, default=False
        An experiment: multiply the distance of each patch by the attention that the class token
        pays to it in the last layer, in units of its mean over the image.
    normalize : bool, default=True
        Whether features are divided by their length, patch by patch and image by image.
    shrinkage : {"ledoit_wolf", "oas"} or float in [0, 1], default="ledoit_wolf"
        Of both covariances; see :class:`~anomalib_lite.gaussian.Gaussian`.
    global_weight : float in [0, 1], default=0.5
        Share of the whole image's distance in the image score; the rest is that of its patches.
    image_score : {"max", "top1%", "smoothed"}, default="max"
        How the patches of an image become one number: the largest, the mean of the largest 1 %,
        or the largest after smoothing over neighbours.
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
    adapter_ : Adapter or None
        What ``adapt`` has learned, with the losses of each epoch in ``adapter_.history``.
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
        _check_bool("normalize", self.normalize)
        check_shrinkage(self.shrinkage, "MahalanobisVFM")
        self._check_adaptation()

    def _check_adaptation(self) -> None:
        where = "MahalanobisVFM"
        for name in ("adaptive", "multi_scale", "attention_guided"):
            _check_bool(name, getattr(self, name))
        check_int("rank", self.rank, where, low=1)
        check_int("epochs", self.epochs, where, low=1)
        if self.alpha is not None:
            check_number("alpha", self.alpha, where, "(0, inf)")
        check_number("learning_rate", self.learning_rate, where, "(0, 1)")
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
                f"{where}: adapt='lora' needs calibration='split': what was learned from an image "
                "cannot be taken back to leave it out."
            )
        if self.memory_budget is not None:
            raise InvalidValueError(
                f"{where}: adapt='lora' holds up to 512 images and the gradients of a network, "
                "which no memory_budget bounds. Use adapt=None, or no memory_budget."
            )

    def fit_embeddings(self, E: Any, y: object = None) -> Self:
        """As in :class:`BaseDetector`; ``adapt`` must be None, for it needs images."""
        if self.adapt is not None:
            raise InvalidValueError(
                "MahalanobisVFM: adapt='lora' needs images to adapt to, got embeddings. Call "
                "fit(images), or set adapt=None."
            )
        super().fit_embeddings(E, y)
        self.__dict__.pop("adapter_", None)
        return self

    def _backbone_options(self) -> dict[str, Any]:
        scales = (0.25, 0.5, 1.0) if self.multi_scale else (1.0,)
        return super()._backbone_options() | {"scales": scales, "attention": self.attention_guided}

    def _open_to_fit(self, source: ImageSource, random: np.random.RandomState) -> AnyBackbone:
        if self.adapt is None:
            return super()._open_to_fit(source, random)
        from anomalib_lite.lora import check_peft, train_adapter  # torch, only for those who ask

        check_peft("MahalanobisVFM")
        plain = {"scales": (1.0,), "attention": False}
        network: Any = self._open_backbone(engine="torch", dtype="float32", **plain)
        check_image_size(self.image_size, "MahalanobisVFM", stride=network.stride)
        adapter = train_adapter(
            network,
            source,
            image_size=self.image_size,
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
        if shape[2] % 2 != int(self.attention_guided):
            raise InvalidValueError(
                "MahalanobisVFM: embeddings must have the features of a patch, as many of its image"
                + (", and the attention" * bool(self.attention_guided))
                + f"; got {shape[2]} numbers with attention_guided={self.attention_guided}."
            )
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
            collector.images_per_shard = min(
                (budget - fixed) // per_image, MomentsCollector.images_per_shard
            )
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
        X, G = split_summary(E, bool(self.normalize))
        unit = X.shape[1] ** -0.5
        patch_scores = np.asarray(patches.mahalanobis(X) * unit, np.float32).reshape(E.shape[:3])
        if self.attention_guided:
            patch_scores = patch_scores * E[..., -1]
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


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool | np.bool_):
        raise InvalidTypeError(f"MahalanobisVFM: {name} must be True or False, got {value!r}.")
