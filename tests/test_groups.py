"""Photographs of one part are held back together, so that new parts keep the rate."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_fixtures import PLAIN, Small, good
from PIL import Image

from anomalib_lite import GatedCascade, MahalanobisVFM, PaDiM, PatchCore, SubspaceAD, load
from anomalib_lite.calibration import conformal_p_values, conformal_threshold
from anomalib_lite.cli import main
from anomalib_lite.detectors.fitting import order_of_fit, whole_groups
from anomalib_lite.errors import (
    CopiesWarning,
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
)
from anomalib_lite.images import ImageSource
from anomalib_lite.images.grouping import group_ids, groups_of_files

SUBSPACE: dict[str, Any] = {"n_components": 2}
DETECTORS: list[tuple[Any, dict[str, Any]]] = [
    (PatchCore, {}),
    (PatchCore, {"memory_budget": "90MB"}),
    (PatchCore, {"image_score": "structure"}),
    (PatchCore, {"feature_dim": 4, "whiten": True}),
    (PaDiM, {}),
    (MahalanobisVFM, {}),
    (SubspaceAD, SUBSPACE),
]


def parts(n: int, photographs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw embeddings of ``n`` parts, several photographs of each, and the part of each."""
    rng = np.random.default_rng(seed)
    part = rng.normal(size=(n, 1, 1, 1, 6))
    E = part + 0.2 * rng.normal(size=(n, photographs, 3, 3, 6))
    return E.reshape(-1, 3, 3, 6).astype(np.float32), np.repeat(np.arange(n), photographs)


# --- Thresholds ---------------------------------------------------------------------------------


def naive_threshold(scores: np.ndarray, groups: np.ndarray, rate: float) -> float:
    """Return the least score up to which the scores weigh enough (Lee, Barber, Willett 2023)."""
    sizes = Counter(groups.tolist())
    for level in np.unique(scores):
        up_to = sum(
            1 / (len(sizes) + 1) / sizes[g]
            for g, s in zip(groups.tolist(), scores, strict=True)
            if s <= level
        )
        if up_to >= 1 - rate - 1e-12:
            return float(level)
    raise AssertionError


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_of_groups_is_that_of_a_naive_search(rate: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(12), rng.integers(1, 6, 12)))
    scores = rng.integers(0, 30, len(groups)).astype(np.float32)  # with ties
    expected = naive_threshold(scores, groups, rate)
    assert conformal_threshold(scores, rate, groups=groups) == expected
    names = [f"part {g}" for g in groups]
    assert conformal_threshold(scores, rate, groups=names) == expected
    # An image exceeds the threshold where its p-value is at most the rate.
    p_values = conformal_p_values(scores, scores, groups)
    np.testing.assert_array_equal(scores > expected, p_values <= rate + 1e-12)


def test_groups_of_one_image_change_nothing() -> None:
    scores = np.random.default_rng(0).normal(size=57)
    for rate in (0.02, 0.05, 0.3):
        assert conformal_threshold(scores, rate, groups=range(57)) == conformal_threshold(
            scores, rate
        )
    new = np.linspace(-3, 3, 20)
    np.testing.assert_array_equal(
        conformal_p_values(new, scores, range(57)), conformal_p_values(new, scores)
    )


def test_with_a_confidence_one_image_of_each_group_counts() -> None:
    scores, groups = np.arange(200.0), np.repeat(np.arange(100), 2)
    assert conformal_threshold(scores, 0.1, confidence=0.9, groups=groups) == conformal_threshold(
        scores[::2], 0.1, confidence=0.9
    )


# --- The order of fitting -------------------------------------------------------------------------


