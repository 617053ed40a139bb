"""PatchCore: the distance of each patch to its nearest neighbour among normal patches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anomalib_lite._device import device_of
from anomalib_lite._validation import (
    check_bool,
    check_choice,
    check_int,
    check_memory,
    check_number,
)
from anomalib_lite.anomaly_map import check_image_score, image_scores
from anomalib_lite.coreset import METHODS, select_coreset
from anomalib_lite.coreset import coreset_size as check_share
from anomalib_lite.detectors._foreground import (
    check_foreground,
    learn_foreground,
    object_patches,
    sample_bytes,
)
from anomalib_lite.detectors._patch_accumulator import PatchAccumulator, plan_patches
from anomalib_lite.detectors._position_window import (
    PatchBank,
    check_position_window,
    window_reach,
)
from anomalib_lite.detectors._reweighting import SUPPORT_SIZE, reweight_by_bank
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.fusion import unit_rows
from anomalib_lite.images.augmentation import check_augment, refuse_augment
from anomalib_lite.images.embeddings import Embeddings
from anomalib_lite.images.tiling import check_tiles
from anomalib_lite.memory_bank import check_index, serialize

__all__ = ["PatchCore"]


# Image scores that may rise when the bank grows.
_MAY_RISE = ("reweighted", "structure")


class PatchCore(BaseDetector):
    """Calls patches anomalous that are far from all normal patches.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="efficientnet_lite0"
        The embedded network, any timm name, or a module; see
        :class:`~anomalib_lite.backbones.Backbone`.
    weights : str or Path, optional
        Weights file for a timm name; by default they come from the hub.
    layers : sequence of str or int, optional
        Layers to use; by default strides 8 and 16, or two blocks of a vision transformer.
    fusion : {"concat", "single", "mean", "nearest", "weighted", "adaptive", "per_layer"}, \
default="concat"
        How the maps of several layers become one embedding a patch; see
        :func:`~anomalib_lite.fusion.patch_embeddings`. ``"weighted"`` is ``"concat"`` with each
        layer multiplied by one of ``layer_weights``; ``"adaptive"`` chooses these so that each
        layer has the same variance over normal patches. ``"per_layer"`` has one bank for each
        layer, and averages the maps, as RAD and SuperAD do; not with ``"reweighted"``.
    layer_weights : sequence of float, optional
        For ``fusion="weighted"``: one number above 0 for each layer.
    feature_dim : int, optional
        Length that embeddings are shortened to; by default they stay as they are. Learned, as is
        ``whiten``, from the patches of at most 64 of the images to fit on, none of them held back
        for calibration; see :class:`~anomalib_lite.fusion.EmbeddingTransform`.
    projection : {"pca", "gaussian_random"}, default="pca"
        How: to the principal components of normal patches, or to random directions.
    whiten : bool, default=False
        Whether to multiply by the inverse square root of the covariance of normal patches, so that
        distances are Mahalanobis distances, as MH-PatchCore does.
    whiten_shrinkage : float in [0, 1], default=0.07
        Weight of the multiple of the identity in that covariance.
    normalize : bool, default=False
        Whether to divide each embedding by its length, so that patches are compared by their
        direction, as AnomalyDINO and RAD do; meant for vision transformers.
    image_size : int, (int, int) or "auto", default="auto"
        Size at which images go through the backbone. An int is the shorter side in pixels, the
        aspect is kept; a pair (H, W) is exact. ``"auto"`` depends on the shorter side of the images
        to fit on: 256 if that is below 160 pixels, 320 if below 512, else 448; see ``image_size_``.
    tile : int, optional
        Side in pixels of the squares that large images are cut into; each goes through the
        backbone at ``image_size``, no pair, so small defects keep their size. All tiles share one
        bank. Without it, the whole image is resized.
    overlap : int, default=0
        Pixels that neighbouring tiles share at least, below ``tile``. A patch comes from the tile
        in which it lies most central.
    augment : {"rotations", "flips", "brightness"} or tuple of these, optional
        Transformed copies of the images to fit on, for few of them: 7 rotations in steps of 45
        degrees, 2 mirror images, or 2 copies that are 0.8 and 1.2 times as bright; of several,
        all. Images held back for calibration get none. Time and memory of :meth:`fit`, and with
        ``coreset_ratio`` the bank, grow with the number of images and copies. With
        ``position_window`` only ``"brightness"``, since the others move patches.
    coreset_size : int, default=5000
        Number of patches kept in the bank, from all images together; all of them if there are
        fewer. Of these, images held back for calibration, which join the bank afterwards, add as
        large a part as they are of the images. The bank has exactly this number, or one more, for
        images of any sizes, except with ``memory_budget``; see Notes. Images of a later
        :meth:`partial_fit` add a share of ``coreset_ratio_`` of their patches: they make the bank
        larger, also if few came first and all of their patches were kept.
    coreset_ratio : float, optional
        Share of all patches kept in the bank, in (0, 1], in place of ``coreset_size``.
    coreset : {"greedy", "random", "kmeans"}, default="greedy"
        How the patches to keep are chosen.
    n_neighbors : int, default=1
        Number of nearest patches of the bank; their mean distance is a patch's score.
    image_score : {"max", "top<p>%", "top<p>% pixels", "smoothed", "structure", "reweighted"}, \
