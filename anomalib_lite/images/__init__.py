"""Anything that is an image -> batches of one size -> their patch embeddings."""

from anomalib_lite.images._in_memory import by_size, load_all, to_uint8
from anomalib_lite.images._listing import (
    MASK_ENDINGS,
    image_suffixes,
    images_and_masks,
    list_files,
    visible_directories,
    warn_left_out,
)
from anomalib_lite.images._pixels import check_one_page
from anomalib_lite.images._source import (
    TILE_PIXELS,
    Batch,
    Embedder,
    Extractor,
    ImageSource,
    iter_batches,
)

__all__ = [
    "MASK_ENDINGS",
    "TILE_PIXELS",
    "Batch",
    "Embedder",
    "Extractor",
    "ImageSource",
    "by_size",
    "check_one_page",
    "image_suffixes",
    "images_and_masks",
    "iter_batches",
    "list_files",
    "load_all",
    "to_uint8",
    "visible_directories",
    "warn_left_out",
]
