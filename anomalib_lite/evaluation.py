"""One call from a detector and a data set to every figure that a comparison needs."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

import anomalib_lite
from anomalib_lite import metrics
from anomalib_lite._validation import check_int, check_number
from anomalib_lite.datasets import Dataset, Sample
from anomalib_lite.errors import (
    InvalidTypeError,
    InvalidValueError,
    NotFittedError,
    OutputError,
)

__all__ = ["Detector", "Report", "evaluate"]

_TITLES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "false_alarm_rate": "false-alarm rate",
    "detection_rate": "detection rate",
}
_PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "timm", "faiss-cpu", "pillow")


class Detector(Protocol):
    """What :func:`evaluate` needs of a detector; every detector of this library has it."""

    threshold_: float

    def fit(self, images: Any, /) -> Any:
        """Fit on normal images; sets ``threshold_``."""

    def detect(self, images: Any, /) -> Any:
        """Return an object with ``scores`` (n,), ``maps`` (n of (H, W)) and ``labels`` (n,)."""


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What :func:`evaluate` found. Print it for a table.

    Attributes
    ----------
    dataset, detector : str
        Name of the data set, class of the detector.
    parameters : dict
        The detector's ``get_params()``, empty if it has none.
    threshold : float
        Its ``threshold_``: the decisions below are those at this threshold.
    counts : dict of str to int
        ``train`` (0 if not fitted here), ``test``, ``test_normal``, ``test_anomalous``, and
        ``empty_masks``: anomalous images whose mask marks nothing (-1 if masks were not used).
    metrics : dict of str to float
        ``image_auroc``, ``image_ap``, ``image_f1_max``, ``false_alarm_rate``,
        ``detection_rate`` and, with masks, ``pixel_auroc``, ``pixel_ap``, ``aupro``. ``nan``
        where a class is missing.
    per_kind : dict of str to dict of str to float
        For each kind of anomaly: ``images``, ``image_auroc`` against all normal test images,
        ``detection_rate``.
    timings : dict of str to float
        ``test_s``, the seconds spent in ``detect``, decoding included; ``ms_per_image``, the
        same per image in milliseconds; ``fit_s`` if the detector was fitted here.
    peak_memory_mb : float or None
        Largest resident memory of this process since it started, in MiB; None on Windows.
    fpr_limit : float
        The limit of ``aupro``.
    versions : dict of str to str
        Python, platform, this library and those below it.
    samples : tuple of Sample
        The test images, in the order of ``scores`` and ``decisions``.
    scores : ndarray of shape (n,), float32
        Higher is more anomalous.
    decisions : ndarray of shape (n,), bool
        True where the detector called the image anomalous.
    """

    dataset: str
    detector: str
    parameters: dict[str, Any]
    threshold: float
    counts: dict[str, int]
    metrics: dict[str, float]
    per_kind: dict[str, dict[str, float]]
    timings: dict[str, float]
    peak_memory_mb: float | None
    fpr_limit: float
    samples: tuple[Sample, ...]
    scores: npt.NDArray[np.float32]
    decisions: npt.NDArray[np.bool_]
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single images, in types that JSON knows; not finite becomes None.

        Examples
        --------
        >>> report.to_dict()["metrics"]["image_auroc"]  # doctest: +SKIP
        0.9876
        """
        names = ("dataset", "detector", "parameters", "threshold", "counts", "metrics")
        more = ("per_kind", "fpr_limit", "timings", "peak_memory_mb", "versions")
        return {name: _plain(getattr(self, name)) for name in names + more}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` to a file; a file that stood there is replaced in one step.

        Raises
        ------
        OutputError
            If the file cannot be written; what stood there stays as it was.
        """
        _write(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row per figure, so that several files can be stacked into one table.

        The columns are dataset, detector, kind, metric, value. The kind is ``all``, or a kind of
        anomaly. An undefined figure is an empty value.

        Raises
        ------
        OutputError
            If the file cannot be written; what stood there stays as it was.
        """
        figures = {"all": {**self.metrics, **self.timings, "threshold": self.threshold}}
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["dataset", "detector", "kind", "metric", "value"])
        for kind, values in [*figures.items(), *self.per_kind.items()]:
            for name, value in values.items():
                rows.writerow([self.dataset, self.detector, kind, name, _plain(value)])
        _write(path, text.getvalue())

    def __repr__(self) -> str:
        return f"Report({self.detector} on {self.dataset!r}, {self.counts['test']} images)"

    def __str__(self) -> str:
        counts = self.counts
        lines = [
            f"{self.detector} on {self.dataset}",
            f"{counts['train']} training images, {counts['test_normal']} normal and "
            f"{counts['test_anomalous']} anomalous test images",
            "",
        ]
        for name, value in self.metrics.items():
            title = f"{_TITLES[name]} up to {self.fpr_limit:g}" if name == "aupro" else _TITLES[name]
            lines.append(f"{title:<20}{_shown(value):>10}")
        lines.append(f"{'threshold':<20}{self.threshold:>10.4g}")
        lines += [f"{name:<20}{value:>10.2f}" for name, value in self.timings.items()]
        if self.peak_memory_mb is not None:
            lines.append(f"{'peak_memory_mb':<20}{self.peak_memory_mb:>10.0f}")
        if self.per_kind:
            width = max(20, *(len(kind) + 2 for kind in self.per_kind))
            lines += ["", f"{'kind':<{width}}{'images':>10}{'AUROC':>10}{'detected':>10}"]
            lines += [
                f"{kind:<{width}}{row['images']:>10.0f}{_shown(row['image_auroc']):>10}"
                f"{_shown(row['detection_rate']):>10}"
                for kind, row in self.per_kind.items()
            ]
        if counts["empty_masks"] > 0:
            lines += ["", f"Note: the masks of {counts['empty_masks']} anomalous images are empty."]
        return "\n".join(lines)


def evaluate(
    detector: Detector,
    dataset: Dataset | Sequence[Sample],
    *,
    fpr_limit: float = 0.3,
    pixel_metrics: bool = True,
    chunk_size: int = 64,
    progress: bool = False,
) -> Report:
    """Test a detector on a data set, fitting it first if need be.

    Parameters
    ----------
    detector : Detector
        Fitted or not. Without a ``threshold_`` it counts as not fitted, and is fitted here on
        ``dataset.train``; a fitted one is tested as it is.
    dataset : Dataset or sequence of Sample
        A sequence of samples is tested on only; the detector must then be fitted.
    fpr_limit : float, default=0.3
        Limit of :func:`~anomalib_lite.metrics.aupro`, in (0, 1].
    pixel_metrics : bool, default=True
        Whether to compute pixel metrics where there are masks.
    chunk_size : int, default=64
        How many images go into one call of ``detect``. More than this are never held decoded.
        Maps are kept, in float32, only if pixel metrics are computed.
    progress : bool, default=False
        Show a bar if standard error is a terminal.

    Returns
    -------
    Report
        The metrics by name in ``metrics``; timings, memory and parameters beside them.

    Raises
    ------
    NotFittedError
        If the detector is not fitted and there are no training images.
    MissingPathError
        If an anomalous image has no mask while others have one.
    InvalidValueError
        If there is nothing to test on, an argument is outside of what is allowed, a map is not
        of its mask's size, or the detector answers with another number of scores than images.
    InvalidTypeError
        If ``dataset`` is neither a data set nor samples.

    Notes
    -----
    Nothing is chosen on the test labels: decisions are the detector's own, at the threshold it
    brought along. The exception is ``image_f1_max``, which is an upper bound by definition.
    Pixel metrics compare maps at the masks' own sizes; neither is ever resized here.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from PIL import Image
    >>> from anomalib_lite import PatchCore
    >>> from anomalib_lite.datasets import Folder
    >>> rng = np.random.default_rng(0)
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for kind, n in (("good", 40), ("dark", 4)):
    ...         Path(root, kind).mkdir()
    ...         for i in range(n):
    ...             pixels = rng.integers(100, 140, (64, 80, 3), dtype=np.uint8)
    ...             pixels[20:40, 30:60] //= 4 if kind == "dark" else 1
    ...             Image.fromarray(pixels).save(Path(root, kind, f"{i}.png"))
    ...     detector = PatchCore(image_size=64, false_alarm_rate=0.25)
    ...     report = evaluate(detector, Folder(root, anomalous="dark", name="plates"))
    >>> report
    Report(PatchCore on 'plates', 12 images)
    >>> report.metrics["image_auroc"]
    1.0
    """
    check_number("fpr_limit", fpr_limit, "evaluate", low=0, high=1, low_open=True)
    check_int("chunk_size", chunk_size, "evaluate", low=1)
    name, train, test = _unpack(dataset)
    with_masks = pixel_metrics and any(s.label and s.mask_path is not None for s in test)
    fit_s = _fit_if_needed(detector, train)
    tested = _test(detector, test, with_masks, chunk_size, progress)
    figures, per_kind = _image_figures(test, tested)
    if with_masks:
        figures |= metrics.pixel_metrics(tested.masks, tested.maps, fpr_limit=fpr_limit)
    timings = {"test_s": tested.seconds, "ms_per_image": 1000 * tested.seconds / len(test)}
    n_anomalous = sum(s.label for s in test)
    get_params = getattr(detector, "get_params", dict)
    return Report(
        dataset=name,
        detector=type(detector).__name__,
        parameters=get_params(),
        threshold=float(detector.threshold_),
        counts={
            "train": 0 if fit_s is None else len(train),
            "test": len(test),
            "test_normal": len(test) - n_anomalous,
            "test_anomalous": n_anomalous,
            "empty_masks": _count_empty(test, tested.masks) if with_masks else -1,
        },
        metrics={key: figures[key] for key in _TITLES if key in figures},
        per_kind=per_kind,
        timings=timings if fit_s is None else {"fit_s": fit_s, **timings},
        peak_memory_mb=_peak_memory_mb(),
        fpr_limit=fpr_limit,
        samples=test,
        scores=tested.scores,
        decisions=tested.decisions,
    )


class _Tested(NamedTuple):
    scores: npt.NDArray[np.float32]
    decisions: npt.NDArray[np.bool_]
    maps: list[npt.NDArray[np.float32]]
    masks: list[npt.NDArray[np.bool_] | None]
    seconds: float


def _unpack(
    dataset: Dataset | Sequence[Sample],
) -> tuple[str, tuple[Sample, ...], tuple[Sample, ...]]:
    if isinstance(dataset, Dataset):
        name, train, test = dataset.name, dataset.train, dataset.test
    else:
        name, train = "samples", ()
        test = tuple(dataset) if isinstance(dataset, Sequence) else (dataset,)
    for sample in test:
        if not isinstance(sample, Sample):
            raise InvalidTypeError(
                "evaluate: dataset must be a Dataset or a sequence of Sample, "
                f"got {type(sample).__name__}. See anomalib_lite.datasets.Folder."
            )
    if not test:
        raise InvalidValueError("evaluate: dataset must hold test images, got none.")
    return name, train, test


def _fit_if_needed(detector: Detector, train: tuple[Sample, ...]) -> float | None:
    """Fit and return the seconds it took; None if the detector is fitted already."""
    if hasattr(detector, "threshold_"):
        return None
    if not train:
        raise NotFittedError(
            f"evaluate: {type(detector).__name__} must be fitted to be tested on samples alone. "
            "Call fit first, or pass a data set with training images."
        )
    start = time.perf_counter()
    detector.fit(train)
    return time.perf_counter() - start


def _test(
    detector: Detector, test: tuple[Sample, ...], with_masks: bool, chunk_size: int, progress: bool
) -> _Tested:
    scores = np.empty(len(test), np.float32)
    decisions = np.empty(len(test), bool)
    maps: list[npt.NDArray[np.float32]] = []
    masks: list[npt.NDArray[np.bool_] | None] = []
    seconds = 0.0
    # disable=None: shown on a terminal only, never written into a log file.
    with tqdm(total=len(test), desc="test", unit="image", disable=None if progress else True) as bar:
        for start in range(0, len(test), chunk_size):
            chunk = test[start : start + chunk_size]
            began = time.perf_counter()
            found = detector.detect(chunk)
            seconds += time.perf_counter() - began
            _check_lengths(detector, chunk, found)
            scores[start : start + len(chunk)] = found.scores
            decisions[start : start + len(chunk)] = found.labels
            if with_masks:
                for sample, amap in zip(chunk, found.maps, strict=True):
                    masks.append(_mask_of(sample, np.shape(amap)))
                    maps.append(np.asarray(amap, np.float32))
            bar.update(len(chunk))
    return _Tested(scores, decisions, maps, masks, seconds)
