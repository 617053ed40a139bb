"""Layouts, read from miniature copies with images that are not square."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.datasets import (
    ELPV,
    Dataset,
    Folder,
    MVTecAD,
    MVTecAD2,
    Sample,
    open_dataset,
)
from anomalib_lite.errors import (
    InvalidTypeError,
    InvalidValueError,
    LeftOutWarning,
    MissingDependencyError,
    MissingPathError,
)

needs_elpv = pytest.mark.skipif(
    importlib.util.find_spec("elpv_dataset") is None, reason="elpv-dataset is not installed"
)


def draw(path: Path, *, value: int = 0) -> Path:
    """A gray image 8 wide and 6 high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 6), value).save(path)
    return path


def names(samples: tuple[Sample, ...]) -> list[str]:
    return [f"{s.path.parent.name}/{s.path.name}" for s in samples]


@pytest.fixture
def plate(tmp_path: Path) -> Path:
    """An MVTec AD category with every suffix that it may have."""
    for place in ("train/good/1.PNG", "train/good/0.jpg", "test/good/2.bmp", "test/cut/a.png"):
        draw(tmp_path / "plate" / place)
    draw(tmp_path / "plate/test/bent/b.tiff")
    draw(tmp_path / "plate/ground_truth/cut/a_mask.png", value=255)
    draw(tmp_path / "plate/ground_truth/bent/b.bmp", value=255)
    return tmp_path


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """Directories of a user's own: 10 good parts, two kinds of bad ones."""
    for i in range(10):
        draw(tmp_path / f"ok/{'ab'[i % 2]}/{i}.png")
    for kind in ("scratch", "dent"):
        for i in range(2):
            draw(tmp_path / f"bad/{kind}/{i}.jpg")
            draw(tmp_path / f"masks/{kind}/{i}_mask.png", value=255)
    return tmp_path


