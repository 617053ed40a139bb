"""Published data sets, read from miniatures of their layouts with images that are not square."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.datasets import (
    BTAD,
    Dataset,
    KolektorSDD2,
    MagneticTile,
    MVTecAD,
    MVTecLOCO,
    RealIAD,
    Sample,
    Textile,
    VisA,
)
from anomalib_lite.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingDependencyError,
    MissingPathError,
)


def draw(path: Path, value: int = 0) -> Path:
    """A gray image 8 wide and 6 high whose first 2 rows and 3 columns have a value."""
    pixels = np.zeros((6, 8), np.uint8)
    pixels[:2, :3] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def names(samples: tuple[Sample, ...]) -> list[str]:
    return [f"{s.path.parent.name}/{s.path.name}" for s in samples]


def test_each_states_licence_source_and_citation() -> None:
    for cls in (BTAD, KolektorSDD2, MagneticTile, MVTecLOCO, RealIAD, Textile, VisA):
        assert cls.licence
        assert cls.source.startswith("https://")
        assert "20" in cls.citation


@pytest.mark.parametrize("cls", [MVTecLOCO, BTAD, VisA, RealIAD, KolektorSDD2, MagneticTile])
def test_no_root(tmp_path: Path, cls: Callable[..., Dataset]) -> None:
    more = () if cls in (KolektorSDD2, MagneticTile) else ("x",)
    where = cls.__name__  # type: ignore[attr-defined]
    with pytest.raises(MissingPathError, match=f"^{where}: root must be an existing directory"):
        cls(tmp_path / "nowhere", *more)
    with pytest.raises(InvalidTypeError, match=f"^{where}: root must be a path, got int"):
        cls(3, *more)
    with pytest.raises(MissingPathError, match=f"^{where}: "):
        cls(tmp_path, *more)


class TestMVTecLOCO:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        home = tmp_path / "pushpins"
        for place in ("train/good/1.png", "train/good/0.png", "validation/good/0.png"):
            draw(home / place)
        for kind in ("good", "logical_anomalies", "structural_anomalies"):
            draw(home / f"test/{kind}/000.png")
        draw(home / "test/logical_anomalies/001.png")
        for place in ("logical_anomalies/000", "logical_anomalies/001", "structural_anomalies/000"):
            draw(home / f"ground_truth/{place}/000.png", 254)
        second = np.zeros((6, 8), np.uint8)
        second[5] = 253
        Image.fromarray(second).save(home / "ground_truth/logical_anomalies/001/001.png")
        (tmp_path / "defects_config.json").write_text("[]")
        return tmp_path

    def test_reads_the_layout(self, root: Path) -> None:
        ds = MVTecLOCO(root, "pushpins")
        assert names(ds.train) == ["good/0.png", "good/1.png"]
        assert names(ds.validation) == ["good/0.png"]
        assert repr(ds) == (
            "MVTecLOCO('pushpins': 2 train, 4 test (1 good, 2 logical_anomalies, "
            "1 structural_anomalies), masks)"
        )
        assert [s.label for s in ds.test] == [0, 1, 1, 1]
        assert MVTecLOCO.categories(root) == ["pushpins"]

    def test_the_masks_of_an_image_are_joined(self, root: Path) -> None:
        _, first, second, _ = MVTecLOCO(root, "pushpins").test
        masks = first.mask(), second.mask()
        assert [int(m.sum()) for m in masks if m is not None] == [6, 6 + 8]

    def test_missing_masks_are_named(self, root: Path) -> None:
        shutil.rmtree(root / "pushpins/ground_truth/logical_anomalies/001")
        with pytest.raises(MissingPathError, match=r"001\.png must have masks in .*anomalies.001,"):
            MVTecLOCO(root, "pushpins")
        shutil.rmtree(root / "pushpins/ground_truth")
        assert not MVTecLOCO(root, "pushpins").has_masks

    def test_the_layouts_of_the_family_are_told_apart(self, root: Path) -> None:
        for place in ("train/good/0.png", "test/dent/0.png"):
            draw(root / "plate" / place)
        with pytest.raises(MissingPathError, match=r"got test/logical_anomalies: .*Use MVTecLOCO"):
            MVTecAD(root, "pushpins")
        with pytest.raises(
            MissingPathError, match=r"got test: .*Use MVTecAD in place of MVTecLOCO"
        ):
            MVTecLOCO(root, "plate")

    @pytest.mark.parametrize("place", ["validation", "test/good", "test"])
    def test_a_missing_directory_is_named(self, root: Path, place: str) -> None:
        shutil.rmtree(root / "pushpins" / place)
        with pytest.raises(MissingPathError, match=f"^MVTecLOCO: .*{place.split('/')[0]}"):
            MVTecLOCO(root, "pushpins")


class TestBTAD:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for place in ("train/ok/0001.bmp", "train/ok/0000.bmp", "test/ok/0000.bmp"):
            draw(tmp_path / "03" / place)
        for i in range(2):
            draw(tmp_path / f"03/test/ko/000{i}.bmp")
            draw(tmp_path / f"03/ground_truth/ko/000{i}.png", 255)
        return tmp_path

    def test_reads_the_layout(self, root: Path) -> None:
        ds = BTAD(root, "03")
        assert repr(ds) == "BTAD('btad_03': 2 train, 3 test (1 good, 2 ko), masks)"
        assert names(ds.train) == ["ok/0000.bmp", "ok/0001.bmp"]
        assert names(ds.test) == ["ok/0000.bmp", "ko/0000.bmp", "ko/0001.bmp"]
        assert [s.mask_path.name for s in ds.test if s.mask_path] == ["0000.png", "0001.png"]
        assert ds.test[1].mask().sum() == 6  # type: ignore[union-attr]
        assert BTAD.categories(root) == ["03"]

    def test_errors(self, root: Path) -> None:
        with pytest.raises(MissingPathError, match=r"one of \['03'\] .* got '3'"):
            BTAD(root, "3")
        with pytest.raises(MissingPathError, match="is a category itself: pass its parent"):
            BTAD(root / "03", "03")
        (root / "03/ground_truth/ko/0001.png").unlink()
        with pytest.raises(MissingPathError, match=r"ko.0001\.bmp must have a mask"):
            BTAD(root, "03")


class TestVisA:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        rows = ["object,split,label,image,mask"]
        for name in ("candle", "pcb1"):
            for i in range(3):
                path = f"{name}/Data/Images/Normal/{2 - i:04d}.JPG"
                draw(tmp_path / path)
                rows.append(f"{name},{'test' if i == 1 else 'train'},normal,{path},")
            path, mask = f"{name}/Data/Images/Anomaly/000.JPG", f"{name}/Data/Masks/Anomaly/000.png"
            draw(tmp_path / path)
            draw(tmp_path / mask, 3)
            rows.append(f"{name},test,anomaly,{path},{mask}")
        (tmp_path / "split_csv").mkdir()
        (tmp_path / "split_csv/1cls.csv").write_text("\n".join(rows), encoding="utf-8-sig")
        return tmp_path

    def change(self, root: Path, old: str, new: str) -> None:
        file = root / "split_csv/1cls.csv"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    def test_reads_the_split(self, root: Path) -> None:
        ds = VisA(root, "candle")
        assert repr(ds) == "VisA('candle': 2 train, 2 test (1 good, 1 anomaly), masks)"
        assert names(ds.train) == ["Normal/0000.JPG", "Normal/0002.JPG"]
        assert names(ds.test) == ["Normal/0001.JPG", "Anomaly/000.JPG"]
        assert ds.test[1].mask().sum() == 6  # type: ignore[union-attr]
        assert ds.test[0].mask_path is None
        assert VisA.categories(root) == ["candle", "pcb1"]

    def test_the_layout_of_mvtec_ad(self, tmp_path: Path) -> None:
        for place in ("train/good/0.JPG", "test/good/1.JPG", "test/bad/2.JPG"):
            draw(tmp_path / "candle" / place)
        draw(tmp_path / "candle/ground_truth/bad/2.png", 255)
        ds = VisA(tmp_path, "candle")
        assert repr(ds) == "VisA('candle': 1 train, 2 test (1 bad, 1 good), masks)"
        assert VisA.categories(tmp_path) == ["candle"]
        with pytest.raises(MissingPathError, match=r"VisA: root must hold split_csv/1cls.csv"):
            VisA(tmp_path, "candles")

    def test_an_unknown_object_names_the_closest(self, root: Path) -> None:
        with pytest.raises(MissingPathError, match=r"\['candle', 'pcb1'\].*mean 'candle'\?"):
            VisA(root, "candles")

    @pytest.mark.parametrize("name", ["Images/Anomaly/000.JPG", "Masks/Anomaly/000.png"])
    def test_a_missing_file_is_named(self, root: Path, name: str) -> None:
        (root / "candle/Data" / name).unlink()
        with pytest.raises(MissingPathError, match=f"{name} must exist, since .*1cls.csv lists it"):
            VisA(root, "candle")
        assert len(VisA(root, "pcb1").test) == 2

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("split,label", "part,label", "must have the columns .*got none named split"),
            ("candle,test,anomaly", "candle,val,anomaly", "line 5 of .* got 'val', 'anomaly'"),
            ("candle,test,anomaly", "candle,test,bad", "line 5 of .* got 'test', 'bad'"),
            ("candle/Data/Images/A", "../candle/Data/Images/A", r"inside of .* got '\.\./candle"),
        ],
    )
    def test_a_file_of_another_form(self, root: Path, old: str, new: str, message: str) -> None:
        self.change(root, old, new)
        with pytest.raises(InvalidValueError, match=message):
            VisA(root, "candle")


class TestKolektorSDD2:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for place, bad in (("train", {2}), ("test", {0, 3})):
            for i in range(4):
                draw(tmp_path / f"{place}/1000{i}.png")
                draw(tmp_path / f"{place}/1000{i}_GT.png", 255 * (i in bad))
        return tmp_path

    def test_reads_the_layout(self, root: Path) -> None:
        ds = KolektorSDD2(root)
        assert (
            repr(ds) == "KolektorSDD2('kolektor_sdd_2': 3 train, 4 test (2 defect, 2 good), masks)"
        )
        assert names(ds.train) == ["train/10000.png", "train/10001.png", "train/10003.png"]
        assert names(ds.train_anomalous) == ["train/10002.png"]
        assert [s.label for s in ds.test] == [1, 0, 0, 1]
        for sample in ds.test:
            assert (sample.mask_path is None) == (sample.label == 0)

    @pytest.mark.parametrize(
        ("name", "missing"), [("10001_GT.png", "a mask"), ("10001.png", "an image")]
    )
    def test_what_is_not_beside_it(self, root: Path, name: str, missing: str) -> None:
        (root / "test" / name).unlink()
        with pytest.raises(MissingPathError, match=rf"test.10001.* must have {missing} beside it"):
            KolektorSDD2(root)

    def test_missing_directories(self, root: Path) -> None:
        shutil.rmtree(root / "test")
        with pytest.raises(MissingPathError, match="KolektorSDD2: test must be an existing"):
            KolektorSDD2(root)


class TestMagneticTile:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """Nine good parts, each photographed twice, one of them with a crack in the second."""
        for part in range(100, 109):
            for exposure in (1, 2):
                kind = "Crack" if (part, exposure) == (104, 2) else "Free"
                path = tmp_path / f"MT_{kind}/Imgs/exp{exposure}_num_{part}.jpg"
                draw(path)
                draw(path.with_suffix(".png"), 255 * (kind == "Crack"))
        draw(tmp_path / "MT_Blowhole/Imgs/exp1_num_7.jpg")
        draw(tmp_path / "MT_Blowhole/Imgs/exp1_num_7.png", 255)
        (tmp_path / "papers").mkdir()
        return tmp_path

    def test_reads_the_layout(self, root: Path) -> None:
        ds = MagneticTile(root)
        # A third of the 8 parts without a crack are 3; beside them the good photograph of 104.
        assert repr(ds) == (
            "MagneticTile('magnetic_tile': 10 train, 9 test (7 good, 1 blowhole, 1 crack), masks)"
        )
        assert {s.path.suffix for s in ds.train + ds.test} == {".jpg"}
        masks = [s.mask_path for s in ds.test if s.label]
        assert [m.name for m in masks if m] == ["exp1_num_7.png", "exp2_num_104.png"]

    @pytest.mark.parametrize("seed", range(5))
    def test_no_part_is_on_both_sides(self, root: Path, seed: int) -> None:
        ds = MagneticTile(root, random_state=seed, test_size=0.5)

        def parts(samples: tuple[Sample, ...]) -> set[str]:
            return {s.path.stem.partition("_num_")[2] for s in samples}

        assert not parts(ds.train) & parts(ds.test)
        assert "104" in parts(ds.test)
        assert len(parts(ds.train)) == 4
        assert ds.train == MagneticTile(root, random_state=seed, test_size=0.5).train

    def test_seeds_differ(self, root: Path) -> None:
        assert len({MagneticTile(root, random_state=seed).train for seed in range(8)}) > 1

    def test_errors(self, root: Path) -> None:
        (root / "MT_Blowhole/Imgs/exp1_num_7.png").unlink()
        with pytest.raises(MissingPathError, match=r"exp1_num_7\.jpg must have a mask beside it"):
            MagneticTile(root)
        draw(root / "MT_Free/Imgs/lamp.jpg")
        with pytest.raises(InvalidValueError, match=r"named after its exposure.*lamp\.jpg"):
            MagneticTile(root)
        for message, place in (
            ("MT_Free must hold photographs", "MT_Free/Imgs"),
            ("MT_Free must be an existing directory", "MT_Free"),
        ):
            shutil.rmtree(root / place)
            if place.endswith("Imgs"):
                (root / place).mkdir()
            with pytest.raises(MissingPathError, match=message):
                MagneticTile(root)
        with pytest.raises(InvalidValueError, match=r"test_size must be a number in \(0, 1\)"):
            MagneticTile(root, test_size=0)


class TestTextile:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A package of the published form, with few images."""
        home = tmp_path / "conformal_clip_data"
        images = home / "data/textile_images/simulated"
        for kind, n in (("nominal", 8), ("local", 2), ("global", 3)):
            for i in range(n):
                draw(images / kind / f"textile_{i:04d}.jpg")
        (home / "__init__.py").touch()
        spec = importlib.util.spec_from_file_location(
            "conformal_clip_data",
            home / "__init__.py",
            submodule_search_locations=[os.fspath(home)],
        )
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        return images

    def test_reads_the_package(self, package: Path) -> None:
        ds = Textile()
        assert repr(ds) == (
            "Textile('textile': 4 train, 9 test (4 good, 2 local, 3 global), no masks)"
        )
        assert len(Textile(test_size=0.25).train) == 6
        assert len({Textile(random_state=seed).train for seed in range(5)}) > 1
        with pytest.raises(InvalidValueError, match=r"test_size must be a number in \(0, 1\)"):
            Textile(test_size=1)

    def test_a_package_without_its_images(self, package: Path) -> None:
        shutil.rmtree(package)
        with pytest.raises(MissingPathError, match="Textile: nominal must be an existing"):
            Textile()

    def test_a_missing_package_is_named_with_the_remedy(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match="pip install conformal-clip-data"):
            Textile()


