"""open_dataset recognises every layout, says which, and asks where it cannot tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.cli._options import PUBLISHED_LAYOUTS
from anomalib_lite.datasets import open_dataset
from anomalib_lite.datasets._opening import LAYOUTS
from anomalib_lite.errors import InvalidValueError, MissingPathError


def draw(home: Path, *places: str) -> Path:
    """Gray images 8 wide and 6 high; those of masks have a box."""
    for place in places:
        pixels = np.zeros((6, 8), np.uint8)
        pixels[:2, :3] = 255
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / place)
    return home


def folder(root: Path) -> Path:
    return draw(root, "good/0.png", "good/1.png", "dent/0.png")


def mvtec_ad(root: Path) -> Path:
    return draw(root / "plate", "train/good/0.png", "test/dent/0.png")


def mvtec_ad_2(root: Path) -> Path:
    places = ("train/good/0.png", "validation/good/0.png", "test_public/good/0.png")
    return draw(root / "can", *places, "test_public/bad/0.png")


def mvtec_loco(root: Path) -> Path:
    places = ("train/good/0.png", "validation/good/0.png", "test/good/0.png")
    return draw(root / "pushpins", *places, "test/logical_anomalies/0.png")


def visa(root: Path) -> Path:
    names = ("candle/Data/Images/Normal/0.JPG", "candle/Data/Images/Anomaly/0.JPG")
    draw(root, *names)
    (root / "split_csv").mkdir()
    rows = ("object,split,label,image,mask", f"candle,train,normal,{names[0]},")
    text = "\n".join([*rows, f"candle,test,anomaly,{names[1]},"])
    (root / "split_csv/1cls.csv").write_text(text)
    return root / "candle"


def btad(root: Path) -> Path:
    return draw(root / "01", "train/ok/0.bmp", "test/ok/0.bmp", "test/ko/0.bmp")


def real_iad(root: Path) -> Path:
    home = draw(root / "realiad_512/toy", "OK/0.jpg", "NG/0.jpg")
    draw(root / "realiad_256/toy", "OK/0.jpg", "NG/0.jpg")
    (root / "realiad_jsons").mkdir()
    good = {"anomaly_class": "OK", "image_path": "OK/0.jpg", "mask_path": None}
    bad = {"anomaly_class": "BX", "image_path": "NG/0.jpg", "mask_path": None}
    (root / "realiad_jsons/toy.json").write_text(json.dumps({"train": [good], "test": [bad]}))
    return home


def kolektor_sdd(root: Path) -> Path:
    for part in ("kos01", "kos02", "kos03"):
        draw(root / part, "Part0.jpg", "Part1.jpg", "Part1_label.bmp")
        Image.new("L", (8, 6)).save(root / part / "Part0_label.bmp")
    return root


def kolektor_sdd_2(root: Path) -> Path:
    for place in ("train", "test"):
        draw(root / place, "1.png", "2.png", "2_GT.png")
        Image.new("L", (8, 6)).save(root / place / "1_GT.png")
    return root


def magnetic_tile(root: Path) -> Path:
    draw(root / "MT_Free/Imgs", *(f"exp1_num_{i}.jpg" for i in range(3)))
    draw(root / "MT_Fray/Imgs", "exp1_num_3.jpg", "exp1_num_3.png")
    return root


def neu_det(root: Path) -> Path:
    draw(root / "IMAGES", "crazing_1.jpg")
    (root / "ANNOTATIONS").mkdir()
    (root / "ANNOTATIONS/crazing_1.xml").write_text("<annotation></annotation>")
    return root


MAKERS: list[tuple[Callable[[Path], Path], str, str]] = [
    (folder, "folder", "Folder"),
    (mvtec_ad, "mvtec", "MVTecAD"),
    (mvtec_ad_2, "mvtec", "MVTecAD2"),
    (mvtec_loco, "mvtec", "MVTecLOCO"),
    (visa, "visa", "VisA"),
    (btad, "btad", "BTAD"),
    (real_iad, "real_iad", "RealIAD"),
    (kolektor_sdd, "kolektor_sdd", "KolektorSDD"),
    (kolektor_sdd_2, "kolektor_sdd_2", "KolektorSDD2"),
    (magnetic_tile, "magnetic_tile", "MagneticTile"),
    (neu_det, "neu_det", "NEUDET"),
]


def test_every_layout_is_tested_and_is_an_option_of_the_command_line() -> None:
    assert {layout for _, layout, _ in MAKERS} | {"auto"} == set(LAYOUTS)
    assert ("auto", "folder", *PUBLISHED_LAYOUTS) == LAYOUTS


@pytest.mark.parametrize(("make", "layout", "cls"), MAKERS, ids=[cls for *_, cls in MAKERS])
def test_recognises(tmp_path: Path, make: Callable[[Path], Path], layout: str, cls: str) -> None:
    root = make(tmp_path)
    ds = open_dataset(root)
    assert (type(ds).__name__, ds.layout) == (cls, layout)
    assert any(s.label for s in ds.test)
    named = open_dataset(str(root), layout)
    assert (named.train, named.test, named.layout) == (ds.train, ds.test, layout)
    if layout == "real_iad":
        assert "realiad_512" in ds.train[0].path.parts
    if layout != "folder":
        with pytest.raises(InvalidValueError, match=rf"read in the layout {layout} \(.*'folder'"):
            open_dataset(root, normal="good")


@pytest.mark.parametrize("make", [mvtec_ad, visa, btad], ids=lambda make: make.__name__)
def test_the_directory_above_the_categories(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    home = make(tmp_path)
    with pytest.raises(MissingPathError, match=rf"which holds \['{home.name}'\]\. Pass one of"):
        open_dataset(tmp_path)


def test_an_unknown_layout_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    draw(tmp_path, "okay/0.png", "okay/1.png", "dent/0.png")
    message = (
        r"with the directories \['dent', 'okay'\]\. Known are folder .*; neu_det .*normal='ok'"
    )
    with pytest.raises(MissingPathError, match=f"^Asker: .*{message}") as caught:
        open_dataset(tmp_path, where="Asker")
    assert all(layout in str(caught.value) for layout in LAYOUTS[1:])
    assert open_dataset(tmp_path, normal="okay").layout == "folder"


def test_several_layouts(tmp_path: Path) -> None:
    magnetic_tile(tmp_path)
    kolektor_sdd(tmp_path)
    with pytest.raises(InvalidValueError, match="directories of kolektor_sdd, magnetic_tile"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, "magnetic_tile").name == "magnetic_tile"


def test_the_seed_reaches_the_splits_of_this_library(tmp_path: Path) -> None:
    root = magnetic_tile(tmp_path)
    assert len({open_dataset(root, random_state=seed).train for seed in range(8)}) > 1
