"""KolektorSDD, read from a miniature of its layout with images that are not square."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.datasets import Dataset, KolektorSDD, Sample
from anomalib_lite.errors import (
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
)

N_PARTS, N_IMAGES = 9, 4


def draw(path: Path, *, corner: int = 0) -> Path:
    """A gray image 5 wide and 12 high whose first 2 rows and 3 columns have the value of corner."""
    pixels = np.zeros((12, 5), np.uint8)
    pixels[:2, :3] = corner
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def is_bad(part: int, image: int) -> bool:
    """Each part has one defect, the second has two."""
    return image == part % N_IMAGES or (part, image) == (2, 3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Nine parts, and other files beside them, as after unpacking."""
    for part in range(1, N_PARTS + 1):
        for image in range(N_IMAGES):
            folder = tmp_path / f"kos{part:02d}"
            draw(folder / f"Part{image}.jpg")
            draw(folder / f"Part{image}_label.bmp", corner=255 if is_bad(part, image) else 0)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "readme.txt").write_text("CC BY-NC-SA 4.0")
    (tmp_path / "kos01/._Part0.jpg").write_bytes(b"resource fork")
    return tmp_path


def parts(samples: tuple[Sample, ...]) -> set[str]:
    return {s.path.parent.name for s in samples}


def test_every_image_has_its_place(root: Path) -> None:
    ds = KolektorSDD(root)
    assert ds.name == "kolektor_sdd"
    everything = ds.train + ds.test + ds.train_anomalous
    assert len({s.path for s in everything}) == len(everything) == N_PARTS * N_IMAGES
    for sample in everything:
        part, image = int(sample.path.parent.name[3:]), int(sample.path.stem[4:])
        assert sample.label == is_bad(part, image)
        assert sample.kind == ("defect" if sample.label else "good")
        expected = sample.path.with_name(f"Part{image}_label.bmp") if sample.label else None
        assert sample.mask_path == expected
    assert {s.label for s in ds.train} == {0}
    assert {s.label for s in ds.train_anomalous} == {1}
    assert ds.has_masks
    assert ds.licence == "CC BY-NC-SA 4.0"


@pytest.mark.parametrize("seed", range(10))
def test_no_part_is_on_both_sides(root: Path, seed: int) -> None:
    ds = KolektorSDD(str(root), random_state=seed)
    assert parts(ds.train) == parts(ds.train_anomalous)
    assert parts(ds.train).isdisjoint(parts(ds.test))
    assert len(parts(ds.test)) == 3
    assert len(ds.test) == 3 * N_IMAGES
    assert parts(ds.train) | parts(ds.test) == {f"kos{i:02d}" for i in range(1, N_PARTS + 1)}


def test_the_split_is_the_seed_alone(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    for part in sorted(root.glob("kos*"), reverse=True):
        shutil.copytree(part, copy / part.name)
    assert parts(KolektorSDD(root).test) == parts(KolektorSDD(copy).test)
    same = KolektorSDD(root, random_state=np.random.RandomState(0))
    assert same.test == KolektorSDD(root).test
    assert len({frozenset(parts(KolektorSDD(root, random_state=i).test)) for i in range(5)}) > 1


@pytest.mark.parametrize(("test_size", "n_parts"), [(0.01, 1), (0.5, 4), (0.99, 8)])
def test_size_is_a_share_of_the_parts(root: Path, test_size: float, n_parts: int) -> None:
    ds = KolektorSDD(root, test_size=test_size)
    assert len(parts(ds.test)) == n_parts
    assert ds.train


def test_a_mask_is_bool_rows_first(root: Path) -> None:
    mask = KolektorSDD(root).train_anomalous[0].mask()
    assert mask is not None
    assert (mask.shape, mask.dtype, int(mask.sum())) == ((12, 5), bool, 6)
    assert mask[:2, :3].all()


def test_every_value_above_zero_is_a_defect(root: Path) -> None:
    for path in root.glob("kos*/*_label.bmp"):
        draw(path, corner=0)
    assert not KolektorSDD(root).train_anomalous
    assert not KolektorSDD(root).has_masks
    for path in root.glob("kos*/Part1_label.bmp"):
        draw(path, corner=1)
    ds = KolektorSDD(root)
    assert {s.path.name for s in ds.train_anomalous} == {"Part1.jpg"}
    assert sum(s.label for s in ds.test) == 3


def test_all_anomalous_images_can_be_tested_on(root: Path) -> None:
    ds = KolektorSDD(root)
    more = Dataset(ds.name, ds.train, ds.test + ds.train_anomalous)
    assert sum(s.label for s in more.test) == N_PARTS + 1
    assert more.has_masks


def test_incomplete_pairs_are_named(root: Path) -> None:
    (root / "kos04/Part2_label.bmp").unlink()
    with pytest.raises(MissingPathError, match=r"kos04.Part2\.jpg must have a mask beside it"):
        KolektorSDD(root)
    (root / "kos04/Part2.jpg").unlink()
    assert "kos04" in parts(KolektorSDD(root, random_state=0).train + KolektorSDD(root).test)
    (root / "kos05/Part0.jpg").unlink()
    with pytest.raises(MissingPathError, match=r"Part0_label\.bmp must have an image beside it"):
        KolektorSDD(root)


@pytest.mark.parametrize("name", ["Part0.png", "Part0_label.png"])
def test_two_files_for_one_image_are_named(root: Path, name: str) -> None:
    draw(root / "kos03" / name)
    with pytest.raises(InvalidValueError, match=r"one file for each image, got .*Part0"):
        KolektorSDD(root)


def test_a_broken_mask_is_named(root: Path) -> None:
    (root / "kos07/Part1_label.bmp").write_bytes(b"BM not an image")
    with pytest.raises(ImageError, match=r"Part1_label\.bmp must be a readable image"):
        KolektorSDD(root)


def test_an_empty_part_is_named(root: Path) -> None:
    (root / "kos10").mkdir()
    with pytest.raises(MissingPathError, match="kos10 must hold images"):
        KolektorSDD(root)


def test_missing_parts_are_named(root: Path) -> None:
    with pytest.raises(MissingPathError, match=r"directories kos01, kos02 .* got \[\] in .*kos01"):
        KolektorSDD(root / "kos01")
    with pytest.raises(MissingPathError, match="root must be an existing directory"):
        KolektorSDD(root / "nowhere")
    with pytest.raises(InvalidTypeError, match="root must be a path, got int"):
        KolektorSDD(3)  # type: ignore[arg-type]
    for i in range(2, N_PARTS + 1):
        shutil.rmtree(root / f"kos{i:02d}")
    with pytest.raises(InvalidValueError, match=r"at least 2 parts .* got kos01 alone"):
        KolektorSDD(root)


def test_training_on_nothing_is_refused(root: Path) -> None:
    for path in root.glob("kos*/*_label.bmp"):
        draw(path, corner=255)
    with pytest.raises(InvalidValueError, match="KolektorSDD: train must hold at least one"):
        KolektorSDD(root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_size": 0}, r"test_size must be a number in \(0, 1\), got 0"),
        ({"test_size": 1}, r"test_size must be a number in \(0, 1\), got 1"),
        ({"random_state": "x"}, "KolektorSDD: random_state must be an int"),
    ],
)
def test_refuses(root: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        KolektorSDD(root, **arguments)  # type: ignore[arg-type]
