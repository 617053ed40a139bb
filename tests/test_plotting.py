"""Overlays and contact sheets: geometry, absolute colours, and text that is not cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageStat

from anomalib_lite.errors import AnomalibLiteError, ImageError, InvalidValueError, MissingPathError
from anomalib_lite.plotting import SCALE, color_bar, contact_sheet, legend_colors, overlay

THRESHOLD = 20.0


@pytest.fixture
def photo() -> np.ndarray:
    """A gray image of 60 x 100 pixels."""
    return np.full((60, 100, 3), 128, np.uint8)


def flat(level: float) -> np.ndarray:
    return np.full((60, 100), level, np.float32)


def color(picture: Image.Image, x: int, y: int) -> tuple[int, int, int]:
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel


def luminance(rgb: tuple[int, ...]) -> float:
    return float(np.dot(rgb, (0.2126, 0.7152, 0.0722)))


def lit_border(picture: Image.Image) -> bool:
    """Whether a pixel at the edge of the picture is not white."""
    pixels = np.asarray(picture)
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    return any((edge != 255).any() for edge in edges)


class TestOverlay:
    def test_has_the_images_size(self, photo: np.ndarray) -> None:
        assert overlay(photo, flat(0), threshold=THRESHOLD).size == (100, 60)

    @pytest.mark.parametrize("level", [0, 0.3, SCALE[0]])
    def test_low_scores_are_not_tinted(self, photo: np.ndarray, level: float) -> None:
        picture = overlay(photo, flat(level * THRESHOLD), threshold=THRESHOLD)
        assert (np.asarray(picture) == 128).all()

    def test_one_colour_is_one_score_in_all_images(self, photo: np.ndarray) -> None:
        calm, wild = flat(18), flat(18)
        wild[:20, :30] = 500
        first, second = (overlay(photo, m, threshold=THRESHOLD) for m in (calm, wild))
        assert color(first, 90, 50) == color(second, 90, 50) != (128, 128, 128)

    def test_the_scale_follows_the_threshold(self, photo: np.ndarray) -> None:
        first = overlay(photo, flat(22), threshold=20)
        second = overlay(photo, flat(2.2), threshold=2)
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 2

    def test_colours_equal_those_of_the_legend(self, photo: np.ndarray) -> None:
        for share, expected in zip((0.5, 1.0, 1.5, 9.0), (0, 1, 2, 2), strict=True):
            picture = overlay(photo, flat(share * THRESHOLD), threshold=THRESHOLD, outline=None)
            want = legend_colors(3)[expected]
            got = np.array(color(picture, 5, 5))
            assert np.abs(got - [int(want[i : i + 2], 16) for i in (1, 3, 5)]).max() <= 3

    def test_lightness_rises_on_black(self) -> None:
        black = np.zeros((60, 100, 3), np.uint8)
        ramp = np.tile(np.linspace(10, 30, 100, dtype=np.float32), (60, 1))
        picture = overlay(black, ramp, threshold=THRESHOLD, outline=None)
        lightness = [luminance(color(picture, x, 30)) for x in range(0, 100, 5)]
        assert lightness == sorted(lightness)
        assert lightness[-1] > 150

    def test_outlines_regions_above_the_threshold(self, photo: np.ndarray) -> None:
        heatmap = flat(10)
        heatmap[20:40, 30:60] = 21
        lined = overlay(photo, heatmap, threshold=THRESHOLD)
        plain = overlay(photo, heatmap, threshold=THRESHOLD, outline=None)
        assert color(lined, 30, 30) == (255, 255, 255)
        assert luminance(color(lined, 29, 30)) < 60  # dark outside, for bright photographs
        assert color(lined, 45, 30) == color(plain, 45, 30) == color(plain, 30, 30)
        higher = overlay(photo, heatmap, threshold=THRESHOLD, outline=1.2)
        assert np.array_equal(np.asarray(higher), np.asarray(plain))

    def test_shows_the_photograph_in_gray_or_in_its_colours(self) -> None:
        red = np.zeros((60, 100, 3), np.uint8)
        red[..., 0] = 200
        gray = color(overlay(red, flat(0), threshold=THRESHOLD), 0, 0)
        assert len(set(gray)) == 1
        assert color(overlay(red, flat(0), threshold=THRESHOLD, gray=False), 0, 0) == (200, 0, 0)

    def test_a_strip_shows_the_label(self, photo: np.ndarray) -> None:
        big = np.full((240, 400, 3), 128, np.uint8)
        heatmap = np.zeros((240, 400), np.float32)
        strips = {}
        for score in (19.0, 21.0):
            picture = overlay(big, heatmap, threshold=THRESHOLD, score=score)
            assert picture.width == 400
            assert 250 < picture.height < 300
            strip = picture.crop((0, 240, *picture.size))
            strips[score] = ImageStat.Stat(strip).sum
            assert not lit_border(strip.crop((7, 0, *strip.size)))  # no text is cut off
        assert strips[21.0][0] - strips[21.0][1] > strips[19.0][0] - strips[19.0][1]  # redder

    def test_a_score_at_the_threshold_is_normal(self, photo: np.ndarray) -> None:
        at = overlay(photo, flat(0), threshold=THRESHOLD, score=THRESHOLD)
        red, green, _ = color(at, 0, at.height - 1)
        assert green > red

    def test_text_below_a_tiny_image_is_not_cut_off(self) -> None:
        tiny = np.full((8, 9, 3), 128, np.uint8)
        heatmap = np.zeros((8, 9), np.float32)
        picture = overlay(tiny, heatmap, threshold=THRESHOLD, score=123456.0)
        assert not lit_border(picture.crop((4, 8, *picture.size)))
        middle = picture.width // 2
        assert color(picture, middle, 4) == (128, 128, 128)

    def test_accepts_the_images_that_detectors_accept(self, tmp_path: Path) -> None:
        wide = np.full((60, 100), 40000, np.uint16)
        Image.fromarray(wide).save(tmp_path / "16bit.png")
        turned = Image.new("RGB", (60, 100), "gray")
        exif = turned.getexif()
        exif[0x0112] = 6  # shown turned by 90 degrees
        turned.save(tmp_path / "turned.jpg", exif=exif)
        for image in (
            tmp_path / "16bit.png",
            str(tmp_path / "turned.jpg"),
            Image.new("RGBA", (100, 60), "gray"),
            wide,
            np.full((60, 100, 3), 0.5),
        ):
            assert overlay(image, flat(0), threshold=THRESHOLD).size == (100, 60)
        assert color(overlay(wide, flat(0), threshold=THRESHOLD), 0, 0)[0] == 156  # 40000 / 257

    def test_refuses_a_map_of_another_size(self, photo: np.ndarray) -> None:
        with pytest.raises(ImageError, match=r"size 60x100, got shape \(100, 60\)"):
            overlay(photo, flat(0).T, threshold=THRESHOLD)

    def test_refuses_a_map_that_is_not_finite(self, photo: np.ndarray) -> None:
        heatmap = flat(0)
        heatmap[3, 4] = np.nan
        with pytest.raises(ImageError, match="must be finite"):
            overlay(photo, heatmap, threshold=THRESHOLD)

    @pytest.mark.parametrize("threshold", [0, -1, np.inf, np.nan, "high"])
    def test_refuses_a_threshold_without_a_scale(
        self, photo: np.ndarray, threshold: object
    ) -> None:
        with pytest.raises(InvalidValueError, match=r"threshold must be a number in \(0, inf\)"):
            overlay(photo, flat(0), threshold=threshold)  # type: ignore[arg-type]

    def test_refuses_an_opacity_above_one(self, photo: np.ndarray) -> None:
        with pytest.raises(InvalidValueError, match=r"opacity must be a number in \[0, 1\]"):
            overlay(photo, flat(0), threshold=THRESHOLD, opacity=1.5)

    def test_names_a_missing_file(self) -> None:
        with pytest.raises(MissingPathError, match=r"overlay: nothing.png does not exist"):
            overlay("nothing.png", flat(0), threshold=THRESHOLD)


class TestColorBar:
    def test_runs_from_gray_to_bright(self) -> None:
        bar = color_bar(25.9, width=400)
        assert bar.size == (400, 52)
        assert len(set(color(bar, 9, 10))) == 1
        assert luminance(color(bar, 390, 10)) > luminance(color(bar, 260, 10)) > 128

    @pytest.mark.parametrize("threshold", [0.00123, 25.9, 123456.0])
    def test_texts_are_not_cut_off_and_do_not_touch(self, threshold: float) -> None:
        bar = color_bar(threshold, width=380)
        assert not lit_border(bar)
        inked = (np.asarray(bar.crop((0, 28, *bar.size))) < 200).any(axis=(0, 2))
        blank = np.diff(np.flatnonzero(inked))
        assert (blank > 6).sum() == 2  # three legends; words within one are closer

    def test_refuses_a_width_too_small_for_its_words(self) -> None:
        with pytest.raises(InvalidValueError, match="width must be a whole number of at least"):
            color_bar(1.0, width=100)


class TestContactSheet:
    def test_pictures_are_not_cut_off_or_distorted(self) -> None:
        colors = ["red", "lime", "blue", "cyan", "magenta"]
        sizes = [(90, 60), (60, 90), (300, 30), (16, 16), (500, 400)]
        tiles = [Image.new("RGB", size, c) for size, c in zip(sizes, colors, strict=True)]
        pixels = np.asarray(contact_sheet(tiles, columns=3, tile_size=(80, 120)))
        for tile, (width, height) in zip(tiles, sizes, strict=True):
            where = (pixels == tile.getpixel((0, 0))).all(axis=2)
            rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
            block = where[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert block.all()
            assert block.shape[1] <= 120
            assert block.shape[0] <= 80
            assert block.shape[1] / block.shape[0] == pytest.approx(width / height, rel=0.06)

    def test_pictures_of_a_row_are_aligned_above_their_captions(self) -> None:
        tiles = [Image.new("RGB", (90, 60), "red"), Image.new("RGB", (90, 30), "red")]
        pixels = np.asarray(contact_sheet(tiles, columns=2, tile_size=(60, 90), captions=["a"] * 2))
        red = (pixels == (255, 0, 0)).all(axis=2)
        left, right = red[:, : red.shape[1] // 2], red[:, red.shape[1] // 2 :]
        ends = [np.flatnonzero(half.any(axis=1))[-1] for half in (left, right)]
        assert ends[0] == ends[1]
        assert (pixels[ends[0] + 1 :] < 128).any()  # the captions

    def test_long_words_are_broken_and_nothing_is_cut_off(self) -> None:
        tiles = [Image.new("RGB", (90, 60), "gray")] * 4
        words = ["a_file_name_without_any_space_" * 4, "some words " * 12, "", "short"]
        sheet = contact_sheet(tiles, columns=2, captions=words, tile_size=(60, 90))
        assert sheet.width == 2 * (90 + 12) + 12
        assert not lit_border(sheet)
        # A caption that left its column would be ink in the gap between the columns.
        gap = np.asarray(sheet.crop((104, 0, 112, sheet.height)))
        assert (gap == 255).all()
        titled = contact_sheet(tiles, columns=2, title="A title of words " * 6, tile_size=(60, 90))
        assert not lit_border(titled)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tiles": []}, "tiles is empty"),
            ({"captions": ["one", "two"]}, "captions must be one for each of 1 tiles, got 2"),
            ({"columns": 0}, "columns must be a whole number of at least 1"),
            ({"tile_size": (240, 8)}, "tile_size must be a whole number of at least 16"),
        ],
    )
    def test_refuses(self, arguments: dict[str, object], message: str) -> None:
        given = {"tiles": [Image.new("RGB", (90, 60))], **arguments}
        with pytest.raises(AnomalibLiteError, match=message):
            contact_sheet(**given)  # type: ignore[arg-type]
