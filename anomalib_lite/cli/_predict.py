"""The command predict: score images, and write a table and heatmaps."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_lite.cli._messages import print_skipped
from anomalib_lite.cli._model import add_model_arguments, load_model
from anomalib_lite.cli._parser import UsageError, add_recursive


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("predict", help="score images; write a table and heatmaps")
    parser.set_defaults(run=run)
    add_model_arguments(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="files and directories (the images directly inside a directory are used)",
    )
    add_recursive(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="directory for scores.csv and overlays"
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="stop at an unreadable image, or list it and go on (default: raise)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where an earlier run into this directory was stopped",
    )
    parser.add_argument("--no-overlays", action="store_true", help="write only the table")
    parser.add_argument(
        "--maps",
        choices=("escalated", "always"),
        help="GatedCascade: pictures of the images that its heatmap model decides, or of all "
        "(default: as fitted, so escalated)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Score the images, and print how many were called what."""
    from anomalib_lite._files import make_directory
    from anomalib_lite.images import ImageSource

    if arguments.maps and arguments.no_overlays:
        raise UsageError(
            "predict: --maps says which images get a picture, and --no-overlays that none does. "
            "Leave one of them out"
        )
    files = _image_files(arguments.images, arguments.recursive)
    output = make_directory(Path(arguments.output))

    from anomalib_lite.cli._predictions import predict_to

    detector = load_model(arguments)
    if arguments.maps and not hasattr(detector, "maps"):
        raise UsageError(
            f"predict: --maps is for a GatedCascade, {arguments.model} holds a "
            f"{type(detector).__name__}, which makes heatmaps of all images. Leave it out"
        )
    source = ImageSource(files, max_pixels=detector.max_pixels, where="predict")
    maps: str | bool = arguments.maps or not arguments.no_overlays
    start = time.perf_counter()
    skip, resume = arguments.on_error == "skip", arguments.resume
    summary = predict_to(output, detector, source, maps=maps, skip=skip, resume=resume)
    seconds = time.perf_counter() - start
    print_skipped(summary.skipped)
    labels = [label for label in ("normal", "anomalous", "skipped") if summary.counts[label]]
    counts = ", ".join(f"{summary.counts[label]:,} {label}" for label in labels)
    places = [output / "scores.csv"]
    if maps:
        places.append(output / "overlays")
    if summary.before:
        print(f"{summary.before:,} of {len(source):,} images had their row already")
    print(
        f"{len(source) - summary.before:,} images in {seconds:.1f} s: {counts or 'nothing to do'} "
        f"at threshold {detector.threshold_:.6g}; see {' and '.join(map(str, places))}"
    )
    if summary.routes:
        print(_decided_by(summary.routes, detector._routes))


def _image_files(given: Sequence[str], recursive: bool) -> list[Any]:
    """List the images of directories and files, each once, in the order given."""
    from anomalib_lite.images import ImageSource

    sources = [ImageSource(name, where="predict", recursive=recursive) for name in given]
    files = [item for source in sources for item in source.items]
    return list({os.path.abspath(file): file for file in files}.values())  # noqa: PTH100


def _decided_by(routes: Counter[str], possible: Sequence[str]) -> str:
    """Say how many images each model of a cascade decided, or show each product of a router."""
    if "gate_normal" not in possible:
        return "products: " + ", ".join(f"{routes[r]:,} {r}" for r in possible if routes[r])
    normal, anomalous, called = (routes[r] for r in ("gate_normal", "gate_anomalous", "detector"))
    return (
        f"decided by the gate: {normal + anomalous:,} ({normal:,} normal, {anomalous:,} "
        f"anomalous), by the heatmap model: {called:,}; heatmap_call_rate "
        f"{called / routes.total():.3g}"
    )
