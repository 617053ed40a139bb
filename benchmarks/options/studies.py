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
}
STUDIES = {"front": FRONT}
