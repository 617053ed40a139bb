"""Low-rank adaptation of a vision transformer to normal images."""

from anomalib_lite.lora._epochs import early_best
from anomalib_lite.lora._training import Adapter, adaptive_rank, check_peft, train_adapter

__all__ = [
    "Adapter",
    "adaptive_rank",
    "check_peft",
    "early_best",
    "train_adapter",
]
