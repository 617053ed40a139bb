"""ProductRouter: the right product, the right detector, one network, and nothing silently wrong."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_fixtures import DEFECT, PLAIN, Small
from PIL import Image
from sklearn.base import clone
from sklearn.covariance import LedoitWolf
from torch import nn

from anomalib_lite import (
    MahalanobisVFM,
    PaDiM,
    PatchCore,
    ProductRouter,
    SubspaceAD,
    cli,
    load,
)
from anomalib_lite.backbones import Backbone
from anomalib_lite.cascade.router import ProductDetections
from anomalib_lite.datasets import Sample
from anomalib_lite.errors import (
    CalibrationWarning,
    ImageError,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
    NotFittedError,
)
from anomalib_lite.evaluation import evaluate
from anomalib_lite.model_file import read_model

QUICK: dict[str, Any] = PLAIN | {"image_size": (48, 80), "false_alarm_rate": 0.2}


def photos(shade: int, n: int, seed: int = 0, size: tuple[int, int] = (48, 80)) -> np.ndarray:
    """Return images of noise of a shade, whose mean varies a little from image to image."""
    rng = np.random.default_rng(1000 * shade + seed)
    around = shade + rng.normal(scale=2, size=(n, 1, 1, 1))
    return np.clip(around + rng.integers(-12, 13, (n, *size, 3)), 0, 255).astype(np.uint8)


def scratched(shade: int, n: int, seed: int = 1) -> np.ndarray:
    images = photos(shade, n, seed)
    images[(slice(None), *DEFECT)] += 40
    return images


def make(detector: Any = None, **parameters: Any) -> ProductRouter:
    detector = PatchCore(Small(), **QUICK) if detector is None else detector
    return ProductRouter(detector, **({"unknown_rate": 0.1} | parameters))


PRODUCTS = {"dark": photos(40, 30), "a.b": photos(100, 40), "light": photos(180, 30)}


@pytest.fixture(scope="module")
def fitted() -> ProductRouter:
    return make().fit(PRODUCTS)


@pytest.fixture
def twin(fitted: ProductRouter) -> ProductRouter:
    return copy.deepcopy(fitted)


def assert_alike(one: ProductRouter, other: ProductRouter) -> None:
    images = np.concatenate([photos(s, 3, 7) for s in (40, 70, 100, 180)])
    found, expected = one.detect(images), other.detect(images)
    for name in ("scores", "labels", "maps", "routes", "nearest", "distances"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


def test_maps_of_a_structure_score_have_a_threshold_of_their_own() -> None:
    router = make(PatchCore(Small(), **QUICK, image_score="structure")).fit(
        {"dark": photos(40, 40), "light": photos(180, 40)}
    )
    image = scratched(180, 1)
    detector = router.detectors_["light"]
    expected = detector.anomaly_map(image)[0] / detector.pixel_threshold_
    np.testing.assert_allclose(router.detect(image).maps[0], expected, rtol=1e-4, atol=1e-5)
    assert expected.max() > 1 > np.median(expected)


# --- What it answers ------------------------------------------------------------------------


def test_each_image_is_scored_by_the_detector_of_its_product(fitted: ProductRouter) -> None:
    shades = {"dark": 40, "a.b": 100, "light": 180}
    images = np.concatenate([photos(s, 4, 5) for s in shades.values()])
    bad = np.concatenate([scratched(s, 2) for s in shades.values()])
    order = np.random.default_rng(0).permutation(18)
    mixed = np.concatenate([images, bad])[order]
    truth = np.array([*np.repeat([*shades], 4), *np.repeat([*shades], 2)])[order]
    found = fitted.detect(mixed)
    assert isinstance(found, ProductDetections)
    np.testing.assert_array_equal(found.nearest, truth)
    for i, name in enumerate(truth):
        detector = fitted.detectors_[name]
        alone = detector.detect(mixed[i : i + 1])
        np.testing.assert_allclose(
            found.maps[i], alone.maps[0] / detector.pixel_threshold_, rtol=1e-4, atol=1e-5
        )
        if found.routes[i] == "unknown":
            assert np.isinf(found.scores[i])
            assert found.labels[i]
        else:
            assert found.routes[i] == name
            expected = alone.scores[0] / detector.threshold_
            assert found.scores[i] == pytest.approx(expected, rel=1e-5)
            assert found.labels[i] == alone.labels[0]
    assert (found.routes == truth).mean() > 0.5
    assert found.labels[order >= 12].all()
    np.testing.assert_array_equal(fitted.score(mixed), found.scores)
    np.testing.assert_array_equal(fitted.predict(mixed), np.where(found.labels, -1, 1))
    assert fitted.detect(mixed, maps=False).maps is None


def test_detectors_are_those_of_their_images_alone(fitted: ProductRouter) -> None:
    alone = PatchCore(Small(), **QUICK).fit(PRODUCTS["a.b"])
    detector = fitted.detectors_["a.b"]
    assert detector.threshold_ == pytest.approx(alone.threshold_, rel=1e-5)
    images = scratched(100, 3)
    np.testing.assert_allclose(detector.score(images), alone.score(images), rtol=1e-5)


def test_the_nearest_product_is_as_defined(fitted: ProductRouter) -> None:
    random, known, held = np.random.RandomState(0), {}, {}
    for name, images in PRODUCTS.items():
        G = fitted.backbone_.embed(images).mean(axis=(1, 2)).astype(np.float64)
        order = random.permutation(len(G))
        n = 9  # of 30 and of 40, for a rate of 0.1: at least a fifth is 8 of 40
        held[name], known[name] = G[order[:n]], G[order[n:]]
    means = {name: rows.mean(axis=0) for name, rows in known.items()}
    around = np.concatenate([rows - means[name] for name, rows in known.items()])
    covariance = LedoitWolf().fit(around)

    def distance(G: np.ndarray, name: str) -> np.ndarray:
        return np.sqrt(covariance.mahalanobis(G - means[name]))

    thresholds = [np.sort(distance(held[name], name))[8] for name in PRODUCTS]
    np.testing.assert_allclose(fitted.unknown_thresholds_, thresholds, rtol=1e-4)
    images = np.concatenate([photos(s, 2, 9) for s in (40, 60, 110, 180)])
    G = fitted.backbone_.embed(images).mean(axis=(1, 2)).astype(np.float64)
    D = np.stack([distance(G, name) for name in PRODUCTS], axis=1)
    found = fitted.detect(images, maps=False)
    np.testing.assert_array_equal(found.nearest, np.array([*PRODUCTS])[D.argmin(axis=1)])
    expected = D.min(axis=1) / np.array(thresholds)[D.argmin(axis=1)]
    np.testing.assert_allclose(found.distances, expected, rtol=1e-3)
    np.testing.assert_array_equal(found.routes == "unknown", expected > 1)


def test_unknown_products_are_refused_and_known_ones_at_the_rate() -> None:
    refused = []
    for seed in range(8):
        products = {str(s): photos(s, 60, seed) for s in (40, 180)}
        router = make(PatchCore(Small(), coreset="random", **QUICK), random_state=seed)
        router.fit(products)
        unknown = router.detect(photos(110, 20, 3), maps=True)
        assert (unknown.routes == "unknown").all()
        assert np.isposinf(unknown.scores).all()
        assert unknown.labels.all()
        assert (unknown.distances > 1).all()
        assert np.isfinite(unknown.maps).all()
        router.threshold_ = np.inf
        assert router.detect(photos(110, 2, 3)).labels.all()
        new = np.concatenate([photos(s, 100, seed + 50) for s in (40, 180)])
        refused.append(router.detect(new, maps=False).routes == "unknown")
    # 12 of 60 images calibrate each: one product's rate has a deviation of about 0.08.
    assert np.mean(refused) < 0.1 + 4 * 0.08 / 16**0.5


def test_the_network_runs_once_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    embed, seen = Backbone.embed, []

    def counting(self: Backbone, pixels: np.ndarray, *rest: Any) -> np.ndarray:
        seen.append(len(pixels))
        return embed(self, pixels, *rest)

    monkeypatch.setattr(Backbone, "embed", counting)
    router = make().fit(PRODUCTS)
    assert sum(seen) == 100
    seen.clear()
    router.detect(np.concatenate([photos(40, 5), photos(180, 5)]))
    assert sum(seen) == 10


def test_there_is_one_network(fitted: ProductRouter, twin: ProductRouter) -> None:
    for router in (fitted, twin, pickle.loads(pickle.dumps(fitted))):
        assert {id(d.backbone_) for d in router.detectors_.values()} == {id(router.backbone_)}
        assert len({id(d.backbone) for d in router.detectors_.values()}) == 1
        assert_alike(router, fitted)


@pytest.mark.parametrize(
    "detector",
    [
        PaDiM(Small(), n_components=12, **QUICK),
        MahalanobisVFM(Small(), **QUICK),
        SubspaceAD(Small(), n_components=4, memory_budget="200MB", **QUICK),
        PatchCore(Small(), memory_budget="200MB", n_neighbors=2, **QUICK),
    ],
    ids=lambda detector: type(detector).__name__,
)
def test_any_detector_will_do(detector: Any, tmp_path: Path) -> None:
    router = make(detector).fit(PRODUCTS)
    found = router.detect(np.concatenate([photos(40, 4, 5), scratched(180, 4)]))
    assert found.nearest.tolist() == ["dark"] * 4 + ["light"] * 4
    assert found.labels[4:].all()
    router.save(tmp_path / "all.safetensors")
    assert_alike(load(tmp_path / "all.safetensors", backbone=Small()), router)


def test_images_of_many_sizes_and_broken_ones(tmp_path: Path) -> None:
    detector = PatchCore(Small(), on_error="skip", **(QUICK | {"image_size": 48}))
    broken: list[Any] = [*PRODUCTS["dark"]]
    broken.insert(3, tmp_path / "gone.png")
    router = make(detector).fit({"dark": broken, "light": photos(180, 30, size=(96, 60))})
    assert [Path(name).name for name, _ in router.skipped_] == ["gone.png"]
    images = [*photos(40, 2, 5), tmp_path / "no.png", *photos(180, 2, 5, (96, 60))]
    found = router.detect(images)
    assert found.nearest.tolist() == ["dark", "dark", "", "light", "light"]
    assert found.routes[2] == "skipped"
    assert np.isnan([found.scores[2], found.distances[2]]).all()
    assert found.labels[2]
    assert [m if m is None else m.shape for m in found.maps][1:4] == [(48, 80), None, (96, 60)]
    one_by_one = [router.detect([image]).scores[0] for image in images]
    np.testing.assert_allclose(found.scores, one_by_one, rtol=1e-4)
    with pytest.raises(InvalidValueError, match="none of 5 images could be used"):
        router.fit({"dark": [tmp_path / "gone.png"] * 5})


def test_scores_at_the_threshold(twin: ProductRouter) -> None:
    images = photos(100, 3, 5)
    detector = twin.detectors_["a.b"]
    twin.unknown_thresholds_[:] = 1e9
    for threshold in (float(detector.score(images)[1]), 0.0, np.inf):
        detector.threshold_ = threshold
        found = twin.detect(images)
        np.testing.assert_array_equal(found.labels, detector.detect(images).labels)
        np.testing.assert_array_equal(found.labels, found.scores > 1)
        assert not np.isnan(found.scores).any()


# --- Later, in files and elsewhere ------------------------------------------------------------


def test_products_are_added(twin: ProductRouter) -> None:
    before = dict(twin.detectors_)
    assert twin.detect(photos(240, 3, 5)).routes.tolist() == ["unknown"] * 3
    assert twin.add({"white": photos(240, 30)}) is twin
    assert twin.products_ == ["dark", "a.b", "light", "white"]
    assert all(twin.detectors_[name] is detector for name, detector in before.items())
    assert twin.detectors_["white"].backbone_ is twin.backbone_
    assert twin.detect(photos(240, 3, 5)).nearest.tolist() == ["white"] * 3
    state = dict(vars(twin))
    with pytest.raises(InvalidValueError, match=r"a product 'dark' already.*partial_fit"):
        twin.add({"new": photos(10, 9), "dark": photos(40, 9)})
    with pytest.raises(InvalidValueError, match=r"at least 4 images .*got 3 of 'few'"):
        twin.add({"new": photos(10, 30), "few": photos(70, 3)})
    assert vars(twin) == state


@pytest.mark.parametrize("include_backbone", [False, True])
def test_one_file_holds_all(twin: ProductRouter, include_backbone: bool, tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    twin.threshold_ = 1.25
    twin.save(path, include_backbone=include_backbone)
    again = load(path, backbone=Small())
    assert_alike(again, twin)
    assert again.threshold_ == 1.25
    assert {id(d.backbone_) for d in again.detectors_.values()} == {id(again.backbone_)}
    header = read_model(path)[1]
    assert [part["backbone"] for part in header["parts"].values()] == [None] * 3
    assert header["backbone"]["sha256"] == twin.backbone_.sha256
    assert type(clone(again).detector) is PatchCore
    more = {"white": photos(240, 30)}
    assert_alike(again.add(more), twin.add(more))


def test_the_default_needs_no_argument(tmp_path: Path) -> None:
    with pytest.warns(CalibrationWarning, match="product 'dark' and 1 more: .*_rate=0.01") as seen:
        router = ProductRouter().fit({"dark": photos(40, 6), "light": photos(180, 6)})
    assert {warning.filename for warning in seen} == {__file__}
    assert len(seen) == 2  # of the detectors, and of unknown_rate
    path = tmp_path / "all.safetensors"
    router.save(path, include_backbone=True)
    assert path.stat().st_size < 24e6  # the network, 13 MB, is in it once
    again = load(path)
    assert_alike(again, router)
    assert again.detector is None


def test_it_is_evaluated_and_predicts_from_the_command_line(
    twin: ProductRouter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = []
    # Nothing like noise of any shade, and so farther away than any threshold.
    stripes = np.zeros((1, 48, 80, 3), np.uint8)
    stripes[:, ::8], stripes[:, 1::8] = (255, 255, 0), (255, 255, 0)
    twin.unknown_thresholds_ = 1.5 * twin.unknown_thresholds_  # no normal image is unknown by luck
    for i, pixels in enumerate([*photos(40, 3, 5), *scratched(180, 3), *stripes]):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        samples.append(Sample(tmp_path / f"{i}.png", int(i >= 3), "good" if i < 3 else "bad"))
    report = evaluate(twin, samples)
    assert report.metrics["image_auroc"] == 1.0
    assert "heatmap_call_rate" not in report.metrics
    router = make(PatchCore(image_size=48, false_alarm_rate=0.2)).fit(PRODUCTS)
    router.save(tmp_path / "all.safetensors")
    files = [str(tmp_path / f"{i}.png") for i in (0, 1, 6)]
    out = tmp_path / "out"
    assert cli.main(["predict", str(tmp_path / "all.safetensors"), *files, "-o", str(out)]) == 0
    assert re.search(r"products: .*\d unknown", capsys.readouterr().out)
    rows = (out / "scores.csv").read_text().splitlines()
    assert rows[0].endswith(",route")
    assert "inf,anomalous" in rows[3]


# --- What it refuses --------------------------------------------------------------------------


def test_images_that_are_too_large_are_refused_in_fit_add_and_detect() -> None:
    large = np.zeros((50, 80, 3), np.uint8)
    router = make(PatchCore(Small(), **QUICK, max_pixels=48 * 80))
    message = r"^ProductRouter: .*50x80 pixels.*max_pixels=3,840"
    with pytest.raises(ImageError, match=message):
        router.fit({"dark": [*photos(40, 30), large]})
    router.fit({"dark": photos(40, 30), "light": photos(180, 30)})
    with pytest.raises(ImageError, match=message):
        router.add({"gray": [*photos(100, 30), large]})
    with pytest.raises(ImageError, match=message):
        router.detect([large])
    assert router.products_ == ["dark", "light"]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (photos(40, 9), InvalidTypeError, "images must be a mapping .*got ndarray"),
        ({}, InvalidValueError, "images is empty"),
        ({"unknown": photos(40, 9)}, InvalidValueError, "name of a product .*got 'unknown'"),
        ({"": photos(40, 9)}, InvalidValueError, "name of a product .*got ''"),
        ({3: photos(40, 9)}, InvalidValueError, "name of a product must be a string.*got 3"),
        ({"dark": []}, InvalidValueError, "images is empty"),
        ({"dark": photos(40, 3)}, InvalidValueError, "at least 4 images .*got 3 of 'dark'"),
        ({"dark": ["gone.png"] * 5}, MissingPathError, "gone.png"),
        ({"dark": [Sample(Path("x"), 1, "bad")]}, InvalidValueError, "labelled anomalous"),
        ({"dark": np.repeat(photos(40, 1), 20, axis=0)}, InvalidValueError, "too much alike"),
    ],
)
def test_bad_images_are_refused(
    twin: ProductRouter, images: Any, error: type[Exception], message: str
) -> None:
    before = dict(vars(twin))
    with pytest.raises(error, match=f"^ProductRouter: .*{message}"):
        twin.fit(images)
    assert vars(twin) == before


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"unknown_rate": 0}, InvalidValueError, r"unknown_rate must be a number in \(0, 1\)"),
        ({"random_state": "x"}, InvalidValueError, "random_state must be"),
        ({"detector": "padim"}, InvalidTypeError, "detector must be an unfitted detector"),
        ({"detector": PatchCore}, InvalidTypeError, "detector must be an unfitted detector"),
        ({"detector": make()}, InvalidTypeError, "detector must be an unfitted detector"),
        ({"detector__batch_size": 0}, InvalidValueError, "batch_size must be"),
        (
            {"detector": MahalanobisVFM("test_vit", adapt="lora")},
            InvalidValueError,
            "adapt='lora' needs images",
        ),
    ],
)
def test_bad_parameters_are_refused(
    parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make().set_params(**parameters).fit(PRODUCTS)


def test_nothing_is_answered_before_fit(tmp_path: Path) -> None:
    for ask in ("detect", "score", "predict", "anomaly_map", "add", "save"):
        with pytest.raises(NotFittedError, match=r"^ProductRouter: not fitted yet.*fit\(images\)"):
            getattr(make(), ask)(tmp_path / "x")


def test_the_module_given_is_not_copied() -> None:
    module: nn.Module = Small()
    router = make(PatchCore(module, **QUICK)).fit(PRODUCTS)
    assert all(detector.backbone is module for detector in router.detectors_.values())


# --- Photographs ------------------------------------------------------------------------------


def test_kinds_of_paper_are_told_apart(data_dir: Path) -> None:
    root = data_dir / "piped"
    if not root.is_dir():
        pytest.skip("no photographs of paper there")
    papers = sorted(path for path in root.iterdir() if path.is_dir())
    left_out = papers.pop(1)
    detector = PatchCore(image_size=128, coreset="random", false_alarm_rate=0.06)
    router = ProductRouter(detector, unknown_rate=0.06)
    router.fit({paper.name: paper / "train" / "good" for paper in papers})
    nearest, refused = [], []
    for paper in papers:
        found = router.detect(paper / "test" / "good", maps=False)
        nearest.append(found.nearest == paper.name)
        refused.append(found.routes == "unknown")
    assert np.mean(nearest) >= 0.99
    assert np.mean(refused) < 0.2
    strangers = router.detect(left_out / "test" / "good", maps=False)
    assert (strangers.routes == "unknown").mean() > 0.5
    assert strangers.labels[strangers.routes == "unknown"].all()
