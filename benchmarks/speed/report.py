"""results/speed.json -> RESULTS.md and the plots of docs/speed.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# The ratios to reach.
TARGETS = "Targets: coreset of 10 % at D = 152 at least 200 times faster than anomalib's, 20 times\
 faster than the projected greedy, and at most 0.7 of the product; search at least 3 times faster\
 than FAISS for k = 1 and 2 times for k = 9 at D = 384 and 1,536."


def write_report(results: dict[str, Any], page: Path, plots: Path) -> None:
    """Write a table for each case, and the plots."""
    parts = [
        "# How fast the coreset and the search are\n",
        "Written by `benchmarks/speed/run.py`; README.md in this folder says what is measured. "
        "Seconds are medians; both sides of a ratio are from one run.\n",
        TARGETS + "\n",
    ]
    tables = {"coreset": coreset, "knn": knn, "index": index, "growth": growth}
    for case, table in tables.items():
        if case in results:
            parts += [table(results[case]["rows"]), machine(results[case]["machine"])]
    page.write_text("\n".join(parts), "utf-8")
    if "growth" in results:
        plot_growth(results["growth"]["rows"], plots / "growth.png")
    if "knn" in results and "coreset" in results:
        plot_ratios(results["coreset"]["rows"], results["knn"]["rows"], plots / "ratios.png")


def machine(of: dict[str, Any]) -> str:
    """One line below each table."""
    return "Machine: " + ", ".join(f"{k} {v}" for k, v in of.items()) + ".\n"


def ratio(row: dict[str, Any], name: str, of: str = "ours") -> float | None:
    """Return how many times slower ``name`` is: the median of the ratios of each round."""
    if name not in row["seconds"]:
        return None
    a, b = row["seconds"][name], row["seconds"][of]
    n = min(len(a), len(b))
    return float(np.median(np.array(a[:n]) / np.array(b[:n])))


def table(head: list[str], lines: list[list[Any]]) -> str:
    """Make a table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(show, row)) + " |" for row in rows) + "\n"


