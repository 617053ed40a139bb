"""A name or a module -> a frozen network -> feature maps."""

from anomalib_lite.backbones._backbone import EMBEDDED, Backbone
from anomalib_lite.backbones._weights import weights_sha256

__all__ = [
    "EMBEDDED",
    "Backbone",
    "weights_sha256",
]
