"""The task that LoRA learns: tell anomalous features from normal ones, by Gaussians and heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy_with_logits
from torch.nn.functional import normalize as unit

from anomalib_lite._device import resolve_dtype
from anomalib_lite.backbones import Backbone
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.fusion import patch_embeddings
from anomalib_lite.gaussian import Gaussian, Moments
from anomalib_lite.images import by_size

__all__ = ["Example", "Task", "batches_of", "split_patches_and_image"]

# Divisor of the logits, so that the loss asks for a larger margin.
TEMPERATURE = 2.0
# Weight of the loss that keeps features of normal images where they are: without it, the network
# forgets how to see defects unlike the synthetic ones.
KEEP = 0.1
# Share of anomalous pixels from which on a patch is anomalous; with a smaller one it is ignored.
ANOMALOUS_SHARE = 0.1
_BATCH = 16


@dataclass
class Example:
    """A normal image, or one with a synthetic anomaly and its mask."""

    pixels: np.ndarray
    mask: np.ndarray

    @classmethod
    def normal(cls, pixels: np.ndarray) -> Example:
        """Give a normal image an empty mask."""
        return cls(pixels, np.zeros(pixels.shape[:2], bool))


class _Whitening(nn.Module):
    """Whitens features, so that a Gaussian's squared distance is their sum of squares."""

    factor: Tensor
    mean: Tensor

    def __init__(self, gaussian: Gaussian) -> None:
        super().__init__()
        for name, array in (("factor", gaussian.whitening_), ("mean", gaussian.location_)):
            self.register_buffer(name, torch.from_numpy(array).float())

    def forward(self, f: Tensor) -> Tensor:
        """Return the features whitened."""
        return (f.float() - self.mean) @ self.factor


class AnomalyHead(nn.Module):
    """Gives each feature vector two anomaly logits: of a network, and of its distance."""

    def __init__(self, gaussian: Gaussian) -> None:
        super().__init__()
        self.whiten = _Whitening(gaussian)
        sizes = ((len(gaussian.location_), 512), (512, 256), (256, 1))
        layers = [layer for n, m in sizes for layer in (nn.Linear(n, m), nn.ReLU())]
        self.head = nn.Sequential(*layers[:-1])
        self.slope, self.centre = (nn.Parameter(torch.tensor(2.0)) for _ in range(2))

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return two logits of each whitened vector: the head's, and that of its length."""
        by_head = self.head(w)[..., 0].float() / TEMPERATURE
        return by_head, self.slope * (w.square().mean(dim=-1) - self.centre)


