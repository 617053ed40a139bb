"""What may be written behind ``anomalib-lite``: commands, options, defaults, help."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from anomalib_lite._version import __version__

PROGRAM = "anomalib-lite"


class UsageError(Exception):
    """Arguments that the parser does not understand."""


class Parser(argparse.ArgumentParser):
    """A parser that leaves exit and output to its caller."""

    def error(self, message: str) -> NoReturn:
        """Raise in place of printing the usage and leaving."""
        raise UsageError(f"{message}. See: {self.prog} --help")


def _image_size(text: str) -> int | tuple[int, int]:
    """``"256"`` or ``"256x384"``, height first."""
    if not re.fullmatch(r"\d+(x\d+)?", text.lower()):
        raise argparse.ArgumentTypeError(f"must be a whole number or HxW, got {text!r}")
    sides = [int(side) for side in text.lower().split("x")]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _layers(text: str) -> list[str | int]:
    """``"blocks.2,blocks.4"`` or ``"1,3"``."""
    return [int(part) if re.fullmatch(r"-?\d+", part) else part for part in text.split(",")]


def _name_or_number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


# Name as in PatchCore, type, default (also PatchCore's: a test compares them), help.
FIT_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "backbone": (str, "efficientnet_lite0", "embedded network, or any timm name"),
    "weights": (str, None, "weights file for a timm name (default: from the hub)"),
    "layers": (_layers, None, "names or positions, with commas between (default: chosen)"),
    "image_size": (_image_size, 256, "shorter side in pixels, or HxW"),
    "coreset_ratio": (float, 0.1, "PatchCore: share of patches kept, in (0, 1]"),
    "n_neighbors": (int, 1, "PatchCore: nearest patches that a score averages over"),
    "image_score": (str, "max", "max, top1%% or smoothed (PaDiM's default); PatchCore: reweighted"),
    "index": (str, "flat", "PatchCore: flat (exact), or a FAISS index-factory string"),
    "smoothing": (float, 4.0, "of heatmaps, in pixels of the image size"),
    "false_alarm_rate": (float, 0.01, "of future normal images, in (0, 1)"),
    "calibration": (str, "split", "split or leave_one_out"),
    "device": (str, "auto", "auto, cpu, cuda or mps"),
    "dtype": (str, "auto", "auto, float32, bfloat16 or float16"),
    "engine": (str, "auto", "auto, torch, openvino or onnxruntime"),
    "batch_size": (int, 32, "images at a time"),
    "memory_budget": (str, None, "most memory of fit, such as 2GB (default: all that it takes)"),
    "n_jobs": (int, None, "processes that share out the images (default: one)"),
    "on_error": (str, "raise", "what to do about an unreadable image: raise or skip"),
    "max_pixels": (int, 100_000_000, "larger images are refused"),
    "random_state": (int, 0, "seed"),
}
# The same of other detectors, where PatchCore has none such.
PADIM_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "n_components": (int, None, "PaDiM: length of an embedding (default: 100, or 550 of many)"),
    "reduction": (str, "random", "PaDiM: random or semi_orthogonal"),
    "ridge": (float, 0.01, "PaDiM: added to each covariance"),
}
MAHALANOBIS_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "shrinkage": (_name_or_number, "ledoit_wolf", "MahalanobisVFM: ledoit_wolf, oas or a number"),
    "global_weight": (float, 0.5, "MahalanobisVFM: share of the whole image, 0 to 1"),
    "adapt": (str, None, "MahalanobisVFM: lora, to adapt a vision transformer (default: not)"),
    "rank": (int, 16, "MahalanobisVFM: of the adaptation"),
    "epochs": (int, 10, "MahalanobisVFM: of the adaptation, at most"),
}
CASCADE_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "gate": (str, "efficientnet_lite0", "GatedCascade: network of the gate"),
    "gate_weights": (str, None, "GatedCascade: weights file of a gate with a timm name"),
    "gate_image_size": (_image_size, 160, "GatedCascade: as --image-size, of the gate"),
    "gate_training": (str, "head", "GatedCascade: head, or finetune its network as well"),
    "gate_epochs": (int, 20, "GatedCascade: of finetune"),
    "max_missed": (float, 0.01, "GatedCascade: share of anomalous images that the gate may lose"),
    "t_low": (float, None, "GatedCascade: the gate says normal below (default: chosen)"),
    "t_high": (float, None, "GatedCascade: the gate says anomalous above (default: chosen)"),
}
# The names of these in GatedCascade, where its heatmap model has an option that is called so.
CASCADE_PARAMETERS = {
    "gate_weights": "weights",
    "gate_image_size": "image_size",
    "gate_training": "training",
    "gate_epochs": "epochs",
}
ALL_FIT_OPTIONS = FIT_OPTIONS | PADIM_OPTIONS | MAHALANOBIS_OPTIONS | CASCADE_OPTIONS
HEATMAP_MODELS = {"patchcore": "PatchCore", "padim": "PaDiM", "mahalanobis_vfm": "MahalanobisVFM"}
DETECTORS = HEATMAP_MODELS | {"gated_cascade": "GatedCascade"}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog=PROGRAM,
        description="Visual anomaly detection, trained on good images only.",
        epilog="Try it without images of your own: pip install 'anomalib-lite[demo]', then "
        "anomalib-lite demo.",
    )
    version = f"{PROGRAM} {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    _add_fit(commands)
    _add_predict(commands)
    _add_evaluate(commands)
    _add_demo(commands)
    return parser


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser("fit", help="learn from normal images and write a model file")
    fit.add_argument("images", metavar="DIR", help="directory of normal images")
    fit.add_argument("-o", "--output", metavar="FILE", required=True, help="model to write")
    fit.add_argument(
        "--detector",
        choices=tuple(DETECTORS),
        default="patchcore",
        help="padim: parts that always lie in the same place (give --image-size HxW); "
        "mahalanobis_vfm: for a foundation model (give --backbone); gated_cascade: a small network "
        "decides about clear images, a heatmap model about the rest; default: patchcore",
    )
    fit.add_argument(
        "--heatmap-model",
        choices=tuple(HEATMAP_MODELS),
        help="GatedCascade: to which the options without 'gate' belong (default: patchcore)",
    )
    fit.add_argument(
        "--anomalous",
        nargs="+",
        metavar="DIR",
        help="GatedCascade: directories of anomalous images (default: they are made up)",
    )
    for name, (kind, default, text) in ALL_FIT_OPTIONS.items():
        fit.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,  # what was not said is for the detector to choose
            metavar="VALUE",
            help=text if default is None else f"{text} (default: {default})",
        )
    fit.add_argument(
        "--include-backbone", action="store_true", help="put the network's weights into the file"
    )


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="score images; write a table and heatmaps")
    _add_model(predict)
    predict.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="files and directories (of which the images directly inside are taken)",
    )
    predict.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="for scores.csv and overlays"
    )
    predict.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="stop at an unreadable image, or list it and go on (default: raise)",
    )
    predict.add_argument("--no-overlays", action="store_true", help="write the table alone")
    predict.add_argument(
        "--maps",
        choices=("escalated", "always"),
        help="of a GatedCascade: pictures of the images that its heatmap model decides, or of all "
        "(default: as fitted, so escalated)",
    )


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="test a model on labelled images")
    _add_model(evaluate)
    evaluate.add_argument(
        "dataset",
        metavar="DATASET",
        help="one category in the layout of MVTec AD or MVTec AD 2, or a directory with one of "
        "normal images that the model was not fitted on and others of anomalous ones",
    )
    evaluate.add_argument("--layout", choices=("auto", "mvtec", "folder"), default="auto")
    evaluate.add_argument("--normal", metavar="DIR", help="folder layout: normal (default: good)")
    evaluate.add_argument(
        "--anomalous", nargs="+", metavar="DIR", help="folder layout (default: all others)"
    )
    evaluate.add_argument(
        "--masks",
        metavar="DIR",
        help="folder layout: ground truth (default: ground_truth or masks, where there is one)",
    )
    evaluate.add_argument(
        "--fpr-limit", type=float, default=0.3, metavar="VALUE", help="of AUPRO (default: 0.3)"
    )
    evaluate.add_argument("--no-pixel-metrics", action="store_true", help="image metrics alone")
    evaluate.add_argument("--json", metavar="FILE", help="write the report as JSON")
    evaluate.add_argument("--csv", metavar="FILE", help="write the report as CSV")


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo", help="fit and test on photographs of solar cells, and write a page about it"
    )
    demo.add_argument(
        "-o", "--output", metavar="DIR", default="demo-output", help="(default: demo-output)"
    )
    for name, default, there in (("--n-train", 200, 392), ("--n-test", 300, 509)):
        text = f"photographs, of {there} (default: {default})"
        demo.add_argument(name, type=int, default=default, metavar="N", help=text)
    demo.add_argument(
        "--false-alarm-rate", type=float, default=0.05, metavar="VALUE", help="(default: 0.05)"
    )


def _add_model(command: Any) -> None:
    command.add_argument("model", metavar="MODEL", help="file that fit wrote")
    command.add_argument(
        "--threshold", type=float, metavar="VALUE", help="instead of the model's own"
    )
    command.add_argument("--weights", metavar="FILE", help="where the backbone's weights lie here")
    command.add_argument("--device", metavar="VALUE", help="where to run here (default: as fitted)")
    command.add_argument("--batch-size", type=int, metavar="N", help="(default: as fitted)")
