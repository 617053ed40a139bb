"""The command fit: which detector was asked for, and what is said of the one that came out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from anomalib_lite.cli._parser import (
    ALL_FIT_OPTIONS,
    CASCADE_OPTIONS,
    CASCADE_PARAMETERS,
    DETECTORS,
    UsageError,
)

# Of the options that have one name in a cascade and in its heatmap model, those meant for both.
_OF_BOTH = ("device", "dtype", "engine", "batch_size", "on_error", "max_pixels", "random_state")


def make_detector(arguments: argparse.Namespace) -> Any:
    """The one asked for, with the options that were given."""
    given = {n: vars(arguments)[n] for n in ALL_FIT_OPTIONS if n in vars(arguments)}
    if arguments.detector == "gated_cascade":
        return _make_cascade(given, arguments.heatmap_model)
    also = {n: vars(arguments)[n] for n in ("heatmap_model", "anomalous") if vars(arguments)[n]}
    return _make(arguments.detector, given | also, "detector")


def _make(name: str, given: Mapping[str, Any], option: str) -> Any:
    import anomalib_lite

    cls = getattr(anomalib_lite, DETECTORS[name])
    for unknown in [n for n in given if n not in cls._get_param_names()]:
        raise UsageError(
            f"fit: --{unknown.replace('_', '-')} is no option of --{option} {name}. "
            f"Leave it out, or choose another {option.replace('-', ' ')}"
        )
    return cls(**given, verbose=1)


def _make_cascade(given: dict[str, Any], heatmap_model: str | None) -> Any:
    from anomalib_lite import GatedCascade

    own = {CASCADE_PARAMETERS.get(n, n): given.pop(n) for n in CASCADE_OPTIONS if n in given}
    if "false_alarm_rate" in given:
        own["false_alarm_rate"] = given.pop("false_alarm_rate")
    own |= {name: given[name] for name in _OF_BOTH if name in given}
    name = heatmap_model or "patchcore"
    if name != "patchcore":
        # Its own threshold is not used; PatchCore learns from what it holds back for it, too.
        given = {"calibration": "leave_one_out"} | given
    return GatedCascade(detector=_make(name, given, "heatmap-model"), **own, verbose=1)


def normal_and_anomalous(normal: Any, directories: Sequence[str]) -> tuple[Any, list[int] | None]:
    """What fit takes: images, and labels where there are anomalous ones."""
    from anomalib_lite.images import ImageSource

    if not directories:
        return normal, None
    good = ImageSource(normal, where="fit").items
    bad = [item for name in directories for item in ImageSource(name, where="fit").items]
    seen = {os.path.realpath(item) for item in good}
    for item in bad:
        if os.path.realpath(item) in seen:
            raise UsageError(
                f"fit: {item} of --anomalous was given before. Each image must be given once, as "
                "normal or as anomalous"
            )
        seen.add(os.path.realpath(item))
    return [*good, *bad], [0] * len(good) + [1] * len(bad)


def describe(detector: Any, n_images: int, seconds: float, *, rate_kept: bool) -> list[str]:
    """Lines about a fitted detector."""
    from anomalib_lite import GatedCascade

    model, gate, whose = detector, [], ""
    if isinstance(detector, GatedCascade):
        model, gate = detector.detector_, _describe_gate(detector)
        whose = " of the heatmap model"
    where = f"{model.backbone_.device}, {model.dtype_}"
    n_used = n_images - len(detector.skipped_)
    return [
        f"images        {n_used:,} in {seconds:.1f} s ({where})",
        *gate,
        _describe_learned(model),
        f"threshold     {detector._map_threshold:.6g}{whose}",
        f"false alarms  {_promise(detector, rate_kept)}",
    ]


def _describe_gate(cascade: Any) -> list[str]:
    routing, backbone = cascade.routing_, cascade.gate_.backbone
    dtype = str(backbone.dtype).removeprefix("torch.")
    normal = f"below {routing.t_low:.3g}" if routing.t_low > 0 else "never"
    anomalous = f"above {routing.t_high:.3g}" if routing.t_high < 1 else "never"
    if routing.t_low == 0:
        missed = "nothing, since it calls no image normal"
    elif cascade.t_low is not None:
        missed = "as many as lie below the t_low given: nothing is promised of them"
    else:
        kind = "made-up" if cascade.synthetic_ else "given"
        missed = (
            f"at most {cascade.max_missed:.3g} of anomalies such as the "
            f"{len(cascade.anomaly_probabilities_):,} {kind} ones held out (95 % confidence)"
        )
    return [
        f"gate          {cascade.gate} ({backbone.device}, {dtype}): normal {normal}, "
        f"anomalous {anomalous}",
        f"gate loses    {missed}",
    ]


def _describe_learned(detector: Any) -> str:
    if hasattr(detector, "memory_bank_"):
        n_patches, length = detector.memory_bank_.embeddings_.shape
        return f"memory bank   {n_patches:,} patches of {length} numbers"
    if hasattr(detector, "gaussians_"):
        height, width, length = detector.gaussians_.shape
        return f"gaussians     {height} x {width} positions of {length} numbers"
    patches, images = detector.patches_.moments_.n, detector.images_.moments_.n
    return f"gaussians     of {patches:,} patches and {images:,} images"


def _promise(detector: Any, guaranteed: bool) -> str:
    rate = f"{detector.false_alarm_rate:.3g}"
    if not guaranteed:
        return f"the rate of {rate} asked for is not guaranteed, see the warning"
    if detector.calibration == "leave_one_out":
        return f"about {rate} of future normal images (leave-one-out: an estimate)"
    return f"at most {rate} of future normal images, on average"
