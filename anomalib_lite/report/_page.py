"""The page itself: one HTML text that needs no network and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from string import Template

import numpy as np
from PIL import Image

from anomalib_lite.datasets import ELPV
from anomalib_lite.evaluation import Report
from anomalib_lite.plotting import SCALE, legend_colors
from anomalib_lite.report._galleries import Gallery, Tile
from anomalib_lite.report._histogram import histogram

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>anomalib-lite: solar cells</title>
<style>
:root { color-scheme: light; --ink: #1f2933; --faint: #5b6875; --line: #e1e6eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 16px 48px; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 8px; }
h2 { font-size: 1.2rem; margin: 0; }
p { margin: 4px 0 16px; max-width: 75ch; }
.faint { color: var(--faint); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px; margin-top: 20px; }
table { border-collapse: collapse; width: 100%; margin-top: 8px; }
td { padding: 8px 16px 8px 0; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child td { border-top: 0; }
td:first-child { white-space: nowrap; }
td:nth-child(2) { font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; }
td:last-child { color: var(--faint); padding-right: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; fill: var(--ink); }
.narrow { display: none; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 20px; }
figure { margin: 0; min-width: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.pair img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: .875rem; margin-top: 6px; }
.bad { color: #b3261e; font-weight: 600; }
.good { color: #2e7d32; font-weight: 600; }
.bar { height: 16px; border-radius: 4px; max-width: 560px; }
.ends { display: grid; grid-template-columns: 1fr auto 1fr; max-width: 560px;
  font-size: .875rem; margin: 4px 0 0; }
.ends span:last-child { text-align: right; }
footer { color: var(--faint); font-size: .875rem; margin-top: 24px; overflow-wrap: anywhere; }
a { color: #1d5fa8; }
@media (max-width: 640px) {
  main { padding: 20px 12px 32px; }
  h1 { font-size: 1.4rem; }
  section { padding: 16px 14px; }
  .wide { display: none; }
  .narrow { display: block; }
  .grid { grid-template-columns: 1fr; }
  tr { display: grid; grid-template-columns: 1fr auto; border-top: 1px solid var(--line);
    padding: 8px 0; }
  tr:first-child { border-top: 0; padding-top: 0; }
  td, td:first-child { border: 0; padding: 0; white-space: normal; }
  td:last-child { grid-column: 1 / -1; font-size: .875rem; }
}
</style>
</head>
<body>
<main>
<h1>$headline</h1>
<p>$introduction</p>
<section>
<h2>How good it is</h2>
<table>
$rows
</table>
</section>
<section>
<h2>Scores of the test cells</h2>
<p class="faint">A cell is called anomalous to the right of the threshold, which was set from
normal cells alone, before any defect was seen.</p>
<div class="wide">$wide</div>
<div class="narrow">$narrow</div>
</section>
<section>
<h2>How to read the pictures</h2>
<p class="faint">Left the photograph, right the heatmap laid over it. One colour is one score in
all pictures; ordinary patches are hardly tinted, and a white line surrounds what exceeds the
threshold. Heatmaps are smoothed, so a cell that is anomalous by a small margin may have no
line. The labels are per cell, so where the defect lies was not measured.</p>
<div class="bar" style="background: linear-gradient(to right, $gradient)"></div>
<p class="ends"><span>to $low</span><span>threshold $threshold</span><span>from $high</span></p>
</section>
$galleries
<footer>
<p>Photographs: ELPV, electroluminescence images of solar cells. Licence: $licence
(non-commercial; this page, which shows them, is under the same licence). Source:
<a href="$source">$source</a>.</p>
<p>Cite: $citation.</p>
<p>The cells were cut from 44 modules and the labels do not say which, so cells of one module
are in training and in test: the figures hold for modules of which some cells are known. Made by
anomalib-lite $version.</p>
</footer>
</main>
</body>
</html>
""")


