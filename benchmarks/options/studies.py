"""What is measured: for each study, options by the name that they have in the tables."""

from __future__ import annotations

from typing import Any

from anomalib_lite import MahalanobisVFM, PaDiM, PatchCore, SubspaceAD

DETECTORS = {
    "PatchCore": PatchCore,
    "PaDiM": PaDiM,
    "MahalanobisVFM": MahalanobisVFM,
    "SubspaceAD": SubspaceAD,
}


def make(option: dict[str, Any], **more: Any) -> Any:
    """Return the detector that an option describes; without ``detector`` it is a PatchCore."""
    parameters = {**option, **more}
    kind = DETECTORS[parameters.pop("detector", "PatchCore")]
    preset = parameters.pop("preset", None)
    return kind(**parameters) if preset is None else kind.preset(preset, **parameters)


# The default of version 0.1: what newer ones are compared with.
BEFORE: dict[str, Any] = {"image_size": 256, "coreset_ratio": 0.1}

# Points {image size x patches kept}; the bank is a share of all patches, or a number.
FRONT: dict[str, dict[str, Any]] = {
    f"{size}, {bank}": {"image_size": size} | kept
    for size in (256, 320, 384, 448)
    for bank, kept in (
        ("10 %", {"coreset_ratio": 0.1}),
        ("1 %", {"coreset_ratio": 0.01}),
        ("2,000", {"coreset_size": 2000}),
        ("5,000", {"coreset_size": 5000}),
        ("10,000", {"coreset_size": 10000}),
    )
    if bank != "10 %" or size == 256
} | {"auto, 5,000": {}}
# Each option differs from the default in what is given here.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "before: 256 pixels, 10 %": BEFORE,
    "image_size=384": {"image_size": 384},
    "image_score='smoothed'": {"image_score": "smoothed"},
    "image_score='top1%'": {"image_score": "top1%"},
    "image_score='top0.1% pixels'": {"image_score": "top0.1% pixels"},
    "image_score='structure'": {"image_score": "structure"},
    "image_score='reweighted'": {"image_score": "reweighted"},
    "n_neighbors=3": {"n_neighbors": 3},
    "coreset='random'": {"coreset": "random"},
    "coreset='kmeans'": {"coreset": "kmeans"},
    "position_window=2": {"position_window": 2},
    "normalize=True": {"normalize": True},
    "whiten=True": {"whiten": True},
    "feature_dim=64, pca": {"feature_dim": 64, "projection": "pca"},
    "feature_dim=64, gaussian_random": {"feature_dim": 64, "projection": "gaussian_random"},
    "fusion='single'": {"fusion": "single"},
    "fusion='nearest'": {"fusion": "nearest"},
    "fusion='weighted' (2, 1)": {"fusion": "weighted", "layer_weights": (2.0, 1.0)},
    "fusion='adaptive'": {"fusion": "adaptive"},
    "fusion='per_layer'": {"fusion": "per_layer"},
    "backbone='efficientnet_lite2'": {"backbone": "efficientnet_lite2"},
    "augment='flips'": {"augment": "flips"},
    "foreground=True": {"foreground": True},
    "PaDiM": {"detector": "PaDiM", "image_size": (256, 256)},
    "PaDiM, (320, 320)": {"detector": "PaDiM", "image_size": (320, 320)},
    "MahalanobisVFM": {"detector": "MahalanobisVFM"},
    "MahalanobisVFM, auto": {"detector": "MahalanobisVFM", "image_size": "auto"},
    "SubspaceAD": {"detector": "SubspaceAD"},
    "SubspaceAD, auto": {"detector": "SubspaceAD", "image_size": "auto"},
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "before: 256 pixels, 10 %": BEFORE,
    "fast": {"preset": "fast"},
    "accurate": {"preset": "accurate"},
}
STUDIES = {"front": FRONT, "options": OPTIONS, "presets": PRESETS}
