"""The table of experiments, and models made from its rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib_lite import GatedCascade, PatchCore

# Heatmap models: parameters of PatchCore.
LITE0 = {"backbone": "efficientnet_lite0", "image_size": 256, "coreset_ratio": 0.1}
R18 = {"backbone": "resnet18", "image_size": 256, "coreset_ratio": 0.1}
SMALL = {"backbone": "efficientnet_lite0", "image_size": 128, "coreset_ratio": 0.01}

# "heatmaps" is the heatmap model. With "gate" (a backbone, or parameters of a PatchCore) it is a
# cascade, which is compared with the experiment named by "alone": the heatmap model without a gate.
# "labels" gives the gate the labelled anomalies; "parameters" are others of GatedCascade.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "baseline_patchcore": {"heatmaps": LITE0},
    "gate_lite0_patchcore_lite0": {
        "heatmaps": LITE0,
        "alone": "baseline_patchcore",
        "gate": "efficientnet_lite0",
    },
    "gate_lite0_labels_patchcore_lite0": {
        "heatmaps": LITE0,
        "alone": "baseline_patchcore",
        "gate": "efficientnet_lite0",
        "labels": True,
    },
    "gate_lite0_finetuned_patchcore_lite0": {
        "heatmaps": LITE0,
        "alone": "baseline_patchcore",
        "gate": "efficientnet_lite0",
        "labels": True,
        "parameters": {"training": "finetune"},
    },
    "gate_patchcore128_patchcore_lite0": {
        "heatmaps": LITE0,
        "alone": "baseline_patchcore",
        "gate": SMALL,
    },
    "baseline_patchcore_r18": {"heatmaps": R18},
    "gate_effnetb0_patchcore_r18": {
        "heatmaps": R18,
        "alone": "baseline_patchcore_r18",
        "gate": "tf_efficientnet_b0",
    },
    "gate_mnv3_patchcore_r18": {
        "heatmaps": R18,
        "alone": "baseline_patchcore_r18",
        "gate": "mobilenetv3_small_100",
    },
}


def backbones(name: str) -> list[str]:
    """Return the names of the networks of an experiment."""
    row = EXPERIMENTS[name]
    gate = row.get("gate")
    found = [row["heatmaps"]["backbone"]]
    if gate is not None:
        found.append(gate if isinstance(gate, str) else gate["backbone"])
    return list(dict.fromkeys(found))


def build(name: str, seed: int, config: Any, weights: Mapping[str, Path | None]) -> Any:
    """Make an unfitted PatchCore or GatedCascade."""
    row = EXPERIMENTS[name]
    shared = {
        "engine": config.engine,
        "random_state": seed,
        "false_alarm_rate": config.false_alarm_rate,
    }

    def patchcore(parameters: dict[str, Any]) -> PatchCore:
        size = parameters["image_size"] // config.shrink
        more = {"weights": weights[parameters["backbone"]], "n_jobs": config.n_jobs}
        return PatchCore(**(parameters | shared | more | {"image_size": size}))

    if "gate" not in row:
        return patchcore(row["heatmaps"])
    gate, more = row["gate"], {"max_missed": config.max_missed} | row.get("parameters", {})
    more["image_size"] = more.get("image_size", 160) // config.shrink
    if more.get("training") == "finetune" and config.shrink > 1:
        more["epochs"] = 2
    if isinstance(gate, str):
        more["weights"] = weights[gate]
    else:
        gate = patchcore(gate)
    return GatedCascade(gate, patchcore(row["heatmaps"]), **(shared | more))


def fit(model: Any, name: str, splits: Mapping[str, Any], parts: Mapping[Path, str]) -> Any:
    """On normal images, and on labelled anomalies where the experiment has them; a cascade is told
    the part that each image shows.
    """
    row, images = EXPERIMENTS[name], list(splits["train_normal"])
    if "gate" not in row:
        return model.fit(images)
    n_good = len(images)
    if row.get("labels"):
        images += splits["labelled"]
    y = [0] * n_good + [1] * (len(images) - n_good)
    return model.fit(images, y, [parts[s.path] for s in images])
