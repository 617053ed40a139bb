"""Short names of networks, their figures, and where their weights are; needs no torch."""

from anomalib_lite.registry._networks import NETWORKS, Network
from anomalib_lite.registry._sources import (
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
