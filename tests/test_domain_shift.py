"""Distances between sets of embeddings against naive versions, and drift of real images."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance
from skimage import data
from torch import nn

from anomalib_lite import domain_shift
from anomalib_lite.domain_shift import (
    cosine_distance,
    feature_drift,
    frechet_distance,
    median_distance,
    mmd,
    sliced_wasserstein,
)
from anomalib_lite.errors import ImageError, InvalidTypeError, InvalidValueError

Distance = Callable[..., float]


def sliced(X: Any, Y: Any) -> float:
    return sliced_wasserstein(X, Y, random_state=0)


DISTANCES: list[Distance] = [mmd, sliced, cosine_distance, frechet_distance]


def samples(seed: int, n: int = 60, m: int = 45, d: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d))
    return 3 + rng.normal(size=(n, d)) @ mixing, 3.4 + 1.3 * rng.normal(size=(m, d)) @ mixing


def naive_mmd(X: np.ndarray, Y: np.ndarray, sigma: float | None = None) -> float:
    pooled = [*X, *Y]
    if sigma is None:
        pairs = [(a, b) for i, a in enumerate(pooled) for b in pooled[:i]]
        sigma = float(np.median([np.linalg.norm(a - b) for a, b in pairs]))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-(np.linalg.norm(a - b) ** 2) / (2 * sigma**2))

    n, m = len(X), len(Y)
    x = sum(k(X[i], X[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    y = sum(k(Y[i], Y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return x + y - 2 * sum(k(a, b) for a in X for b in Y) / (n * m)


def naive_frechet(X: np.ndarray, Y: np.ndarray) -> float:
    """The formula of the FID with a matrix root, as in its authors' code."""
    x, y = np.cov(X, rowvar=False), np.cov(Y, rowvar=False)
    root = np.real(sqrtm(x @ y))
    shift = X.mean(axis=0) - Y.mean(axis=0)
    return float(shift @ shift + np.trace(x + y - 2 * root))


def naive_sliced(X: np.ndarray, Y: np.ndarray, directions: np.ndarray) -> float:
    """Repeat every row until both samples have as many, and sort."""
    total = 0.0
    for direction in directions:
        x = np.sort(np.repeat(X @ direction, len(Y)))
        y = np.sort(np.repeat(Y @ direction, len(X)))
        total += np.mean((x - y) ** 2)
    return math.sqrt(total / len(directions))


def drawn_directions(seed: int, n: int, d: int) -> np.ndarray:
    directions = np.random.RandomState(seed).standard_normal((n, d))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


@pytest.mark.parametrize("block", [1024, 16])
@pytest.mark.parametrize("seed", range(3))
def test_mmd_equals_its_definition(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_shift, "_BLOCK", block)
    X, Y = samples(seed)
    assert mmd(X, Y) == pytest.approx(naive_mmd(X, Y), abs=1e-12)
    assert mmd(X, Y, bandwidth=1.7) == pytest.approx(naive_mmd(X, Y, 1.7), abs=1e-12)
    assert mmd(X.astype(np.float32), Y.astype(np.float32)) == pytest.approx(mmd(X, Y), abs=1e-6)
    far = 1e5  # the distances are the same, the squares of the rows are not
    assert mmd(X + far, Y + far) == pytest.approx(mmd(X, Y), abs=1e-8)


@pytest.mark.parametrize(("n", "m"), [(60, 45), (45, 60), (50, 50), (1, 7), (8, 1)])
@pytest.mark.parametrize("block", [1024, 16])
def test_sliced_wasserstein_equals_its_definition(
    n: int, m: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domain_shift, "_BLOCK", block)
    monkeypatch.setattr(domain_shift, "_PROJECTED", 20 * block)
    X, Y = samples(0, n, m)
    expected = naive_sliced(X, Y, drawn_directions(5, 33, 7))
    found = sliced_wasserstein(X, Y, n_projections=33, random_state=5)
    assert found == pytest.approx(expected, abs=1e-10)


