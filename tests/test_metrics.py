"""Metrics against scikit-learn and against naive versions of their definitions."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_recall_curve,
    roc_auc_score,
)

from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.metrics import (
    _ranking,
    aupro,
    auroc,
    average_precision,
    f1_max,
    fpr_at_tpr,
    pixel_auroc,
    pixel_average_precision,
    pixel_f1_max,
    pixel_metrics,
    rate,
    seg_f1,
)

SIZES = [(9, 14), (17, 6), (12, 12), (5, 23)]


def image_scores(seed: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.random(60) < 0.3
    scores = rng.normal(size=60) + y
    return y.astype(int), np.round(scores * 2) / 2 if ties else scores


def pixel_scores(seed: int, *, ties: bool) -> tuple[list[np.ndarray | None], list[np.ndarray]]:
    """Images of several sizes, all but one not square; the last two are good images."""
    rng = np.random.default_rng(seed)
    masks: list[np.ndarray | None] = []
    maps = []
    for index, size in enumerate(SIZES):
        mask = rng.random(size) < 0.12
        amap = rng.normal(size=size) + 1.5 * mask
        maps.append((np.round(amap * 2) / 2 if ties else amap).astype(np.float32))
        masks.append(None if index == 2 else mask & (index < 2))
    return masks, maps


def as_truths(masks: list[np.ndarray | None], maps: list[np.ndarray]) -> list[np.ndarray]:
    pairs = zip(masks, maps, strict=True)
    return [np.zeros(a.shape, bool) if m is None else m != 0 for m, a in pairs]


def naive_aupro(masks: list[np.ndarray | None], maps: list[np.ndarray], limit: float) -> float:
    """AUPRO from its definition: every threshold, every region, then the trapezoids."""
    truths = as_truths(masks, maps)
    points = [(0.0, 0.0)]
    for threshold in sorted({v for a in maps for v in a.ravel().tolist()}, reverse=True):
        overlaps, false, normal = [], 0, 0
        for truth, amap in zip(truths, maps, strict=True):
            hit = amap >= threshold
            labels, n = ndimage.label(truth, structure=[[1, 1, 1], [1, 1, 1], [1, 1, 1]])
            overlaps += [hit[labels == i].mean() for i in range(1, n + 1)]
            false += (hit & ~truth).sum()
            normal += (~truth).sum()
        points.append((false / normal, float(np.mean(overlaps))))
    total = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            total += (end - x0) * (y0 + y_end) / 2
    return total / limit


def pooled(masks: list[np.ndarray | None], maps: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    truths = as_truths(masks, maps)
    return np.concatenate([t.ravel() for t in truths]), np.concatenate([a.ravel() for a in maps])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
class TestImagesAgainstScikitLearn:
    def test_auroc(self, seed: int, ties: bool) -> None:
        y, scores = image_scores(seed, ties=ties)
        assert auroc(y, scores) == pytest.approx(roc_auc_score(y, scores), abs=1e-12)

    def test_average_precision(self, seed: int, ties: bool) -> None:
        y, scores = image_scores(seed, ties=ties)
        expected = average_precision_score(y, scores)
        assert average_precision(y, scores) == pytest.approx(expected, abs=1e-12)

    def test_f1_max(self, seed: int, ties: bool) -> None:
        y, scores = image_scores(seed, ties=ties)
        precision, recall, _ = precision_recall_curve(y, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
        assert f1_max(y, scores) == pytest.approx(f1.max(), abs=1e-12)

    @pytest.mark.parametrize("tpr", [0.05, 0.5, 0.95, 1.0])
    def test_fpr_at_tpr(self, seed: int, ties: bool, tpr: float) -> None:
        y, scores = image_scores(seed, ties=ties)
        reached = [t for t in np.unique(scores) if np.mean(scores[y == 1] >= t) >= tpr]
        expected = np.mean(scores[y == 0] >= max(reached))
        assert fpr_at_tpr(y, scores, tpr) == pytest.approx(expected, abs=1e-12)


def test_fpr_at_tpr_needs_no_more_hits_than_requested() -> None:
    # 0.55 * 100 is 55.00000000000001 in binary: rounding it up would need 56 hits.
    y = np.r_[np.ones(100), np.zeros(1)]
    scores = np.r_[np.arange(100, 0, -1), 45.5]
    assert fpr_at_tpr(y, scores, 0.55) == 0.0
    assert fpr_at_tpr(y, scores, 0.56) == 1.0


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
class TestPixels:
    def test_pools_all_pixels(self, seed: int, ties: bool) -> None:
        masks, maps = pixel_scores(seed, ties=ties)
        truth, scores = pooled(masks, maps)
        assert pixel_auroc(masks, maps) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        expected = average_precision_score(truth, scores)
        assert pixel_average_precision(masks, maps) == pytest.approx(expected, abs=1e-12)
        precision, recall, _ = precision_recall_curve(truth, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
        assert pixel_f1_max(masks, maps) == pytest.approx(f1.max(), abs=1e-12)

    @pytest.mark.parametrize("limit", [0.001, 0.05, 0.3, 0.77, 1.0])
    def test_aupro_equals_its_definition(self, seed: int, ties: bool, limit: float) -> None:
        masks, maps = pixel_scores(seed, ties=ties)
        assert aupro(masks, maps, limit) == pytest.approx(
            naive_aupro(masks, maps, limit), abs=1e-12
        )

    def test_all_at_once_equals_one_by_one(self, seed: int, ties: bool) -> None:
        masks, maps = pixel_scores(seed, ties=ties)
        assert pixel_metrics(masks, maps, fpr_limit=0.05) == {
            "pixel_auroc": pytest.approx(pixel_auroc(masks, maps), abs=1e-12),
            "pixel_ap": pytest.approx(pixel_average_precision(masks, maps), abs=1e-12),
            "pixel_f1_max": pytest.approx(pixel_f1_max(masks, maps), abs=1e-12),
            "aupro": pytest.approx(aupro(masks, maps, 0.05), abs=1e-12),
        }

    def test_only_the_order_of_scores_counts(self, seed: int, ties: bool) -> None:
        masks, maps = pixel_scores(seed, ties=ties)
        stretched = [np.exp(a.astype(np.float64) / 3) * 1e4 for a in maps]
        assert pixel_metrics(masks, stretched) == pytest.approx(pixel_metrics(masks, maps))


@pytest.mark.parametrize("change", ["constant", "far", "tiny", "infinite"])
@pytest.mark.parametrize("size", ["one pixel", "all but one pixel"])
def test_extreme_maps_and_masks_equal_their_definitions(change: str, size: str) -> None:
    _, maps = pixel_scores(5, ties=True)
    changes = {
        "constant": lambda m: np.full_like(m, -7.25),
        "far": lambda m: 1e6 + 1e5 * m.astype(np.float64),
        "tiny": lambda m: np.float32(1e-40) * m,  # below the least normal float32
        "infinite": lambda m: np.where(m > 1, np.inf, m),
    }
    maps = [changes[change](m) for m in maps]
    masks: list[np.ndarray | None] = [np.zeros(m.shape, int) for m in maps]
    masks[0] = (np.arange(maps[0].size) == 30).reshape(maps[0].shape)
    if size == "all but one pixel":
        masks[0] = ~masks[0]
    masks[3] = None
    truth, scores = pooled(masks, maps)
    scores = np.unique(scores, return_inverse=True)[1]  # scikit-learn takes no infinity
    precision, recall, _ = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert pixel_f1_max(masks, maps) == pytest.approx(f1.max(), abs=1e-9)
    assert pixel_metrics(masks, maps) == {
        "pixel_auroc": pytest.approx(roc_auc_score(truth, scores), abs=1e-9),
        "pixel_ap": pytest.approx(average_precision_score(truth, scores), abs=1e-9),
        "pixel_f1_max": pytest.approx(f1.max(), abs=1e-9),
        "aupro": pytest.approx(naive_aupro(masks, maps, 0.3), abs=1e-9),
    }


def test_look_ups_in_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, maps = pixel_scores(7, ties=True)
    whole, f1 = pixel_metrics(masks, maps), pixel_f1_max(masks, maps)
    monkeypatch.setattr(_ranking, "_LOOKUP", 3)
    assert pixel_metrics(masks, maps) == pytest.approx(whole, abs=1e-12)
    assert pixel_f1_max(masks, maps) == f1


def test_aupro_interpolates_between_two_thresholds_at_the_limit() -> None:
    # Ten normal pixels tie with one half of the defect: one ramp from FPR 0 to 1.
    mask = np.array([[1, 1] + [0] * 10])
    amap = np.array([[2.0, 1.0] + [1.0] * 10])
    # PRO(x) = 1/2 + x/2, integrated from 0 to 0.25 and divided by 0.25.
    assert aupro([mask], [amap], 0.25) == pytest.approx(0.5 + 0.25 / 4)
    assert aupro([mask], [amap], 1.0) == pytest.approx(0.75)


def test_regions_that_touch_at_a_corner_are_one() -> None:
    corner = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
    apart = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 0]])
    amap = np.array([[9.0, 0, 0], [0, -1.0, 0], [0, -1.0, -1.0], [0, 0, 0]])
    assert aupro([corner], [amap]) == pytest.approx(1 / 2)  # half of one region is found
    assert aupro([apart], [amap]) == pytest.approx(1 / 2)  # one of two regions is found
    assert pixel_auroc([apart], [np.maximum(amap, -1)]) < 0.5  # ... though a third of the pixels


def test_every_region_has_the_same_weight() -> None:
    mask = np.zeros((10, 30), dtype=np.uint8)
    mask[1:9, 1:11] = 255
    mask[5, 20] = 7
    amap = np.zeros((10, 30), dtype=np.float32)
    amap[5, 20] = 1
    amap[1:9, 1:11] = -1
    assert aupro([mask], [amap]) == pytest.approx(0.5)


def test_good_images_lower_the_false_positive_rate() -> None:
    mask = np.array([[1, 0, 0, 0]])
    amap = np.array([[1.0, 2.0, 0.0, 0.0]])
    good = np.zeros((3, 5))
    assert aupro([mask], [amap], 0.3) == 0.0  # the hit comes at a rate of 1/3
    assert aupro([mask, None], [amap, good], 0.3) == pytest.approx((0.3 - 1 / 18) / 0.3)


def test_perfect_and_worst_maps() -> None:
    masks, maps = pixel_scores(0, ties=False)
    truths = as_truths(masks, maps)
    best = [t.astype(np.float32) for t in truths]
    expected = {"pixel_auroc": 1.0, "pixel_ap": 1.0, "pixel_f1_max": 1.0, "aupro": 1.0}
    assert pixel_metrics(masks, best) == pytest.approx(expected, abs=1e-12)
    worst = pixel_metrics(masks, [-a for a in best])
    assert worst["pixel_auroc"] == worst["aupro"] == 0.0
    share = sum(t.sum() for t in truths) / sum(t.size for t in truths)
    assert worst["pixel_ap"] == pytest.approx(share)
    y = [0, 0, 1]
    assert [f(y, [1, 2, 3]) for f in (auroc, average_precision, f1_max, fpr_at_tpr)] == [1, 1, 1, 0]
    assert [f(y, [2, 3, 1]) for f in (auroc, fpr_at_tpr)] == [0, 1]
    assert auroc(y, [5, 5, 5]) == 0.5


def test_scores_keep_their_precision_and_range() -> None:
    # In float32 these three would tie; a sigmoid would clip them all to one.
    assert auroc([0, 0, 1], [1e9, 1e9 + 1, 1e9 + 2]) == 1.0
    assert auroc([0, 0, 1], [20, 21, 23]) == 1.0
    assert auroc([0, 1, 1], [0.0, np.inf, 1.0]) == 1.0
    maps = np.array([[[1e9, 1e9 + 1], [1e9, 1e9]]])
    assert pixel_auroc([[[0, 1], [0, 0]]], maps) == 1.0


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_masks_may_have_any_integer_type(dtype: type) -> None:
    masks, maps = pixel_scores(3, ties=False)
    typed = [None if m is None else m.astype(dtype) for m in masks]
    assert pixel_metrics(typed, maps) == pixel_metrics(masks, maps)


def test_an_array_equals_a_list_of_arrays() -> None:
    rng = np.random.default_rng(0)
    masks, maps = rng.random((3, 7, 11)) < 0.2, rng.random((3, 7, 11)).astype(np.float32)
    assert pixel_metrics(masks, maps) == pixel_metrics(list(masks), list(maps))


def test_inputs_are_not_changed() -> None:
    masks, maps = pixel_scores(1, ties=False)
    before = [a.copy() for a in maps]
    pixel_metrics(masks, maps)
    assert all(np.array_equal(a, b) for a, b in zip(maps, before, strict=True))
    y, scores = image_scores(1, ties=False)
    copy = scores.copy()
    auroc(y, scores)
    assert np.array_equal(scores, copy)


@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max, fpr_at_tpr])
@pytest.mark.parametrize("y", [[0, 0, 0], [1, 1, 1]])
def test_image_metrics_are_nan_without_one_class(metric, y) -> None:
    assert math.isnan(metric(y, [0.1, 0.2, 0.3]))


@pytest.mark.parametrize("mask", [np.zeros((2, 3), int), np.ones((2, 3), int), None])
def test_pixel_metrics_are_nan_without_one_class(mask) -> None:
    maps = [np.arange(6.0).reshape(2, 3)]
    assert all(math.isnan(v) for v in pixel_metrics([mask], maps).values())
    assert math.isnan(aupro([mask], maps))
    assert math.isnan(pixel_f1_max([mask], maps))


@pytest.mark.parametrize(
    ("y", "scores", "message"),
    [
        ([], [], "auroc: y_true must hold at least one label"),
        ([0, 1], [0.1, 0.2, 0.3], r"both have shape \(N,\), got \(2,\) and \(3,\)"),
        ([[0, 1]], [[0.1, 0.2]], r"both have shape \(N,\), got \(1, 2\)"),
        ([0, 1, 1], [0.1, np.nan, 0.3], "NaN at index 1"),
        ([-1, 1], [0.1, 0.2], "got -1. For scikit-learn's"),
    ],
)
def test_refuses_wrong_labels_and_scores(y, scores, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        auroc(y, scores)


def test_refuses_what_is_not_a_number() -> None:
    with pytest.raises(InvalidTypeError, match="y_score must hold real numbers"):
        auroc([0, 1], ["a", "b"])
    with pytest.raises(InvalidTypeError, match="y_true must hold 0"):
        auroc(["good", "bad"], [0.1, 0.2])
    with pytest.raises(InvalidTypeError, match="masks must be a list"):
        aupro(3, np.zeros((1, 2, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("masks", "maps", "message"),
    [
        ([], [], "maps must hold at least one map"),
        ([None], [np.zeros((2, 2))] * 2, "equally many, got 1 and 2"),
        (
            [None, np.zeros((4, 3), bool)],
            [np.zeros((2, 2)), np.zeros((3, 4))],
            r"masks\[1\] and maps\[1\] must have one shape \(H, W\), got \(4, 3\) and \(3, 4\)",
        ),
        (np.zeros((2, 3), bool), np.zeros((2, 3)), r"maps\[0\] must have shape \(H, W\)"),
        ([None, None], [np.zeros((2, 2)), np.array([[0, np.nan]])], r"maps\[1\] must not be NaN"),
    ],
)
def test_refuses_wrong_masks_and_maps(masks, maps, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        aupro(masks, maps)


def test_refuses_soft_masks() -> None:
    with pytest.raises(InvalidTypeError, match=r"masks\[0\] must be bool or integer.*> 0.5"):
        pixel_auroc([np.array([[0.0, 0.4]])], [np.zeros((1, 2))])


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, float("nan"), "0.3", None])
def test_refuses_a_rate_outside_0_to_1(limit) -> None:
    with pytest.raises(InvalidValueError, match=r"fpr_limit must be a number in \(0, 1\]"):
        aupro([None], [np.zeros((2, 2))], limit)
    with pytest.raises(InvalidValueError, match=r"tpr must be a number in \(0, 1\]"):
        fpr_at_tpr([0, 1], [0, 1], limit)


def test_memory_stays_near_one_copy_of_the_maps() -> None:
    rng = np.random.default_rng(0)
    maps = [rng.random((500, 400), dtype=np.float32) for _ in range(40)]
    mask = np.zeros((500, 400), bool)
    mask[100:200, 50:300] = mask[300:310, 10:30] = True
    masks = [mask] * 10 + [None] * 30
    tracemalloc.start()
    pixel_metrics(masks, maps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * sum(a.nbytes for a in maps)


@pytest.mark.parametrize("ties", [False, True])
def test_seg_f1_is_the_f1_of_all_pixels(ties: bool) -> None:
    masks, maps = pixel_scores(3, ties=ties)
    truth = [np.zeros(m.shape) if t is None else t for t, m in zip(masks, maps, strict=True)]
    y = np.concatenate([t.ravel() for t in truth]) > 0
    called = np.concatenate([m.ravel() for m in maps]) > 0.5
    assert seg_f1(masks, maps, 0.5) == pytest.approx(f1_score(y, called), abs=1e-12)
    assert seg_f1(masks, maps, 1e6) == 0
    assert math.isnan(seg_f1([None], maps[:1], 0.5))
    with pytest.raises(InvalidValueError, match="seg_f1: threshold must be a number"):
        seg_f1(masks, maps, math.nan)


def test_rate_is_the_share_of_true_decisions() -> None:
    assert rate(np.array([True, False, True, True])) == 0.75
    assert rate([False]) == 0.0
    assert math.isnan(rate(np.empty(0, bool)))
