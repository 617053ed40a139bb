"""Put the tables of measured studies into docs/benchmarks.md.

python benchmarks/tables.py                  from the results that are kept in docs/benchmarks
python benchmarks/tables.py RESULTS          after keeping those of a folder of results there
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pandas as pd

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, KEPT = DOCS / "benchmarks.md", DOCS / "benchmarks"
# <!-- table: fusion/table image_auroc,aupro --> ... <!-- end -->; without columns, all of them.
_TABLE = re.compile(r"(<!-- table: (\w+)/(\w+)(?: ([\w,]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def keep(results: Path) -> None:
    """Copy tables, rows and figures of finished local studies; rows.csv has commit and machine."""
    for folder in sorted(p.parent for p in results.glob("*_local/rows.csv")):
        home = KEPT / folder.name.removesuffix("_local")
        home.mkdir(parents=True, exist_ok=True)
        for file in [*folder.glob("*.csv"), *folder.glob("*.png")]:
            shutil.copyfile(file, home / file.name)


def filled(page: str) -> str:
    """Return the page with each of its tables made anew."""
    return _TABLE.sub(lambda m: m[1] + "\n" + table_of(m[2], m[3], m[4]) + "\n\n" + m[5], page)


def table_of(study: str, name: str, columns: str | None) -> str:
    """Return one table as text, and below it what its rows are of."""
    table = pd.read_csv(KEPT / study / f"{name}.csv")
    if columns is not None:
        table = table[[table.columns[0], *columns.split(",")]]
    table = table.rename(columns={c: "" if c.startswith("Unnamed") else c for c in table.columns})
    lines = ["| " + " | ".join(c.replace("_", " ") for c in table.columns) + " |"]
    lines.append("|" + "---|" * len(table.columns))
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.to_numpy(dtype=object)]
    if name == "table":
        rows = pd.read_csv(KEPT / study / "rows.csv")
        commits = ", ".join(sorted(rows["commit"].str[:7].unique()))
        seeds, machine = rows["seed"].nunique(), " and ".join(sorted(rows["machine"].unique()))
        lines += ["", f"{len(rows):,} rows, {seeds} seeds, commit {commits}, {machine}."]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        if value != value:
            return ""
        if value == round(value) and abs(value) >= 2:
            return f"{value:,.0f}"
        return f"{round(value, 3) or 0.0:.3f}"  # a zero has no sign
    return str(value)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
