"""Feature maps, one (B, C, h, w) per layer -> patch embeddings (B, h, w, D).

torch is imported by the first call, so that the names of the strategies can be read without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anomalib_lite._validation import check_choice
from anomalib_lite.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STRATEGIES", "patch_embeddings"]

# By name: the mode in which maps are resized, and the side of the square averaged before.
STRATEGIES = {
    "concat": ("bilinear", 3),
    "single": ("bilinear", 3),
    "mean": ("bilinear", 1),
    "nearest": ("nearest", 1),
    "summary": ("nearest", 1),
}


def patch_embeddings(
    feature_maps: Sequence[Tensor], strategy: str = "concat", neighbourhood: int | None = None
) -> Tensor:
    """Describe each patch of each image by one vector.

    Parameters
    ----------
    feature_maps : sequence of tensors of shape (B, C_l, h_l, w_l)
        One per layer, any float type; sizes may differ from layer to layer.
    strategy : {"concat", "single", "mean", "nearest", "summary"}, default="concat"
        How maps are resized to the size of the largest one: ``"concat"`` bilinearly, as in
        PatchCore; ``"nearest"`` gives each patch the vector of the cell that it lies in, as in
        PaDiM. The channels of all maps are then concatenated: D is the sum of the C_l.
        ``"single"`` takes the last map alone, at its own size. ``"mean"`` averages maps of equally
        many channels, as SubspaceAD does with the blocks of a vision transformer. ``"summary"`` is
        ``"nearest"`` with additional maps (B, C_l, 1, 1) that describe whole images;
        :class:`~anomalib_lite.backbones.Backbone` gives them as the second half.
    neighbourhood : int, optional
        Odd side of the square over which each map is averaged first, so that a patch knows its
        surroundings; 1 for no averaging. The default is 3 for ``"concat"`` and ``"single"``,
        else 1.

    Returns
    -------
    tensor of shape (B, h, w, D), float32, contiguous

    Raises
    ------
    InvalidValueError
        For an unknown strategy; for ``"mean"`` of maps with different numbers of channels.

    Notes
    -----
    Averaging has stride 1 and pads with zeros, which count in the mean, as in the authors' code
    of PatchCore (Roth et al., CVPR 2022, Section 3.1). PaDiM: Defard et al., ICPR 2021, Section
    III-A.

    Examples
    --------
    >>> import torch
    >>> patch_embeddings([torch.ones(2, 40, 8, 6), torch.ones(2, 112, 4, 3)]).shape
    torch.Size([2, 8, 6, 152])
    """
    import torch
    from torch.nn.functional import avg_pool2d, interpolate

    if strategy not in STRATEGIES:
        check_choice("fusion", strategy, STRATEGIES, "patch_embeddings")
    mode, side = STRATEGIES[strategy]
    side = side if neighbourhood is None else neighbourhood
    maps = [m.float() for m in (feature_maps[-1:] if strategy == "single" else feature_maps)]
    if side > 1:
        maps = [avg_pool2d(m, side, 1, side // 2) for m in maps]
    size = max((m.shape[-2:] for m in maps), key=lambda s: s[0] * s[1])
    maps = [m if m.shape[-2:] == size else interpolate(m, size, mode=mode) for m in maps]
    if strategy == "mean":
        channels = [m.shape[1] for m in maps]
        if len(set(channels)) > 1:
            raise InvalidValueError(
                f"patch_embeddings: fusion='mean' needs layers of equally many channels, got "
                f"{channels}. Choose other layers, or fusion='concat'."
            )
        maps = [torch.stack(maps).mean(dim=0)]
    return torch.cat(maps, dim=1).permute(0, 2, 3, 1).contiguous()  # (B, h, w, D)
