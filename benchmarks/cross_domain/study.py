"""What is lost when a detector tests another category than it was fitted on, and can one tell?"""

from __future__ import annotations

from typing import Any

import numpy as np

from anomalib_lite import PatchCore
from anomalib_lite.domain_shift import cosine_distance, median_distance, mmd, sliced_wasserstein
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.images.embeddings import embed_all
from anomalib_lite.studies import (
    COLORS,
    MARKERS,
    NetworkConfig,
    StudyConfig,
    draw_bars,
    draw_matrix,
    new_figure,
    save_figure,
    short_name,
)

COLUMNS = (
    *("train_category", "test_category", "image_auroc", "pixel_auroc"),
    *("domain_shift_distance", "feature_drift", "timestamp", "cosine_distance", "seed"),
)
DISTANCES = {
    "domain_shift_distance": "MMD, squared",
    "feature_drift": "sliced Wasserstein, relative",
    "cosine_distance": "cosine",
}


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    network: NetworkConfig
    coreset_ratio: float = 0.05
    n_neighbors: int = 5


def measure(config: Config, run: Any) -> Any:
    """Yield a row for each pair of categories and each seed."""
    [network] = run.networks({"network": config.network}).values()
    for case in run.cases(
        {"train_category": name, "seed": seed} for seed in run.seeds for name in run.categories
    ):
        seed = case["seed"]
        fitted_on = run.open(case["train_category"], seed)
        detector = PatchCore(
            coreset_ratio=config.coreset_ratio,
            n_neighbors=config.n_neighbors,
            random_state=seed,
            n_jobs=config.n_jobs,
            **network.parameters(),
        )
        run.fit(detector, fitted_on.train)
        reference = describe(detector, fitted_on.train)
        for name in run.categories:
            images = run.open(name, seed)
            normal = [sample for sample in images.test if sample.label == 0]
            found = run.test(detector, images.test)
            found |= compare(reference, describe(detector, normal), seed)
            yield {"test_category": name, **found, "n_train": len(fitted_on.train)}


def describe(detector: Any, samples: list[Any]) -> list[np.ndarray]:
    """Return the mean of each layer over each image's patches: one array (N, C) a layer."""
    backbone = detector.backbone_
    extractor = Extractor(backbone, detector.image_size)
    embeddings, _ = embed_all(extractor, ImageSource(samples))
    means = np.stack([grid.mean(axis=(0, 1)) for grid in embeddings])
    ends = np.cumsum(backbone.channels or [means.shape[1]])[:-1]
    return np.split(means, ends, axis=1)


def compare(reference: list[np.ndarray], new: list[np.ndarray], seed: int) -> dict[str, float]:
    """Return the distances, each the mean over the layers."""
    found: dict[str, list[float]] = {name: [] for name in DISTANCES}
    for X, Y in zip(reference, new, strict=True):
        # The width comes from the reference, as in feature_drift of the package.
        found["domain_shift_distance"].append(mmd(X, Y, bandwidth=median_distance(X)))
        length = float(np.sqrt((X**2).sum(axis=1).mean()))
        found["feature_drift"].append(sliced_wasserstein(X, Y, random_state=seed) / length)
        found["cosine_distance"].append(cosine_distance(X, Y))
    return {name: float(np.mean(values)) for name, values in found.items()}


