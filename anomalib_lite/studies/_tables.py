"""Rows -> tables: means over categories, spreads over seeds, ranks with confidence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_lite._files import write_text
from anomalib_lite.studies._config import Study
from anomalib_lite.studies._extra import import_extra

__all__ = ["summarize", "write_tables"]

_RESAMPLES = 2000
_MISSING = "not measured"


def summarize(
    rows: Any,
    compared: str,
    metrics: Sequence[str],
    over: str = "category",
    random_state: int = 0,
) -> Any:
    """Summarise rows: one line for each of what is compared.

    Parameters
    ----------
    rows : DataFrame
    compared : str
        Column of what is compared, such as ``"backbone"``.
    metrics : sequence of str
        Columns; higher is better. The first one is ranked.
    over : str, default="category"
        Column whose values count alike, whatever their number of rows.
    random_state : int, default=0
        Seed of the bootstrap.

    Returns
    -------
    DataFrame
        Index ``compared``, in order of the mean rank; for each metric ``<metric>`` (mean over the
        categories of means over the seeds) and ``<metric>_spread`` (standard deviation over the
        seeds of the mean over the categories; NaN for one seed); ``rank`` (mean over the
        categories of the rank by the first metric, 1 is best, ties share) with ``rank_low`` and
        ``rank_high``, its 95 % interval by the bootstrap over categories; ``categories``, the
        number that means and ranks are taken over; ``measured`` and ``seeds``, the numbers of
        categories and seeds that each has. A metric that fewer categories have, as where some lack
        masks, has their number in ``<metric>_categories``. A missing value is NaN, and never
        counts as 0.

    Notes
    -----
    Means and ranks are taken over the categories that all of the compared have, so that none
    gains by what is missing, as when half a study has run. One without any value of a metric is
    not counted among them. Spreads are taken over the seeds that have all these categories.

    Examples
    --------
    >>> import pandas as pd
    >>> names = {"backbone": list("aabb"), "category": list("xyxy"), "seed": 0}
    >>> rows = pd.DataFrame(names | {"auroc": [1, 0.9, 0.5, 0.8]})
    >>> summarize(rows, "backbone", ["auroc"])[["auroc", "rank"]].round(2).to_dict("index")
    {'a': {'auroc': 0.95, 'rank': 1.0}, 'b': {'auroc': 0.65, 'rank': 2.0}}
    """
    pandas = import_extra("pandas")
    groups = rows.groupby(compared, sort=False)
    table = pandas.DataFrame(index=groups.size().index)
    grids = {metric: _common_means(rows, compared, metric, over) for metric in metrics}
    first = grids[metrics[0]]
    for metric, grid in grids.items():
        table[metric] = grid.mean()
        table[f"{metric}_spread"] = _spreads(rows, compared, metric, over, grid.index)
        if len(grid) != len(first):
            table[f"{metric}_categories"] = len(grid)
    table = table.join(_ranks(first, random_state))
    table["categories"], table["measured"] = len(first), groups[over].nunique()
    table["seeds"] = groups["seed"].nunique()
    return table.sort_values("rank", kind="stable")


def _common_means(rows: Any, compared: str, metric: str, over: str) -> Any:
    """Return the means (categories, compared), of the categories that all of the compared have."""
    grid = _means(rows, metric, over, compared)
    return grid.dropna(axis="columns", how="all").dropna()


def _spreads(rows: Any, compared: str, metric: str, over: str, categories: Any) -> Any:
    """Return the deviation over the seeds of the mean over these categories."""
    of_seed = _means(rows, metric, [compared, "seed"], over).reindex(columns=categories)
    return of_seed.dropna().mean(axis="columns").groupby(level=compared, sort=False).std()


def _means(rows: Any, metric: str, index: str | list[str], columns: str) -> Any:
    """Return the means of a metric as a grid; NaN where there is none."""
    values = rows.assign(value=import_extra("pandas").to_numeric(rows[metric]))
    return values.pivot_table(index=index, columns=columns, values="value")


def _ranks(grid: Any, random_state: int) -> Any:
    """Return rank, rank_low and rank_high of each column of means (categories, compared)."""
    pandas = import_extra("pandas")
    if grid.empty:
        return pandas.DataFrame(columns=["rank", "rank_low", "rank_high"], dtype=float)
    ranks = grid.rank(axis=1, ascending=False)
    random = np.random.RandomState(random_state)
    drawn = random.randint(len(ranks), size=(_RESAMPLES, len(ranks)))
    means = ranks.to_numpy()[drawn].mean(axis=1)  # (resamples, compared)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    found = {"rank": ranks.mean(), "rank_low": low, "rank_high": high}
    return pandas.DataFrame(found, index=ranks.columns)


def write_tables(study: Study, rows: Sequence[Mapping[str, Any]], folder: Path) -> Any:
    """Write ``rows.csv``, ``table.csv``, ``table.md`` and the study's own tables.

    Parameters
    ----------
    study : Study
        Its module may have ``COLUMNS`` (the first columns of ``rows.csv``), ``COMPARED`` (a column;
        there is no summary without), ``METRICS`` (columns, the first is ranked), ``OVER`` (a
        column, by default ``"category"``), and ``tables(table, config)``, which returns a dict of
        name to DataFrame. A file ``reported.csv`` beside it is shown as a table of its own, and
        enters no other.
    rows : sequence of dict
    folder : Path

    Returns
    -------
    DataFrame
        All rows, also those of earlier runs in this folder.
    """
    pandas = import_extra("pandas")
    import_extra("tabulate")
    table = pandas.DataFrame(list(rows)).drop(columns=["case", "case_rows"], errors="ignore")
    first = [name for name in getattr(study.module, "COLUMNS", ()) if name in table]
    table = table[[*first, *(name for name in table if name not in first)]]
    _write_csv(table, folder / "rows.csv", index=False)
    module, made = study.module, {}
    compared = getattr(module, "COMPARED", None)
    if compared is not None and len(table):
        metrics = [name for name in module.METRICS if name in table]
        over = getattr(module, "OVER", "category")
        made["table"] = summarize(table, compared, metrics, over)
    if hasattr(module, "tables") and len(table):
        made |= module.tables(table, study.config)
    parts = [f"# {study.name}\n"]
    for name, one in made.items():
        _write_csv(one, folder / f"{name}.csv")
        deep = one.index.nlevels > 1
        shown = one.reset_index() if deep else one
        text = shown.to_markdown(index=not deep, floatfmt=".4f", missingval=_MISSING)
        parts.append(f"## {'Measured' if name == 'table' else name.replace('_', ' ')}\n\n{text}\n")
    reported = study.source.parent / "reported.csv"
    if reported.is_file():
        shutil.copyfile(reported, folder / "reported.csv")
        text = pandas.read_csv(reported).to_markdown(index=False, missingval="")
        parts.append(f"## Reported elsewhere, not measured here\n\n{text}\n")
    write_text(folder / "table.md", "\n".join(parts))
    return table


def _write_csv(table: Any, path: Path, index: bool = True) -> None:
    write_text(path, table.to_csv(index=index, lineterminator="\n"))
