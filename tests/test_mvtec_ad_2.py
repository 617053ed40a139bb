"""MVTec AD 2, read from a miniature of its layout with images that are not square."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.datasets import MVTecAD, MVTecAD2, Sample
from anomalib_lite.errors import InvalidTypeError, InvalidValueError, MissingPathError

PLACES = (
    *("train/good/001_regular.png", "train/good/000_regular.png"),
    *("validation/good/000_regular.png", "validation/good/001_regular.png"),
    *("test_public/good/000_regular.png", "test_public/good/000_overexposed.png"),
    *("test_public/bad/000_regular.png", "test_public/bad/001_shift_1.png"),
    *("test_private/001_regular.png", "test_private/000_regular.png"),
    "test_private_mixed/000_mixed.png",
)


def draw(path: Path, *, corner: int = 0) -> Path:
    """A gray image 8 wide and 6 high whose first 2 rows and 3 columns have the value of corner."""
    pixels = np.zeros((6, 8), np.uint8)
    pixels[:2, :3] = corner
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def names(samples: tuple[Sample, ...]) -> list[str]:
    return [f"{s.path.parent.name}/{s.path.name}" for s in samples]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two categories, can and vial."""
    for category in ("can", "vial"):
        for place in PLACES:
            draw(tmp_path / category / place)
        for image in (tmp_path / category / "test_public/bad").iterdir():
            mask = f"test_public/ground_truth/bad/{image.stem}_mask.png"
            draw(tmp_path / category / mask, corner=255)
    return tmp_path


@pytest.fixture
def can(root: Path) -> Path:
    return root / "can"


class TestReading:
    def test_train_and_test(self, root: Path) -> None:
        ds = MVTecAD2(root, "can")
        assert ds.name == "can"
        assert names(ds.train) == ["good/000_regular.png", "good/001_regular.png"]
        assert names(ds.test) == [
            *("good/000_overexposed.png", "good/000_regular.png"),
            *("bad/000_regular.png", "bad/001_shift_1.png"),
        ]
        assert [s.label for s in ds.train + ds.test] == [0, 0, 0, 0, 1, 1]
        assert [s.kind for s in ds.test] == ["good", "good", "bad", "bad"]
        assert {s.path.parts[-3] for s in ds.test} == {"test_public"}
        assert repr(ds) == "MVTecAD2('can': 2 train, 4 test (2 good, 2 bad), masks)"

    def test_each_bad_image_has_its_own_mask(self, root: Path) -> None:
        *good, first, second = MVTecAD2(root, "can").test
        assert [s.mask_path for s in good] == [None, None]
        directory = root / "can/test_public/ground_truth/bad"
        assert first.mask_path == directory / "000_regular_mask.png"
        assert second.mask_path == directory / "001_shift_1_mask.png"
        mask = first.mask()
        assert mask is not None
        assert (mask.shape, mask.dtype, int(mask.sum())) == ((6, 8), bool, 6)
        assert mask[:2, :3].all()

    def test_validation_is_normal_and_apart_from_train(self, root: Path) -> None:
        ds = MVTecAD2(root, "can")
        assert names(ds.validation) == ["good/000_regular.png", "good/001_regular.png"]
        assert {s.path.parts[-3] for s in ds.validation} == {"validation"}
        assert {(s.label, s.kind, s.mask_path) for s in ds.validation} == {(0, "good", None)}

    def test_private_images_are_paths(self, root: Path, can: Path) -> None:
        ds = MVTecAD2(str(root), "can")
        private = (can / "test_private/000_regular.png", can / "test_private/001_regular.png")
        assert ds.test_private == private
        assert ds.test_private_mixed == (can / "test_private_mixed/000_mixed.png",)

    def test_private_directories_may_be_absent(self, root: Path, can: Path) -> None:
        shutil.rmtree(can / "test_private")
        shutil.rmtree(can / "test_private_mixed")
        ds = MVTecAD2(root, "can")
        assert (ds.test_private, ds.test_private_mixed) == ((), ())
        assert len(ds.test) == 4

    def test_without_ground_truth_there_are_no_masks(self, root: Path, can: Path) -> None:
        shutil.rmtree(can / "test_public/ground_truth")
        ds = MVTecAD2(root, "can")
        assert not ds.has_masks
        assert [s.label for s in ds.test] == [0, 0, 1, 1]

    def test_categories(self, root: Path) -> None:
        (root / "readme").mkdir()
        assert MVTecAD2.categories(root) == ["can", "vial"]
        assert MVTecAD2(root, "vial").train[0].path.is_relative_to(root / "vial")


