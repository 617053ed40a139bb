"""A histogram of image scores, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import numpy as np

from anomalib_lite.evaluation import Report

_COLORS = {"Normal": "#2f6fb0", "Defective": "#d9622b"}


@dataclass(frozen=True)
class _Plot:
    """Size of the picture in pixels, and the scales of its axes."""

    width: int
    height: int
    x_ticks: list[float]
    y_ticks: list[float]

    left, top = 48, 56

    @property
    def right(self) -> int:
        """Right edge of the axes, in pixels from the left."""
        return self.width - 12

    @property
    def bottom(self) -> int:
        """Bottom edge of the axes, in pixels from the top."""
        return self.height - 44

    def x(self, score: float) -> float:
        """Return where a score lies, in pixels from the left."""
        first, last = self.x_ticks[0], self.x_ticks[-1]
        return self.left + (score - first) / (last - first) * (self.right - self.left)

    def y(self, count: float) -> float:
        """Return where a count lies, in pixels from the top."""
        return self.bottom - count / self.y_ticks[-1] * (self.bottom - self.top)


def histogram(report: Report, width: int, height: int) -> str:
    """Draw the scores of normal and defective cells, with axes, legend and threshold.

    Parameters
    ----------
    report : Report
        Results of the test cells.
    width, height : int
        Size of the picture in pixels.

    Returns
    -------
    str
        An SVG element.
    """
    truth = np.array([sample.label for sample in report.samples], dtype=bool)
    ends = [*report.scores, report.threshold]
    x_ticks = _ticks(min(ends), max(ends), width // 70)
    edges = np.linspace(x_ticks[0], x_ticks[-1], min(40, width // 20) + 1)
    counts = {
        "Normal": np.histogram(report.scores[~truth], edges)[0],
        "Defective": np.histogram(report.scores[truth], edges)[0],
    }
    y_ticks = _ticks(0, max(int(bars.max()) for bars in counts.values()), 5)
    plot = _Plot(width, height, x_ticks, y_ticks)
    elements = [*_grid_lines(plot)]
    for name, bars in counts.items():
        elements += _bars(plot, edges, bars, _COLORS[name])
    elements += [*_axis_labels(plot), *_threshold_line(plot, report.threshold), *_legend(plot)]
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Histogram of the scores of '
        f'normal and defective cells, with the threshold">{"".join(elements)}</svg>'
    )


def _grid_lines(plot: _Plot) -> Iterator[str]:
    """Yield a horizontal line, and its number, for each tick of the y axis."""
    for tick in plot.y_ticks:
        y = plot.y(tick)
        yield (
            f'<line x1="{plot.left}" x2="{plot.right}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="#e1e6eb"/>{_text(plot.left - 8, y + 5, f"{tick:g}", "end")}'
        )


def _bars(plot: _Plot, edges: np.ndarray, counts: np.ndarray, color: str) -> Iterator[str]:
    for i, count in enumerate(counts):
        if count:
            x, step = plot.x(edges[i]), plot.x(edges[i + 1]) - plot.x(edges[i])
            yield (
                f'<rect x="{x + 0.5:.1f}" y="{plot.y(count):.1f}" width="{step - 1:.1f}" '
                f'height="{plot.bottom - plot.y(count):.1f}" fill="{color}" fill-opacity="0.65"/>'
            )


def _axis_labels(plot: _Plot) -> Iterator[str]:
    for tick in plot.x_ticks:
        yield _text(plot.x(tick), plot.bottom + 19, f"{tick:g}", "middle")
    yield _text((plot.left + plot.right) / 2, plot.height - 6, "anomaly score", "middle")
    yield _text(12, (plot.top + plot.bottom) / 2, "cells", "middle", turned=True)


def _threshold_line(plot: _Plot, threshold: float) -> Iterator[str]:
    x = plot.x(threshold)
    yield (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{plot.top - 8}" y2="{plot.bottom}" '
        'stroke="#1f2933" stroke-width="2" stroke-dasharray="6 4"/>'
    )
    # The text stays inside the picture, wherever the line is.
    middle = min(max(x, plot.left + 55), plot.right - 55)
    yield _text(middle, plot.top - 14, f"threshold {threshold:.1f}", "middle")


def _legend(plot: _Plot) -> Iterator[str]:
    for i, (name, color) in enumerate(_COLORS.items()):
        x = plot.left + i * 100
        yield f'<rect x="{x}" y="4" width="14" height="14" fill="{color}" rx="2"/>'
        yield _text(x + 20, 16, name, "start")


def _text(x: float, y: float, words: str, anchor: str, *, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="14" text-anchor="{anchor}"{turn}>'
        f"{escape(words)}</text>"
    )


def _ticks(low: float, high: float, n: int) -> list[float]:
    """Return about ``n`` steps of a round number that cover ``low`` to ``high``.

    Examples
    --------
    >>> _ticks(13.4, 51.2, 5)
    [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    """
    rough = max(high - low, 1e-9) / max(n, 2)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]
