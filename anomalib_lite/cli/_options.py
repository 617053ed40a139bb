"""Options of the command fit: for each parameter of a detector its type, default and help."""

from __future__ import annotations

import argparse
import re
from typing import Any


def _image_size(text: str) -> int | tuple[int, int] | str:
    """Parse ``"auto"``, ``"256"`` or ``"256x384"``, height first."""
    if text.lower() == "auto":
        return "auto"
    if not re.fullmatch(r"\d+(x\d+)?", text.lower()):
        raise argparse.ArgumentTypeError(f"must be a whole number, HxW or auto, got {text!r}")
    sides = [int(side) for side in text.lower().split("x")]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _layers(text: str) -> list[str | int]:
    """Parse ``"blocks.2,blocks.4"`` or ``"1,3"``."""
    return [int(name) if re.fullmatch(r"-?\d+", name) else name for name in text.split(",")]


def _number_or_share(text: str) -> int | float:
    """Parse ``"100"`` to an int and ``"0.99"`` to a float."""
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _names(text: str) -> str | list[str]:
    """Parse ``"flips"`` or ``"flips,brightness"``."""
    return text.split(",") if "," in text else text


def _numbers(text: str) -> list[float]:
    """Parse ``"1,0.5"``."""
    return [float(number) for number in text.split(",")]


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"must be yes or no, got {text!r}")
    return text.lower() == "yes"


def _name_or_number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


# A test compares these with the layouts of open_dataset, which would import numpy here.
PUBLISHED_LAYOUTS = (
    *("mvtec", "visa", "btad", "real_iad", "kolektor_sdd", "kolektor_sdd_2"),
    *("magnetic_tile", "neu_det"),
)

# Type, default and help. A test compares the defaults with those of the detectors.
Option = tuple[Any, Any, str]

