"""Tables and the front of rows that are kept, as docs/options.md shows them.

python benchmarks/options/report.py docs/options/rows.csv options
python benchmarks/options/report.py docs/options/rows.csv front front.png times.jsonl
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from anomalib_lite.studies import open_study  # noqa: E402


def read(path: str, name: str) -> pd.DataFrame:
    """Read the rows of one study; older ones have the names of categories without a slash."""
    rows = pd.read_csv(path) if path.endswith(".csv") else pd.read_json(path, lines=True)
    rows = rows[rows["study"] == name] if "study" in rows else rows
    names = rows["category"].str.replace("^PA_", "piped/PA_", regex=True)
    return rows.assign(category=names.str.replace("^elpv_", "elpv/", regex=True))


def as_markdown(found: pd.DataFrame, groups: list[str]) -> str:
    """Return a table of text: one line for each option."""
    timed = [name for name in found if name.startswith("ms, ") and name != "ms, ratio"]
    head = ["", *(name.replace("solar ", "") for name in groups), "**mean**"]
    head += ["pixel AUROC tiles, papers", "AUPRO tiles, papers", "found", "stopped", "rows"]
    head += ["ms " + ", ".join(n.removeprefix("ms, ").split()[-1] for n in timed)] if timed else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for option, row in found.iterrows():
        spread = "" if math.isnan(row["spread"]) else f" ± {row['spread']:.3f}"
        cells = [
            str(option),
            *(f"{row[name]:.3f}" for name in groups),
            f"{row['mean']:.3f}{spread}",
        ]
        for name in ("pixel_auroc", "aupro"):
            cells.append(", ".join(f"{row[f'{name}, {g}']:.3f}" for g in ("tiles", "papers")))
        cells += [f"{row['detection_rate']:.3f}", f"{row['false_alarm_rate']:.3f}"]
        cells.append("" if math.isnan(row["bank_rows"]) else f"{row['bank_rows']:,.0f}")
        cells += [", ".join(_time(row[name]) for name in timed)] if timed else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(ms: Any) -> str:
    return "" if math.isnan(ms) else f"{ms:.1f}" if ms < 10 else f"{ms:.0f}"


def table_of(path: str, name: str) -> str:
    """Return the table of one study as text."""
    study, rows = open_study(HERE / f"{name}.yaml"), read(path, name)
    found = study.module.tables(rows, study.config)["table"]
    return as_markdown(found, [group for group in study.module.GROUPS if group in found])


def main(path: str, name: str, picture: str = "", times: str = "") -> None:
    """Print the table, or draw the front."""
    if not picture:
        print(table_of(path, name))
        return
    study, rows = open_study(HERE / f"{name}.yaml"), read(path, name)
    tests, timed = study.module.split(rows)
    timed = read(times, name) if times else timed
    baseline = study.config.baseline
    study.module.draw_front(study.module.complete(tests), timed, baseline, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
