"""Feature maps -> patch embeddings, and what is learned from normal ones to change them."""

from anomalib_lite.fusion._strategies import STRATEGIES, patch_embeddings
from anomalib_lite.fusion._transform import PROJECTIONS, EmbeddingTransform, unit_rows

__all__ = ["PROJECTIONS", "STRATEGIES", "EmbeddingTransform", "patch_embeddings", "unit_rows"]