FIT_OPTIONS: dict[str, Option] = {
    "backbone": (
        str,
        "efficientnet_lite0",
        "short name (see: anomalib-lite backbones), or any timm name",
    ),
    "weights": (
        str,
        None,
        "weights file for a name (default: installed, ANOMALIB_LITE_WEIGHTS, or the hub)",
    ),
    "layers": (_layers, None, "names or positions, separated by commas (default: chosen)"),
    "fusion": (
        str,
        "concat",
        "concat, single, mean, nearest (PaDiM's default), weighted, adaptive or per_layer; "
        "MahalanobisVFM: summary (its default), weighted, adaptive or per_layer",
    ),
    "layer_weights": (_numbers, None, "for weighted: a number for each layer, with commas"),
    "feature_dim": (int, None, "length that embeddings are shortened to (default: as they are)"),
    "projection": (str, "pca", "how they are shortened: pca or gaussian_random"),
    "whiten": (_yes_or_no, False, "yes makes all directions of the features count alike"),
    "whiten_shrinkage": (float, 0.07, "shrinkage of the covariance of whiten, 0 to 1"),
    "normalize": (
        _yes_or_no,
        False,
        "yes divides each embedding by its length (MahalanobisVFM's default: yes)",
    ),
    "image_size": (
        _image_size,
        "auto",
        "shorter side in pixels, HxW or auto; all but PatchCore: 256",
    ),
    "tile": (int, None, "PatchCore: side of the tiles of large images (default: no tiles)"),
    "overlap": (int, 0, "PatchCore: pixels that neighbouring tiles share"),
    "augment": (
        _names,
        None,
        "copies of the images to fit on: rotations, flips, brightness, or several with commas "
        "(default: none); not PaDiM",
    ),
    "coreset_size": (int, 5000, "PatchCore: number of patches to keep"),
    "coreset_ratio": (float, None, "PatchCore: share of patches to keep, in (0, 1]"),
    "n_neighbors": (int, 1, "PatchCore: number of nearest patches that a score averages"),
    "image_score": (
        str,
        "max",
        "max, a share such as top1%% (SubspaceAD's default) or 'top1%% pixels', smoothed (PaDiM's "
        "default) or structure; PatchCore: reweighted",
    ),
    "position_window": (
        int,
        None,
        "PatchCore: compare with patches at most so many patches away (default: with all)",
    ),
    "foreground": (_yes_or_no, False, "PatchCore: yes lets the background score 0"),
    "index": (str, "flat", "PatchCore: flat (exact), or a FAISS index-factory string"),
    "smoothing": (float, 4.0, "smoothing of heatmaps, in pixels of the image size"),
    "false_alarm_rate": (float, 0.01, "share of future normal images called anomalous, in (0, 1)"),
    "false_alarm_confidence": (
        float,
        None,
        "probability that this very threshold keeps the rate, such as 0.95 (default: it is kept on "
        "average)",
    ),
    "calibration": (str, "split", "split, cross, leave_one_out, or auto: cross for few images"),
    "device": (str, "auto", "auto, cpu, cuda or mps"),
    "dtype": (str, "auto", "auto, float32, bfloat16 or float16"),
    "engine": (str, "auto", "auto, torch, openvino or onnxruntime"),
    "batch_size": (int, 32, "number of images in a batch"),
    "memory_budget": (str, None, "largest memory of fit, such as 2GB (default: no limit)"),
    "n_jobs": (int, None, "number of processes that share the images (default: one)"),
    "on_error": (str, "raise", "what to do with an unreadable image: raise or skip"),
    "max_pixels": (int, 100_000_000, "largest number of pixels of an image"),
    "random_state": (int, 0, "seed"),
}
PADIM_OPTIONS: dict[str, Option] = {
    "n_components": (
        _number_or_share,
        None,
        "PaDiM: length of an embedding (default: 100, or 550 of many); SubspaceAD: number of "
        "principal components, or share of the variance that they hold (default: 0.99)",
    ),
    "reduction": (str, "random", "PaDiM: random or semi_orthogonal"),
    "ridge": (float, 0.01, "PaDiM: number added to the diagonal of each covariance"),
}
MAHALANOBIS_OPTIONS: dict[str, Option] = {
    "shrinkage": (_name_or_number, "ledoit_wolf", "MahalanobisVFM: ledoit_wolf, oas or a number"),
    "global_weight": (float, 0.5, "MahalanobisVFM: weight of the whole image, 0 to 1"),
    "adapt": (str, None, "MahalanobisVFM: lora adapts a vision transformer (default: none)"),
    "rank": (int, 16, "MahalanobisVFM: rank of the LoRA update"),
    "epochs": (int, 10, "MahalanobisVFM: largest number of LoRA training epochs"),
}
CASCADE_OPTIONS: dict[str, Option] = {
    "gate": (str, "efficientnet_lite0", "GatedCascade: network of the gate"),
    "gate_weights": (str, None, "GatedCascade: weights file for a gate with a timm name"),
    "gate_image_size": (_image_size, 160, "GatedCascade: image size of the gate"),
    "gate_training": (str, "head", "GatedCascade: head, or finetune to train its network as well"),
    "gate_epochs": (int, 20, "GatedCascade: number of epochs of finetune"),
    "max_missed": (float, 0.01, "GatedCascade: share of anomalous images that the gate may miss"),
    "t_low": (float, None, "GatedCascade: the gate says normal below (default: chosen)"),
    "t_high": (float, None, "GatedCascade: the gate says anomalous above (default: chosen)"),
}
# Parameters of GatedCascade whose option has another name, because the heatmap model has an option
# of the parameter's name.
CASCADE_PARAMETERS = {
    "gate_weights": "weights",
    "gate_image_size": "image_size",
    "gate_training": "training",
    "gate_epochs": "epochs",
}
ALL_FIT_OPTIONS = FIT_OPTIONS | PADIM_OPTIONS | MAHALANOBIS_OPTIONS | CASCADE_OPTIONS
HEATMAP_MODELS = {
    "patchcore": "PatchCore",
    "padim": "PaDiM",
    "mahalanobis_vfm": "MahalanobisVFM",
    "subspace_ad": "SubspaceAD",
}
DETECTORS = HEATMAP_MODELS | {"gated_cascade": "GatedCascade"}
