"""The command predict: the table, the pictures, and what remains after an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fixtures import Refused, read
from PIL import Image

from anomalib_lite import PatchCore, cli, load
from anomalib_lite.cli import _predictions
from anomalib_lite.cli._predictions import predict_to, unique_names
from anomalib_lite.errors import ImageError, InvalidValueError
from anomalib_lite.images import ImageSource
from anomalib_lite.plotting import overlay

SIZE = (96, 64)  # width, height


class TestPredict:
    def test_writes_a_table_and_pictures(
        self, wall: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folders = [str(wall / "test/good"), str(wall / "test/scratch")]
        assert cli.main(["predict", str(model), *folders, "-o", str(tmp_path / "out")]) == 0
        rows = read(tmp_path / "out/scores.csv")
        detector = load(model)
        paths = sorted((wall / "test").rglob("*.png"))
        found = detector.detect(paths)
        assert [row["path"] for row in rows] == list(map(str, paths))
        assert [np.float32(row["score"]) for row in rows] == found.scores.tolist()
        assert {np.float32(row["threshold"]) for row in rows} == {np.float32(detector.threshold_)}
        for row in rows:
            above = float(row["score"]) > float(row["threshold"])
            assert row["label"] == ("anomalous" if above else "normal")
            assert row["reason"] == ""
            with Image.open(tmp_path / "out" / row["overlay"]) as picture:
                assert picture.width >= SIZE[0]
                assert picture.height > SIZE[1]
        assert [row["label"] for row in rows[6:]] == ["anomalous"] * 4
        counts = [sum(row["label"] == label for row in rows) for label in ("normal", "anomalous")]
        out, err = capsys.readouterr()
        assert re.match(rf"10 images in .*: {counts[0]} normal, {counts[1]} anomalous", out)
        assert err == ""

    def test_says_what_it_leaves_out_and_takes_subdirectories(
        self, wall: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "notes.txt").touch()
        for place in ("0.png", "shift2/1.png"):
            (tmp_path / place).parent.mkdir(exist_ok=True)
            (tmp_path / place).write_bytes((wall / "test/good/000.png").read_bytes())
        common = ["predict", str(model), str(tmp_path), "-o"]
        assert cli.main([*common, str(tmp_path / "out")]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("1 images in")
        assert re.fullmatch(
            r"warning: predict: not looked at in .*: subdirectories with images: 1 \(shift2\); "
            r"\.txt: 1 \(notes\.txt\)\. To take subdirectories too, add --recursive\.\n",
            err,
        )
        assert cli.main([*common, str(tmp_path), "--recursive"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("2 images in")  # not the overlays of the first run
        assert "overlays of predict: 1 (overlays)" in err

    def test_a_picture_is_the_overlay_of_the_library(
        self, wall: Path, model: Path, tmp_path: Path
    ) -> None:
        path = wall / "test/scratch/000.png"
        assert cli.main(["predict", str(model), str(path), "-o", str(tmp_path)]) == 0
        detector = load(model)
        found = detector.detect(path)
        expected = overlay(
            path,
            found.maps[0],
            threshold=detector.threshold_,
            pixel_threshold=detector.pixel_threshold_,
            score=float(found.scores[0]),
        )
        with Image.open(tmp_path / "overlays/000.png") as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(expected))

    def test_heatmaps_in_other_units_than_scores_are_outlined_at_their_own_threshold(
        self, wall: Path, tmp_path: Path
    ) -> None:
        detector = PatchCore(image_size=64, image_score="structure", false_alarm_rate=0.2)
        detector.fit(wall / "train/good")
        path = wall / "test/scratch/000.png"
        predict_to(tmp_path, detector, ImageSource(path), maps=True, skip=False)
        found, level = detector.detect(path), detector.pixel_threshold_
        expected = overlay(path, found.maps[0], threshold=level)
        wrong = overlay(path, found.maps[0], threshold=detector.threshold_)
        with Image.open(tmp_path / "overlays/000.png") as picture:
            shown = np.asarray(picture, float)[: SIZE[1], : SIZE[0]]
        assert np.abs(shown - np.asarray(expected)).mean() < 0.5
        assert np.abs(shown - np.asarray(wrong)).mean() > 5
        # A file that does not know the level says so before any picture is made.
        detector.pixel_threshold_ = None
        with pytest.raises(InvalidValueError, match="threshold of the heatmaps is not known"):
            predict_to(tmp_path / "more", detector, ImageSource(path), maps=True, skip=False)
        assert not (tmp_path / "more").exists()
        predict_to(tmp_path, detector, ImageSource(path), maps=False, skip=False)

    def test_no_image_and_no_picture_appears_twice(
        self, wall: Path, model: Path, tmp_path: Path
    ) -> None:
        given = [wall / "test/good", wall / "test/good/001.png", wall / "test/scratch/001.png"]
        assert cli.main(["predict", str(model), *map(str, given), "-o", str(tmp_path)]) == 0
        rows = read(tmp_path / "scores.csv")
        assert len(rows) == 7
        pictures = [row["overlay"] for row in rows]
        assert "overlays/good-001.png" in pictures
        assert "overlays/scratch-001.png" in pictures
        assert sorted(pictures) == sorted(
            f"overlays/{path.name}" for path in (tmp_path / "overlays").iterdir()
        )

    def test_the_detector_is_not_changed(
        self, wall: Path, model: Path, broken: dict[str, Path], tmp_path: Path
    ) -> None:
        detector = load(model)
        detector.verbose = 1
        before = dict(vars(detector))
        good, cut = wall / "test/good/000.png", broken["cut"]
        with pytest.raises(ImageError, match="1 of 2 images are done"):
            predict_to(tmp_path, detector, ImageSource([good, cut]), maps=True, skip=False)
        summary = predict_to(tmp_path, detector, ImageSource([cut, good]), maps=True, skip=True)
        assert summary.counts.total() == 2
        assert len(summary.skipped) == 1
        assert vars(detector).keys() == before.keys()
        assert all(vars(detector)[name] is value for name, value in before.items())

    def test_names_of_pictures_are_unique(self) -> None:
        names = unique_names(["a/0.png", "b/0.png", "A/0.JPG", "a-0.png", "0.png", "x/a-0-2.png"])
        assert len({name.casefold() for name in names}) == 6

    def test_the_threshold_can_be_given(self, wall: Path, model: Path, tmp_path: Path) -> None:
        for value, label in (("1e-3", "anomalous"), ("1000", "normal")):
            options = ["-o", str(tmp_path), "--no-overlays", "--threshold", value]
            assert cli.main(["predict", str(model), str(wall / "test/good"), *options]) == 0
            rows = read(tmp_path / "scores.csv")
            assert {row["label"] for row in rows} == {label}
            assert {float(row["threshold"]) for row in rows} == {float(value)}
            assert {row["overlay"] for row in rows} == {""}
        assert not (tmp_path / "overlays").exists()

    def test_the_size_of_chunks_does_not_change_the_table(
        self, wall: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ["predict", str(model), str(wall / "test/good")]
        assert cli.main([*command, "-o", str(tmp_path / "one")]) == 0
        sizes: list[int] = []
        detect = PatchCore.detect

        def counted(self: PatchCore, images: Any, **options: Any) -> Any:
            sizes.append(len(images))
            return detect(self, images, **options)

        monkeypatch.setattr(PatchCore, "detect", counted)
        monkeypatch.setattr(_predictions, "_PIXELS_AT_ONCE", 4 * SIZE[0] * SIZE[1])
        assert cli.main([*command, "-o", str(tmp_path / "four")]) == 0
        assert cli.main([*command, "-o", str(tmp_path / "two"), "--batch-size", "1"]) == 0
        assert sizes == [4, 2, 2, 2, 2]
        first, *others = (read(tmp_path / name / "scores.csv") for name in ("one", "four", "two"))
        for rows in others:
            assert [row["path"] for row in rows] == [row["path"] for row in first]
            scores = [[float(row["score"]) for row in table] for table in (rows, first)]
            np.testing.assert_allclose(*scores, rtol=1e-2)  # bfloat16 differs with the batch

    def test_finished_rows_are_kept_after_an_unreadable_image(
        self,
        wall: Path,
        model: Path,
        broken: dict[str, Path],
        tmp_path: Path,
        refused: Refused,
    ) -> None:
        good = sorted((wall / "test/good").iterdir())
        files = [*good[:2], broken["cut"], *good[2:]]
        said = refused("predict", model, *files, "-o", tmp_path / "out")
        assert str(broken["cut"]) in said
        assert "--on-error skip" in said
        assert f"2 of 7 images are done and kept in {tmp_path / 'out/scores.csv'}." in said
        assert [row["path"] for row in read(tmp_path / "out/scores.csv")] == list(
            map(str, good[:2])
        )
        assert not list((tmp_path / "out").glob(".*"))

    def test_an_older_table_stays_if_no_row_is_finished(
        self,
        model: Path,
        broken: dict[str, Path],
        tmp_path: Path,
        refused: Refused,
    ) -> None:
        (tmp_path / "scores.csv").write_text("older")
        said = refused("predict", model, broken["1x1"], "-o", tmp_path)
        assert "0 of 1 images are done." in said
        assert "--on-error skip" in said
        assert (tmp_path / "scores.csv").read_text() == "older"

    def test_unreadable_images_can_be_skipped_and_are_listed(
        self,
        wall: Path,
        model: Path,
        broken: dict[str, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        files = [wall / "test/good/000.png", *broken.values()]
        options = ["-o", str(tmp_path / "out"), "--on-error", "skip"]
        assert cli.main(["predict", str(model), *map(str, files), *options]) == 0
        out, err = capsys.readouterr()
        assert ", 4 skipped at threshold" in out
        assert err.count("\n") == err.count("skipped: ") == 4
        rows = read(tmp_path / "out/scores.csv")
        assert [row["label"] for row in rows[1:]] == ["skipped"] * 4
        for row, path in zip(rows[1:], broken.values(), strict=True):
            assert (row["score"], row["overlay"]) == ("", "")
            assert str(path) in row["reason"]
            assert str(path) in err

    def test_finished_rows_are_kept_after_ctrl_c(
        self,
        wall: Path,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        detect, calls = PatchCore.detect, []

        def interrupted(self: PatchCore, images: Any, **options: Any) -> Any:
            calls.append(images)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return detect(self, images, **options)

        monkeypatch.setattr(PatchCore, "detect", interrupted)
        arguments = [str(model), str(wall / "test/good"), "-o", str(tmp_path), "--batch-size", "1"]
        assert cli.main(["predict", *arguments]) == 130
        said = capsys.readouterr().err
        kept = f"4 of 6 images are done and kept in {tmp_path / 'scores.csv'}."
        assert said == f"anomalib-lite: interrupted. {kept}\n"
        assert len(read(tmp_path / "scores.csv")) == 4

    def test_a_fault_of_the_program_is_not_hidden(
        self, wall: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(PatchCore, "detect", fail)
        with pytest.raises(ZeroDivisionError):
            cli.main(["predict", str(model), str(wall / "test/good"), "-o", str(tmp_path)])

    def test_a_file_that_is_not_a_model_is_named(
        self, wall: Path, model: Path, tmp_path: Path, refused: Refused
    ) -> None:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(model.read_bytes()[:-1000])
        images, out = wall / "test/good", tmp_path / "out"
        said = refused("predict", cut, images, "-o", out)
        assert f"{cut} is cut short or not a model file" in said
        said = refused("predict", tmp_path / "none", images, "-o", out)
        assert f"model file {tmp_path / 'none'} does not exist" in said

    def test_a_directory_that_cannot_be_written_is_named(
        self, wall: Path, model: Path, tmp_path: Path, refused: Refused
    ) -> None:
        (tmp_path / "file").touch()
        images = wall / "test/good"
        for place in (tmp_path / "file", tmp_path / "file/below"):
            said = refused("predict", model, images, "-o", place)
            assert f"{tmp_path / 'file'}" in said
        (tmp_path / "overlays").touch()
        said = refused("predict", model, images, "-o", tmp_path)
        assert f"cannot write into {tmp_path / 'overlays'}: it is a file" in said

    @pytest.mark.parametrize("threshold", ["nan", "inf", "-1"])
    def test_an_invalid_threshold_is_named(
        self,
        wall: Path,
        model: Path,
        tmp_path: Path,
        threshold: str,
        refused: Refused,
    ) -> None:
        options = ["-o", tmp_path, "--threshold", threshold]
        said = refused("predict", model, wall / "test/good", *options)
        assert "predict: threshold must be a number in [0, inf)" in said

    def test_pictures_need_a_finite_threshold(
        self, wall: Path, model: Path, tmp_path: Path, refused: Refused
    ) -> None:
        detector = load(model)
        detector.threshold_ = float("inf")  # as after a fit on a single image
        detector.save(tmp_path / "m")
        command = ["predict", str(tmp_path / "m"), str(wall / "test/good"), "-o", str(tmp_path)]
        said = refused(*command)
        assert "Give one with --threshold, or go without pictures with --no-overlays" in said
        assert cli.main([*command, "--no-overlays"]) == 0
