"""How a detector fits on images that may not all be in memory."""

from anomalib_lite.detectors.fitting.groups import (
    folds_of,
    group_starts,
    order_of_fit,
    whole_groups,
)
from anomalib_lite.detectors.fitting.model import (
    Accumulator,
    EmbeddingModel,
    Folding,
    InMemory,
    LeftOut,
    ShardResult,
    ShardSource,
    ShardTask,
    images_within_budget,
    refuse_budget,
)
from anomalib_lite.detectors.fitting.shards import (
    CountedEmbeddings,
    Distribute,
    EmbeddingStream,
    ImageShards,
    Indexed,
    NumberedNames,
    embed_distributed,
    iter_grids,
    none_usable,
)
from anomalib_lite.detectors.fitting.workers import distribute

__all__ = [
    "Accumulator",
    "Distribute",
    "EmbeddingModel",
    "CountedEmbeddings",
    "EmbeddingStream",
    "Folding",
    "ImageShards",
    "InMemory",
    "Indexed",
    "NumberedNames",
    "LeftOut",
    "ShardResult",
    "ShardSource",
    "ShardTask",
    "distribute",
    "embed_distributed",
    "folds_of",
    "group_starts",
    "images_within_budget",
    "iter_grids",
    "none_usable",
    "order_of_fit",
    "refuse_budget",
    "whole_groups",
]
