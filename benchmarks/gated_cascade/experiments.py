"""The table of experiments, and models made from its rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib_lite import GatedCascade, PatchCore
from anomalib_lite.backbones import EMBEDDED, Backbone
from anomalib_lite.errors import AnomalibLiteError

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
    """Names of the networks of an experiment whose weights do not come with the package."""
    row = EXPERIMENTS[name]
    gate = row.get("gate", "efficientnet_lite0")
    found = [gate if isinstance(gate, str) else gate["backbone"], row["heatmaps"]["backbone"]]
    return [backbone for backbone in dict.fromkeys(found) if backbone not in EMBEDDED]


def not_at_hand(names: list[str], weights: Mapping[str, Path], *, hub: bool) -> dict[str, str]:
    """Experiments that cannot run, and why: weights that are no file, nor to be had."""
    reasons: dict[str, str] = {}
    for backbone in dict.fromkeys(b for name in names for b in backbones(name)):
        if backbone in weights:
            Backbone(backbone, weights=weights[backbone], device="cpu")  # a bad file ends the run
        elif not hub:
            reasons[backbone] = f"no weights of {backbone}: --weights {backbone}=FILE, or --hub"
        else:
            try:
                Backbone(backbone, device="cpu")
            except AnomalibLiteError as error:
                reasons[backbone] = str(error)
    missing = {name: [reasons[b] for b in backbones(name) if b in reasons] for name in names}
    return {name: "; ".join(why) for name, why in missing.items() if why}


def build(name: str, seed: int, options: Mapping[str, Any]) -> Any:
    """An unfitted PatchCore or GatedCascade."""
    row = EXPERIMENTS[name]
    shared = {
        "engine": options["engine"],
        "random_state": seed,
        "false_alarm_rate": options["false_alarm_rate"],
    }

    def patchcore(parameters: dict[str, Any]) -> PatchCore:
        size = parameters["image_size"] // options["shrink"]
        files = _weights(parameters["backbone"], options)
        return PatchCore(**(parameters | shared | files | {"image_size": size}))

    if "gate" not in row:
        return patchcore(row["heatmaps"])
    gate, more = row["gate"], {"max_missed": options["max_missed"]} | row.get("parameters", {})
    more["image_size"] = more.get("image_size", 160) // options["shrink"]
    if more.get("training") == "finetune" and options["shrink"] > 1:
        more["epochs"] = 2
    if isinstance(gate, str):
        more |= _weights(gate, options)
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


def _weights(backbone: str, options: Mapping[str, Any]) -> dict[str, Any]:
    file = options["weights"].get(backbone)
    return {} if file is None else {"weights": file}
