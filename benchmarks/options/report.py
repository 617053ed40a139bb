"""Tables and the front of rows that are kept, such as those of docs/options.

python benchmarks/options/report.py docs/options/rows.csv options
python benchmarks/options/report.py docs/options/rows.csv front front.png times.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

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


def main(path: str, name: str, picture: str = "", times: str = "") -> None:
    """Print the table, or draw the front."""
    study, rows = open_study(HERE / f"{name}.yaml"), read(path, name)
    if picture:
        tests, timed = study.module.split(rows)
        timed = read(times, name) if times else timed
        baseline = study.config.baseline
        study.module.draw_front(study.module.complete(tests), timed, baseline, Path(picture))
        return
    print(study.module.tables(rows, study.config)["table"].to_markdown(floatfmt=".3f"))


if __name__ == "__main__":
    main(*sys.argv[1:])
