"""evaluate: a detector and a data set -> all metrics of a comparison."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from anomalib_lite import metrics
from anomalib_lite._validation import check_int, check_number
from anomalib_lite.datasets import Dataset, Sample, find_shared
from anomalib_lite.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
    NotFittedError,
    SharedImagesWarning,
)
from anomalib_lite.evaluation._pixels import Mask, PixelTest
from anomalib_lite.evaluation._report import Report

__all__ = ["Detector", "Report", "evaluate"]


class Detector(Protocol):
    """The interface that :func:`evaluate` needs; every detector of this library has it."""

    threshold_: float

    def fit(self, images: Any, /) -> Any:
        """Fit on normal images and set ``threshold_``."""

    def detect(self, images: Any, /) -> Any:
        """Return an object with ``scores`` (n,), ``maps`` (n of (H, W)) and ``labels`` (n,)."""


def evaluate(
    detector: Detector,
    dataset: Dataset | Sequence[Sample],
    *,
    fpr_limit: float = 0.3,
    pixel_metrics: bool = True,
    inverted_masks: bool | None = None,
    ignore_255: bool | None = None,
    memory_budget: int | str | None = None,
    chunk_size: int = 64,
    progress: bool = False,
) -> Report:
    """Test a detector on a data set; an unfitted detector is fitted first.

    Parameters
    ----------
    detector : Detector
        A detector without ``threshold_`` counts as unfitted and is fitted on ``dataset.train``; a
        fitted one is tested as it is.
    dataset : Dataset or sequence of Sample
        A sequence of samples serves as test images only; the detector must then be fitted.
    fpr_limit : float, default=0.3
        False-positive rate up to which :func:`~anomalib_lite.metrics.aupro` integrates, in (0, 1].
    pixel_metrics : bool, default=True
        Compute pixel metrics if there are masks, and the pointing game if the data set has boxes.
    inverted_masks : bool or None, default=None
        True: masks are black where the part is anomalous. False: they are as they should be. None:
        they are too, but a mask that marks more than 95 % of its image is an error, see
        :func:`~anomalib_lite.datasets.load_mask`.
    ignore_255 : bool or None, default=None
        True: 255 belongs to neither class in masks. False: it is anomalous. None: it depends on
        the mask, and is an error where the mask does not tell; see the same function.
    memory_budget : int, str or None, default=None
        None keeps all maps, in float32, for pixel metrics, which are exact. Otherwise no map is
        kept: a table of so many bytes (or such as ``"512MB"``) counts their pixels, by
        :class:`~anomalib_lite.metrics.PixelMetrics`, which says how close it comes.
    chunk_size : int, default=64
        Number of images in one call of ``detect``, so never more than this are held decoded.
    progress : bool, default=False
        Show a progress bar if standard error is a terminal.

    Returns
    -------
    Report
        Metrics, timings, memory and parameters.

    Warns
    -----
    SharedImagesWarning
        If test images are also in ``dataset.train``, by the content of their files
        (:func:`~anomalib_lite.datasets.find_shared`). They are tested as asked, and counted in the
        report.

    Raises
    ------
    NotFittedError
        If the detector is not fitted and there are no training images.
    MissingPathError
        If some anomalous images have a mask and others have none.
    InvalidValueError
        If there are no test images, an argument is out of range, the size of a map differs from
        that of its mask, a mask marks nearly all of its image, or the detector returns another
        number of scores than there are images.
    InvalidTypeError
        If ``dataset`` is neither a data set nor a sequence of samples.

    Notes
    -----
    Nothing is chosen on the test labels: the decisions are those of the detector at its own
    threshold. The exceptions are ``image_f1_max``, ``pixel_f1_max`` and ``image_fpr_at_95_tpr``,
    which are bounds by definition. Pixel
    metrics compare maps and masks at the size of the masks; neither is resized here.

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
    >>> report.per_kind["dark"]["images"]
    4.0
    """
    check_number("fpr_limit", fpr_limit, "evaluate", "(0, 1]")
    check_int("chunk_size", chunk_size, "evaluate", low=1)
    name, train, test = _unpack(dataset)
    n_shared = _warn_of_shared(train, test, getattr(detector, "on_error", "raise"))
    how = {"inverted": inverted_masks, "ignore_255": ignore_255}
    read, boxes = _truth_of_pixels(detector, dataset, test, how) if pixel_metrics else (None, {})
    pixels = PixelTest(read, boxes, fpr_limit, memory_budget)
    fit_s = _fit_if_needed(detector, train)
    tested = _test(detector, test, pixels, chunk_size, progress)
    figures = _image_metrics(test, tested)
    if tested.routes:
        routes = np.concatenate(tested.routes)
        figures["heatmap_call_rate"] = metrics.rate((routes == "detector")[routes != "skipped"])
    figures |= pixels.figures()
    timings = {"test_s": tested.seconds, "ms_per_image": 1000 * tested.seconds / len(test)}
    return Report(
        dataset=name,
        detector=type(detector).__name__,
        parameters=getattr(detector, "get_params", dict)(),
        threshold=float(detector.threshold_),
        counts=_counts(train if fit_s is not None else (), test) | pixels.counts | n_shared,
        metrics=figures,
        per_kind=_kinds(test, tested),
        timings=timings if fit_s is None else {"fit_s": fit_s, **timings},
        fpr_limit=fpr_limit,
        samples=test,
        scores=tested.scores,
        decisions=tested.decisions,
    )


def _truth_of_pixels(
    detector: Detector, dataset: Any, test: tuple[Sample, ...], how: dict[str, bool | None]
) -> tuple[Any, Any]:
    """Return what reads the masks of samples, or None; and the boxes by path, if there are any."""
    with_masks, escalated = _masks_complete(test), getattr(detector, "maps", None) == "escalated"
    if with_masks and escalated:
        raise InvalidValueError(
            f"evaluate: pixel metrics need heatmaps of all images, but {type(detector).__name__} "
            "has maps='escalated', which makes them for some only. Set maps='always', or pass "
            "pixel_metrics=False."
        )
    if with_masks:  # if masks are inverted, all are: say so before minutes of work
        next(s for s in test if s.label).mask(**how)
    read = partial(_mask_of, how=how) if with_masks else None
    return read, {} if escalated else getattr(dataset, "boxes", {})


class _Tested(NamedTuple):
    """Scores and decisions of the test images."""

    scores: npt.NDArray[np.float32]
    decisions: npt.NDArray[np.bool_]
    seconds: float
    routes: list[npt.NDArray[np.str_]]  # empty unless the detector is a cascade


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


def _warn_of_shared(
    train: tuple[Sample, ...], test: tuple[Sample, ...], on_error: str
) -> dict[str, int]:
    """Count the test images that are also in ``train``, and warn of them."""
    if not train:
        return {}
    shared = find_shared(train, test, on_error=on_error)
    if shared:
        names = ", ".join(f"{b} (trained on as {a})" for a, b in shared[:3])
        warnings.warn(
            f"evaluate: {len(shared)} of {len(test)} test images are also training images, so the "
            f"figures look better than they are: {names}{' and so on' if len(shared) > 3 else ''}. "
            "Remove them from the one or the other; anomalib_lite.datasets.find_shared lists all.",
            SharedImagesWarning,
            stacklevel=3,
        )
    return {"test_in_train": len(shared)}


def _masks_complete(test: tuple[Sample, ...]) -> bool:
    """Return whether the anomalous samples have masks; raise if only some have one."""
    anomalous = [s for s in test if s.label]
    missing = [s for s in anomalous if s.mask_path is None]
    if missing and len(missing) < len(anomalous):
        raise MissingPathError(
            "evaluate: all anomalous images must have masks, or none, got none for "
            f"{missing[0].path}. Add it, or pass pixel_metrics=False."
        )
    return bool(anomalous) and not missing


def _fit_if_needed(detector: Detector, train: tuple[Sample, ...]) -> float | None:
    """Fit and return the seconds that took; None if the detector is already fitted."""
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
    detector: Detector,
    test: tuple[Sample, ...],
    pixels: PixelTest,
    chunk_size: int,
    progress: bool,
) -> _Tested:
    scores = np.empty(len(test), np.float32)
    decisions = np.empty(len(test), bool)
    routes: list[npt.NDArray[np.str_]] = []
    seconds = 0.0
    # disable=None: shown on a terminal only, not written into a log file.
    with tqdm(
        total=len(test), desc="test", unit="image", disable=None if progress else True
    ) as bar:
        for start in range(0, len(test), chunk_size):
            chunk = test[start : start + chunk_size]
            began = time.perf_counter()
            found = detector.detect(chunk)
            seconds += time.perf_counter() - began
            _check_lengths(found, len(chunk), pixels.has_masks)
            scores[start : start + len(chunk)] = found.scores
            decisions[start : start + len(chunk)] = found.labels
            if hasattr(found, "heatmap_call_rate"):  # of a cascade
                routes.append(found.routes)
            if getattr(found, "maps", None) is not None:
                pixels.add(chunk, found.maps)
            bar.update(len(chunk))
    return _Tested(scores, decisions, seconds, routes)


def _check_lengths(found: Any, n_images: int, with_masks: bool) -> None:
    for name in ("scores", "labels", "maps") if with_masks else ("scores", "labels"):
        if len(getattr(found, name)) != n_images:
            raise InvalidValueError(
                f"evaluate: detect must return as many {name} as there are images, "
                f"got {len(getattr(found, name))} for {n_images}."
            )


def _mask_of(sample: Sample, shape: tuple[int, ...], how: dict[str, bool | None]) -> Mask:
    mask = sample.mask(**how)
    if mask is not None and mask.shape != shape:
        turned = (
            " Images are turned as their EXIF orientation says: turn the mask in the same way."
            if mask.shape == shape[::-1]
            else ""
        )
        raise InvalidValueError(
            f"evaluate: the map of {sample.path} must have the size of its mask {mask.shape}, got "
            f"{shape}. Image and mask must have the same size; check {sample.mask_path}.{turned}"
        )
    return mask


def _image_metrics(test: tuple[Sample, ...], tested: _Tested) -> dict[str, float]:
    truth = np.array([s.label for s in test])
    return {
        "image_auroc": metrics.auroc(truth, tested.scores),
        "image_ap": metrics.average_precision(truth, tested.scores),
        "image_f1_max": metrics.f1_max(truth, tested.scores),
        "image_fpr_at_95_tpr": metrics.fpr_at_tpr(truth, tested.scores),
        "false_alarm_rate": metrics.rate(tested.decisions[truth == 0]),
        "detection_rate": metrics.rate(tested.decisions[truth == 1]),
    }


def _kinds(test: tuple[Sample, ...], tested: _Tested) -> dict[str, dict[str, float]]:
    """Compute the metrics of each kind of anomaly, against all normal images."""
    truth = np.array([s.label for s in test])
    kinds = np.array([s.kind for s in test])
    rows = {}
    for kind in sorted(set(kinds[truth == 1].tolist())):
        chosen = (truth == 1) & (kinds == kind)
        against = chosen | (truth == 0)
        rows[kind] = {
            "images": float(chosen.sum()),
            "image_auroc": metrics.auroc(chosen[against], tested.scores[against]),
            "detection_rate": metrics.rate(tested.decisions[chosen]),
        }
    return rows


def _counts(train: tuple[Sample, ...], test: tuple[Sample, ...]) -> dict[str, int]:
    n_anomalous = sum(s.label for s in test)
    return {
        "train": len(train),
        "test": len(test),
        "test_normal": len(test) - n_anomalous,
        "test_anomalous": n_anomalous,
    }
