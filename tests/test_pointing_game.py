"""The pointing game against a naive version, and its rule for ties."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.datasets import NEUDET
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.metrics import pointing_game


def naive(boxes, maps, tolerance: float) -> float:
    """Draw every box, and measure the distance of every maximum to every pixel of the drawing."""
    hits = []
    for corners, amap in zip(boxes, maps, strict=True):
        drawing = np.zeros(amap.shape, bool)
        for x_min, y_min, x_max, y_max in corners:
            drawing[y_min:y_max, x_min:x_max] = True
        ys, xs = np.nonzero(drawing)
        if ys.size:
            maxima = np.argwhere(amap == amap.max())
            nearest = [min(np.hypot(ys - y, xs - x)) for y, x in maxima]
            hits.append(max(nearest) <= tolerance)
    return float(np.mean(hits))


@pytest.mark.parametrize("tolerance", [0, 1, 2.5, 6])
@pytest.mark.parametrize("levels", [6, 1000])
def test_equals_its_definition(levels: int, tolerance: float) -> None:
    rng = np.random.default_rng(levels)
    boxes, maps = [], []
    for _ in range(60):
        height, width = rng.integers(9, 24, 2)
        maps.append(rng.integers(0, levels, (height, width)))
        starts = rng.integers(0, (width - 6, height - 6), (rng.integers(0, 4), 2))
        boxes.append(np.hstack([starts, starts + rng.integers(1, 6, starts.shape)]))
    assert pointing_game(boxes, maps, tolerance=tolerance) == naive(boxes, maps, tolerance)


def test_the_ends_of_a_box_are_outside() -> None:
    box = [[[3, 2, 5, 6]]]  # columns 3 and 4, rows 2 to 5
    for y, x, hit in [(2, 3, 1), (5, 4, 1), (6, 4, 0), (5, 5, 0), (1, 3, 0), (2, 2, 0)]:
        amap = np.zeros((8, 11))
        amap[y, x] = 1
        assert pointing_game(box, [amap]) == hit
        assert pointing_game(box, [amap], tolerance=1) == 1


def test_all_maxima_must_be_hits() -> None:
    amap = np.zeros((8, 11))
    amap[2, 3] = amap[6, 9] = np.inf
    assert pointing_game([[[3, 2, 5, 6]]], [amap]) == 0
    assert pointing_game([[[3, 2, 5, 6], [9, 6, 10, 7]]], [amap]) == 1
    assert pointing_game([[[3, 2, 5, 6]]], [np.ones((8, 11))]) == 0
    assert pointing_game([[[0, 0, 11, 8]]], [np.ones((8, 11))]) == 1


def test_images_without_boxes_are_not_counted() -> None:
    amap = np.eye(5)
    amap[2, 2] = 2
    assert pointing_game([None, np.empty((0, 4)), [[2, 2, 3, 3]]], [amap] * 3) == 1
    assert math.isnan(pointing_game([None, []], [amap] * 2))


def test_takes_the_boxes_of_neu_det(tmp_path: Path) -> None:
    (tmp_path / "IMAGES").mkdir()
    (tmp_path / "ANNOTATIONS").mkdir()
    Image.new("L", (40, 30)).save(tmp_path / "IMAGES/patches_1.png")
    (tmp_path / "ANNOTATIONS/patches_1.xml").write_text(
        "<annotation><size><width>40</width><height>30</height></size><object><bndbox>"
        "<xmin>11</xmin><ymin>5</ymin><xmax>20</xmax><ymax>9</ymax></bndbox></object></annotation>"
    )
    ds = NEUDET(tmp_path)
    boxes = [ds.boxes[sample.path] for sample in ds.test]
    amap = np.zeros((30, 40))
    amap[8, 19] = 1  # the last pixel, which the format counts as (9, 20)
    assert pointing_game(boxes, [amap]) == 1
    assert pointing_game(boxes, [np.roll(amap, 1, axis=0)]) == 0


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 1, 1]], r"boxes\[0\] must have shape \(n, 4\), got \(4,\). A single box"),
        ([[[2, 2, 2, 4]]], r"boxes\[0\] must hold boxes x_min < x_max"),
        ([[[0, 0, 2, 9]]], r"inside the map of 8 x 11 pixels \(H x W\), got \[0.*9"),
        ([[[-1, 0, 2, 3]]], "inside the map"),
        ([[[np.nan, 0, 2, 3]]], "inside the map"),
        ([], "boxes and maps must be equally many, got 0 and 1"),
    ],
)
def test_refuses_wrong_boxes(boxes, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        pointing_game(boxes, [np.zeros((8, 11))])


def test_refuses_what_is_not_a_number() -> None:
    box, amap = [[[0, 0, 1, 1]]], np.zeros((8, 11))
    with pytest.raises(InvalidTypeError, match=r"boxes\[0\] must hold real numbers"):
        pointing_game([[["a", "b", "c", "d"]]], [amap])
    with pytest.raises(InvalidTypeError, match=r"boxes\[0\] must be an array of shape \(n, 4\)"):
        pointing_game([[[0, 0, 1, 1], [0, 0]]], [amap])
    with pytest.raises(InvalidTypeError, match=r"boxes must be a list of \(n, 4\) arrays"):
        pointing_game(3, [amap])  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match=r"maps\[0\] must not be NaN"):
        pointing_game(box, [amap * np.nan])
    with pytest.raises(InvalidValueError, match="tolerance must be a number"):
        pointing_game(box, [amap], tolerance=-1)
