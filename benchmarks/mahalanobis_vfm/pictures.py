"""Pictures: scores, ROC curves, distances and examples, of one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from PIL import Image
from sklearn.metrics import roc_curve

LABELS = {
    "none": "no adaptation",
    "lora": "LoRA (v1.1)",
    "adaptive": "adaptive (v1.2)",
    "multi_scale": "multi-scale (v1.3)",
    "attention_guided": "attention-guided (v1.4)",
}
COLORS = dict(zip(LABELS, ("#444444", "#0072b2", "#56b4e9", "#e69f00", "#cc79a7"), strict=True))


def anomaly_scores(path: Path, arrays: dict[str, Any], variants: list[str]) -> None:
    figure, axes = _grid(len(arrays), len(variants), (2.6, 2.1))
    for row, (name, data) in zip(axes, arrays.items(), strict=True):
        for axis, variant in zip(row, variants, strict=True):
            scores, labels = data[f"{variant}.scores"], data["labels"]
            bins = np.linspace(scores.min(), np.quantile(scores, 0.995), 40)
            for label, color, kind in ((0, "#0072b2", "normal"), (1, "#d55e00", "anomalous")):
                axis.hist(scores[labels == label], bins, color=color, alpha=0.6, label=kind)
            axis.axvline(float(data[f"{variant}.threshold"]), color="black", lw=1, ls="--")
            axis.set_yticks([])
            axis.spines[["top", "right", "left"]].set_visible(False)
        row[0].set_ylabel(name.replace("_", " "))
    for axis, variant in zip(axes[0], variants, strict=True):
        axis.set_title(LABELS[variant], fontsize=9)
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.supxlabel("score (dashed: threshold for 5 % false alarms)", fontsize=9)
    _save(figure, path)


def roc_curves(path: Path, arrays: dict[str, Any], variants: list[str], means: Any) -> None:
    figure, axes = _grid(1, len(arrays), (3.6, 4.0))
    for axis, (name, data) in zip(axes[0], arrays.items(), strict=True):
        for variant in variants:
            fpr, tpr, _ = roc_curve(data["labels"], data[f"{variant}.scores"])
            label = f"{LABELS[variant]} {means[name, variant]:.3f}"
            axis.plot(fpr, tpr, color=COLORS[variant], lw=1.5, label=label)
        axis.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8, zorder=0)
        axis.set(xlabel="false-positive rate", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.legend(frameon=False, fontsize=7, loc="lower right")
    axes[0][0].set_ylabel("true-positive rate")
    _save(figure, path)


def feature_analysis(path: Path, arrays: dict[str, Any], variants: list[str]) -> None:
    """Plot the distance of the whole image against that of its farthest patch."""
    figure, axes = _grid(len(arrays), len(variants), (2.6, 2.4))
    for row, (name, data) in zip(axes, arrays.items(), strict=True):
        for axis, variant in zip(row, variants, strict=True):
            for label, color, kind in ((0, "#0072b2", "normal"), (1, "#d55e00", "anomalous")):
                of = data["labels"] == label
                x, y = data[f"{variant}.whole"][of], data[f"{variant}.patch"][of]
                axis.scatter(x, y, s=7, color=color, alpha=0.6, lw=0, label=kind)
            axis.set(xscale="log", yscale="log")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(LogLocator(subs=(1, 2, 5)))
                side.set_major_formatter(ScalarFormatter())
                side.set_minor_locator(NullLocator())
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{name.replace('_', ' ')}\nfarthest patch", fontsize=9)
    for axis, variant in zip(axes[0], variants, strict=True):
        axis.set_title(LABELS[variant], fontsize=9)
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.supxlabel("whole image (Mahalanobis distance / √d)", fontsize=9)
    _save(figure, path)


def sample_detections(path: Path, arrays: dict[str, Any], variants: list[str]) -> None:
    """Show images (with the outline of their mask) and the maps of each variant."""
    rows = [(name, data, place) for name, data in arrays.items() for place in _few(data)]
    figure, axes = _grid(len(rows), 1 + len(variants), (1.7, 1.7))
    for row, (name, data, place) in zip(axes, rows, strict=True):
        index, path_, mask = data["shown"][place], data["paths"][place], data["masks"][place]
        photo = np.asarray(Image.open(str(path_)).convert("RGB"))
        row[0].imshow(photo)
        if str(mask):
            outline = np.asarray(Image.open(str(mask)).convert("L")) > 127
            row[0].contour(outline, [0.5], colors="#00ffff", linewidths=1)
        row[0].set_ylabel(f"{name.replace('_', ' ')}\n{_KIND[data['labels'][index]]}", fontsize=8)
        for axis, variant in zip(row[1:], variants, strict=True):
            every = [data[f"{variant}.map.{i}"] for i in data["shown"]]
            low = min(float(m.min()) for m in every)
            high = max(float(np.quantile(m, 0.999)) for m in every)
            axis.imshow(data[f"{variant}.map.{index}"], vmin=low, vmax=high, cmap="inferno")
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], ["image", *(LABELS[v] for v in variants)], strict=True):
        axis.set_title(title, fontsize=8)
    _save(figure, path)


_KIND = {0: "normal", 1: "anomalous"}


def _few(data: Any) -> list[int]:
    """Choose three anomalous images and the normal one."""
    n = len(data["shown"])
    return [*range(min(3, n - 1)), n - 1]


def _grid(n_rows: int, n_columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    width, height = n_columns * size[0], n_rows * size[1]
    return plt.subplots(
        n_rows, n_columns, figsize=(width, height), squeeze=False, layout="constrained"
    )


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