class Task(nn.Module):
    """Losses and validation of an adapter.

    Parameters
    ----------
    backbone : Backbone
        The network that is adapted.
    adapted : list of str
        Names of its layers that have an update.
    to_fit : sequence of Example
        Normal images for the Gaussians that whiten.
    shrinkage, normalize, dtype
        As in the detector.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapted: list[str],
        to_fit: Sequence[Example],
        *,
        shrinkage: str | float = "ledoit_wolf",
        normalize: bool = True,
        dtype: str = "auto",
    ) -> None:
        super().__init__()
        self._backbone, self._shrinkage, self._normalize = backbone, shrinkage, normalize
        self._adapted: list[Any] = [backbone.network.get_submodule(name) for name in adapted]
        self._dtype = resolve_dtype(dtype, backbone.device, backbone.where)
        patches, images = self._gaussians(to_fit)
        self.patches, self.images = AnomalyHead(patches), AnomalyHead(images)
        self.to(backbone.device)

    def loss(self, batch: Sequence[Example]) -> Tensor:
        """Return the loss of a batch of images of one size."""
        pixels = np.stack([e.pixels for e in batch])
        masks = torch.from_numpy(np.stack([e.mask for e in batch])).to(self._backbone.device)
        is_normal = ~masks.flatten(1).any(dim=1)
        with self._autocast():
            X, G = (
                f.float() for f in split_patches_and_image(self._backbone, pixels, self._normalize)
            )
        targets, counts = targets_of(masks, (X.shape[1], X.shape[2]))
        X, G = self.patches.whiten(X), self.images.whiten(G)
        losses = [_balanced(z[counts], targets[counts]) for z in self.patches(X)]
        losses += [_balanced(z, (~is_normal).float()) for z in self.images(G)]
        loss = torch.stack(losses).sum() / 2
        if is_normal.any():
            X0, G0 = self._frozen(pixels[is_normal.cpu().numpy()])
            moved = (X[is_normal] - X0).square().mean() + (G[is_normal] - G0).square().mean()
            loss = loss + KEEP * moved
        return loss

    @torch.no_grad()
    def validate(self, to_fit: Sequence[Example], examples: Sequence[Example]) -> float:
        """Return the mean AUROC of patches and of images, by Gaussians fitted to ``to_fit``."""
        patches, images = self._gaussians(to_fit)
        found: tuple[list[np.ndarray], ...] = ([], [], [], [])
        for batch in batches_of(examples, None):
            X, G = self._features(batch)
            masks = torch.from_numpy(np.stack([e.mask for e in batch]))
            targets, counts = (t.numpy() for t in targets_of(masks, X.shape[1:3]))
            new = (patches.mahalanobis(X[counts]), targets[counts], images.mahalanobis(G))
            for known, more in zip(found, (*new, masks.flatten(1).any(1).numpy()), strict=True):
                known.append(more)
        p, y, g, of_anomaly = map(np.concatenate, found)
        # If defects are small beside a patch, no patch may be anomalous.
        areas = [roc_auc_score(of_anomaly, g)] + ([roc_auc_score(y, p)] if 0 < y.mean() < 1 else [])
        return float(np.mean(areas))

    def _gaussians(self, examples: Sequence[Example]) -> tuple[Gaussian, Gaussian]:
        """Fit the Gaussians of patches and of images to the features of the network as it is."""
        moments: list[Moments] = []
        for batch in batches_of(examples, None):
            X, G = self._features(batch)
            moments = moments or [Moments(G.shape[1]), Moments(G.shape[1])]
            for known, rows in zip(moments, (X.reshape(-1, X.shape[-1]), G), strict=True):
                known.add(rows)
        try:
            patches, images = (Gaussian(self._shrinkage).fit_moments(m) for m in moments)
        except InvalidValueError as error:
            raise InvalidValueError(
                f"{self._backbone.where}: the {len(examples)} images to adapt to are too few or "
                f"too much alike for shrinkage={self._shrinkage!r}. Give more that differ, or "
                "shrinkage=0.1."
            ) from error
        return patches, images

    @torch.no_grad()
    def _features(self, batch: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        with self._autocast():
            pixels = np.stack([e.pixels for e in batch])
            X, G = split_patches_and_image(self._backbone, pixels, self._normalize)
        return X.float().cpu().numpy(), G.float().cpu().numpy()

    @torch.no_grad()
    def _frozen(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return whitened features of the network without its updates."""
        for layer in self._adapted:
            layer.enable_adapters(False)
        try:
            with self._autocast():
                X, G = (
                    f.float()
                    for f in split_patches_and_image(self._backbone, pixels, self._normalize)
                )
        finally:
            for layer in self._adapted:
                layer.enable_adapters(True)
        return self.patches.whiten(X), self.images.whiten(G)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._backbone.device.type, torch.bfloat16)


def _balanced(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy in which both classes weigh the same."""
    losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    kinds = [losses[targets == y] for y in (0, 1)]
    return torch.stack([kind.mean() / 2 for kind in kinds if len(kind)]).sum()


def targets_of(masks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Turn masks (B, H, W) into patch targets (B, h, w), 0.0 or 1.0, and which of them count."""
    share = adaptive_avg_pool2d(masks[:, None].float(), size)[:, 0]
    targets = (share >= ANOMALOUS_SHARE).float()
    return targets, (share == 0) | (targets > 0)


def split_patches_and_image(
    backbone: Backbone, pixels: np.ndarray, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Return features of patches (B, h, w, d) and of images (B, d), with gradients.

    ``normalize`` divides each by its length.
    """
    E = patch_embeddings(backbone(pixels), backbone.fusion)
    n_features = E.shape[-1] // 2
    X, G = E[..., :n_features], E[:, 0, 0, n_features:]
    return (unit(X, dim=-1), unit(G, dim=-1)) if normalize else (X, G)


def batches_of(
    examples: Sequence[Example], random: np.random.RandomState | None
) -> Iterator[list[Example]]:
    """Yield batches of one size each, shuffled if ``random`` is given."""
    order: Iterable[int] = range(len(examples))
    if random is not None:
        order = random.permutation(len(examples))
    return by_size((examples[i] for i in order), lambda example: example.pixels.shape, _BATCH)