default="max"
        How the patch scores of an image become one: the largest; the mean of the largest p % of
        patches or of pixels, such as ``"top1%"``; the largest after smoothing; how far spread,
        peak and roughness of the map are from those of normal maps, which are learned from half of
        the images held back; or Equation 7 of the paper (b = 9), which needs ``n_neighbors=1``.
        See :func:`~anomalib_lite.anomaly_map.image_scores`.
    position_window : int, optional
        Compares each patch only with bank patches at most so many patches away in row and in
        column, for parts that always lie in the same place. Positions are those in the grid of the
        first image fitted on, to which images of other sizes are scaled. By default a patch is
        compared with all. Needs ``index="flat"``; not with ``"reweighted"``; see Notes.
    foreground : bool, default=False
        Whether patches of the background score 0, for an object in the middle of the image. What
        is background is learned from the images to fit on; an error says if they show no clear
        object. A part that is missing at the edge of the object looks like background, and is not
        found. See Notes.
    index : str, default="flat"
        ``"flat"`` for exact search, or a FAISS index-factory string.
    nprobe, ef_search : int, optional
        How much of an index ``"IVF..."`` or ``"HNSW..."`` is searched; see
        :class:`~anomalib_lite.MemoryBank`.
    smoothing : float, default=4.0
        Standard deviation of the Gaussian that smooths heatmaps, in pixels of ``image_size``.
    false_alarm_rate : float, default=0.01
        Share of future normal images that may be called anomalous, in (0, 1).
    false_alarm_confidence : float, optional
        Probability, in (0, 1), that the rate of this very threshold is at most
        ``false_alarm_rate``, over draws of the images held back, of which it needs more. By
        default the mean over draws is; see
        :func:`~anomalib_lite.calibration.conformal_threshold`. An estimate with
        ``"leave_one_out"``, and not with ``"cross"``.
    calibration : {"auto", "split", "cross", "leave_one_out"}, default="split"
        ``"split"`` holds images back (as many as the rate needs, a fifth to half of all) and takes
        the threshold from their scores, with a finite-sample guarantee. Then it adds their patches
        to the bank if that can only lower scores (any coreset, ``index="flat"``, not
        ``"reweighted"`` or ``"structure"``), which keeps the guarantee. ``"cross"`` holds nothing
        back: it scores each of ten parts of the images (whole groups) against the bank without the
        patches of that part, which is filled up again from the other images; so the threshold rests
        on all images. ``"leave_one_out"`` does so with each image by itself. What is known of their
        rates is less; see docs/calibration.md.
        ``"auto"`` is ``"cross"`` for at most 500 images (with their copies) that no other parameter
        forbids and that do not come once, else ``"split"``.
    device : {"auto", "cpu", "cuda", "mps"}, default="auto"
        Device of the backbone and of the search.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Number type of the backbone; the choice of "auto" is in ``dtype_``.
    engine : {"auto", "torch", "openvino", "onnxruntime"}, default="auto"
        What runs the backbone. "auto" is OpenVINO on a CPU if it is installed and the network
        converts, else torch; its choice is in ``engine_``.
    batch_size : int, default=32
        Images decoded and embedded at a time.
    memory_budget : int or str, optional
        Most memory that :meth:`fit` may take above the idle process, in bytes or as "512MB",
        "2GB" or "1GiB", for any number of images. If not all patches fit, the images are taken in
        shards, and a coreset of the patches of each shard is kept; see Notes. Not with
        ``calibration="cross"`` or ``"leave_one_out"``.
    n_jobs : int, optional
        Number of workers that embed the images of :meth:`fit`, through joblib: processes of this
        machine (-1: one a core), or a cluster set by ``joblib.parallel_config("dask")`` and the
        like. The result is the same for any number. ``memory_budget`` holds for each process.
    on_error : {"raise", "skip"}, default="raise"
        What to do about an image that cannot be read: raise, or leave it out and list it in
        ``skipped_`` (or in ``Detections.skipped``).
    max_pixels : int, default=100_000_000
        Pixels of the largest image allowed; a larger one is refused before it is decoded.
    random_state : int, RandomState or None, default=0
        Seed of the coreset's first centre and of the choice of calibration images.
    verbose : int, default=0
        1 shows progress bars (in a terminal only).

    Attributes
    ----------
    memory_bank_ : MemoryBank
        The normal patches kept.
    threshold_ : float
        Score above which an image is called anomalous. Assign to it to set your own, which stays in
        :meth:`partial_fit`.
    calibrated_threshold_ : float
        The threshold that the calibration gave.
    calibration_ : {"split", "cross", "leave_one_out"}
        How it did so; :meth:`partial_fit` goes on with it. After :meth:`recalibrate` it is
        ``"split"``, since those images were not fitted on.
    pixel_threshold_ : float
        The threshold of heatmaps, calibrated as ``threshold_`` is, on their largest values: at
        most ``false_alarm_rate`` of normal images have a pixel above it. Assign to it to set your
        own. See :meth:`Detections.regions <anomalib_lite.detectors.Detections.regions>`.
    calibration_scores_ : ndarray of shape (n,), float32
        Scores of the normal images that the threshold was taken from; see
        :meth:`set_false_alarm_rate`.
    calibration_peaks_ : ndarray of shape (n,), float32
        The largest values of their heatmaps.
    calibration_names_ : list of n str
        Path, ``images[i]`` or ``embeddings[i]`` of each of them; empty where it is not known. Those
        with the largest scores are the oddest of the good images.
    calibration_groups_ : ndarray of shape (n,), int64
        The group of each of them, such as the part that it shows.
    n_features_ : int
        Length of an embedding, after ``feature_dim``.
    image_size_ : int or (int, int)
        Size at which images go through the backbone, after :meth:`fit`.
    coreset_ratio_ : float
        Share kept of the patches of all images of :meth:`fit`, also of those held back that have
        joined the bank. It stays in :meth:`partial_fit`, which keeps this share of later ones.
    foreground_ : ndarray of shape (D + 1,), float32
        With ``foreground=True``: a direction, and the number above which a patch's product with
        it lies on the object.
    n_absorbed_ : int
        Number of patches that come from calibration images: the last rows of the bank.
    backbone_ : Backbone or CompiledBackbone
        The network that embeds images.
    dtype_, engine_ : str
        Number type and engine of the backbone.
    layer_models_ : LayerModels or None
        With ``fusion="per_layer"``: its ``models_`` are the detectors of each layer, and have what
        this one then lacks, such as ``memory_bank_``.
    transform_ : EmbeddingTransform or None
        What ``feature_dim``, ``whiten`` and the weights of layers have learned.
    skipped_ : list of (str, str)
        Name and reason of each training image left out.
    ignore_mask_ : IgnoreMask or None
        Regions that :meth:`fit` was told to ignore in all images.
    map_statistics_ : ndarray of shape (2, 3), float32
        With ``image_score="structure"``: means and standard deviations over normal maps of what
        :func:`~anomalib_lite.anomaly_map.structure` computes.

    Notes
    -----
    Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022
    (arXiv:2106.08265): patch score :math:`\\min_{m \\in M} \\|x - m\\|`, Euclidean and rooted,
    over a greedy coreset M of all normal patches. We deviate where a choice of the paper costs
    more than it gives: no random projection before the coreset (it is fast enough without),
    no centre crop, aspect kept, and the plain maximum as image score (Equation 7 is
    ``image_score="reweighted"``).

    With ``memory_budget``, a shard's coreset has at most twice the covering radius of the best
    choice of as many of its patches (Gonzalez 1985). A union of coresets covers all that each of
    them covers, at the largest of their radii (composable core-sets: Malkomes et al.,
    "Fast Distributed k-Center Clustering with Outliers on Massive Data", NeurIPS 2015;
    Ceccarello et al., "Solving k-center Clustering (with Outliers) in MapReduce and Streaming,
    almost as Accurately as Sequentially", PVLDB 2019). That largest
    radius is ``memory_bank_.covering_radius_``: an upper bound then, and the radius itself if all
    patches fit. The bounds of those papers, within a constant of the best, would need as many
    patches from each shard as the whole bank has. Of ``coreset_size``, each shard keeps as large a
    part as its images are of all, whatever their sizes; those that cannot be read take no part, as
    the others of their shard keep more. The bank has fewer patches than ``coreset_size`` only if a
    shard has fewer than its part: if its images are much smaller than others, or none can be read.

    With ``position_window``, a patch of cell c has the score :math:`\\min \\|x - m\\|` over the
    bank patches m at most r(c) cells away in row and in column. r(c) is the window, or as much
    more as is needed to meet ``n_neighbors`` of the patches fitted on; it stays when patches
    are added, so scores only fall then. The coreset is chosen without regard to positions. RAD
    and DINOSaur (arXiv:2605.24251) search in such neighbourhoods.

    With ``foreground``, patches x with :math:`v \\cdot x \\le t` are background, where v is the
    first principal component of normal patches, as in AnomalyDINO (arXiv:2405.14529), and t
    Otsu's cut; holes of the object are filled, and one patch around it is added. The bank holds
    background as well. Both stay when more is learned.

    Examples
    --------
    >>> import numpy as np
    >>> from anomalib_lite import PatchCore
    >>> rng = np.random.default_rng(0)
    >>> good = rng.integers(100, 140, (12, 64, 96, 3), dtype=np.uint8)
    >>> bad = good[:1].copy()
    >>> bad[0, 20:40, 30:60] = 255
    >>> detector = PatchCore(image_size=64, false_alarm_rate=0.2).fit(good)
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
        image_size: int | tuple[int, int] | str = "auto",
        tile: int | None = None,
        overlap: int = 0,
        augment: str | Sequence[str] | None = None,
        coreset_size: int = 5000,
        coreset_ratio: float | None = None,
        coreset: str = "greedy",
        n_neighbors: int = 1,
        image_score: str = "max",
        position_window: int | None = None,
        foreground: bool = False,
        index: str = "flat",
        nprobe: int | None = None,
        ef_search: int | None = None,
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
        self.tile = tile
        self.overlap = overlap
        self.augment = augment
        self.coreset_size = coreset_size
        self.coreset_ratio = coreset_ratio
        self.coreset = coreset
        self.n_neighbors = n_neighbors
        self.image_score = image_score
        self.position_window = position_window
        self.foreground = foreground
        self.index = index
        self.nprobe = nprobe
        self.ef_search = ef_search
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

    _asking = ("feature_dim", "whiten")
    _n_seen = 0  # patches that ``coreset_ratio_`` is a share of

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_int("coreset_size", self.coreset_size, "PatchCore", low=1)
        if self.coreset_ratio is not None:
            check_number("coreset_ratio", self.coreset_ratio, "PatchCore", "(0, 1]")
        check_choice("coreset", self.coreset, METHODS, "PatchCore")
        check_image_score(self.image_score, "PatchCore", "reweighted", "structure")
        check_index(self.index, "PatchCore", nprobe=self.nprobe, efSearch=self.ef_search)
        check_int("n_neighbors", self.n_neighbors, "PatchCore", low=1)
        check_bool("normalize", self.normalize, "PatchCore")
        check_foreground(self.foreground, self.fusion, self.whiten, "PatchCore")
        check_tiles(self.tile, self.overlap, self.image_size, "PatchCore")
        if self.augment is not None:
            check_augment(self.augment, "PatchCore")
        if self.position_window is not None:
            check_int("position_window", self.position_window, "PatchCore", low=0)
            check_position_window("PatchCore", self.index, self.image_score, self.augment)
        if self.image_score == "reweighted" and self.n_neighbors != 1:
            raise InvalidValueError(
                "PatchCore: image_score='reweighted' is defined for n_neighbors=1, "
                f"got {self.n_neighbors}."
            )
        if self.calibration == "leave_one_out" and self.index != "flat":
            raise InvalidValueError(
                "PatchCore: calibration='leave_one_out' needs index='flat', "
                f"got {self.index!r}. Use calibration='split'."
            )

    def _cannot_cross(self) -> str | None:
        if self.index != "flat":
            return f"needs index='flat', got {self.index!r}"
        return super()._cannot_cross()

    def _check_fit_on_embeddings(self) -> None:
        super()._check_fit_on_embeddings()
        if self.augment is not None:
            refuse_augment("PatchCore", self.augment)

    def _make_accumulator(
        self,
        shape: tuple[int, ...],
        n_images: int | None,
        in_flight: int,
        random: np.random.RandomState,
    ) -> PatchAccumulator:
        height, width, n_features = shape
        bank = getattr(self, "memory_bank_", None)
        grid = None
        if self.position_window is not None:
            grid = (height, width) if bank is None else bank.grid
        samples = bool(self.foreground) and bank is None
        ratio = self.coreset_ratio  # else that of the images before, and at first coreset_size
        ratio = getattr(self, "coreset_ratio_", None) if ratio is None else float(ratio)
        share: dict[str, Any] = {"ratio": ratio, "n_images": n_images}
        share["size"] = int(self.coreset_size) if ratio is None else None
        plan = None
        if self.memory_budget is not None:
            plan = plan_patches(
                check_memory("memory_budget", self.memory_budget, "PatchCore"),
                patches=height * width,
                n_features=n_features if grid is None else n_features + 4,  # with room for places
                in_flight=in_flight + (sample_bytes(n_features) if samples else 0),
                present=0 if bank is None else len(bank.embeddings_),
                **share,
            )
        seed = int(copy.deepcopy(random).randint(2**31))  # with a budget or without: the same draws
        options: dict[str, Any] = {"normalize": bool(self.normalize), "grid": grid}
        options |= {"samples": samples, **share}
        return PatchAccumulator(n_features, self.coreset, seed, plan, **options)

    def _fit_accumulated(
        self, accumulated: PatchAccumulator, random: np.random.RandomState
    ) -> tuple[PatchAccumulator, np.ndarray] | None:
        """Add a coreset of the patches to the bank; return all of them, and which are its rows.

        But nothing is returned unless the accumulator says which image each patch is of.
        """
        bank = getattr(self, "memory_bank_", None)
        device, kept = device_of(self.device, "PatchCore"), None
        if getattr(self, "coreset_ratio_", None) is None or accumulated.size is None:
            self.coreset_ratio_, self._n_seen = accumulated.ratio, accumulated.n_seen
        else:
            self._count_more(accumulated)
        if bank is None and accumulated.sample is not None:
            self.foreground_ = learn_foreground(accumulated.sample, "PatchCore")
        if accumulated.thinned:
            rows = accumulated.rows.copy()  # without the room that was kept for more
            radius = accumulated.radius
        else:
            coreset = select_coreset(
                accumulated.rows,
                max(1, round(accumulated.ratio * len(accumulated.rows))),
                method=self.coreset,
                random_state=random,
                existing=None if bank is None else self._existing_patches(),
                device=device if device.startswith("cuda") else "cpu",
                progress=bool(self.verbose),
            )
            kept, radius = coreset.indices, coreset.covering_radius
            rows = accumulated.rows[kept]
        cells = accumulated.cells
        if cells is not None:
            cells = cells if kept is None else cells[kept]
            by_cell = np.argsort(cells, kind="stable")  # rows that are searched together
            rows, cells = rows[by_cell], cells[by_cell]
            kept = None if kept is None else kept[by_cell]
        fitted = None if kept is None or not len(accumulated.owners) else (accumulated, kept)
        if bank is not None:
            self._extend(rows, radius, cells)
            return fitted
        kept_by = f"coreset_size={self.coreset_size}"
        if self.coreset_ratio is not None:
            kept_by = f"coreset_ratio={self.coreset_ratio:g}"
            check_share(self.coreset_ratio, accumulated.n_seen, "coreset_ratio", "PatchCore")
        if len(rows) < self.n_neighbors:
            raise InvalidValueError(
                f"PatchCore: n_neighbors={self.n_neighbors} is more than the {len(rows)} patches "
                f"that {kept_by} keeps."
            )
        self.memory_bank_ = self._bank_of(rows, cells, accumulated.grid, device)
        self.memory_bank_.covering_radius_ = radius
        self.n_absorbed_ = 0
        return fitted

    def _count_more(self, accumulated: PatchAccumulator) -> None:
        """Take note of the share kept of all patches that have come, before and now.

        Those that came now may be of images of other sizes, or with other regions to ignore.
        """
        kept = self.coreset_ratio_ * self._n_seen + accumulated.ratio * accumulated.n_seen
        self._n_seen += accumulated.n_seen
        self.coreset_ratio_ = kept / self._n_seen

    def _bank_of(
        self, rows: np.ndarray, cells: np.ndarray | None, grid: Any, device: str = "cpu"
    ) -> PatchBank:
        bank = PatchBank(**self._bank_parameters(device)).fit(rows)
        if cells is not None:
            assert self.position_window is not None
            reach = window_reach(cells, grid, int(self.position_window), self.n_neighbors)
            bank.place(cells, reach)
        return bank

    def _extend(self, rows: np.ndarray, radius: float, cells: np.ndarray | None) -> None:
        bank = self.memory_bank_.extended(rows, cells)  # the old one may still be needed
        bank.covering_radius_ = max(self.memory_bank_.covering_radius_, radius)
        self.memory_bank_ = bank

    def _bank_parameters(self, device: str) -> dict[str, Any]:
        return {
            "n_neighbors": SUPPORT_SIZE,
            "index": self.index,
            "nprobe": self.nprobe,
            "ef_search": self.ef_search,
            "device": device if device.startswith("cuda") else "cpu",
        }

    def _existing_patches(self) -> np.ndarray | None:
        return self.memory_bank_.embeddings_ if self.coreset == "greedy" else None

    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bank, rows = self.memory_bank_, E.reshape(-1, E.shape[-1])
        if self.normalize:
            rows = unit_rows(rows)
        ignored, k = np.isnan(rows[:, 0]), self.n_neighbors
        if not ignored.any() and self.position_window is None:
            distances, neighbors = bank.search(rows, k)
        elif not ignored.any():
            distances, neighbors = bank.search_patches(rows, k, E)
        else:  # ignored patches are at no distance from normal ones
            distances = np.zeros((len(rows), k), np.float32)
            neighbors = np.zeros((len(rows), k), np.int64)
            found = bank.search_patches(rows[~ignored], k, E)
            distances[~ignored], neighbors[~ignored] = found
        patch_scores = distances.mean(axis=1).reshape(E.shape[:3])
        if self.foreground:
            patch_scores[~object_patches(rows.reshape(E.shape), self.foreground_)] = 0
        if self.image_score != "reweighted":
            scores = self._score_maps(patch_scores, ignored.reshape(E.shape[:3]))
        else:
            scores = image_scores(patch_scores, "max")
            seen = np.where(ignored, np.float32(-1), patch_scores.ravel())
            worst = seen.reshape(len(E), -1).argmax(axis=1)
            worst += np.arange(len(E)) * (E.shape[1] * E.shape[2])
            scores = reweight_by_bank(scores, rows[worst], neighbors[worst, 0], bank)
        return patch_scores, scores

    def _without(
        self, own: Embeddings, first: int, fitted: tuple[PatchAccumulator, np.ndarray]
    ) -> Self | None:
        (patches, kept), whole = fitted, self.memory_bank_
        left_out = (patches.owners >= first) & (patches.owners < first + len(own))
        others = np.ones(len(whole.embeddings_), bool)
        # The last rows are those of this fit; an update leaves the others where they are.
        others[len(others) - len(kept) :] = ~left_out[kept]
        if np.count_nonzero(others) < self.n_neighbors:
            return None
        rows, cells = whole.embeddings_[others], whole.cells_
        cells = None if cells is None else cells[others]
        # Rows of a coreset keep apart, so without some of them their surroundings are empty: they
        # are filled by as many patches of other images that lay nearest to those rows.
        if patches.nearest is None:
            patches.nearest = whole.search(patches.rows, 1)[1][:, 0]
        near = np.flatnonzero(~others[patches.nearest] & ~left_out)
        n = min(len(near), int(np.count_nonzero(~others)))
        if n:
            more = select_coreset(
                patches.rows[near],
                n,
                method=self.coreset,
                random_state=first,
                existing=rows if self.coreset == "greedy" else None,
            )
            near = near[more.indices]
            rows = np.concatenate([rows, patches.rows[near]])
            if cells is not None and patches.cells is not None:
                cells = np.concatenate([cells, patches.cells[near]])
                by_cell = np.argsort(cells, kind="stable")
                rows, cells = rows[by_cell], cells[by_cell]
        rest = copy.copy(self)
        device = device_of(self.device, "PatchCore")
        rest.memory_bank_ = self._bank_of(rows, cells, whole.grid, device)
        return rest

    def _scores_are_monotone(self) -> bool:
        # With more patches in the bank every exact distance stays or falls, so no score of a
        # future normal image rises above the threshold by it. Equation 7, the structure of a map
        # and approximate indexes do not have this property. With a window it holds since the reach
        # of each cell stays: one that shrank as nearer rows come would lose better ones.
        return self.index == "flat" and self.image_score not in _MAY_RISE

    def _remove_calibration_patches(self) -> PatchBank:
        # Images held back now are scored by the same patches as those held back before, and by
        # those fitted on since: no score then depends on which image was held back when.
        bank = self.memory_bank_
        if self.n_absorbed_:
            self.memory_bank_ = bank.taken(slice(len(bank.embeddings_) - self.n_absorbed_))
        return bank

    def _add_calibration_patches(
        self,
        removed: PatchBank | None,
        accumulated: PatchAccumulator,
        random: np.random.RandomState,
    ) -> None:
        n_fitted = len(self.memory_bank_.embeddings_)
        if removed is not None and self.n_absorbed_:
            held_back = removed.taken(slice(len(removed.embeddings_) - self.n_absorbed_, None))
            self._extend(held_back.embeddings_, 0.0, held_back.cells_)
        if accumulated.n_seen:
            self._fit_accumulated(accumulated, random)
        self.n_absorbed_ = len(self.memory_bank_.embeddings_) - n_fitted

    def _summary_lines(self) -> list[tuple[str, str]]:
        n_patches, length = self.memory_bank_.embeddings_.shape
        return [("memory bank", f"{n_patches:,} patches of {length} numbers")]

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        bank = self.memory_bank_
        arrays = {"embeddings": bank.embeddings_, **bank.places()}
        if bank.index_ is not None:
            arrays["index"] = serialize(bank.index_)
        if self.foreground:
            arrays["foreground"] = self.foreground_
        state = {"covering_radius": bank.covering_radius_, "n_absorbed": self.n_absorbed_}
        if self.coreset_ratio is None:
            state["coreset_ratio"] = self.coreset_ratio_
        return arrays, state

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        parameters = self._bank_parameters(device_of(self.device, "PatchCore"))
        embeddings, index = arrays["embeddings"], arrays.get("index")
        self.memory_bank_ = PatchBank.restore(embeddings, index, **parameters)
        if self.position_window is not None:
            self.memory_bank_.place(arrays["positions"], arrays["reach"])
        self.memory_bank_.covering_radius_ = float(state["covering_radius"])
        self.n_absorbed_ = int(state.get("n_absorbed", 0))  # files of 0.1.0 may not say
        ratio = self.coreset_ratio
        self.coreset_ratio_ = float(state["coreset_ratio"] if ratio is None else ratio)
        self.n_features_ = self.memory_bank_.n_features_in_
        if self.foreground:
            self.foreground_ = arrays["foreground"]
            if self.foreground_.shape != (self.n_features_ + 1,):
                raise ValueError(f"foreground has shape {self.foreground_.shape}")
