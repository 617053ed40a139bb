"""Another rate, other good images, a threshold of one's own, p-values: without a new fit."""

import copy
import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detector_fixtures import PLAIN, Small, good
from PIL import Image
from scipy import stats

from anomalib_lite import MahalanobisVFM, PaDiM, PatchCore, SubspaceAD, load
from anomalib_lite.calibration import (
    conformal_p_values,
    conformal_threshold,
    describe_threshold,
)
from anomalib_lite.cli import main
from anomalib_lite.errors import CalibrationWarning, InvalidValueError, NotFittedError

DETECTORS: list[Any] = [PatchCore, PaDiM, MahalanobisVFM, SubspaceAD]


def embeddings(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 3, 8)).astype(np.float32)


def fitted(cls: Any = PatchCore, n: int = 100, **parameters: Any) -> Any:
    options = {PaDiM: {"n_components": 8}, SubspaceAD: {"n_components": 4}}.get(cls, {})
    return cls(**(options | {"false_alarm_rate": 0.05} | parameters)).fit_embeddings(embeddings(n))


# --- Thresholds of scores ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [59, 60, 93, 200])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_the_rank_with_a_confidence_is_the_least_that_a_naive_search_finds(
    n: int, confidence: float
) -> None:
    # The rate is at most a with the k-th of n scores if at most n - k of n draws lie above the
    # quantile of a: a binomial number.
    naive = next(
        k for k in range(1, n + 1) if stats.binom.cdf(n - k, n, 0.05) <= 1 - confidence + 1e-12
    )
    assert conformal_threshold(np.arange(1, n + 1), 0.05, confidence=confidence) == naive


def test_a_confidence_holds_over_draws() -> None:
    rng, n, rate = np.random.default_rng(0), 80, 0.1
    # Of uniform scores, the rate of a threshold t is 1 - t.
    rates = [1 - conformal_threshold(rng.random(n), rate, confidence=0.9) for _ in range(2000)]
    exceeded = np.mean(np.array(rates) > rate)
    assert exceeded < 0.1 + 4 * np.sqrt(0.1 * 0.9 / 2000)
    assert exceeded > 0.02  # and no more is given away than the ranks ask for


def test_too_few_scores_for_a_confidence() -> None:
    with pytest.warns(CalibrationWarning, match="0.05 with confidence=0.95 needs 59 .* got 58"):
        assert conformal_threshold(np.arange(58), 0.05, confidence=0.95) == 57
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert conformal_threshold(np.arange(59), 0.05, confidence=0.95) == 58


@pytest.mark.parametrize("confidence", [0, 1, -1, float("nan")])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(InvalidValueError, match="confidence must be"):
        conformal_threshold(np.arange(99), 0.05, confidence=confidence)


@pytest.mark.parametrize(
    ("n", "rate", "text"),
    [
        (300, 0.02, "the 295th of 300 scores; at 1 % it would be 298, at 5 % 286"),
        (40, 0.01, "the largest of 40 scores; at 5 % it would be 39, at 20 % 33"),
        (3, 0.01, "the largest of 3 scores"),
        (41, 0.5, "the 21st of 41 scores; at 5 % it would be 40, at 20 % 34"),
        (0, 0.1, "no scores"),
    ],
)
def test_what_a_threshold_rests_on_is_said(n: int, rate: float, text: str) -> None:
    assert describe_threshold(np.arange(1, n + 1), rate) == text


def test_other_rates_are_said_with_the_same_confidence() -> None:
    scores = np.arange(1, 301)
    at_1, at_20 = (conformal_threshold(scores, rate, confidence=0.95) for rate in (0.01, 0.2))
    text = describe_threshold(scores, 0.05, 0.95)
    assert text.endswith(f"; at 1 % it would be {at_1:g}, at 20 % {at_20:g}")
    assert at_20 > conformal_threshold(scores, 0.2)
    # 200 scores are enough for 1 % on average, and not with this confidence.
    assert "at 1 %" not in describe_threshold(scores[:200], 0.05, 0.95)


def test_a_confidence_that_just_fits_the_scores_takes_the_largest() -> None:
    # log(1 - c) / log(1 - 0.5) is 1 + 6e-10, which counts as 1.
    assert conformal_threshold([3.0], 0.5, confidence=0.5 + 2e-10) == 3


# --- p-values ---------------------------------------------------------------------------------


