"""Which memory, how much of it, and what does an approximate search save and cost?"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from anomalib_lite import MemoryBank, PatchCore, SubspaceAD
from anomalib_lite.coreset import select_coreset
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.images.embeddings import embed_all
from anomalib_lite.memory_bank import serialize
from anomalib_lite.metrics import auroc
from anomalib_lite.studies import (
    COLORS,
    MARKERS,
    NetworkConfig,
    StudyConfig,
    StudyModel,
    category_names,
    draw_bars,
    new_figure,
    save_figure,
    summarize,
)

COLUMNS = (
    *("category", "search_method", "pq_bits", "nprobe", "image_auroc", "memory_mb"),
    *("search_time_ms", "speedup", "memory_reduction", "accuracy_loss_percent", "timestamp"),
    *("part", "memory", "coreset_ratio", "bank_size", "index_mb", "index_reduction", "recall"),
    *("pixel_auroc", "seed"),
)
EXACT = "exact"


class SearchConfig(StudyModel):
    """How a bank is searched: parameters of MemoryBank."""

    index: str = "flat"
    algorithm: Literal["auto", "faiss", "int8"] = "auto"
    nprobe: int | None = None
    ef_search: int | None = None


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    network: NetworkConfig
    memories: list[Literal["knn", "pca", "kmeans"]]
    memory_ratio: float = 0.05
    coreset_ratios: list[float]
    searches: dict[str, SearchConfig]
    search_categories: list[str] | None = None
    search_ratio: float = 1.0
    n_neighbors: int = 1
    timed_queries: int = 2000
    repeats: int = 3


@dataclass
class Entry:
    """One way to remember and to search: what is compared with the others of its part."""

    about: dict[str, Any]
    score: Callable[[np.ndarray], np.ndarray]  # patches (Q, D) -> their scores (Q,)
    rows_mb: float  # size of what is remembered, beside an index
    index_mb: float
    found: dict[str, Any]


def measure(config: Config, run: Any) -> Any:
    """Yield the rows of all parts for each category and seed."""
    [network] = run.networks({"network": config.network}).values()
    given = config.search_categories
    searched = None if given is None else category_names(given)
    for case in run.cases(
        {"category": name, "seed": seed} for seed in run.seeds for name in run.categories
    ):
        seed, images = case["seed"], run.open(case["category"], case["seed"])
        memories, backbone = fit_memories(config, network, run, images, seed)
        extractor = Extractor(backbone, network.image_size)
        X = np.concatenate(embed(extractor, images.train))
        queries = Queries(embed(extractor, images.test), images.test, config)
        banks = fit_banks(config, X, seed)
        parts: dict[str, tuple[list[Entry], Any]] = {
            "memory": (memories, config.memories[0]),
            "coreset": (
                [banks[ratio] for ratio in config.coreset_ratios],
                max(config.coreset_ratios),
            ),
        }
        if searched is None or case["category"] in searched:
            parts["search"] = fit_searches(config, banks), EXACT
        for part, (entries, baseline) in parts.items():
            for row in compare(entries, baseline, queries):
                yield {"part": part, "n_train": len(images.train), **row}


# --- What is compared ---------------------------------------------------------------------------


def fit_memories(
    config: Config, network: NetworkConfig, run: Any, images: Any, seed: int
) -> tuple[list[Entry], Any]:
    """Fit and test a detector for each memory; return them, and the network of the last."""
    entries, backbone = [], None
    for name in config.memories:
        options = {**network.parameters(), "random_state": seed, "n_jobs": config.n_jobs}
        about = {"name": name, "memory": name, "search_method": EXACT}
        if name == "pca":
            detector = run.fit(SubspaceAD(image_score="max", **options), images.train)
            subspace = detector.subspace_
            size, score = subspace.components_.nbytes + subspace.mean_.nbytes, subspace.residual
            about["search_method"] = "projection"
        else:
            detector = PatchCore(
                coreset="greedy" if name == "knn" else "kmeans",
                coreset_ratio=config.memory_ratio,
                n_neighbors=config.n_neighbors,
                **options,
            )
            bank = run.fit(detector, images.train).memory_bank_
            size, score = bank.embeddings_.nbytes, searching(bank, config)
            about |= {"coreset_ratio": config.memory_ratio, "bank_size": len(bank.embeddings_)}
        found, backbone = run.test(detector, images.test), detector.backbone_
        entries.append(Entry(about, score, size / 1e6, 0.0, found))
    return entries, backbone


def fit_banks(config: Config, X: np.ndarray, seed: int) -> dict[float, Entry]:
    """Fill a bank for each share of the patches X.

    The greedy choice goes on from patch to patch, so each smaller coreset begins a larger one.
    """
    ratios = {*config.coreset_ratios, config.search_ratio}
    sizes = {ratio: max(config.n_neighbors, round(ratio * len(X))) for ratio in sorted(ratios)}
    longest = max((n for n in sizes.values() if n < len(X)), default=1)
    order = select_coreset(X, longest, method="greedy", random_state=seed).indices
    banks = {}
    for ratio, n in sizes.items():
        bank = MemoryBank(config.n_neighbors).fit(X if n == len(X) else X[order[:n]])
        about = {"name": ratio, "memory": "knn", "search_method": EXACT}
        about |= {"coreset_ratio": ratio, "bank_size": n}
        size = bank.embeddings_.nbytes / 1e6
        banks[ratio] = Entry(about, searching(bank, config), size, 0.0, {})
    return banks


def fit_searches(config: Config, banks: dict[float, Entry]) -> list[Entry]:
    """Search one bank in each way; the first one is exact."""
    bank = banks[config.search_ratio].score.bank  # type: ignore[attr-defined]
    entries = []
    for name, search in {EXACT: SearchConfig(), **config.searches}.items():
        searched = MemoryBank(config.n_neighbors, **dict(search)).fit(bank.embeddings_)
        index = 0 if searched.index_ is None else len(serialize(searched.index_))
        about = {"name": name, "memory": "knn", "search_method": name, "nprobe": search.nprobe}
        about |= {"coreset_ratio": config.search_ratio, "bank_size": len(bank.embeddings_)}
        about |= {"pq_bits": pq_bits(search.index), "index": search.index}
        size = bank.embeddings_.nbytes / 1e6
        entries.append(Entry(about, searching(searched, config), size, index / 1e6, {}))
    return entries


def pq_bits(index: str) -> int | None:
    """Return the bits of each number of a product quantiser; None for other indexes.

    >>> pq_bits("IVF64,PQ8"), pq_bits("PQ16x4"), pq_bits("SQ8")
    (8, 4, None)
    """
    found = re.search(r"PQ\d+(?:x(\d+))?", index)
    return None if found is None else int(found[1] or 8)


class searching:  # noqa: N801  # is used as a function
    """Scores patches by their mean distance to the nearest of a bank."""

    def __init__(self, bank: MemoryBank, config: Config) -> None:
        self.bank, self.k = bank, config.n_neighbors

    def __call__(self, Q: np.ndarray) -> np.ndarray:
        """Return the scores (Q,) of patches (Q, D)."""
        return np.asarray(self.bank.search(Q, self.k)[0].mean(axis=1))


# --- Comparing ----------------------------------------------------------------------------------


def embed(extractor: Any, samples: list[Any]) -> list[np.ndarray]:
    """Return the patches (n, D) of each image."""
    grids, _ = embed_all(extractor, ImageSource(samples))
    return [np.ascontiguousarray(grid.reshape(-1, grid.shape[-1])) for grid in grids]


class Queries:
    """The patches of the images to test, and a sample of them to measure times with."""

    def __init__(self, patches: list[np.ndarray], samples: list[Any], config: Config) -> None:
        self.rows = np.concatenate(patches)
        self.labels = np.array([sample.label for sample in samples])
        self.starts = np.cumsum([0, *(len(one) for one in patches[:-1])])
        step = max(1, len(self.rows) // config.timed_queries)
        self.timed = np.ascontiguousarray(self.rows[::step][: config.timed_queries])
        self.repeats = config.repeats

    def image_auroc(self, entry: Entry) -> float:
        """Return the AUROC of the largest patch score of each image."""
        return auroc(self.labels, np.maximum.reduceat(entry.score(self.rows), self.starts))

    def times(self, entries: list[Entry]) -> list[float]:
        """Return milliseconds for 1,000 patches: medians of rounds in which all take turns."""
        for entry in entries:
            entry.score(self.timed)  # what is prepared at the first call does not count
        rounds: list[list[float]] = [[] for _ in entries]
        for _ in range(self.repeats):
            for entry, seconds in zip(entries, rounds, strict=True):
                began = time.perf_counter()
                entry.score(self.timed)
                seconds.append(time.perf_counter() - began)
        return [1e6 * statistics.median(seconds) / len(self.timed) for seconds in rounds]


def compare(entries: list[Entry], baseline: Any, queries: Queries) -> list[dict[str, Any]]:
    """Return a row for each entry; shares and losses are against the baseline."""
    rows = []
    for entry, milliseconds in zip(entries, queries.times(entries), strict=True):
        row = {"image_auroc": None, "pixel_auroc": None, "recall": None}
        row |= {**entry.about, **entry.found}
        if not entry.found:
            row["image_auroc"] = queries.image_auroc(entry)
        if entry.index_mb:
            row["recall"] = entry.score.bank.recall(queries.timed)  # type: ignore[attr-defined]
        row |= {"memory_mb": entry.rows_mb + entry.index_mb, "search_time_ms": milliseconds}
        rows.append(row | {"index_mb": entry.index_mb or entry.rows_mb})
    [first] = [row for row in rows if row["name"] == baseline]
    for row in rows:
        row["speedup"] = first["search_time_ms"] / row["search_time_ms"]
        row["memory_reduction"] = 1 - row["memory_mb"] / first["memory_mb"]
        row["index_reduction"] = 1 - row["index_mb"] / first["memory_mb"]
        loss = first["image_auroc"] - row["image_auroc"]
        share = loss / first["image_auroc"] if first["image_auroc"] else None
        row["accuracy_loss_percent"] = None if share is None else 100 * share
    return [{key: value for key, value in row.items() if key != "name"} for row in rows]


# --- Tables and figures -------------------------------------------------------------------------

PARTS = {"memory": "memory", "coreset": "coreset_ratio", "search": "search_method"}
MEANS = ("accuracy_loss_percent", "recall", "memory_mb", "index_mb", "memory_reduction")
MEDIANS = ("index_reduction", "search_time_ms", "speedup")


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return a table for each part: means over the categories, medians of times."""
    made = {}
    for part, compared in PARTS.items():
        rows = table[table["part"] == part]
        if not len(rows):  # a run that was stopped before any search
            continue
        metrics = ("image_auroc", "pixel_auroc") if part == "memory" else ("image_auroc",)
        one = summarize(rows, compared, metrics)
        groups = rows.groupby(compared)
        one = one.join(groups[list(MEANS)].mean()).join(groups[list(MEDIANS)].median())
        one["largest_loss_percent"] = groups["accuracy_loss_percent"].max()
        made[part] = one if part != "coreset" else one.sort_index()
    return made


