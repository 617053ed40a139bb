"""Arguments of the commands that read a model file, and how they load it."""

from __future__ import annotations

import argparse
from typing import Any

from anomalib_lite.cli._parser import UsageError


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Add the model file and the options that may differ from those of the fit."""
    command.add_argument("model", metavar="MODEL", help="file that fit wrote")
    level = command.add_mutually_exclusive_group()
    level.add_argument(
        "--threshold", type=float, metavar="VALUE", help="threshold to use (default: the model's)"
    )
    level.add_argument(
        "--false-alarm-rate",
        type=float,
        metavar="RATE",
        help="threshold for this share of good images (default: the model's; single detectors)",
    )
    add_machine_arguments(command)


def add_machine_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options that depend on the machine."""
    command.add_argument(
        "--weights", metavar="FILE", help="weights file of the backbone on this machine"
    )
    command.add_argument("--device", metavar="VALUE", help="device to run on (default: as fitted)")
    command.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="number of images in a batch (default: as fitted)",
    )


def load_model(arguments: argparse.Namespace) -> Any:
    """Load the detector, with the options given instead of its own."""
    from anomalib_lite import load
    from anomalib_lite._validation import check_int, check_number
    from anomalib_lite.detectors.base import BaseDetector

    where = arguments.command
    detector = load(arguments.model, weights=arguments.weights, device=arguments.device)
    weights = [one.weights for one in (detector, *detector._members().values())]
    if arguments.weights is not None and arguments.weights not in weights:
        raise UsageError(
            f"{where}: --weights is for a cascade with a network from a weights file, and "
            f"{arguments.model} has none. Leave it out, or fit with --include-backbone if the "
            "networks are not to be had here"
        )
    if arguments.batch_size is not None:
        check_int("batch_size", arguments.batch_size, where, low=1)
        detector = detector._with_options(batch_size=arguments.batch_size)
    rate = getattr(arguments, "false_alarm_rate", None)
    if rate is not None and not isinstance(detector, BaseDetector):
        raise UsageError(
            f"{where}: --false-alarm-rate is for a single detector, {arguments.model} holds a "
            f"{type(detector).__name__}, whose models share the rate. Leave it out, or fit again"
        )
    if arguments.command != "calibrate" and rate is not None:
        detector.set_false_alarm_rate(rate)
    if getattr(arguments, "threshold", None) is not None:
        allowed = detector._threshold_range
        detector.threshold_ = check_number("threshold", arguments.threshold, where, allowed)
    return detector