class TestErrors:
    @pytest.mark.parametrize(
        "place",
        [
            *("train/good", "validation/good", "test_public/good", "test_public/bad"),
            *("test_public/ground_truth/bad", "test_private", "test_private_mixed"),
        ],
    )
    def test_an_empty_directory_is_named(self, root: Path, can: Path, place: str) -> None:
        for path in (can / place).iterdir():
            path.unlink()
        with pytest.raises(MissingPathError, match=f"^MVTecAD2: {place} must hold images"):
            MVTecAD2(root, "can")

    @pytest.mark.parametrize(
        "place",
        [
            *("validation/good", "test_public/good", "test_public/bad"),
            "test_public/ground_truth/bad",
        ],
    )
    def test_a_missing_directory_is_named(self, root: Path, can: Path, place: str) -> None:
        shutil.rmtree(can / place)
        message = f"^MVTecAD2: {place} must be an existing directory"
        with pytest.raises(MissingPathError, match=message):
            MVTecAD2(root, "can")

    def test_a_missing_test_is_named(self, root: Path, can: Path) -> None:
        shutil.rmtree(can / "test_public")
        with pytest.raises(MissingPathError, match=r"already .*test_public is missing"):
            MVTecAD2(root, "can")

    @pytest.mark.parametrize("place", ["test_private", "test_private_mixed"])
    def test_a_file_in_place_of_private_images(self, root: Path, can: Path, place: str) -> None:
        shutil.rmtree(can / place)
        (can / place).touch()
        with pytest.raises(MissingPathError, match=f"{place} must be a directory, got the file"):
            MVTecAD2(root, "can")

    def test_a_missing_mask_is_named(self, root: Path, can: Path) -> None:
        (can / "test_public/ground_truth/bad/001_shift_1_mask.png").unlink()
        message = r"^MVTecAD2: .*001_shift_1\.png must have a mask .*bad.001_shift_1_mask\.png"
        with pytest.raises(MissingPathError, match=message) as caught:
            MVTecAD2(root, "can")
        assert "remove the whole test_public/ground_truth directory" in str(caught.value)

    def test_two_masks_for_one_image(self, root: Path, can: Path) -> None:
        draw(can / "test_public/ground_truth/bad/000_regular_mask.bmp")
        with pytest.raises(InvalidValueError, match="one mask for each image"):
            MVTecAD2(root, "can")

    def test_an_unknown_category_names_the_closest(self, root: Path) -> None:
        message = r"^MVTecAD2: .*\['can', 'vial'\].*got 'vials'\. Did you mean 'vial'\?"
        with pytest.raises(MissingPathError, match=message):
            MVTecAD2(root, "vials")

    def test_a_category_as_root(self, can: Path) -> None:
        with pytest.raises(MissingPathError, match="can is a category itself: pass its parent"):
            MVTecAD2(can, "can")

    def test_a_root_without_categories(self, root: Path) -> None:
        with pytest.raises(MissingPathError, match="directory that has a train/good directory"):
            MVTecAD2(root / "can/train", "can")

    def test_no_root(self, root: Path) -> None:
        with pytest.raises(MissingPathError, match=r"^MVTecAD2: root must be an existing"):
            MVTecAD2(root / "nowhere", "can")
        with pytest.raises(MissingPathError, match=r"^MVTecAD2: root must be an existing"):
            MVTecAD2.categories(root / "nowhere")
        with pytest.raises(InvalidTypeError, match=r"^MVTecAD2: root must be a path, got int"):
            MVTecAD2(3, "can")  # type: ignore[arg-type]

    def test_the_layout_of_the_other_data_set(self, root: Path) -> None:
        for place in ("train/good/0.png", "test/dent/0.png"):
            draw(root / "plate" / place)
        with pytest.raises(MissingPathError, match=r"test_public, got test: .*Use MVTecAD in"):
            MVTecAD2(root, "plate")
        with pytest.raises(MissingPathError, match=r"test, got test_public: .*Use MVTecAD2 in"):
            MVTecAD(root, "can")
        assert len(MVTecAD(root, "plate").test) == 1
