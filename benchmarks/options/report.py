"""Tables and figures of the rows that run.py wrote.

python benchmarks/options/report.py --rows docs/options/rows.csv --study options
python benchmarks/options/report.py --rows rows.jsonl --to-csv docs/options/rows.csv
python benchmarks/options/report.py --rows docs/options/rows.csv --front docs/options/front.png \\
        --times timing.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from sources import GROUPS

WITH_MASKS = ("tiles", "papers")
OURS = "auto, 5,000"


def read(path: Path) -> pd.DataFrame:
    """Read rows of run.py, or the table made of them, and name the group of each category."""
    frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path, lines=True)
    group = {category: name for name, of_group in GROUPS.items() for category in of_group}
    return frame.assign(group=frame["category"].map(group))


def by_group(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """Average over the categories of a group, for each option and seed."""
    return frame.groupby(["option", "seed", "group"], sort=False)[value].mean().unstack("group")


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the seeds of an option that were measured on all categories."""
    n = frame.groupby(["option", "seed"])["category"].transform("nunique")
    return frame[n == sum(len(names) for names in GROUPS.values())]


def summarize(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return one row for each option: means over groups, spreads over seeds, costs as ratios."""
    auroc = by_group(frame, "image_auroc")
    whole = auroc.mean(axis=1).groupby("option", sort=False)
    table = auroc.groupby("option", sort=False).mean()[list(GROUPS)]
    table["mean"], table["spread"] = whole.mean(), whole.std()
    for name in ("pixel_auroc", "aupro"):
        found = by_group(frame, name).groupby("option", sort=False).mean()
        for group in WITH_MASKS:
            table[f"{name}, {group}"] = found[group]
    for name in ("detection_rate", "false_alarm_rate"):
        table[name] = by_group(frame, name).mean(axis=1).groupby("option", sort=False).mean()
    for name in ("ms", "fit_s", "bank_rows", "file_kb"):
        cost = by_group(frame, name).groupby("option", sort=False).mean()
        # A ratio for each group: no group counts for more because its images are large.
        ratio = (cost / cost.loc[baseline]).mean(axis=1) if baseline in cost.index else None
        if name in ("ms", "fit_s"):
            table[f"{name}, ratio"] = ratio
        else:
            table[name] = cost.mean(axis=1)
    table["seeds"] = frame.groupby("option", sort=False)["seed"].nunique()
    return table


def draw_front(frame: pd.DataFrame, times: pd.DataFrame, baseline: str, path: Path) -> None:
    """Draw accuracy and found share against time, for each group of categories and for all.

    ``times`` are rows of timing.py, whose options alone are drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    frame = frame[frame["option"].isin(set(times["option"]))]
    sizes = ("256", "320", "384", "448", "auto")
    colours = dict(zip(sizes, ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#000000"), strict=True))
    markers = {"10 %": "s", "1 %": "v", "2,000": "o", "5,000": "D", "10,000": "^"}
    table = summarize(frame, baseline)
    figure, panels = plt.subplots(2, 4, figsize=(15, 7.2), layout="constrained")
    columns = [*GROUPS, "mean", "detection_rate"]
    titles = [*GROUPS, "mean of the five", "found at the threshold, mean"]
    time = by_group(times, "ms").groupby("option", sort=False).mean()
    for panel, column, title in zip(panels.flat, columns, titles, strict=False):
        x = time[column] if column in time else time.mean(axis=1)
        for option, value in table[column].items():
            size, bank = str(option).split(", ", 1)
            ours = option == OURS
            panel.scatter(
                x[option], value, s=130 if ours else 55, color=colours[size],
                marker=markers[bank], edgecolor="black" if ours else "none", zorder=3,
            )  # fmt: skip
        panel.set(title=title, xlabel="ms per image", xscale="log")
        panel.set_ylabel("share" if column == "detection_rate" else "image AUROC")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="x", which="minor", labelsize=7)
    panels.flat[-1].axis("off")
    handles = [plt.Line2D([], [], ls="", marker="o", color=c, label=s)
               for s, c in colours.items()]  # fmt: skip
    handles += [plt.Line2D([], [], ls="", marker=m, color="0.4", label=f"bank: {b}")
                for b, m in markers.items()
                if any(str(option).endswith(f", {b}") for option in table.index)]  # fmt: skip
    handles.append(plt.Line2D([], [], ls="", marker="D", ms=10, mec="black", mfc="w",
                              label="default"))  # fmt: skip
    panels.flat[-1].legend(handles=handles, loc="center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, nargs="+", required=True)
    parser.add_argument("--study", default="options")
    parser.add_argument("--baseline", default="default")
    parser.add_argument("--to-csv", type=Path)
    parser.add_argument("--front", type=Path, help="where to draw the front")
    parser.add_argument("--times", type=Path, help="rows of timing.py, for --front")
    args = parser.parse_args()
    frame = pd.concat([read(path) for path in args.rows], ignore_index=True)
    if args.to_csv:
        frame.drop(columns="group").to_csv(args.to_csv, index=False, float_format="%.6g")
        return
    frame = complete(frame[frame["study"] == args.study])
    if args.front:
        draw_front(frame, read(args.times), args.baseline, args.front)
        return
    print(summarize(frame, args.baseline).to_markdown(floatfmt=".3f"))


if __name__ == "__main__":
    main()
