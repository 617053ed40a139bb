"""The command calibrate: another threshold for a model that is fitted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from anomalib_lite.cli._fit import add_groups, read_groups
from anomalib_lite.cli._messages import print_skipped
from anomalib_lite.cli._model import add_machine_arguments, load_model
from anomalib_lite.cli._parser import UsageError, add_recursive


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "calibrate", help="set the threshold of a model anew, without a new fit"
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="file that fit wrote")
    parser.add_argument(
        "images",
        nargs="?",
        metavar="GOOD",
        help="directory of good images that the model was not fitted on (default: the scores of "
        "the images that fit held back)",
    )
    add_recursive(parser)
    parser.add_argument(
        "--false-alarm-rate",
        type=float,
        metavar="RATE",
        help="share of good images that may be called anomalous (default: the model's)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="C",
        help="probability that this very threshold keeps the rate, such as 0.95 (default: the "
        "model's)",
    )
    add_groups(parser, "of GOOD")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="file to write (default: MODEL itself)"
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="stop at an unreadable image, or list it and go on (default: raise)",
    )
    add_machine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Set the threshold, write the model, and say what the threshold rests on."""
    import numpy as np
    from safetensors import safe_open

    from anomalib_lite._files import check_file
    from anomalib_lite.calibration import describe_threshold
    from anomalib_lite.detectors.base import BaseDetector
    from anomalib_lite.images.grouping import group_ids

    given = arguments.images, arguments.false_alarm_rate, arguments.confidence
    if arguments.images is None and arguments.groups is not None:
        raise UsageError("calibrate: --groups are those of good images. Give their directory too")
    if all(value is None for value in given):
        raise UsageError(
            "calibrate: give good images, --false-alarm-rate or --confidence: there is nothing to "
            "change"
        )
    detector = load_model(arguments)
    if not isinstance(detector, BaseDetector):
        raise UsageError(
            f"calibrate: {arguments.model} holds a {type(detector).__name__}, whose models are "
            "calibrated together. Fit again with another --false-alarm-rate"
        )
    output = check_file(Path(arguments.output or arguments.model))
    before, rate = detector.threshold_, arguments.false_alarm_rate
    rate = detector.false_alarm_rate if rate is None else rate
    confidence = arguments.confidence
    confidence = detector.false_alarm_confidence if confidence is None else confidence
    detector._check_calibration(rate, confidence)
    if arguments.images is None:
        detector.set_false_alarm_rate(rate, confidence=confidence)
    else:
        images = _good_images(arguments, detector.max_pixels)
        rule = arguments.groups
        groups = None if rule is None else read_groups(images.items, rule)
        ids = group_ids(images, groups, arguments.on_error)
        options = {"on_error": arguments.on_error, "verbose": 1}
        found = detector._with_options(**options).detect(images, maps=np.max)
        print_skipped([reason for _, reason in found.skipped])
        detector._calibrate_on(found, ids, rate, confidence)
    with safe_open(arguments.model, "numpy") as file:
        with_weights = any(name.startswith("backbone.") for name in file.keys())  # noqa: SIM118
        fitted = json.loads(file.metadata()["anomalib_lite"])["parameters"]
    # Options of this machine are for this run; the file keeps those of the fit.
    of_fit = {n: fitted[n] for n in ("weights", "device", "batch_size") if n in fitted}
    detector._with_options(**of_fit).save(output, include_backbone=with_weights)
    rests_on = describe_threshold(
        detector.calibration_scores_, rate, confidence, detector.calibration_groups_
    )
    print(f"threshold     {detector.threshold_:.6g}, before {before:.6g}: {rests_on}")
    print(f"written to    {output} ({output.stat().st_size / 1e6:.1f} MB)")


def _good_images(arguments: argparse.Namespace, max_pixels: int) -> Any:
    from anomalib_lite.images import ImageSource

    return ImageSource(
        arguments.images,
        max_pixels=max_pixels,
        where="calibrate",
        recursive=arguments.recursive,
    )
