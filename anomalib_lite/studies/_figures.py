"""Figures of studies in one style: safe for colour-blind eyes, labelled, and nothing cut off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite._files import replacing
from anomalib_lite.studies._extra import import_extra
from anomalib_lite.studies._sources import short_name

__all__ = [
    "COLORS",
    "MARKERS",
    "draw_bars",
    "draw_categories",
    "draw_matrix",
    "new_figure",
    "save_figure",
]

# Okabe and Ito's colours, told apart with any colour vision; yellow is too light for lines.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure and its panels, an array of shape (rows, columns).

    Parameters
    ----------
    rows, columns : int
    size : (width, height)
        In inches; 110 pixels each.

    Examples
    --------
    >>> figure, panels = new_figure(2, 2, (8, 6))
    >>> panels.shape
    (2, 2)
    """
    figure = import_extra("matplotlib.figure").Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure, panels


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_bars(
    panel: Any,
    names: Sequence[str],
    values: Sequence[float],
    spreads: Sequence[float] | None = None,
    *,
    title: str,
    label: str,
) -> None:
    """Draw a bar for each name, with its value at the end and its spread as a line.

    Parameters
    ----------
    panel : Axes
    names : sequence of str
    values : sequence of float
        NaN leaves a gap and says "not measured".
    spreads : sequence of float, optional
        Half the length of each line; NaN for none.
    title, label : str
        Title of the panel, and label of the values.

    Examples
    --------
    >>> figure, [[panel]] = new_figure(1, 1, (4, 3))
    >>> draw_bars(panel, ["a", "b"], [0.9, 0.7], [0.01, 0.02], title="All", label="image AUROC")
    >>> len(panel.patches)
    2
    """
    heights = np.asarray(values, dtype=float)
    lines = np.nan_to_num(np.zeros_like(heights) if spreads is None else np.asarray(spreads, float))
    colors = [COLORS[i % len(COLORS)] for i in range(len(names))]
    panel.bar(range(len(names)), np.nan_to_num(heights), color=colors, yerr=lines, capsize=4)
    top = float(np.nanmax(np.abs(heights) + lines, initial=0.01))
    for i, height in enumerate(heights):
        measured = np.isfinite(height)
        text = f"{height:.3f}" if measured else "not measured"
        end = lines[i] + 0.02 * top if measured else 0.02 * top
        above = not measured or height >= 0
        place, side = (max(0, height) + end, "bottom") if above else (height - end, "top")
        panel.text(i, place, text, ha="center", va=side, fontsize=9)
    low = float(np.nanmin(heights - lines, initial=0.0))
    high = float(np.nanmax(heights + lines, initial=0.0))
    panel.set_ylim(low - (0.12 * top if low < 0 else 0), 1.15 * top if high > 0 else 0.05 * top)
    panel.set_xticks(range(len(names)), names, rotation=20, ha="right")
    panel.set(title=title, ylabel=label)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.grid(axis="y", alpha=0.3)


def draw_categories(
    panel: Any, rows: Any, compared: str, names: Sequence[str], *, title: str
) -> None:
    """Draw the image AUROC of each category: a mark for each of what is compared.

    Parameters
    ----------
    panel : Axes
    rows : DataFrame
        Has the columns ``category``, ``image_auroc`` and ``compared``; means are drawn.
    compared : str
        Column of what is compared.
    names : sequence of str
        Its values in order; one without rows has no mark.
    title : str

    Examples
    --------
    >>> import pandas as pd
    >>> names = {"method": ["a", "a", "b"], "category": ["textile", "visa/pcb1", "textile"]}
    >>> rows = pd.DataFrame(names | {"image_auroc": [0.9, 0.8, 0.7]})
    >>> figure, [[panel]] = new_figure(1, 1, (4, 3))
    >>> draw_categories(panel, rows, "method", ["a", "b", "c"], title="All")
    >>> [line.get_label() for line in panel.lines]
    ['a', 'b']
    """
    grid = rows.pivot_table(index="category", columns=compared, values="image_auroc", sort=False)
    for i, name in enumerate(names):
        if name in grid:
            place = np.arange(len(grid)) + 0.6 * ((i + 0.5) / len(names) - 0.5)
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            panel.plot(place, grid[name], marker, color=color, label=name, markersize=5)
    short = [short_name(name) for name in grid.index]
    panel.set_xticks(range(len(grid)), short, rotation=45, ha="right", fontsize=8)
    panel.set(title=title, ylabel="image AUROC")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_matrix(
    panel: Any,
    matrix: Any,
    *,
    title: str,
    label: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a matrix of numbers as colours, the numbers in its cells if they fit.

    Parameters
    ----------
    panel : Axes
    matrix : DataFrame
        Index and columns name rows and columns; NaN stays white.
    title, label : str
        Title of the panel, and what the colours mean.
    limits : (low, high), optional
        Ends of the colours; by default the smallest and largest value.

    Examples
    --------
    >>> import pandas as pd
    >>> figure, [[panel]] = new_figure(1, 1, (4, 3))
    >>> names = pd.Index(["a", "b"], name="fitted on")
    >>> draw_matrix(panel, pd.DataFrame([[1, 0.5], [0.6, 0.9]], names, names), title="", label="x")
    >>> [text.get_text() for text in panel.texts]
    ['1.00', '0.50', '0.60', '0.90']
    """
    values = matrix.to_numpy(dtype=float)
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    image = panel.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    panel.figure.colorbar(image, ax=panel, label=label)
    panel.set_xticks(range(values.shape[1]), matrix.columns, rotation=60, ha="right", fontsize=8)
    panel.set_yticks(range(values.shape[0]), matrix.index, fontsize=8)
    panel.set(title=title, xlabel=matrix.columns.name or "", ylabel=matrix.index.name or "")
    if max(values.shape) > 20:
        return
    middle = (low + high) / 2
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value < middle else "black"
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=color)
