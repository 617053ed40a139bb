"""Batch norms merged into the convolutions before them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["fold_batch_norms"]


def fold_batch_norms(network: nn.Module, keep: Sequence[str]) -> nn.Module:
    """Merge batch norms into the convolutions before them: the same maps with less work.

    Parameters
    ----------
    network : torch.nn.Module
        In evaluation mode.
    keep : sequence of str
        Names of modules whose output must not change.

    Returns
    -------
    torch.nn.Module
        A copy with its batch norms merged; the network itself if it has none, cannot take a
        small image, or its copy gives other maps.

    Examples
    --------
    >>> import torch
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    >>> fold_batch_norms(network, keep=[])[1]
    Identity()
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    # In float64 a correct merge is exact to 1e-6, so that any larger difference shows a wrong one.
    folded = copy.deepcopy(network).cpu().double()
    # By the id of an output: the convolution and the tensor, kept so that no id is used again.
    made_by: dict[int, tuple[str, Tensor]] = {}
    norm_of: dict[str, list[str]] = {}  # convolution -> the batch norms that take its output
    hooks = []

    def forget(output: Any) -> None:
        made_by.pop(id(output), None)

    for name, module in folded.named_modules():
        if name in keep:  # the output must stay, also if it is that of a convolution inside
            hooks.append(module.register_forward_hook(lambda _m, _i, out: forget(out)))
        elif isinstance(module, nn.Conv2d):
            made = partial(lambda n, _m, _i, out: made_by.update({id(out): (n, out)}), name)
            hooks.append(module.register_forward_hook(made))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            taken = partial(
                lambda n, _m, i: norm_of.setdefault(made_by.get(id(i[0]), ("",))[0], []).append(n),
                name,
            )
            hooks.append(module.register_forward_pre_hook(taken))
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=generator)
    try:
        with torch.no_grad():
            expected = folded(example)
            for hook in hooks:
                hook.remove()
            for conv, norms in norm_of.items():
                if conv and len(norms) == 1:
                    _merge(folded, conv, norms[0])
            torch.testing.assert_close(folded(example), expected, rtol=1e-6, atol=1e-12)
    except Exception:  # a module may refuse the small image, float64 or the merge in any way
        return network
    return folded.float()


def _merge(network: nn.Module, conv_name: str, norm_name: str) -> None:
    conv: Any = network.get_submodule(conv_name)
    norm: Any = network.get_submodule(norm_name)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    parent, _, name = norm_name.rpartition(".")
    # timm's batch norms hold the activation that follows them.
    setattr(network.get_submodule(parent), name, getattr(norm, "act", nn.Identity()))
