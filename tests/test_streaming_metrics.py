"""Pixel metrics in bounded memory against those that hold all maps, and their bounds."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.metrics import PixelMetrics, aupimo, pixel_f1_max, pixel_metrics

NAMES = {"pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "aupimo"}
RATES = (0.01, 0.2)  # such small images have no rates of 1e-5


def exact(masks, maps) -> dict[str, float]:
    return {
        **pixel_metrics(masks, maps, fpr_limit=0.3),
        "pixel_f1_max": pixel_f1_max(masks, maps),
        "aupimo": aupimo(masks, maps, RATES),
    }


def images(seed: int, kind: str):
    """Return images of several sizes: three defective ones, one of a single pixel, three good."""
    rng = np.random.default_rng(seed)
    masks, maps = [], []
    for index, size in enumerate([(30, 44), (51, 20), (36, 36), (9, 70), (44, 31), (20, 50)]):
        mask = rng.random(size) < 0.1 * (index < 3)
        mask[4, 5] |= index == 3
        amap = rng.normal(size=size) + 1.5 * mask
        maps.append(KINDS[kind](amap).astype(np.float32))
        masks.append(mask if index < 4 else None)
    return masks, maps


KINDS = {
    "normal": lambda x: x,
    "ties": lambda x: np.round(x * 2) / 2,
    "far": lambda x: 1000 + x,
    "positive": lambda x: 3 + np.tanh(x),
    "many powers of two": lambda x: np.exp(8 * x),
    "negative": lambda x: -np.exp(-x),
    "constant": lambda x: np.full_like(x, -3.5),
    "infinite": lambda x: np.where(x > 2, np.inf, np.where(x < -2, -np.inf, x)),
}


@pytest.mark.parametrize("kind", ["ties", "far", "positive", "constant"])
@pytest.mark.parametrize("seed", range(3))
def test_is_exact_with_a_bin_for_each_value(seed: int, kind: str) -> None:
    masks, maps = images(seed, kind)
    found = PixelMetrics(fpr_limits=RATES).update(masks, maps)
    expected = exact(masks, maps)
    assert set(expected) == NAMES
    assert found.compute() == pytest.approx(expected, abs=1e-12)
    assert found.bounds() == {name: (v, v) for name, v in found.compute().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", ["12MB", "50MB"])
def test_bounds_hold_the_exact_value(kind: str, budget: str) -> None:
    masks, maps = images(1, kind)
    found = PixelMetrics(fpr_limits=RATES, memory_budget=budget).update(masks, maps)
    computed, expected = found.compute(), exact(masks, maps)
    for name, (low, high) in found.bounds().items():
        assert low - 1e-12 <= expected[name] <= high + 1e-12
        assert low - 1e-12 <= computed[name] <= high + 1e-12
        assert high - low < 0.05


def test_bounds_hold_where_bins_are_coarse() -> None:
    """Scores that differ in their last bits alone, so that a few bins hold them all."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        masks = [rng.random((12, 17)) < 0.2, rng.random((12, 17)) < 0.1, None]
        offset = np.float32(2.0) ** rng.integers(-20, 20, (3, 12, 17))
        maps = offset * (1 + rng.integers(0, 6, (3, 12, 17)) * np.float32(2.0**-23))
        found = PixelMetrics(fpr_limits=RATES, memory_budget="12MB")
        found.update(masks, maps.astype(np.float32))
        assert found._shift >= 1
        bounds, expected = found.bounds(), exact(masks, maps.astype(np.float32))
        for name, (low, high) in bounds.items():
            assert low - 1e-12 <= expected[name] <= high + 1e-12
        assert bounds["pixel_auroc"][0] < bounds["pixel_auroc"][1]