def page(report: Report, galleries: Sequence[Gallery], false_alarm_rate: float, cells: ELPV) -> str:
    """Return the whole page as HTML; every picture is embedded in it."""
    counts, seconds = report.counts, report.timings
    low, high = (report.threshold * end for end in SCALE)
    headline = (
        f"Learned from {counts['train']} good solar cells in {seconds['fit_s']:.0f} seconds, "
        f"then tested on {counts['test']} others in {seconds['test_s']:.0f} seconds"
    )
    introduction = (
        f"A {report.detector} detector saw photographs of good monocrystalline cells alone, and no "
        f"defect. Then it scored {counts['test_normal']} other good cells and "
        f"{counts['test_anomalous']} defective ones, {seconds['ms_per_image']:.0f} ms each on "
        "this machine. What it missed is shown below as well as what it found. The cells were "
        f"picked evenly from the {len(cells.train)} and {len(cells.test)} whose label is certain."
    )
    return _PAGE.substitute(
        headline=escape(headline),
        introduction=escape(introduction),
        rows="\n".join(_metric_rows(report, false_alarm_rate)),
        wide=histogram(report, 1040, 330),
        narrow=histogram(report, 340, 300),
        gradient=", ".join(legend_colors()),
        low=f"{low:.1f}",
        threshold=f"{report.threshold:.1f}",
        high=f"{high:.1f}",
        galleries="\n".join(map(_gallery, galleries)),
        licence=escape(cells.licence),
        source=escape(cells.source),
        citation=escape(cells.citation),
        version=escape(report.versions["anomalib_lite"]),
    )


def _metric_rows(report: Report, false_alarm_rate: float) -> list[str]:
    figures, counts = report.metrics, report.counts
    truth = np.array([sample.label for sample in report.samples], dtype=bool)
    found, alarms = (int(report.decisions[which].sum()) for which in (truth, ~truth))
    rows = [
        (
            "Image AUROC",
            f"{figures['image_auroc']:.3f}",
            "How often a defective cell scores higher than a good one, over all pairs; 0.5 is "
            "guessing, 1 is perfect.",
        ),
        (
            "Average precision",
            f"{figures['image_ap']:.3f}",
            "Share of defective cells among those ranked highest, averaged over how many of the "
            "defects are to be found.",
        ),
        (
            "F1-max",
            f"{figures['image_f1_max']:.3f}",
            "Best balance of misses and false alarms at any threshold. Chosen with hindsight, "
            "so an upper bound.",
        ),
        (
            "Defects found",
            f"{found} of {counts['test_anomalous']} ({figures['detection_rate']:.1%})",
            "Defective cells above the threshold.",
        ),
        (
            "False alarms",
            f"{alarms} of {counts['test_normal']} ({figures['false_alarm_rate']:.1%})",
            f"Good cells above the threshold. Asked for were at most {false_alarm_rate:.1%}, "
            "which holds on average over draws of the calibration cells.",
        ),
    ]
    return [
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td><td>{escape(text)}</td></tr>"
        for name, value, text in rows
    ]


def _gallery(gallery: Gallery) -> str:
    shown = len(gallery.tiles)
    count = f"{shown} of {gallery.total} shown" if shown else "none in this run"
    figures = "\n".join(map(_figure, gallery.tiles))
    grid = f'<div class="grid">\n{figures}\n</div>\n' if shown else ""
    return (
        f"<section>\n<h2>{escape(gallery.title)}</h2>\n"
        f'<p class="faint">{escape(gallery.explanation)} {count[:1].upper()}{count[1:]}.</p>\n'
        f"{grid}</section>"
    )


def _figure(tile: Tile) -> str:
    name = escape(tile.name)
    called = "anomalous" if tile.called_anomalous else "normal"
    right = tile.called_anomalous == (tile.truth != "normal")
    return (
        '<figure><div class="pair">'
        f'<img src="{_inline(tile.photo)}" alt="{name}, photograph">'
        f'<img src="{_inline(tile.overlay)}" alt="{name}, heatmap">'
        f"</div><figcaption>score {tile.score:.1f}, called "
        f'<span class="{"good" if right else "bad"}">{called}</span>, labelled '
        f'{escape(tile.truth)} <span class="faint">({name})</span></figcaption></figure>'
    )


def _inline(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
