"""anomalib's PatchCore and PaDiM with the same backbone, weights and preprocessing as ours.

Runs in anomalib's environment; importing this module does not import anomalib.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from anomalib.models import Padim, Patchcore
    from torch import nn
    from torchvision.transforms.v2 import Compose

TIMM_NAME = "tf_efficientnet_lite0"
# Strides 8 and 16, 40 + 112 channels; strides 4, 8 and 16, 24 + 40 + 112 channels.
LAYERS = {
    "patchcore": ("blocks.2", "blocks.4"),
    "padim": ("blocks.1", "blocks.2", "blocks.4"),
}
_STAGES = {"blocks.1": 1, "blocks.2": 2, "blocks.4": 3}  # in timm's list of features
MEAN = STD = (0.5, 0.5, 0.5)  # what these weights were trained with


def load_batch(transform: Compose, paths: list[str]) -> torch.Tensor:
    """Read images (B, 3, H, W) with anomalib's reader and pre-processor."""
    import torch
    from anomalib.data.utils import read_image

    return torch.stack([transform(read_image(p, True)) for p in paths])


def make_transform(job: dict[str, Any]) -> Compose:
    """Make the transform of anomalib's pre-processor: size, mean and deviation as ours."""
    from torchvision.transforms.v2 import Compose, Normalize, Resize

    return Compose([Resize(tuple(job["image_size"]), antialias=True), Normalize(MEAN, STD)])


def start_torch(job: dict[str, Any]) -> None:
    """Set threads and seed, and quieten the libraries."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    for name in ("anomalib", "lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def build_model(job: dict[str, Any]) -> Patchcore | Padim:
    """Build the model; only backbone, size, coreset ratio and channels are not defaults."""
    from anomalib.models import Padim, Patchcore
    from anomalib.pre_processing import PreProcessor

    options: dict[str, Any] = {
        "backbone": TIMM_NAME,
        "layers": LAYERS[job["method"]],
        "pre_trained": False,  # the weights come from a file, below
        "pre_processor": PreProcessor(transform=make_transform(job)),
        "post_processor": False,
        "evaluator": False,
        "visualizer": False,
    }
    if job["method"] == "padim":
        model: Patchcore | Padim = Padim(n_features=job["n_components"], **options)
    else:
        model = Patchcore(coreset_sampling_ratio=job["coreset_ratio"], **options)
    weights = load_by_position(job["weights"]).state_dict()
    extractor = model.model.feature_extractor.feature_extractor
    extractor.load_state_dict({name: weights[name] for name in extractor.state_dict()})
    return model


def load_by_position(path: str) -> nn.Module:
    """Load timm's whole network with the parameters of the file, which have the same order."""
    import timm
    import torch

    network = timm.create_model(TIMM_NAME, pretrained=False)
    names = list(network.state_dict())
    values = list(torch.load(path, map_location="cpu", weights_only=True).values())
    network.load_state_dict(dict(zip(names, values, strict=True)))
    return network.eval()


def check_backbone(job: dict[str, Any], model: Patchcore | Padim) -> float:
    """Compare anomalib's feature maps with timm's whole network on one image; they must agree."""
    import torch

    batch = load_batch(model.pre_processor.transform, job["test"][:1])
    with torch.inference_mode():
        layers = LAYERS[job["method"]]
        found = model.model.feature_extractor(batch)
        maps = [found[name] for name in layers]
        network: Any = load_by_position(job["weights"])
        _, reference = network.forward_intermediates(batch, indices=[_STAGES[n] for n in layers])
    if [tuple(m.shape) for m in maps] != [tuple(r.shape) for r in reference]:
        raise RuntimeError("the peer's layers are not those of timm's stages")
    worst = max(float((m - r).abs().max()) for m, r in zip(maps, reference, strict=True))
    if worst > 1e-4:
        raise RuntimeError(f"the peer's backbone differs from timm's by {worst}")
    return worst