def test_true_ties_do_not_widen_the_bounds() -> None:
    """Scores of many powers of two, each far from the next, and many zeros."""
    masks, maps = images(0, "normal")
    coarse = [np.float32(2) ** np.round(20 * m) * (m > 0) for m in maps]
    found = PixelMetrics(fpr_limits=RATES, memory_budget="12MB")
    for mask, amap in zip(masks, coarse, strict=True):  # some before, some after a fold
        found.update([mask], [amap])
    assert found._shift >= 1
    for name, bounds in found.bounds().items():
        assert bounds == pytest.approx((exact(masks, coarse)[name],) * 2, abs=1e-12)


def test_a_smaller_budget_is_less_exact_and_still_near() -> None:
    masks, maps = images(0, "normal")
    widths = []
    for budget in ("400MB", "100MB", "12MB"):
        found = PixelMetrics(memory_budget=budget, fpr_limits=RATES).update(masks, maps)
        low, high = found.bounds()["pixel_auroc"]
        widths.append(high - low)
        assert found.compute()["pixel_auroc"] == pytest.approx(
            exact(masks, maps)["pixel_auroc"], abs=1e-4
        )
    assert widths[0] <= widths[1] < widths[2] < 1e-2


def test_the_order_and_the_portions_of_images_change_nothing() -> None:
    masks, maps = images(2, "normal")
    whole = PixelMetrics(fpr_limits=RATES, memory_budget="20MB").update(masks, maps)
    parts = PixelMetrics(fpr_limits=RATES, memory_budget="20MB")
    for index in (5, 1, 4, 0, 3, 2):
        assert parts.update([masks[index]], (m for m in maps[index : index + 1])) is parts
    assert parts.compute() == pytest.approx(whole.compute(), abs=1e-12)
    assert parts.bounds()["aupro"] == pytest.approx(whole.bounds()["aupro"], abs=1e-12)


def test_compute_may_come_between_updates() -> None:
    masks, maps = images(0, "ties")
    found = PixelMetrics(fpr_limits=RATES).update(masks[:5], maps[:5])
    assert found.compute() == pytest.approx(exact(masks[:5], maps[:5]), abs=1e-12)
    found.update(masks[5:], maps[5:])
    assert found.compute() == pytest.approx(exact(masks, maps), abs=1e-12)


def test_negative_zero_equals_zero() -> None:
    mask = [np.array([[1, 0]])]
    assert PixelMetrics().update(mask, [np.array([[0.0, -0.0]], np.float32)]).compute()[
        "pixel_auroc"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [np.float16, np.uint8, np.int64, np.float64])
def test_takes_other_types_that_hold_float32_values(dtype: type) -> None:
    masks, maps = images(0, "ties")
    whole = [np.abs(np.round(2 * m)) for m in maps]
    expected = PixelMetrics(fpr_limits=RATES).update(masks, whole).compute()
    typed = [m.astype(dtype) for m in whole]
    assert PixelMetrics(fpr_limits=RATES).update(masks, typed).compute() == expected


def test_maps_in_a_file_are_read_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape = (60, 128, 160)
    file = np.lib.format.open_memmap(tmp_path / "maps.npy", "w+", np.float32, shape)
    file[:] = 1 + rng.random(shape, dtype=np.float32)
    file.flush()
    masks = [None] * 58 + [np.arange(128 * 160).reshape(128, 160) < 900] * 2
    tracemalloc.start()
    found = PixelMetrics(memory_budget="12MB").update(masks, np.load(file.filename, mmap_mode="r"))
    result = found.compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The maps have 4.9 MB, one of them 80 kB: the table, 10 MB, and ten times one map.
    assert peak < 22e6 + 10 * 4 * 128 * 160
    assert result["pixel_auroc"] == pytest.approx(
        pixel_metrics(masks, list(file))["pixel_auroc"], abs=1e-5
    )


