"""Evaluation: a detector and a data set -> a report."""

from anomalib_lite.evaluation._evaluate import Detector, Report, evaluate
from anomalib_lite.evaluation._report import peak_memory

__all__ = [
    "Detector",
    "Report",
    "evaluate",
    "peak_memory",
]
