"""Feature maps, one (B, C, h, w) per layer -> patch embeddings (B, h, w, D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from anomalib_lite._validation import check_choice

__all__ = ["STRATEGIES", "patch_embeddings"]


def patch_embeddings(
    feature_maps: Sequence[Tensor], strategy: str = "concat", neighbourhood: int | None = None
) -> Tensor:
    """Describe each patch of each image by one vector.

    Parameters
    ----------
    feature_maps : sequence of tensors of shape (B, C_l, h_l, w_l)
        One per layer, any float type; sizes may differ from layer to layer.
    strategy : {"concat", "nearest", "summary"}, default="concat"
        How layers are brought to the size of the largest map: ``"concat"`` bilinearly, as in
        PatchCore; ``"nearest"`` gives each patch the vector of the cell that it lies in, as in
        PaDiM. Their channels then come one after the other: D is the sum of the C_l.
        ``"summary"`` is ``"nearest"`` for maps of which the second half are (B, C_l, 1, 1) and
        describe whole images, as :class:`~anomalib_lite.backbones.Backbone` gives them then.
    neighbourhood : int, optional
        Odd side of the square over which each map is averaged first, so that a patch knows its
        surroundings; 1 for none. By default 3 for ``"concat"``, else 1.

    Returns
    -------
    tensor of shape (B, h, w, D), float32, contiguous

    Raises
    ------
    InvalidValueError
        For an unknown strategy.

    Notes
    -----
    Averaging has stride 1 and pads with zeros, which count, as in the authors' code of
    PatchCore (Roth et al., CVPR 2022, Section 3.1). PaDiM: Defard et al., ICPR 2021, Section
    III-A.

    Examples
    --------
    >>> import torch
    >>> patch_embeddings([torch.ones(2, 40, 8, 6), torch.ones(2, 112, 4, 3)]).shape
    torch.Size([2, 8, 6, 152])
    """
    if strategy not in STRATEGIES:
        check_choice("fusion", strategy, STRATEGIES, "patch_embeddings")
    mode, side = STRATEGIES[strategy]
    side = side if neighbourhood is None else neighbourhood
    maps = [m.float() for m in feature_maps]
    if side > 1:
        maps = [avg_pool2d(m, side, 1, side // 2) for m in maps]
    size = max((m.shape[-2:] for m in maps), key=lambda s: s[0] * s[1])
    maps = [m if m.shape[-2:] == size else interpolate(m, size, mode=mode) for m in maps]
    return torch.cat(maps, dim=1).permute(0, 2, 3, 1).contiguous()  # (B, h, w, D)


# How maps are resized, and the neighbourhood that is averaged first.
STRATEGIES = {"concat": ("bilinear", 3), "nearest": ("nearest", 1), "summary": ("nearest", 1)}
