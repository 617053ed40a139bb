"""Evaluation: a detector and a data set -> a report."""

from anomalib_lite.evaluation._evaluate import Detector, Report, evaluate

__all__ = [
    "Detector",
    "Report",
    "evaluate",
]
