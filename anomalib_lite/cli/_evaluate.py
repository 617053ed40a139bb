"""The command evaluate: test a model on labelled images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from anomalib_lite.cli._model import add_model_arguments, load_model
from anomalib_lite.cli._options import PUBLISHED_LAYOUTS

_ANSWERS = {"yes": True, "no": False, None: None}


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("evaluate", help="test a model on labelled images")
    parser.set_defaults(run=run)
    add_model_arguments(parser)
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="a published data set, or one category of it; or a directory with one subdirectory of "
        "normal images that the model was not fitted on, and others of anomalous images",
    )
    parser.add_argument(
        "--layout",
        choices=("auto", "folder", *PUBLISHED_LAYOUTS),
        default="auto",
        help="layout of the data set; mvtec is MVTec AD, AD 2 and LOCO AD (default: auto, by the "
        "directories that are there)",
    )
    parser.add_argument(
        "--normal", metavar="DIR", help="folder layout: normal images (default: good)"
    )
    parser.add_argument(
        "--anomalous",
        nargs="+",
        metavar="DIR",
        help="folder layout: anomalous images (default: all others)",
    )
    _add_mask_arguments(parser)
    parser.add_argument(
        "--fpr-limit",
        type=float,
        default=0.3,
        metavar="VALUE",
        help="false-positive rate up to which AUPRO integrates (default: 0.3)",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="keep no heatmaps: pixel metrics within about this memory, such as 512MB, with bounds "
        "of their error (default: all heatmaps, exact metrics)",
    )
    parser.add_argument("--no-pixel-metrics", action="store_true", help="only image metrics")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write the report as CSV")


def _add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--masks",
        metavar="DIR",
        help="folder layout: ground truth (default: ground_truth or masks, if there is one)",
    )
    parser.add_argument(
        "--inverted-masks",
        choices=("yes", "no"),
        help="whether masks are black where a part is anomalous (default: no, but a mask that "
        "marks nearly all of its image is an error)",
    )
    parser.add_argument(
        "--ignore-255",
        choices=("yes", "no"),
        help="whether 255 belongs to neither class in masks (default: yes beside class numbers "
        "that cover more pixels, and an error beside others)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Test the model, print the report, and write it."""
    from anomalib_lite._files import check_file

    dataset = _open(arguments)
    files = [check_file(Path(f)) for f in (arguments.json, arguments.csv) if f is not None]

    from anomalib_lite.datasets import Folder
    from anomalib_lite.evaluation import evaluate

    # Metrics without the unreadable images would be metrics of another data set.
    detector = load_model(arguments)._with_options(on_error="raise", verbose=0)
    with_masks = not arguments.no_pixel_metrics and dataset.has_masks
    if with_masks and hasattr(detector, "maps"):
        detector.maps = "always"  # pixel metrics need heatmaps of all images
    report = evaluate(
        detector,
        # Other layouts say what is for training, so evaluate can tell if test images are in there.
        dataset.train + dataset.test if isinstance(dataset, Folder) else dataset,
        fpr_limit=arguments.fpr_limit,
        pixel_metrics=not arguments.no_pixel_metrics,
        inverted_masks=_ANSWERS[arguments.inverted_masks],
        ignore_255=_ANSWERS[arguments.ignore_255],
        memory_budget=arguments.memory_budget,
        progress=True,
    )
    report = replace(report, dataset=dataset.name)
    if arguments.json is not None:
        report.to_json(arguments.json)
    if arguments.csv is not None:
        report.to_csv(arguments.csv)
    masks = "masks" if dataset.has_masks else "no masks"
    print(f"{arguments.dataset}: layout {dataset.layout} ({type(dataset).__name__}), {masks}")
    print(report)
    for file in files:
        print(f"written to {file}")


def _open(arguments: argparse.Namespace) -> Any:
    """Open the data set; no image is decoded."""
    from anomalib_lite.datasets import open_dataset
    from anomalib_lite.errors import MissingPathError

    root = Path(arguments.dataset)
    if not root.is_dir():
        raise MissingPathError(f"evaluate: {root} is not an existing directory.")
    return open_dataset(
        root,
        arguments.layout,
        normal=arguments.normal or None,
        anomalous=arguments.anomalous or None,
        masks=arguments.masks or None,
        test_size=0,  # the model is fitted already, so no image is kept for training
        where="evaluate",
    )
