"""A sweep of thresholds as a picture: what is found against what it costs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_lite.errors import InvalidTypeError, InvalidValueError, MissingDependencyError

if TYPE_CHECKING:
    from anomalib_lite.cascade.sweep import Sweep

__all__ = ["plot_sweep"]

_WHERE = "Sweep.plot"
_FAINT, _FRONT, _ALONE = "#8a94a0", "#1f5fa8", "#c62828"
_CORNERS = ("lower right", "upper left", "lower left", "upper right")
_MOST_LABELS = 6
# Of a label, in points from its point. Above and left of a front there are no other points.
_OFFSETS = (
    ((-6, 6), "right", "bottom"),
    ((6, -6), "left", "top"),
    ((-6, 18), "right", "bottom"),
    ((6, -18), "left", "top"),
    ((7, 0), "left", "center"),
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
)


def plot_sweep(sweep: Sweep, ax: Any = None) -> Any:
    """Draw what :meth:`Sweep.plot` promises."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            f"{_WHERE}: needs matplotlib, which is not installed. Install it with: "
            "pip install 'anomalib-lite[plot]', or write the rows with to_csv."
        )
    points = _points(sweep.rows)
    ax = _new_axes() if ax is None else _checked(ax)
    _draw(ax, sweep, points)
    # What stands where is known only then. Axes may lie in a part of a figure, a canvas does not.
    ax.figure.canvas.figure.draw_without_rendering()
    legend = _add_legend(ax, points, sweep.pareto)
    if sweep.alone is not None:
        across = np.linspace(0, 1, 100)
        points = np.concatenate([points, [(x, sweep.alone["recall"]) for x in across]])
    _add_labels(ax, sweep.pareto, points, legend)
    return ax


def _draw(ax: Any, sweep: Sweep, points: np.ndarray) -> None:
    """All but the words inside of the axes."""
    ax.scatter(*points.T, s=14, color=_FAINT, alpha=0.4, linewidths=0, label="pair of thresholds")
    ax.plot(
        *_points(sweep.pareto).T,
        "o-",
        color=_FRONT,
        markersize=5,
        label="Pareto front, t_low / t_high",
    )
    if sweep.alone is not None:
        ax.axhline(
            sweep.alone["recall"],
            color=_ALONE,
            linestyle="--",
            linewidth=1,
            label=f"heatmap model alone, {sweep.alone['ms_per_image']:.3g} ms per image",
        )
    ax.set(xlabel="heatmap calls, share of images", ylabel="recall")
    bottom = ax.dataLim.y0
    room = max(0.1, 1 - bottom)
    ax.set(xlim=(-0.05, 1.05), ylim=(bottom - 0.12 * room, 1 + 0.12 * room))
    ax.set_yticks([tick for tick in ax.get_yticks() if bottom - 0.12 * room <= tick <= 1])
    ax.grid(True, alpha=0.25)
    _add_milliseconds(ax, sweep)


def _points(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """(n, 2): share of heatmap calls, and recall."""
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


def _add_milliseconds(ax: Any, sweep: Sweep) -> None:
    """A second scale above: the time depends on the calls alone."""
    gate, more = sweep.gate_ms, sweep.detector_ms
    if more > 0:  # or it would have one number only
        scale = ax.secondary_xaxis(
            "top", functions=(lambda calls: gate + calls * more, lambda ms: (ms - gate) / more)
        )
        scale.set_xlabel("ms per image")


def _add_legend(ax: Any, points: np.ndarray, front: Sequence[dict[str, Any]]) -> Any:
    """In the corner where it hides fewest points; returns its box, in pixels."""
    pixels = ax.transData.transform(np.concatenate([points, _along(_points(front))]))
    boxes = {}
    for corner in _CORNERS:
        legend = ax.legend(loc=corner, fontsize="small", framealpha=1)
        boxes[corner] = legend.get_window_extent()
    # The labels need room around the points, too.
    best = min(boxes, key=lambda corner: boxes[corner].padded(30).count_contains(pixels))
    ax.legend(loc=best, fontsize="small", framealpha=1)
    return boxes[best]


def _add_labels(ax: Any, front: Sequence[dict[str, Any]], points: np.ndarray, legend: Any) -> None:
    """The thresholds of a few points of the front: the ends first, and where there is room."""
    rows = {(row["heatmap_call_rate"], row["recall"]): row for row in reversed(front)}
    unique = [rows[point] for point in sorted(rows)]  # of equal points the first alone
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
    """Many points on the line through these."""
    steps = np.linspace(0, len(points) - 1, 50 * len(points))
    at = np.arange(len(points))
    return np.stack([np.interp(steps, at, column) for column in points.T], axis=1)


def _ends_first(n: int) -> list[int]:
    """The positions 0 to n - 1: each next one far from those before it.

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
