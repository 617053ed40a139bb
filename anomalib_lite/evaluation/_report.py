"""Report: the results of an evaluation, as a table and as files."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anomalib_lite._files import write_text
from anomalib_lite._version import __version__
from anomalib_lite.datasets import Sample

_TITLES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "image_fpr_at_95_tpr": "image FPR at 95 % TPR",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "aupro": "AUPRO",
    "aupimo": "AUPIMO",
    "pointing_game": "pointing game",
    "false_alarm_rate": "false-alarm rate",
    "detection_rate": "detection rate",
    "heatmap_call_rate": "heatmap call rate",
}
_UNITS = {"fit_s": "fit, s", "test_s": "test, s", "ms_per_image": "ms per image"}
_PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "timm", "faiss-cpu", "pillow")


def peak_memory() -> float | None:
    """Return the largest memory that this process has had so far, in MiB; None if unknown."""
    try:
        # Of this program alone: ru_maxrss begins with the peak of the process that started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) / (1 << 10)
    except (OSError, IndexError):  # no Linux
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _versions() -> dict[str, str]:
    versions = {
        "anomalib_lite": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # another build is installed, such as faiss-gpu
    return versions


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """Results of :func:`evaluate`. Print it for a table.

    Attributes
    ----------
    dataset, detector : str
        Name of the data set, and name of the detector's class.
    parameters : dict
        Result of the detector's ``get_params()``; empty if it has no such method.
    threshold : float
        Threshold of the detector, at which it decided.
    counts : dict of str to int
        Numbers of images: ``train`` (0 if the detector was fitted before), ``test``,
        ``test_normal``, ``test_anomalous``; with masks also ``empty_masks``, the number of
        anomalous images whose mask marks nothing, and ``ignored_pixels``, the number of pixels that
        masks leave out; with a data set's own training images also ``test_in_train``, the number
        of test images that are among them.
    metrics : dict of str to float
        ``image_auroc``, ``image_ap``, ``image_f1_max``, ``image_fpr_at_95_tpr`` (the false-alarm
        rate at a threshold that detects 95 % of the anomalous images), ``false_alarm_rate``,
        ``detection_rate``; for a cascade ``heatmap_call_rate``, the share of images that its
        heatmap model decided; with masks ``pixel_auroc``, ``pixel_ap``, ``pixel_f1_max``,
        ``aupro``, and ``aupimo`` if the good images have at least 100,000 pixels, one for the
        lowest of its false-positive rates; with boxes ``pointing_game``. ``nan`` where a class is
        missing.
    per_kind : dict of str to dict of str to float
        For each kind of anomaly: ``images``, ``image_auroc`` against all normal test images,
        ``detection_rate``.
    timings : dict of str to float
        ``test_s``, the seconds spent in ``detect``, decoding included; ``ms_per_image``, the
        same per image in milliseconds; ``fit_s`` if the detector was fitted for this report.
    fpr_limit : float
        False-positive rate up to which ``aupro`` integrates.
    samples : tuple of Sample
        The test images, in the order of ``scores`` and ``decisions``.
    scores : ndarray of shape (n,), float32
        Higher is more anomalous.
    decisions : ndarray of shape (n,), bool
        True where the detector called the image anomalous.
    peak_memory_mb : float or None
        Peak resident memory of this process since it started, in MiB; None on Windows. On macOS it
        may be that of the process that started it, if that is larger.
    versions : dict of str to str
        Versions of Python, the platform, this library and the libraries it uses.
    """

    dataset: str
    detector: str
    parameters: dict[str, Any]
    threshold: float
    counts: dict[str, int]
    metrics: dict[str, float]
    per_kind: dict[str, dict[str, float]]
    timings: dict[str, float]
    fpr_limit: float
    samples: tuple[Sample, ...]
    scores: npt.NDArray[np.float32]
    decisions: npt.NDArray[np.bool_]
    peak_memory_mb: float | None = field(default_factory=peak_memory)
    versions: dict[str, str] = field(default_factory=_versions)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the single images, in types of JSON; numbers not finite become None."""
        names = ("dataset", "detector", "parameters", "threshold", "counts", "metrics")
        more = ("per_kind", "fpr_limit", "timings", "peak_memory_mb", "versions")
        return {name: _plain(getattr(self, name)) for name in names + more}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` to a file; an existing file is replaced in one step.

        Raises
        ------
        OutputError
            If the file cannot be written; an existing file is then unchanged.
        """
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", "Report")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row per metric, so that several files can be joined into one table.

        The columns are dataset, detector, kind, metric, value. The kind is ``all`` or a kind of
        anomaly. The value of an undefined metric is empty.

        Raises
        ------
        OutputError
            If the file cannot be written; an existing file is then unchanged.
        """
        whole: dict[str, Any] = {**self.metrics, **self.timings, **self.counts}
        whole |= {"threshold": self.threshold, "peak_memory_mb": self.peak_memory_mb}
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["dataset", "detector", "kind", "metric", "value"])
        for kind, values in [("all", whole), *self.per_kind.items()]:
            for name, value in values.items():
                rows.writerow([self.dataset, self.detector, kind, name, _plain(value)])
        write_text(path, text.getvalue(), "Report")

    def __repr__(self) -> str:
        return f"Report({self.detector} on {self.dataset!r}, {self.counts['test']} images)"

    def __str__(self) -> str:
        counts = self.counts
        trained = f"{counts['train']} training images" if counts["train"] else "fitted before"
        lines = [
            f"{self.detector} on {self.dataset}: {trained}, {counts['test_normal']} normal and "
            f"{counts['test_anomalous']} anomalous test images",
            "",
        ]
        for name, value in self.metrics.items():
            limit = f", FPR to {self.fpr_limit:g}" if name == "aupro" else ""
            lines.append(f"{_TITLES[name] + limit:<22}{_shown(value):>10}")
        figures = {"threshold": self.threshold, **self.timings}
        lines += [f"{_UNITS.get(name, name):<22}{value:>10.4g}" for name, value in figures.items()]
        if self.peak_memory_mb is not None:
            lines.append(f"{'peak memory, MiB':<22}{self.peak_memory_mb:>10.0f}")
        if self.per_kind:
            width = max(22, *(len(kind) + 2 for kind in self.per_kind))
            lines += ["", f"{'kind':<{width}}{'images':>10}{'AUROC':>10}{'detected':>10}"]
            lines += [
                f"{kind:<{width}}{row['images']:>10.0f}{_shown(row['image_auroc']):>10}"
                f"{_shown(row['detection_rate']):>10}"
                for kind, row in self.per_kind.items()
            ]
        if counts.get("empty_masks"):
            lines += ["", f"Note: the masks of {counts['empty_masks']} anomalous images are empty."]
        if counts.get("ignored_pixels"):
            lines += ["", f"Note: the masks leave out {counts['ignored_pixels']:,} pixels."]
        if counts.get("test_in_train"):
            lines += ["", f"Note: {counts['test_in_train']} test images are training images too."]
        return "\n".join(lines)


def _shown(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4f}"


def _plain(value: Any) -> Any:
    """Return ``value`` in types of JSON; other objects become the name of their class."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value) if isinstance(value, os.PathLike) else type(value).__name__