LISTS: dict[str, Any] = {
    "meta": {"prefix": "toy/", "normal_class": "OK"},
    "train": [
        {"anomaly_class": "OK", "image_path": "OK/S0002/b_C1.jpg", "mask_path": None},
        {"anomaly_class": "OK", "image_path": "OK/S0001/a_C1.jpg", "mask_path": None},
    ],
    "test": [
        {
            "anomaly_class": "BX",
            "image_path": "NG/BX/S0003/c_C1.jpg",
            "mask_path": "NG/BX/S0003/c_C1_mask.png",
        },
        {"anomaly_class": "OK", "image_path": "NG/BX/S0003/c_C2.jpg", "mask_path": None},
    ],
}


class TestRealIAD:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        self.images(tmp_path / "realiad_1024/toy")
        self.write(tmp_path / "realiad_jsons/realiad_jsons/toy.json")
        return tmp_path

    def images(self, home: Path) -> None:
        for entry in LISTS["train"] + LISTS["test"]:
            draw(home / entry["image_path"])
            if entry["mask_path"]:
                draw(home / entry["mask_path"], 255)

    def write(self, file: Path, **changes: object) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(LISTS | changes))

    def test_reads_the_layout(self, root: Path) -> None:
        ds = RealIAD(root, "toy")
        assert repr(ds) == "RealIAD('toy': 2 train, 2 test (1 good, 1 deformation), masks)"
        assert names(ds.train) == ["S0001/a_C1.jpg", "S0002/b_C1.jpg"]
        assert names(ds.test) == ["S0003/c_C2.jpg", "S0003/c_C1.jpg"]
        assert ds.test[1].mask().sum() == 6  # type: ignore[union-attr]
        assert RealIAD.categories(root) == ["toy"]

    def test_the_short_layout(self, tmp_path: Path) -> None:
        self.images(tmp_path / "toy")
        self.write(tmp_path / "realiad_jsons/toy.json")
        assert len(RealIAD(tmp_path, "toy").train) == 2

    def test_several_sizes(self, root: Path) -> None:
        self.images(root / "realiad_512/toy")
        with pytest.raises(InvalidValueError, match=r"one directory of images, .*size=1024"):
            RealIAD(root, "toy")
        for size in (512, "1024"):
            assert f"realiad_{size}" in RealIAD(root, "toy", size=size).train[0].path.parts
        with pytest.raises(MissingPathError, match="realiad_256 is missing"):
            RealIAD(root, "toy", size=256)

    def test_another_split(self, root: Path) -> None:
        train = LISTS["train"][:1]
        self.write(root / "realiad_jsons/realiad_jsons_sv/toy.json", train=train)
        assert len(RealIAD(root, "toy", split="realiad_jsons_sv").train) == 1
        with pytest.raises(MissingPathError, match="root must hold the JSON files of the split"):
            RealIAD(root, "toy", split="none")
        self.write(root / "realiad_jsons/noisy/toy.json", train=LISTS["test"], test=train)
        with pytest.raises(InvalidValueError, match="train must hold normal images only"):
            RealIAD(root, "toy", split="noisy")

    @pytest.mark.parametrize(
        "changes",
        [
            {"train": 3},
            {"train": [{"image_path": "a.jpg"}]},
            {"test": [{"anomaly_class": "OK", "image_path": None, "mask_path": None}]},
            {"test": [{"anomaly_class": "OK", "image_path": "a.jpg", "mask_path": 3}]},
            {"test": ["a.jpg"]},
        ],
    )
    def test_a_file_of_another_form(self, root: Path, changes: dict[str, object]) -> None:
        self.write(root / "realiad_jsons/realiad_jsons/toy.json", **changes)
        with pytest.raises(InvalidValueError, match=r"toy\.json must list entries with anomaly_cl"):
            RealIAD(root, "toy")

    def test_missing_files(self, root: Path) -> None:
        with pytest.raises(MissingPathError, match=r"one of \['toy'\].*mean 'toy'\?"):
            RealIAD(root, "toys")
        (root / "realiad_1024/toy/OK/S0001/a_C1.jpg").unlink()
        with pytest.raises(
            MissingPathError, match=r"a_C1\.jpg must exist, since .*toy\.json lists"
        ):
            RealIAD(root, "toy")
        shutil.rmtree(root / "realiad_1024")
        with pytest.raises(MissingPathError, match="must hold the images of toy"):
            RealIAD(root, "toy")
        file = root / "realiad_jsons/realiad_jsons/toy.json"
        file.write_text(file.read_text()[:50])
        self.images(root / "toy")
        with pytest.raises(InvalidValueError, match="JSONDecodeError"):
            RealIAD(root, "toy")
