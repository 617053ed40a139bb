"""The command ``anomalib-lite``: fit, predict, evaluate and a demonstration."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from anomalib_lite.cli._parser import (
    ALL_FIT_OPTIONS,
    CASCADE_PARAMETERS,
    PROGRAM,
    UsageError,
    make_parser,
)

# torch, scikit-learn and all modules that need them are imported inside the commands: it takes
# seconds, and --help, --version and most mistakes need none of it.

__all__ = ["main"]

_WRONG_USE, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of this process.

    Returns
    -------
    int
        0 if all went well, 2 for anything that the user can mend (it is named in one line on
        standard error), 130 after Ctrl-C.

    Examples
    --------
    >>> main(["fit", "no/such/directory", "-o", "model.safetensors"])
    2
    """
    try:
        arguments = make_parser().parse_args(argv)
        with _warnings_in_one_line():
            _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt as interrupt:
        print(" ".join([f"{PROGRAM}: interrupted.", *interrupt.args]), file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if not _is_the_users(error):
            raise
        print(f"{PROGRAM}: error: {_in_options(error)}", file=sys.stderr)
        return _WRONG_USE
    return 0


def _fit(arguments: argparse.Namespace) -> None:
    from anomalib_lite._files import check_file
    from anomalib_lite.cli._fit import describe, make_detector, normal_and_anomalous
    from anomalib_lite.images import ImageSource

    # Before the seconds that torch takes, and the minutes of the fit.
    source = ImageSource(arguments.images, where="fit")
    images, y = normal_and_anomalous(arguments.images, arguments.anomalous or ())
    model = check_file(Path(arguments.output))

    detector = make_detector(arguments)
    start = time.perf_counter()
    with _warnings_in_one_line() as shown:
        detector.fit(images) if y is None else detector.fit(images, y)
    seconds = time.perf_counter() - start
    for part in (detector, *detector._members().values()):
        part.verbose = 0  # or programs that load the model would show bars
    detector.save(model, include_backbone=arguments.include_backbone)
    _list_skipped([reason for _, reason in detector.skipped_])
    n_images = len(source) if y is None else len(y)
    rate_kept = not any("false_alarm_rate=" in message for message in shown)
    for line in describe(detector, n_images, seconds, rate_kept=rate_kept):
        print(line)
    print(f"written to    {model} ({model.stat().st_size / 1e6:.1f} MB)")


def _predict(arguments: argparse.Namespace) -> None:
    from anomalib_lite._files import make_directory
    from anomalib_lite.images import ImageSource

    if arguments.maps and arguments.no_overlays:
        raise UsageError(
            "predict: --maps says which images get a picture, and --no-overlays that none does. "
            "Leave one of them out"
        )
    files = _image_files(arguments.images)
    output = make_directory(Path(arguments.output))

    from anomalib_lite import GatedCascade
    from anomalib_lite.cli._predictions import predict_to

    detector = _load(arguments)
    if arguments.maps and not isinstance(detector, GatedCascade):
        raise UsageError(
            f"predict: --maps is for a GatedCascade, {arguments.model} holds a "
            f"{type(detector).__name__}, which makes heatmaps of all images. Leave it out"
        )
    source = ImageSource(files, max_pixels=detector.max_pixels, where="predict")
    skip, overlays = arguments.on_error == "skip", not arguments.no_overlays
    maps: str | bool = arguments.maps or overlays
    start = time.perf_counter()
    summary = predict_to(output, detector, source, maps=maps, skip=skip)
    seconds = time.perf_counter() - start
    _list_skipped(summary.skipped)
    labels = [label for label in ("normal", "anomalous", "skipped") if summary.counts[label]]
    counts = ", ".join(f"{summary.counts[label]:,} {label}" for label in labels)
    pictures = f" and {output / 'overlays'}" * overlays
    print(
        f"{len(source):,} images in {seconds:.1f} s: {counts} at threshold "
        f"{detector.threshold_:.6g}; see {output / 'scores.csv'}{pictures}"
    )
    if summary.routes:
        print(_decided_by(summary.routes))


def _decided_by(routes: Counter[str]) -> str:
    """Of a cascade: how many images each of its models decided about."""
    normal, anomalous, called = (routes[r] for r in ("gate_normal", "gate_anomalous", "detector"))
    return (
        f"decided by the gate: {normal + anomalous:,} ({normal:,} normal, {anomalous:,} "
        f"anomalous), by the heatmap model: {called:,}; heatmap_call_rate "
        f"{called / routes.total():.3g}"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from anomalib_lite._files import check_file

    name, samples = _test_samples(arguments)
    files = [check_file(Path(f)) for f in (arguments.json, arguments.csv) if f is not None]

    from anomalib_lite import GatedCascade
    from anomalib_lite.evaluation import evaluate

    detector = _load(arguments)
    for part in (detector, *detector._members().values()):
        # A figure over only those images that could be read would be another figure.
        part.on_error, part.verbose = "raise", 0
    with_masks = not arguments.no_pixel_metrics and any(s.mask_path for s in samples)
    if isinstance(detector, GatedCascade) and with_masks:
        detector.maps = "always"  # pixel metrics need those of all images
    report = evaluate(
        detector,
        samples,
        fpr_limit=arguments.fpr_limit,
        pixel_metrics=not arguments.no_pixel_metrics,
        progress=True,
    )
    report = replace(report, dataset=name)
    if arguments.json is not None:
        report.to_json(arguments.json)
    if arguments.csv is not None:
        report.to_csv(arguments.csv)
    print(report)
    for file in files:
        print(f"written to {file}")


def _demo(arguments: argparse.Namespace) -> None:
    from anomalib_lite._files import make_directory

    output = make_directory(Path(arguments.output))

    from anomalib_lite.demo import run_demo

    run_demo(
        output,
        n_train=arguments.n_train,
        n_test=arguments.n_test,
        false_alarm_rate=arguments.false_alarm_rate,
    )


_COMMANDS = {"fit": _fit, "predict": _predict, "evaluate": _evaluate, "demo": _demo}


def _image_files(given: Sequence[str]) -> list[Any]:
    """The images of directories and files, each once, in the order given."""
    from anomalib_lite.images import ImageSource

    files = [item for name in given for item in ImageSource(name, where="predict").items]
    return list({os.path.abspath(file): file for file in files}.values())  # noqa: PTH100


def _test_samples(arguments: argparse.Namespace) -> tuple[str, Sequence[Any]]:
    """Return the name of the data set and its test images; none is decoded."""
    from anomalib_lite.datasets import Folder, open_dataset
    from anomalib_lite.errors import MissingPathError

    root = Path(arguments.dataset)
    if not root.is_dir():
        raise MissingPathError(f"evaluate: {root} is not an existing directory.")
    dataset = open_dataset(
        root,
        arguments.layout,
        normal=arguments.normal or None,
        anomalous=arguments.anomalous or None,
        masks=arguments.masks or None,
        test_size=0,  # the model is fitted already, so nothing is kept for training
        where="evaluate",
    )
    test = dataset.train + dataset.test if isinstance(dataset, Folder) else dataset.test
    return dataset.name, test


def _load(arguments: argparse.Namespace) -> Any:
    from anomalib_lite import GatedCascade, load
    from anomalib_lite._validation import check_int, check_number

    where = arguments.command
    detector = load(arguments.model, weights=arguments.weights, device=arguments.device)
    parts = (detector, *detector._members().values())
    if arguments.weights is not None and arguments.weights not in [p.weights for p in parts]:
        raise UsageError(
            f"{where}: --weights is for a cascade with a network from a weights file, and "
            f"{arguments.model} has none. Leave it out, or fit with --include-backbone if the "
            "networks are not to be had here"
        )
    if arguments.batch_size is not None:
        check_int("batch_size", arguments.batch_size, where, low=1)
        for part in parts:
            part.batch_size = arguments.batch_size
    if arguments.threshold is not None:
        allowed = "[0, 1]" if isinstance(detector, GatedCascade) else "[0, inf)"
        detector.threshold_ = check_number("threshold", arguments.threshold, where, allowed)
    return detector


def _list_skipped(reasons: Sequence[str]) -> None:
    for reason in reasons:
        print(f"skipped: {' '.join(reason.split())}", file=sys.stderr)


@contextmanager
def _warnings_in_one_line() -> Iterator[list[str]]:
    """Print warnings in one line each; gives the list of those that came, as they were."""
    shown: list[str] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        shown.append(str(message))
        print(f"warning: {_in_options(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield shown


def _is_the_users(error: Exception) -> bool:
    if isinstance(error, UsageError | OSError):
        return True
    from anomalib_lite.errors import AnomalibLiteError

    return isinstance(error, AnomalibLiteError)


def _in_options(message: object) -> str:
    """The library's message in one line, its ``name='value'`` written as ``--name value``."""
    names = "|".join([*ALL_FIT_OPTIONS, "threshold", "layout"])
    text = " ".join(str(message).split())
    for option, name in CASCADE_PARAMETERS.items():  # not those of its heatmap model
        text = re.sub(rf"^GatedCascade: {name}\b", f"GatedCascade: {option}", text)
    return re.sub(
        rf"\b({names})=(?:'([^']*)'|(\d(?:[\d.,]*\d)?))",
        lambda found: f"--{found[1].replace('_', '-')} {found[2] or found[3]}",
        text,
    )