class TestMVTecAD:
    def test_reads_the_layout(self, plate: Path) -> None:
        ds = MVTecAD(plate, "plate")
        assert ds.name == "plate"
        assert names(ds.train) == ["good/0.jpg", "good/1.PNG"]
        assert names(ds.test) == ["bent/b.tiff", "cut/a.png", "good/2.bmp"]
        assert [s.label for s in ds.train + ds.test] == [0, 0, 1, 1, 0]
        assert [s.kind for s in ds.test] == ["bent", "cut", "good"]
        masks = [s.mask_path.name if s.mask_path else None for s in ds.test]
        assert masks == ["b.bmp", "a_mask.png", None]
        assert ds.has_masks
        assert repr(ds) == "MVTecAD('plate': 2 train, 3 test (1 bent, 1 cut, 1 good), masks)"

    def test_a_mask_is_bool_rows_first(self, plate: Path) -> None:
        bent, _, good = MVTecAD(plate, "plate").test
        mask = bent.mask(inverted=False)
        assert mask is not None
        assert (mask.shape, mask.dtype, bool(mask.all())) == ((6, 8), bool, True)
        assert good.mask() is None

    def test_without_ground_truth_there_are_no_masks(self, plate: Path) -> None:
        (plate / "plate/ground_truth").rename(plate / "plate/elsewhere")
        ds = MVTecAD(str(plate), "plate")
        assert [s.mask_path for s in ds.test] == [None, None, None]
        assert not ds.has_masks
        with pytest.raises(MissingPathError, match="an anomalous image must have a mask"):
            ds.test[0].mask()

    def test_a_single_missing_mask_is_named(self, plate: Path) -> None:
        draw(plate / "plate/test/cut/c.png")
        with pytest.raises(MissingPathError, match=r"cut.c\.png must have a mask .*c_mask\.png"):
            MVTecAD(plate, "plate")

    def test_a_kind_without_masks_is_named(self, plate: Path) -> None:
        draw(plate / "plate/test/rust/c.png")
        with pytest.raises(MissingPathError, match="ground_truth/rust must be an existing"):
            MVTecAD(plate, "plate")

    def test_two_masks_for_one_image(self, plate: Path) -> None:
        draw(plate / "plate/ground_truth/cut/a_mask.bmp")
        with pytest.raises(InvalidValueError, match="one mask for each image"):
            MVTecAD(plate, "plate")

    def test_hidden_and_other_files_are_no_images(self, plate: Path) -> None:
        expected = names(MVTecAD(plate, "plate").train)
        (plate / "plate/train/good/._0.jpg").write_bytes(b"resource fork")
        (plate / "plate/train/good/notes.txt").write_text("lamp replaced on Monday")
        (plate / "plate/test/.cache").mkdir()
        with pytest.warns(LeftOutWarning, match=r"hidden or .*: 1 \(\._0\.jpg\); \.txt: 1 \(not"):
            ds = MVTecAD(plate, "plate")
        assert names(ds.train) == expected
        assert len(ds.test) == 3

    def test_an_unknown_category_names_the_closest(self, plate: Path) -> None:
        (plate / "readme").mkdir()
        assert MVTecAD.categories(plate) == ["plate"]
        with pytest.raises(MissingPathError, match=r"\['plate'\].*'plates'.*mean 'plate'\?"):
            MVTecAD(plate, "plates")

    def test_a_category_as_root(self, plate: Path) -> None:
        with pytest.raises(MissingPathError, match="is a category itself: pass its parent"):
            MVTecAD(plate / "plate", "plate")

    @pytest.mark.parametrize("place", ["train/good", "test/good"])
    def test_an_empty_directory_is_named(self, plate: Path, place: str) -> None:
        for path in (plate / "plate" / place).iterdir():
            path.unlink()
        with pytest.raises(MissingPathError, match=f"{place} must hold images"):
            MVTecAD(plate, "plate")

    def test_missing_directories_are_named(self, plate: Path) -> None:
        with pytest.raises(MissingPathError, match=r"no such directory \(already .*nowhere is"):
            MVTecAD(plate / "nowhere" / "data", "plate")
        with pytest.raises(MissingPathError, match="got the file"):
            MVTecAD(draw(plate / "image.png"), "plate")
        with pytest.raises(InvalidTypeError, match="root must be a path, got int"):
            MVTecAD(3, "plate")  # type: ignore[arg-type]

    def test_real_photographs(self, data_dir: Path) -> None:
        ds = MVTecAD(data_dir, "magnetic_tile")
        assert (len(ds.train), len(ds.test)) == (446, 462)
        assert sum(s.label for s in ds.test) == 206
        assert ds.has_masks
        for sample in ds.test[::25]:
            with Image.open(sample.path) as image:
                size = image.size
            mask = sample.mask()
            assert mask is None or mask.shape == size[::-1]
        # Their masks are soft at the edges; "non-zero" would find 344 regions instead.
        assert sum(_n_regions(s) for s in ds.test if s.label) == 239


def _n_regions(sample: Sample) -> int:
    from scipy import ndimage

    return int(ndimage.label(sample.mask(), structure=np.ones((3, 3)))[1])


