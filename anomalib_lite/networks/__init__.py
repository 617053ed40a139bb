"""Facts on networks that need no torch: names, figures, places of weights, LoRA updates."""

from anomalib_lite.networks._networks import NETWORKS, Network
from anomalib_lite.networks._sources import (
    WEIGHTS_VARIABLE,
    cached_file,
    directory_file,
    package_file,
    whereabouts,
)

__all__ = [
    "NETWORKS",
    "WEIGHTS_VARIABLE",
    "Network",
    "cached_file",
    "directory_file",
    "package_file",
    "whereabouts",
]