def test_sliced_wasserstein_of_one_dimension_needs_no_luck() -> None:
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(30, 1)), 9 + rng.normal(size=(30, 1))
    pairs = np.sort(X[:, 0]) - np.sort(Y[:, 0])
    assert sliced(X, Y) == pytest.approx(math.sqrt(np.mean(pairs**2)), abs=1e-12)
    assert sliced(X, Y) >= wasserstein_distance(X[:, 0], Y[:, 0])  # that of order 1


@pytest.mark.parametrize(("n", "m", "d"), [(60, 45, 7), (200, 150, 40), (45, 60, 50), (90, 20, 30)])
def test_frechet_distance_equals_the_formula(n: int, m: int, d: int) -> None:
    X, Y = samples(1, n, m, d)
    expected = naive_frechet(X, Y)
    assert frechet_distance(X, Y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(X.astype(np.float32), Y.astype(np.float32)) == pytest.approx(
        expected, rel=1e-4
    )


def test_frechet_distance_where_the_root_is_known() -> None:
    # Diagonal covariances: sum of (sigma_x - sigma_y)^2, also where they are singular or tiny.
    square = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * math.sqrt(3 / 4)  # covariance 1
    for a, b in [((2, 3), (5, 1)), ((2, 0), (5, 0)), ((1e-7, 1e4), (1e-9, 1e3)), ((0, 0), (0, 4))]:
        X, Y = square * a, square * b
        expected = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        assert frechet_distance(X, Y) == pytest.approx(expected, rel=1e-9)
    # Fewer rows than columns: an embedding in more dimensions changes nothing.
    X, Y = samples(0, 12, 9, 5)
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(400, 5)))[0].T
    assert frechet_distance(X @ turned, Y @ turned) == pytest.approx(frechet_distance(X, Y))


def test_cosine_distance_equals_its_definition() -> None:
    X, Y = samples(2)
    x, y = X.mean(axis=0), Y.mean(axis=0)
    expected = 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert cosine_distance(X, Y) == pytest.approx(expected, abs=1e-12)
    assert cosine_distance(X, -X) == pytest.approx(2)
    assert cosine_distance([[1, 0]], [[1, 1e-9]]) == pytest.approx(5e-19)
    assert math.isnan(cosine_distance([[1, 0], [-1, 0]], [[1, 1]]))


@pytest.mark.parametrize("distance", DISTANCES)
def test_grows_with_the_shift(distance: Distance) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        X, Y = rng.normal(size=(2, 400, 12)) + [1] + np.eye(12)[0]
        direction = np.eye(12)[3]
        values = [distance(X, Y + shift * direction) for shift in (0, 0.8, 1.6, 3.2, 6.4)]
        assert values == sorted(values)
        assert values[-1] > 5 * abs(values[0])


@pytest.mark.parametrize("distance", [mmd, sliced, frechet_distance])
def test_sees_a_change_of_spread(distance: Distance) -> None:
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(2, 400, 12))
    values = [distance(X, scale * Y) for scale in (1, 1.5, 2.25, 3.4)]
    assert values == sorted(values)


def test_mmd_is_zero_on_average_for_equal_distributions() -> None:
    values = [mmd(*np.random.default_rng(seed).normal(size=(2, 30, 5))) for seed in range(200)]
    assert abs(np.mean(values)) < 5 * np.std(values) / math.sqrt(200)
    assert min(values) < 0 < max(values)  # unbiased, so on both sides
    X, Y = np.random.default_rng(0).normal(size=(2, 30, 5))
    assert mmd(X, Y + 1) > 5 * np.std(values)


@pytest.mark.parametrize("distance", [sliced, cosine_distance, frechet_distance])
def test_is_zero_for_equal_samples_and_falls_with_their_size(distance: Distance) -> None:
    X, _ = samples(0)
    assert distance(X, X[::-1]) == pytest.approx(0, abs=1e-12 * np.abs(X).max() ** 2 * 100)
    small, large = (
        np.mean(
            [distance(*(2 + np.random.default_rng(s).normal(size=(2, n, 4)))) for s in range(10)]
        )
        for n in (20, 2000)
    )
    assert large < small / 5


