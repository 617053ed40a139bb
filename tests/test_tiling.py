"""Tiles of large images: every patch from the tile in which it lies most central."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_fixtures import PLAIN, Small
from skimage import data
from torch import Tensor, nn

from anomalib_lite import PatchCore, load
from anomalib_lite.errors import InvalidTypeError, InvalidValueError
from anomalib_lite.images.tiling import embed_tiles, owners, tile_starts


def cells(tiles: np.ndarray) -> np.ndarray:
    """The mean colour of each 8 x 8 square: what a patch sees does not leave it."""
    b, h, w, _ = tiles.shape
    return tiles.reshape(b, h // 8, 8, w // 8, 8, 3).mean(axis=(2, 4)).astype(np.float32)


@pytest.mark.parametrize("size", [(64, 64), (48, 208), (160, 112), (304, 64)])
@pytest.mark.parametrize("overlap", [0, 16, 32, 48])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_grid_is_that_of_the_whole_image(
    size: tuple[int, int], overlap: int, batch_size: int
) -> None:
    image = np.random.default_rng(0).random((*size, 3))
    E = embed_tiles(cells, image, side=64, overlap=overlap, stride=16, batch_size=batch_size)
    np.testing.assert_array_equal(E, cells(image[None]))


@pytest.mark.parametrize("overlap", [0, 16, 32, 48])
def test_tiles_cover_the_side_and_overlap_enough(overlap: int) -> None:
    for length in range(64, 700, 16):
        starts = tile_starts(length, 64, overlap, 16)
        assert (starts[0], starts[-1]) == (0, length - 64)
        assert all(0 < b - a <= 64 - overlap for a, b in pairwise(starts))
        fewest = 1 + -(-(length - 64) // (64 - overlap))
        assert len(starts) == fewest
        assert all(start % 16 == 0 for start in starts)


@pytest.mark.parametrize("overlap", [0, 16, 48])
def test_a_cell_is_taken_from_the_tile_whose_centre_is_nearest(overlap: int) -> None:
    for length in (64, 160, 336, 688):
        starts, n = tile_starts(length, 64, overlap, 16), length // 8
        given = owners(starts, 64, 8, n)
        covered = [i for first, end in given.values() for i in range(first, end)]
        assert covered == list(range(n)), "each cell once"
        for start, (first, end) in given.items():
            for i in range(first, end):
                off = [abs(8 * i + 4 - (s + 32)) for s in starts]
                assert abs(8 * i + 4 - (start + 32)) == min(off)


class Blurred(nn.Module):
    """Means over 4 x 4 squares, blurred so far that a patch sees its neighbours."""

    def forward(self, x: Tensor) -> list[Tensor]:
        squares = nn.functional.avg_pool2d(x, 4)
        return [nn.functional.avg_pool2d(squares, 5, 1, 2)]


def texture(n: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 160, (n, *size, 3)).astype(np.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_a_small_defect_in_a_large_image_is_found_with_tiles_alone(seed: int) -> None:
    brick = np.stack([data.brick()] * 3, axis=2)
    wall = np.tile(brick, (3, 3, 1))
    places = np.random.default_rng(seed).integers(0, 512, (13, 2))
    views = np.stack([wall[y : y + 256, x : x + 384] for y, x in places])
    good, bad = views[:12], views[12:].copy()
    bad[0, 141:144, 250:290] = 30  # much thinner than what one pixel of the whole image shows
    parameters: dict[str, Any] = PLAIN | {"image_size": 64, "false_alarm_rate": 0.3}
    detector = PatchCore(Small(), tile=64, overlap=16, coreset_ratio=0.02, **parameters).fit(good)
    found = detector.detect(bad)
    # The same view with and without the defect: no luck of a threshold decides.
    assert found.scores[0] > 1.3 * detector.score(views[12:])[0]
    assert found.maps.shape == (1, 256, 384)
    y, x = np.unravel_index(found.maps[0].argmax(), (256, 384))
    assert 135 < y < 150
    assert 245 < x < 295
    parameters["image_size"] = 32
    whole = PatchCore(Small(), coreset_ratio=0.5, **parameters).fit(good)
    assert whole.score(bad)[0] < 1.03 * whole.score(views[12:])[0]


def test_overlap_keeps_the_surroundings_of_patches() -> None:
    X = {}
    for overlap in (0, 32):
        detector = PatchCore(
            Blurred(), **PLAIN, image_size=64, tile=64, overlap=overlap, coreset_ratio=1.0,
            false_alarm_rate=0.5, calibration="leave_one_out",
        )  # fmt: skip
        X[overlap] = detector.fit(list(texture(2, (256, 256)))).memory_bank_.embeddings_
    whole = PatchCore(
        Blurred(), **PLAIN, image_size=256, coreset_ratio=1.0, false_alarm_rate=0.5,
        calibration="leave_one_out",
    )  # fmt: skip
    expected = whole.fit(list(texture(2, (256, 256)))).memory_bank_.embeddings_
    inner = np.s_[:, 4:-4, 4:-4]
    grids = {k: x.reshape(2, 64, 64, -1) for k, x in (X | {"whole": expected}).items()}
    np.testing.assert_allclose(grids[32][inner], grids["whole"][inner], atol=1e-5)
    assert np.abs(grids[0][inner] - grids["whole"][inner]).max() > 0.1


def test_images_of_all_sizes_and_what_is_saved(tmp_path: Path) -> None:
    images = [
        texture(1, size, i)[0] for i, size in enumerate([(128, 200), (64, 64), (90, 300)] * 4)
    ]
    detector = PatchCore(
        Small(), **PLAIN, image_size=48, tile=64, overlap=20, false_alarm_rate=0.3
    ).fit(images)
    assert [m.shape for m in detector.anomaly_map(images)] == [i.shape[:2] for i in images]
    detector.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", backbone=Small())
    np.testing.assert_array_equal(again.score(images), detector.score(images))
    one_by_one = [detector.score([image])[0] for image in images]
    np.testing.assert_array_equal(detector.score(images), one_by_one)
    budget = PatchCore(
        Small(), **PLAIN, image_size=48, tile=64, overlap=20, false_alarm_rate=0.3,
        memory_budget="500MB",
    ).fit(images)  # fmt: skip
    np.testing.assert_allclose(budget.score(images), detector.score(images), rtol=0.2)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tile": 8}, "tile must be a whole number of at least 16"),
        (
            {"tile": 64, "overlap": 64},
            "overlap must be a whole number of at least 0 and at most 63",
        ),
        ({"overlap": 8}, "overlap=8 is that of tiles, got tile=None"),
        ({"tile": 64, "image_size": (64, 64)}, "image_size must be the side of a tile"),
        ({"tile": "64"}, "tile must be a whole number"),
    ],
)
def test_tiles_that_cannot_be_are_refused(parameters: dict[str, Any], message: str) -> None:
    detector = PatchCore(Small(), **PLAIN | {"image_size": 64} | parameters)
    with pytest.raises((InvalidValueError, InvalidTypeError), match=f"^PatchCore: {message}"):
        detector.fit(texture(8, (64, 64)))
