"""Heatmaps against torch and scipy, image scores against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import center_of_mass, gaussian_filter

from anomalib_lite.anomaly_map import (
    anomaly_maps,
    image_scores,
    reweight,
    standardize,
    structure,
)
from anomalib_lite.errors import InvalidValueError


def patch_scores(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def resize(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    x = torch.from_numpy(maps.astype(np.float64))[None]
    y = torch.nn.functional.interpolate(
        x, size, mode="bilinear", align_corners=False, antialias=True
    )
    return np.asarray(y[0])


def naive_maps(
    patch_scores: np.ndarray,
    input_size: tuple[int, int],
    size: tuple[int, int],
    smoothing: float,
) -> np.ndarray:
    """Upsample to the input size, smooth, and resize to the image size, step by step."""
    x = torch.from_numpy(patch_scores.astype(np.float64))[None]
    maps = torch.nn.functional.interpolate(x, input_size, mode="bilinear", align_corners=False)
    smooth = [gaussian_filter(m, smoothing, mode="reflect") for m in maps[0].numpy()]
    return resize(np.stack(smooth), size)


@pytest.mark.parametrize("smoothing", [0.0, 1.5, 4.0])
@pytest.mark.parametrize(
    ("grid", "input_size", "size"),
    [
        ((8, 12), (64, 96), (64, 96)),  # as it is
        ((8, 12), (64, 96), (250, 375)),  # up
        ((8, 12), (64, 96), (37, 55)),  # down: averages
        ((8, 12), (64, 96), (20, 300)),  # down and up, another aspect
        ((16, 7), (256, 112), (300, 131)),
        ((1, 3), (16, 48), (33, 99)),
    ],
)
def test_maps_are_upsampled_smoothed_and_resized(
    grid: tuple[int, int], input_size: tuple[int, int], size: tuple[int, int], smoothing: float
) -> None:
    scores = patch_scores(3, *grid)
    got = anomaly_maps(scores, input_size, [size] * 3, smoothing)
    assert [m.shape for m in got] == [size] * 3
    assert all(m.dtype == np.float32 for m in got)
    expected = naive_maps(scores, input_size, size, smoothing)
    np.testing.assert_allclose(np.stack(got), expected, atol=2e-6)


def test_each_image_has_its_own_size() -> None:
    scores = patch_scores(3, 4, 6)
    sizes = [(64, 96), (30, 41), (111, 150)]
    for i, heatmap in enumerate(anomaly_maps(scores, (64, 96), sizes, 4.0)):
        assert heatmap.shape == sizes[i]
        alone = anomaly_maps(scores[i : i + 1], (64, 96), sizes[i : i + 1], 4.0)
        np.testing.assert_allclose(heatmap, alone[0], atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (200, 450), (48, 56)])
@pytest.mark.parametrize("smoothing", [0.0, 4.0])
@pytest.mark.parametrize("cell", [(3, 3), (2, 8), (5, 6)])
def test_a_high_score_stays_in_its_place(
    size: tuple[int, int], smoothing: float, cell: tuple[int, int]
) -> None:
    scores = np.zeros((1, 8, 12), np.float32)
    scores[0, cell[0], cell[1]] = 1
    (heatmap,) = anomaly_maps(scores, (64, 96), [size], smoothing)
    found = np.add(center_of_mass(heatmap), 0.5)
    place = [(c + 0.5) * side / n for c, side, n in zip(cell, size, (8, 12), strict=True)]
    assert np.abs(found - place).max() < 0.5


def test_a_flat_map_stays_flat_up_to_the_border() -> None:
    scores = np.full((1, 5, 9), 3.5, np.float32)
    for size in ((80, 144), (19, 23), (300, 500)):
        np.testing.assert_allclose(anomaly_maps(scores, (80, 144), [size], 4.0)[0], 3.5, rtol=1e-6)


def test_maps_stay_within_the_patch_scores() -> None:
    scores = patch_scores(1, 8, 12)
    (heatmap,) = anomaly_maps(scores, (64, 96), [(97, 210)], 4.0)
    assert scores.min() <= heatmap.min()
    assert heatmap.max() <= scores.max()


# --- Image scores -------------------------------------------------------------------------


def test_max_is_the_largest_patch_score() -> None:
    scores = patch_scores(4, 7, 11)
    expected = [max(float(v) for v in image.ravel()) for image in scores]
    got = image_scores(scores, "max")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32(expected))


@pytest.mark.parametrize("grid", [(10, 20), (28, 41), (5, 7), (1, 1)])
def test_top_percent_is_the_mean_of_the_largest_hundredth(grid: tuple[int, int]) -> None:
    scores = patch_scores(4, *grid)
    n = max(1, round(grid[0] * grid[1] / 100))
    expected = [np.mean(sorted(image.ravel(), reverse=True)[:n]) for image in scores]
    got = image_scores(scores, "top1%")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("share", [0.1, 2.5, 40, 100])
@pytest.mark.parametrize("grid", [(10, 20), (28, 41), (1, 1)])
def test_any_share_of_patches_is_averaged(share: float, grid: tuple[int, int]) -> None:
    scores = patch_scores(3, *grid)
    n = max(1, round(grid[0] * grid[1] * share / 100))
    expected = [np.mean(sorted(image.ravel(), reverse=True)[:n]) for image in scores]
    np.testing.assert_allclose(image_scores(scores, f"top{share}%"), expected, rtol=1e-6)


@pytest.mark.parametrize("share", [0.1, 5])
@pytest.mark.parametrize("grid", [(10, 20), (7, 5), (1, 3)])
def test_a_share_of_pixels_is_one_of_the_smoothed_map(share: float, grid: tuple[int, int]) -> None:
    scores = patch_scores(3, *grid)
    expected = []
    for image in scores:
        height, width = (8 * n for n in grid)
        enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        pixels = gaussian_filter(np.asarray(enlarged, np.float64), 4, mode="reflect").ravel()
        expected.append(np.sort(pixels)[-max(1, round(len(pixels) * share / 100)) :].mean())
    np.testing.assert_allclose(image_scores(scores, f"top{share}% pixels"), expected, rtol=1e-4)


def blocks(mask: np.ndarray) -> np.ndarray:
    return np.kron(mask, np.ones((8, 8), bool))


@pytest.mark.parametrize("how", ["max", "top20%", "top20% pixels", "smoothed", "structure"])
@pytest.mark.parametrize("grid", [(10, 20), (7, 5), (1, 6)])
def test_what_is_ignored_has_no_effect(how: str, grid: tuple[int, int]) -> None:
    scores = patch_scores(3, *grid)
    ignored = np.random.default_rng(1).random(scores.shape) < 0.6
    ignored[0], ignored[:, 0, 0] = False, False  # all of the first counts, some of the others

    def ask(maps: np.ndarray, left_out: np.ndarray | None) -> np.ndarray:
        return (
            structure(maps, left_out) if how == "structure" else image_scores(maps, how, left_out)
        )

    got = ask(scores, ignored)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0], ask(scores, None)[0], rtol=1e-6)
    for other in (0, 7, 1000):
        maps = np.where(ignored, np.float32(other), scores)
        np.testing.assert_allclose(ask(maps, ignored), got, rtol=1e-6)
    for image, left_out, score in zip(scores.astype(float), ignored, got, strict=True):
        kept = image[~left_out]
        if how in ("max", "top20%"):
            n = 1 if how == "max" else max(1, round(kept.size / 5))
            expected = np.sort(kept)[-n:].mean()
        elif how == "structure":
            steps = []
            for axis in (0, 1):
                neighbours = np.diff(left_out.astype(int), axis=axis) == 0
                both = neighbours & ~np.delete(left_out, 0, axis=axis)
                steps += np.abs(np.diff(image, axis=axis))[both].tolist()
            peak = np.sort(kept)[-max(1, round(kept.size / 100)) :].mean()
            expected = [kept.std(), peak, np.mean(steps) if steps else 0]
        else:  # a mean over those that count, with the weights of the Gaussian
            total, weight = np.where(left_out, 0, image), (~left_out).astype(float)
            sigma = 1.0
            if how == "top20% pixels":
                size = (8 * grid[1], 8 * grid[0])
                total, weight = (
                    np.asarray(
                        Image.fromarray(np.float32(x)).resize(size, Image.Resampling.BILINEAR)
                    )
                    for x in (total, weight)
                )
                left_out, sigma = blocks(left_out), 4.0
            total, weight = (gaussian_filter(x.astype(float), sigma) for x in (total, weight))
            values = np.sort(total[~left_out] / weight[~left_out])
            n = 1 if how == "smoothed" else max(1, round(values.size / 5))
            expected = values[-n:].mean()
        np.testing.assert_allclose(score, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["max", "top1%", "top3% pixels", "smoothed"])
def test_no_images_have_no_scores(how: str) -> None:
    assert image_scores(np.empty((0, 4, 6), np.float32), how).shape == (0,)


@pytest.mark.parametrize("how", ["top0%", "top100.1%", "top900% pixels"])
def test_a_share_that_cannot_be_is_refused(how: str) -> None:
    with pytest.raises(InvalidValueError, match=r"share of how must be above 0 % and at most 100"):
        image_scores(np.ones((2, 3, 4), np.float32), how)


@pytest.mark.parametrize("grid", [(10, 20), (28, 41), (1, 5), (1, 1)])
def test_structure_is_spread_peak_and_roughness(grid: tuple[int, int]) -> None:
    height, width = grid
    for image, got in zip(s := patch_scores(3, *grid), structure(s), strict=True):
        values = [float(v) for v in image.ravel()]
        mean = sum(values) / len(values)
        spread = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        n = max(1, round(len(values) / 100))
        steps = [abs(float(image[i + 1, j] - image[i, j])) for i in range(height - 1)
                 for j in range(width)]  # fmt: skip
        steps += [abs(float(image[i, j + 1] - image[i, j])) for i in range(height)
                  for j in range(width - 1)]  # fmt: skip
        roughness = sum(steps) / len(steps) if steps else 0
        expected = [spread, sum(sorted(values)[-n:]) / n, roughness]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_standardized_structure_is_a_diagonal_mahalanobis_distance() -> None:
    described = patch_scores(5, 3)
    statistics = np.float32([[1, 2, 3], [0.5, 4, 0.25]])
    expected = [
        sum(((d - m) / s) ** 2 for d, m, s in zip(row, *statistics, strict=True)) ** 0.5
        for row in described.astype(float)
    ]
    np.testing.assert_allclose(standardize(described, statistics), expected, rtol=1e-6)
    # Normal maps without any roughness: one that has some is infinitely odd, but a number.
    flat = standardize(np.float32([[1, 2, 3], [1, 2, 4]]), np.float32([[1, 2, 3], [1, 1, 0]]))
    assert flat[0] == 0
    assert np.isfinite(flat[1])
    assert flat[1] > 1e5


@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_reweighting_is_equation_7(spread: float) -> None:
    distances = np.sort(patch_scores(5, 9), axis=1) * np.float32(spread)
    scores = distances[:, 0].copy()
    expected = []
    for s, row in zip(scores.astype(float), distances.astype(float), strict=True):
        # exp(a) / sum exp(b) = 1 / sum exp(b - a), which does not overflow downwards
        total = sum(np.exp(min(d - row[0], 700.0)) for d in row)
        expected.append((1 - 1 / total) * s)
    got = reweight(scores, distances)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert np.isfinite(got).all()


def test_reweighting_with_one_point_in_the_bank_gives_zero() -> None:
    np.testing.assert_array_equal(reweight(np.float32([3.0]), np.float32([[3.0]])), [0.0])


@pytest.mark.parametrize("how", ["median", "reweighted", "top_1%", None])
def test_an_unknown_image_score_is_refused(how: str) -> None:
    with pytest.raises(InvalidValueError, match=r"image_scores: how must be one of \['max', "):
        image_scores(np.ones((2, 3, 4), np.float32), how)