def test_p_values_count_the_scores_that_are_as_high() -> None:
    rng = np.random.default_rng(0)
    known, new = rng.integers(0, 20, 50), rng.integers(-2, 23, 30)
    naive = [(1 + sum(k >= s for k in known)) / 51 for s in new]
    np.testing.assert_allclose(conformal_p_values(new, known), naive)
    assert np.isnan(conformal_p_values(np.array([np.nan]), known)).all()


def test_p_values_of_good_images_are_no_smaller_than_uniform_ones() -> None:
    rng = np.random.default_rng(0)
    small = [conformal_p_values(rng.random(1), rng.random(39))[0] <= 0.1 for _ in range(4000)]
    assert np.mean(small) < 0.1 + 4 * np.sqrt(0.09 / 4000)


def photos(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 160, (n, 64, 64, 3), dtype=np.uint8)


def test_an_image_is_anomalous_where_its_p_value_is_at_most_the_rate() -> None:
    images = photos(60, 0)
    images[50:, 20:40, 20:40] = np.arange(0, 250, 25, dtype=np.uint8)[:, None, None, None]
    detector = PatchCore(image_size=64, false_alarm_rate=0.2, coreset_size=50).fit(images[:40])
    found = detector.detect(images[40:], maps=False)
    assert found.p_values is not None
    np.testing.assert_array_equal(found.labels, found.p_values <= 0.2)
    assert 0 < found.labels.sum() < 20


# --- Detectors --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", DETECTORS)
def test_another_rate_is_that_of_the_same_scores(cls: Any) -> None:
    detector = fitted(cls)
    scores = detector.calibration_scores_
    assert detector.set_false_alarm_rate(0.2) is detector
    assert detector.threshold_ == conformal_threshold(scores, 0.2)
    assert detector.false_alarm_rate == 0.2
    np.testing.assert_array_equal(detector.calibration_scores_, scores)
    level = conformal_threshold(scores, 0.2, confidence=0.9)
    assert detector.set_false_alarm_rate(0.2, confidence=0.9).threshold_ == level


def test_errors_change_nothing() -> None:
    with pytest.raises(NotFittedError):
        PatchCore().set_false_alarm_rate(0.1)
    with pytest.raises(NotFittedError):
        PatchCore().recalibrate(np.zeros((2, 64, 64, 3), np.uint8))
    detector = fitted()
    before = detector.threshold_
    for rate in (0, 1, 5):
        with pytest.raises(InvalidValueError, match="false_alarm_rate"):
            detector.set_false_alarm_rate(rate)
    assert (detector.threshold_, detector.false_alarm_rate) == (before, 0.05)


def test_what_recalibrate_cannot_do_is_said_before_images_are_read() -> None:
    detector = PatchCore(image_size=64, false_alarm_rate=0.2, coreset_size=50).fit(photos(20, 0))
    for options, text in (
        ({"false_alarm_rate": 0}, "false_alarm_rate must be"),
        ({"confidence": 2}, "confidence must be"),
    ):
        with pytest.raises(InvalidValueError, match=text):
            detector.recalibrate(["absent.png"], **options)


def test_regions_to_ignore_have_no_effect_on_the_threshold() -> None:
    options: dict[str, Any] = {"image_size": 64, "false_alarm_rate": 0.2, "coreset_size": 50}
    detector = PatchCore(**options).fit(photos(20, 0))
    fresh = photos(12, 1)
    fresh[:, :32] = 0
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    scores = detector.detect(fresh, maps=False, ignore_mask=mask).scores
    whole = detector.recalibrate(fresh).threshold_
    assert detector.recalibrate(fresh, ignore_mask=mask).threshold_ < whole
    np.testing.assert_array_equal(detector.calibration_scores_, scores)


def test_other_good_images_give_the_threshold() -> None:
    detector = PatchCore(image_size=64, false_alarm_rate=0.2, coreset_size=50).fit(photos(20, 0))
    bank = detector.memory_bank_.embeddings_.copy()
    darker = photos(25, 1) // 2
    scores = detector.score(darker)
    detector.recalibrate(darker, 0.1)
    np.testing.assert_array_equal(detector.calibration_scores_, scores)
    assert detector.threshold_ == conformal_threshold(scores, 0.1)
    np.testing.assert_array_equal(detector.memory_bank_.embeddings_, bank)


