"""A sweep as a picture and as a file: what is drawn is what was found, and nothing is cut off."""

from __future__ import annotations

import csv
import importlib.util
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from anomalib_lite.cascade.routing import Routing
from anomalib_lite.cascade.sweep import Sweep, sweep_routings
from anomalib_lite.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingDependencyError,
    OutputError,
)

GATE_MS, DETECTOR_MS = 3.0, 40.0


def sweep(
    seed: int = 0, lows: tuple[float, ...] = (0.01, 0.1, 0.2, 0.3, 0.5), n: int = 60
) -> Sweep:
    """Of a gate that is unsure of a few, and a heatmap model that is good."""
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1], n)
    p = 1 / (1 + np.exp(-(rng.normal(0, 1.5, 2 * n) + 2 * y - 1)))
    s = rng.gamma(4, 2, 2 * n) + 12 * y
    pairs = [Routing(low, high, 14.0, 5.0) for low in lows for high in (0.5, 0.9, 1.0)]
    alone = Routing(0.0, 1.0, 14.0, 5.0)
    return sweep_routings(pairs, p, s, y, gate_ms=GATE_MS, detector_ms=DETECTOR_MS, alone=alone)


def boxes_of(ax: Any) -> list[Any]:
    """Of the labels and the legend, in pixels."""
    return [text.get_window_extent() for text in (*ax.texts, ax.get_legend())]


def drawn_to_the_edge(figure: Any) -> bool:
    """Whether anything but white touches the picture's edge: then something is cut off."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    pixels = np.asarray(Image.open(file).convert("RGB"))
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    return any((edge != 255).any() for edge in edges)


# --- What a sweep says ----------------------------------------------------------------------


def test_alone_is_the_heatmap_model_without_a_gate() -> None:
    table = sweep()
    assert table.alone is not None
    assert table.alone["heatmap_call_rate"] == 1
    assert table.alone["recall_lost"] == 0
    assert table.alone["ms_per_image"] == table.detector_ms == DETECTOR_MS
    assert "pareto" not in table.alone
    rng = np.random.default_rng(0)
    rng.normal(0, 1.5, 120)  # the gate's
    s = rng.gamma(4, 2, 120) + 12 * np.repeat([0, 1], 60)
    assert table.alone["recall"] == np.mean(s[60:] > 14)
    assert table.alone["false_alarm_rate"] == np.mean(s[:60] > 14)


# --- The picture ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_is_what_was_found(seed: int) -> None:
    table = sweep(seed)
    ax = table.plot()
    dots = ax.collections[0].get_offsets()
    expected = [(row["heatmap_call_rate"], row["recall"]) for row in table.rows]
    np.testing.assert_array_equal(dots, expected)
    front, alone = ax.get_lines()
    np.testing.assert_array_equal(
        np.transpose(front.get_data()),
        [(row["heatmap_call_rate"], row["recall"]) for row in table.pareto],
    )
    assert table.alone is not None
    assert set(np.atleast_1d(alone.get_ydata())) == {table.alone["recall"]}
    said = {f"{row['t_low']:.3g} / {row['t_high']:.3g}": row for row in table.pareto}
    assert len(ax.texts) >= 2
    for text in ax.texts:
        row = said[text.get_text()]
        assert text.xy == (row["heatmap_call_rate"], row["recall"])
    low, high = ax.get_xlim()
    assert low < 0
    assert high > 1
    [scale] = ax.child_axes
    ends = np.array([0.0, 1.0])
    assert scale.get_xlim() == pytest.approx((GATE_MS + low * 40, GATE_MS + high * 40))
    assert scale._functions[0](ends).tolist() == [3, 43]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lows", [(0.1,), (0.01, 0.1, 0.3), tuple(np.linspace(0.01, 0.5, 30))])
def test_no_label_meets_another_nor_a_point_nor_an_edge(seed: int, lows: Any) -> None:
    table = sweep(seed, lows)
    ax = table.plot()
    assert not drawn_to_the_edge(ax.figure)
    boxes = boxes_of(ax)
    assert 2 <= len(boxes) <= 7
    pixels = ax.transData.transform([(r["heatmap_call_rate"], r["recall"]) for r in table.rows])
    frame = ax.get_window_extent()
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert frame.x0 < box.x0 < box.x1 < frame.x1
        assert frame.y0 < box.y0 < box.y1 < frame.y1
        if i < len(boxes) - 1:
            assert box.count_contains(pixels) == 0


def test_a_flat_front_and_a_recall_of_one_look_right() -> None:
    y = np.repeat([0, 1], 10)
    p = y.astype(float)
    table = sweep_routings(
        [Routing(0.1, 0.9, 5.0, 1.0), Routing(0.2, 0.8, 5.0, 1.0)],
        *(p, 9 * p, y),
        gate_ms=1,
        detector_ms=0,
    )
    ax = table.plot()
    assert [text.get_text() for text in ax.texts] == ["0.1 / 0.9"]  # of equal points one
    assert ax.get_ylim()[1] > 1
    assert max(ax.get_yticks()) <= 1
    assert ax.child_axes == []  # one time for all: nothing to put on a scale
    assert len(ax.get_lines()) == 1  # nor is there a model to compare with
    assert not drawn_to_the_edge(ax.figure)


def test_draws_where_it_is_told_and_leaves_matplotlib_alone() -> None:
    before = list(dict.items(mpl.rcParams))  # as it lies there: to look up a backend chooses one
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.add_subplot(), right.add_subplot()
    for seed, ax in enumerate(axes):
        assert sweep(seed).plot(ax) is ax
    assert sweep().plot(ax=None).figure is not figure
    assert not drawn_to_the_edge(figure)
    assert list(dict.items(mpl.rcParams)) == before


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    y = np.zeros(4, int)
    pairs = [Routing(0.1, 0.9, 5.0, 1.0)]
    normal = sweep_routings(pairs, y / 2, y / 2, y, gate_ms=1, detector_ms=2)
    with pytest.raises(InvalidValueError, match=r"^Sweep\.plot: .*Sweep images of both classes"):
        normal.plot()
    polar = Figure().add_subplot(projection="polar")
    for wrong in (Figure(), "ax", polar):
        with pytest.raises(InvalidTypeError, match=r"ax must be plain axes .*plt\.subplots\(\)"):
            sweep().plot(wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'anomalib-lite\[plot\]'"):
        sweep().plot()


# --- The file -------------------------------------------------------------------------------


def test_the_file_has_all_rows_to_the_last_digit(tmp_path: Path) -> None:
    table = sweep()
    table.rows[0]["auroc"] = float("nan")
    path = tmp_path / "sweep.csv"
    path.write_text("older")
    table.to_csv(path)
    rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    assert len(rows) == len(table.rows)
    assert rows[0].pop("auroc") == ""
    table.rows[0].pop("auroc")
    for row, expected in zip(rows, table.rows, strict=True):
        for name in ("pareto", "keeps_rate"):
            assert row.pop(name) == str(expected.pop(name))
        assert {name: float(value) for name, value in row.items()} == expected
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.csv"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "sweep.csv"):
        with pytest.raises(OutputError, match=r"^Sweep: cannot write .*Choose a directory"):
            sweep().to_csv(path)