def with_loss(table: Any) -> Any:
    """Average over the seeds, and add what each pair loses against the test category's own."""
    values = ["image_auroc", "pixel_auroc", *DISTANCES]
    pairs = table.groupby(["train_category", "test_category"], sort=False)[values].mean()
    pairs = pairs.reset_index()
    is_own = pairs["train_category"] == pairs["test_category"]
    own = pairs[is_own].set_index("test_category")["image_auroc"]
    return pairs.assign(loss=pairs["test_category"].map(own) - pairs["image_auroc"], is_own=is_own)


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return means in-domain and cross-domain, matrices, and correlations with the loss."""
    pairs = with_loss(table)
    cross = pairs[~pairs["is_own"]]
    made = {
        "table": summarize_pairs(table, pairs),
        "image_auroc_matrix": as_matrix(pairs, "image_auroc"),
    }
    if len(cross) > 2:
        made["correlation_with_loss"] = correlations(cross)
    return made


def summarize_pairs(table: Any, pairs: Any) -> Any:
    """Return means of pairs in-domain (one category) and cross-domain (two)."""
    means = pairs.groupby("is_own")[["image_auroc", "pixel_auroc", *DISTANCES]].mean()
    means.index = ["in-domain" if own else "cross-domain" for own in means.index]
    by_seed = table.assign(is_own=table["train_category"] == table["test_category"])
    by_seed = by_seed.groupby(["is_own", "seed"])["image_auroc"].mean().groupby("is_own").std()
    means["image_auroc_spread"] = by_seed.to_numpy()
    means["pairs"] = pairs.groupby("is_own").size().to_numpy()
    return means


def as_matrix(pairs: Any, value: str) -> Any:
    """Return a value as a table: a row for each category fitted on, a column for each tested."""
    named = pairs.assign(
        **{
            "fitted on": pairs["train_category"].map(short_name),
            "tested on": pairs["test_category"].map(short_name),
        }
    )
    return named.pivot_table(index="fitted on", columns="tested on", values=value, sort=False)


def correlations(cross: Any) -> Any:
    """Return Spearman's and Pearson's correlations of each distance with the loss.

    The interval is that of Spearman's, by the bootstrap over categories: pairs that share a
    category are not independent.
    """
    import pandas as pd
    from scipy.stats import spearmanr

    random = np.random.RandomState(0)
    categories = sorted(set(cross["train_category"]) | set(cross["test_category"]))
    row, column = (
        pd.Categorical(cross[name], categories).codes
        for name in ("train_category", "test_category")
    )
    loss, found = cross["loss"].to_numpy(), {}
    for name, text in DISTANCES.items():
        distance, drawn = cross[name].to_numpy(), []
        for _ in range(500):
            times = np.bincount(random.randint(len(categories), size=len(categories)),
                                minlength=len(categories))  # fmt: skip
            taken = np.repeat(np.arange(len(cross)), times[row] * times[column])
            if len(taken) and np.ptp(distance[taken]) > 0 and np.ptp(loss[taken]) > 0:
                drawn.append(spearmanr(distance[taken], loss[taken]).statistic)
        low, high = np.percentile(drawn, [2.5, 97.5]) if drawn else (np.nan, np.nan)
        varies = np.ptp(distance) > 0 and np.ptp(loss) > 0  # else there is no correlation
        found[text] = {
            "spearman": spearmanr(distance, loss).statistic if varies else np.nan,
            "spearman_low": low,
            "spearman_high": high,
            "pearson": np.corrcoef(distance, loss)[0, 1] if varies else np.nan,
            "pairs": len(cross),
        }
    return pd.DataFrame(found).T


def draw(table: Any, folder: Any, config: Config) -> None:
    """Draw both matrices, distance against loss, and in-domain beside cross-domain."""
    pairs = with_loss(table)
    cross = pairs[~pairs["is_own"]]
    figure, panels = new_figure(2, 2, (16, 13))
    auroc = as_matrix(pairs, "image_auroc")
    draw_matrix(panels[0, 0], auroc, title="Image AUROC", label="image AUROC", limits=(0.0, 1.0))
    shift = as_matrix(pairs, "domain_shift_distance")
    draw_matrix(panels[0, 1], shift, title="Distance of the normal images", label="MMD, squared")
    panel = panels[1, 0]
    for (name, text), color, marker in zip(DISTANCES.items(), COLORS, MARKERS, strict=False):
        scale = cross[name].abs().max() or 1.0
        label = f"{text} (1 is {scale:.2g})"
        panel.plot(
            cross[name] / scale, cross["loss"], marker, color=color, label=label, ms=4, alpha=0.6
        )
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xlabel="distance, as a share of the largest", ylabel="loss of image AUROC")
    panel.set_title("Does the distance tell the loss?")
    panel.grid(alpha=0.3)
    panel.set_ylim(top=1.35 * max(0.1, cross["loss"].max()))  # room, so that no mark is hidden
    panel.legend(fontsize=9, loc="upper left")
    means = summarize_pairs(table, pairs).reindex(["in-domain", "cross-domain"])
    draw_bars(
        panels[1, 1],
        [f"{name}\n{int(n) if n == n else 0} pairs" for name, n in means["pairs"].items()],
        means["image_auroc"],
        means["image_auroc_spread"],
        title="Own category, and all others",
        label="image AUROC, mean",
    )
    panels[1, 1].axhline(0.5, color="black", linestyle=":", linewidth=1)
    save_figure(figure, folder / "domain_shift_analysis.png")
