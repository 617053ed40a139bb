"""Results of all cases -> one Markdown page with medians, spreads, ratios and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, NamedTuple

Run = dict[str, Any]

TITLES = {
    "engine": "anomalib through its Engine",
    "bare": "anomalib's bare model in a plain loop",
    "bare_huge": "the bare model, both with huge pages in the allocator",
    "default": "The system's allocator as it is",
    "huge": "Both with huge pages in the allocator",
    "kept": "Both with an allocator that keeps its memory",
    "cold": "Our cache of converted networks empty",
    "warm": "Our cache of converted networks as the process before left it",
}
# Fit, test, total memory, memory above that of the imports.
TARGETS: dict[str, tuple[float | None, ...]] = {
    "100": (30, 10, 0.5, 0.2),
    "all": (15, 4, 0.6, None),
    "padim": (5, 8, 0.6, None),
}

# How ours (a) and the peer's (b) are compared, how the result and the target are printed, and the
# digits, if they are not those of the row.
WAYS: dict[str, tuple[Callable[[float, float], float], str, str, str]] = {
    "times less": (lambda a, b: b / a, "{}x", "at least {:g}x", ".1f"),
    "times more": (lambda a, b: a / b, "{}x", "at least {:g}x", ".1f"),
    "share": (lambda a, b: a / b, "{}", "at most {:g}", ".2f"),
    "difference": (lambda a, b: a - b, "{}", "no lower", ""),
}


class Row(NamedTuple):
    """One line of a table: how to read it, print it and compare it."""

    label: str
    value: Callable[[Run], float]
    form: str = ".3g"
    compare: str = ""  # a key of WAYS; empty: not compared
    target: float | None = None


def patchcore_rows(case: str, n_test: int) -> list[Row]:
    """Return the rows of a table of whole jobs."""
    fit, test, memory, above = TARGETS[case]
    return [
        Row("fit, s", lambda r: r["fit_s"], ".2f", "times less", fit),
        Row("test, ms per image", lambda r: 1e3 * r["test_s"] / n_test, ".1f", "times less", test),
        Row("peak memory, MB", lambda r: r["peak_rss_mb"], ".0f", "share", memory),
        Row("peak memory less that after the imports, MB",
            lambda r: r["peak_rss_mb"] - r["rss_after_import_mb"], ".0f", "share", above),
        Row("image AUROC", lambda r: r["image_auroc"], ".4f", "difference", 0),
        Row("pixel AUROC", lambda r: r["pixel_auroc"], ".4f", "difference", 0),
        Row("AUPRO, limit 0.3", lambda r: r["aupro"], ".4f", "difference", 0),
        Row("imports, s", lambda r: r["import_s"], ".1f", "times less"),
        Row("memory after imports, MB", lambda r: r["rss_after_import_mb"], ".0f", "share"),
        Row("building the model, s", lambda r: r["build_s"], ".2f"),
        Row("whole script: imports to last score, s", lambda r: r["script_s"], ".1f",
            "times less"),
        Row("rows of the memory bank, or positions", lambda r: r["bank_shape"][0], ".0f"),
    ]  # fmt: skip


CORESET_ROWS = [
    Row("seconds", lambda r: r["coreset_s"], ".3f", "times less", 100),
    Row("covering radius", lambda r: r["covering_radius"], ".3f", "difference"),
    Row("mean distance to the nearest pick", lambda r: r["mean_distance"], ".3f", "difference"),
    Row("memory added, MB", lambda r: r["peak_rss_mb"] - r["rss_before_mb"], ".0f"),
]
START_ROWS = [
    Row("process start to first score, s", lambda r: r["score_at_s"], ".2f", "times less", 3),
    Row("of it interpreter and imports, s", lambda r: r["imports_at_s"], ".2f", "times less"),
    Row("of it loading the model, s", lambda r: r["loaded_at_s"] - r["imports_at_s"], ".2f",
        "times less"),
    Row("of it the first image, s", lambda r: r["score_at_s"] - r["loaded_at_s"], ".2f",
        "times less"),
    Row("processor seconds to first score", lambda r: r["score_at_cpu_s"], ".2f", "times less"),
    Row("second image, ms", lambda r: 1e3 * r["second_s"], ".1f", "times less"),
    Row("peak memory, MB", lambda r: r["peak_rss_mb"], ".0f", "share"),
    Row("memory after imports, MB", lambda r: r["rss_after_import_mb"], ".0f", "share"),
]  # fmt: skip


def latency_rows(n_test: int) -> list[Row]:
    """Return the rows of a latency table; the peer has one figure, as its score needs a map."""
    return [
        Row("score and map, median, ms", lambda r: r["detect_p50_ms"], ".1f", "times less", 6),
        Row("score and map, 95 %, ms", lambda r: r["detect_p95_ms"], ".1f", "times less"),
        Row("score, median, ms", lambda r: r.get("score_p50_ms", r["detect_p50_ms"]), ".1f",
            "times less"),
        Row("score, 95 %, ms", lambda r: r.get("score_p95_ms", r["detect_p95_ms"]), ".1f",
            "times less"),
        Row("score and map, processor ms", lambda r: r["detect_cpu_ms"], ".1f", "times less"),
        Row("in batches, images per second", lambda r: n_test / r["batches_s"], ".1f",
            "times more", 10),
        Row("peak memory, MB", lambda r: r["peak_rss_mb"], ".0f", "share"),
    ]  # fmt: skip


def render(results: Iterable[dict[str, Any]]) -> str:
    """Render the page from the contents of the case files."""
    parts = [
        "# anomalib-lite and anomalib, measured side by side\n\n"
        "Written by `run.py`; [README.md](README.md) says what is measured, and how. Figures are "
        "medians over the rounds, with the lowest and the highest in brackets. A ratio is that of "
        "the two medians; the brackets have the lowest and the highest ratio of one round.\n"
    ]
    sections = {"coreset": render_coreset, "latency": render_latency, "start": render_start}
    for result in results:
        parts.append(sections.get(result["case"], render_patchcore)(result))
    return "\n".join(parts)


def render_patchcore(result: dict[str, Any]) -> str:
    """Render a section of whole jobs."""
    s = result["settings"]
    method = f"PatchCore, coreset {100 * s['coreset_ratio']:g} %"
    if result["case"] == "padim":
        method = f"PaDiM, {s['n_components']} channels"
    text = [
        f"## {method}, {result['n_train']} training images, {result['n_test']} test images\n",
        describe(result),
    ]
    rows = patchcore_rows(result["case"], result["n_test"])
    for pair, runs in by_pair(result["runs"]):
        text += [f"### Against {TITLES[pair]}\n", table(runs, rows)]
    agreement = result.get("our_bank_rows_to_nearest_peer_embedding")
    if agreement:
        text.append(
            "How similar preprocessing and backbone are: distance of a row of our bank to the "
            "nearest embedding of the same images by anomalib's model, relative to the row's norm: "
            f"{agreement['median']:.1e} (median), {agreement['p95']:.1e} (95 %), "
            f"{agreement['largest']:.1e} (largest). For comparison: 1e-6, the same pixels and the "
            "same network in float32; 3e-2, pixels rounded to 8 bits after resizing.\n"
        )
    return "\n".join(text)


def render_coreset(result: dict[str, Any]) -> str:
    """Render the section on the coreset alone."""
    text = [
        f"## The coreset alone: {result['n_samples']:,} of {result['n_rows']:,} patch embeddings\n",
        describe(result),
    ]
    for pair, runs in by_pair(result["runs"]):
        text += [f"### {TITLES[pair]}\n", table(runs, CORESET_ROWS)]
    projected = {r["projected_to"] for r in result["runs"] if "projected_to" in r}
    text.append(
        f"Ours picks in the embeddings' own space; anomalib's picks after a random projection to "
        f"{', '.join(map(str, projected))} dimensions. Both radii are measured without it.\n"
    )
    return "\n".join(text)


def render_latency(result: dict[str, Any]) -> str:
    """Render the section on single images and batches."""
    text = [
        f"## Scoring with a fitted model: {result['n_single']} single images, and "
        f"{result['n_test']} in batches of {result['settings']['batch_size']}\n",
        describe(result),
    ]
    for pair, runs in by_pair(result["runs"]):
        text += [f"### Against {TITLES[pair]}\n", table(runs, latency_rows(result["n_test"]))]
    return "\n".join(text)


def render_start(result: dict[str, Any]) -> str:
    """Render the section on a new process."""
    text = ["## From the start of a process to the first score\n", describe(result)]
    for pair, runs in by_pair(result["runs"]):
        text += [f"### {TITLES[pair]}\n", table(runs, START_ROWS)]
    return "\n".join(text)


def describe(result: dict[str, Any]) -> str:
    """Describe machine, versions and settings of a case."""
    m, s = result["machine"], result["settings"]
    lines = [
        f"{result['date']}; {m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, {m['system']}; "
        f"{s['threads']} threads; load average when it began "
        f"{result['load_average_at_start']:.2f}."
    ]
    for who, name in (("ours", "anomalib-lite"), ("peer", "anomalib")):
        run = next(r for r in result["runs"] if r["who"] == who)
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v)
        lines.append(f"{name}: {versions}.")
        if who == "ours" and result["commit"]:
            lines[-1] = f"{name} (commit {result['commit']}): {versions}."
        chosen = run.get("settings", {})
        if chosen:
            lines.append(", ".join(f"`{k}={v}`" for k, v in chosen.items()) + ".")
    ours, peers = (next(r for r in result["runs"] if r["who"] == w) for w in ("ours", "peer"))
    if ours["versions"]["torch"] != peers["versions"]["torch"]:
        lines.append("**The two did not run with the same release of torch.**")
    return "\n\n".join(lines) + "\n"


def by_pair(runs: list[Run]) -> Iterable[tuple[str, list[Run]]]:
    """Yield the runs of each pair, in the order of their first round."""
    for name in dict.fromkeys(r["pair"] for r in runs):
        yield name, [r for r in runs if r["pair"] == name]


def table(runs: list[Run], rows: list[Row]) -> str:
    """Make a table of ours and the peer's, compared line by line."""
    lines = ["| | anomalib-lite | anomalib | compared | target | |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours = [row.value(r) for r in runs if r["who"] == "ours"]
        peer = [row.value(r) for r in runs if r["who"] == "peer"]
        verdict = compare(row, ours, peer) if row.compare else ("", "", "")
        lines.append("| " + " | ".join([row.label, spread(ours, row.form), spread(peer, row.form),
                                        *verdict]) + " |")  # fmt: skip
    return "\n".join(lines) + "\n"


def compare(row: Row, ours: list[float], peer: list[float]) -> tuple[str, str, str]:
    """Return the comparison of the medians, the target, and whether it is met."""
    way, form, wanted, digits = WAYS[row.compare]
    digits = digits or f"+{row.form}"
    value = way(median(ours), median(peer))
    each = [way(a, b) for a, b in zip(ours, peer, strict=True)]
    shown = form.format(format(value, digits))
    if len(each) > 1:
        shown += f" ({min(each):{digits}} to {max(each):{digits}})"
    if row.target is None:
        return shown, "", ""
    met = value <= row.target if row.compare == "share" else value >= row.target
    return shown, wanted.format(row.target), "met" if met else "**missed**"


def spread(values: list[float], form: str) -> str:
    """Format values as ``median (lowest to highest)``."""
    text = format(median(values), form)
    if len(values) > 1:
        text += f" ({min(values):{form}} to {max(values):{form}})"
    return text