def test_images_that_cannot_be_used_do_not_count(tmp_path: Path) -> None:
    for i, image in enumerate(photos(12, 1)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    options: dict[str, Any] = {"image_size": 64, "false_alarm_rate": 0.2, "coreset_size": 50}
    detector = PatchCore(**options, on_error="skip").fit(photos(20, 0))
    assert len(detector.recalibrate(tmp_path).calibration_scores_) == 12
    with pytest.raises(InvalidValueError, match="at least one image"):
        detector.recalibrate([tmp_path / "broken.png"])
    assert len(detector.calibration_scores_) == 12


@pytest.mark.parametrize("cls", DETECTORS)
def test_a_threshold_of_ones_own_survives_an_update_and_the_file(cls: Any, tmp_path: Path) -> None:
    detector = fitted(cls)
    detector.threshold_ = 123.0
    detector.save(tmp_path / "model.safetensors")
    for one in (detector, load(tmp_path / "model.safetensors")):
        assert one.threshold_ == 123.0
        one.partial_fit_embeddings(embeddings(40, 1))
        assert one.threshold_ == 123.0
        assert one.calibrated_threshold_ == conformal_threshold(one.calibration_scores_, 0.05)
        one.fit_embeddings(embeddings(100))  # begins anew
        assert one.threshold_ == one.calibrated_threshold_ != 123.0


def test_a_calibrated_threshold_is_renewed_by_an_update(tmp_path: Path) -> None:
    detector = fitted().set_false_alarm_rate(0.2)
    detector.save(tmp_path / "model.safetensors")
    again: Any = load(tmp_path / "model.safetensors")
    for one in (detector, again):
        one.partial_fit_embeddings(embeddings(40, 1) * 1.5)
        assert one.threshold_ == conformal_threshold(one.calibration_scores_, 0.2)
    assert detector.threshold_ == again.threshold_


# --- The command line -------------------------------------------------------------------------


@pytest.fixture
def line(tmp_path: Path) -> Path:
    for name, n, seed in (("good", 24, 0), ("later", 20, 1)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(photos(n, seed)):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    options = ["--image-size", "64", "--false-alarm-rate", "0.1", "--coreset-size", "50"]
    fit = ["fit", str(tmp_path / "good"), "-o", str(tmp_path / "model.safetensors"), *options]
    assert main(fit) == 0
    return tmp_path


def test_calibrate_and_predict(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = str(line / "model.safetensors"), str(line / "other.safetensors")
    capsys.readouterr()
    assert main(["calibrate", model, "--false-alarm-rate", "0.2", "-o", output]) == 0
    assert "the 8th of 9 scores" in capsys.readouterr().out
    one, other = load(model), load(output)
    assert other.threshold_ == conformal_threshold(one.calibration_scores_, 0.2)
    assert main(["calibrate", output, str(line / "later")]) == 0
    np.testing.assert_allclose(
        np.sort(load(output).calibration_scores_), np.sort(one.score(line / "later")), rtol=1e-6
    )
    machine = ["--batch-size", "3", "--device", "cpu"]
    assert main(["calibrate", output, "--confidence", "0.9", *machine]) == 0
    again = load(output)
    assert (again.batch_size, again.device) == (one.batch_size, one.device) == (32, "auto")
    level = conformal_threshold(again.calibration_scores_, 0.2, confidence=0.9)
    assert again.threshold_ == level
    predict = ["predict", model, str(line / "later"), "-o", str(line / "out"), "--no-overlays"]
    assert main([*predict, "--false-alarm-rate", "0.5"]) == 0
    with (line / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    level = conformal_threshold(one.calibration_scores_, 0.5)
    assert [float(row["threshold"]) for row in rows] == pytest.approx(20 * [level])
    scores = np.array([float(row["score"]) for row in rows])
    expected = conformal_p_values(scores, one.calibration_scores_)
    np.testing.assert_allclose([float(row["p_value"]) for row in rows], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["calibrate", "MODEL"], "there is nothing to change"),
        (["calibrate", "MODEL", "--false-alarm-rate", "2"], "must be"),
        (["calibrate", "MODEL", "--false-alarm-rate", "0"], "must be"),
        (
            ["predict", "MODEL", "x", "-o", "o", "--threshold", "1", "--false-alarm-rate", "0.1"],
            "not allowed with",
        ),
    ],
)
def test_wrong_use_is_refused(
    line: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = line / "model.safetensors"
    before = model.read_bytes()
    assert main([str(model) if a == "MODEL" else a for a in arguments]) == 2
    assert text in capsys.readouterr().err
    assert model.read_bytes() == before


# --- The confidence as a parameter ----------------------------------------------------------------


@pytest.mark.parametrize("cls", DETECTORS)
def test_a_confidence_is_kept(cls: Any, tmp_path: Path) -> None:
    """It decides how many images are held back, and holds in updates and after a file."""
    detector = fitted(cls, 140, false_alarm_confidence=0.9)
    assert len(detector.calibration_scores_) == 45  # log(0.1) / log(0.95) and no fewer
    assert detector.threshold_ == detector.calibration_scores_.max()
    detector.partial_fit_embeddings(embeddings(140, 1))
    scores = detector.calibration_scores_
    assert detector.threshold_ == conformal_threshold(scores, 0.05, confidence=0.9)
    detector.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.false_alarm_confidence == 0.9
    level = conformal_threshold(scores, 0.2, confidence=0.9)
    assert loaded.set_false_alarm_rate(0.2).threshold_ == level
    loaded.set_false_alarm_rate(0.2, confidence=0.5)
    assert loaded.threshold_ == conformal_threshold(scores, 0.2, confidence=0.5)
    assert loaded.false_alarm_confidence == 0.5


@pytest.mark.parametrize("confidence", [0, 1, "0.9"])
def test_a_detector_refuses_what_is_no_confidence(confidence: Any) -> None:
    with pytest.raises(InvalidValueError, match="PatchCore: false_alarm_confidence must be"):
        fitted(false_alarm_confidence=confidence)


def test_too_few_images_for_a_confidence() -> None:
    with pytest.warns(CalibrationWarning, match=r"with confidence=0\.99 needs 90 .* got 50"):
        fitted(n=100, false_alarm_confidence=0.99)


# --- Names of the images that the threshold rests on ----------------------------------------------


@pytest.mark.parametrize("calibration", ["split", "cross", "leave_one_out"])
def test_the_oddest_image_is_named(calibration: str, tmp_path: Path) -> None:
    photos = good(24)
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{i:02}.png")
    paths = sorted(tmp_path.glob("*.png"))
    detector = PatchCore(
        Small(), coreset_ratio=1.0, calibration=calibration, **PLAIN | {"image_size": (48, 80)}
    )  # fmt: skip
    detector.set_params(false_alarm_rate=0.2).fit(paths)
    names = detector.calibration_names_
    assert len(set(names)) == len(names) == len(detector.calibration_scores_)
    assert set(names) <= set(map(str, paths))
    oddest = names[int(np.argmax(detector.calibration_scores_))]
    marked = photos[int(Path(oddest).stem)].copy()
    marked[10:30, 20:50] = 250  # it stays the oddest, by far
    Image.fromarray(marked).save(oddest)
    again = detector.fit(paths)
    assert again.calibration_names_[int(np.argmax(again.calibration_scores_))] == oddest


def test_names_after_updates(tmp_path: Path) -> None:
    detector = PatchCore(image_size=48, false_alarm_rate=0.2).fit(good(20))
    first = detector.calibration_names_
    assert {name[:7] for name in first} == {"images["}
    more = copy.copy(detector).partial_fit(good(6, seed=3))
    assert more.calibration_names_[: len(first)] == first
    assert len(more.calibration_names_) == len(more.calibration_scores_)
    detector.recalibrate(good(5, seed=4))
    assert detector.calibration_names_ == [f"images[{i}]" for i in range(5)]
    detector.save(tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").calibration_names_ == detector.calibration_names_


def test_names_of_embeddings() -> None:
    E = np.random.default_rng(0).normal(size=(20, 3, 3, 4)).astype(np.float32)
    E[7] *= 9
    detector = PatchCore(coreset_ratio=1.0, false_alarm_rate=0.2, calibration="cross")
    detector.fit_embeddings(E)
    assert detector.calibration_names_[detector.calibration_scores_.argmax()] == "embeddings[7]"
    once = PatchCore(coreset_ratio=0.5, false_alarm_rate=0.2, memory_budget="1GB")
    assert set(once.fit_embeddings(iter(E)).calibration_names_) == {""}
