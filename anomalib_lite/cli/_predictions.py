"""Any number of images through a fitted detector: a table of scores, and pictures."""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anomalib_lite._files import RowsFile, make_directory, replacing, shortest, unquoted
from anomalib_lite.detectors import Detections, DetectorMixin
from anomalib_lite.detectors.detections import outline_level
from anomalib_lite.errors import AnomalibLiteError, ImageError, InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.plotting import overlay

COLUMNS = ("path", "score", "label", "threshold", "reason", "overlay")
ROUTE = "route"  # one more column, for a cascade
P_VALUE = "p_value"  # or this one, for a single detector

# Largest number of heatmap pixels held at once: 256 MiB of float32, whatever the image sizes.
_PIXELS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Result:
    """Result for one image; a skipped image has a ``reason``."""

    score: float
    label: str  # "normal", "anomalous" or "skipped"
    reason: str
    route: str  # which model of a cascade decided, or "skipped"
    heatmap: Any  # (H, W) float32, or None
    p_value: float | None = None  # None for a cascade or a router


@dataclass
class Summary:
    """Number of images with each label and each route, and the reasons of skipped images."""

    counts: Counter[str] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    before: int = 0  # images that had a row already

    def add(self, result: Result) -> None:
        """Count one image."""
        self.counts[result.label] += 1
        if result.reason:
            self.skipped.append(result.reason)
        elif result.route:
            self.routes[result.route] += 1


class Writer:
    """Write rows of the table, and pictures beside it in ``overlays``.

    Parameters
    ----------
    rows : RowsFile
        The open table.
    detector : DetectorMixin
        The detector whose results are written.
    source : ImageSource
        All images; methods take positions in it.
    """

    def __init__(self, rows: RowsFile, detector: DetectorMixin, source: ImageSource) -> None:
        self._rows, self._source = rows, source
        self._detector, self._threshold = detector, detector.threshold_
        self._with_route = bool(detector._routes)
        self._names = unique_names(source.items)

    def still_to_do(self) -> list[int]:
        """Return the positions of the images without a row.

        InvalidValueError if the rows there are of another threshold.
        """
        done = {row["path"] for row in self._rows.before}
        for row in self._rows.before:
            if row["threshold"] != shortest(self._threshold):
                raise InvalidValueError(
                    f"predict: {self._rows.path} was made with the threshold {row['threshold']}, "
                    f"and this model has {shortest(self._threshold)}. Choose another directory, or "
                    "begin anew without --resume."
                )
        return [i for i, name in enumerate(self._source.names) if name not in done]

    def row(self, index: int, result: Result, picture: str) -> None:
        """Write the row of one image; ``picture`` is the path of its overlay, or empty."""
        score = "" if result.reason else shortest(result.score)
        threshold = shortest(self._threshold)
        name = self._source.names[index]
        row = [name, score, result.label, threshold, result.reason, picture]
        if self._with_route:
            row.append(result.route)
        elif result.p_value is not None:
            row.append("" if result.reason else f"{result.p_value:.6g}")
        self._rows.write(row)

    def overlay(self, index: int, result: Result) -> str:
        """Save the overlay of one image, and return its path in the directory of the table."""
        # Heatmaps may have other units than scores, as those of a cascade do. Scaled like this,
        # their own threshold is the middle of the colours.
        level = self._detector._map_threshold
        # A map may exceed the threshold although the score, which has other parts, does not.
        outline = None
        if result.label == "anomalous":
            outline = outline_level(result.heatmap, level) / level
        picture = overlay(
            self._source.decode(index),
            result.heatmap,
            threshold=self._threshold,
            pixel_threshold=level,
            score=result.score,
            outline=outline,
        )
        place = f"overlays/{self._names[index]}.png"
        with replacing(self._rows.path.parent / place) as temporary:
            picture.save(temporary, format="png")
        return place


