"""The command ``anomalib-lite``: fit, predict, evaluate and a demonstration."""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import anomalib_lite

# torch, scikit-learn and all modules that need them are imported inside the commands: it takes
# seconds, and --help, --version and most mistakes need none of it.

__all__ = ["main"]

_PROGRAM = "anomalib-lite"
_WRONG_USE, _INTERRUPTED = 2, 130


class _UsageError(Exception):
    """Arguments that the parser does not understand."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}. See: {self.prog} --help")


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
        arguments = _parser().parse_args(argv)
        with _warnings_in_one_line():
            arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if not _is_the_users(error):
            raise
        print(f"{_PROGRAM}: error: {_in_options(error)}", file=sys.stderr)
        return _WRONG_USE
    return 0


def _fit(arguments: argparse.Namespace) -> None:
    from anomalib_lite._output import check_file
    from anomalib_lite.images import ImageSource

    # Before the seconds that torch takes, and the minutes of the fit.
    model = check_file(Path(arguments.output))
    ImageSource(arguments.images, where="fit")

    from anomalib_lite import PatchCore
    from anomalib_lite.errors import CalibrationWarning

    options = {name: getattr(arguments, name) for name in _FIT_OPTIONS}
    detector = PatchCore(**options, verbose=1)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detector.fit(arguments.images)
    seconds = time.perf_counter() - start
    for warning in caught:
        warnings.warn(warning.message, stacklevel=1)
    detector.save(model, include_backbone=arguments.include_backbone)
    n_images = len(ImageSource(arguments.images)) - len(detector.skipped_)
    n_patches, length = detector.memory_bank_.embeddings_.shape
    guaranteed = not any(issubclass(w.category, CalibrationWarning) for w in caught)
    _list_skipped([reason for _, reason in detector.skipped_])
    print(f"images        {n_images:,} in {seconds:.1f} s on {_device(detector)}")
    print(f"memory bank   {n_patches:,} patches of {length} numbers")
    print(f"threshold     {detector.threshold_:.6g}")
    print(f"false alarms  {_promise(detector, guaranteed)}")
    print(f"written to    {model} ({model.stat().st_size / 1e6:.1f} MB)")


def _predict(arguments: argparse.Namespace) -> None:
    from anomalib_lite._output import make_directory

    output = make_directory(Path(arguments.output))

    from anomalib_lite._predictions import list_images, predict_to

    list_images(arguments.images, 1)  # before the model: a wrong path is told at once
    detector = _load(arguments)
    source = list_images(arguments.images, detector.max_pixels)
    skip, overlays = arguments.on_error == "skip", not arguments.no_overlays
    start = time.perf_counter()
    summary = predict_to(output, detector, source, overlays=overlays, skip=skip)
    seconds = time.perf_counter() - start
    _list_skipped(summary.skipped)
    counts = [f"{summary.counts[label]:,} {label}" for label in ("normal", "anomalous")]
    counts += [f"{len(summary.skipped):,} skipped"] * bool(summary.skipped)
    pictures = f" and {output / 'overlays'}" * overlays
    print(
        f"{len(source):,} images in {seconds:.1f} s: {', '.join(counts)} at threshold "
        f"{detector.threshold_:.6g}; see {output / 'scores.csv'}{pictures}"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from anomalib_lite._output import check_file

    files = [check_file(Path(f)) for f in (arguments.json, arguments.csv) if f is not None]

    from dataclasses import replace

    name, samples = _test_samples(arguments)

    from anomalib_lite.evaluation import evaluate

    detector = _load(arguments)
    # A figure over only those images that could be read would be another figure.
    detector.on_error = "raise"
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


def _test_samples(arguments: argparse.Namespace) -> tuple[str, Sequence[Any]]:
    """Name and test images of the data set; which files they are, not the files."""
    from anomalib_lite.datasets import Folder, MVTecAD
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
        dataset = MVTecAD(root.parent, root.name)
        return dataset.name, dataset.test
    apart = {Path(arguments.normal), Path(arguments.masks or arguments.normal)}
    kinds = [d.name for d in subdirectories(root) if Path(d.name) not in apart]
    folder = Folder(
        root,
        normal=arguments.normal,
        anomalous=arguments.anomalous or kinds,
        masks=arguments.masks,
        test_size=0,
    )
    return folder.name, folder.train + folder.test


def _load(arguments: argparse.Namespace) -> Any:
    from anomalib_lite import load
    from anomalib_lite._validation import check_int, check_number

    detector = load(arguments.model, weights=arguments.weights, device=arguments.device)
    if arguments.batch_size is not None:
        detector.batch_size = check_int("batch_size", arguments.batch_size, _PROGRAM, low=1)
    if arguments.threshold is not None:
        value = check_number("threshold", arguments.threshold, _PROGRAM, "[0, inf)")
        detector.threshold_ = value
    return detector


def _device(detector: Any) -> str:
    return f"{detector.backbone_.device} ({detector.dtype_})"


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
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"warning: {_in_options(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _is_the_users(error: Exception) -> bool:
    if isinstance(error, _UsageError | OSError):
        return True
    from anomalib_lite.errors import AnomalibLiteError

    return isinstance(error, AnomalibLiteError)


def _in_options(message: object) -> str:
    """The library's message in one line, its ``name='value'`` written as ``--name value``."""
    names = "|".join([*_FIT_OPTIONS, "threshold"])
    text = " ".join(str(message).split())
    return re.sub(
        rf"\b({names})=(?:'([^']*)'|(\d(?:[\d.,]*\d)?))",
        lambda found: f"--{found[1].replace('_', '-')} {found[2] or found[3]}",
        text,
    )


