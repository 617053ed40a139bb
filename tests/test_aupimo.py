"""AUPIMO against its definition and against figures of its authors' code; AUPRO likewise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.metrics import PixelMetrics, aupimo, aupimo_scores, aupro, pixel_auroc

Images = tuple[np.ndarray, np.ndarray]


def hashed(n: int, seed: int) -> np.ndarray:
    """Return ``n`` numbers in [0, 1) that no version of a generator can change."""
    x = np.arange(n, dtype=np.uint64) + np.uint64(1 + 1000003 * seed)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def pictures(seed: int, shape: tuple[int, int, int], n_normal: int, levels: int, lift: float):
    """Return masks and maps; with ``levels``, scores are whole numbers, with many ties."""
    maps = hashed(math.prod(shape), seed).reshape(shape) ** 2
    masks = np.zeros(shape, bool)
    holes = hashed((shape[0] - n_normal) * 84, seed + 50).reshape(-1, 7, 12)
    masks[n_normal:, 2:9, 3:15] = holes < 0.7
    maps += lift * masks
    maps = np.floor(maps / maps.max() * levels) if levels else maps
    return masks, maps.astype(np.float32)


# Made with the authors' code as it stands in anomalib 2.7.0 (`anomalib.metrics.pimo.functional`),
# function `aupimo_scores` on `pictures(seed, (7, 20, 26), 4, levels, 0.4)`. Its grid of thresholds
# holds every score and the limits are rates that occur (counts of 2,080 normal pixels), so it is
# exact: `num_thresholds` is the number of whole numbers between the least and the greatest score.
AUTHORS = [
    (0, 64, (55, 609), [0.3641416452362701, 0.35043680148388623, 0.30598506046455737]),
    (1, 64, (44, 640), [0.2819625088920099, 0.34284501839303927, 0.4072438884521008]),
    (2, 500, (43, 624), [0.3440812374256202, 0.34380971148835826, 0.25860886738421573]),
    (3, 500, (41, 627), [0.39053376643509435, 0.35069675010481804, 0.26909691428021354]),
]
# The same on `pictures(seed, (14, 120, 150), 9, 0, 0.7)`, scores without ties, its default of
# 300,000 thresholds, and limits that are counts of 162,000. Two scores in one step of the grid
# give it a trapezoid for a step, so it is not exact.
AUTHORS_GRID = [
    (4, (16, 162), [0.40677966, 0.36842105, 0.40740741, 0.52542373, 0.5873015873]),
    (5, (16, 162), [0.46153846, 0.41818182, 0.45614035, 0.473684210526, 0.460595700661]),
]
# Made with `anomalib.metrics.aupro._AUPRO` (anomalib 2.7.0, which follows MVTec's evaluation code)
# on `pictures(seed, (7, 20, 26), 4, levels, 0.4)`; it sums in float32.
ANOMALIB_AUPRO = [
    (0, 64, 0.3, 0.5497105717658997),
    (1, 0, 0.3, 0.40899112820625305),
    (2, 500, 0.05, 0.20566287636756897),
    (3, 0, 0.05, 0.2905302941799164),
]


@pytest.mark.parametrize(("seed", "levels", "counts", "expected"), AUTHORS)
def test_equals_the_authors_code(seed: int, levels: int, counts, expected) -> None:
    masks, maps = pictures(seed, (7, 20, 26), 4, levels, 0.4)
    limits = (counts[0] / 2080, counts[1] / 2080)
    scores = aupimo_scores(masks, maps, limits)
    assert np.isnan(scores[:4]).all()
    assert scores[4:] == pytest.approx(expected, abs=1e-12)
    assert aupimo(masks, maps, limits) == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize(("seed", "counts", "expected"), AUTHORS_GRID)
def test_is_near_the_authors_code_where_that_has_a_grid(seed: int, counts, expected) -> None:
    masks, maps = pictures(seed, (14, 120, 150), 9, 0, 0.7)
    scores = aupimo_scores(masks, maps, (counts[0] / 162000, counts[1] / 162000))
    assert scores[9:] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("seed", "levels", "limit", "expected"), ANOMALIB_AUPRO)
def test_aupro_equals_that_of_anomalib(seed: int, levels: int, limit: float, expected) -> None:
    masks, maps = pictures(seed, (7, 20, 26), 4, levels, 0.4)
    assert aupro(masks, maps, limit) == pytest.approx(expected, abs=2e-7)


def naive_aupimo(masks, maps, limits: tuple[float, float]) -> np.ndarray:
    """AUPIMO from its definition: every threshold, then trapezoids over the logarithm of FPR."""
    low, high = np.log(limits)
    normal = [m for t, m in zip(masks, maps, strict=True) if t is None or not np.any(t)]
    thresholds = sorted({v for m in maps for v in np.ravel(m).tolist()}, reverse=True)
    rates = [float(np.mean([(m >= t).mean() for m in normal])) for t in thresholds]
    results = []
    for truth, amap in zip(masks, maps, strict=True):
        if truth is None or not np.any(truth):
            results.append(math.nan)
            continue
        recalls = [float((amap[truth != 0] >= t).mean()) for t in thresholds]
        points = [(-math.inf, 0.0)]
        points += [
            (math.log(f) if f else -math.inf, r) for f, r in zip(rates, recalls, strict=True)
        ]
        total = 0.0
        for (x0, y0), (x1, y1) in itertools.pairwise([*points, (math.inf, 1.0)]):
            start, end = max(x0, low), min(x1, high)
            if start < end:
                if math.isinf(x0):  # no line begins at the logarithm of 0
                    total += (end - start) * y0
                else:
                    slope = (y1 - y0) / (x1 - x0)
                    total += (end - start) * (y0 + slope * ((start + end) / 2 - x0))
        results.append(total / (high - low))
    return np.array(results)


@pytest.mark.parametrize("limits", [(1e-5, 1e-4), (0.01, 0.2), (0.3, 1.0), (1e-4, 1)])
@pytest.mark.parametrize("levels", [0, 3, 12])
@pytest.mark.parametrize("seed", range(3))
def test_equals_its_definition(seed: int, levels: int, limits: tuple[float, float]) -> None:
    masks, maps = pictures(seed, (6, 10, 16), 3, levels, 0.5)
    # Images of several sizes; far outside [0, 1]; a mask of None; one of a single pixel.
    all_masks = [None, *masks[1:], np.arange(30).reshape(5, 6) == 8, None]
    all_maps = [1e6 * m - 3e5 for m in (*maps, maps[0, :5, :6], maps[1, :7, :4])]
    found = aupimo_scores(all_masks, all_maps, limits)
    expected = naive_aupimo(all_masks, all_maps, limits)
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert np.isnan(found).sum() == 4


def test_each_normal_image_has_the_same_weight() -> None:
    mask, amap = np.ones((1, 2), int), np.array([[5.0, 3.0]])
    small, large = np.array([[4.0, 0, 0, 0]]), np.zeros((10, 10))
    # The score 4 is a rate of (1/4 + 0) / 2, not of 1 / 104: 1/8 is the middle of the limits.
    assert aupimo([mask, None, None], [amap, small, large], (1 / 16, 1 / 4)) == pytest.approx(0.75)
    assert aupimo([mask, None, None], [amap, small, large], (1 / 16, 1 / 8)) == pytest.approx(0.5)


def test_without_a_false_positive_the_recall_counts() -> None:
    mask, amap = np.array([[1, 1, 1, 1]]), np.array([[9.0, 8.0, 2.0, 1.0]])
    normal = np.array([[3.0, 0.0, 0.0]])
    # Three pixels have no rate between 0 and 1/3.
    assert aupimo([mask, None], [amap, normal]) == 0.5
    # A tie with the highest normal score is found only with that false positive.
    assert aupimo([mask, None], [np.minimum(amap, 3), normal]) == 0.0


def test_extremes() -> None:
    masks, maps = pictures(0, (5, 12, 20), 2, 0, 0.0)
    assert aupimo(masks, masks.astype(np.float32)) == 1.0
    assert aupimo(masks, -masks.astype(np.float32)) == 0.0
    assert aupimo(masks, np.full_like(maps, 7.0)) == 0.0
    with_infinity = np.where(masks, np.inf, maps)
    assert aupimo(masks, with_infinity) == 1.0
    stretched = np.exp(maps.astype(np.float64)) * 1e5
    assert aupimo_scores(masks, stretched, (0.01, 0.5)) == pytest.approx(
        aupimo_scores(masks, maps, (0.01, 0.5)), nan_ok=True, abs=1e-12
    )


def test_is_nan_without_normal_or_anomalous_images() -> None:
    amap = np.arange(6.0).reshape(2, 3)
    assert math.isnan(aupimo([None], [amap]))
    assert math.isnan(aupimo([np.ones((2, 3), int)], [amap]))
    assert np.isnan(aupimo_scores([np.ones((2, 3), int)], [amap])).all()


@pytest.mark.parametrize("limits", [(0, 1e-4), (1e-4, 1e-5), (1e-4, 1e-4), (0.1, 1.1), (1e-5, "1")])
def test_refuses_limits_that_are_no_range(limits) -> None:
    with pytest.raises(InvalidValueError, match="aupimo: fpr_limits"):
        aupimo([None], [np.zeros((2, 2))], limits)


def test_refuses_what_is_no_map() -> None:
    with pytest.raises(InvalidTypeError, match="aupimo_scores: fpr_limits must be a pair"):
        aupimo_scores([None], [np.zeros((2, 2))], 0.3)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match=r"aupimo: maps\[0\] must not be NaN"):
        aupimo([None], [np.array([[0, np.nan]])])
    with pytest.raises(InvalidValueError, match="equally many, got 1 and 2"):
        aupimo([None], np.zeros((2, 2, 2)))
    with pytest.raises(InvalidTypeError, match="bool or integer"):
        aupimo([np.full((1, 2), 0.5)], [np.zeros((1, 2))])


def test_ignored_pixels_count_neither_as_normal_nor_as_anomalous() -> None:
    random = np.random.default_rng(0)
    maps = random.random((4, 12, 20)).astype(np.float32)
    masks = np.zeros((4, 12, 20), np.uint8)
    masks[2:, 3:6, 4:9] = 1
    limits = (1e-2, 0.3)
    expected = aupimo_scores(list(masks[:, :, :15]), list(maps[:, :, :15]), limits)
    hidden = np.zeros(masks.shape, bool)
    hidden[:, :, 15:] = True
    ignoring = list(np.ma.masked_array(masks, hidden))
    maps[:, :, 15:] = 5  # the highest scores
    np.testing.assert_allclose(aupimo_scores(ignoring, list(maps), limits), expected)
    streamed = PixelMetrics(fpr_limits=limits).update(ignoring, maps).compute()
    assert streamed["aupimo"] == pytest.approx(np.nanmean(expected))
    for name, metric in (("pixel_auroc", pixel_auroc), ("aupro", aupro)):
        cut = metric(list(masks[:, :, :15]), list(maps[:, :, :15]))
        assert metric(ignoring, list(maps)) == pytest.approx(cut)
        assert streamed[name] == pytest.approx(cut)
    nothing = np.ma.masked_array(masks[0], True)
    more = aupimo_scores([*ignoring, nothing], [*maps, maps[0]], limits)
    np.testing.assert_allclose(more[:4], expected)
