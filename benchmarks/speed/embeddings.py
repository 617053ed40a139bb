"""Real patch embeddings for the measurements, computed once and kept in a folder.

``cnn``: EfficientNet-Lite0 (ImageNet weights), strides 8 and 16, D = 152, images at 384 pixels: a
million patches of the 446 normal magnetic tiles. ``vit``: a ViT-S/14 (DINOv2, fine-tuned for
saliency), blocks 3, 6, 9 and 12, D = 4 * 384, images at 448x448: a hundred thousand patches; its
columns give D = 384 (block 9), 1,152 (three blocks) and 1,536 (all).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anomalib_lite.backbones import Backbone
from anomalib_lite.datasets import MVTecAD
from anomalib_lite.fusion import patch_embeddings
from anomalib_lite.images import ImageSource, iter_batches

VIT_WEIGHTS = "dinov2_vits14_saliency.safetensors"
COLUMNS = {152: slice(None), 384: slice(768, 1152), 1152: slice(384, 1536), 1536: slice(None)}


def load(data: Path, folder: Path, d: int, n: int, *, test: bool = False) -> np.ndarray:
    """Load ``n`` embeddings of ``d`` dimensions, drawn with a fixed seed: (n, d) float32."""
    network = "cnn" if d == 152 else "vit"
    file = folder / f"{network}_{'test' if test else 'train'}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(file, _embed(data, network, test))
    rows = np.load(file, mmap_mode="r")
    if n > len(rows):
        raise ValueError(f"there are {len(rows)} real embeddings of {d} dimensions, {n} wanted")
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:n])
    return np.ascontiguousarray(rows[chosen][:, COLUMNS[d]])


def _embed(data: Path, network: str, test: bool) -> np.ndarray:
    dataset = MVTecAD(data, "magnetic_tile")
    samples = list(dataset.test if test else dataset.train)
    order = np.random.default_rng(0).permutation(len(samples))
    if network == "cnn":
        backbone, size = Backbone("efficientnet_lite0", dtype="float32"), 384
        order = order[: 20 if test else None]
    else:
        backbone = Backbone(
            "vit_small_patch14_dinov2.lvd142m",
            weights=data.parent / "weights" / VIT_WEIGHTS,
            layers=[2, 5, 8, 11],
        )
        size = 448
        order = order[: 10 if test else 100]
    source = ImageSource([samples[i].path for i in order])
    blocks = []
    batches = iter_batches(source, image_size=(size, size), stride=backbone.stride, batch_size=8)
    for batch in batches:
        E = patch_embeddings(backbone(batch.pixels)).float().numpy()
        blocks.append(E.reshape(-1, E.shape[-1]))
    return np.concatenate(blocks)
