"""Synthetic anomalies: masks to the bit, seeds, images of all sizes, what each stage changes."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion, label
from skimage import data
from sklearn.base import clone

from anomalib_lite.errors import ImageError, InvalidTypeError, InvalidValueError, MissingPathError
from anomalib_lite.images import ImageSource
from anomalib_lite.synthetic import KINDS, SyntheticAnomalies, SyntheticAnomaly, SyntheticSet
from anomalib_lite.synthetic._defects import MAKERS

STAGES = ("texture", "structural", "contextual")
ALL_KINDS = [kind for stage in STAGES for kind in KINDS[stage]]
N_EACH = 30  # after as many, each kind has had its turn twice


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(60, 200, shape).astype(np.uint8)


def bricks() -> list[np.ndarray]:
    photo = data.brick()
    return [photo[y : y + 128, x : x + 192] for y in range(0, 512, 128) for x in (0, 192)]


def as_uint8(image: np.ndarray) -> np.ndarray:
    """What a source shows of any image: (H, W, 3)."""
    rgb = np.asarray(ImageSource([image])[0])
    return rgb if rgb.dtype == np.uint8 else np.rint(rgb * 255).astype(np.uint8)


def check_exact(made: SyntheticSet, images: list[np.ndarray]) -> None:
    """Every mask is what a comparison of the image with its source gives, bit by bit."""
    for image, mask, source in zip(made.images, made.masks, made.sources, strict=True):
        original = as_uint8(images[source])
        assert image.shape == original.shape
        assert image.dtype == np.uint8
        assert mask.shape == image.shape[:2]
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, (image != original).any(axis=2))
        assert np.abs(image.astype(int) - original).max() >= 3, "nobody would see it"


def same(a: SyntheticAnomaly, b: SyntheticAnomaly) -> bool:
    return (
        (a.kind, a.source) == (b.kind, b.source)
        and np.array_equal(a.image, b.image)
        and np.array_equal(a.mask, b.mask)
    )


# --- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        [noise(8, 8, 3)],
        [noise(8, 300, 3), noise(300, 8, 3)],
        [noise(64, 96), noise(96, 64, 1), noise(50, 70, 4)],
        [noise(40, 60, 3) / np.float32(255)],
        [noise(40, 60).astype(np.uint16) * 257],
        [noise(450, 800, 3)],
        [data.coffee(), data.brick()],
    ],
    ids=["8x8", "narrow", "gray", "floats", "16 bits", "large", "photographs"],
)
def test_masks_are_exact(images: list[np.ndarray]) -> None:
    made = SyntheticAnomalies(random_state=0).generate(images, N_EACH)
    check_exact(made, images)
    assert set(made.kinds) == set(ALL_KINDS)
    assert set(made.sources) == set(range(len(images)))


@pytest.mark.parametrize("gray", [0, 1, 64, 128, 254, 255])
@pytest.mark.parametrize("severity", [0.01, 1.0])
def test_a_flat_image_is_visibly_changed(gray: int, severity: float) -> None:
    images = [np.full((40, 60, 3), gray, np.uint8)]
    made = SyntheticAnomalies(severity=severity, random_state=0).generate(images, N_EACH)
    check_exact(made, images)
    assert max(mask.mean() for mask in made.masks) < 0.25


@pytest.mark.parametrize("value", [(0, 0, 0), (255, 0, 30), (20, 200, 90)])
def test_a_flat_color_is_visibly_changed(value: tuple[int, int, int]) -> None:
    images = [np.full((60, 40, 3), value, np.uint8)]
    check_exact(SyntheticAnomalies(random_state=1).generate(images, N_EACH), images)


def test_black_and_white_pixels_are_changed_though_saturated() -> None:
    images = [np.where(noise(32, 48) > 130, 255, 0).astype(np.uint8)]
    check_exact(SyntheticAnomalies(random_state=0).generate(images, N_EACH), images)


def test_gray_stays_gray() -> None:
    for image in SyntheticAnomalies(random_state=0).generate(bricks(), N_EACH).images:
        assert (image == image[..., :1]).all()


def test_the_source_is_left_as_it_was() -> None:
    images = [noise(64, 96, 3), noise(50, 50, 3)]
    before = [image.copy() for image in images]
    SyntheticAnomalies(random_state=0).generate(images, N_EACH)
    for image, original in zip(images, before, strict=True):
        np.testing.assert_array_equal(image, original)


def test_sizes_follow_the_image() -> None:
    """Most lie between 0.02 % and 5 % of the image, whatever its size."""
    for shape in ((128, 192), (400, 300)):
        images = [np.full((*shape, 3), 120, np.uint8)]
        made = SyntheticAnomalies(random_state=0).generate(images, 60)
        shares = np.array([mask.mean() for mask in made.masks])
        assert np.quantile(shares, 0.05) > 0.0001
        assert np.quantile(shares, 0.9) < 0.06
        assert shares.max() < 0.2
        assert shares.max() / shares.min() > 20


def test_defects_are_no_rectangles_and_few_pieces() -> None:
    made = SyntheticAnomalies(("texture", "contextual"), random_state=0).generate(bricks(), 40)
    for mask in made.masks:
        rows, columns = np.nonzero(mask)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert mask.sum() < 0.97 * box or box < 30
        assert label(mask, np.ones((3, 3)))[1] < 20


def test_defects_lie_on_the_object() -> None:
    """A textured disc on a flat ground: centres are on it, so most of each mask is."""
    y, x = np.mgrid[:160, :240]
    disc = (y - 80) ** 2 + (x - 70) ** 2 < 40**2
    image = np.where(disc, noise(160, 240), 30).astype(np.uint8)
    made = SyntheticAnomalies(random_state=0).generate(image, 60)
    near = (y - 80) ** 2 + (x - 70) ** 2 < 46**2
    assert np.mean([near[mask].mean() for mask in made.masks]) > 4 * near.mean()


# --- seeds ------------------------------------------------------------------------------------


def test_one_seed_gives_the_same_bits() -> None:
    images = bricks()
    first = list(SyntheticAnomalies(random_state=3).iterate(images, 20))
    again = list(SyntheticAnomalies(random_state=3).iterate(images, 20))
    other = list(SyntheticAnomalies(random_state=4).iterate(images, 20))
    assert all(map(same, first, again))
    assert not any(map(same, first, other))


def test_an_anomaly_does_not_depend_on_how_many_are_made() -> None:
    images = bricks()
    made = SyntheticAnomalies(random_state=0)
    many = list(made.iterate(images, 25))
    for n in (1, 7, 24):
        assert all(map(same, made.iterate(images, n), many))


def test_two_anomalies_of_one_kind_differ() -> None:
    made = SyntheticAnomalies("structural", random_state=0).generate(noise(96, 96, 3), 10)
    for i in range(5):
        assert made.kinds[i] == made.kinds[i + 5]
        assert not np.array_equal(made.masks[i], made.masks[i + 5])


def test_a_random_state_goes_on_and_none_is_numpys_own() -> None:
    image = noise(48, 64, 3)
    going_on = SyntheticAnomalies(random_state=np.random.RandomState(5))
    a, b = (going_on.generate(image, 1).images[0] for _ in range(2))
    assert not np.array_equal(a, b)
    first = SyntheticAnomalies(random_state=np.random.RandomState(5)).generate(image, 1)
    np.testing.assert_array_equal(a, first.images[0])
    c, d = (SyntheticAnomalies().generate(image, 1).images[0] for _ in range(2))
    assert not np.array_equal(c, d)


def test_iterating_gives_what_generating_gives_and_decodes_no_more_than_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = bricks()
    made = SyntheticAnomalies(random_state=0)
    together = made.generate(images, 9)
    for i, anomaly in enumerate(made.iterate(images, 9)):
        np.testing.assert_array_equal(anomaly.image, together.images[i])
        np.testing.assert_array_equal(anomaly.mask, together.masks[i])
        assert (anomaly.kind, anomaly.source) == (together.kinds[i], together.sources[i])
    decoded = []
    decode = ImageSource.decode
    monkeypatch.setattr(ImageSource, "decode", lambda self, i: decoded.append(i) or decode(self, i))
    lazily = made.iterate(images, 1000)
    assert decoded == []
    next(lazily)
    assert 1 <= len(decoded) <= 2


def test_sources_hold_the_same_anomalies_a_few_at_a_time() -> None:
    normal = ImageSource(noise(3, 40, 60, 3), where="somebody")
    made = SyntheticAnomalies(random_state=0)
    sources = list(made.sources(normal, 7, 3))
    assert [len(source) for source in sources] == [3, 3, 1]
    assert {source.where for source in sources} == {"somebody"}
    for image, expected in zip(chain(*sources), made.generate(normal, 7).images, strict=True):
        np.testing.assert_array_equal(image, expected)
    with pytest.raises(InvalidValueError, match="at_once must be a whole number of at least 1"):
        made.sources(normal, 7, 0)  # at once, not when it is iterated


# --- stages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_makes_its_kinds_in_turn(stage: str) -> None:
    made = SyntheticAnomalies((stage,), random_state=0).generate(noise(32, 48, 3), 10)
    assert made.kinds == [KINDS[stage][i % len(KINDS[stage])] for i in range(10)]


def test_stages_take_turns() -> None:
    made = SyntheticAnomalies(random_state=0).generate(noise(32, 48, 3), 60)
    for i, kind in enumerate(made.kinds):
        assert kind in KINDS[STAGES[i % 3]]
    for stage in STAGES:
        counts = [made.kinds.count(kind) for kind in KINDS[stage]]
        assert max(counts) == min(counts) == 20 // len(counts)


def test_every_kind_has_its_maker() -> None:
    assert sorted(MAKERS) == sorted(ALL_KINDS)


def thickness(mask: np.ndarray) -> float:
    """Share of the mask that is left when two pixels are taken off all around."""
    return float(binary_erosion(mask, np.ones((3, 3)), iterations=2).sum() / mask.sum())


def of_kind(kind: str, images: object, n: int = 12) -> tuple[SyntheticSet, list[int]]:
    stage = next(s for s in STAGES if kind in KINDS[s])
    made = SyntheticAnomalies(stage, severity=1.0, random_state=0).generate(
        images, n * len(KINDS[stage])
    )
    return made, [i for i, k in enumerate(made.kinds) if k == kind]


@pytest.mark.parametrize("kind", ["scratch", "crack"])
def test_lines_are_thin_and_spots_are_not(kind: str) -> None:
    image = np.full((200, 300, 3), 120, np.uint8)
    made, chosen = of_kind(kind, image)
    spots, of_spots = of_kind("stain", image)
    large = [i for i in chosen if made.masks[i].sum() > 100]
    assert max(thickness(made.masks[i]) for i in large) < 0.2
    large = [i for i in of_spots if spots.masks[i].sum() > 300]
    assert min(thickness(spots.masks[i]) for i in large) > 0.3


@pytest.mark.parametrize("kind", ["crack", "pit"])
def test_cracks_and_pits_are_dark(kind: str) -> None:
    image = np.full((150, 220, 3), 120, np.uint8)
    made, chosen = of_kind(kind, image)
    for i in chosen:
        change = made.images[i].astype(int) - image
        assert change.min() < -20
        assert -change.min() > change.max()


def test_scratches_and_stains_are_bright_or_dark() -> None:
    image = np.full((150, 220, 3), 120, np.uint8)
    for kind in ("scratch", "stain", "chip"):
        made, chosen = of_kind(kind, image, n=12)
        signs = {
            int(np.sign(np.mean(made.images[i][made.masks[i]].astype(int) - 120))) for i in chosen
        }
        assert signs == {-1, 1}


def test_a_stain_lets_the_texture_through_and_a_chip_does_not() -> None:
    """The steps from pixel to pixel of what was there, before and after."""
    image = np.repeat(noise(200, 300, 1), 3, axis=2)

    def likeness(kind: str) -> float:
        made, chosen = of_kind(kind, image)
        values = []
        for i in chosen:
            inner = binary_erosion(made.masks[i], iterations=3)
            pairs = inner[:, 1:] & inner[:, :-1]
            if inner.sum() > 100:
                a, b = (np.diff(x[..., 0].astype(int))[pairs] for x in (made.images[i], image))
                values.append(np.corrcoef(a, b)[0, 1])
        return float(np.mean(values))

    assert likeness("stain") > 0.8
    assert likeness("chip") < 0.3


def test_pieces_come_from_other_images() -> None:
    """Green appears on red images only where a piece of a green one is pasted."""
    red, green = np.zeros((2, 96, 96, 3), np.uint8)
    red[..., 0], green[..., 1] = noise(96, 96), noise(96, 96)
    for kind in ("texture", "paste"):
        made, chosen = of_kind(kind, [red, green])
        for i in chosen:
            own, foreign = (0, 1) if made.sources[i] == 0 else (1, 0)
            inside = made.images[i][made.masks[i]]
            assert inside[:, foreign].max() > 20
            assert made.images[i][~made.masks[i]][:, foreign].max() == 0
            assert made.images[i][~made.masks[i]][:, own].min() >= 60


def test_a_transplant_joins_without_a_step() -> None:
    """Pieces of a brighter image take on the tone of where they go; pasted texture does not."""
    dark, bright = noise(96, 96) // 4 + 20, noise(96, 96) // 4 + 180

    def tone(kind: str) -> float:
        made, chosen = of_kind(kind, [dark, bright])
        shifts = [
            abs(made.images[i][made.masks[i]].mean() - (dark, bright)[made.sources[i]].mean())
            for i in chosen
        ]
        return float(np.mean(shifts))

    assert tone("transplant") < 25
    assert tone("texture") > 60


def test_severity_is_the_contrast() -> None:
    image = np.full((100, 150, 3), 120, np.uint8)

    def contrast(severity: float | tuple[float, float]) -> np.ndarray:
        made = SyntheticAnomalies(severity=severity, random_state=0).generate(image, N_EACH)
        return np.array([np.abs(i.astype(int) - 120).max() for i in made.images])

    faint, middle, strong = contrast(0.2), contrast((0.2, 1.0)), contrast(1.0)
    assert faint.mean() < 0.5 * strong.mean()
    assert faint.mean() < middle.mean() < strong.mean()


# --- inputs -----------------------------------------------------------------------------------


def test_any_form_of_images(tmp_path: Path) -> None:
    images = [noise(48, 64, 3), noise(64, 48, 3)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    made = SyntheticAnomalies(random_state=0)
    expected = made.generate(images, 6)
    for form in (tmp_path, sorted(tmp_path.iterdir()), [Image.fromarray(i) for i in images]):
        got = made.generate(form, 6)
        assert got.sources == expected.sources
        for a, b in zip(got.images, expected.images, strict=True):
            np.testing.assert_array_equal(a, b)


def test_parameters_are_those_of_scikit_learn() -> None:
    made = SyntheticAnomalies(["texture"], severity=0.5, random_state=7)
    assert made.get_params() == {"stages": ["texture"], "severity": 0.5, "random_state": 7}
    a, b = (m.generate(noise(32, 32), 2) for m in (made, clone(made)))
    np.testing.assert_array_equal(a.images[1], b.images[1])


@pytest.mark.parametrize(
    ("parameters", "n", "message"),
    [
        ({"stages": ("texture", "structual")}, 1, "Did you mean 'structural'?"),
        ({"stages": "colour"}, 1, r"stages must be one of \['contextual', 'structural', 'texture'"),
        ({"stages": ()}, 1, "stages is empty"),
        ({"stages": None}, 1, "stages must be"),
        ({"stages": (1,)}, 1, "got 1"),
        ({"severity": 0}, 1, r"severity must be a number in \(0, 1\]"),
        ({"severity": (0.5, 1.5)}, 1, r"got 1.5"),
        ({"severity": (0.9, 0.1)}, 1, r"pair \(low, high\)"),
        ({"severity": "high"}, 1, "got 'high'"),
        ({"random_state": "a"}, 1, "random_state must be a whole number"),
        ({"random_state": -1}, 1, "random_state must be a whole number"),
        ({}, 0, "n must be a whole number of at least 1, got 0"),
        ({}, 2.5, "n must be a whole number"),
    ],
)
def test_wrong_arguments_are_refused(parameters: dict, n: int, message: str) -> None:
    made = SyntheticAnomalies(**parameters)  # stores, and does not check
    for call in (made.generate, made.iterate):
        with pytest.raises(InvalidValueError, match=f"^SyntheticAnomalies: .*{message}"):
            call(noise(32, 32), n)


def test_wrong_images_are_refused(tmp_path: Path) -> None:
    made = SyntheticAnomalies(random_state=0)
    with pytest.raises(MissingPathError, match="nowhere does not exist"):
        made.generate(tmp_path / "nowhere", 1)
    with pytest.raises(InvalidValueError, match="images is empty"):
        made.generate([], 1)
    with pytest.raises(InvalidTypeError, match="SyntheticAnomalies: images must be"):
        made.generate(3, 1)
    with pytest.raises(ImageError, match="each side must be at least 8"):
        made.generate(noise(7, 30), 1)


def test_torch_is_not_needed() -> None:
    code = "import sys, anomalib_lite.synthetic; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_magnetic_tiles(data_dir: Path) -> None:
    paths = sorted((data_dir / "magnetic_tile" / "train" / "good").glob("*.jpg"))[:12]
    made = SyntheticAnomalies(random_state=0).generate(paths, N_EACH)
    check_exact(made, [np.asarray(Image.open(path).convert("RGB")) for path in paths])