# VmHWM is the peak of this program. ru_maxrss is not: a child begins with its parent's peak.
SCALED = """
import numpy as np
from anomalib_lite.metrics import PixelMetrics, pixel_metrics
def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = resident("VmRSS")
rng = np.random.default_rng(0)
mask = np.zeros((512, 512), bool)
mask[100:160, 200:260] = True
def maps():
    for i in range(100):
        yield rng.normal(size=(512, 512)).astype(np.float32) + np.float32(2 * (i < 20)) * mask
masks = [mask] * 20 + [None] * 80
found = PixelMetrics(memory_budget="32MB").update(masks, maps())
found.compute(), found.bounds()
print(resident("VmHWM") - before)
pixel_metrics(masks, list(maps()))
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_process_needs_no_memory_for_the_maps() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCALED], check=True, capture_output=True, text=True
    )
    # 100 maps have 105 MB; the table 32 MB, and one map and its temporary arrays about 15 MB.
    bounded, whole = (int(word) for word in result.stdout.split())
    assert 5e6 < bounded < 70e6
    assert whole > 105e6, "what holds all maps would be seen"


def test_an_image_that_is_ignored_as_a_whole_has_no_pixels() -> None:
    masks, maps = images(0, "ties")
    hidden = np.ma.MaskedArray(np.zeros((20, 30), bool), mask=True)
    amap = np.linspace(-1e30, 1e30, 600, dtype=np.float32).reshape(20, 30)
    alone = PixelMetrics().update([hidden], [amap])
    assert all(math.isnan(value) for value in alone.compute().values())
    assert all(math.isnan(v) for pair in alone.bounds().values() for v in pair)
    expected = PixelMetrics(fpr_limits=RATES, memory_budget="12MB").update(masks, maps)
    found = PixelMetrics(fpr_limits=RATES, memory_budget="12MB")
    found.update([*masks, hidden], [*maps, amap])
    assert found.compute() == expected.compute()
    assert found.bounds() == expected.bounds(), "scores that do not count take no room"


def test_is_nan_where_a_class_is_missing() -> None:
    amap = [np.arange(6, dtype=np.float32).reshape(2, 3)]
    for mask in (None, np.zeros((2, 3), int), np.ones((2, 3), int)):
        found = PixelMetrics().update([mask], amap)
        assert set(found.compute()) == NAMES
        assert all(math.isnan(v) for v in found.compute().values())
        assert all(math.isnan(v) for pair in found.bounds().values() for v in pair)
    without_normal = PixelMetrics().update([np.eye(2, 3, dtype=int)], amap).compute()
    assert [name for name, v in without_normal.items() if math.isnan(v)] == ["aupimo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fpr_limit": 0}, "fpr_limit must be a number"),
        ({"fpr_limits": (0.1, 0.01)}, "fpr_limits must increase"),
        ({"memory_budget": "1MB"}, "memory_budget must be at least 12MB, got '1MB'"),
        ({"memory_budget": "much"}, "memory_budget must be a number of bytes"),
    ],
)
def test_refuses_wrong_parameters(arguments, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        PixelMetrics(**arguments)


def test_refuses_wrong_images() -> None:
    found, amap = PixelMetrics(), np.zeros((2, 3), np.float32)
    with pytest.raises(InvalidValueError, match="update must be called with at least one image"):
        found.compute()
    with pytest.raises(InvalidValueError, match="update must be called"):
        found.bounds()
    with pytest.raises(InvalidValueError, match="equally many, got 1 masks and more maps"):
        found.update([None], [amap, amap])
    with pytest.raises(InvalidValueError, match="equally many, got 0 maps and more masks"):
        found.update([None], [])
    with pytest.raises(InvalidTypeError, match=r"maps\[0\] must hold float32 values, got float64"):
        found.update([None], [np.full((2, 3), 0.1)])
    with pytest.raises(InvalidValueError, match=r"maps\[1\] must not be NaN"):
        found.update([None, None], [amap, amap * np.nan])
    with pytest.raises(InvalidValueError, match=r"must have one shape \(H, W\)"):
        found.update([np.zeros((3, 2), bool)], [amap])
    with pytest.raises(InvalidTypeError, match="maps must be an iterable"):
        found.update([None], 3)  # type: ignore[arg-type]
