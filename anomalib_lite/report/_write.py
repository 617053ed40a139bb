"""Write the results of a test into a directory: page, pictures, scores and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from anomalib_lite._files import RowsFile, shortest, writing
from anomalib_lite.datasets import ELPV
from anomalib_lite.evaluation import Detector, Report
from anomalib_lite.plotting import color_bar, contact_sheet
from anomalib_lite.report._galleries import N_SHOWN, Gallery, make_galleries
from anomalib_lite.report._page import page

# Names of the files, in the order in which people look at them.
FILES = ("index.html", "overlays.png", "scores.csv", "report.json")


def write_report(
    output: Path, report: Report, detector: Detector, *, false_alarm_rate: float, cells: ELPV
) -> None:
    """Write :data:`FILES` into a directory.

    Parameters
    ----------
    output : Path
        Existing directory.
    report : Report
        Results of the test, with ``timings["fit_s"]`` and ``counts["train"]``.
    detector : Detector
        The detector that was tested; it makes the heatmaps.
    false_alarm_rate : float
        Rate that the threshold was calibrated for.
    cells : ELPV
        Data set of the test, for its licence, source and citation.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    galleries = make_galleries(detector, report)
    _write_scores(output / "scores.csv", report)
    report.to_json(output / "report.json")
    with writing(output / "overlays.png"):
        _sheet(galleries, report.threshold, cells).save(output / "overlays.png")
    with writing(output / "index.html"):
        html = page(report, galleries, false_alarm_rate, cells)
        (output / "index.html").write_text(html, encoding="utf-8", newline="\n")


def _write_scores(path: Path, report: Report) -> None:
    with RowsFile(path, ["image", "score", "label", "threshold", "truth"]) as rows:
        found = zip(report.samples, report.scores, report.decisions, strict=True)
        for sample, score, anomalous in found:
            label = "anomalous" if anomalous else "normal"
            threshold = shortest(report.threshold)
            rows.write([sample.path.name, shortest(score), label, threshold, sample.kind])


def _sheet(galleries: Sequence[Gallery], threshold: float, cells: ELPV) -> Image.Image:
    """Draw all galleries below each other, then the colour scale and the source of the images."""
    sheets = [
        contact_sheet(
            [tile.overlay for tile in gallery.tiles],
            columns=N_SHOWN,
            captions=[f"{tile.name}, score {tile.score:.1f}" for tile in gallery.tiles],
            title=f"{gallery.title} ({len(gallery.tiles)} of {gallery.total} shown)",
            tile_size=(190, 190),
        )
        for gallery in galleries
        if gallery.tiles
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
    whole = Image.new("RGB", (width, sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole
