"""A name or a module -> a frozen network that gives feature maps, one per layer."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anomalib_lite._device import resolve_device, resolve_dtype
from anomalib_lite._validation import closest
from anomalib_lite.backbones._attention import class_attention, find_attention
from anomalib_lite.backbones._folding import fold_batch_norms
from anomalib_lite.backbones._timm import EMBEDDED, default_layers, from_timm
from anomalib_lite.backbones._weights import load_state, weights_sha256
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.fusion import patch_embeddings
from anomalib_lite.networks.adapter import Adapter

__all__ = ["EMBEDDED", "Backbone"]

_is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]  # has no types
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The key of the attention's captured output; those of layers are their names.
_QKV = "queries, keys and values"
# On a CPU, the activations of a few images stay in the processor's cache, which is faster and
# bounds the memory for any batch size. In float32 one image at a time is as fast as several, and
# its embeddings are the same to the bit whatever images share its batch.
_PIXELS_AT_ONCE = {("cpu", torch.float32): 1, ("cpu", torch.bfloat16): 8 * 256 * 256}


class Backbone:
    """A frozen network that gives feature maps and stops after the last layer that is needed.

    Parameters
    ----------
    backbone : str or torch.nn.Module
        ``"efficientnet_lite0"`` (weights installed with this package), another short name of
        :data:`~anomalib_lite.networks.NETWORKS`, any timm name, or a module. A module without
        ``layers`` must return feature maps itself: a tensor, or a list, tuple or dict of tensors
        of shape (B, C, h, w). Pixels are normalised with the mean and standard deviation in its
        ``pretrained_cfg`` (timm's modules have one), else with ImageNet's.
    weights : str or Path, optional
        A ``.safetensors`` or ``.pth`` file with timm's key names. Without it, the weights come
        from an installed Python package, else from ``<name>.safetensors`` or ``<name>.pth`` in
        the directory that the environment variable ``ANOMALIB_LITE_WEIGHTS`` names, else from
        the hub's cache on this machine, else from the hub.
    layers : sequence of str or int, optional
        Names of layers, or their positions in timm's list of feature stages. By default those
        stages of a convolutional network whose strides are in ``strides``, or the blocks at one
        half and three quarters of the depth of a vision transformer.
    strides : sequence of int, default=(8, 16)
        Strides, in pixels, of the stages that are chosen if ``layers`` is None.
    device : {"auto", "cpu", "cuda", "mps"} or torch.device, default="auto"
        ``"auto"`` is CUDA if there is a GPU, else the CPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        ``"auto"`` is float16 on CUDA; on a CPU that multiplies bfloat16 in hardware (AMX,
        AVX-512 BF16) it is bfloat16, except for networks with depthwise convolutions, whose
        maps that type blurs; float32 elsewhere.
    fusion : {"concat", "nearest", "summary"}, default="concat"
        Strategy by which :meth:`embed` combines the layers; see
        :func:`~anomalib_lite.fusion.patch_embeddings`.
    scales : sequence of float in (0, 1], default=(1.0,)
        Each image passes the network once at each of these fractions of its size, and all maps
        are fused; the last must be 1.
    attention : bool, default=False
        With ``fusion="summary"`` on a vision transformer: one more map (B, 1, h, w), which says how
        much the class token attends to each patch in the last layer; its mean is 1.
    adapter : Adapter, optional
        LoRA update of the weights, trained by :mod:`~anomalib_lite.lora`.
    state : mapping of str to tensor, optional
        Weights that are in memory already, for example from a model file; used instead of any
        other source.
    trainable : bool, default=False
        Whether the weights can be trained: maps then have gradients, and batch norms are not
        merged into convolutions.
    where : str
        Caller, named in errors.

    Attributes
    ----------
    layers : list of str
        Names of the layers.
    stride : int
        Largest stride of the layers; the sides of the input should be multiples of it.
    channels : list of int or None
        Number of channels of each layer; None if the module does not announce them.
    mean, std : list of float
        Mean and standard deviation that normalise pixels in [0, 1], one for each channel.
    sha256 : str
        Hash of the weights without the adapter; see
        :func:`~anomalib_lite.backbones.weights_sha256`.
    device, dtype : torch.device, torch.dtype
        Where the network runs, and in which number type.
    engine : "torch"
        What runs the network; see :mod:`~anomalib_lite.engines` for others.
    pixels_at_once : int
        Number of pixels, of all images of one call together, at which this device is fastest.

    Raises
    ------
    InvalidValueError
        For an unknown name or layer, weights that do not fit, or a hub that does not answer
        within 8 seconds (or as many as the hub's variable HF_HUB_ETAG_TIMEOUT says).
    MissingPathError
        If the weights file or the directory of the environment variable does not exist.

    Examples
    --------
    >>> import numpy as np
    >>> backbone = Backbone("efficientnet_lite0")
    >>> [tuple(m.shape) for m in backbone(np.zeros((2, 64, 96, 3), np.uint8))]
    [(2, 40, 8, 12), (2, 112, 4, 6)]
    >>> backbone.layers
    ['blocks.2', 'blocks.4']
    """

    engine = "torch"

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        weights: str | Path | None = None,
        layers: Sequence[str | int] | None = None,
        strides: Sequence[int] = (8, 16),
        device: str | torch.device = "auto",
        dtype: str = "auto",
        fusion: str = "concat",
        scales: Sequence[float] = (1.0,),
        attention: bool = False,
        adapter: Adapter | None = None,
        state: Mapping[str, Tensor] | None = None,
        trainable: bool = False,
        where: str = "Backbone",
    ) -> None:
        self.where, self.fusion, self.scales, self.adapter = where, fusion, tuple(scales), adapter
        self.device = resolve_device(device, where)
        self.dtype = resolve_dtype(dtype, self.device, where)
        network, stages = _network_and_stages(backbone, weights, state, where)
        self._choose_layers(layers, strides, network, stages)
        self.sha256 = weights_sha256(network)
        self._origin = (backbone, weights, state)
        self._read_conventions(network)
        self.depthwise = has_depthwise(network)
        if dtype == "auto" and self.depthwise and self.device.type == "cpu":
            self.dtype = torch.float32
        self.pixels_at_once = _PIXELS_AT_ONCE.get((self.device.type, self.dtype), sys.maxsize)
        if adapter is not None:
            adapter.add_to(network, where)
        network.eval().requires_grad_(trainable)
        if not trainable:
            network = fold_batch_norms(network, keep=self.layers)
        self._add_hooks(network, attention)
        network.to(self.device, self.dtype)
        self.network = network.to(memory_format=torch.channels_last)

    def embed(self, pixels: np.ndarray, channels: np.ndarray | None = None) -> np.ndarray:
        """Patch embeddings of a batch: the feature maps, combined by ``fusion``.

        Parameters
        ----------
        pixels : ndarray of shape (B, H, W, 3)
            uint8 in [0, 255], or float32 in [0, 1].
        channels : ndarray of shape (d,), int64, optional
            Positions of the wanted channels among the D. All by default.

        Returns
        -------
        ndarray of shape (B, h, w, D), float32

        Raises
        ------
        InvalidValueError
            If the network cannot take images of this size, or gives no feature maps.
        """
        step = max(1, self.pixels_at_once // pixels[0, :, :, 0].size)
        wanted = slice(None) if channels is None else torch.from_numpy(channels)
        with torch.no_grad():
            parts = [
                patch_embeddings(self(pixels[i : i + step]), self.fusion)[..., wanted].cpu().numpy()
                for i in range(0, len(pixels), step)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __call__(self, pixels: np.ndarray | Tensor) -> list[Tensor]:
        """Feature maps of a batch.

        Parameters
        ----------
        pixels : ndarray or tensor of shape (B, H, W, 3)
            uint8 in [0, 255], or float32 in [0, 1].

        Returns
        -------
        list of tensors of shape (B, C, h, w)
            One per layer (and scale), of ``dtype``, on ``device``. With ``fusion="summary"``, as
            many of shape (B, C, 1, 1) follow: the class tokens, or the means over all positions.
            The attention is last, if it is asked for. Maps have gradients only with
            ``trainable``, or if a module that can be trained was added to ``network``.

        Raises
        ------
        InvalidValueError
            If the network cannot take images of this size, or gives no feature maps.
        """
        if self.scales != (1.0,):
            return self._at_all_scales(pixels)
        height, width = pixels.shape[1:3]
        white = 255.0 if pixels.dtype in (np.uint8, torch.uint8) else 1.0
        x = pixels if isinstance(pixels, Tensor) else torch.tensor(pixels, device=self.device)
        x = x.permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels last in memory
        x = x.mul(1 / (white * self._std)).sub_(self._mean / self._std)
        captured = self._captured[threading.get_ident()] = {}
        try:
            output = self.network(x.to(self.dtype))
        except _LastLayerReached:
            output = [captured[name] for name in self.layers]
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:  # how networks refuse a size
            raise InvalidValueError(
                f"{self.where}: the backbone cannot take images of {height}x{width}: {error}. "
                "Set image_size to what it was trained with."
            ) from error
        else:
            output = self._own_maps(output, captured)
        finally:
            del self._captured[threading.get_ident()]
        expected = self._channels or [None] * len(output)
        shapes = [tuple(getattr(m, "shape", ())) for m in output]
        as_announced = all(len(s) == 4 and s[1] == c for s, c in zip(shapes, expected, strict=True))
        maps = output
        if self._channels_last or not as_announced:
            size = (height, width)
            maps = [self._to_map(m, c, size) for m, c in zip(output, expected, strict=True)]
        if self.fusion == "summary":
            maps = [*maps, *(self._summary(o, m) for o, m in zip(output, maps, strict=True))]
        if self._attention is not None:
            maps.append(class_attention(self._attention, captured[_QKV], maps[0].shape[2:]))
        return maps

    def _at_all_scales(self, pixels: np.ndarray | Tensor) -> list[Tensor]:
        """Return the maps of all scales, then their summaries, then the full size's attention."""
        white = 255.0 if pixels.dtype in (np.uint8, torch.uint8) else 1.0
        x = pixels if isinstance(pixels, Tensor) else torch.tensor(pixels, device=self.device)
        x = x.permute(0, 3, 1, 2).float() / white
        once = copy.copy(self)
        once.scales = (1.0,)
        found = []
        for scale in self.scales:
            sides = [max(1, round(scale * n / self.stride)) * self.stride for n in x.shape[2:]]
            scaled = nn.functional.interpolate(x, sides, mode="bilinear", antialias=True)
            try:
                found.append(once(scaled.permute(0, 2, 3, 1)))
            except InvalidValueError as error:
                raise InvalidValueError(f"{error} Or use multi_scale=False.") from error
        n = len(found[0]) // 2 if self.fusion == "summary" else len(found[0])
        in_order = [m for maps in found for m in maps[:n]]
        in_order += [m for maps in found for m in maps[n : 2 * n]]
        return in_order + found[-1][2 * n :]

    def original_state(self) -> dict[str, Tensor]:
        """Read the weights from their source again: as they were before the change to ``dtype``.

        Returns
        -------
        dict of str to tensor

        Raises
        ------
        InvalidValueError, MissingPathError
            If the source is gone, or its weights have changed.
        """
        backbone, weights, state = self._origin
        if state is not None:
            return dict(state)
        if isinstance(backbone, str):
            network = from_timm(backbone, weights, None, self.where)[0]
        else:
            network = backbone
        if weights_sha256(network) != self.sha256:
            raise InvalidValueError(
                f"{self.where}: the weights of the backbone have changed since fit; fit again."
            )
        return {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}

    def _capture(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        captured = self._captured[threading.get_ident()]
        # A copy, since a later layer may change it in place.
        captured[name] = output.clone() if isinstance(output, Tensor) else output
        if name != _QKV and all(layer in captured for layer in self.layers):
            raise _LastLayerReached

    def _to_map(self, output: Any, channels: int | None, size: tuple[Any, Any]) -> Tensor:
        """Reshape a layer's output to (B, C, h, w): patch tokens to their grid, channels first."""
        if isinstance(output, Tensor) and output.ndim == 3:  # (B, prefix + h*w, C)
            prefix = int(getattr(self.network, "num_prefix_tokens", 0))
            n_patches = int(output.shape[1]) - prefix
            height = round((n_patches * int(size[0]) / int(size[1])) ** 0.5)
            if height > 0 and n_patches % height == 0:
                grid = (height, n_patches // height)
                if _is_tracing():  # computed from the input's size, so that the graph takes any
                    sides = zip(size, grid, strict=True)
                    grid = tuple(side // (int(side) // cells) for side, cells in sides)
                output = output[:, prefix:].transpose(1, 2)
                output = output.reshape(*output.shape[:2], *grid)
        elif isinstance(output, Tensor) and output.ndim == 4:
            last = channels not in (None, output.shape[1]) and output.shape[3] == channels
            if last or self._channels_last:
                output = output.permute(0, 3, 1, 2)
        if not isinstance(output, Tensor) or output.ndim != 4:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InvalidValueError(
                f"{self.where}: the backbone must give feature maps (B, C, h, w) or patch tokens "
                f"(B, h*w, C), got {got}. Name layers that do: "
                f"{[n for n, _ in self.network.named_children()]}."
            )
        return output

    def _summary(self, output: Tensor, feature_map: Tensor) -> Tensor:
        """Return the class token of a layer, or the mean over its positions: (B, C, 1, 1)."""
        if output.ndim == 3 and getattr(self.network, "cls_token", None) is not None:
            return output[:, 0, :, None, None]
        return feature_map.mean(dim=(2, 3), keepdim=True)

    def _own_maps(self, output: Any, captured: dict[str, Any]) -> list[Any]:
        """Return the feature maps that the network itself returns, if no layers were named."""
        if self.layers:
            unseen = [name for name in self.layers if name not in captured]
            raise InvalidValueError(
                f"{self.where}: no image passes through layers {unseen} of the backbone. Choose "
                "others."
            )
        maps = list(output.values()) if isinstance(output, Mapping) else output
        return list(maps) if isinstance(maps, list | tuple) and maps else [maps]

    def _choose_layers(
        self,
        layers: Sequence[str | int] | None,
        strides: Sequence[int],
        network: nn.Module,
        stages: list[dict[str, Any]],
    ) -> None:
        """Set the layers, the stride of the last of them, and how many channels each has."""
        chosen = default_layers(stages, strides) if layers is None else layers
        if layers is None and not chosen:
            self.layers: list[str] = []  # the module returns feature maps itself
        else:
            self.layers = self._resolve_layers(chosen, network, [s["module"] for s in stages])
        self.stride = max((s["reduction"] for s in stages if s["module"] in self.layers), default=1)
        channels = {s["module"]: s["num_chs"] for s in stages}
        self._channels = [channels.get(name) for name in self.layers]
        known = [int(c) for c in self._channels if c is not None]
        self.channels = known if known and len(known) == len(self._channels) else None

    def _resolve_layers(
        self, layers: Sequence[str | int], network: nn.Module, names: list[str]
    ) -> list[str]:
        """Return the names of layers given by name or by position among ``names``."""
        if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
            raise InvalidTypeError(
                f"{self.where}: layers must be a list of names or positions, got {layers!r}."
            )
        modules = dict(network.named_modules())
        resolved = []
        for layer in layers:
            if isinstance(layer, int | np.integer) and -len(names) <= layer < len(names):
                resolved.append(names[layer])
            elif isinstance(layer, str) and layer in modules and layer:
                resolved.append(layer)
            else:
                valid = names or [name for name, _ in network.named_children()]
                raise InvalidValueError(
                    f"{self.where}: layer {layer!r} does not exist; the backbone has {valid}."
                    f"{closest(layer, [*valid, *modules])}"
                )
        if len(set(resolved)) < len(resolved):
            raise InvalidValueError(f"{self.where}: layers name one layer twice: {resolved}.")
        return resolved

    def _read_conventions(self, network: nn.Module) -> None:
        """Set mean and deviation of the pixels, and whether maps have their channels last."""
        self._channels_last = "NHWC" in str(getattr(network, "output_fmt", ""))
        cfg = getattr(network, "pretrained_cfg", None) or {}
        self.mean = [float(m) for m in cfg.get("mean", _IMAGENET_MEAN)]
        self.std = [float(s) for s in cfg.get("std", _IMAGENET_STD)]
        self._mean = torch.tensor(self.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(self.std, device=self.device).view(3, 1, 1)

    def _add_hooks(self, network: nn.Module, attention: bool) -> None:
        """Let a forward pass capture the outputs of the layers, and stop after the last one."""
        self._captured: dict[int, dict[str, Tensor]] = {}  # by thread
        for name in self.layers:
            network.get_submodule(name).register_forward_hook(partial(self._capture, name))
        self._attention: Any = None
        if attention:
            self._attention = find_attention(network, self.layers, self.where)
            self._attention.qkv.register_forward_hook(partial(self._capture, _QKV))


def _network_and_stages(
    backbone: str | nn.Module,
    weights: str | Path | None,
    state: Mapping[str, Tensor] | None,
    where: str,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Return a network of our own with its weights, and timm's list of its feature stages."""
    if isinstance(backbone, str):
        return from_timm(backbone, weights, state, where)
    if not isinstance(backbone, nn.Module):
        raise InvalidTypeError(
            f"{where}: backbone must be a name or a torch.nn.Module, got {type(backbone).__name__}."
        )
    if weights is not None:
        raise InvalidValueError(
            f"{where}: weights go with the name of a backbone, not with a module. Load "
            "them into the module yourself."
        )
    network = copy.deepcopy(backbone)
    if state is not None:
        load_state(network, state, where)
    return network, list(getattr(backbone, "feature_info", []))  # timm's modules have it


def has_depthwise(network: nn.Module) -> bool:
    """Tell whether the network has a convolution in which each channel is filtered by itself.

    Such a convolution sums few products, so that bfloat16's rounding errors do not average out.
    """
    convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d))
    return any(c.groups == c.in_channels > 1 for c in convolutions)


class _LastLayerReached(Exception):  # noqa: N818, it is no error
    """Ends a forward pass when the outputs of all layers are captured."""
