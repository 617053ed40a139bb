"""Galleries: for each outcome of a test, some images with their heatmaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from anomalib_lite.detectors.detections import outline_level
from anomalib_lite.evaluation import Detector, Report
from anomalib_lite.plotting import overlay

# Largest number of images in a gallery.
N_SHOWN = 6


@dataclass(frozen=True)
class Tile:
    """One image of a gallery: photograph, overlay of the same size, score and label."""

    photo: Image.Image
    overlay: Image.Image
    name: str
    score: float
    called_anomalous: bool
    truth: str


@dataclass(frozen=True)
class Gallery:
    """Some images of one outcome, and the number of all images with this outcome."""

    title: str
    explanation: str
    total: int
    tiles: list[Tile]


def make_galleries(detector: Detector, report: Report) -> list[Gallery]:
    """Make a gallery of each outcome: defects found and missed, false alarms, good cells passed.

    Parameters
    ----------
    detector : Detector
        The detector that was tested; it makes the heatmaps.
    report : Report
        Results of the test.

    Returns
    -------
    list of four Gallery
    """
    truth = np.array([sample.label for sample in report.samples], dtype=bool)
    called = report.decisions
    passed = np.flatnonzero(~truth & ~called)
    middle = np.median(report.scores[passed]) if len(passed) else 0.0
    outcomes = [
        (
            "Defects found",
            "Defective cells above the threshold, highest score first.",
            _ordered(truth & called, -report.scores),
        ),
        (
            "Defects missed",
            "Defective cells that were called normal, lowest score first: the worst misses.",
            _ordered(truth & ~called, report.scores),
        ),
        (
            "False alarms",
            "Normal cells that were called anomalous, highest score first.",
            _ordered(~truth & called, -report.scores),
        ),
        (
            "Typical good cells",
            "Normal cells that were called normal, those with the most ordinary scores.",
            _ordered(~truth & ~called, np.abs(report.scores - middle)),
        ),
    ]
    return [
        Gallery(title, text, len(indices), _tiles(detector, report, indices[:N_SHOWN]))
        for title, text, indices in outcomes
    ]


def _ordered(chosen: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the positions where ``chosen`` is True, sorted by ``key``."""
    indices = np.flatnonzero(chosen)
    return indices[np.argsort(key[indices], kind="stable")]


def _tiles(detector: Detector, report: Report, indices: np.ndarray) -> list[Tile]:
    if len(indices) == 0:
        return []
    samples = [report.samples[i] for i in indices]
    maps = detector.detect(samples).maps
    level = getattr(detector, "_map_threshold", report.threshold)
    tiles = []
    for index, sample, heatmap in zip(indices, samples, maps, strict=True):
        called = bool(report.decisions[index])
        outline = outline_level(heatmap, level) / level if called else None
        picture = overlay(sample.path, heatmap, threshold=level, outline=outline)
        score = float(report.scores[index])
        with Image.open(sample.path) as photo:
            gray = photo.convert("L")
        tiles.append(Tile(gray, picture, sample.path.stem, score, called, sample.kind))
    return tiles
