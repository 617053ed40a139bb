"""image_size="auto": the size in the backbone goes by that of the images."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from anomalib_lite import GatedCascade, MahalanobisVFM, PatchCore, ProductRouter, load, lora
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.images.sizing import choose_image_size


class Shades(torch.nn.Module):
    """A network of two maps, fast at any size."""

    def __init__(self):
        super().__init__()
        self.fine = torch.nn.Conv2d(3, 4, 3, stride=8)
        self.coarse = torch.nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.coarse(self.fine(x))


def network():
    torch.manual_seed(0)
    return Shades().eval()


def photos(n, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, height, width, 3), dtype=np.uint8)


def patchcore(**parameters):
    given = {"backbone": network(), "layers": ("fine", "coarse"), "engine": "torch"}
    return PatchCore(**(given | {"false_alarm_rate": 0.2, "coreset_size": 300} | parameters))


@pytest.mark.parametrize(
    ("side", "expected"), [(40, 256), (159, 256), (160, 320), (511, 320), (512, 448), (2000, 448)]
)
def test_it_goes_by_the_shorter_side(side, expected):
    assert choose_image_size(ImageSource(np.zeros((1, side, side + 7, 3), np.uint8))) == expected


def test_every_form_of_an_image_has_its_size(tmp_path):
    array = photos(1, 300, 420)[0]
    Image.fromarray(array).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(array).save(tmp_path / "b.jpg", exif=turned)
    forms = [
        array,
        array.astype(np.float32) / 255,
        array[..., 0],
        torch.from_numpy(array).permute(2, 0, 1),
        Image.fromarray(array),
        tmp_path / "a.png",
        str(tmp_path / "b.jpg"),
    ]
    for form in forms:
        assert choose_image_size(ImageSource([form])) == 320


def test_it_is_the_median_and_what_cannot_be_read_does_not_count(tmp_path):
    sides = [100, 150, 300, 900, 940]
    for i, side in enumerate(sides):
        Image.new("RGB", (side, 500)).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"no image")
    (tmp_path / "6.png").touch()
    assert choose_image_size(ImageSource(tmp_path)) == 320


def test_a_file_larger_than_pillow_warns_of_is_measured_silently(tmp_path, recwarn):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    assert choose_image_size(ImageSource([tmp_path / "large.png"])) == 448
    assert not recwarn.list


def test_scores_are_those_of_that_size_as_a_number():
    good, new = photos(12, 300, 340), photos(3, 200, 240, seed=1)
    auto, number = patchcore().fit(good), patchcore(image_size=320).fit(good)
    assert auto.image_size == "auto"
    assert auto.image_size_ == number.image_size_ == 320
    np.testing.assert_array_equal(auto.score(new), number.score(new))


def test_what_is_fitted_keeps_its_size():
    detector = patchcore().fit(photos(12, 300, 340))
    before = detector.score(photos(3, 300, 340, seed=1))
    detector.image_size = 64  # is for the next fit
    with pytest.raises(InvalidValueError, match="image_size must stay as it was in fit, 'auto'"):
        detector.score(photos(3, 300, 340, seed=1))
    detector.image_size = "auto"
    np.testing.assert_array_equal(detector.score(photos(3, 300, 340, seed=1)), before)
    assert detector.partial_fit(photos(6, 600, 600, seed=2)).image_size_ == 320
    assert detector.fit(photos(12, 100, 140)).image_size_ == 256


@pytest.mark.parametrize("size", ["auto", 280, (272, 336)])
def test_it_is_saved(tmp_path, size):
    detector = patchcore(image_size=size).fit(photos(12, 290, 340))
    detector.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors", backbone=detector.backbone)
    assert again.image_size_ == {"auto": 320}.get(str(size), size)
    new = photos(3, 200, 240, seed=1)
    np.testing.assert_array_equal(detector.score(new), again.score(new))


def test_a_tile_has_its_own_size():
    wall = photos(8, 900, 900)
    assert patchcore(tile=300, overlap=32).fit(wall).image_size_ == 320
    assert patchcore(tile=512).fit(wall).image_size_ == 448


def test_a_router_takes_the_largest_size_of_its_products():
    products = {"small": photos(8, 120, 140), "large": photos(8, 320, 340, seed=1)}
    router = ProductRouter(patchcore(), unknown_rate=0.2).fit(products)
    assert {d.image_size_ for d in router.detectors_.values()} == {320}
    router.add({"huge": photos(8, 600, 600, seed=2)})
    assert {d.image_size_ for d in router.detectors_.values()} == {320}


def test_an_adapter_learns_at_that_size(monkeypatch):
    sizes = []
    train = lora.train_adapter

    def watched(*given, **named):
        sizes.append(named["image_size"])
        return train(*given, **named)

    monkeypatch.setattr(lora, "train_adapter", watched)
    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    detector = MahalanobisVFM(
        vit, image_size="auto", adapt="lora", epochs=1, false_alarm_rate=0.2, rank=1
    )
    detector.fit(photos(8, 160, 160))
    assert sizes == [320]
    assert detector.image_size_ == 320


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: patchcore(image_size="big"), "a pair \\(H, W\\), or 'auto', got 'big'"),
        (lambda: GatedCascade(image_size="auto"), "or a pair \\(H, W\\), got 'auto'"),
    ],
)
def test_other_words_are_refused(make, text):
    with pytest.raises(InvalidValueError, match=text):
        make().fit(photos(12, 64, 64))


def test_embeddings_have_no_size():
    E = np.random.default_rng(0).normal(size=(12, 4, 4, 8)).astype(np.float32)
    assert not hasattr(PatchCore(false_alarm_rate=0.2).fit_embeddings(E), "image_size_")
