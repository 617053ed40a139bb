"""The command line with cascades: fit, predict, evaluate, and options of the wrong model."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from cli_fixtures import Refused, read, save, scratched
from PIL import Image

from anomalib_lite import GatedCascade, MahalanobisVFM, PaDiM, PatchCore, SubspaceAD, cli, load
from anomalib_lite.cascade import SHARED_PARAMETERS
from anomalib_lite.cli._fit import make_detector
from anomalib_lite.cli._main import make_parser
from anomalib_lite.cli._options import ALL_FIT_OPTIONS, CASCADE_OPTIONS, CASCADE_PARAMETERS
from anomalib_lite.cli._predictions import predict_to
from anomalib_lite.errors import CalibrationWarning, ImageError
from anomalib_lite.images import ImageSource
from anomalib_lite.plotting import overlay

CASCADE = ["--detector", "gated_cascade"]
SMALL = [*CASCADE, "--image-size", "64", "--gate-image-size", "64"]
FAST = [*SMALL, "--coreset-ratio", "0.2"]
RATES = ["--false-alarm-rate", "0.2", "--max-missed", "0.2"]


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """Output of the commands in fixtures."""
    return {}


@pytest.fixture(scope="module")
def scratches(wall: Path) -> Path:
    """Scratched images, other than those of the test."""
    for path in sorted((wall / "train/good").iterdir())[:10]:
        save(scratched(np.asarray(Image.open(path))), wall / "scratches" / f"{path.stem}.png")
    return wall / "scratches"


@pytest.fixture(scope="module")
def cascade(wall: Path, said: dict[str, str]) -> Path:
    """A cascade fitted on synthetic anomalies."""
    path = wall / "models" / "cascade.safetensors"
    with redirect_stdout(StringIO()) as out:
        assert cli.main(["fit", str(wall / "train/good"), "-o", str(path), *FAST, *RATES]) == 0
    said["fit"] = out.getvalue()
    detector = load(path)
    found = detector.detect(sorted((wall / "test").rglob("*.png")), maps=False)
    middle = float(np.median(found.probabilities))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # the rate does not matter here
        detector.set_thresholds(middle, float(np.max(found.probabilities)) - 1e-6)
    detector.save(path.with_name("half.safetensors"))
    return path


@pytest.fixture(scope="module")
def half(cascade: Path) -> Path:
    """The same cascade, with thresholds for which every route occurs."""
    return cascade.with_name("half.safetensors")


def parse(*options: str) -> argparse.Namespace:
    return make_parser().parse_args(["fit", "good", "-o", "m", *options])


class TestFit:
    def test_prints_a_summary(self, cascade: Path, said: dict[str, str]) -> None:
        detector, out = load(cascade), said["fit"]
        n_patches, length = detector.detector_.memory_bank_.embeddings_.shape
        routing = detector.routing_
        lines = {line[:14].strip(): line[14:] for line in out.splitlines()}
        assert re.fullmatch(r"24 in \d+\.\d s \(.+, \w+\)", lines["images"])
        assert re.fullmatch(
            rf"efficientnet_lite0 \(.+, \w+\): normal below {routing.t_low:.3g}, anomalous never",
            lines["gate"],
        )
        assert lines["gate misses"] == (
            f"at most 0.2 of anomalies such as the {len(detector.anomaly_probabilities_)} "
            "synthetic ones held back (95 % confidence)"
        )
        assert lines["memory bank"] == f"{n_patches:,} patches of {length} numbers"
        assert lines["threshold"] == f"{routing.threshold:.6g} of the heatmap model"
        assert lines["false alarms"] == "at most 0.2 of future normal images, on average"
        assert lines["written to"].startswith(str(cascade))

    def test_equals_the_fit_of_the_library(self, wall: Path, cascade: Path) -> None:
        direct = GatedCascade(
            detector=PatchCore(image_size=64, coreset_ratio=0.2),
            image_size=64,
            max_missed=0.2,
            false_alarm_rate=0.2,
        ).fit(wall / "train/good")
        again = load(cascade)
        assert again.routing_ == direct.routing_
        np.testing.assert_array_equal(again.anomaly_probabilities_, direct.anomaly_probabilities_)
        ours, theirs = (one.get_params(deep=False) for one in (again, direct))
        assert ours.pop("detector").get_params() == theirs.pop("detector").get_params()
        assert ours == theirs  # verbose is 0 again, too

    def test_defaults_equal_those_of_the_library(self) -> None:
        defaults = {n: p.default for n, p in inspect.signature(GatedCascade).parameters.items()}
        assert {n: default for n, (_, default, _) in CASCADE_OPTIONS.items()} == {
            n: defaults[CASCADE_PARAMETERS.get(n, n)] for n in CASCADE_OPTIONS
        }

    def test_each_option_reaches_its_model(self) -> None:
        options = (
            "--gate mobilenetv3_small_100 --gate-weights gate.pth --gate-image-size 96x128 "
            "--max-missed 0.05 --t-low 0.1 --t-high 0.9 --false-alarm-rate 0.02 "
            "--backbone resnet18 --weights heat.pth --image-size 200 --n-neighbors 3 "
            "--calibration leave_one_out --device cpu --dtype float32 --engine torch "
            "--batch-size 7 --on-error skip --max-pixels 1000 --random-state 3 --n-jobs 2"
        )
        made = make_detector(parse(*CASCADE, *options.split()))
        assert type(made) is GatedCascade
        for_both = {
            "device": "cpu",
            "dtype": "float32",
            "engine": "torch",
            "batch_size": 7,
            "on_error": "skip",
            "max_pixels": 1000,
            "random_state": 3,
            "verbose": 1,
        }
        expected = GatedCascade(
            "mobilenetv3_small_100",
            weights="gate.pth",
            image_size=(96, 128),
            max_missed=0.05,
            t_low=0.1,
            t_high=0.9,
            false_alarm_rate=0.02,
            **for_both,
        ).get_params(deep=False)
        heatmaps = PatchCore(
            "resnet18",
            weights="heat.pth",
            image_size=200,
            n_neighbors=3,
            calibration="leave_one_out",
            n_jobs=2,
            **for_both,
        )
        parameters = made.get_params(deep=False)
        assert type(parameters["detector"]) is PatchCore
        assert parameters.pop("detector").get_params() == heatmaps.get_params()
        expected.pop("detector")
        assert parameters == expected

    def test_every_parameter_of_both_models_is_assigned(self) -> None:
        """A new parameter of both models must be assigned: to both, or to the heatmap model."""
        of_cascade = set(inspect.signature(GatedCascade).parameters)
        common = set(ALL_FIT_OPTIONS) & of_cascade - set(CASCADE_OPTIONS)
        of_each = {"weights", "image_size", "calibration", "false_alarm_rate", "epochs"}
        assert common == {*SHARED_PARAMETERS, *of_each}

    @pytest.mark.parametrize(
        ("name", "cls"),
        [
            ("padim", PaDiM),
            ("mahalanobis_vfm", MahalanobisVFM),
            ("subspace_ad", SubspaceAD),
            ("patchcore", PatchCore),
        ],
    )
    def test_the_heatmap_model_can_be_chosen(self, name: str, cls: type) -> None:
        made = make_detector(parse(*CASCADE, "--heatmap-model", name))
        assert type(made.detector) is cls
        # Images held back for a threshold that is not used would be lost.
        wanted = "split" if cls is PatchCore else "leave_one_out"
        assert made.detector.calibration == wanted
        options = ["--heatmap-model", name, "--calibration", "split"]
        assert make_detector(parse(*CASCADE, *options)).detector.calibration == "split"

    @pytest.mark.parametrize("options", ["--memory-budget 2GB", "--memory-budget 2GB --t-low 0.2"])
    @pytest.mark.parametrize("name", ["padim", "mahalanobis_vfm", "subspace_ad", "patchcore"])
    def test_images_are_held_back_where_none_can_be_left_out(self, name: str, options: str) -> None:
        made = make_detector(parse(*CASCADE, "--heatmap-model", name, *options.split()))
        assert made.detector.calibration == "split"
        made.detector._check_parameters()

    def test_a_heatmap_model_for_each_layer(self, wall: Path, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        command = ["fit", wall / "train/good", "-o", path, *SMALL, "--heatmap-model", "padim"]
        command += ["--fusion", "per_layer", "--n-components", "20", "--false-alarm-rate", "0.2"]
        assert cli.main(list(map(str, [*command, "--max-missed", "0.5"]))) == 0
        assert len(load(path).detector_.layer_models_.models_) == 3

    def test_anomalous_images_can_be_given(
        self, wall: Path, scratches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "m.safetensors"
        command = ["fit", wall / "train/good", "-o", path, "--anomalous", scratches, *SMALL]
        command += ["--heatmap-model", "padim", "--n-components", "20", "--include-backbone"]
        command += ["--max-missed", "0.5", "--false-alarm-rate", "0.2"]
        assert cli.main(list(map(str, command))) == 0
        out = capsys.readouterr().out
        assert re.search(r"images +34 in ", out)
        assert "at most 0.5 of anomalies such as the 5 given ones held back" in out
        assert "gaussians     16 x 24 positions of 20 numbers" in out
        detector = load(path)
        assert len(detector.anomaly_probabilities_) == 5
        assert type(detector.detector_) is PaDiM
        assert path.stat().st_size > 10_000_000  # the file holds two networks
        direct = GatedCascade(
            detector=PaDiM(image_size=64, n_components=20, calibration="leave_one_out"),
            image_size=64,
            max_missed=0.5,
            false_alarm_rate=0.2,
        )
        good, bad = (sorted(d.iterdir()) for d in (wall / "train/good", scratches))
        direct.fit([*good, *bad], [0] * 24 + [1] * 10)
        assert detector.routing_ == direct.routing_

    def test_the_summary_says_what_is_not_guaranteed(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["fit", str(wall / "train/good"), "-o", str(tmp_path / "m"), *FAST]
        command += ["--t-low", "0.3", "--t-high", "0.99", "--false-alarm-rate", "0.05"]
        assert cli.main([*command, "--max-missed", "0.5"]) == 0
        out, err = capsys.readouterr()
        assert "normal below 0.3, anomalous above 0.99" in out
        assert "gate misses   as many as lie below the t_low given" in out
        assert "the rate of 0.05 asked for is not guaranteed, see the warning" in out
        assert err.startswith("warning: --false-alarm-rate 0.05 needs 19 normal images, got 12;")

    def test_too_few_anomalies_do_not_affect_the_false_alarm_rate(
        self, wall: Path, scratches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["fit", str(wall / "train/good"), "-o", str(tmp_path / "m"), *FAST, *RATES]
        assert cli.main([*command, "--anomalous", str(scratches)]) == 0
        out, err = capsys.readouterr()
        assert not err
        assert "of anomalies such as the 56 synthetic ones held back" in out
        assert "false alarms  at most 0.2 of future normal images, on average" in out

    def test_unreadable_images_can_be_skipped_and_are_listed(
        self,
        wall: Path,
        broken: dict[str, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for i, path in enumerate(sorted((wall / "train/good").iterdir())):
            (tmp_path / "some").mkdir(exist_ok=True)
            (tmp_path / "some" / f"{i}.jpg").write_bytes(path.read_bytes())
        (tmp_path / "some" / "5.jpg").write_bytes(broken["cut"].read_bytes())
        command = ["fit", str(tmp_path / "some"), "-o", str(tmp_path / "m"), *FAST, *RATES]
        assert cli.main(command) == 2
        assert "--on-error skip" in capsys.readouterr().err
        assert cli.main([*command, "--on-error", "skip"]) == 0
        out, err = capsys.readouterr()
        assert re.search(r"images +23 in ", out)
        assert re.fullmatch(r"skipped: .*5\.jpg cannot be read: .*\n", err)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--n-components 3", "--n-components is no option of --heatmap-model patchcore"),
            ("--heatmap-model padim --coreset-ratio 1", "no option of --heatmap-model padim"),
            ("--heatmap-model resnet", "argument --heatmap-model: invalid choice: 'resnet'"),
            ("--detector padim --gate resnet18", "--gate is no option of --detector padim"),
            ("--detector patchcore --t-low 0.1", "--t-low is no option of --detector patchcore"),
            ("--detector patchcore --heatmap-model padim", "--heatmap-model is no option of"),
            ("--detector patchcore --anomalous {wall}/test/scratch", "--anomalous is no option"),
            ("--anomalous {wall}/nowhere", "nowhere does not exist"),
            ("--anomalous {wall}/test", r"subdirectories \['good', 'scratch'\] do: name one"),
            ("--anomalous {wall}/train/good", "of --anomalous was given before"),
            ("--anomalous {wall}/test/good {wall}/test/good", "of --anomalous was given before"),
            ("--gate resnet18x", r"\(gate\): backbone 'resnet18x' is not known .*'resnet18'"),
            ("--gate-weights no.pth", r"\(gate\): weights file no.pth does not exist"),
            ("--gate-image-size 3", "gate_image_size must be a whole number of at least 16"),
            ("--image-size 3", "PatchCore: image_size must be a whole number of at least 16"),
            ("--gate-image-size 3x", "--gate-image-size: must be a whole number, HxW or auto"),
            ("--max-missed 0", r"max_missed must be a number in \(0, 1\), got 0"),
            ("--t-low 0.9 --t-high 0.1", "t_low must not exceed t_high, got 0.9 and 0.1"),
            ("--coreset-ratio 7", r"PatchCore: coreset_ratio must be a number in \(0, 1\]"),
            ("--calibration isotonic", "PatchCore: calibration must be one of"),
        ],
    )
    def test_a_wrong_option_is_named(
        self,
        wall: Path,
        tmp_path: Path,
        options: str,
        message: str,
        refused: Refused,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        learned = "anomalib_lite.cascade.gate.LinearHead.fit"
        monkeypatch.setattr(learned, lambda *_: pytest.fail("the fit has begun"))
        save(np.zeros((64, 64), np.uint8), wall / "models/one/0.png")
        command = ["fit", wall / "train/good", "-o", tmp_path / "m", *CASCADE]
        said = refused(*command, *options.format(wall=wall).split())
        assert re.search(message, said), said
        assert not (tmp_path / "m").exists()


class TestPredict:
    def test_the_table_says_which_model_decided(
        self, wall: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folders = [str(wall / "test/good"), str(wall / "test/scratch")]
        assert cli.main(["predict", str(half), *folders, "-o", str(tmp_path)]) == 0
        rows, detector = read(tmp_path / "scores.csv"), load(half)
        found = detector.detect(sorted((wall / "test").rglob("*.png")))
        assert [row["route"] for row in rows] == found.routes.tolist()
        assert set(found.routes) == {"gate_normal", "detector", "gate_anomalous"}
        np.testing.assert_allclose(
            [float(row["score"]) for row in rows], found.scores, rtol=1e-3, atol=1e-3
        )
        labels = ["anomalous" if label else "normal" for label in found.labels]
        assert [row["label"] for row in rows] == labels
        assert {row["threshold"] for row in rows} == {"0.5"}
        for row in rows:
            assert bool(row["overlay"]) == (row["route"] == "detector")
        names = {Path(row["overlay"]).name for row in rows} - {""}
        assert {path.name for path in (tmp_path / "overlays").iterdir()} == names
        n = {route: int(np.sum(found.routes == route)) for route in set(found.routes)}
        normal, anomalous = n["gate_normal"], n["gate_anomalous"]
        assert capsys.readouterr().out.splitlines()[1] == (
            f"decided by the gate: {normal + anomalous} ({normal} normal, {anomalous} anomalous), "
            f"by the heatmap model: {n['detector']}; heatmap_call_rate "
            f"{found.heatmap_call_rate:.3g}"
        )

    def test_all_images_get_a_picture_if_asked(
        self, wall: Path, half: Path, tmp_path: Path
    ) -> None:
        command = ["predict", str(half), str(wall / "test/scratch"), "-o", str(tmp_path)]
        assert cli.main([*command, "--maps", "always"]) == 0
        rows = read(tmp_path / "scores.csv")
        assert {row["route"] for row in rows} > {"gate_anomalous"}
        assert len({row["overlay"] for row in rows} - {""}) == 4
        always = load(half).set_params(maps="always")
        always.save(tmp_path / "always")
        command[1] = str(tmp_path / "always")
        assert cli.main(command) == 0  # what the model's own parameter says
        assert all(row["overlay"] for row in read(tmp_path / "scores.csv"))
        assert cli.main([*command, "--maps", "escalated"]) == 0
        for row in read(tmp_path / "scores.csv"):
            assert bool(row["overlay"]) == (row["route"] == "detector")

    def test_colours_follow_the_threshold_of_the_heatmap_model(
        self, wall: Path, half: Path, tmp_path: Path
    ) -> None:
        path = wall / "test/scratch/000.png"
        command = ["predict", str(half), str(path), "-o", str(tmp_path), "--maps", "always"]
        assert cli.main(command) == 0
        detector = load(half)
        found = detector.detect(path, maps="always")
        outline = 1.0 if found.labels[0] else None
        level = found.pixel_threshold
        assert level == pytest.approx(
            detector.detector_.pixel_threshold_
            * detector.routing_.threshold
            / detector.detector_.calibrated_threshold_
        )
        expected = np.asarray(overlay(path, found.maps[0], threshold=level, outline=outline))
        with Image.open(tmp_path / "overlays/000.png") as picture:
            left = (picture.width - expected.shape[1]) // 2
            pixels = np.asarray(picture)[: expected.shape[0], left : left + expected.shape[1]]
        assert np.abs(pixels.astype(int) - expected).max() <= 3  # rounded in other units
        assert len(np.unique(expected)) > 50

    def test_without_pictures_the_heatmap_model_runs_only_where_it_decides(
        self, wall: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[int, Any, int]] = []
        detect = PatchCore.detect

        def counted(self: PatchCore, images: Any, **options: Any) -> Any:
            seen.append((len(images), options["maps"], self.batch_size))
            return detect(self, images, **options)

        monkeypatch.setattr(PatchCore, "detect", counted)
        command = ["predict", str(half), str(wall / "test/good"), str(wall / "test/scratch")]
        command += ["-o", str(tmp_path), "--no-overlays", "--batch-size", "30"]
        assert cli.main(command) == 0
        rows = read(tmp_path / "scores.csv")
        assert seen == [(sum(row["route"] == "detector" for row in rows), False, 30)]

    def test_unreadable_images_can_be_skipped_and_are_listed(
        self,
        wall: Path,
        half: Path,
        broken: dict[str, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        good = wall / "test/good/000.png"
        files = [str(good), *map(str, broken.values())]
        command = ["predict", str(half), *files, "-o", str(tmp_path)]
        assert cli.main(command) == 2
        assert "1 of 5 images are done and kept" in capsys.readouterr().err
        assert cli.main([*command, "--on-error", "skip"]) == 0
        out, err = capsys.readouterr()
        rows = read(tmp_path / "scores.csv")
        assert [row["route"] for row in rows[1:]] == ["skipped"] * 4
        assert err.count("skipped: ") == 4
        rate = float(rows[0]["route"] == "detector")
        assert out.splitlines()[1].endswith(f"heatmap_call_rate {rate:.3g}")
        assert cli.main([*command[:2], *files[1:], *command[-2:], "--on-error", "skip"]) == 0
        assert capsys.readouterr().out.count("\n") == 1  # a share of no images is none

    def test_the_table_of_another_detector_has_no_route(
        self, wall: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["predict", str(model), str(wall / "test/good"), "-o", str(tmp_path)]
        assert cli.main(command) == 0
        assert "route" not in read(tmp_path / "scores.csv")[0]
        assert "decided" not in capsys.readouterr().out

    def test_mistakes_are_named(
        self, wall: Path, model: Path, half: Path, tmp_path: Path, refused: Refused
    ) -> None:
        rest = [wall / "test/good", "-o", tmp_path / "out"]
        said = refused("predict", model, *rest, "--maps", "always")
        assert "--maps is for a GatedCascade" in said
        assert "holds a PatchCore" in said
        said = refused("predict", half, *rest, "--maps", "always", "--no-overlays")
        assert "Leave one of them out" in said
        said = refused("predict", half, *rest, "--maps", "some")
        assert "invalid choice: 'some'" in said
        said = refused("predict", half, *rest, "--weights", "no.pth")
        assert f"from a weights file, and {half} has none. Leave it out, or fit with" in said
        said = refused("predict", half, *rest, "--threshold", "40")
        assert "threshold must be a number in [0, 1], got 40" in said
        said = refused("predict", half, *rest, "--threshold", "0")
        assert "the model's threshold, which must be finite and above 0, got 0. Give one" in said
        detector = load(half)
        detector.set_thresholds(0.0, 1.0)
        object.__setattr__(detector.routing_, "threshold", 0.0)
        detector.save(tmp_path / "m")
        said = refused("predict", tmp_path / "m", *rest)
        assert "threshold of its heatmaps" in said
        assert "Go without pictures with --no-overlays" in said

    def test_weights_files_can_move(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
    ) -> None:
        torch.manual_seed(0)
        network = timm.create_model("mobilenetv3_small_050")
        torch.save(network.state_dict(), tmp_path / "then.pth")
        command = ["fit", wall / "train/good", "-o", tmp_path / "m", *SMALL, *RATES]
        command += ["--gate", "mobilenetv3_small_050", "--gate-weights", tmp_path / "then.pth"]
        assert cli.main(list(map(str, command))) == 0
        (tmp_path / "then.pth").rename(tmp_path / "now.pth")
        command = ["predict", tmp_path / "m", wall / "test/good", "-o", tmp_path / "out"]
        capsys.readouterr()
        assert "then.pth does not exist" in refused(*command)
        command += ["--weights", tmp_path / "now.pth"]
        assert cli.main(list(map(str, command))) == 0
        assert "heatmap_call_rate" in capsys.readouterr().out


class TestEvaluate:
    def test_the_report_has_pixel_metrics_and_the_call_rate(
        self, wall: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "r.json"
        assert cli.main(["evaluate", str(half), str(wall), "--json", str(file)]) == 0
        out = capsys.readouterr().out
        report = json.loads(file.read_text())
        detector = load(half)
        paths = sorted((wall / "test").rglob("*.png"))
        rate = detector.detect(paths).heatmap_call_rate
        assert 0 < rate < 1
        assert report["metrics"]["heatmap_call_rate"] == rate
        assert f"heatmap call rate {rate:14.4f}" in out
        assert report["metrics"]["pixel_auroc"] > 0.5
        assert out.startswith(
            f"{wall}: layout mvtec (MVTecAD), masks\nGatedCascade on {wall.name}: "
        )
        assert "fitted before, 6 normal and 4" in out

    @pytest.mark.parametrize("root", ["wall", "plain"])
    def test_no_heatmaps_are_made_without_pixel_metrics(
        self,
        wall: Path,
        half: Path,
        tmp_path: Path,
        root: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        seen: list[str] = []
        detect = GatedCascade.detect

        def noted(self: GatedCascade, images: Any, **options: Any) -> Any:
            seen.append(self.maps)
            return detect(self, images, **options)

        monkeypatch.setattr(GatedCascade, "detect", noted)
        if root == "plain":  # no masks there
            command = ["evaluate", str(half), str(wall / "test")]
        else:
            command = ["evaluate", str(half), str(wall), "--no-pixel-metrics"]
        assert cli.main(command) == 0
        assert set(seen) == {"escalated"}
        assert "heatmap call rate" in capsys.readouterr().out


def test_both_models_get_the_options_of_the_command(
    wall: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detector as gate, which only Python can make, also has options of its own."""
    small = PatchCore(image_size=64, coreset_ratio=0.1, verbose=1)
    heatmaps = PatchCore(image_size=64)
    options = {"max_missed": 0.5, "false_alarm_rate": 0.2, "on_error": "skip"}
    cascade = GatedCascade(small, heatmaps, verbose=1, **options).fit(wall / "train/good")
    cascade.save(tmp_path / "m")
    seen: list[tuple[str, int, int]] = []
    detect = PatchCore.detect

    def noted(self: Any, images: Any, **options: Any) -> Any:
        seen.append((self.on_error, self.batch_size, self.verbose))
        return detect(self, images, **options)

    monkeypatch.setattr(PatchCore, "detect", noted)
    command = [str(tmp_path / "m"), str(wall / "plain"), "--batch-size", "5"]
    assert cli.main(["evaluate", *command]) == 0
    assert set(seen) == {("raise", 5, 0)}


