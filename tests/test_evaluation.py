"""evaluate, with a small detector that computes real scores from pixels."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import anomalib_lite
from anomalib_lite import metrics
from anomalib_lite.datasets import Folder, MVTecAD, Sample
from anomalib_lite.errors import (
    InvalidTypeError,
    InvalidValueError,
    MissingPathError,
    NotFittedError,
    OutputError,
    SharedImagesWarning,
)
from anomalib_lite.evaluation import Report, evaluate

HEIGHT, WIDTH = 24, 40


@dataclass
class Found:
    scores: np.ndarray
    maps: Any
    labels: np.ndarray


class MeanImage:
    """Score: the largest distance of a pixel from the mean training image."""

    def __init__(self, quantile: float = 1.0) -> None:
        self.quantile = quantile
        self.chunks: list[int] = []

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"quantile": self.quantile, "path": Path("a") / "b", "model": MeanImage}

    def fit(self, images: Any) -> MeanImage:
        self.mean_ = np.mean([_pixels(s) for s in images], axis=0)
        self.n_fitted_ = len(images)
        scores = [np.abs(_pixels(s) - self.mean_).max() for s in images]
        self.threshold_ = float(np.quantile(scores, self.quantile))
        return self

    def detect(self, images: Any) -> Found:
        self.chunks.append(len(images))
        maps = np.stack([np.abs(_pixels(s) - self.mean_) for s in images]).astype(np.float32)
        scores = maps.max((1, 2))
        return Found(scores, maps, scores > self.threshold_)


def _pixels(sample: Sample) -> np.ndarray:
    with Image.open(sample.path) as image:
        return np.asarray(image, dtype=np.float32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 good parts to train on, 6 to test on, 4 scratches (strong) and 4 stains (faint)."""
    rng = np.random.default_rng(0)
    for place, n in (("train/good", 12), ("test/good", 6), ("test/scratch", 4), ("test/stain", 4)):
        for i in range(n):
            pixels = rng.integers(90, 110, (HEIGHT, WIDTH)).astype(np.uint8)
            truth = np.zeros((HEIGHT, WIDTH), bool)
            if "scratch" in place:
                truth[4 + i, 5:25] = True
                pixels[truth] = 200
            elif "stain" in place:
                truth[10:16, 20 + i : 30] = True
                pixels[truth] += 2
            folder = tmp_path / "plate" / place
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            if truth.any():
                folder = tmp_path / "plate" / place.replace("test", "ground_truth")
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(truth.astype(np.uint8) * 255).save(folder / f"{i}_mask.png")
    return tmp_path


@pytest.fixture
def plate(root: Path) -> MVTecAD:
    return MVTecAD(root, "plate")


