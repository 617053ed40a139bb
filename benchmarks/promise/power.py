"""Which defects does the default threshold find, beside the best threshold of the same rate?"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from anomalib_lite.calibration import calibration_size
from anomalib_lite.errors import CalibrationWarning
from anomalib_lite.metrics import auroc
from anomalib_lite.studies import StudyConfig, open_category

from .new_parts import DETECTORS, DetectorConfig

COLUMNS = (
    *("detector", "calibration", "n_train", "odd", "category", "seed", "rate", "false_alarm_rate"),
    *("found", "found_at_rate", "image_auroc", "n_scores", "n_good", "n_defects", "timestamp"),
)


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    detectors: dict[str, DetectorConfig]
    calibrations: list[str]
    sizes: list[int]
    odd: list[float] = Field(default_factory=lambda: [0.0])
    rates: list[float]
    max_defects: int = 200
    least_good: int = 60


def measure(config: Config, run: Any) -> Any:
    """Yield, for each rate, the share of defects found and of good images stopped."""
    for case in run.cases(
        {
            "category": category,
            "n_train": n,
            "odd": odd,
            "seed": seed,
            "detector": name,
            "calibration": calibration,
        }
        for seed in run.seeds
        for category in run.categories
        for n in config.sizes
        if n + config.least_good <= len(good_and_bad(category, run)[0])
        for odd in config.odd
        for name in config.detectors
        for calibration in config.calibrations
    ):
        train, good, defects = draw_images(case, config, run)
        held_back, detector = 0, None
        for rate in config.rates:
            wanted = calibration_size(rate, len(train))
            if detector is None or (detector.calibration_ == "split" and wanted != held_back):
                # Else only the threshold is another.
                held_back, detector = wanted, fit(case, config, rate, train)
                of_good, of_defects = detector.score(good), detector.score(defects)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)
                detector.set_false_alarm_rate(rate)
            both = np.concatenate([of_good, of_defects])
            yield {
                "rate": rate,
                "false_alarm_rate": float(np.mean(of_good > detector.threshold_)),
                "found": float(np.mean(of_defects > detector.threshold_)),
                "found_at_rate": float(np.mean(of_defects > np.quantile(of_good, 1 - rate))),
                "image_auroc": auroc(np.repeat([0, 1], [len(good), len(defects)]), both),
                "n_scores": len(detector.calibration_scores_),
                "n_good": len(good),
                "n_defects": len(defects),
            }


def good_and_bad(category: str, run: Any) -> tuple[list[Any], list[Any]]:
    """Return all good images of a category, and all with a defect."""
    dataset = open_category(category, run.data_root)
    samples = [*dataset.train, *dataset.test]
    run.check_images(category, samples)
    good = [sample for sample in samples if not sample.label]
    return good, [sample for sample in samples if sample.label]


def draw_images(case: dict[str, Any], config: Config, run: Any) -> tuple[list[Any], ...]:
    """Draw images to fit on, of which a share is odd, good ones to test on, and defects."""
    good, defects = good_and_bad(case["category"], run)
    random = np.random.RandomState(case["seed"])
    good = [good[i] for i in random.permutation(len(good))]
    defects = [defects[i] for i in random.permutation(len(defects))]
    n_odd = round(case["odd"] * case["n_train"])
    n_good = case["n_train"] - n_odd
    train = [*good[:n_good], *(replace(one, label=0) for one in defects[:n_odd])]
    return train, good[n_good:], defects[n_odd:][: config.max_defects]


def fit(case: dict[str, Any], config: Config, rate: float, train: list[Any]) -> Any:
    """Fit the detector of a case; too few images for the rate are no error here."""
    chosen = config.detectors[case["detector"]]
    options = {"random_state": case["seed"], "calibration": case["calibration"]}
    detector = DETECTORS[chosen.detector](false_alarm_rate=rate, **options, **chosen.parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return detector.fit(train)


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return means over draws and categories; ``power`` is the share found of what could be."""
    columns = ["false_alarm_rate", "found", "found_at_rate", "image_auroc"]
    keys = ["detector", "calibration", "n_train", "odd", "rate"]
    draws = table.groupby(keys, sort=False)
    found = draws[columns].mean()
    # Draws of one category are of the same images: the error is that over draws, of the means.
    by_draw = table.groupby([*keys, "seed"], sort=False)["false_alarm_rate"].mean()
    found.insert(1, "standard_error", by_draw.groupby(keys, sort=False).sem())
    found["power"] = found["found"] / found["found_at_rate"]
    found["categories"] = draws["category"].nunique()
    found["draws"] = draws["seed"].nunique()
    return {"table": found}
