"""A sweep of thresholds as a picture: recall against heatmap calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from anomalib_lite.errors import InvalidTypeError, InvalidValueError, MissingDependencyError

__all__ = ["plot_sweep"]

_WHERE = "Sweep.plot"
_FAINT, _FRONT, _ALONE = "#8a94a0", "#1f5fa8", "#c62828"
_CORNERS = ("lower right", "upper left", "lower left", "upper right")
_MOST_LABELS = 6
# Where a label may stand: offset from its point in typographic points, and alignment. Above and
# left of a front there are no other points.
_OFFSETS = (
    ((-6, 6), "right", "bottom"),
    ((6, -6), "left", "top"),
    ((-6, 18), "right", "bottom"),
    ((6, -18), "left", "top"),
    ((7, 0), "left", "center"),
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
)


def plot_sweep(
    rows: Sequence[dict[str, Any]],
    front: Sequence[dict[str, Any]],
    alone: dict[str, Any] | None,
    gate_ms: float,
    detector_ms: float,
    ax: Any = None,
) -> Any:
    """Draw what :meth:`Sweep.plot` documents, from the attributes of a sweep."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            f"{_WHERE}: needs matplotlib, which is not installed. Install it with: "
            "pip install 'anomalib-lite[plot]', or write the rows with to_csv."
        )
    points = _points(rows)
    axes = _new_axes() if ax is None else _checked(ax)
    _draw(axes, points, _points(front), alone)
    _add_milliseconds(axes, gate_ms, detector_ms)
    # Positions are final only after a layout. Axes may lie in a subfigure, which has no canvas.
    axes.figure.canvas.figure.draw_without_rendering()
    legend = _add_legend(axes, points, front)
    if alone is not None:
        across = np.linspace(0, 1, 100)
        points = np.concatenate([points, [(x, alone["recall"]) for x in across]])
    _add_labels(axes, front, points, legend)
    return axes


def _draw(ax: Any, points: np.ndarray, front: np.ndarray, alone: dict[str, Any] | None) -> None:
    """Draw everything but the legend and the labels."""
    ax.scatter(*points.T, s=14, color=_FAINT, alpha=0.4, linewidths=0, label="pair of thresholds")
    ax.plot(*front.T, "o-", color=_FRONT, markersize=5, label="Pareto front, t_low / t_high")
    if alone is not None:
        ax.axhline(
            alone["recall"],
            color=_ALONE,
            linestyle="--",
            linewidth=1,
            label=f"heatmap model alone, {alone['ms_per_image']:.3g} ms per image",
        )
    ax.set(xlabel="heatmap calls, share of images", ylabel="recall")
    bottom = ax.dataLim.y0
    room = max(0.1, 1 - bottom)
    ax.set(xlim=(-0.05, 1.05), ylim=(bottom - 0.12 * room, 1 + 0.12 * room))
    ax.set_yticks([tick for tick in ax.get_yticks() if bottom - 0.12 * room <= tick <= 1])
    ax.grid(True, alpha=0.25)


def _points(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the share of heatmap calls and the recall of each row: (n, 2)."""
    points = np.array([[row["heatmap_call_rate"], row["recall"]] for row in rows]).reshape(-1, 2)
    if not len(points) or np.isnan(points).any():
        raise InvalidValueError(
            f"{_WHERE}: rows must have a recall, which takes anomalous images, got none. Sweep "
            "images of both classes."
        )
    return points


def _new_axes() -> Any:
    # Without pyplot, which would keep the figure and choose a backend for the whole program.
    from matplotlib.figure import Figure

    return Figure(figsize=(6.4, 4.4), layout="constrained").add_subplot()


def _checked(ax: Any) -> Any:
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes) or ax.name != "rectilinear":
        raise InvalidTypeError(
            f"{_WHERE}: ax must be plain axes of matplotlib, as plt.subplots() gives them, or "
            f"None, got {type(ax).__name__}."
        )
    return ax


def _add_milliseconds(ax: Any, gate_ms: float, detector_ms: float) -> None:
    """Add an upper scale with the time, which depends on the calls alone."""
    if detector_ms > 0:  # else all times are equal
        scale = ax.secondary_xaxis(
            "top",
            functions=(
                lambda calls: gate_ms + calls * detector_ms,
                lambda ms: (ms - gate_ms) / detector_ms,
            ),
        )
        scale.set_xlabel("ms per image")


def _add_legend(ax: Any, points: np.ndarray, front: Sequence[dict[str, Any]]) -> Any:
    """Add the legend in the corner where it hides fewest points; return its box, in pixels."""
    pixels = ax.transData.transform(np.concatenate([points, _along(_points(front))]))
    boxes = {}
    for corner in _CORNERS:
        legend = ax.legend(loc=corner, fontsize="small", framealpha=1)
        boxes[corner] = legend.get_window_extent()
    # Labels need room around the points, too.
    best = min(boxes, key=lambda corner: boxes[corner].padded(30).count_contains(pixels))
    ax.legend(loc=best, fontsize="small", framealpha=1)
    return boxes[best]


def _add_labels(ax: Any, front: Sequence[dict[str, Any]], points: np.ndarray, legend: Any) -> None:
    """Label some points of the front with their thresholds, the ends first, if there is room."""
    rows = {(row["heatmap_call_rate"], row["recall"]): row for row in reversed(front)}
    unique = [rows[point] for point in sorted(rows)]  # only the first of equal points
    pixels = ax.transData.transform(points)
    line = ax.transData.transform(_along(_points(unique)))
    free, taken = ax.get_window_extent(), [legend]
    for i in _ends_first(len(unique)):
        row = unique[i]
        for offset, horizontal, vertical in _OFFSETS:
            label = ax.annotate(
                f"{row['t_low']:.3g} / {row['t_high']:.3g}",
                (row["heatmap_call_rate"], row["recall"]),
                xytext=offset,
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize="small",
                color=_FRONT,
            )
            box = label.get_window_extent().padded(2)
            inside = free.x0 <= box.x0 and box.x1 <= free.x1
            inside &= free.y0 <= box.y0 and box.y1 <= free.y1
            hides = box.count_contains(pixels) + box.count_contains(line)
            if inside and not hides and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()
        if len(taken) > _MOST_LABELS:
            return


def _along(points: np.ndarray) -> np.ndarray:
    """Return many points on the line through these points."""
    steps = np.linspace(0, len(points) - 1, 50 * len(points))
    at = np.arange(len(points))
    return np.stack([np.interp(steps, at, column) for column in points.T], axis=1)


def _ends_first(n: int) -> list[int]:
    """Order the positions 0 to n - 1 so that each is far from those before it.

    Examples
    --------
    >>> _ends_first(5)
    [0, 4, 2, 1, 3]
    """
    order = [0, n - 1][:n]
    while len(order) < n:
        left = [i for i in range(n) if i not in order]
        order.append(max(left, key=lambda i: min(abs(i - j) for j in order)))
    return order