class TestFolder:
    def test_splits_the_normal_images(self, line: Path) -> None:
        ds = Folder(line, normal="ok", anomalous="bad", masks="masks", test_size=0.3)
        assert (len(ds.train), len(ds.test)) == (7, 3 + 4)
        assert {s.kind for s in ds.train} == {"good"}
        assert [s.kind for s in ds.test] == ["good"] * 3 + ["dent"] * 2 + ["scratch"] * 2
        assert [s.label for s in ds.test] == [0] * 3 + [1] * 4
        everything = sorted(s.path for s in ds.train + ds.test if s.label == 0)
        assert everything == sorted((line / "ok").rglob("*.png"))
        assert names(ds.train) == sorted(names(ds.train))
        assert ds.name == line.name

    def test_the_split_is_the_seed_alone(self, line: Path) -> None:
        def held_out(seed: int) -> list[str]:
            return names(Folder(line, normal="ok", random_state=seed, test_size=0.4).test)

        # RandomState(0).permutation(10) starts with 2, 8, 4, 9 on every machine and NumPy.
        assert held_out(0) == ["a/4.png", "a/8.png", "b/7.png", "b/9.png"]
        assert held_out(0) == held_out(0)
        assert len({tuple(held_out(seed)) for seed in range(5)}) > 1

    def test_finds_masks_by_kind(self, line: Path) -> None:
        ds = Folder(line, normal="ok", anomalous=["bad/dent", "bad/scratch"], masks="masks")
        found = {names((s,))[0]: s.mask_path for s in ds.test if s.label}
        assert found["scratch/1.jpg"] == line / "masks/scratch/1_mask.png"
        assert found["dent/0.jpg"] == line / "masks/dent/0_mask.png"

    def test_masks_may_lie_beside_the_images(self, line: Path) -> None:
        draw(line / "spots/7.png")
        draw(line / "spots/truth/7.png")
        ds = Folder(line, normal="ok", anomalous="spots", masks="spots/truth")
        (spot,) = [s for s in ds.test if s.label]
        assert spot.mask_path == line / "spots/truth/7.png"

    def test_a_mask_never_serves_two_images(self, line: Path) -> None:
        for i in range(2):
            draw(line / f"flat/{i}.png")
        with pytest.raises(InvalidValueError, match="every mask must belong to one image"):
            Folder(line, normal="ok", anomalous="bad", masks="flat")

    def test_a_missing_mask_is_named(self, line: Path) -> None:
        (line / "masks/dent/1_mask.png").unlink()
        with pytest.raises(MissingPathError, match=r"dent.1\.jpg must have a mask"):
            Folder(line, normal="ok", anomalous="bad", masks="masks")

    def test_a_test_directory_of_its_own(self, line: Path) -> None:
        draw(line / "tuesday/0.png")
        ds = Folder(line, normal="ok", normal_test="tuesday", name="line 3")
        assert (len(ds.train), names(ds.test), ds.name) == (10, ["tuesday/0.png"], "line 3")

    def test_all_for_training(self, line: Path) -> None:
        ds = Folder(line, normal="ok", anomalous="bad", test_size=0)
        assert len(ds.train) == 10
        assert all(s.label for s in ds.test)

    @pytest.mark.parametrize("test_size", [0.001, 0.999])
    def test_both_sides_get_an_image(self, line: Path, test_size: float) -> None:
        ds = Folder(line, normal="ok", test_size=test_size)
        assert min(len(ds.train), len(ds.test)) == 1

    def test_one_image_cannot_be_split(self, line: Path) -> None:
        draw(line / "single/0.png")
        with pytest.raises(InvalidValueError, match="at least 2 normal images"):
            Folder(line, normal="single")
        assert len(Folder(line, normal="single", test_size=0).train) == 1

    @pytest.mark.parametrize("overlap", [{"normal_test": "ok/a"}, {"anomalous": "ok/../ok/b"}])
    def test_no_file_is_used_twice(self, line: Path, overlap: dict[str, str]) -> None:
        with pytest.raises(InvalidValueError, match="every file must occur once"):
            Folder(line, normal="ok", **overlap)  # type: ignore[arg-type]

    def test_good_parts_among_the_bad_are_refused(self, line: Path) -> None:
        draw(line / "bad/good/0.png")
        with pytest.raises(InvalidValueError, match="anomalous must name directories of bad"):
            Folder(line, normal="ok", anomalous="bad")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"normal": "okay"}, "normal must be an existing directory"),
            ({"anomalous": "wrong"}, "anomalous must be an existing directory"),
            ({"test_size": 1}, r"test_size must be a number in \[0, 1\)"),
            ({"random_state": "zero"}, "random_state must be"),
        ],
    )
    def test_refuses(self, line: Path, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(InvalidValueError, match=f"Folder: {message}"):
            Folder(line, **{"normal": "ok", **arguments})  # type: ignore[arg-type]

    def test_a_relative_root(self, line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(line)
        ds = Folder(".", normal="ok")
        assert ds.name == line.name
        assert not ds.train[0].path.is_absolute()

    def test_one_image_in_two_directories_is_refused(self, line: Path) -> None:
        with pytest.raises(InvalidValueError, match=r"every file must occur once.*0\.jpg 2 times"):
            Folder(line, normal="ok", anomalous=["bad", "bad/dent"], masks="masks")


class TestOpenDataset:
    def test_mvtec_ad(self, plate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = MVTecAD(plate, "plate")
        for layout in ("auto", "mvtec"):
            ds = open_dataset(plate / "plate", layout)
            assert (type(ds), ds.train, ds.test) == (MVTecAD, expected.train, expected.test)
        for place, here in (("plate", "."), ("plate/train", "..")):
            monkeypatch.chdir(plate / place)
            assert repr(open_dataset(here)) == repr(expected)

    def test_mvtec_ad_2(self, tmp_path: Path) -> None:
        for place in ("train/good", "validation/good", "test_public/good", "test_public/bad"):
            draw(tmp_path / "can" / place / "0.png")
        draw(tmp_path / "can/test_public/ground_truth/bad/0_mask.png", value=255)
        ds = open_dataset(tmp_path / "can")
        assert repr(ds) == repr(MVTecAD2(tmp_path, "can"))

    @pytest.mark.parametrize("masks", ["masks", "ground_truth"])
    def test_a_folder_finds_its_directories(self, line: Path, masks: str) -> None:
        (line / "ok").rename(line / "good")
        for kind in ("scratch", "dent"):
            (line / "bad" / kind).rename(line / kind)
        (line / "bad").rmdir()
        (line / "masks").rename(line / masks)
        ds = open_dataset(line)
        expected = Folder(line, anomalous=["dent", "scratch"], masks=masks)
        assert (ds.name, ds.train, ds.test) == (expected.name, expected.train, expected.test)
        assert (len(ds.train), len(ds.test), ds.has_masks) == (8, 6, True)
        assert len(open_dataset(line, test_size=0).train) == 10

    def test_directories_can_be_named(self, line: Path) -> None:
        ds = open_dataset(line, normal="ok", anomalous=["bad/dent"], masks="masks/dent/..")
        assert [s.kind for s in ds.test if s.label] == ["dent"] * 2
        ds = open_dataset(str(line), "folder", normal="./ok/", masks=line / "masks")
        assert [s.kind for s in ds.test if s.label] == ["dent"] * 2 + ["scratch"] * 2
        draw(line / "train/good/0.png")
        draw(line / "train/good/1.png")
        ds = open_dataset(line, "folder", normal="train/good", anomalous="bad")
        assert (len(ds.train), len(ds.test)) == (1, 5)

    def test_refuses(self, plate: Path, line: Path) -> None:
        with pytest.raises(InvalidValueError, match=r"layout must be one of .*mean 'mvtec'\?"):
            open_dataset(plate / "plate", "mvtec_ad")
        message = r"^Asker: normal, anomalous and masks are for the folder layout.*layout='folder'"
        for options in ({"normal": "good"}, {"anomalous": []}, {"masks": "ground_truth"}):
            with pytest.raises(InvalidValueError, match=message):
                open_dataset(plate / "plate", where="Asker", **options)  # type: ignore[arg-type]
        with pytest.raises(MissingPathError, match="open_dataset: root must be an existing"):
            open_dataset(line / "none")
        with pytest.raises(InvalidTypeError, match="open_dataset: root must be a path, got int"):
            open_dataset(3)  # type: ignore[arg-type]
        with pytest.raises(InvalidTypeError, match="normal must be a path, got int"):
            open_dataset(line, normal=3)  # type: ignore[arg-type]
        with pytest.raises(MissingPathError, match="normal must be an existing directory"):
            open_dataset(line, "folder")  # has no "good"


class TestDataset:
    def test_training_on_anomalies_is_refused(self) -> None:
        with pytest.raises(InvalidValueError, match=r"normal images only, got x\.png .*'dent'"):
            Dataset("d", [Sample(Path("x.png"), 1, "dent")], [])

    def test_training_on_nothing_is_refused(self) -> None:
        with pytest.raises(InvalidValueError, match="Dataset: train must hold at least one"):
            Dataset("d", [], [Sample(Path("x.png"), 0, "good")])

    def test_a_test_image_is_no_training_image(self) -> None:
        train, test = Sample(Path("a/x.png"), 0, "good"), Sample(Path("a/./b/../x.png"), 0, "good")
        with pytest.raises(InvalidValueError, match=r"occur once.*x\.png 2 times"):
            Dataset("d", [train], [test])


class TestELPV:
    @needs_elpv
    @pytest.mark.parametrize(
        ("cell", "n_train", "n_normal", "n_defect"),
        [("all", 1005, 503, 715), ("mono", 392, 196, 313), ("poly", 613, 307, 402)],
    )
    def test_counts(self, cell: str, n_train: int, n_normal: int, n_defect: int) -> None:
        ds = ELPV(cell)
        assert ds.name == f"elpv_{cell}"
        assert len(ds.train) == n_train
        assert [s.label for s in ds.test] == [0] * n_normal + [1] * n_defect
        assert {s.kind for s in ds.train} == {"normal"}
        assert {s.kind for s in ds.test} == {"normal", "defect"}
        assert not ds.has_masks
        assert all(s.path.is_file() for s in ds.train + ds.test)

    @needs_elpv
    def test_uncertain_cells(self) -> None:
        certain = ELPV("mono")
        for uncertain, label in (("round", 0), ("anomalous", 1)):
            ds = ELPV("mono", uncertain=uncertain)
            assert ds.train == certain.train
            assert [s.label for s in ds.test if s.kind == "uncertain_33"] == [label] * 117
            assert [s.label for s in ds.test if s.kind == "uncertain_67"] == [1] * 56
            assert [s for s in ds.test if "uncertain" not in s.kind] == list(certain.test)

    @needs_elpv
    def test_agrees_with_the_labels_file(self) -> None:
        data = ELPV().train[0].path.parents[1]
        labels = dict(x.split()[:2] for x in (data / "labels.csv").read_text().splitlines())
        ds = ELPV(random_state=3)
        assert ds.train != ELPV().train
        for sample in ds.train + ds.test:
            assert float(labels[f"images/{sample.path.name}"]) == sample.label

    @needs_elpv
    def test_refuses(self) -> None:
        with pytest.raises(InvalidValueError, match=r"cell must be one of .*'mono'"):
            ELPV("monocrystalline")
        with pytest.raises(InvalidValueError, match="uncertain must be one of"):
            ELPV(uncertain="drop")
        with pytest.raises(InvalidValueError, match=r"test_size must be a number in \(0, 1\)"):
            ELPV(test_size=0)

    def test_the_remedy_when_it_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r'pip install "anomalib-lite\[demo\]"'):
            ELPV()

    def test_a_package_without_its_data(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "elpv_dataset").mkdir()
        (tmp_path / "elpv_dataset/__init__.py").touch()
        spec = importlib.util.spec_from_file_location(
            "elpv_dataset",
            tmp_path / "elpv_dataset/__init__.py",
            submodule_search_locations=[os.fspath(tmp_path / "elpv_dataset")],
        )
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        with pytest.raises(MissingPathError, match=r"must hold .*labels\.csv"):
            ELPV()