def show(value: Any) -> str:
    """Format a figure with three digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def coreset(rows: list[dict[str, Any]]) -> str:
    """Compare ours with the product and with other libraries."""
    head = ["D", "kept", "ours, s", "of the product", "without 8 bits", "of the product"]
    head += ["plain", "projected", "anomalib", "radius", "without 8 bits", "same picks", "as plain"]
    lines = [
        [
            r["D"],
            r["kept"],
            float(np.median(r["seconds"]["ours"])),
            ratio(r, "ours", "product"),
            float(np.median(r["seconds"]["float32"])),
            ratio(r, "float32", "product"),
            times(ratio(r, "plain")),
            times(ratio(r, "projected")),
            times(ratio(r, "anomalib")),
            r["radius"],
            r["radius of float32"],
            r["same picks"],
            r.get("same picks as plain", "-"),
        ]
        for r in rows
    ]
    title = "## Coreset of 100,000 rows: how many times faster than\n\n"
    note = (
        "\n*same picks*: share of picks equal, rank by rank, to those without 8 bits; *as plain*: "
        "share of the first 500 equal to those of the plain greedy. A dash: not measured in that "
        "run.\n"
    )
    return title + table(head, lines) + note


def times(value: float | None) -> str:
    """Format a ratio, for example as 12x."""
    return "" if value is None else f"{value:,.0f}x" if value >= 10 else f"{value:.1f}x"


def knn(rows: list[dict[str, Any]]) -> str:
    """Compare ours with FAISS and scikit-learn."""
    head = ["D", "bank", "k", "ours, s", "prepare, s", "FAISS flat", "scikit-learn", "by"]
    head += ["same neighbours", "farther by", "distances off by"]
    lines = [
        [
            r["D"],
            r["bank"],
            r["k"],
            float(np.median(r["seconds"]["ours"])),
            r.get("prepare_s", "-"),
            times(ratio(r, "faiss")),
            times(ratio(r, "sklearn")),
            r["by"],
            r["same neighbours"],
            r.get("farther by", "-"),
            r["distances off by"],
        ]
        for r in rows
    ]
    title = "## Exact search, 8,192 queries: how many times faster than\n\n"
    note = (
        "\n*prepare*: additional time of a bank's first such search (for the 8-bit copy). *same "
        "neighbours*: share equal to FAISS's, rank by rank. *farther by*: how much farther our "
        "neighbours are than FAISS's, relatively and at most over queries and ranks, with both "
        "sorted by their distances in float64; 0: none is farther. *distances off by*: largest "
        "relative error against float64. A dash: not measured in that run.\n"
    )
    return title + table(head, lines) + note


def index(rows: list[dict[str, Any]]) -> str:
    """Compare time and recall."""
    flat = float(np.median(rows[0]["seconds"]["search"]))
    head = ["index", "nprobe", "ef_search", "built, s", "search, s", "of flat", "recall"]
    lines = [
        [
            r["index"],
            r.get("nprobe"),
            r.get("ef_search"),
            r["built"],
            float(np.median(r["seconds"]["search"])),
            float(np.median(r["seconds"]["search"])) / flat,
            round(r["recall"], 4),
        ]
        for r in rows
    ]
    return "## Indexes: 100,000 x 152, 8,192 queries, nearest neighbour\n\n" + table(head, lines)


def growth(rows: list[dict[str, Any]]) -> str:
    """List times, and the slopes of their logarithms."""
    head = ["N", "kept", "ours, s", "of the product"]
    lines = [
        [
            r["N"],
            r["kept"],
            float(np.median(r["seconds"]["ours"])),
            ratio(r, "ours", "product"),
        ]
        for r in rows
    ]
    slopes = {key: slope(rows, key) for key in ("N", "kept")}
    note = (
        f"\nSlope of log time against log N: {slopes['N']:.2f} (1,000 kept); against log of "
        f"rows kept: {slopes['kept']:.2f} (of 100,000). 1 is proportional.\n"
    )
    return "## How the coreset's cost grows, D = 152\n\n" + table(head, lines) + note


def series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of ``key`` and the seconds of rows in which only ``key`` varies."""
    fixed = {"N": ("kept", 1000), "kept": ("N", 100_000)}[key]
    chosen = sorted(
        (r[key], np.median(r["seconds"]["ours"])) for r in rows if r[fixed[0]] == fixed[1]
    )
    x, y = zip(*chosen, strict=True)
    return np.array(x, float), np.array(y, float)


def slope(rows: list[dict[str, Any]], key: str) -> float:
    """Return the slope of the straight line through the logarithms."""
    x, y = series(rows, key)
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plot_growth(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw two log-log plots."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    titles = {"N": "1,000 kept of N rows", "kept": "kept of 100,000 rows"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        x, y = series(rows, key)
        axis.loglog(x, y, "o-", color="#1f5fa8", label=f"measured, slope {slope(rows, key):.2f}")
        axis.loglog(x, y[-1] * x / x[-1], ":", color="gray", label="proportional")
        axis.set_xlabel(title)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylabel("seconds")
    figure.suptitle("Greedy coreset, D = 152")
    save(figure, path)


def plot_ratios(coresets: list[dict[str, Any]], searches: list[dict[str, Any]], path: Path) -> None:
    """Draw bars: how many times faster."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    bars = [
        (f"D {r['D']}\n{r['kept']:,}", 1 / (ratio(r, "ours", "product") or 1)) for r in coresets
    ]
    axes[0].bar(*zip(*bars, strict=True), color="#1f5fa8")
    axes[0].set_title("Coreset: times faster than the\nbare float32 product")
    one = [r for r in searches if r["k"] == 1]
    bars = [(f"D {r['D']}\n{r['bank'] // 1000}k", ratio(r, "faiss") or 0) for r in one]
    axes[1].bar(*zip(*bars, strict=True), color="#1f5fa8")
    axes[1].set_title("Exact 1-NN: times faster than\nFAISS's flat index")
    for axis in axes:
        axis.axhline(1, color="gray", linewidth=1)
        axis.tick_params(axis="x", labelsize=7)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    here = Path(__file__).parent
    stored = json.loads((here / "results" / "speed.json").read_text("utf-8"))
    write_report(stored, here / "RESULTS.md", here.parents[1] / "docs" / "speed")
