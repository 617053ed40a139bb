"""How a detector learns from images that may not fit into memory."""

from anomalib_lite.detectors.fitting.shards import learn_embeddings, learn_images

__all__ = [
    "learn_embeddings",
    "learn_images",
]
