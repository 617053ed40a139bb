"""Masks: how they are read, where they are found, and that ignored pixels do not count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.datasets import Folder, MVTecAD, Sample, load_mask
from anomalib_lite.errors import (
    ImageError,
    InvalidValueError,
    LeftOutWarning,
    MissingPathError,
)
from anomalib_lite.metrics import aupro, pixel_metrics, seg_f1


def save(path: Path, values: object, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    (image if mode is None else image.convert(mode)).save(path)
    return path


def box(value: int = 255, dtype: type = np.uint8) -> np.ndarray:
    """A mask 8 wide and 6 high with a box of 2 x 5 pixels."""
    mask = np.zeros((6, 8), dtype)
    mask[1:3, 2:7] = value
    return mask


class TestValues:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"])
    def test_every_mode(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / ("mask.tif" if mode == "CMYK" else "mask.png")
        if mode == "I;16":
            save(path, np.where(box() > 0, 65535, 300).astype(np.uint16))
        else:
            save(path, box(), mode)
        mask = load_mask(path)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, box() > 0)

    @pytest.mark.parametrize("value", [1, 40, 100, 127, 128, 253, 255])
    def test_of_two_levels_the_second_is_anomalous(self, tmp_path: Path, value: int) -> None:
        mask = load_mask(save(tmp_path / "mask.png", box(value)))
        assert not isinstance(mask, np.ma.MaskedArray)
        np.testing.assert_array_equal(mask, box() > 0)

    def test_specks_of_compression_are_no_defects(self, tmp_path: Path) -> None:
        values = np.array([[0, 3, 120, 127], [128, 250, 255, 255]], np.uint8)
        mask = load_mask(save(tmp_path / "mask.png", values))
        np.testing.assert_array_equal(mask, values >= 128)

    @pytest.mark.parametrize("level", [100, 255])
    def test_a_jpeg_file_of_any_level(self, tmp_path: Path, level: int) -> None:
        values = np.zeros((40, 48), np.uint8)
        values[8:28, 8:30] = level
        path = tmp_path / "mask.jpg"
        Image.fromarray(values).save(path, quality=70)
        assert np.unique(np.asarray(Image.open(path))).size > 2  # compression has left specks
        np.testing.assert_array_equal(load_mask(path), values > 0)

    def test_class_numbers_are_all_defects(self, tmp_path: Path) -> None:
        values = np.array([[0, 1, 2], [0, 0, 5]], np.uint8)
        np.testing.assert_array_equal(load_mask(save(tmp_path / "mask.png", values)), values > 0)

    @pytest.mark.parametrize(("dtype", "void"), [(np.uint8, 255), (np.uint16, 65535)])
    def test_beside_class_numbers_the_largest_value_is_ignored(
        self, tmp_path: Path, dtype: type, void: int
    ) -> None:
        values = box(2, dtype)
        values[4] = void
        mask = load_mask(save(tmp_path / "mask.png", values))
        assert isinstance(mask, np.ma.MaskedArray)
        np.testing.assert_array_equal(mask.data, values == 2)
        np.testing.assert_array_equal(mask.mask, values == void)

    @pytest.mark.parametrize("mode", ["L", "P", "I;16"])
    def test_a_large_255_beside_small_numbers_is_asked_about(
        self, tmp_path: Path, mode: str
    ) -> None:
        values = box(255 if mode != "I;16" else 65535, np.uint8 if mode != "I;16" else np.uint16)
        values[3, 2:5] = 3  # specks below a defect, or a class beside what nobody labelled
        path = save(tmp_path / "mask.png", values, "P" if mode == "P" else None)
        message = r"mask\.png must say .* 10 pixels have it .* and 3 have class .*ignore_255=True"
        with pytest.raises(InvalidValueError, match=message):
            load_mask(path)
        np.testing.assert_array_equal(load_mask(path, ignore_255=False), values > 0)
        mask = load_mask(path, ignore_255=True)
        np.testing.assert_array_equal(np.ma.getdata(mask), values == 3)
        np.testing.assert_array_equal(np.ma.getmaskarray(mask), values == values.max())
        sample = Sample(path, 1, "cut", path)
        assert sample.mask(ignore_255=False).sum() == 13  # type: ignore[union-attr]
        values[4, :7] = 2  # as many pixels of classes as of 255: these cannot be specks
        path = save(tmp_path / "mask.png", values, "P" if mode == "P" else None)
        np.testing.assert_array_equal(load_mask(path), (values == 2) | (values == 3))

    @pytest.mark.parametrize("mode", ["L", "P"])
    def test_255_alone_is_ignored_if_asked_for(self, tmp_path: Path, mode: str) -> None:
        path = save(tmp_path / "mask.png", box(255), mode)
        mask = load_mask(path, ignore_255=True)
        assert not np.ma.getdata(mask).any()
        np.testing.assert_array_equal(np.ma.getmaskarray(mask), box() > 0)
        np.testing.assert_array_equal(load_mask(path, ignore_255=False), box() > 0)

    @pytest.mark.parametrize("void", [False, True])
    def test_colours_of_a_palette_are_classes(self, tmp_path: Path, void: bool) -> None:
        # PASCAL VOC's first and eighth colour; 255 is its boundary, which belongs to no class.
        numbers = box(8)
        numbers[4, :4] = 1
        numbers[5] = 255 if void else 0
        palette = [0] * 768
        palette[3:6], palette[24:27], palette[765:] = [128, 0, 0], [64, 0, 0], [224, 224, 192]
        image = Image.fromarray(numbers)
        image.putpalette(palette)
        image.save(tmp_path / "mask.png")
        mask = load_mask(tmp_path / "mask.png")
        expected = (numbers > 0) & (numbers < 255)
        np.testing.assert_array_equal(np.ma.getdata(mask), expected)
        np.testing.assert_array_equal(np.ma.getmaskarray(mask), numbers == 255)

    def test_a_palette_with_one_class_has_nothing_to_ignore(self, tmp_path: Path) -> None:
        image = Image.fromarray(box(255))
        image.putpalette([0] * 765 + [200, 40, 40])
        image.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(load_mask(tmp_path / "mask.png"), box() > 0)

    def test_dark_colours_of_an_rgb_file_count(self, tmp_path: Path) -> None:
        values = np.zeros((6, 8, 3), np.uint8)
        values[1, 2:7], values[3, :4] = (64, 0, 0), (0, 255, 0)
        mask = load_mask(save(tmp_path / "mask.png", values))
        np.testing.assert_array_equal(mask, values.any(-1))

    def test_many_colours_are_a_soft_mask(self, tmp_path: Path) -> None:
        values = np.zeros((6, 50, 3), np.uint8)
        values[1, :, 0] = np.arange(3, 253, 5)
        mask = load_mask(save(tmp_path / "mask.png", values))
        np.testing.assert_array_equal(mask, values[..., 0] > 127)

    def test_nothing_is_drawn_where_it_is_transparent(self, tmp_path: Path) -> None:
        values = np.zeros((6, 8, 4), np.uint8)
        values[..., 0], values[..., 3] = 255, box(90)
        np.testing.assert_array_equal(load_mask(save(tmp_path / "mask.png", values)), box() > 0)

    def test_an_empty_mask(self, tmp_path: Path) -> None:
        assert not load_mask(save(tmp_path / "mask.png", np.zeros((6, 8), np.uint8))).any()

    @pytest.mark.parametrize("orientation", [3, 6, 8])
    def test_is_turned_as_images_are(self, tmp_path: Path, orientation: int) -> None:
        from anomalib_lite.images import ImageSource

        exif = Image.Exif()
        exif[0x112] = orientation
        values = np.zeros((24, 32), np.uint8)
        values[:8, :8] = 255
        Image.fromarray(values).save(tmp_path / "mask.png", exif=exif)
        seen = ImageSource(tmp_path / "mask.png")[0]
        np.testing.assert_array_equal(load_mask(tmp_path / "mask.png"), seen[..., 0] > 127)


class TestSeveralFiles:
    def test_a_directory_is_the_union(self, tmp_path: Path) -> None:
        second = np.zeros((6, 8), np.uint8)
        second[5] = 254
        save(tmp_path / "7/000.png", box())
        save(tmp_path / "7/001.png", second)
        np.testing.assert_array_equal(load_mask(tmp_path / "7"), (box() > 0) | (second > 0))

    def test_what_one_file_marks_another_cannot_ignore(self, tmp_path: Path) -> None:
        ids = np.full((6, 8), 255, np.uint8)
        ids[2:5], ids[5] = 1, 0
        save(tmp_path / "7/000.png", box())
        save(tmp_path / "7/001.png", ids)
        mask = load_mask(tmp_path / "7")
        np.testing.assert_array_equal(np.ma.getmaskarray(mask), (ids == 255) & (box() == 0))
        np.testing.assert_array_equal(np.ma.getdata(mask), (box() > 0) | (ids == 1))

    def test_sizes_must_agree(self, tmp_path: Path) -> None:
        save(tmp_path / "7/000.png", box())
        save(tmp_path / "7/001.png", box().T)
        with pytest.raises(ImageError, match=r"one size .*\(6, 8\) .*\(8, 6\) .*001\.png"):
            load_mask(tmp_path / "7")


class TestErrors:
    def test_broken_and_missing_files(self, tmp_path: Path) -> None:
        whole = save(tmp_path / "whole.png", box()).read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text.png").write_text("no image")
        (tmp_path / "empty").mkdir()
        for name in ("cut.png", "text.png"):
            with pytest.raises(ImageError, match=f"{name} must be a readable image"):
                load_mask(tmp_path / name)
        with pytest.raises(MissingPathError, match="there is no file"):
            load_mask(tmp_path / "none.png")
        with pytest.raises(MissingPathError, match="no image is in it"):
            load_mask(tmp_path / "empty")

    def test_a_mask_of_nearly_everything_may_be_inverted(self, tmp_path: Path) -> None:
        values = np.full((30, 40), 255, np.uint8)
        values[:5, :10] = 0  # 95.8 % are marked
        path = save(tmp_path / "mask.png", values)
        with pytest.raises(InvalidValueError, match=r"at most 95 % .*got 95.83 %.*inverted=True"):
            load_mask(path)
        np.testing.assert_array_equal(load_mask(path, inverted=True), values == 0)
        np.testing.assert_array_equal(load_mask(path, inverted=False), values > 0)
        sample = Sample(path, 1, "cut", path)
        assert sample.mask(inverted=True).sum() == 50  # type: ignore[union-attr]
        values[:6, :10] = 0  # exactly 95 %
        assert load_mask(save(path, values)).mean() == 0.95

    def test_ignored_pixels_are_not_inverted(self, tmp_path: Path) -> None:
        values = np.full((6, 8), 1, np.uint8)
        values[0, :2], values[5] = 0, 255
        path = save(tmp_path / "mask.png", values)
        mask = load_mask(path, inverted=True)
        np.testing.assert_array_equal(np.ma.getdata(mask), values == 0)
        np.testing.assert_array_equal(np.ma.getmaskarray(mask), values == 255)


def test_metrics_leave_ignored_pixels_out() -> None:
    rng = np.random.default_rng(0)
    amap = rng.normal(size=(12, 20)).astype(np.float32)
    truth = np.zeros((12, 20), bool)
    truth[2:5, 3:9] = True
    ignored = np.zeros_like(truth)
    ignored[:, 8:] = True  # a column of the defect, too
    mask = np.ma.MaskedArray(truth, mask=ignored)
    kept = [truth[:, :8]], [amap[:, :8]]
    assert pixel_metrics([mask], [amap]) == pixel_metrics(*kept)
    assert seg_f1([mask], [amap], 0.5) == seg_f1(*kept, 0.5)
    assert aupro([mask], [amap]) != aupro([truth], [amap])
    amap[ignored] = 1e6
    assert pixel_metrics([mask], [amap]) == pixel_metrics(*kept)


@pytest.mark.filterwarnings("ignore::anomalib_lite.errors.LeftOutWarning")  # masks of good parts
class TestBesideTheImages:
    @pytest.fixture
    def parts(self, tmp_path: Path) -> Path:
        for i in range(6):
            save(tmp_path / f"good/{i}.png", box())
            save(tmp_path / f"good/{i}_GT.png", box(0))
        for i, ending in enumerate(("_mask", "_gt", "_LABEL")):
            save(tmp_path / f"bad/{i}.jpg", box())
            save(tmp_path / f"bad/{i}{ending}.png", box())
        return tmp_path

    @pytest.mark.parametrize("masks", [None, "bad", "."])
    def test_a_folder_takes_them_for_masks(self, parts: Path, masks: str | None) -> None:
        ds = Folder(parts, anomalous="bad", masks=masks, name="parts")
        assert repr(ds) == "Folder('parts': 5 train, 4 test (1 good, 3 bad), masks)"
        assert [s.path.name for s in ds.test if s.label] == ["0.jpg", "1.jpg", "2.jpg"]
        found = [s.mask_path.name for s in ds.test if s.mask_path]
        assert found == ["0_mask.png", "1_gt.png", "2_LABEL.png"]
        assert all(s.path.stem.isdecimal() for s in ds.train + ds.test)

    def test_those_of_good_images_are_said(self, parts: Path) -> None:
        with pytest.warns(LeftOutWarning, match=r"masks beside images: 6 \(0_GT\.png \.\.\.\)"):
            Folder(parts, anomalous="bad")

    def test_a_missing_one_is_named(self, parts: Path) -> None:
        (parts / "bad/1_gt.png").unlink()
        assert not Folder(parts, anomalous="bad").has_masks
        with pytest.raises(MissingPathError, match=r"bad.1\.jpg must have a mask"):
            Folder(parts, anomalous="bad", masks="bad")

    def test_an_image_whose_name_ends_like_a_mask(self, parts: Path) -> None:
        save(parts / "good/front_label.png", box())
        assert len(Folder(parts, test_size=0).train) == 7

    def test_two_masks_for_one_image(self, parts: Path) -> None:
        save(parts / "bad/0_GT.png", box())
        with pytest.raises(
            InvalidValueError, match=r"one mask for each image, got .*0_.* for .*0\.j"
        ):
            Folder(parts, anomalous="bad")

    def test_files_that_differ_by_their_suffix(self, parts: Path) -> None:
        save(parts / "good/3.bmp", box())
        with pytest.raises(InvalidValueError, match=r"3\.bmp and .*3\.png.*add _mask to its name"):
            Folder(parts)

    def test_masks_alone(self, parts: Path) -> None:
        save(parts / "odd/masks/7.png", box())
        with pytest.raises(
            MissingPathError, match=r"hold images outside of masks, got none in .*odd"
        ):
            Folder(parts, anomalous="odd", masks="odd/masks")

    def test_in_the_layout_of_mvtec_ad(self, parts: Path) -> None:
        (parts / "plate/train").mkdir(parents=True)
        (parts / "good").rename(parts / "plate/train/good")
        (parts / "plate/test").mkdir()
        (parts / "bad").rename(parts / "plate/test/bad")
        ds = MVTecAD(parts, "plate")
        assert repr(ds) == "MVTecAD('plate': 6 train, 3 test (3 bad), masks)"
