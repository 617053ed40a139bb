"""PatchCore(coreset_size=...): a number of patches, however the images come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_fixtures import HEIGHT, PLAIN, WIDTH, Small, good
from scipy.spatial.distance import cdist
from torch import nn

from anomalib_lite import PatchCore, load
from anomalib_lite.detectors import plan_patches
from anomalib_lite.detectors.fitting import CountedEmbeddings
from anomalib_lite.errors import InvalidValueError


def embeddings(n: int, seed: int = 0, side: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, side, side, 6)).astype(np.float32)


def bank_of(detector: PatchCore) -> np.ndarray:
    return detector.memory_bank_.embeddings_


# Bytes of a budget that are left for a few small images at a time.
LITTLE = 64 * 2**20 + 80_000


@pytest.mark.parametrize("size", [1, 40, 500])
@pytest.mark.parametrize("n", [20, 60])
def test_the_bank_has_that_many_patches(size: int, n: int) -> None:
    detector = PatchCore(coreset_size=size, false_alarm_rate=0.1).fit_embeddings(embeddings(n))
    # Fitted and held-back images round by themselves; each gives at least one.
    assert abs(len(bank_of(detector)) - size) <= 1
    assert detector.coreset_ratio_ == pytest.approx(size / (n * 144))


def test_fewer_patches_are_all_kept() -> None:
    detector = PatchCore(coreset_size=5000, false_alarm_rate=0.1).fit_embeddings(embeddings(20))
    assert detector.coreset_ratio_ == 1.0
    assert len(bank_of(detector)) == 20 * 144


def test_a_size_is_the_share_that_it_comes_to() -> None:
    E = embeddings(30)
    of_size = PatchCore(coreset_size=432, false_alarm_rate=0.1).fit_embeddings(E)
    of_ratio = PatchCore(coreset_ratio=0.1, false_alarm_rate=0.1).fit_embeddings(E)
    np.testing.assert_array_equal(bank_of(of_size), bank_of(of_ratio))
    assert of_size.threshold_ == of_ratio.threshold_


def test_images_of_several_sizes_count_by_their_patches() -> None:
    E = [*embeddings(20), *embeddings(20, seed=1, side=6)]
    E = [E[i] for i in np.random.default_rng(0).permutation(len(E))]
    detector = PatchCore(coreset_size=300, false_alarm_rate=0.1).fit_embeddings(E)
    # The share comes from the images fitted on, four fifths of all.
    assert 240 < len(bank_of(detector)) < 360


@pytest.mark.parametrize("budget", ["400MB", "70MB"])
def test_a_budget_keeps_as_many(budget: str) -> None:
    E = embeddings(400, side=16)
    parameters: dict[str, Any] = {"coreset_size": 1000, "false_alarm_rate": 0.1}
    free = PatchCore(**parameters).fit_embeddings(E)
    bounded = PatchCore(**parameters, memory_budget=budget).fit_embeddings(E)
    if budget == "400MB":  # all fit: the same bank
        np.testing.assert_array_equal(bank_of(free), bank_of(bounded))
    else:  # each shard rounds by itself
        assert abs(len(bank_of(bounded)) - 1000) < 50


@pytest.mark.parametrize("first", [6, 24])
def test_a_budget_keeps_as_many_of_images_of_several_sizes(first: int) -> None:
    """The first image, from which the memory is planned, has 4 times as few patches, or as many."""
    E = list(embeddings(200))
    E[np.random.RandomState(0).permutation(200)[0]] = embeddings(1, side=first)[0]
    parameters: dict[str, Any] = {"coreset_size": 250, "false_alarm_rate": 0.1}
    detector = PatchCore(**parameters, memory_budget=LITTLE + 100_000).fit_embeddings(E)
    assert len(bank_of(detector)) == 250
    assert detector.coreset_ratio_ == pytest.approx(250 / (199 * 144 + first**2))
    true = cdist(np.concatenate([e.reshape(-1, 6) for e in E]), bank_of(detector)).min(axis=1).max()
    assert true <= detector.memory_bank_.covering_radius_ * (1 + 1e-5)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_a_budget_keeps_as_many_of_fewer_than_there_are_shards(size: int) -> None:
    E = embeddings(100)
    sizes = {"patches": 144, "n_features": 6, "n_images": 100}
    plan = plan_patches(LITTLE, size=size, **sizes)  # type: ignore[arg-type]
    assert plan.thin
    assert plan.images_per_shard < 5
    detector = PatchCore(coreset_size=size, false_alarm_rate=0.1, memory_budget=LITTLE)
    bank = bank_of(detector.fit_embeddings(E))
    assert size <= len(bank) <= size + 1  # images held back give at least one
    true = cdist(E.reshape(-1, 6), bank).min(axis=1).max()
    assert true <= detector.memory_bank_.covering_radius_ * (1 + 1e-5)


@pytest.mark.parametrize("n_jobs", [None, 1])
@pytest.mark.parametrize("budget", ["400MB", "94MB"])
def test_files_that_cannot_be_read_take_no_share(
    budget: str, n_jobs: int | None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    images: list[Any] = list(rng.integers(0, 255, (150, 32, 48, 3), dtype=np.uint8))
    images += [tmp_path / f"gone{i}.png" for i in range(100)]
    detector = PatchCore(
        nn.PixelUnshuffle(4),
        image_size=32,
        dtype="float32",
        device="cpu",
        on_error="skip",
        coreset_size=300,
        false_alarm_rate=0.1,
        memory_budget=budget,
        n_jobs=n_jobs,
    )
    detector.fit(images)
    assert len(detector.skipped_) == 100
    assert abs(len(bank_of(detector)) - 300) <= 1


def test_the_share_is_that_of_all_patches() -> None:
    """The images held back, which come last in the order of fitting, have fewer patches."""
    order = np.random.RandomState(0).permutation(40)
    n_held_back = 9
    E: list[np.ndarray] = list(embeddings(40))
    for i in order[-n_held_back:]:
        E[i] = E[i][:6, :6]
    detector = PatchCore(coreset_size=400, false_alarm_rate=0.1).fit_embeddings(E)
    n_patches = (40 - n_held_back) * 144 + n_held_back * 36
    assert detector.coreset_ratio_ == pytest.approx(400 / n_patches)
    assert abs(len(bank_of(detector)) - 400) <= 1
    before = len(bank_of(detector))
    detector.partial_fit_embeddings(embeddings(1, seed=1))
    assert len(bank_of(detector)) - before == round(144 * 400 / n_patches)


def test_later_images_add_the_same_share() -> None:
    detector = PatchCore(coreset_size=200, false_alarm_rate=0.1).fit_embeddings(embeddings(40))
    ratio = detector.coreset_ratio_
    detector.partial_fit_embeddings(embeddings(40, seed=1))
    assert detector.coreset_ratio_ == ratio
    assert abs(len(bank_of(detector)) - 400) <= 4


def test_the_share_is_saved(tmp_path: Any) -> None:
    detector = PatchCore(coreset_size=200, false_alarm_rate=0.1).fit_embeddings(embeddings(40))
    detector.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.coreset_ratio_ == detector.coreset_ratio_
    more = embeddings(40, seed=1)
    np.testing.assert_array_equal(
        bank_of(loaded.partial_fit_embeddings(more)), bank_of(detector.partial_fit_embeddings(more))
    )


def test_a_stream_needs_a_share() -> None:
    detector = PatchCore(coreset_size=200, memory_budget="400MB")
    with pytest.raises(InvalidValueError, match=r"known number of images.*Set coreset_ratio"):
        detector.fit_embeddings(iter(embeddings(20)))
    ratio = PatchCore(coreset_ratio=0.1, memory_budget="400MB", false_alarm_rate=0.1)
    assert len(bank_of(ratio.fit_embeddings(iter(embeddings(20))))) > 100


def test_a_stream_that_says_its_length_needs_no_share() -> None:
    detector = PatchCore(coreset_size=200, memory_budget="400MB", false_alarm_rate=0.1)
    stream = iter(embeddings(60))

    class Stream:
        n_images = 60

        def __iter__(self) -> Any:
            return stream

    assert abs(len(bank_of(detector.fit_embeddings(Stream()))) - 200) <= 1


@pytest.mark.parametrize("size", [0, -1, 2.5, None])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(InvalidValueError, match="coreset_size must be a whole number"):
        PatchCore(coreset_size=size).fit_embeddings(embeddings(20))


@pytest.mark.parametrize("more", [{"image_score": "reweighted"}, {"index": "HNSW8"}])
def test_images_that_do_not_join_the_bank_take_no_share_of_it(more: dict[str, Any]) -> None:
    detector = PatchCore(coreset_size=300, false_alarm_rate=0.1, **more)
    assert len(bank_of(detector.fit_embeddings(embeddings(40)))) == 300


@pytest.mark.parametrize("image_score", ["max", "structure"])
def test_a_model_of_each_layer_has_as_many(image_score: str) -> None:
    size: dict[str, Any] = {"image_size": (HEIGHT, WIDTH), "false_alarm_rate": 0.2}
    detector = PatchCore(
        Small(), **PLAIN, **size, fusion="per_layer", image_score=image_score, coreset_size=300
    ).fit(good(40))
    for model in detector.layer_models_.models_:
        assert abs(len(bank_of(model)) - 300) <= 1


@pytest.mark.parametrize("index", ["flat", "HNSW8"])
def test_a_budget_keeps_as_many_where_no_image_joins(index: str) -> None:
    parameters: dict[str, Any] = {"coreset_size": 100, "false_alarm_rate": 0.1, "index": index}
    detector = PatchCore(**parameters, memory_budget=LITTLE + 50_000)
    assert len(bank_of(detector.fit_embeddings(embeddings(100)))) == 100


def test_nothing_of_an_earlier_fit_is_left() -> None:
    detector = PatchCore(coreset_size=300, image_score="structure", false_alarm_rate=0.1)
    detector.fit_embeddings(embeddings(60))
    assert hasattr(detector, "map_statistics_")
    detector.set_params(image_score="max").fit_embeddings(embeddings(60))
    assert detector._map_threshold == detector.pixel_threshold_ < detector.threshold_
    assert not hasattr(detector, "map_statistics_")


def test_another_map_does_not_follow_a_fit() -> None:
    detector = PatchCore(coreset_size=300, whiten_shrinkage=0.1, false_alarm_rate=0.1)
    detector.fit_embeddings(embeddings(40)).partial_fit_embeddings(embeddings(10, seed=1))
    with pytest.raises(InvalidValueError, match="whiten must stay as it was in fit"):
        detector.set_params(whiten=True).partial_fit_embeddings(embeddings(10, seed=1))


@pytest.mark.parametrize("n", [0, -1, 1.5, "30", True])
def test_a_number_of_images_that_is_none_is_refused(n: Any) -> None:
    stream = CountedEmbeddings(embeddings(30), n)
    detector = PatchCore(coreset_size=100, memory_budget="400MB", false_alarm_rate=0.1)
    with pytest.raises(InvalidValueError, match="n_images of E must be a whole number"):
        detector.fit_embeddings(stream)
    assert not hasattr(detector, "threshold_")
