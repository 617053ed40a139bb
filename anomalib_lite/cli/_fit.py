"""The command fit: learn from normal images, write a model file, and print a summary."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalib_lite.cli._messages import one_line_warnings, print_skipped
from anomalib_lite.cli._options import (
    ALL_FIT_OPTIONS,
    CASCADE_OPTIONS,
    CASCADE_PARAMETERS,
    DETECTORS,
    HEATMAP_MODELS,
    PUBLISHED_LAYOUTS,
)
from anomalib_lite.cli._parser import UsageError, add_recursive


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("fit", help="learn from normal images and write a model file")
    parser.set_defaults(run=run)
    parser.add_argument(
        "images", metavar="DIR", help="directory of normal images; with --layout, of a data set"
    )
    add_recursive(parser)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="model to write")
    parser.add_argument(
        "--layout",
        choices=PUBLISHED_LAYOUTS,
        help="fit on the training images of a published data set in this layout; evaluate with the "
        "same directory and layout tests on the others",
    )
    parser.add_argument(
        "--detector",
        choices=tuple(DETECTORS),
        default="patchcore",
        help="padim: parts that always lie in the same place (give --image-size HxW); "
        "mahalanobis_vfm: for a foundation model (give --backbone); subspace_ad: few images and "
        "a foundation model; gated_cascade: a small network decides about clear images, a heatmap "
        "model about the rest; default: patchcore",
    )
    parser.add_argument(
        "--heatmap-model",
        choices=tuple(HEATMAP_MODELS),
        help="GatedCascade: model that the options without 'gate' belong to (default: patchcore)",
    )
    parser.add_argument(
        "--anomalous",
        nargs="+",
        metavar="DIR",
        help="GatedCascade: directories of anomalous images (default: synthetic ones)",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="parameters under a name, such as fast or accurate; other options have precedence",
    )
    _add_what_to_leave_out(parser)
    add_groups(parser, "images")
    _add_parameters(parser)
    parser.add_argument(
        "--include-backbone", action="store_true", help="put the network's weights into the file"
    )


def _add_what_to_leave_out(parser: argparse.ArgumentParser) -> None:
    """Add the options that leave out regions and images."""
    parser.add_argument(
        "--ignore-mask",
        metavar="FILE",
        help="regions to ignore: an image, not black there, or JSON with polygons",
    )
    parser.add_argument(
        "--exclude",
        metavar="FILE",
        help="text file with names of images to leave out, one a line, such as odd ones",
    )


def add_groups(parser: argparse.ArgumentParser, images: str) -> None:
    """Add the option that says which images show the same part."""
    parser.add_argument(
        "--groups",
        metavar="RULE",
        help=f"which {images} show the same part, so that new parts keep the rate: a regular "
        "expression on the file names, folder, runs:100 (last numbers at most 100 apart), "
        "FILE.csv:COLUMN, or auto",
    )


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    """Add an option for each parameter of a detector."""
    for name, (kind, default, text) in ALL_FIT_OPTIONS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,  # the detector has the defaults
            metavar="VALUE",
            help=text if default is None else f"{text} (default: {default})",
        )


def run(arguments: argparse.Namespace) -> None:
    """Fit a detector, save it, and print a summary."""
    from anomalib_lite._files import check_file
    from anomalib_lite.images import ImageSource

    # Checked before the import of torch, which takes seconds, and the fit, which takes minutes.
    normal = _training_images(arguments)
    source = ImageSource(normal, where="fit")
    if arguments.exclude is not None:
        normal = without(source, Path(arguments.exclude))
        source = ImageSource(normal, where="fit")
    images, y = normal_and_anomalous(
        normal, arguments.anomalous or (), recursive=arguments.recursive
    )
    model = check_file(Path(arguments.output))

    detector = make_detector(arguments)
    options = {} if y is None else {"y": y}
    if arguments.ignore_mask is not None:
        if arguments.detector == "gated_cascade":
            raise UsageError("fit: --ignore-mask is no option of --detector gated_cascade yet")
        options["ignore_mask"] = arguments.ignore_mask
    if arguments.groups is not None:
        options["groups"] = read_groups(ImageSource(images, where="fit").items, arguments.groups)
    start = time.perf_counter()
    with one_line_warnings() as shown:
        detector.fit(images, **options)
    seconds = time.perf_counter() - start
    # Programs that load the model should not show progress bars.
    detector._with_options(verbose=0).save(model, include_backbone=arguments.include_backbone)
    print_skipped([reason for _, reason in detector.skipped_])
    n_images = len(source) if y is None else len(y)
    doubts = "false_alarm_rate=", "look like copies"
    rate_kept = not any(doubt in message for message in shown for doubt in doubts)
    for title, text in summary_lines(detector, n_images, seconds, rate_kept=rate_kept):
        print(f"{title:<14}{text}")
    print(f"written to    {model} ({model.stat().st_size / 1e6:.1f} MB)")


def _training_images(arguments: argparse.Namespace) -> list[Any]:
    if arguments.layout is None:
        from anomalib_lite.images import ImageSource

        recursive = arguments.recursive
        return ImageSource(arguments.images, where="fit", recursive=recursive).items
    if arguments.recursive:
        raise UsageError("fit: --recursive is for a directory of images, not for --layout")
    from anomalib_lite.datasets import open_dataset

    dataset = open_dataset(arguments.images, arguments.layout, where="fit")
    if not dataset.train:
        raise UsageError(
            f"fit: {arguments.images} has no normal images: {arguments.layout} has none. Fit on "
            "normal images of your own"
        )
    return [sample.path for sample in dataset.train]


def make_detector(arguments: argparse.Namespace) -> Any:
    """Make the detector that was asked for, with the options that were given."""
    given = {n: vars(arguments)[n] for n in ALL_FIT_OPTIONS if n in vars(arguments)}
    if arguments.detector == "gated_cascade":
        return _make_cascade(given, arguments.heatmap_model, arguments.preset)
    cascade_only = ("heatmap_model", "anomalous")
    given |= {n: vars(arguments)[n] for n in cascade_only if vars(arguments)[n]}  # to be refused
    return _make(arguments.detector, given, "detector", arguments.preset)


def _make(name: str, given: Mapping[str, Any], option: str, preset: str | None) -> Any:
    import anomalib_lite

    cls = getattr(anomalib_lite, DETECTORS[name])
    for unknown in [n for n in given if n not in cls._get_param_names()]:
        raise UsageError(
            f"fit: --{unknown.replace('_', '-')} is no option of --{option} {name}. "
            f"Leave it out, or choose another {option.replace('-', ' ')}"
        )
    if preset is not None:
        return cls.preset(preset, **given, verbose=1)
    return cls(**given, verbose=1)


def _make_cascade(given: dict[str, Any], heatmap_model: str | None, preset: str | None) -> Any:
    from anomalib_lite.cascade import SHARED_PARAMETERS, GatedCascade

    own = {CASCADE_PARAMETERS.get(n, n): given.pop(n) for n in CASCADE_OPTIONS if n in given}
    if "false_alarm_confidence" in given:
        raise UsageError("fit: --false-alarm-confidence is no option of --detector gated_cascade")
    if "false_alarm_rate" in given:
        own["false_alarm_rate"] = given.pop("false_alarm_rate")
    own |= {name: given[name] for name in SHARED_PARAMETERS if name in given}
    name = heatmap_model or "patchcore"
    detector = _make(name, given, "heatmap-model", preset)
    if name != "patchcore" and "calibration" not in given:
        # The cascade does not use this threshold, so no images should be held back for it.
        # PatchCore learns from the images that it holds back, too.
        detector = _leaving_one_out(detector)
    return GatedCascade(detector=detector, **own, verbose=1)


def _leaving_one_out(detector: Any) -> Any:
    """Return the detector with this calibration, or as it is if its other parameters forbid it."""
    from anomalib_lite.errors import AnomalibLiteError

    # With a model for each layer, one for each image as well would take long.
    way = "cross" if detector.fusion == "per_layer" else "leave_one_out"
    other = type(detector)(**detector.get_params(deep=False) | {"calibration": way})
    try:
        other._check_parameters()
    except AnomalibLiteError:  # if of another parameter, it comes again in the fit
        return detector
    return other


def normal_and_anomalous(
    normal: Any, directories: Sequence[str], *, recursive: bool = False
) -> tuple[Any, list[int] | None]:
    """Return the arguments of fit: images, and labels if there are anomalous images."""
    from anomalib_lite.images import ImageSource

    if not directories:
        return normal, None
    good = ImageSource(normal, where="fit").items
    sources = [ImageSource(name, where="fit", recursive=recursive) for name in directories]
    bad = [item for source in sources for item in source.items]
    seen = {os.path.realpath(item) for item in good}
    for item in bad:
        if os.path.realpath(item) in seen:
            raise UsageError(
                f"fit: {item} of --anomalous was given before. Each image must be given once, as "
                "normal or as anomalous"
            )
        seen.add(os.path.realpath(item))
    return [*good, *bad], [0] * len(good) + [1] * len(bad)


def without(source: Any, listed: Path) -> list[Any]:
    """Return the images whose names are not in a text file, where each is a line of its own.

    A name is the image's path, or the name of its file alone. UsageError for a name that is that of
    no image, or if none is left.
    """
    from anomalib_lite.errors import MissingPathError

    try:
        lines = listed.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MissingPathError(f"fit: --exclude: {listed} cannot be read: {error}.") from error
    wanted = {line.strip() for line in lines if line.strip()}
    named = Counter(name for item in source.items for name in {str(item), Path(item).name})
    for name in sorted(wanted):
        if named[name] != 1:
            n = f"{named[name]} of the" if named[name] else "none of the"
            raise UsageError(
                f"fit: --exclude: {name} in {listed} is the name of {n} {len(source.items)} "
                "images. Give the path of each, or the name of its file if no other has it"
            )
    left = [item for item in source.items if not {str(item), Path(item).name} & wanted]
    if not left:
        raise UsageError(f"fit: --exclude: {listed} names all images. Leave some to fit on")
    return left


def read_groups(files: Sequence[Any], rule: str) -> Any:
    """Return the groups of files that ``--groups`` asks for."""
    from anomalib_lite.images.grouping import groups_of_files

    return rule if rule == "auto" else groups_of_files(files, rule, where="--groups")


def summary_lines(
    detector: Any, n_images: int, seconds: float, *, rate_kept: bool
) -> list[tuple[str, str]]:
    """Return lines about a fitted detector, each as (title, text)."""
    from anomalib_lite.calibration import describe_threshold

    model = detector._members().get("detector", detector)
    rests_on = getattr(detector, "calibration_scores_", None)
    whose, level = "", detector.threshold_
    if rests_on is not None:
        groups = detector.calibration_groups_
        rate, confidence = detector.false_alarm_rate, detector.false_alarm_confidence
        about = describe_threshold(rests_on, rate, confidence, groups)
        whose = f": {about}"
    if model is not detector:
        whose, level = " of the heatmap model", detector.routing_.threshold
    n_used = n_images - len(detector.skipped_)
    size = model.image_size_
    size = f"{size} pixels" if isinstance(size, int) else "{}x{} pixels".format(*size)
    used = f"{n_used:,} in {seconds:.1f} s ({size}, {model.backbone_.device}, {model.dtype_})"
    return [
        ("images", used),
        *detector._learner()._summary_lines(),
        ("threshold", f"{level:.6g}{whose}"),
        *_oddest(detector),
        ("false alarms", _promise(detector, rate_kept)),
    ]


def _oddest(detector: Any) -> list[tuple[str, str]]:
    """Name the good images with the largest scores among those that the threshold rests on."""
    names = getattr(detector, "calibration_names_", [])
    if not any(names):
        return []
    scores = detector.calibration_scores_
    oddest = sorted(range(len(names)), key=lambda i: -scores[i])[:3]
    times = Counter(Path(name).name for name in names)
    shown = {n: Path(n).name if times[Path(n).name] == 1 else n for n in names}
    told = ", ".join(f"{shown[names[i]]} ({scores[i]:.4g})" for i in oddest)
    return [("oddest", f"{told}: are these good?")]


_HOW = {"cross": "cross-calibrated", "leave_one_out": "leave-one-out"}


def _promise(detector: Any, rate_kept: bool) -> str:
    groups = getattr(detector, "calibration_groups_", ())
    grouped = len(set(groups)) < len(groups)
    rate = f"{detector.false_alarm_rate:.3g}"
    if not rate_kept:
        return f"the rate of {rate} asked for is not guaranteed, see the warning"
    whose = "images of new parts" if grouped else "normal images"
    way = getattr(detector, "calibration_", "split")
    if way != "split":
        return f"about {rate} of future {whose} ({_HOW[way]}: an estimate)"
    confidence = getattr(detector, "false_alarm_confidence", None)
    kept = "on average" if confidence is None else f"with a confidence of {confidence:g}"
    return f"at most {rate} of future {whose}, {kept}"
