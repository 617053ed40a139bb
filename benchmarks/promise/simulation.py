"""Is the promise kept? Many draws of images whose distribution is known."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from pydantic import Field

from anomalib_lite import MahalanobisVFM, PaDiM, PatchCore, SubspaceAD
from anomalib_lite.errors import CalibrationWarning
from anomalib_lite.studies import StudyConfig

COLUMNS = ("detector", "calibration", "photographs", "rate", "what", "draws", "realised", "error")
DETECTORS: dict[str, Any] = {
    "PatchCore": lambda **p: PatchCore(coreset_ratio=1.0, **p),
    "PatchCore, 5 %": lambda **p: PatchCore(coreset_ratio=0.05, **p),
    "PaDiM": lambda **p: PaDiM(n_components=4, **p),
    "MahalanobisVFM": MahalanobisVFM,
    "SubspaceAD": lambda **p: SubspaceAD(n_components=2, **p),
}
SHAPE, CENTER = (2, 2, 4), 5  # of the embeddings of an image: (h, w, D), and their mean


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    detectors: list[str] = Field(default_factory=lambda: list(DETECTORS))
    calibrations: list[Literal["split", "cross", "leave_one_out"]]
    photographs: list[int]
    rates: list[float]
    after: list[Literal["fit", "partial_fit", "recalibrate", "confidence"]]
    draws: int = Field(default=1000, ge=2)
    # So many that draws differ by more than the count of a draw; four times as many for a
    # confidence, where it matters on which side of the rate asked for each draw is.
    new_images: int = 1000
    confidence: float = 0.95


def measure(config: Config, run: Any) -> Any:
    """Yield the rate of false alarms over all draws, for each detector, rate and what was done."""
    for case in run.cases(
        {"detector": d, "calibration": c, "photographs": n, "rate": rate, "what": what}
        for what in config.after
        for d in config.detectors
        for c in config.calibrations
        for n in config.photographs
        for rate in config.rates
        if is_offered(c, n, what)
    ):
        rates = np.array([one_draw(case, config, seed) for seed in range(config.draws)])
        yield {
            "seed": 0,
            "draws": len(rates),
            "realised": float(rates.mean()),
            "error": float(rates.std(ddof=1) / np.sqrt(len(rates))),
            "above": float(np.mean(rates > case["rate"])),
        }


def is_offered(calibration: str, photographs: int, what: str) -> bool:
    """Tell whether the detectors offer this; leaving one out has no groups and no update."""
    return calibration != "leave_one_out" or (photographs == 1 and what == "fit")


def one_draw(case: dict[str, Any], config: Config, seed: int) -> float:
    """Fit on new images, and return the share of further ones that the threshold stops."""
    random = np.random.RandomState(seed)
    rate, photographs, what = case["rate"], case["photographs"], case["what"]
    needed = round(1 / rate)  # parts to hold back, and 1
    if what == "confidence":
        needed = int(np.ceil(np.log(1 - config.confidence) / np.log(1 - rate))) + 1
    n_parts = max(20, 2 * needed) if case["calibration"] == "split" else max(20, needed)
    options = {"random_state": seed, "calibration": case["calibration"]}
    detector = DETECTORS[case["detector"]](false_alarm_rate=rate, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        fit(detector.fit_embeddings, *draw_parts(n_parts, photographs, random))
        if what == "partial_fit":
            fit(detector.partial_fit_embeddings, *draw_parts(n_parts, photographs, random))
        elif what != "fit":
            E, groups = draw_parts(n_parts, photographs, random)
            ids = np.arange(len(E)) if groups is None else groups
            confidence = config.confidence if what == "confidence" else None
            scores, names = detector.score_embeddings(E), [""] * len(E)
            detector._calibrate(scores, scores, ids, names, rate, confidence)
        n_new = config.new_images * (4 if what == "confidence" else 1)
        new, _ = draw_parts(n_new, 1, random)
        return float(np.mean(detector.score_embeddings(new) > detector.threshold_))


def draw_parts(
    n_parts: int, photographs: int, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray | None]:
    """Draw embeddings of parts, each photographed several times, and the part of each image.

    Parts differ by more than the photographs of one part do, and some parts by more than others.
    The features have a common mean, as those of a network: around zero, features of length one
    would lie all around a circle, and all be as far from its centre.
    """
    part = random.normal(size=(n_parts, 1, *SHAPE)) * random.gamma(2, 1, (n_parts, 1, 1, 1, 1))
    E = CENTER + part + 0.1 * random.normal(size=(n_parts, photographs, *SHAPE))
    groups = None if photographs == 1 else np.repeat(np.arange(n_parts), photographs)
    return E.reshape(-1, *SHAPE).astype(np.float32), groups


def fit(method: Any, E: np.ndarray, groups: np.ndarray | None) -> None:
    """Call a method of a detector; without groups it need not know the word."""
    method(E) if groups is None else method(E, groups=groups)


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return one row for each detector and what was done, one column for each rate."""
    table = table.assign(
        found=table["realised"].map("{:.4f}".format) + " ± " + table["error"].map("{:.4f}".format)
    )
    index = ["what", "calibration", "photographs", "detector"]
    found = table.pivot_table(
        index=index, columns="rate", values="found", aggfunc="first", sort=False
    )
    found.columns = [f"{rate:g}" for rate in found.columns]
    confident = table[table["what"] == "confidence"]
    share = confident.groupby(index)["above"].max()
    found["draws above"] = share.reindex(found.index)
    return {"table": found}