def test_every_group_is_as_likely_to_be_held_back_whatever_its_size() -> None:
    groups = np.repeat(np.arange(4), [1, 2, 9, 3])
    random, last = np.random.RandomState(0), Counter[int]()
    for _ in range(4000):
        order = order_of_fit(random.permutation(15), groups, random)
        assert sorted(order) == list(range(len(groups)))
        found = groups[order]
        assert (found[1:] != found[:-1]).sum() == 3  # each is in one piece
        last[int(found[-1])] += 1
    for count in last.values():
        assert abs(count / 4000 - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_whole_groups_are_the_last_ones() -> None:
    groups = np.array([3, 3, 1, 1, 1, 0, 2, 2])
    assert [whole_groups(groups, most) for most in range(9)] == [0, 0, 2, 3, 3, 3, 6, 6, 8]


# --- Detectors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "parameters"), DETECTORS)
def test_new_parts_keep_the_rate(cls: Any, parameters: dict[str, Any]) -> None:
    """Without groups, images held back have twins among those fitted on, and score too low."""
    rate, alarms, alarms_without = 0.2, [], []
    for seed in range(12):
        E, groups = parts(48, 4, seed)
        new, _ = parts(150, 1, 1000 + seed)
        for ids, found in ((groups, alarms), (None, alarms_without)):
            detector = cls(false_alarm_rate=rate, random_state=seed, **parameters)
            detector.fit_embeddings(E, groups=ids)
            found.append(np.mean(detector.score_embeddings(new) > detector.threshold_))
    error = np.std(alarms, ddof=1) / np.sqrt(len(alarms))
    assert np.mean(alarms) <= rate + 4 * error
    assert np.mean(alarms_without) > np.mean(alarms) + 0.03


@pytest.mark.parametrize(("cls", "parameters"), DETECTORS)
def test_groups_are_held_back_whole(cls: Any, parameters: dict[str, Any]) -> None:
    """The scores kept are those of all photographs of some parts, by a model without these."""
    sizes = np.random.default_rng(1).integers(1, 5, 40)
    rng = np.random.default_rng(2)
    E = rng.normal(size=(sizes.sum(), 3, 3, 6)).astype(np.float32)
    groups = np.repeat(np.arange(40), sizes)
    detector = cls(false_alarm_rate=0.2, **parameters).fit_embeddings(E, groups=groups)
    held_back = np.unique(detector.calibration_groups_)
    # A fifth; for "structure" half of them have taught how maps vary.
    assert len(held_back) == (4 if parameters.get("image_score") == "structure" else 8)
    counts = Counter(detector.calibration_groups_.tolist())
    random = np.random.RandomState(0)
    order = order_of_fit(random.permutation(len(E)), groups, random)
    last = groups[order][len(E) - len(detector.calibration_groups_) :]
    np.testing.assert_array_equal(detector.calibration_groups_, last)
    assert all(counts[g] == sizes[g] for g in held_back)


@pytest.mark.parametrize(("cls", "parameters"), DETECTORS)
def test_saved_updated_and_calibrated_anew(
    cls: Any, parameters: dict[str, Any], tmp_path: Path
) -> None:
    E, groups = parts(40, 3, 0)
    detector = cls(false_alarm_rate=0.25, **parameters).fit_embeddings(E, groups=groups)
    before = detector.calibration_groups_
    own = conformal_threshold(detector.calibration_scores_, 0.25, groups=before)
    assert detector.threshold_ == own
    if parameters.get("image_score") != "structure":
        other = conformal_threshold(detector.calibration_scores_, 0.4, groups=before)
        assert detector.set_false_alarm_rate(0.4).threshold_ == other
        detector.set_false_alarm_rate(0.25)
    more, new_groups = parts(20, 3, 5)
    detector.partial_fit_embeddings(more, groups=new_groups)
    now = detector.calibration_groups_
    assert len(now) == len(detector.calibration_scores_)
    kept = len(now) > len(before)
    assert kept == (cls is PatchCore and parameters.get("image_score") != "structure")
    if kept:  # the groups of each call are others
        np.testing.assert_array_equal(now[: len(before)], before)
        assert not set(now[len(before) :]) & set(before)
    assert set(Counter(now.tolist()).values()) == {3}
    assert detector.threshold_ == conformal_threshold(
        detector.calibration_scores_, 0.25, groups=now
    )


def test_images_that_cannot_be_used_leave_their_group(tmp_path: Path) -> None:
    paths, groups = [], []
    for i, image in enumerate(good(40)):
        paths.append(tmp_path / f"part{i // 4}_{i % 4}.png")
        groups.append(f"part {i // 4}")
        Image.fromarray(image).save(paths[-1])
    for i in (0, 13, 14, 39):
        paths[i].write_bytes(b"no image")
    for budget in (None, "500MB"):
        detector = PatchCore(
            image_size=32, false_alarm_rate=0.3, on_error="skip", memory_budget=budget
        ).fit(paths, groups=groups)
        counts = Counter(detector.calibration_groups_.tolist())
        assert len(detector.skipped_) == 4
        ids, random = group_ids(ImageSource(paths), groups), np.random.RandomState(0)
        order = order_of_fit(random.permutation(40), ids, random)
        usable = [i for i in order if i not in (0, 13, 14, 39)]
        last = [i // 4 for i in usable[len(usable) - sum(counts.values()) :]]
        assert detector.calibration_groups_.tolist() == last
        full = {g: sum(i // 4 == g for i in usable) for g in counts}
        assert counts == full


def test_a_saved_detector_knows_its_groups(tmp_path: Path) -> None:
    images = good(24)
    detector = PatchCore(image_size=32, false_alarm_rate=0.2, augment="flips")
    detector.fit(images, groups=np.repeat(np.arange(12), 2))
    assert set(Counter(detector.calibration_groups_.tolist()).values()) == {2}
    detector.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.calibration_groups_, detector.calibration_groups_)
    found, again = detector.detect(images), loaded.detect(images)
    np.testing.assert_array_equal(found.p_values, again.p_values)
    assert loaded.set_false_alarm_rate(0.3).threshold_ == (
        detector.set_false_alarm_rate(0.3).threshold_
    )
    loaded.recalibrate(images[:12], groups=[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    expected = conformal_threshold(
        loaded.calibration_scores_, 0.3, groups=loaded.calibration_groups_
    )
    assert len(set(loaded.calibration_groups_.tolist())) == 4
    assert loaded.threshold_ == expected


def test_auto_finds_the_photographs_of_one_part() -> None:
    rng = np.random.default_rng(3)
    images = [photo for photo in good(12, size=(64, 96)) for _ in range(3)]
    noisy = [np.clip(i + rng.integers(-2, 3, i.shape), 0, 255).astype(np.uint8) for i in images]
    options = PLAIN | {"image_size": 32, "false_alarm_rate": 0.3}
    detector = PatchCore(Small(), **options).fit(noisy, groups="auto")
    assert set(Counter(detector.calibration_groups_.tolist()).values()) == {3}
    told = PatchCore(Small(), **options).fit(noisy, groups=[i // 3 for i in range(36)])
    assert told.threshold_ == detector.threshold_
    # A cascade takes the same word.
    cascade = GatedCascade(Small(), PatchCore(Small(), **options), max_missed=0.5, **options)
    assert cascade.fit(noisy, groups="auto").routing_.threshold > 0


@pytest.mark.parametrize(
    ("groups", "error", "says"),
    [
        ([1, 2], InvalidValueError, "groups must hold 12 values, one for each image, got 2"),
        ("parts", InvalidValueError, "groups must hold 12 values, one for each image, got 'parts'"),
        ([0.5] * 12, InvalidTypeError, "whole numbers or strings, got 0.5 at position 0"),
    ],
)
def test_wrong_groups(groups: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        PatchCore(image_size=32).fit(good(12), groups=groups)
    with pytest.raises(error, match=says):
        PatchCore().fit_embeddings(parts(12, 1, 0)[0], groups=groups)


def test_groups_are_numbered_alike_in_a_list_and_an_array() -> None:
    for seed in range(20):
        groups = np.random.default_rng(seed).integers(-3, 5, 17)
        source = ImageSource(np.zeros((17, 8, 8, 3), np.uint8))
        ids = group_ids(source, groups)
        np.testing.assert_array_equal(ids, group_ids(source, groups.tolist()))
        assert ids.tolist() == [list(dict.fromkeys(groups.tolist())).index(g) for g in groups]


def test_recalibrate_refuses_groups_before_it_scores() -> None:
    detector = PatchCore(image_size=32, false_alarm_rate=0.3).fit(good(12))
    images = [*good(3), "gone.png"]
    with pytest.raises(InvalidValueError, match="groups must hold 4 values"):
        detector.recalibrate(images, groups=[0, 1])


def test_groups_where_they_cannot_be_held_back() -> None:
    E, groups = parts(12, 2, 0)
    with pytest.raises(InvalidValueError, match="groups need calibration='split'"):
        PatchCore(calibration="leave_one_out").fit_embeddings(E, groups=groups)
    with pytest.raises(InvalidValueError, match="groups need embeddings that can"):
        PatchCore(memory_budget="90MB").fit_embeddings(iter(E), groups=groups)


# --- Copies of which nobody has said that they are copies ---------------------------------------


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_exact_copies_count_as_one(times: int, kind: str, tmp_path: Path) -> None:
    images: list[Any] = [image for image in good(24) for _ in range(times)]
    if kind == "files":
        paths = [tmp_path / f"{i:03}.png" for i in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(path)
        images = list(paths)
    detector = PatchCore(image_size=32, false_alarm_rate=0.2)
    n = 24 * times
    says = f"PatchCore: {n - 24} of {n} images have the same content as another"
    with pytest.warns(CopiesWarning, match=says) as caught:
        detector.fit(images)
    assert caught[0].filename == __file__
    assert set(Counter(detector.calibration_groups_.tolist()).values()) == {times}
    # A copy of an image held back was not fitted on: new images are as these were.
    assert np.mean(detector.score(good(60, seed=9)) > detector.threshold_) < 0.5
    with pytest.warns(CopiesWarning, match=says):
        budget = PatchCore(image_size=32, false_alarm_rate=0.2, memory_budget="300MB").fit(images)
    np.testing.assert_array_equal(budget.calibration_groups_, detector.calibration_groups_)


def test_near_copies_are_named() -> None:
    rng = np.random.default_rng(0)
    images = [photo for photo in good(16, size=(64, 96)) for _ in range(5)]
    frames = [np.clip(i + rng.integers(-2, 3, i.shape), 0, 255).astype(np.uint8) for i in images]
    detector = PatchCore(image_size=32, false_alarm_rate=0.2)
    says = r"80 of 80 images look like copies.*\(images\[0\] and images\[1\]\).*groups='auto'"
    with pytest.warns(CopiesWarning, match=says):
        detector.fit(frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.fit(frames, groups=range(80))  # each shows another part, says the user
        detector.fit(frames, groups="auto")
    with pytest.warns(CopiesWarning, match="look like copies"):
        PatchCore(image_size=32, false_alarm_rate=0.2, calibration="leave_one_out").fit(frames)


def test_a_cascade_counts_copies_as_one() -> None:
    options = PLAIN | {"image_size": 32, "false_alarm_rate": 0.3}
    cascade = GatedCascade(Small(), PatchCore(Small(), **options), max_missed=0.5, **options)
    images = [image for image in good(16) for _ in range(2)]
    with pytest.warns(CopiesWarning, match="GatedCascade: 16 of 32 images have the same") as told:
        cascade.fit(images)
    assert told[0].filename == __file__
    assert len(cascade.calibration_probabilities_) == 3  # a fifth of 16, one of each


@pytest.mark.parametrize("calibration", ["split", "leave_one_out"])
def test_new_images_cause_no_warning(calibration: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PatchCore(image_size=32, false_alarm_rate=0.2, calibration=calibration).fit(good(40))


# --- File names and the command line --------------------------------------------------------------


def test_rules_for_file_names(tmp_path: Path) -> None:
    names = ["a/x1.png", "a/x2.png", "a/x9.png", "b/x2.png", "b/y3.png"]
    assert groups_of_files(names, "folder") == ["a", "a", "a", "b", "b"]
    found = groups_of_files(names, "runs:1")
    assert [found.index(g) for g in found] == [0, 0, 2, 3, 3]
    found = groups_of_files(["exp1_num_70.jpg", "exp4_num_90.jpg", "exp2_num_20.jpg"], "runs:20")
    assert [found.index(g) for g in found] == [0, 0, 2]
    assert groups_of_files(names, r"([xy])(\d)")[:2] == ["x 1", "x 2"]
    assert groups_of_files(names, "[xy]") == ["x", "x", "x", "x", "y"]
    table = tmp_path / "parts.csv"
    table.write_text("file,serial\n" + "".join(f"{Path(n).name},S{n[0]}\n" for n in names[:3]))
    assert groups_of_files(names[:3], f"{table}:serial") == ["Sa", "Sa", "Sa"]
    for rule, error, says in [
        (f"{table}:colour", InvalidValueError, "no column .colour."),
        (f"{table}:serial", InvalidValueError, "does not say the group of y3.png"),
        ("none.csv:serial", MissingPathError, "no file none.csv"),
        ("(", InvalidValueError, "no regular expression"),
        ("z", InvalidValueError, "is not found in x1.png"),
    ]:
        with pytest.raises(error, match=says):
            groups_of_files(names, rule)
    with pytest.raises(InvalidValueError, match="need a number in each file name"):
        groups_of_files(["a.png"], "runs:3")


def test_the_command_line_promises_nothing_about_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for i, image in enumerate(good(20, size=(64, 96))):
        for k in range(2):
            frame = np.clip(image + rng.integers(-2, 3, image.shape), 0, 255).astype(np.uint8)
            Image.fromarray(frame).save(tmp_path / f"{i}_{k}.png")
    command = ["fit", str(tmp_path), "-o", str(tmp_path / "m.safetensors"), "--image-size", "32"]
    assert main([*command, "--false-alarm-rate", "0.2"]) == 0
    told = capsys.readouterr()
    assert "40 of 40 images look like copies" in told.err
    assert "the rate of 0.2 asked for is not guaranteed, see the warning" in told.out


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, fresh, model = tmp_path / "good", tmp_path / "fresh", tmp_path / "m.safetensors"
    for directory, seed in ((folder, 0), (fresh, 1)):
        directory.mkdir()
        for i, image in enumerate(good(24, seed)):
            Image.fromarray(image).save(directory / f"part{i // 2:02}_{i % 2}.png")
    options = ["--image-size", "32", "--false-alarm-rate", "0.2"]
    command = ["fit", str(folder), "-o", str(model), *options, "--groups", r"part(\d+)"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "scores of 4 groups" in told
    assert "at most 0.2 of future images of new parts, on average" in told
    detector = load(model)
    assert set(Counter(detector.calibration_groups_.tolist()).values()) == {2}
    assert main(["calibrate", str(model), str(fresh), "--groups", "part(..)"]) == 0
    assert "of 24 scores of 12 groups" in capsys.readouterr().out
    assert len(load(model).calibration_scores_) == 24
    assert main(["calibrate", str(model), "--groups", "part(..)"]) == 2
    assert "--groups are those of good images" in capsys.readouterr().err