def draw(table: Any, folder: Any, config: Config) -> None:
    """Draw memories, shares of the patches, and searches by speed and by size."""
    made = tables(table, config)
    figure, panels = new_figure(2, 2, (15, 11))
    memories = made["memory"].reindex(config.memories)
    draw_bars(
        panels[0, 0],
        list(memories.index),
        memories["image_auroc"],
        memories["image_auroc_spread"],
        title=f"Memories (of knn and kmeans {100 * config.memory_ratio:g} % of the patches)",
        label="image AUROC, mean",
    )
    panels[0, 0].axhline(0.5, color="black", linestyle=":", linewidth=1)
    draw_ratios(panels[0, 1], made["coreset"])
    if "search" in made:
        searches = made["search"].reindex([EXACT, *config.searches])
        draw_searches(panels[1, 0], searches)
        draw_bars(
            panels[1, 1],
            list(searches.index),
            searches["index_mb"],
            title="Size of what is searched (all rows are kept beside it)",
            label="MB, mean",
        )
    else:
        for panel in panels[1]:
            panel.set_visible(False)
    categories, seeds = table["category"].nunique(), table["seed"].nunique()
    figure.suptitle(f"Mean of {categories} categories. Lines: deviation of {seeds} seeds.")
    save_figure(figure, folder / "memory_bank.png")


