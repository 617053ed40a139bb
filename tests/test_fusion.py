"""Patch embeddings against loops written from the paper's description."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anomalib_lite.errors import InvalidValueError
from anomalib_lite.fusion import STRATEGIES, patch_embeddings


def naive_pool(maps: np.ndarray, side: int) -> np.ndarray:
    """Mean over a square around each cell; cells outside of the map count as zeros."""
    n, c, h, w = maps.shape
    reach = side // 2
    out = np.zeros((n, c, h, w))
    for y in range(h):
        for x in range(w):
            window = maps[
                :, :, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1
            ]
            out[:, :, y, x] = window.sum((2, 3)) / side**2
    return out


def naive_resize(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize bilinearly; values are at the centres of cells, and the border is repeated outside."""
    n, c, h, w = maps.shape
    out = np.zeros((n, c, height, width))
    for i in range(height):
        for j in range(width):
            y = np.clip((i + 0.5) * h / height - 0.5, 0, h - 1)
            x = np.clip((j + 0.5) * w / width - 0.5, 0, w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = (1 - (x - x0)) * maps[:, :, y0, x0] + (x - x0) * maps[:, :, y0, x1]
            low = (1 - (x - x0)) * maps[:, :, y1, x0] + (x - x0) * maps[:, :, y1, x1]
            out[:, :, i, j] = (1 - (y - y0)) * top + (y - y0) * low
    return out


def random_maps(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("neighbourhood", [1, 3, 5])
@pytest.mark.parametrize(
    "sizes",
    [
        [(8, 12), (4, 6)],
        [(4, 6), (8, 12)],  # the order of the layers is kept, the larger map decides
        [(7, 11), (4, 6), (2, 3)],
        [(5, 9)],
        [(6, 4), (6, 4)],
    ],
)
def test_concat_pools_resizes_and_concatenates(
    sizes: list[tuple[int, int]], neighbourhood: int
) -> None:
    maps = random_maps(*((2, 3 + i, h, w) for i, (h, w) in enumerate(sizes)))
    height, width = max(sizes, key=lambda s: s[0] * s[1])
    layers = [naive_resize(naive_pool(m.numpy(), neighbourhood), height, width) for m in maps]
    expected = np.concatenate(layers, axis=1).transpose(0, 2, 3, 1)
    got = patch_embeddings(maps, "concat", neighbourhood)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_paper_s_neighbourhood_is_the_default() -> None:
    maps = random_maps((2, 3, 8, 12), (2, 4, 4, 6))
    assert torch.equal(patch_embeddings(maps), patch_embeddings(maps, "concat", 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_become_float32_before_anything_is_added(dtype: torch.dtype) -> None:
    maps = [m.to(dtype) for m in random_maps((2, 3, 8, 12), (2, 4, 4, 6))]
    got = patch_embeddings(maps)
    assert got.dtype == torch.float32
    assert torch.equal(got, patch_embeddings([m.float() for m in maps]))


def test_the_memory_format_of_the_maps_does_not_matter() -> None:
    maps = random_maps((2, 3, 8, 12), (2, 4, 4, 6))
    last = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    got = patch_embeddings(last)
    assert got.is_contiguous()
    torch.testing.assert_close(got, patch_embeddings(maps), rtol=1e-6, atol=1e-6)


def test_the_given_maps_are_not_changed() -> None:
    maps = random_maps((2, 3, 8, 12), (2, 4, 4, 6))
    before = [m.clone() for m in maps]
    for neighbourhood in (1, 3):
        patch_embeddings(maps, "concat", neighbourhood).zero_()
        assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))


def test_an_unknown_strategy_names_the_known_and_the_closest() -> None:
    with pytest.raises(InvalidValueError, match=r"\['.*concat.*'\], got 'conct'.*'concat'\?"):
        patch_embeddings(random_maps((1, 3, 4, 6)), "conct")
    assert "concat" in STRATEGIES


def test_single_is_the_last_layer_alone() -> None:
    fine, coarse = random_maps((2, 3, 8, 12), (2, 5, 4, 6))
    got = patch_embeddings([fine, coarse], "single").numpy()
    expected = naive_pool(coarse.numpy(), 3).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("neighbourhood", [None, 3])
def test_mean_averages_the_layers(neighbourhood: int | None) -> None:
    maps = random_maps((2, 5, 8, 12), (2, 5, 4, 6), (2, 5, 8, 12))
    got = patch_embeddings(maps, "mean", neighbourhood).numpy()
    pooled = [naive_pool(m.numpy(), neighbourhood or 1) for m in maps]
    expected = sum(naive_resize(m, 8, 12) for m in pooled) / 3
    np.testing.assert_allclose(got, expected.transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        InvalidValueError, match=r"fusion='mean' needs layers of equally many .*5, 3"
    ):
        patch_embeddings(random_maps((1, 5, 8, 12), (1, 3, 4, 6)), "mean")
