"""Anything that is an image -> batches of one size -> their patch embeddings."""

from anomalib_lite.images._in_memory import by_size, load_all, to_uint8
from anomalib_lite.images._listing import IMAGE_SUFFIXES, list_files
from anomalib_lite.images._source import (
    TILE_PIXELS,
    Batch,
    Embedder,
    Extractor,
    ImageSource,
    iter_batches,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "TILE_PIXELS",
    "Batch",
    "Embedder",
    "Extractor",
    "ImageSource",
    "by_size",
    "iter_batches",
    "list_files",
    "load_all",
    "to_uint8",
]
