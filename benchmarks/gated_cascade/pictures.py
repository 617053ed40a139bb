"""Pictures: confusion matrices, sweeps, and sample images of each route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from anomalib_lite.plotting import contact_sheet, overlay

from .measuring import CLASSES

ROUTES = ("gate_normal", "detector", "gate_anomalous")
_COLORS = {"source": "#d55e00", "own": "#0072b2"}
_GRID_NAMES = {"source": "the source's grid", "own": "grid of the gate's quantiles"}
_WHO = {
    "gate_normal": "normal by the gate",
    "detector": "by the heatmap model",
    "gate_anomalous": "anomalous by the gate",
}
# Of each route: so many normal, anomalous and foreign images.
_SHOWN = 2


def samples(model: Any, splits: dict[str, Any], answers: dict[str, Any], name: str) -> Image.Image:
    """Some images of each route, with a heatmap where there is one."""
    routing = getattr(model, "routing_", None)
    threshold = model.threshold_ if routing is None else routing.threshold
    sheets = []
    for route in ROUTES:
        tiles, captions = [], []
        for split, label in (("test_mix", 0), ("test_mix", 1), ("neu_test", 1)):
            found = answers[split]
            places = np.flatnonzero((found.routes == route) & (found.y == label))
            n = min(_SHOWN, len(places))
            for i in places[np.linspace(0, len(places) - 1, n, dtype=int)]:
                sample = splits[split][i]
                tile = Image.open(sample.path).convert("RGB")
                if route == "detector":
                    tile = overlay(tile, model.detect([sample]).maps[0], threshold=threshold)
                tiles.append(tile)
                captions.append(_caption(found, i, sample.kind))
        if tiles:
            title = f"{name}: {_WHO[route]}, {_called(answers, route)}"
            sheets.append(
                contact_sheet(
                    tiles, columns=3 * _SHOWN, captions=captions, title=title, tile_size=(200, 200)
                )
            )
    page = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    return page


def _caption(found: Any, i: int, kind: str) -> str:
    verdict = "anomalous" if found.alarms[i] else "normal"
    p = found.probabilities[i]
    probability = "" if np.isnan(p) else f", p {p:.3f}"
    return f"{kind}: called {verdict}{probability}, score {found.scores[i]:.3g}"


def _called(answers: dict[str, Any], route: str) -> str:
    shares = (
        f"{np.mean(answers[split].routes == route):.0%} of {split}"
        for split in ("test_mix", "neu_test")
    )
    return ", ".join(shares)


def confusion(path: Path, rows: Any) -> None:
    """Draw counts of a DataFrame: a row for each experiment and split."""
    splits, names = ("val_mix", "test_mix"), list(dict.fromkeys(rows["experiment_id"]))
    found = rows.set_index(["experiment_id", "split"])
    figure, axes = plt.subplots(
        len(splits),
        len(names),
        figsize=(max(2.3 * len(names), 4.6), 5.2),
        squeeze=False,
        layout="constrained",
    )
    for row, split in zip(axes, splits, strict=True):
        for axis, name in zip(row, names, strict=True):
            columns = [f"{truth}_called_{called}" for truth in CLASSES for called in CLASSES]
            counts = found.loc[(name, split), columns].to_numpy(dtype=int).reshape(2, 2)
            shares = counts / counts.sum(axis=1, keepdims=True)
            axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for (y, x), n in np.ndenumerate(counts):
                color = "white" if shares[y, x] > 0.5 else "black"
                axis.text(x, y, str(n), ha="center", va="center", color=color, fontsize=12)
            axis.set_xticks([0, 1], ["normal", "anom."], fontsize=8)
            axis.set_yticks([])
        row[0].set_yticks([0, 1], ["normal", "anom."], fontsize=8, rotation=90, va="center")
        row[0].set_ylabel(f"{split}: truth", fontsize=9)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(broken(name), fontsize=8)
    figure.supxlabel("called", fontsize=9)
    _save(figure, path)


def sweeps(path: Path, rows: list[dict[str, Any]], alone: dict[str, float], title: str) -> None:
    """Heatmap calls against recall; ``alone`` is the heatmap model's recall, by split."""
    splits = ("val_mix", "test_mix")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    for axis, split in zip(axes, splits, strict=True):
        of_split = [r for r in rows if r["split"] == split]
        for grid, color in _COLORS.items():
            some = [r for r in of_split if r["grid"] == grid]
            limit = [r for r in some if r["within_limit"]]
            above = [r for r in some if not r["within_limit"]]
            axis.scatter(*_points(above), s=22, facecolors="none", edgecolors=color, alpha=0.6)
            label = _GRID_NAMES[grid]
            axis.scatter(*_points(limit), s=22, color=color, alpha=0.6, lw=0, label=label)
            front = sorted(_points([r for r in some if r["pareto"]], together=True))
            axis.step(
                [x for x, _ in front], [y for _, y in front], where="post", color=color, lw=1.2
            )
        chosen = [r for r in of_split if r["grid"] == "automatic"]
        axis.scatter(
            *_points(chosen), marker="*", s=190, color="black", label="automatic", zorder=5
        )
        ring = {"marker": "o", "s": 260, "facecolors": "none", "edgecolors": "#009e73", "lw": 2}
        axis.scatter([1], [alone[split]], label="heatmap model alone", zorder=4, **ring)
        axis.set(xlabel="heatmap calls (share of images)", xlim=(-0.03, 1.04), ylim=(-0.03, 1.05))
        axis.set_title(split, fontsize=10)
        axis.grid(color="#e5e5e5", lw=0.6)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("recall")
    handles = {h.get_label(): h for a in axes for h in a.get_legend_handles_labels()[0]}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def broken(name: str) -> str:
    """A name in lines of some twenty characters."""
    lines = [""]
    for word in name.split("_"):
        if lines[-1] and len(lines[-1]) + len(word) > 18:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def _points(rows: list[dict[str, Any]], *, together: bool = False) -> Any:
    pairs = [(r["heatmap_call_rate"], r["recall"]) for r in rows]
    return pairs if together else ([p[0] for p in pairs], [p[1] for p in pairs])


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