@pytest.mark.parametrize("distance", DISTANCES)
def test_is_symmetric(distance: Distance) -> None:
    X, Y = samples(3, 900, 700)  # more rows than the median distance is taken from
    assert distance(X, Y) == pytest.approx(distance(Y, X), abs=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_identical_rows_do_no_harm(distance: Distance) -> None:
    same, other = np.full((5, 3), 2.0), np.full((4, 3), 2.0)
    assert distance(same, other) == pytest.approx(0, abs=1e-12)
    assert distance(same, [[2.0, 2, 3], [2, 2, 4]]) > 0


def test_same_seed_same_directions() -> None:
    X, Y = samples(0)
    assert sliced_wasserstein(X, Y, random_state=3) == sliced_wasserstein(X, Y, random_state=3)
    assert sliced_wasserstein(X, Y, random_state=3) != sliced_wasserstein(X, Y, random_state=4)


@pytest.mark.parametrize("distance", DISTANCES)
def test_memory_does_not_grow_with_the_square_of_the_rows(distance: Distance) -> None:
    rng = np.random.default_rng(0)
    X, Y = rng.random((2, 7000, 16), dtype=np.float32)
    tracemalloc.start()
    distance(X, Y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # all pairs would take 392 MB


@pytest.mark.parametrize("distance", DISTANCES)
def test_refuses_wrong_samples(distance: Distance) -> None:
    X, _ = samples(0)
    with pytest.raises(InvalidValueError, match="as many columns, got 7 and 6"):
        distance(X, X[:, :6])
    with pytest.raises(InvalidValueError, match=r"Y must have shape \(N, D\).*got \(7,\)"):
        distance(X, X[0])
    with pytest.raises(InvalidValueError, match="X must be finite"):
        distance(np.where(X < 3, np.nan, X), X)
    with pytest.raises(InvalidTypeError, match="X must be a numeric array"):
        distance([["a", "b"]], X)
    with pytest.raises(InvalidTypeError, match="Y must be a numeric array"):
        distance(X, [[1, 2], [3]])


def test_refuses_wrong_parameters() -> None:
    X, Y = samples(0)
    with pytest.raises(InvalidValueError, match=r"mmd: bandwidth must be a number in \(0, inf\)"):
        mmd(X, Y, bandwidth=0)
    with pytest.raises(InvalidValueError, match="n_projections must be a whole number"):
        sliced_wasserstein(X, Y, n_projections=0)
    with pytest.raises(InvalidValueError, match="random_state must be"):
        sliced_wasserstein(X, Y, random_state="x")
    for distance in (mmd, frechet_distance):
        with pytest.raises(InvalidValueError, match="N of at least 2"):
            distance(X, Y[:1])


# --- Images ---------------------------------------------------------------------------------


def tiles(photo: np.ndarray) -> list[np.ndarray]:
    return [photo[y : y + 64, x : x + 96] for y in range(0, 512, 64) for x in range(0, 480, 96)]


def brighter(images: list[np.ndarray], by: int) -> list[np.ndarray]:
    return [np.clip(image.astype(int) + by, 0, 255).astype(np.uint8) for image in images]


def test_the_bandwidth_of_drift_is_that_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weeks that differ are measured by one kernel, whatever they hold."""
    used: list[float] = []

    def watched(X: np.ndarray, Y: np.ndarray, *, bandwidth: float) -> float:
        used.append(bandwidth)
        return mmd(X, Y, bandwidth=bandwidth)

    monkeypatch.setattr(domain_shift, "mmd", watched)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 120, (8, 64, 64, 3), dtype=np.uint8)
    drift = [feature_drift(images, images + by, image_size=64) for by in (0, 40, 120)]
    layers = len(drift[0])
    assert used == 3 * used[:layers]
    values = [week["blocks.2"]["mmd"] for week in drift]
    assert values == sorted(values)


@pytest.mark.parametrize("n", [2, 9, 2500])
def test_the_median_distance_is_that_of_pairs(n: int) -> None:
    X = np.random.default_rng(n).normal(size=(n, 3))
    some = X[np.arange(min(n, 1000)) * n // min(n, 1000)]
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(some[:300]) for b in some[:i]]
    assert median_distance(X) == pytest.approx(np.median(pairs), rel=1e-9 if n < 300 else 0.05)
    assert median_distance(np.ones((n, 3))) == 1
    with pytest.raises(InvalidValueError, match=r"median_distance: X must have shape \(N, D\)"):
        median_distance(X[:1])


def test_drift_of_photographs_grows_with_the_light() -> None:
    wall = tiles(data.brick())
    reference, new = wall[::2], wall[1::2]
    drifts = [feature_drift(reference, brighter(new, by), image_size=64) for by in (0, 40, 80, 120)]
    for layer in ("blocks.2", "blocks.4"):
        for name in ("mmd", "sliced_wasserstein", "cosine_distance", "frechet_distance"):
            values = [drift[layer][name] for drift in drifts]
            assert values == sorted(values)
            assert values[-1] > 2 * abs(values[0])


def test_drift_sees_another_material() -> None:
    wall, lawn = tiles(data.brick()), tiles(data.grass())
    chance = feature_drift(wall[::2], wall[1::2], image_size=64)
    other = feature_drift(wall[::2], lawn[1::2], image_size=64)
    for layer, values in other.items():
        assert all(values[name] > 3 * abs(chance[layer][name]) for name in values)


def test_drift_of_magnetic_tiles_grows_with_the_light(data_dir: Path) -> None:
    paths = sorted((data_dir / "magnetic_tile/train/good").iterdir())[:120]
    photos = [np.asarray(Image.open(path).convert("L")) for path in paths]
    drifts = [
        feature_drift(photos[:60], brighter(photos[60:], by), image_size=128, layers=["blocks.2"])
        for by in (0, 15, 30, 60)
    ]
    # The table in docs/domain_shift.md.
    table = {
        "mmd": [0.036, 0.096, 0.184, 0.401],
        "sliced_wasserstein": [0.39, 0.55, 0.74, 1.13],
        "cosine_distance": [0.004, 0.011, 0.020, 0.048],
        "frechet_distance": [6.4, 11.9, 20.8, 46.6],
    }
    for name, figures in table.items():
        values = [drift["blocks.2"][name] for drift in drifts]
        assert values == sorted(values)
        assert values == pytest.approx(figures, rel=0.05, abs=1e-3)


def test_drift_takes_layers_sizes_and_modules() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, size, np.uint8) for size in [(48, 64, 3), (64, 80), (40, 40)]]
    drift = feature_drift(images, images[::-1], image_size=32, layers=["blocks.1"], batch_size=2)
    assert list(drift) == ["blocks.1"]
    assert drift["blocks.1"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    own = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    drift = feature_drift(images, brighter(images, 60), image_size=32, backbone=own)
    assert list(drift) == ["output 0"]
    again = feature_drift(images, brighter(images, 60), image_size=32, backbone=own, batch_size=1)
    assert again["output 0"] == pytest.approx(drift["output 0"], rel=1e-4)


def test_drift_refuses_wrong_input() -> None:
    images = np.zeros((3, 32, 32, 3), np.uint8)
    with pytest.raises(InvalidValueError, match="new_images must hold at least 2 images, got 1"):
        feature_drift(images, images[0])
    with pytest.raises(InvalidValueError, match="feature_drift: images is empty"):
        feature_drift([], images)
    with pytest.raises(InvalidValueError, match="feature_drift: layer 'x' does not exist"):
        feature_drift(images, images, layers=["x"])
    with pytest.raises(InvalidValueError, match="image_size must be"):
        feature_drift(images, images, image_size=3)
    with pytest.raises(ImageError, match=r"feature_drift: images\[0\] is 4x4 pixels"):
        feature_drift(np.zeros((2, 4, 4, 3), np.uint8), images)