def draw_ratios(panel: Any, made: Any) -> None:
    """Draw accuracy and time over the share of the patches that is kept."""
    share = 100 * made.index.to_numpy(float)
    spread = made["image_auroc_spread"].fillna(0)
    panel.errorbar(share, made["image_auroc"], yerr=spread, fmt="o-", color=COLORS[0], capsize=3)
    panel.set(xscale="log", title="Share of the patches kept (greedy), exact search")
    panel.set_xlabel("patches kept [%]")
    panel.set_ylabel("image AUROC, mean (circles)", color=COLORS[0])
    panel.set_xticks(share, [f"{one:g}" for one in share])
    panel.set_xticks([], minor=True)
    panel.grid(alpha=0.3)
    times = panel.twinx()
    times.plot(share, made["search_time_ms"], "s--", color=COLORS[5])
    times.set_yscale("log")
    times.set_ylabel("search of 1,000 patches [ms], median (squares)", color=COLORS[5])


def draw_searches(panel: Any, made: Any) -> None:
    """Draw what each search gains in time and loses in accuracy."""
    for i, (name, line) in enumerate(made.iterrows()):
        marker = MARKERS[(i + i // len(COLORS)) % len(MARKERS)]
        color = COLORS[i % len(COLORS)]
        place = line["speedup"], line["accuracy_loss_percent"]
        panel.plot(*place, marker, color=color, markersize=9, label=name, linestyle="none")
    panel.axvline(1, color="black", linewidth=0.8)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xscale="log", title="Searches of one bank, against the exact search")
    panel.set(xlabel="times as fast, median", ylabel="loss of image AUROC [%], mean")
    low, high = panel.get_xlim()
    ticks = [f * 10.0**e for e in range(-4, 5) for f in (1, 2, 5) if low <= f * 10.0**e <= high]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="best", ncols=2)
