"""Any number of images through a fitted detector: a table of scores, and pictures."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from anomalib_lite._files import RowsFile, make_directory, shortest, writing
from anomalib_lite.cascade import CascadeDetections, GatedCascade
from anomalib_lite.detectors import BaseDetector, Detections
from anomalib_lite.errors import AnomalibLiteError, ImageError, InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.plotting import overlay

COLUMNS = ("path", "score", "label", "threshold", "reason", "overlay")
ROUTE = "route"  # one more, of a cascade

# Heatmaps held at once, as a number of pixels: 256 MiB of float32, whatever the images' size.
_PIXELS_AT_ONCE = 1 << 26


@dataclass
class Summary:
    """How many images were called what, of a cascade by whom, and which were left out and why."""

    counts: Counter[str] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)

    def add(self, found: Detections, i: int, reason: str | None) -> None:
        """Count the i-th image of a chunk."""
        self.counts[_label(found, i, reason)] += 1
        if reason is not None:
            self.skipped.append(reason)
        elif isinstance(found, CascadeDetections):
            self.routes[str(found.routes[i])] += 1


def predict_to(
    output: Path,
    detector: BaseDetector | GatedCascade,
    source: ImageSource,
    *,
    maps: str | bool,
    skip: bool,
) -> Summary:
    """Write ``scores.csv`` and, if asked for, ``overlays/*.png`` into ``output``.

    ``maps`` says which images get a picture: all or none; of a cascade "escalated" or "always",
    True for what its own ``maps`` says.

    Images pass in chunks, so memory does not grow with their number. Whatever happens on the
    way, the rows of the images that are done stay in ``scores.csv``. Without ``skip`` the first
    image that cannot be used ends all, once those before it are written.
    """
    is_cascade = isinstance(detector, GatedCascade)
    wanted = detector.maps if isinstance(detector, GatedCascade) and maps is True else maps
    overlays = bool(maps)
    if overlays:
        _check_colours(detector)
    pictures = make_directory(make_directory(output) / "overlays") if overlays else None
    # Broken images are handled here, where the rows of the others are kept.
    for member in (detector, *detector._members().values()):
        member.on_error, member.verbose = "skip", 0
    # Of a cascade, too, the threshold is the middle of the colours: only the units differ.
    in_units = detector.threshold_ / detector._map_threshold if overlays else 1.0
    names = unique_names(source.items)
    summary = Summary()
    with (
        RowsFile(output / "scores.csv", (*COLUMNS, *[ROUTE] * is_cascade)) as rows,
        tqdm(total=len(source), desc="predict", unit="image", leave=False, disable=None) as bar,
    ):
        try:
            for chunk in _chunks(source, 2 * detector.batch_size, by_pixels=overlays):
                part = source.take(chunk)
                found = detector.detect(part, maps=wanted)  # type: ignore[arg-type]
                reasons = dict(found.skipped)
                for i, index in enumerate(chunk):
                    reason = reasons.get(i)
                    if reason is not None and not skip:
                        raise ImageError(_with_remedy(reason))
                    drawn = pictures and found.maps[i] is not None
                    place = f"overlays/{names[index]}.png" if drawn else ""
                    if place:
                        heatmap = found.maps[i] * in_units
                        _save_overlay(output / place, part, i, found, heatmap, detector.threshold_)
                    rows.write(_row(part.names[i], found, i, detector.threshold_, reason, place))
                    summary.add(found, i, reason)
                    bar.update()
        except (AnomalibLiteError, KeyboardInterrupt) as error:
            kept = f" and kept in {rows.path}" if rows.n_rows else ""
            done = f"{rows.n_rows} of {len(source)} images are done{kept}."
            raise type(error)(f"{error} {done}".strip()) from error
    return summary


def _check_colours(detector: BaseDetector | GatedCascade) -> None:
    levels = {"threshold": detector.threshold_}
    remedy = "Give one with --threshold, or go"
    if isinstance(detector, GatedCascade):
        levels |= {"threshold of its heatmap model": detector._map_threshold}
    for name, level in levels.items():
        if not (np.isfinite(level) and level > 0):
            raise InvalidValueError(
                f"predict: the colours of overlays are tied to the model's {name}, which must be "
                f"finite and above 0, got {level:g}. {remedy} without pictures with --no-overlays."
            )
        remedy = "Go"


def unique_names(paths: Sequence[Any]) -> list[str]:
    """A file name for each path: its stem, with the directory's name where stems clash.

    Case counts for nothing, since some file systems do not know it.

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
        clashes = stems[file.stem.casefold()] > 1
        # The parent of a bare file name is the current directory, which has no name.
        base = f"{file.parent.name or 'here'}-{file.stem}" if clashes else file.stem
        name, n = base, 1
        while name.casefold() in taken:
            n += 1
            name = f"{base}-{n}"
        taken.add(name.casefold())
        names[name] = None
    return list(names)


def _chunks(source: ImageSource, n_images: int, *, by_pixels: bool) -> Iterator[list[int]]:
    """Positions of the images, as many at once as the number and their sizes allow."""
    chunk: list[int] = []
    pixels = 0
    for index, path in enumerate(source.items):
        size = _pixels(path) if by_pixels else 0
        if chunk and (len(chunk) == n_images or pixels + size > _PIXELS_AT_ONCE):
            yield chunk
            chunk, pixels = [], 0
        chunk.append(index)
        pixels += size
    yield chunk


def _pixels(path: Any) -> int:
    """Pixels of an image file, from its header; 0 if it cannot be read, which others report."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.width * image.height
    except Image.DecompressionBombError:
        return _PIXELS_AT_ONCE
    except Exception:  # PIL's decoders raise all kinds on broken files
        return 0


def _save_overlay(
    path: Path, part: ImageSource, i: int, found: Detections, heatmap: Any, threshold: float
) -> None:
    # A map may rise above the threshold where the score, of other things too, does not.
    outline = 1.0 if found.labels[i] else None
    score = float(found.scores[i])
    picture = overlay(part.decode(i), heatmap, threshold=threshold, score=score, outline=outline)
    with writing(path):
        picture.save(path)


def _row(
    name: str, found: Detections, i: int, threshold: float, reason: str | None, place: str
) -> tuple[str, ...]:
    """One line of the table, in the order of ``COLUMNS``."""
    score = "" if reason else shortest(found.scores[i])
    row = name, score, _label(found, i, reason), shortest(threshold), reason or "", place
    if isinstance(found, CascadeDetections):
        return *row, "skipped" if reason else str(found.routes[i])
    return row


def _label(found: Detections, i: int, reason: str | None) -> str:
    if reason is not None:
        return "skipped"
    return "anomalous" if found.labels[i] else "normal"


def _with_remedy(reason: str) -> str:
    if "on_error" in reason:
        return reason
    return f"{reason} To go on without it, pass on_error='skip'."
