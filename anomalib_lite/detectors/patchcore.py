"""PatchCore: the distance of each patch to its nearest neighbour among normal patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite._validation import check_choice, check_int, check_number
from anomalib_lite.anomaly_map import IMAGE_SCORES, image_scores, reweight
from anomalib_lite.coreset import METHODS, coreset_size, select_coreset
from anomalib_lite.detectors.base import BaseDetector
from anomalib_lite.detectors.embeddings import Embeddings, rows_of
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.memory_bank import MemoryBank, check_index

__all__ = ["PatchCore"]

# b of Equation 7, as in the paper.
_SUPPORT_SIZE = 9


class PatchCore(BaseDetector):
    """Patches far from all normal patches are anomalous.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="efficientnet_lite0"
        The embedded network, any timm name, or a module; see
        :class:`~anomalib_lite.backbones.Backbone`.
    weights : str or Path, optional
        Weights file for a timm name; by default they come from the hub.
    layers : sequence of str or int, optional
        Layers to use; by default strides 8 and 16, or two blocks of a vision transformer.
    fusion : {"concat"}, default="concat"
        How layers become one embedding a patch.
    image_size : int or (int, int), default=256
        An int is the shorter side in pixels, the aspect is kept; a pair (H, W) is exact.
    coreset_ratio : float, default=0.1
        Share of all patches kept in the bank, in (0, 1].
    coreset : {"greedy", "random", "kmeans"}, default="greedy"
        How they are chosen.
    n_neighbors : int, default=1
        A patch's score is its mean distance to so many nearest patches of the bank.
    image_score : {"max", "top1%", "reweighted"}, default="max"
        Largest patch score; mean of the largest 1 %; or Equation 7 of the paper (b = 9), which
        needs ``n_neighbors=1``.
    index : str, default="flat"
        ``"flat"`` for exact search, or a FAISS index-factory string.
    smoothing : float, default=4.0
        Standard deviation of the Gaussian that smooths heatmaps, in pixels of ``image_size``.
    false_alarm_rate : float, default=0.01
        Share of future normal images that may be called anomalous, in (0, 1).
    calibration : {"split", "leave_one_out"}, default="split"
        ``"split"`` holds images back (as many as the rate needs, a fifth to half of all), takes
        the threshold from their scores with a finite-sample guarantee, and then adds their
        patches to the bank where that can only lower scores (greedy or not, ``index="flat"``,
        not ``"reweighted"``), which keeps the guarantee. ``"leave_one_out"`` holds nothing back
        and scores each image against the bank without its own patches: the threshold is
        tighter, and its rate only approximate.
    device : {"auto", "cpu", "cuda", "mps"}, default="auto"
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Number type of the backbone; what "auto" chose is in ``dtype_``.
    engine : {"auto", "torch", "openvino", "onnxruntime"}, default="auto"
        What runs the backbone: "auto" is OpenVINO on a CPU where it is installed and the network
        converts, else torch; what it chose is in ``engine_``.
    batch_size : int, default=32
        Images decoded and embedded at a time.
    on_error : {"raise", "skip"}, default="raise"
        What to do about an image that cannot be read: raise, or leave it out and list it in
        ``skipped_`` (or in ``Detections.skipped``).
    max_pixels : int, default=100_000_000
        Larger images are refused before they are decoded.
    random_state : int, RandomState or None, default=0
        Seed of the coreset's first centre and of the choice of calibration images.
    verbose : int, default=0
        1 shows progress bars (in a terminal only).

    Attributes
    ----------
    memory_bank_ : MemoryBank
        The normal patches kept.
    threshold_ : float
        An image with a larger score is called anomalous. Assign to it to set your own.
    calibration_scores_ : ndarray of shape (n,), float32
        Scores of the normal images that the threshold was taken from;
        ``conformal_threshold(detector.calibration_scores_, rate)`` gives that for another rate.
    n_features_ : int
        D, the length of an embedding.
    backbone_ : Backbone or CompiledBackbone
    dtype_, engine_ : str
    skipped_ : list of (str, str)
        Name and reason of each training image left out.

    Notes
    -----
    Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022
    (arXiv:2106.08265): patch score :math:`\\min_{m \\in M} \\|x - m\\|`, Euclidean and rooted,
    over a greedy coreset M of all normal patches. We deviate where the paper's choices cost
    more than they give: no random projection before the coreset (it is fast enough without),
    no centre crop, aspect kept, and the plain maximum as image score (Equation 7 is
    ``image_score="reweighted"``).

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
        image_size: int | tuple[int, int] = 256,
        coreset_ratio: float = 0.1,
        coreset: str = "greedy",
        n_neighbors: int = 1,
        image_score: str = "max",
        index: str = "flat",
        smoothing: float = 4.0,
        false_alarm_rate: float = 0.01,
        calibration: str = "split",
        device: str = "auto",
        dtype: str = "auto",
        engine: str = "auto",
        batch_size: int = 32,
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
        self.coreset_ratio = coreset_ratio
        self.coreset = coreset
        self.n_neighbors = n_neighbors
        self.image_score = image_score
        self.index = index
        self.smoothing = smoothing
        self.false_alarm_rate = false_alarm_rate
        self.calibration = calibration
        self.device = device
        self.dtype = dtype
        self.engine = engine
        self.batch_size = batch_size
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.random_state = random_state
        self.verbose = verbose

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number("coreset_ratio", self.coreset_ratio, "PatchCore", "(0, 1]")
        check_choice("coreset", self.coreset, METHODS, "PatchCore")
        check_choice("image_score", self.image_score, IMAGE_SCORES, "PatchCore")
        check_index(self.index, "PatchCore")
        check_int("n_neighbors", self.n_neighbors, "PatchCore", low=1)
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

    def _fit_patches(self, E: Embeddings, random: np.random.RandomState) -> None:
        rows = rows_of(E)
        size = coreset_size(float(self.coreset_ratio), len(rows), "coreset_ratio", "PatchCore")
        if size < self.n_neighbors:
            raise InvalidValueError(
                f"PatchCore: n_neighbors={self.n_neighbors} is more than the {size} patches that "
                f"coreset_ratio={self.coreset_ratio:g} keeps."
            )
        kept = select_coreset(
            rows, size, method=self.coreset, random_state=random, progress=bool(self.verbose)
        )
        bank = MemoryBank(_SUPPORT_SIZE, index=self.index).fit(rows[kept.indices])
        bank.covering_radius_ = kept.covering_radius
        patches_per_image = [grid.shape[0] * grid.shape[1] for grid in E]
        self._bank_images = np.repeat(np.arange(len(E)), patches_per_image)[kept.indices]
        self.memory_bank_ = bank
        self.n_features_ = rows.shape[1]

    def _score_patches(self, E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = E.reshape(-1, E.shape[-1])
        distances, neighbors = self.memory_bank_.search(rows, self.n_neighbors)
        patch_scores = distances.mean(axis=1).reshape(E.shape[:3])
        scores = image_scores(patch_scores, self.image_score)
        if self.image_score == "reweighted":
            worst = patch_scores.reshape(len(E), -1).argmax(axis=1)
            worst += np.arange(len(E)) * (E.shape[1] * E.shape[2])
            scores = self._reweight(scores, rows[worst], neighbors[worst, 0])
        return patch_scores, scores

    def _reweight(self, scores: np.ndarray, patches: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        """Equation 7, for each image's most anomalous patch (B, D) and its neighbour (B,)."""
        bank = self.memory_bank_
        size = min(_SUPPORT_SIZE, len(bank.embeddings_))
        _, support = bank.search(bank.embeddings_[nearest], size)  # (B, b)
        # A twin of the nearest bank point may come first: put the point itself there.
        order = np.argsort(support != nearest[:, None], axis=1, kind="stable")
        support = np.take_along_axis(support, order, axis=1)
        difference = bank.embeddings_[support] - patches[:, None]
        return reweight(scores, np.linalg.norm(difference, axis=2))

    def _score_left_out(self, E: Embeddings) -> np.ndarray:
        whole, owners = self.memory_bank_, self._bank_images
        scores = np.empty(len(E), np.float32)
        try:
            for i in range(len(E)):
                others = whole.embeddings_[owners != i]
                if len(others) < self.n_neighbors:
                    return scores[:0]  # no bank without this image: nothing to calibrate with
                self.memory_bank_ = MemoryBank(_SUPPORT_SIZE).fit(others)
                scores[i] = self._score_patches(E[i][None])[1][0]
        finally:
            self.memory_bank_ = whole
        return scores

    def _absorb(self, E: Embeddings, random: np.random.RandomState) -> None:
        # With more patches in the bank every exact distance stays or falls, so no score of a
        # future normal image rises above the threshold by it. Equation 7 and approximate
        # indexes do not have this property.
        if self.index != "flat" or self.image_score == "reweighted":
            return
        rows, bank = rows_of(E), self.memory_bank_
        size = max(1, round(float(self.coreset_ratio) * len(rows)))
        kept = select_coreset(
            rows,
            size,
            method=self.coreset,
            random_state=random,
            existing=bank.embeddings_ if self.coreset == "greedy" else None,
            progress=bool(self.verbose),
        )
        bank.add(rows[kept.indices])
        bank.covering_radius_ = max(bank.covering_radius_, kept.covering_radius)

    def _get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        bank = self.memory_bank_
        arrays = {"embeddings": bank.embeddings_}
        if bank.index_ is not None:
            arrays["index"] = bank.serialized_index()
        return arrays, {"covering_radius": bank.covering_radius_}

    def _set_state(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        self.memory_bank_ = MemoryBank.restore(
            arrays["embeddings"], arrays.get("index"), n_neighbors=_SUPPORT_SIZE, index=self.index
        )
        self.memory_bank_.covering_radius_ = float(state["covering_radius"])
        self.n_features_ = self.memory_bank_.n_features_in_
