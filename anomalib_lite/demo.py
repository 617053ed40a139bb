"""A demonstration on real photographs: fit, test, and show what was found and what was missed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_lite._files import RowsFile, make_directory, shortest, writing
from anomalib_lite._validation import check_int
from anomalib_lite.datasets import ELPV, Dataset, Sample
from anomalib_lite.detectors.patchcore import PatchCore
from anomalib_lite.evaluation import Report, evaluate
from anomalib_lite.plotting import color_bar, contact_sheet, overlay
from anomalib_lite.report import page

__all__ = ["Gallery", "Tile", "run_demo"]

# Shown in each gallery at most.
_N_SHOWN = 6

_FILES = ("index.html", "overlays.png", "scores.csv", "report.json", "solar-cells.safetensors")


@dataclass(frozen=True)
class Tile:
    """One image of a gallery: photograph, overlay of the same size, and what is known of it."""

    photo: Image.Image
    overlay: Image.Image
    name: str
    score: float
    called_anomalous: bool
    truth: str


@dataclass(frozen=True)
class Gallery:
    """Some images of one outcome, and how many there are in all."""

    title: str
    explanation: str
    total: int
    tiles: list[Tile]


def run_demo(
    output: Path,
    *,
    n_train: int = 200,
    n_test: int = 300,
    false_alarm_rate: float = 0.05,
) -> Report:
    """Fit PatchCore on photographs of solar cells, test it, and write a page about it.

    Parameters
    ----------
    output : Path
        Directory for ``index.html``, ``overlays.png``, ``scores.csv``, ``report.json`` and
        ``solar-cells.safetensors``; made if need be.
    n_train : int, default=200
        Normal cells to fit on, evenly picked from the 392 that are not for testing.
    n_test : int, default=300
        Cells to test on, evenly picked from the other 509, which keeps the share of defects.
    false_alarm_rate : float, default=0.05
        Share of normal cells that may be called anomalous.

    Returns
    -------
    Report
        Of the test images.

    Raises
    ------
    MissingDependencyError
        If the package with the photographs is not installed.
    OutputError
        If ``output`` cannot be written to.
    InvalidValueError
        If a number is too small.

    Examples
    --------
    >>> from pathlib import Path
    >>> report = run_demo(Path("demo-output"))  # doctest: +SKIP
    """
    cells = ELPV("mono")
    make_directory(output)
    train, test = _pick(cells.train, n_train, "n_train"), _pick(cells.test, n_test, "n_test")
    print(f"Photographs: {cells.name}, {len(train)} to fit on, {len(test)} to test on.")
    print(f"Licence {cells.licence} (non-commercial). Source: {cells.source}")
    print(f"Cite: {cells.citation}\n", flush=True)
    # float32 gives the same scores on every processor; a small bank keeps the search short.
    detector = PatchCore(
        coreset_ratio=0.01, false_alarm_rate=false_alarm_rate, dtype="float32", verbose=1
    )
    start = time.perf_counter()
    detector.fit(train)
    fit_s = time.perf_counter() - start
    detector.verbose = 0
    report = evaluate(detector, Dataset(cells.name, train, test), progress=True)
    report = replace(
        report,
        counts={**report.counts, "train": len(train)},
        timings={"fit_s": fit_s, **report.timings},
    )
    print(report)
    galleries = make_galleries(detector, report)
    _write_scores(output / "scores.csv", report)
    report.to_json(output / "report.json")
    detector.save(output / "solar-cells.safetensors")
    with writing(output / "overlays.png"):
        _sheet(galleries, report.threshold, cells).save(output / "overlays.png")
    with writing(output / "index.html"):
        html = page(report, galleries, detector.false_alarm_rate, cells)
        (output / "index.html").write_text(html, encoding="utf-8", newline="\n")
    print(f"\nwritten to {output}: {', '.join(_FILES)}")
    print(f"open {output / 'index.html'}")
    return report


def make_galleries(detector: PatchCore, report: Report) -> list[Gallery]:
    """The four outcomes: defects found and missed, false alarms, good cells passed.

    Parameters
    ----------
    detector : PatchCore
        The one that the report is about.
    report : Report

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
        Gallery(title, text, len(indices), _tiles(detector, report, indices[:_N_SHOWN]))
        for title, text, indices in outcomes
    ]


def _pick(samples: Sequence[Sample], n: int, name: str) -> list[Sample]:
    """Evenly over the samples, which stand in the order of their kinds."""
    check_int(name, n, "demo", low=2, high=len(samples))
    return [samples[i] for i in np.linspace(0, len(samples) - 1, n).round().astype(int)]


def _ordered(which: np.ndarray, by: np.ndarray) -> np.ndarray:
    indices = np.flatnonzero(which)
    return indices[np.argsort(by[indices], kind="stable")]


def _tiles(detector: PatchCore, report: Report, indices: np.ndarray) -> list[Tile]:
    if len(indices) == 0:
        return []
    samples = [report.samples[i] for i in indices]
    maps = detector.detect(samples).maps
    tiles = []
    for index, sample, heatmap in zip(indices, samples, maps, strict=True):
        with Image.open(sample.path) as photo:
            tiles.append(
                Tile(
                    photo.convert("L"),
                    overlay(sample.path, heatmap, threshold=report.threshold),
                    sample.path.stem,
                    float(report.scores[index]),
                    bool(report.decisions[index]),
                    sample.kind,
                )
            )
    return tiles


def _write_scores(path: Path, report: Report) -> None:
    with RowsFile(path, ["image", "score", "label", "threshold", "truth"]) as rows:
        found = zip(report.samples, report.scores, report.decisions, strict=True)
        for sample, score, anomalous in found:
            label = "anomalous" if anomalous else "normal"
            threshold = shortest(report.threshold)
            rows.write([sample.path.name, shortest(score), label, threshold, sample.kind])


def _sheet(galleries: list[Gallery], threshold: float, cells: ELPV) -> Image.Image:
    """All galleries below each other, the scale and the source of the photographs."""
    shown = [gallery for gallery in galleries if gallery.tiles]
    sheets = [
        contact_sheet(
            [tile.overlay for tile in gallery.tiles],
            columns=_N_SHOWN,
            captions=[f"{tile.name}, score {tile.score:.1f}" for tile in gallery.tiles],
            title=f"{gallery.title} ({len(gallery.tiles)} of {gallery.total} shown)",
            tile_size=(190, 190),
        )
        for gallery in shown
    ]
    width = sheets[0].width
    sheets.append(
        contact_sheet(
            [color_bar(threshold, width=560)],
            columns=1,
            captions=[
                f"One colour is one score in all pictures; outlined above the threshold. "
                f"Photographs: ELPV, {cells.licence}, {cells.source}"
            ],
            tile_size=(52, width - 24),
        )
    )
    sheet = Image.new("RGB", (width, sum(part.height for part in sheets)), "white")
    top = 0
    for part in sheets:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet
