"""Results of run.py -> results.csv, performance_summary.txt and four pictures.

python benchmarks/mahalanobis_vfm/report.py mahalanobis_vfm-output
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from PIL import Image
from sklearn.metrics import roc_curve

FIGURES = ("image_auroc", "pixel_auroc", "aupro_30", "aupro_05", "seg_f1")
HEADINGS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro_30": "AUPRO at 0.3",
    "aupro_05": "AUPRO at 0.05",
    "seg_f1": "SegF1",
}
LABELS = {
    "none": "no adaptation",
    "lora": "LoRA (v1.1)",
    "adaptive": "adaptive (v1.2)",
    "multi_scale": "multi-scale (v1.3)",
    "attention_guided": "attention-guided (v1.4)",
}
COLORS = dict(zip(LABELS, ("#444444", "#0072b2", "#56b4e9", "#e69f00", "#cc79a7"), strict=True))

# Image AUROC on MVTec AD 2 as the source system's report gives it. Not measured here.
REPORTED = {
    "fruit_jelly": 0.6492,
    "fabric": 0.6520,
    "can": 0.5528,
    "sheet_metal": 0.3653,
    "vial": 0.6971,
    "wallplugs": 0.4372,
    "walnuts": 0.5844,
}
REPORTED_MEANS = {
    "lora": 0.5626,
    "adaptive": 0.5530,
    "multi_scale": 0.5310,
    "attention_guided": 0.5532,
}
REPORTED_AUPRO = {"fruit_jelly": 0.7806}


def report(folder: Path, names: list[str], options: dict[str, Any]) -> None:
    """Write everything into the folder of the runs."""
    runs = [
        run
        for name in names
        for seed in options["seeds"]
        for run in json.loads((folder / f"{name}-{seed}.json").read_text())["runs"]
    ]
    variants = [v for v in LABELS if any(run["variant"] == v for run in runs)]
    write_csv(folder / "results.csv", runs)
    summary = [
        *heading(options),
        *table(runs, names, variants),
        *against_none(runs, names, variants),
    ]
    summary += beside_reported(runs, names)
    (folder / "performance_summary.txt").write_text("\n".join(summary) + "\n")
    print("\n".join(summary))
    arrays = {name: np.load(folder / f"{name}-{options['seeds'][0]}.npz") for name in names}
    anomaly_scores(folder / "anomaly_scores.png", arrays, variants)
    roc_curves(folder / "roc_curves.png", arrays, variants, runs)
    feature_analysis(folder / "feature_analysis.png", arrays, variants)
    sample_detections(folder / "sample_detections.png", arrays, variants)


def write_csv(path: Path, runs: list[dict[str, Any]]) -> None:
    columns = [c for c in dict.fromkeys(key for run in runs for key in run) if c != "history"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs)


def heading(options: dict[str, Any]) -> list[str]:
    weights = Path(options["weights"]).name if options.get("weights") else "from the hub"
    return [
        f"MahalanobisVFM, {options['backbone']} ({weights}), {options['sizes']} px, at most "
        f"{options['epochs']} epochs",
        f"{options['machine']}; {len(options['seeds'])} seeds: mean and standard deviation",
        "",
    ]


def table(runs: list[dict[str, Any]], names: list[str], variants: list[str]) -> list[str]:
    """Make one row per data set and variant."""
    rows = [["", "", *HEADINGS.values(), "fit s", "test ms"]]
    for name in names:
        for variant in variants:
            chosen = [r for r in runs if r["dataset"] == name and r["variant"] == variant]
            cells = [spread([r.get(figure) for r in chosen]) for figure in FIGURES]
            times = [
                median([r[key] for r in chosen], digits)
                for key, digits in (("fit_s", 0), ("test_ms", 1))
            ]
            rows.append([name, LABELS[variant], *cells, *times])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def against_none(runs: list[dict[str, Any]], names: list[str], variants: list[str]) -> list[str]:
    """List the gain of each variant over no adaptation; a seed has the same images and split."""
    if "none" not in variants or len(variants) < 2:
        return []
    lines = ["", "Gain of image AUROC over no adaptation, same seed (mean, then each seed):"]
    for variant in [v for v in variants if v != "none"]:
        parts, every = [], []
        for name in names:
            by_seed = {
                (r["variant"], r["seed"]): r["image_auroc"] for r in runs if r["dataset"] == name
            }
            seeds = sorted(s for v, s in by_seed if v == variant and ("none", s) in by_seed)
            gains = [by_seed[variant, s] - by_seed["none", s] for s in seeds]
            every += gains
            each = " ".join(f"{g:+.3f}" for g in gains)
            parts.append(f"{name} {np.mean(gains):+.4f} ({each})")
        lines.append(f"  {LABELS[variant]}: {np.mean(every):+.4f}; " + "; ".join(parts))
    return lines


def beside_reported(runs: list[dict[str, Any]], names: list[str]) -> list[str]:
    """List the figures of the source's report, each beside ours for that category."""
    lines = ["", "Reported by the source for MVTec AD 2 (image AUROC; not measured here):"]
    lines.append("  means: " + ", ".join(f"{LABELS[v]} {x:.4f}" for v, x in REPORTED_MEANS.items()))
    for name, reported in REPORTED.items():
        aupro = f", AUPRO {REPORTED_AUPRO[name]:.4f}" if name in REPORTED_AUPRO else ""
        mine = [r["image_auroc"] for r in runs if r["dataset"] == name and r["variant"] == "lora"]
        ours = f"; measured {spread(mine)}" if mine else ""
        lines.append(f"  {name}: LoRA (v1.1) {reported:.4f}{aupro}{ours}")
    return lines


def spread(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    return f"{np.mean(known):.4f} ± {np.std(known, ddof=1) if len(known) > 1 else 0:.4f}"


def median(values: list[float | None], digits: int) -> str:
    known = [v for v in values if v is not None]
    return f"{np.median(known):.{digits}f}" if known else "-"


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


def roc_curves(
    path: Path, arrays: dict[str, Any], variants: list[str], runs: list[dict[str, Any]]
) -> None:
    figure, axes = _grid(1, len(arrays), (3.6, 4.0))
    for axis, (name, data) in zip(axes[0], arrays.items(), strict=True):
        for variant in variants:
            fpr, tpr, _ = roc_curve(data["labels"], data[f"{variant}.scores"])
            chosen = [
                r["image_auroc"] for r in runs if (r["dataset"], r["variant"]) == (name, variant)
            ]
            label = f"{LABELS[variant]} {np.mean(chosen):.3f}"
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
