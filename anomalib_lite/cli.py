"""The command ``anomalib-lite``: fit, predict, evaluate and a demonstration."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from anomalib_lite._arguments import (
    ALL_FIT_OPTIONS,
    DETECTORS,
    MASKS,
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
    from anomalib_lite._output import check_file
    from anomalib_lite.images import ImageSource

    # Before the seconds that torch takes, and the minutes of the fit.
    n_images = len(ImageSource(arguments.images, where="fit"))
    model = check_file(Path(arguments.output))

    from anomalib_lite.errors import CalibrationWarning

    detector = _make_detector(arguments)
    start = time.perf_counter()
    with _warnings_in_one_line() as shown:
        detector.fit(arguments.images)
    seconds = time.perf_counter() - start
    detector.verbose = 0  # or programs that load the model would show bars
    detector.save(model, include_backbone=arguments.include_backbone)
    _list_skipped([reason for _, reason in detector.skipped_])
    where = f"{detector.backbone_.device}, {detector.dtype_}"
    print(f"images        {n_images - len(detector.skipped_):,} in {seconds:.1f} s ({where})")
    print(_describe_learned(detector))
    print(f"threshold     {detector.threshold_:.6g}")
    print(f"false alarms  {_promise(detector, CalibrationWarning not in shown)}")
    print(f"written to    {model} ({model.stat().st_size / 1e6:.1f} MB)")


def _make_detector(arguments: argparse.Namespace) -> Any:
    """The one asked for, with the options that were given."""
    import anomalib_lite

    cls = getattr(anomalib_lite, DETECTORS[arguments.detector])
    given = {n: vars(arguments)[n] for n in ALL_FIT_OPTIONS if n in vars(arguments)}
    for name in given.keys() - cls._get_param_names():
        raise UsageError(
            f"fit: --{name.replace('_', '-')} is no option of --detector {arguments.detector}. "
            "Leave it out, or choose another detector"
        )
    return cls(**given, verbose=1)


def _describe_learned(detector: Any) -> str:
    if hasattr(detector, "memory_bank_"):
        n_patches, length = detector.memory_bank_.embeddings_.shape
        return f"memory bank   {n_patches:,} patches of {length} numbers"
    if hasattr(detector, "gaussians_"):
        height, width, length = detector.gaussians_.shape
        return f"gaussians     {height} x {width} positions of {length} numbers"
    patches, images = detector.patches_.moments_.n, detector.images_.moments_.n
    return f"gaussians     of {patches:,} patches and {images:,} images"


def _predict(arguments: argparse.Namespace) -> None:
    from anomalib_lite._output import make_directory
    from anomalib_lite.images import ImageSource

    files = _image_files(arguments.images)
    output = make_directory(Path(arguments.output))

    from anomalib_lite._predictions import predict_to

    detector = _load(arguments)
    source = ImageSource(files, max_pixels=detector.max_pixels, where="predict")
    skip, overlays = arguments.on_error == "skip", not arguments.no_overlays
    start = time.perf_counter()
    summary = predict_to(output, detector, source, overlays=overlays, skip=skip)
    seconds = time.perf_counter() - start
    _list_skipped(summary.skipped)
    labels = [label for label in ("normal", "anomalous", "skipped") if summary.counts[label]]
    counts = ", ".join(f"{summary.counts[label]:,} {label}" for label in labels)
    pictures = f" and {output / 'overlays'}" * overlays
    print(
        f"{len(source):,} images in {seconds:.1f} s: {counts} at threshold "
        f"{detector.threshold_:.6g}; see {output / 'scores.csv'}{pictures}"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from anomalib_lite._output import check_file

    name, samples = _test_samples(arguments)
    files = [check_file(Path(f)) for f in (arguments.json, arguments.csv) if f is not None]

    from anomalib_lite.evaluation import evaluate

    detector = _load(arguments)
    # A figure over only those images that could be read would be another figure.
    detector.on_error, detector.verbose = "raise", 0
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
    from anomalib_lite._output import make_directory

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
    """Name of the data set, and its test images; none is decoded."""
    from anomalib_lite.datasets import Folder, MVTecAD, MVTecAD2
    from anomalib_lite.datasets.base import subdirectories
    from anomalib_lite.errors import MissingPathError

    root = Path(arguments.dataset)
    if not root.is_dir():
        raise MissingPathError(f"evaluate: {root} is not an existing directory.")
    if not root.name:  # "." and ".." have no name of their own
        root = root.resolve()
    layout = arguments.layout
    if layout == "auto":
        layout = "mvtec" if (root / "train" / "good").is_dir() else "folder"
    if layout == "mvtec":
        if arguments.normal is not None or arguments.anomalous or arguments.masks:
            raise UsageError(
                f"evaluate: --normal, --anomalous and --masks are for the folder layout, but "
                f"{root} is read as MVTec AD's. Add --layout folder, or leave them out"
            )
        of_layout = MVTecAD2 if (root / "test_public").is_dir() else MVTecAD
        dataset = of_layout(root.parent, root.name)
        return dataset.name, dataset.test
    kinds = [d.name for d in subdirectories(root)]
    masks = arguments.masks or next((name for name in MASKS if name in kinds), None)
    normal = arguments.normal or "good"
    apart = {os.path.normpath(name) for name in (normal, masks) if name}
    folder = Folder(
        root,
        normal=normal,
        anomalous=arguments.anomalous or [kind for kind in kinds if kind not in apart],
        masks=masks,
        test_size=0,  # the model is fitted already, so nothing is kept for training
    )
    return folder.name, folder.train + folder.test


def _load(arguments: argparse.Namespace) -> Any:
    from anomalib_lite import load
    from anomalib_lite._validation import check_int, check_number

    where = arguments.command
    detector = load(arguments.model, weights=arguments.weights, device=arguments.device)
    if arguments.batch_size is not None:
        detector.batch_size = check_int("batch_size", arguments.batch_size, where, low=1)
    if arguments.threshold is not None:
        detector.threshold_ = check_number("threshold", arguments.threshold, where, "[0, inf)")
    return detector


def _promise(detector: Any, guaranteed: bool) -> str:
    rate = f"{detector.false_alarm_rate:.3g}"
    if not guaranteed:
        return f"the rate of {rate} asked for is not guaranteed, see the warning"
    if detector.calibration == "leave_one_out":
        return f"about {rate} of future normal images (leave-one-out: an estimate)"
    return f"at most {rate} of future normal images, on average"


def _list_skipped(reasons: Sequence[str]) -> None:
    for reason in reasons:
        print(f"skipped: {' '.join(reason.split())}", file=sys.stderr)


@contextmanager
def _warnings_in_one_line() -> Iterator[list[type[Warning]]]:
    """Print warnings in one line each; gives the list of the kinds that came."""
    shown: list[type[Warning]] = []

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        shown.append(category)
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
    names = "|".join([*ALL_FIT_OPTIONS, "threshold"])
    text = " ".join(str(message).split())
    return re.sub(
        rf"\b({names})=(?:'([^']*)'|(\d(?:[\d.,]*\d)?))",
        lambda found: f"--{found[1].replace('_', '-')} {found[2] or found[3]}",
        text,
    )


if __name__ == "__main__":
    sys.exit(main())