AFTER_A_LARGE_PARENT = """
import os, sys
block = b"x" * (600 << 20)
code = "from anomalib_lite.evaluation import _report; print(_report.peak_memory())"
os.execv(sys.executable, [sys.executable, "-c", code])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_the_peak_is_not_that_of_the_process_before() -> None:
    command = [sys.executable, "-c", AFTER_A_LARGE_PARENT]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 20 < float(done.stdout) < 550


@pytest.fixture
def report(plate: MVTecAD) -> Report:
    return evaluate(MeanImage(), plate)


class TestMetrics:
    def test_are_computed_by_the_metrics_module(self, plate: MVTecAD, report: Report) -> None:
        detector = MeanImage().fit(plate.train)
        found = detector.detect(plate.test)
        truth = [s.label for s in plate.test]
        masks = [s.mask() for s in plate.test]
        assert report.metrics == {
            "image_auroc": metrics.auroc(truth, found.scores),
            "image_ap": metrics.average_precision(truth, found.scores),
            "image_f1_max": metrics.f1_max(truth, found.scores),
            "image_fpr_at_95_tpr": metrics.fpr_at_tpr(truth, found.scores),
            "false_alarm_rate": np.mean(found.labels[np.equal(truth, 0)]),
            "detection_rate": np.mean(found.labels[np.equal(truth, 1)]),
            **metrics.pixel_metrics(masks, list(found.maps), fpr_limit=0.3),
        }
        assert 0.5 < report.metrics["image_auroc"] < 1
        np.testing.assert_array_equal(report.scores, found.scores)
        np.testing.assert_array_equal(report.decisions, found.labels)
        assert report.scores.dtype == np.float32
        assert report.samples == plate.test
        assert report.threshold == detector.threshold_

    def test_each_kind_is_compared_with_all_good_images(self, report: Report) -> None:
        good = report.scores[[s.label == 0 for s in report.samples]]
        assert list(report.per_kind) == ["scratch", "stain"]
        for kind, row in report.per_kind.items():
            bad = report.scores[[s.kind == kind for s in report.samples]]
            expected = np.mean([(b > good).mean() + (b == good).mean() / 2 for b in bad])
            assert row["image_auroc"] == pytest.approx(expected)
            assert row["detection_rate"] == np.mean(bad > report.threshold)
            assert row["images"] == 4
        assert report.per_kind["scratch"]["image_auroc"] == 1.0
        assert report.per_kind["stain"]["image_auroc"] < 1.0

    def test_rates_follow_the_threshold(self, plate: MVTecAD) -> None:
        detector = MeanImage().fit(plate.train)
        detector.threshold_ = -1.0
        everything = evaluate(detector, plate).metrics
        assert (everything["false_alarm_rate"], everything["detection_rate"]) == (1.0, 1.0)
        detector.threshold_ = math.inf
        nothing = evaluate(detector, plate).metrics
        assert (nothing["false_alarm_rate"], nothing["detection_rate"]) == (0.0, 0.0)
        assert nothing["image_auroc"] == everything["image_auroc"]

    def test_a_budget_keeps_no_maps_and_comes_close(self, plate: MVTecAD, report: Report) -> None:
        streamed = evaluate(MeanImage(), plate, memory_budget="64MB")
        assert streamed.metrics == pytest.approx(report.metrics, abs=1e-4)
        assert streamed.counts == report.counts
        with pytest.raises(InvalidValueError, match="memory_budget must be at least 12MB"):
            evaluate(MeanImage(), plate, memory_budget="1MB")

    @pytest.mark.parametrize("memory_budget", [None, "64MB"])
    def test_aupimo_is_there_with_enough_normal_pixels(
        self, plate: MVTecAD, report: Report, memory_budget: str | None
    ) -> None:
        assert "aupimo" not in report.metrics  # 6 good images of 960 pixels
        good = [sample for sample in plate.test if not sample.label]
        n_needed = -(-100_000 // (HEIGHT * WIDTH))
        copies = [good[i % len(good)] for i in range(n_needed)]
        samples = [*copies, *(sample for sample in plate.test if sample.label)]
        detector = MeanImage().fit(plate.train)
        found = evaluate(detector, samples, memory_budget=memory_budget)
        maps, masks = detector.detect(samples).maps, [sample.mask() for sample in samples]
        expected = metrics.aupimo(masks, list(maps))
        assert found.metrics["aupimo"] == pytest.approx(expected, abs=1e-4)
        assert "aupimo" not in evaluate(detector, samples[1:], memory_budget=memory_budget).metrics
        assert "\nAUPIMO " in str(found)

    def test_boxes_are_tested_by_the_pointing_game(self, plate: MVTecAD) -> None:
        detector, n = MeanImage().fit(plate.train), len(plate.test)
        peaks = [np.unravel_index(m.argmax(), m.shape) for m in detector.detect(plate.test).maps]
        plate.boxes = {  # type: ignore[attr-defined]
            sample.path: [[x, y, x + 1, y + 1] if i % 3 else [0, 0, WIDTH, HEIGHT]]
            for i, (sample, (y, x)) in enumerate(zip(plate.test, peaks, strict=True))
        }
        assert evaluate(detector, plate).metrics["pointing_game"] == 1
        for sample in plate.test[: n // 2]:  # no box is no miss
            plate.boxes[sample.path] = np.empty((0, 4))  # type: ignore[attr-defined]
        last, x = plate.test[-1].path, peaks[-1][1]
        plate.boxes[last] = [[0, 0, 1, 1]] if x > 1 else [[WIDTH - 1, 0, WIDTH, 1]]  # type: ignore[attr-defined]
        share = evaluate(detector, plate, memory_budget="64MB").metrics["pointing_game"]
        assert share == pytest.approx(1 - 1 / (n - n // 2))
        assert "pointing_game" not in evaluate(detector, plate, pixel_metrics=False).metrics

    def test_fpr_limit_is_the_limit_of_aupro(self, plate: MVTecAD, report: Report) -> None:
        strict = evaluate(MeanImage(), plate, fpr_limit=0.01)
        assert strict.metrics["aupro"] < report.metrics["aupro"]
        assert (strict.fpr_limit, report.fpr_limit) == (0.01, 0.3)

    @pytest.mark.parametrize("chunk_size", [1, 5, 14])
    def test_chunks_do_not_change_the_metrics(
        self, plate: MVTecAD, report: Report, chunk_size: int
    ) -> None:
        detector = MeanImage()
        chunked = evaluate(detector, plate, chunk_size=chunk_size)
        assert chunked.metrics == report.metrics
        assert max(detector.chunks) == chunk_size
        assert sum(detector.chunks) == len(plate.test)

    def test_the_report_has_timings_memory_counts_and_versions(self, report: Report) -> None:
        assert list(report.timings) == ["fit_s", "test_s", "ms_per_image"]
        assert all(value > 0 for value in report.timings.values())
        assert report.timings["ms_per_image"] == pytest.approx(report.timings["test_s"] * 1000 / 14)
        assert report.counts == {
            "train": 12,
            "test": 14,
            "test_normal": 6,
            "test_anomalous": 8,
            "empty_masks": 0,
            "ignored_pixels": 0,
            "test_in_train": 0,
        }
        assert report.peak_memory_mb is None or 20 < report.peak_memory_mb < 1e6
        assert report.versions["anomalib_lite"] == anomalib_lite.__version__
        assert report.versions["numpy"] == np.__version__

    def test_empty_masks_are_counted(self, root: Path) -> None:
        empty = root / "plate/ground_truth/stain/0_mask.png"
        Image.new("L", (WIDTH, HEIGHT)).save(empty)
        report = evaluate(MeanImage(), MVTecAD(root, "plate"))
        assert report.counts["empty_masks"] == 1
        assert "masks of 1 anomalous images are empty" in str(report)


class TestFitting:
    def test_an_unfitted_detector_is_fitted(self, plate: MVTecAD) -> None:
        detector = MeanImage()
        evaluate(detector, plate)
        assert detector.n_fitted_ == 12

    def test_a_fitted_detector_is_not_fitted_again(self, plate: MVTecAD) -> None:
        detector = MeanImage().fit(plate.train[:3])
        mean = detector.mean_.copy()
        report = evaluate(detector, plate)
        np.testing.assert_array_equal(detector.mean_, mean)
        assert report.counts["train"] == 0
        assert "fit_s" not in report.timings
        assert "fitted before" in str(report)

    def test_samples_alone_need_a_fitted_detector(self, plate: MVTecAD, report: Report) -> None:
        with pytest.raises(NotFittedError, match="MeanImage must be fitted"):
            evaluate(MeanImage(), plate.test)
        on_samples = evaluate(MeanImage().fit(plate.train), list(plate.test))
        assert on_samples.metrics == report.metrics
        assert on_samples.dataset == "samples"


class TestMasks:
    def test_without_masks_there_are_only_image_metrics(self, root: Path, report: Report) -> None:
        ds = Folder(
            root / "plate",
            normal="train/good",
            normal_test="test/good",
            anomalous=["test/scratch", "test/stain"],
        )
        bare = evaluate(MeanImage(), ds)
        assert not {"pixel_auroc", "pixel_ap", "aupro"} & set(bare.metrics)
        assert bare.metrics["image_auroc"] == report.metrics["image_auroc"]
        assert "empty_masks" not in bare.counts

    def test_pixel_metrics_can_be_switched_off(self, plate: MVTecAD) -> None:
        assert "aupro" not in evaluate(MeanImage(), plate, pixel_metrics=False).metrics

    def test_masks_for_only_some_are_refused_before_the_fit(self, plate: MVTecAD) -> None:
        stripped = Sample(plate.test[-1].path, 1, "stain")
        detector = MeanImage()
        plate.test = (*plate.test[:-1], stripped)
        with pytest.raises(MissingPathError, match=r"masks, or none, got none for .*3\.png"):
            evaluate(detector, plate)
        assert not hasattr(detector, "threshold_")
        assert "aupro" not in evaluate(detector, plate, pixel_metrics=False).metrics

    def test_a_mask_of_another_size_is_refused(self, root: Path) -> None:
        # Width and height swapped: an error that square images would hide.
        Image.new("L", (HEIGHT, WIDTH)).save(root / "plate/ground_truth/stain/2_mask.png")
        with pytest.raises(InvalidValueError, match=r"its mask \(40, 24\), got \(24, 40\).*EXIF"):
            evaluate(MeanImage(), MVTecAD(root, "plate"))

    def test_inverted_masks(self, root: Path, report: Report) -> None:
        for path in (root / "plate/ground_truth").rglob("*.png"):
            with Image.open(path) as mask:
                inverted = 255 - np.asarray(mask)
            Image.fromarray(inverted).save(path)
        detector = MeanImage()
        with pytest.raises(InvalidValueError, match="inverted_masks=True"):
            evaluate(detector, MVTecAD(root, "plate"))
        assert not hasattr(detector, "threshold_")  # said before the fit
        mended = evaluate(MeanImage(), MVTecAD(root, "plate"), inverted_masks=True)
        assert mended.metrics == report.metrics
        as_drawn = evaluate(MeanImage(), MVTecAD(root, "plate"), inverted_masks=False)
        assert as_drawn.metrics["pixel_auroc"] < report.metrics["pixel_auroc"]

    def test_turned_masks(self, root: Path, report: Report) -> None:
        exif = Image.Exif()
        exif[0x112] = 3
        for path in (root / "plate/ground_truth").rglob("*.png"):
            with Image.open(path) as mask:
                turned = mask.rotate(180)
            turned.save(path, exif=exif)
        assert evaluate(MeanImage(), MVTecAD(root, "plate")).metrics == report.metrics

    def test_ignored_pixels_are_left_out(self, root: Path, report: Report) -> None:
        for path in (root / "plate/ground_truth").rglob("*.png"):
            with Image.open(path) as mask:
                numbers = np.minimum(np.asarray(mask), 2)
            numbers[:, -12:] = 255
            Image.fromarray(numbers).save(path)
        detector = MeanImage()
        with pytest.raises(InvalidValueError, match="ignore_255=True"):  # it may be the defect
            evaluate(detector, MVTecAD(root, "plate"))
        assert not hasattr(detector, "threshold_")  # said before the fit
        without = evaluate(MeanImage(), MVTecAD(root, "plate"), ignore_255=True)
        assert without.counts["ignored_pixels"] == 8 * HEIGHT * 12
        assert "the masks leave out 2,304 pixels" in str(without)
        plate = MVTecAD(root, "plate")
        maps = MeanImage().fit(plate.train).detect(plate.test).maps
        masks = [s.mask(ignore_255=True) for s in plate.test]
        assert without.metrics["aupro"] == metrics.aupro(masks, maps)
        cut = [None if m is None else m.data[:, :-12] for m in masks]
        widths = [-12 if s.label else None for s in plate.test]
        kept = [m[:, :w] for m, w in zip(maps, widths, strict=True)]
        assert without.metrics["aupro"] == metrics.aupro(cut, kept)


class TestSharedImages:
    def test_absent_files_are_skipped_if_the_detector_does(self, plate: MVTecAD) -> None:
        detector = MeanImage().fit(plate.train)
        gone = plate.train[3].path
        gone.unlink()
        with pytest.raises(MissingPathError, match=rf"find_shared: .*{gone.name} does not exist"):
            evaluate(detector, plate)
        detector.on_error = "skip"  # type: ignore[attr-defined]
        assert evaluate(detector, plate).counts["test_in_train"] == 0

    def test_are_named_counted_and_tested_as_asked(self, root: Path) -> None:
        copy = root / "plate/test/good/copy.png"
        copy.write_bytes((root / "plate/train/good/7.png").read_bytes())
        plate = MVTecAD(root, "plate")
        message = r"1 of 15 test images are also .*good.copy\.png \(trained on as .*good.7\.png\)"
        with pytest.warns(SharedImagesWarning, match=message) as caught:
            report = evaluate(MeanImage(), plate)
        assert [w.filename for w in caught] == [__file__]
        assert report.counts["test_in_train"] == 1
        assert report.counts["test_normal"] == 7
        assert "1 test images are training images too" in str(report)

    def test_many_are_counted(self, root: Path) -> None:
        for i in range(5):
            (root / f"plate/test/good/{i}.png").write_bytes(
                (root / f"plate/train/good/{i}.png").read_bytes()
            )
        with pytest.warns(
            SharedImagesWarning, match=r"^evaluate: 5 of 14 .*2\.png\) and so on\. Rem"
        ):
            evaluate(MeanImage(), MVTecAD(root, "plate"))


class TestRefuses:
    def test_what_is_not_a_data_set(self, plate: MVTecAD) -> None:
        detector = MeanImage().fit(plate.train)
        with pytest.raises(InvalidTypeError, match="sequence of Sample, got str"):
            evaluate(detector, "plates")
        with pytest.raises(InvalidTypeError, match="sequence of Sample, got int"):
            evaluate(detector, 3)  # type: ignore[arg-type]
        with pytest.raises(InvalidValueError, match="must hold test images, got none"):
            evaluate(detector, [])

    @pytest.mark.parametrize(
        "argument", [{"fpr_limit": 0}, {"fpr_limit": 2}, {"chunk_size": 0}, {"chunk_size": 1.5}]
    )
    def test_wrong_arguments_before_the_fit(self, plate: MVTecAD, argument: dict[str, Any]) -> None:
        detector = MeanImage()
        with pytest.raises(InvalidValueError, match=f"evaluate: {next(iter(argument))} must be"):
            evaluate(detector, plate, **argument)
        assert not hasattr(detector, "threshold_")

    def test_another_number_of_scores_than_images(self, plate: MVTecAD) -> None:
        class Forgetful(MeanImage):
            def detect(self, images: Any) -> Found:
                found = super().detect(images)
                return Found(found.scores[:1], found.maps, found.labels)

        with pytest.raises(InvalidValueError, match=r"as many scores .* got 1 for 14"):
            evaluate(Forgetful(), plate)


class TestWriting:
    def test_the_table_is_aligned(self, report: Report) -> None:
        lines = str(report).splitlines()
        assert lines[0] == (
            "MeanImage on plate: 12 training images, 6 normal and 8 anomalous test images"
        )
        figures = lines[2 : lines.index("", 2)]
        assert len({len(line) for line in figures}) == 1
        assert f"image AUROC {report.metrics['image_auroc']:20.4f}" in figures
        assert any(line.startswith("AUPRO, FPR to 0.3 ") for line in figures)
        kinds = lines[lines.index("", 2) + 1 :]
        assert [line.split()[0] for line in kinds] == ["kind", "scratch", "stain"]
        assert len({len(line) for line in kinds}) == 1
        assert repr(report) == "Report(MeanImage on 'plate', 14 images)"

    def test_json(self, report: Report, tmp_path: Path) -> None:
        path = tmp_path / "report.json"
        report.to_json(path)
        read = json.loads(path.read_text())
        assert read == report.to_dict()
        assert read["metrics"] == report.metrics
        assert read["per_kind"] == report.per_kind
        assert read["parameters"] == {"quantile": 1.0, "path": str(Path("a/b")), "model": "type"}

    def test_csv(self, report: Report, tmp_path: Path) -> None:
        path = tmp_path / "report.csv"
        report.to_csv(str(path))
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {(r["dataset"], r["detector"]) for r in rows} == {("plate", "MeanImage")}
        values = {(r["kind"], r["metric"]): r["value"] for r in rows}
        assert len(values) == len(rows)
        assert float(values["all", "aupro"]) == report.metrics["aupro"]
        assert (
            float(values["stain", "detection_rate"]) == report.per_kind["stain"]["detection_rate"]
        )
        assert int(values["all", "test"]) == 14

    def test_undefined_metrics_are_empty_in_all_files(self, plate: MVTecAD, tmp_path: Path) -> None:
        good = [s for s in plate.test if not s.label]
        report = evaluate(MeanImage().fit(plate.train), good)
        assert math.isnan(report.metrics["image_auroc"])
        assert math.isnan(report.metrics["detection_rate"])
        assert report.metrics["false_alarm_rate"] >= 0
        assert report.per_kind == {}
        assert "undefined" in str(report)
        report.to_json(tmp_path / "r.json")
        assert json.loads((tmp_path / "r.json").read_text())["metrics"]["image_auroc"] is None
        report.to_csv(tmp_path / "r.csv")
        assert ",all,image_auroc,\n" in (tmp_path / "r.csv").read_text()

    @pytest.mark.parametrize("write", ["to_json", "to_csv"])
    def test_a_file_that_cannot_be_written_is_an_error(
        self, report: Report, tmp_path: Path, write: str
    ) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("kept")
        for target in ("nowhere/r.json", "folder", "file/r.json"):
            with pytest.raises(OutputError, match=r"^Report: cannot write .*Choose a directory"):
                getattr(report, write)(tmp_path / target)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "plate"]
        assert (tmp_path / "file").read_text() == "kept"

    @pytest.mark.parametrize("step", ["write_text", "replace"])
    def test_a_file_is_replaced_in_one_step(
        self, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        path = tmp_path / "r.json"
        path.write_text("before")

        def full(self: Path, *args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, step, full)
            with pytest.raises(OutputError, match="No space left on device"):
                report.to_json(path)
        assert path.read_text() == "before"
        report.to_json(path)
        assert path.read_text().startswith("{")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["plate", "r.json"]

    def test_no_progress_bar_outside_a_terminal(
        self, plate: MVTecAD, capsys: pytest.CaptureFixture[str]
    ) -> None:
        evaluate(MeanImage(), plate, progress=True)
        assert capsys.readouterr() == ("", "")


def test_real_photographs(data_dir: Path) -> None:
    """Images of many sizes, scored by the distance of each pixel from the mean brightness."""

    class Brightness:
        def fit(self, images: Any) -> Brightness:
            self.mean_ = float(np.mean([_pixels(s).mean() for s in images]))
            self.threshold_ = 150.0
            return self

        def detect(self, images: Any) -> Found:
            maps = [np.abs(_pixels(s) - self.mean_) for s in images]
            scores = np.array([m.max() for m in maps], np.float32)
            return Found(scores, maps, scores > self.threshold_)

    tiles = MVTecAD(data_dir, "magnetic_tile")
    empty = [s for s in tiles.test if s.label and not s.mask().any()]
    samples = [*tiles.test[::16], *(s for s in empty if s not in tiles.test[::16])]
    detector = Brightness().fit(tiles.train[::16])
    report = evaluate(detector, samples)
    assert report.counts["empty_masks"] == len(empty) == 3
    assert sum(row["images"] for row in report.per_kind.values()) == sum(s.label for s in samples)
    assert len(report.per_kind) == 5
    maps, masks = detector.detect(samples).maps, [s.mask() for s in samples]
    assert len({m.shape for m in maps}) > 20
    truth = [np.zeros(m.shape, bool) if t is None else t for m, t in zip(maps, masks, strict=True)]
    flat = [np.concatenate([pixels.ravel() for pixels in each]) for each in (truth, maps)]
    assert report.metrics["pixel_auroc"] == pytest.approx(roc_auc_score(*flat))
    assert 0.0 < report.metrics["aupro"] < report.metrics["pixel_auroc"]
