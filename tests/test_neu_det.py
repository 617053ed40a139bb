"""NEU-DET, read from miniatures with images that are not square, and from real photographs."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_lite.datasets import NEUDET, Sample
from anomalib_lite.datasets.neu_det import KINDS
from anomalib_lite.errors import (
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
    NotFittedError,
)
from anomalib_lite.evaluation import evaluate

Box = tuple[object, object, object, object]


def annotation(*boxes: Box, size: tuple[object, object] = (8, 6)) -> str:
    """A file in the format of Pascal VOC; size is width and height."""
    objects = "".join(
        f"<object><name>crazing</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in boxes
    )
    width, height = size
    return (
        "<annotation><folder>cr</folder><size>"
        f"<width>{width}</width><height>{height}</height><depth>1</depth></size>"
        f"{objects}</annotation>"
    )


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def draw(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    """A gray image 8 wide and 6 high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 90).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One image of each kind; crazing_2 has two boxes, the others one."""
    for i, kind in enumerate(KINDS):
        draw(tmp_path / f"IMAGES/{kind}_{i + 2}.jpg")
        boxes: list[Box] = [(3, 2, 5, 6)] + ([(1, 1, 8, 1)] if i == 0 else [])
        write(tmp_path / f"ANNOTATIONS/{kind}_{i + 2}.xml", annotation(*boxes))
    return tmp_path


def crazing(root: Path, content: str | bytes) -> Path:
    """Replace the annotation of the first image."""
    return write(root / "ANNOTATIONS/crazing_2.xml", content)


def boxes_of_crazing(root: Path) -> list[list[int]]:
    return NEUDET(root).boxes[root / "IMAGES/crazing_2.jpg"].tolist()


def test_reads_the_layout(root: Path) -> None:
    ds = NEUDET(root)
    assert (ds.name, ds.train) == ("neu_det", ())
    assert [s.kind for s in ds.test] == list(KINDS)
    assert [s.path.name for s in ds.test[:2]] == ["crazing_2.jpg", "inclusion_3.jpg"]
    assert {s.label for s in ds.test} == {1}
    assert {s.mask_path for s in ds.test} == {None}
    assert not ds.has_masks
    assert "0 train, 6 test (1 crazing, 1 inclusion" in repr(ds)
    assert "Applied Surface Science" in ds.citation


def test_boxes_are_slices_of_the_image(root: Path) -> None:
    ds = NEUDET(str(root))
    assert list(ds.boxes) == [s.path for s in ds.test]
    boxes = ds.boxes[ds.test[0].path]
    assert (boxes.shape, boxes.dtype) == ((2, 4), np.int64)
    # The format counts from 1 and includes the ends.
    assert boxes.tolist() == [[2, 1, 5, 6], [0, 0, 8, 1]]
    x_min, y_min, x_max, y_max = boxes[0]
    assert np.zeros((6, 8))[y_min:y_max, x_min:x_max].shape == (5, 3)
    assert ds.boxes is ds.boxes


def test_boxes_are_read_when_asked_for(root: Path) -> None:
    crazing(root, "no XML")
    ds = NEUDET(root)
    with pytest.raises(InvalidValueError, match=r"crazing_2\.xml must be an XML file"):
        _ = ds.boxes
    crazing(root, annotation())
    again = pickle.loads(pickle.dumps(ds))
    assert again.boxes[ds.test[0].path].shape == (0, 4)


def test_boxes_are_scaled_to_the_image(root: Path) -> None:
    # Wider by 2 and higher by 3, then smaller by fractions: outwards to whole pixels.
    draw(root / "IMAGES/crazing_2.jpg", (16, 18))
    assert boxes_of_crazing(root) == [[4, 3, 10, 18], [0, 0, 16, 3]]
    draw(root / "IMAGES/crazing_2.jpg", (5, 4))
    assert boxes_of_crazing(root) == [[1, 0, 4, 4], [0, 0, 5, 1]]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 8, 6), [0, 0, 8, 6]),  # counted from 0 by some tools
        ((0, 0, 0, 0), [0, 0, 1, 1]),
        ((8, 6, 8, 6), [7, 5, 8, 6]),
        (("2.5", "1.0", " 4.5 ", "6.0"), [1, 0, 5, 6]),
    ],
)
def test_boxes_at_the_edges(root: Path, box: Box, expected: list[int]) -> None:
    crazing(root, annotation(box))
    assert boxes_of_crazing(root) == [expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (annotation((3, 2, 9, 6)), r"lie in the 8 x 6 pixels .*crazing_2\.xml states, got .*9\.0"),
        (annotation((3, 2, 5, 7)), "lie in the 8 x 6 pixels"),
        (annotation((5, 2, 3, 6)), "lie in the 8 x 6 pixels"),
        (annotation((3, 6, 5, 2)), "lie in the 8 x 6 pixels"),
        (annotation((-1, 2, 5, 6)), r"xmin, ymin, xmax, ymax as numbers of at least 0.*'-1'"),
        (annotation(("nan", 2, 5, 6)), r"at least 0.*'nan'"),
        (annotation((3, 2, "inf", 6)), r"at least 0.*'inf'"),
        (annotation((3, "", 5, 6)), "xmin, ymin, xmax, ymax as numbers"),
        (annotation(size=(0, 6)), r"width, height as numbers of at least 1.*'0', '6'"),
        ("<annotation><object/></annotation>", r"width, height .*got \[None, None\]"),
        (annotation().replace("</annotation>", "<object/></annotation>"), r"xmin.*\[None, None"),
        (annotation()[:-3], "must be an XML file of boxes"),
        ("", "must be an XML file of boxes"),
        (annotation().encode("utf-16"), "must be an XML file of boxes"),
    ],
)
def test_refuses_annotations(root: Path, content: str | bytes, message: str) -> None:
    crazing(root, content)
    with pytest.raises(InvalidValueError, match=message):
        boxes_of_crazing(root)


BOMB = (
    '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">]>'
    "<annotation><folder>&y;</folder></annotation>"
)


@pytest.mark.parametrize("declared", ["", "utf-8", "utf-7", "utf-16", "latin-1"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_refuses_a_document_type(root: Path, declared: str, mark: bytes) -> None:
    declaration = f'<?xml version="1.0" encoding="{declared}"?>' if declared else ""
    crazing(root, mark + (declaration + BOMB).encode())
    with pytest.raises(InvalidValueError, match="must hold no document type definition"):
        boxes_of_crazing(root)


def test_no_encoding_hides_a_document_type(root: Path) -> None:
    secret = write(root / "secret.txt", "17")
    outside = f'<!DOCTYPE a [<!ENTITY x SYSTEM "{secret.as_uri()}">]>'
    body = annotation((3, 2, 5, 6)).replace("<xmin>3", "<xmin>&x;")
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "cp037"):
        declaration = f'<?xml version="1.0" encoding="{encoding}"?>'
        crazing(root, (declaration + outside + body).encode(encoding))
        with pytest.raises(InvalidValueError, match="crazing_2"):
            boxes_of_crazing(root)
    crazing(root, body)  # no declaration at all
    with pytest.raises(InvalidValueError, match="undefined entity"):
        boxes_of_crazing(root)


def test_other_encodings_of_names(root: Path) -> None:
    content = annotation((3, 2, 5, 6)).replace("cr<", "裂纹<")
    for declared, encoding in (("gb2312", "gb2312"), ("utf-8", "utf-8-sig")):
        declaration = f'<?xml version="1.0" encoding="{declared}"?>'
        crazing(root, (declaration + content).encode(encoding))
        assert boxes_of_crazing(root) == [[2, 1, 5, 6]]


def test_a_divided_mirror_is_one_data_set(tmp_path: Path) -> None:
    for part, number in (("train", 1), ("validation", 241)):
        draw(tmp_path / part / "images/rolled-in_scale" / f"rolled-in_scale_{number}.jpg")
        file = tmp_path / part / "annotations" / f"rolled-in_scale_{number}.xml"
        write(file, annotation((number % 7, 1, 8, 6)))
    ds = NEUDET(tmp_path)
    names = [(s.path.parents[2].name, s.path.name, s.kind) for s in ds.test]
    assert names == [
        ("train", "rolled-in_scale_1.jpg", "rolled-in_scale"),
        ("validation", "rolled-in_scale_241.jpg", "rolled-in_scale"),
    ]
    assert [ds.boxes[s.path][0, 0] for s in ds.test] == [0, 2]
    (tmp_path / "validation").rename(tmp_path / "elsewhere")
    assert len(NEUDET(tmp_path).test) == 1


def test_missing_files_are_named(root: Path) -> None:
    with pytest.raises(InvalidTypeError, match="root must be a path, got int"):
        NEUDET(3)  # type: ignore[arg-type]
    with pytest.raises(MissingPathError, match="root must hold the directories IMAGES"):
        NEUDET(root / "IMAGES")
    (root / "ANNOTATIONS/crazing_2.xml").unlink()
    with pytest.raises(MissingPathError, match=r"crazing_2\.jpg must have .*crazing_2\.xml"):
        NEUDET(root)
    (root / "ANNOTATIONS").rename(root / "elsewhere")
    with pytest.raises(MissingPathError, match="ANNOTATIONS must be an existing directory"):
        NEUDET(root)


@pytest.mark.parametrize("name", ["crazing.jpg", "rust_1.jpg", "crazing_one.jpg", "Cr_1.jpg"])
def test_other_images_are_named(root: Path, name: str) -> None:
    stem = draw(root / "IMAGES" / name).stem
    write(root / f"ANNOTATIONS/{stem}.xml", annotation())
    with pytest.raises(InvalidValueError, match=f"one of .*'crazing'.* got .*{name}"):
        NEUDET(root)


def test_a_broken_image_is_named(root: Path) -> None:
    write(root / "IMAGES/crazing_2.jpg", "not an image")
    with pytest.raises(ImageError, match=r"crazing_2\.jpg must be a readable image"):
        boxes_of_crazing(root)


class Blank:
    """Finds nothing; stands for any detector."""

    def detect(self, images: Sequence[Sample]) -> SimpleNamespace:
        n = len(images)
        maps, labels = np.zeros((n, 6, 8), np.float32), np.zeros(n, bool)
        return SimpleNamespace(scores=np.zeros(n, np.float32), maps=maps, labels=labels)


def test_evaluate_says_what_cannot_be_known(root: Path) -> None:
    detector: Any = Blank()
    ds = NEUDET(root)
    with pytest.raises(NotFittedError, match="pass a data set with training images"):
        evaluate(detector, ds)
    detector.threshold_ = 1.0
    report = evaluate(detector, ds)
    assert math.isnan(report.metrics["image_auroc"])  # there is no normal image
    assert math.isnan(report.metrics["false_alarm_rate"])
    assert report.metrics["detection_rate"] == 0
    assert report.metrics["pointing_game"] == 0  # a constant map points nowhere
    assert not [name for name in report.metrics if "pixel" in name or "pro" in name]
    assert report.counts["test_anomalous"] == 6


@pytest.fixture
def photographs(data_dir: Path) -> Path:
    path = data_dir / "neu_det"
    if not path.is_dir():
        pytest.skip(f"no photographs of NEU-DET at {path}")
    return path


def test_real_photographs(photographs: Path) -> None:
    ds = NEUDET(photographs)
    assert (len(ds.train), len(ds.test)) == (0, 289)
    counts = [sum(s.kind == kind for s in ds.test) for kind in KINDS]
    assert counts == [43, 53, 52, 44, 51, 46]
    boxes = np.concatenate(list(ds.boxes.values()))
    assert len(boxes) == 714
    # These photographs are 416 x 416 pixels, their annotations say 200 x 200.
    assert (boxes.min(0).tolist(), boxes.max(0)[2:].tolist()) == ([0, 0, 34, 34], [416, 416])
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_real_boxes_lie_on_the_defects(photographs: Path) -> None:
    """Patches are dark and scratches bright: inside of their boxes, not beside them."""
    ds = NEUDET(photographs)
    right = {"patches": 0, "scratches": 0}
    for sample in [s for s in ds.test if s.kind in right]:
        with Image.open(sample.path) as image:
            pixels = np.asarray(image.convert("L"), np.float32)
        inside = np.zeros(pixels.shape, bool)
        for x_min, y_min, x_max, y_max in ds.boxes[sample.path]:
            inside[y_min:y_max, x_min:x_max] = True
        if inside.all():
            continue
        brighter = pixels[inside].mean() > pixels[~inside].mean()
        right[sample.kind] += brighter if sample.kind == "scratches" else not brighter
    assert right["patches"] >= 50
    assert right["scratches"] >= 44
