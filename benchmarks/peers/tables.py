"""The results as one markdown page: medians, spreads, ratios and whether each target is met."""

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
}


class Row(NamedTuple):
    """One line of a table: how to read it, print it and compare it."""

    label: str
    value: Callable[[Run], float]
    form: str = ".3g"
    compare: str = ""  # "times less", "share" or "difference"; empty: not compared
    target: float | None = None


def patchcore_rows(n_test: int) -> list[Row]:
    """The lines of a PatchCore table."""
    return [
        Row("fit, s", lambda r: r["fit_s"], ".2f", "times less", 15),
        Row("test, ms per image", lambda r: 1e3 * r["test_s"] / n_test, ".1f", "times less", 4),
        Row("peak memory, MB", lambda r: r["peak_rss_mb"], ".0f", "share", 0.6),
        Row("image AUROC", lambda r: r["image_auroc"], ".4f", "difference", 0),
        Row("pixel AUROC", lambda r: r["pixel_auroc"], ".4f", "difference", 0),
        Row("AUPRO, limit 0.3", lambda r: r["aupro"], ".4f", "difference", 0),
        Row("imports, s", lambda r: r["import_s"], ".1f", "times less"),
        Row("memory after imports, MB", lambda r: r["rss_after_import_mb"], ".0f", "share"),
        Row("building the model, s", lambda r: r["build_s"], ".2f"),
        Row("whole script: imports to last score, s", lambda r: r["script_s"], ".1f",
            "times less"),
        Row("rows in the memory bank", lambda r: r["bank_shape"][0], ".0f"),
    ]  # fmt: skip


CORESET_ROWS = [
    Row("seconds", lambda r: r["coreset_s"], ".3f", "times less", 100),
    Row("covering radius", lambda r: r["covering_radius"], ".3f", "difference"),
    Row("mean distance to the nearest pick", lambda r: r["mean_distance"], ".3f", "difference"),
    Row("memory added, MB", lambda r: r["peak_rss_mb"] - r["rss_before_mb"], ".0f"),
]


def render(results: Iterable[dict[str, Any]]) -> str:
    """The page, from what the case files hold."""
    parts = [
        "# anomalib-lite and anomalib, measured side by side\n\n"
        "Written by `run.py`; what is measured, and how, is in [README.md](README.md). Figures are "
        "medians over the rounds, lowest to highest in brackets; a ratio is of the two medians, "
        "in brackets lowest to highest over the rounds, each round's two runs compared with each "
        "other.\n"
    ]
    for result in results:
        parts.append(render_coreset(result) if result["case"] == "coreset" else
                     render_patchcore(result))  # fmt: skip
    return "\n".join(parts)


def render_patchcore(result: dict[str, Any]) -> str:
    """One section per number of training images."""
    s = result["settings"]
    text = [
        f"## PatchCore, {result['n_train']} training images, {result['n_test']} test images, "
        f"coreset {100 * s['coreset_ratio']:g} %\n",
        describe(result),
    ]
    for pair, runs in by_pair(result["runs"]):
        text += [f"### Against {TITLES[pair]}\n", table(runs, patchcore_rows(result["n_test"]))]
    agreement = result.get("our_bank_rows_to_nearest_peer_embedding")
    if agreement:
        text.append(
            "How alike preprocessing and backbone are: a row of our bank, to the nearest embedding "
            "that anomalib's model made of the same images, relative to the row's norm: "
            f"{agreement['median']:.1e} (median), {agreement['p95']:.1e} (95 %), "
            f"{agreement['largest']:.1e} (largest). Read off: 1e-6, the same pixels through the "
            "same network in float32; 3e-2, pixels rounded to 8 bits after resizing.\n"
        )
    return "\n".join(text)


def render_coreset(result: dict[str, Any]) -> str:
    """The section on the coreset alone."""
    text = [
        f"## The coreset alone: {result['n_samples']:,} of {result['n_rows']:,} patch embeddings\n",
        describe(result),
    ]
    for pair, runs in by_pair(result["runs"]):
        text += [f"### {TITLES[pair]}\n", table(runs, CORESET_ROWS)]
    projected = {r["projected_to"] for r in result["runs"] if "projected_to" in r}
    text.append(
        f"Ours picks in the embeddings' own space; anomalib's picks after a random projection to "
        f"{', '.join(map(str, projected))} dimensions. Both radii are measured in the own space.\n"
    )
    return "\n".join(text)


def describe(result: dict[str, Any]) -> str:
    """Machine, versions and settings of a case, in a few lines."""
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
    """The runs of each pair, in the order of their first round."""
    for name in dict.fromkeys(r["pair"] for r in runs):
        yield name, [r for r in runs if r["pair"] == name]


def table(runs: list[Run], rows: list[Row]) -> str:
    """Ours and the peer's in columns, compared line by line."""
    lines = ["| | anomalib-lite | anomalib | compared | target | |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours = [row.value(r) for r in runs if r["who"] == "ours"]
        peer = [row.value(r) for r in runs if r["who"] == "peer"]
        verdict = compare(row, ours, peer) if row.compare else ("", "", "")
        lines.append("| " + " | ".join([row.label, spread(ours, row.form), spread(peer, row.form),
                                        *verdict]) + " |")  # fmt: skip
    return "\n".join(lines) + "\n"


def compare(row: Row, ours: list[float], peer: list[float]) -> tuple[str, str, str]:
    """How the two medians compare, the target, and whether it is met."""
    way: Callable[[float, float], float]
    if row.compare == "times less":
        way, form, wanted = (lambda a, b: b / a), "{}x", "at least {:g}x"
    elif row.compare == "share":
        way, form, wanted = (lambda a, b: a / b), "{}", "at most {:g}"
    else:
        way, form, wanted = (lambda a, b: a - b), "{}", "no lower"
    digits = {"times less": ".1f", "share": ".2f", "difference": f"+{row.form}"}[row.compare]
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
    """``median (lowest to highest)``."""
    text = format(median(values), form)
    if len(values) > 1:
        text += f" ({min(values):{form}} to {max(values):{form}})"
    return text