def _image_size(text: str) -> int | tuple[int, int]:
    """``"256"`` or ``"256x384"``, height first."""
    sides = tuple(int(side) for side in text.lower().split("x"))
    if len(sides) > 2:
        raise ValueError
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _layers(text: str) -> list[str | int]:
    """``"blocks.2,blocks.4"`` or ``"1,3"``."""
    return [int(part) if re.fullmatch(r"-?\d+", part) else part for part in text.split(",")]


# Name as in PatchCore, type, default (also PatchCore's: a test compares them), help.
_FIT_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "backbone": (str, "efficientnet_lite0", "embedded network, or any timm name"),
    "weights": (str, None, "weights file for a timm name (default: from the hub)"),
    "layers": (_layers, None, "names or positions, with commas between (default: chosen)"),
    "image_size": (_image_size, 256, "shorter side in pixels, or HxW"),
    "coreset_ratio": (float, 0.1, "share of patches kept, in (0, 1]"),
    "n_neighbors": (int, 1, "nearest patches that a score averages over"),
    "image_score": (str, "max", "max, top1%% or reweighted"),
    "index": (str, "flat", "flat (exact), or a FAISS index-factory string"),
    "smoothing": (float, 4.0, "of heatmaps, in pixels of the image size"),
    "false_alarm_rate": (float, 0.01, "of future normal images, in (0, 1)"),
    "calibration": (str, "split", "split or leave_one_out"),
    "device": (str, "auto", "auto, cpu, cuda or mps"),
    "dtype": (str, "auto", "auto, float32, bfloat16 or float16"),
    "batch_size": (int, 32, "images at a time"),
    "on_error": (str, "raise", "what to do about an unreadable image: raise or skip"),
    "max_pixels": (int, 100_000_000, "larger images are refused"),
    "random_state": (int, 0, "seed"),
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM,
        description="Visual anomaly detection, trained on good images only.",
        epilog="Try it without images of your own: pip install 'anomalib-lite[demo]', then "
        "anomalib-lite demo.",
    )
    version = f"{_PROGRAM} {anomalib_lite.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    _add_fit(commands)
    _add_predict(commands)
    _add_evaluate(commands)
    _add_demo(commands)
    return parser


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser("fit", help="learn from normal images and write a model file")
    fit.set_defaults(run=_fit)
    fit.add_argument("images", metavar="DIR", help="directory of normal images")
    fit.add_argument("-o", "--output", metavar="FILE", required=True, help="model to write")
    for name, (kind, default, text) in _FIT_OPTIONS.items():
        fit.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            metavar="VALUE",
            help=text if default is None else f"{text} (default: {default})",
        )
    fit.add_argument(
        "--include-backbone", action="store_true", help="put the network's weights into the file"
    )


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="score images; write a table and heatmaps")
    predict.set_defaults(run=_predict)
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


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="test a model on labelled images")
    evaluate.set_defaults(run=_evaluate)
    _add_model(evaluate)
    evaluate.add_argument(
        "dataset",
        metavar="DATASET",
        help="one category in MVTec AD's layout, or a directory with one of normal images that "
        "the model was not fitted on and others of anomalous ones",
    )
    evaluate.add_argument("--layout", choices=("auto", "mvtec", "folder"), default="auto")
    evaluate.add_argument(
        "--normal", default="good", metavar="DIR", help="folder layout: normal (default: good)"
    )
    evaluate.add_argument(
        "--anomalous", nargs="+", metavar="DIR", help="folder layout (default: all others)"
    )
    evaluate.add_argument("--masks", metavar="DIR", help="folder layout: ground truth masks")
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
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "-o", "--output", metavar="DIR", default="demo-output", help="(default: demo-output)"
    )
    demo.add_argument("--n-train", type=int, metavar="N", help="fewer training images")
    demo.add_argument("--n-test", type=int, metavar="N", help="fewer test images")
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


if __name__ == "__main__":
    sys.exit(main())