def predict_to(
    output: Path,
    detector: DetectorMixin,
    source: ImageSource,
    *,
    maps: str | bool,
    skip: bool,
    resume: bool = False,
) -> Summary:
    """Write ``scores.csv`` and, if asked for, ``overlays/*.png`` into ``output``.

    Images are processed in chunks, so memory does not grow with their number. Whatever happens, the
    rows of the images that are done stay in ``scores.csv``. The detector is not changed. Overlays
    that an older ``scores.csv`` names are removed.

    Parameters
    ----------
    output : Path
        Directory; created if it does not exist.
    detector : DetectorMixin
        A fitted detector.
    source : ImageSource
        The images.
    maps : bool, "escalated" or "always"
        Which images get a picture: True means all, for a cascade those of its parameter ``maps``.
    skip : bool
        List images that cannot be used and go on. Otherwise the first one ends the run, after the
        images before it are written.
    resume : bool, default=False
        Leave out images that have a row already, and go on behind the last one.

    Returns
    -------
    Summary
    """
    wanted = getattr(detector, "maps", True) if maps is True else maps
    if maps:
        _check_colours(detector)
        make_directory(make_directory(output) / "overlays")
    # Unreadable images are handled here, where the rows of the others are kept.
    skipping = detector._with_options(on_error="skip", verbose=0)
    columns = (*COLUMNS, ROUTE if detector._routes else P_VALUE)
    summary = Summary()
    stale = set() if resume else _earlier_overlays(output)
    with (
        RowsFile(output / "scores.csv", columns, more=resume) as rows,
        tqdm(total=len(source), desc="predict", unit="image", leave=False, disable=None) as bar,
    ):
        writer = Writer(rows, detector, source)
        to_do = writer.still_to_do()
        summary.before = len(source) - len(to_do)
        bar.update(summary.before)
        try:
            for chunk in _chunks(source, to_do, 2 * detector.batch_size, by_pixels=bool(maps)):
                found = skipping.detect(source.take(chunk), maps=wanted)
                for index, result in zip(chunk, _results(found), strict=True):
                    if result.reason and not skip:
                        raise ImageError(_with_remedy(result.reason))
                    drawn = maps and result.heatmap is not None
                    picture = writer.overlay(index, result) if drawn else ""
                    writer.row(index, result, picture)
                    while stale:  # the older table is gone now
                        if (place := stale.pop()) != picture:
                            (output / place).unlink(missing_ok=True)
                    summary.add(result)
                    bar.update()
        except (AnomalibLiteError, KeyboardInterrupt) as error:
            kept = f" and kept in {rows.path}" if rows.n_rows else ""
            done = f"{rows.n_rows} of {len(source)} images are done{kept}."
            raise type(error)(f"{error} {done}".strip()) from error
    return summary


def _earlier_overlays(output: Path) -> set[str]:
    """Return the overlays that the table of an earlier run names; none if it cannot be read."""
    with contextlib.suppress(OSError, KeyError, TypeError, csv.Error, UnicodeDecodeError):
        with (output / "scores.csv").open(encoding="utf-8", newline="") as file:
            places = {unquoted(row["overlay"]) for row in csv.DictReader(file)}
        return {p for p in places if Path(p).parent == Path("overlays")}
    return set()


def _results(found: Detections) -> Iterator[Result]:
    """Yield the result of each image in turn."""
    reasons, routes = dict(found.skipped), getattr(found, "routes", None)
    for i, score in enumerate(found.scores):
        route = "" if routes is None else str(routes[i])
        p_value = None if found.p_values is None else float(found.p_values[i])
        if i in reasons:
            route = route and "skipped"
            yield Result(float(score), "skipped", reasons[i], route, None, p_value)
            continue
        label = "anomalous" if found.labels[i] else "normal"
        heatmap = None if found.maps is None else found.maps[i]
        yield Result(float(score), label, "", route, heatmap, p_value)


def _check_colours(detector: DetectorMixin) -> None:
    remedy = "Give one with --threshold, or go"
    for name, level in (
        ("threshold", detector.threshold_),
        ("threshold of its heatmaps", detector._map_threshold),
    ):
        if not (np.isfinite(level) and level > 0):
            raise InvalidValueError(
                f"predict: the colours of overlays are tied to the model's {name}, which must be "
                f"finite and above 0, got {level:g}. {remedy} without pictures with --no-overlays."
            )
        remedy = "Go"


def unique_names(paths: Sequence[Any]) -> list[str]:
    """Return a file name for each path: its stem, with the directory's name if stems are equal.

    Names that differ only in case count as equal, because some file systems ignore case.

    Examples
    --------
    >>> unique_names(["bent/0.png", "good/0.png", "good/0.JPG", "good/1.png"])
    ['bent-0', 'good-0', 'good-0-2', '1']
    """
    files = [Path(path) for path in paths]
    stems = Counter(file.stem.casefold() for file in files)
    names: dict[str, None] = {}  # in order
    taken: set[str] = set()
    for file in files:
        is_shared = stems[file.stem.casefold()] > 1
        # The parent of a bare file name is the current directory, which has no name.
        base = f"{file.parent.name or 'here'}-{file.stem}" if is_shared else file.stem
        name, n = base, 1
        while name.casefold() in taken:
            n += 1
            name = f"{base}-{n}"
        taken.add(name.casefold())
        names[name] = None
    return list(names)


def _chunks(
    source: ImageSource, to_do: Sequence[int], n_images: int, *, by_pixels: bool
) -> Iterator[list[int]]:
    """Yield positions of images, as many at once as ``n_images`` and their sizes allow."""
    chunk: list[int] = []
    pixels = 0
    for index in to_do:
        size = _pixels(source, index) if by_pixels else 0
        if chunk and (len(chunk) == n_images or pixels + size > _PIXELS_AT_ONCE):
            yield chunk
            chunk, pixels = [], 0
        chunk.append(index)
        pixels += size
    if chunk:
        yield chunk


def _pixels(source: ImageSource, index: int) -> int:
    """Return the number of pixels of an image; 0 if it cannot be read, which detect reports."""
    try:
        height, width = source.size(index)
    except AnomalibLiteError:
        return 0
    return height * width


def _with_remedy(reason: str) -> str:
    if "on_error" in reason:
        return reason
    return f"{reason} To go on without it, pass on_error='skip'."
