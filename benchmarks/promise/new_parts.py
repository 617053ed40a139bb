"""How many new parts are stopped by mistake, where each part was photographed several times?"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from pydantic import Field

from anomalib_lite import MahalanobisVFM, PaDiM, PatchCore, SubspaceAD
from anomalib_lite.errors import CalibrationWarning
from anomalib_lite.images.grouping import groups_of_files
from anomalib_lite.studies import StudyConfig, StudyModel, open_category

COLUMNS = (
    *("detector", "groups", "category", "seed", "false_alarm_rate", "recall"),
    *("recall_at_rate", "parts", "new_parts", "groups_held_back", "images_held_back", "timestamp"),
)
DETECTORS = {
    "PatchCore": PatchCore,
    "PaDiM": PaDiM,
    "MahalanobisVFM": MahalanobisVFM,
    "SubspaceAD": SubspaceAD,
}


class DetectorConfig(StudyModel):
    """One detector and its parameters."""

    detector: str = "PatchCore"
    parameters: dict[str, Any] = Field(default_factory=dict)


class Config(StudyConfig):
    """Keys of the YAML file; README.md says what they mean."""

    detectors: dict[str, DetectorConfig]
    groups: list[str]
    parts: str
    false_alarm_rate: float = Field(default=0.05, gt=0, lt=1)
    share_to_fit: float = Field(default=0.6, gt=0, lt=1)
    max_defects: int = 200


def measure(config: Config, run: Any) -> Any:
    """Yield the false alarms on photographs of parts that no training image shows."""
    for case in run.cases(
        {"detector": name, "groups": groups, "category": category, "seed": seed}
        for seed in run.seeds
        for category in run.categories
        for name in config.detectors
        for groups in config.groups
    ):
        category, seed = case["category"], case["seed"]
        dataset = open_category(category, run.data_root)
        samples = [*dataset.train, *dataset.test]
        run.check_images(category, samples)
        good = [sample for sample in samples if not sample.label]
        defects = [sample for sample in samples if sample.label]
        random = np.random.RandomState(seed)
        defects = [defects[i] for i in random.permutation(len(defects))[: config.max_defects]]
        parts = np.array(groups_of_files([sample.path for sample in good], config.parts))
        distinct = random.permutation(np.unique(parts))
        known = distinct[: round(config.share_to_fit * len(distinct))]
        old = np.flatnonzero(np.isin(parts, known))
        new = np.flatnonzero(~np.isin(parts, known))
        given: Any = {"name": parts[old].tolist(), "auto": "auto", "none": None}[case["groups"]]
        chosen = config.detectors[case["detector"]]
        detector = DETECTORS[chosen.detector](
            false_alarm_rate=config.false_alarm_rate, random_state=seed, **chosen.parameters
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            detector.fit([good[i] for i in old], groups=given)
        scores = detector.score([good[i] for i in new])
        found = detector.score(defects)
        # The rate is that of an image of a new part, whose photographs share one vote.
        votes = 1 / np.array([np.sum(parts[new] == part) for part in parts[new]])
        level = np.quantile(scores, 1 - config.false_alarm_rate)
        yield {
            "false_alarm_rate": float(np.average(scores > detector.threshold_, weights=votes)),
            "recall": float(np.mean(found > detector.threshold_)),
            "recall_at_rate": float(np.mean(found > level)),
            "parts": len(known),
            "new_parts": len(distinct) - len(known),
            "groups_held_back": len(np.unique(detector.calibration_groups_)),
            "images_held_back": len(detector.calibration_scores_),
        }


def tables(table: Any, config: Config) -> dict[str, Any]:
    """Return means over draws with their standard errors, a row for each detector and grouping."""
    columns = ["false_alarm_rate", "recall", "recall_at_rate"]
    draws = table.groupby(["detector", "groups"], sort=False)
    found = draws[columns].mean()
    found["standard_error"] = draws["false_alarm_rate"].sem()
    found["draws"] = draws["seed"].nunique()
    return {"table": found}