@pytest.mark.parametrize("gate", ["efficientnet_lite0", "detector"])
def test_predict_to_changes_no_model_of_a_cascade(
    gate: str, wall: Path, half: Path, broken: dict[str, Path], tmp_path: Path
) -> None:
    if gate == "detector":
        small, heatmaps = (PatchCore(image_size=64, coreset_ratio=0.1) for _ in range(2))
        options = {"max_missed": 0.5, "false_alarm_rate": 0.2}
        cascade = GatedCascade(small, heatmaps, **options).fit(wall / "train/good")
    else:
        cascade = load(half)
    models = [cascade, cascade.gate_, *cascade._members().values()]
    for one in (cascade, *cascade._members().values()):
        one.verbose = 1
    before = [dict(vars(one)) for one in models]
    files = [wall / "test/good/000.png", *(wall / "test/scratch").iterdir(), broken["cut"]]
    source = ImageSource(files, where="predict")
    with pytest.raises(ImageError, match="5 of 6 images are done"):
        predict_to(tmp_path, cascade, source, maps=True, skip=False)
    summary = predict_to(tmp_path, cascade, source, maps="always", skip=True)
    assert len(summary.skipped) == 1
    assert summary.routes.total() == 5
    for one, attributes in zip(models, before, strict=True):
        assert vars(one).keys() == attributes.keys()
        assert all(vars(one)[name] is value for name, value in attributes.items())
