"""Images that show the same: exact copies, near copies, and images that only look alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from anomalib_lite.errors import AnomalibLiteError, ImageError, InvalidValueError
from anomalib_lite.images.copies import Copies, find_copies
from anomalib_lite.plotting import copies_sheet

Make = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def textures(n: int, seed: int, size: tuple[int, int] = (96, 128)) -> list[np.ndarray]:
    """Independent random textures with one pattern in common, as of parts of one product."""
    rng = np.random.default_rng(seed)
    height, width = size
    shared = 30 * np.sin(np.arange(width) / 5) + np.arange(height)[:, None] / 4
    images = []
    for _ in range(n):
        own = gaussian_filter(rng.normal(size=size), 1.5)
        images.append(np.clip(110 + shared + 18 * own / own.std(), 0, 255).astype(np.uint8))
    return images


def compressed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


CHANGES: dict[str, Make] = {
    "same": lambda image, rng: image.copy(),
    "compressed": compressed,
    "noisy": noisy,
    "shifted": lambda image, rng: np.roll(image, 1, axis=1),
    "brighter": lambda image, rng: np.clip(1.1 * image + 8.0, 0, 255).astype(np.uint8),
    "mirrored": lambda image, rng: image[:, ::-1],
    "upside down": lambda image, rng: image[::-1],
    "turned": lambda image, rng: image[::-1, ::-1],
    "smaller": lambda image, rng: np.asarray(Image.fromarray(image).resize((96, 72))),
    "cropped": lambda image, rng: image[2:-1, 1:-2],
}


@pytest.mark.parametrize("seed", range(4))
def test_independent_textures_stay_apart(seed: int) -> None:
    copies = find_copies(textures(50, seed))
    assert copies.groups.tolist() == list(range(50))
    assert not copies.exact.any()
    assert copies.largest() == []


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_joins_its_image_and_no_other(change: str, seed: int) -> None:
    good, rng = textures(30, seed), np.random.default_rng(seed)
    copies = find_copies([*good, *(CHANGES[change](image, rng) for image in good[:20])])
    assert copies.groups.tolist() == [*range(30), *range(20)]
    assert copies.exact.any() == (change == "same")


def test_noise_three_times_as_in_an_oversampled_folder() -> None:
    rng = np.random.default_rng(1)
    good = list(rng.integers(100, 140, (40, 64, 96, 3), np.uint8))
    copies = find_copies([image for image in good for _ in range(3)])
    assert copies.groups.tolist() == [i // 3 for i in range(120)]
    assert copies.exact.tolist() == [i % 3 > 0 for i in range(120)]


def test_one_frame_many_times() -> None:
    frame, rng = textures(1, 0)[0], np.random.default_rng(0)
    assert find_copies([frame] * 20).groups.tolist() == [0] * 20
    assert find_copies([noisy(frame, rng) for _ in range(20)]).groups.tolist() == [0] * 20


def test_bursts_of_nearly_equal_frames() -> None:
    good, rng = textures(20, 3), np.random.default_rng(3)
    copies = find_copies([noisy(image, rng) for image in good for _ in range(5)])
    assert copies.groups.tolist() == [i // 5 for i in range(100)]


def test_a_frame_that_is_most_of_the_images_does_not_hide_itself() -> None:
    good, rng = textures(15, 5), np.random.default_rng(5)
    copies = find_copies([*good, *(noisy(good[4], rng) for _ in range(60))])
    assert copies.groups.tolist() == [*range(15), *[4] * 60]
    assert len(copies.largest(1)[0]) == 61


def test_few_images_are_joined_only_if_nearly_equal() -> None:
    good, rng = textures(3, 7), np.random.default_rng(7)
    copies = find_copies([*good, compressed(good[1], rng)])
    assert copies.groups.tolist() == [0, 1, 2, 1]
    assert copies.threshold == 0.9
    assert find_copies(good[0]).groups.tolist() == [0]


def test_content_counts_and_not_the_file(tmp_path: Path) -> None:
    image = textures(1, 0)[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).convert("RGB").save(tmp_path / "b.bmp")
    Image.fromarray(image[:, ::-1].T.copy()).save(tmp_path / "c.png")
    copies = find_copies(tmp_path)
    assert copies.exact.tolist() == [False, True, False]
    assert copies.groups.tolist() == [0, 0, 1]
    assert [Path(name).name for name in copies.names] == ["a.png", "b.bmp", "c.png"]


def test_plain_images_and_floats_are_taken() -> None:
    plain = np.full((32, 48), 0.5, np.float32)
    copies = find_copies([plain, plain.copy(), plain + np.float32(0.1)])
    assert copies.groups.tolist() == [0, 0, 1]


def test_groups_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [*textures(25, 2), *(image[:, ::-1] for image in textures(25, 2)[5:15])]
    whole = find_copies(images)
    monkeypatch.setattr("anomalib_lite.images.copies._BLOCK", 7)
    assert np.array_equal(find_copies(images).groups, whole.groups)


def test_strictness_decides() -> None:
    good = textures(30, 4)
    # Half of the texture is another part's.
    halves = [np.hstack([a[:, :64], b[:, 64:]]) for a, b in zip(good[:15], good[15:], strict=True)]
    loose, strict = find_copies([*good, *halves]), find_copies([*good, *halves], strictness=30)
    assert loose.n_groups < strict.n_groups == 45


def test_errors_say_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="strictness"):
        find_copies(textures(2, 0), strictness=0)
    with pytest.raises(AnomalibLiteError, match="find_copies"):
        find_copies([])
    with pytest.raises(ImageError, match=r"find_copies: images\[1\]"):
        find_copies([textures(1, 0)[0], np.zeros((4, 4), np.uint8)])
    copies = find_copies(textures(2, 0))
    with pytest.raises(InvalidValueError, match="n must be"):
        copies.largest(0)
    with pytest.raises(InvalidValueError, match="copies_sheet: images must be the 2"):
        copies_sheet(textures(3, 0), copies)
    with pytest.raises(InvalidValueError, match="no two images"):
        copies_sheet(textures(2, 0), copies)


def test_the_sheet_shows_the_largest_groups() -> None:
    images = [np.full((32, 48, 3), 40 * i, np.uint8) for i in range(6)]
    groups = np.array([0, 1, 1, 2, 2, 2])
    copies = Copies(groups, np.zeros(6, bool), tuple(f"{i}.png" for i in range(6)), 0.5)
    sheet = copies_sheet(images, copies, n_groups=1, columns=3, tile_size=(32, 48))
    values = {pixel[0] for _, pixel in sheet.getcolors(1 << 20)}
    assert {120, 160, 200} <= values
    both = copies_sheet(images, copies, columns=3, tile_size=(32, 48))
    assert both.height > sheet.height
    assert both.width == sheet.width
