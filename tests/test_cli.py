"""The command line: fit, evaluate, and the messages about mistakes."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_fixtures import FAST, Refused, read
from PIL import Image

import anomalib_lite
from anomalib_lite import MahalanobisVFM, PaDiM, PatchCore, SubspaceAD, cli, load
from anomalib_lite.cli._fit import without
from anomalib_lite.cli._options import FIT_OPTIONS, MAHALANOBIS_OPTIONS, PADIM_OPTIONS
from anomalib_lite.cli._parser import UsageError


class TestFit:
    def test_prints_a_summary(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "not/yet/there/m.safetensors"
        assert cli.main(["fit", str(wall / "train/good"), "-o", str(path), *FAST]) == 0
        out, err = capsys.readouterr()
        detector = load(path)
        n_patches, length = detector.memory_bank_.embeddings_.shape
        assert re.search(r"images +24 in ", out)
        assert f"{n_patches:,} patches of {length} numbers" in out
        assert f"{detector.threshold_:.6g}" in out
        assert "at most 0.2 of future normal images" in out
        assert str(path) in out
        assert err == ""

    def test_says_once_what_it_leaves_out_and_takes_subdirectories(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(wall / "train/good", tmp_path / "good/monday")
        shutil.copytree(wall / "train/good", tmp_path / "good/tuesday")
        for i, path in enumerate(sorted((tmp_path / "good/tuesday").iterdir())):
            path.rename(tmp_path / f"good/{i}.jpg")
        command = ["fit", str(tmp_path / "good"), "-o", str(tmp_path / "m.safetensors"), *FAST]
        for options, n in ((), 24), (("--recursive",), 48):
            assert cli.main([*command, *options]) == 0
            out, err = capsys.readouterr()
            assert re.search(rf"images +{n} in ", out)
            said = "subdirectories with images: 1 (monday). To take subdirectories too, add --rec"
            assert err.count(said) == (not options)

    def test_equals_the_fit_of_the_library(self, wall: Path, model: Path) -> None:
        direct = PatchCore(image_size=64, coreset_ratio=0.2, false_alarm_rate=0.2)
        direct.fit(wall / "train/good")
        again = load(model)
        assert again.threshold_ == direct.threshold_
        assert np.array_equal(again.memory_bank_.embeddings_, direct.memory_bank_.embeddings_)
        assert again.get_params() == direct.get_params()  # verbose is 0 again, too

    def test_defaults_equal_those_of_the_library(self) -> None:
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(PatchCore).parameters.items()
        }
        assert {name: default for name, (_, default, _) in FIT_OPTIONS.items()} == {
            name: defaults[name] for name in FIT_OPTIONS
        }

    def test_padim_is_fitted_with_options_of_its_own(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        defaults = {n: p.default for n, p in inspect.signature(PaDiM).parameters.items()}
        assert {n: default for n, (_, default, _) in PADIM_OPTIONS.items()} == {
            n: defaults[n] for n in PADIM_OPTIONS
        }
        path = tmp_path / "p.safetensors"
        common = f"fit {wall}/train/good -o {path} --image-size 64 --false-alarm-rate 0.2 "
        assert cli.main(f"{common}--detector padim --n-components 30".split()) == 0
        assert "gaussians     16 x 24 positions of 30 numbers" in capsys.readouterr().out
        again = load(path)
        assert isinstance(again, PaDiM)
        assert (again.n_components, again.ridge, again.fusion) == (30, 0.01, "nearest")
        assert cli.main(f"{common}--detector padim --coreset-ratio 0.5".split()) == 2
        assert "--coreset-ratio is no option of --detector padim" in capsys.readouterr().err
        assert cli.main(f"{common}--ridge 0.5".split()) == 2
        assert "--ridge is no option of --detector patchcore" in capsys.readouterr().err

    def test_mahalanobis_vfm_is_fitted_with_options_of_its_own(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        defaults = {n: p.default for n, p in inspect.signature(MahalanobisVFM).parameters.items()}
        assert {n: default for n, (_, default, _) in MAHALANOBIS_OPTIONS.items()} == {
            n: defaults[n] for n in MAHALANOBIS_OPTIONS
        }
        path = tmp_path / "m.safetensors"
        command = f"fit {wall}/train/good -o {path} --image-size 64 --false-alarm-rate 0.2 "
        command += "--detector mahalanobis_vfm --shrinkage 0.3"
        assert cli.main(command.split()) == 0
        assert "patches and " in capsys.readouterr().out
        assert load(path).shrinkage == 0.3

    @pytest.mark.parametrize("detector", ["patchcore", "padim", "mahalanobis_vfm", "subspace_ad"])
    def test_embeddings_are_changed_as_asked(
        self, detector: str, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "c.safetensors"
        common = f"fit {wall}/train/good -o {path} --image-size 64 --false-alarm-rate 0.2 "
        common += f"--detector {detector} "
        asked = "--feature-dim 20 --whiten yes --whiten-shrinkage 0.2 --normalize yes"
        weights = "1,2,4" if detector == "padim" else "1,2"
        given = f"{common}{asked} --fusion weighted --layer-weights {weights}"
        given += " --n-components 5" if detector == "subspace_ad" else ""
        assert cli.main(given.split()) == 0
        again = load(path)
        assert (again.feature_dim, again.whiten, again.normalize) == (20, True, True)
        assert again.layer_weights == [float(weight) for weight in weights.split(",")]
        assert again.transform_.parts_[0].n_out == 20
        assert cli.main(f"{common}--fusion per_layer".split()) == 0
        assert " layer 1: " in capsys.readouterr().out
        assert cli.main(f"{common}--whiten true".split()) == 2
        assert "must be yes or no, got 'true'" in capsys.readouterr().err

    def test_a_preset_gives_way_to_options(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "c.safetensors"
        common = f"fit {wall}/train/good -o {path} --false-alarm-rate 0.2 "
        assert cli.main(f"{common}--preset fast --image-size 64".split()) == 0
        again = load(path)
        assert (again.image_size, again.coreset_size) == (64, 1000)
        assert cli.main(f"{common}--preset quick".split()) == 2
        assert "must be one of its presets ('fast', 'accurate'" in capsys.readouterr().err

    @pytest.mark.parametrize(("given", "expected"), [("0.9", 0.9), ("30", 30), (None, 0.99)])
    def test_subspace_ad_takes_a_share_or_a_number(
        self,
        given: str | None,
        expected: float,
        wall: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = tmp_path / "s.safetensors"
        command = f"fit {wall}/train/good -o {path} --image-size 64 --false-alarm-rate 0.2 "
        command += "--detector subspace_ad" + (f" --n-components {given}" if given else "")
        assert cli.main(command.split()) == 0
        assert "of 152 directions, of " in capsys.readouterr().out
        again = load(path)
        assert isinstance(again, SubspaceAD)
        assert again.n_components == expected
        assert type(again.n_components) is type(expected)

    def test_a_directory_is_not_a_model(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = str(wall / "train/good")
        assert cli.main(["predict", images, images, "-o", str(tmp_path)]) == 2
        assert "is a directory. Give the model file that fit wrote" in capsys.readouterr().err

    def test_options_reach_the_detector(self, wall: Path, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        options = (
            "--image-size 48x80 --layers 1,blocks.4 --n-neighbors 3 --smoothing 2 --dtype float32 "
            "--calibration leave_one_out --false-alarm-rate 0.3 --coreset-ratio 0.3 --batch-size 5 "
            "--device cpu --on-error skip --max-pixels 10_000 --random-state 7 --image-score top1% "
            "--position-window 2 --augment brightness --foreground no --include-backbone"
        )
        arguments = ["fit", str(wall / "test/good"), "-o", str(path), *options.split()]
        assert cli.main(arguments) == 0
        parameters = load(path).get_params()
        assert tuple(parameters.pop("image_size")) == (48, 80)
        assert parameters.pop("layers") == [1, "blocks.4"]
        expected = {
            "n_neighbors": 3,
            "smoothing": 2.0,
            "dtype": "float32",
            "calibration": "leave_one_out",
            "false_alarm_rate": 0.3,
            "coreset_ratio": 0.3,
            "batch_size": 5,
            "device": "cpu",
            "on_error": "skip",
            "max_pixels": 10_000,
            "random_state": 7,
            "image_score": "top1%",
            "position_window": 2,
            "augment": "brightness",
            "foreground": False,
        }
        assert {name: parameters[name] for name in expected} == expected
        assert path.stat().st_size > 5_000_000  # the file holds the network

    def test_too_few_images_for_the_rate_give_a_warning_of_one_line(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["fit", str(wall / "test/good"), "-o", str(tmp_path / "m"), *FAST[:4]]
        assert cli.main(arguments) == 0
        out, err = capsys.readouterr()
        assert err.startswith("warning: --false-alarm-rate 0.01 needs 99 normal images")
        assert err.count("\n") == 1
        assert "the rate of 0.01 asked for is not guaranteed, see the warning" in out

    def test_unreadable_images_can_be_skipped_and_are_listed(
        self,
        wall: Path,
        broken: dict[str, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = shutil.copytree(wall / "train/good", tmp_path / "some")
        shutil.copy(broken["cut"], folder / "005.jpg")
        arguments = ["fit", str(folder), "-o", str(tmp_path / "m"), *FAST, "--on-error", "skip"]
        assert cli.main(arguments) == 0
        out, err = capsys.readouterr()
        assert re.search(r"images +23 in ", out)
        assert re.fullmatch(r"skipped: .*005\.jpg cannot be read: .*\n", err)

    def test_the_oddest_images_are_named_and_can_be_left_out(
        self, wall: Path, refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, odd = tmp_path / "m", tmp_path / "odd.txt"
        command = ["fit", wall / "train/good", "-o", path, *FAST, "--exclude", odd]
        assert cli.main(list(map(str, command[:-2]))) == 0
        [told] = re.findall(r"oddest +(.*): are these good\?", capsys.readouterr().out)
        detector = load(path)
        order = np.argsort(-detector.calibration_scores_)[:3]
        named = [Path(detector.calibration_names_[i]).name for i in order]
        assert [name.split(" ")[0] for name in told.split(", ")] == named
        odd.write_text(f"{named[0]}\n\n{wall / 'train/good' / named[1]}\n")
        assert cli.main(list(map(str, command))) == 0
        assert re.search(r"images +22 in ", capsys.readouterr().out)
        odd.write_text("no.png\n")
        assert f"no.png in {odd} is the name of none of the 24 images" in refused(*command)
        odd.write_text("\n".join(sorted(p.name for p in (wall / "train/good").iterdir())))
        assert "names all images. Leave some" in refused(*command)
        odd.write_bytes(b"\xff\xfe0")
        assert f"--exclude: {odd} cannot be read" in refused(*command)
        odd.unlink()
        assert f"--exclude: {odd} cannot be read" in refused(*command)
        odd.write_text(f"{named[0]}\n", encoding="utf-8-sig")  # as editors of Windows write
        assert cli.main(list(map(str, command))) == 0
        assert re.search(r"images +23 in ", capsys.readouterr().out)

    def test_a_name_of_several_images_leaves_none_out(self, tmp_path: Path) -> None:
        paths = [tmp_path / f"{i}/part.jpg" for i in range(3)]
        listed = tmp_path / "odd.txt"
        listed.write_text("part.jpg")
        with pytest.raises(UsageError, match=r"part.jpg in .* is the name of 3 of the 3 images"):
            without(SimpleNamespace(items=paths), listed)
        listed.write_text(str(paths[1]))
        assert without(SimpleNamespace(items=paths), listed) == [paths[0], paths[2]]

    @pytest.mark.parametrize("kind", ["cut", "text", "empty", "1x1"])
    def test_an_unreadable_image_is_named(
        self, broken: dict[str, Path], kind: str, refused: Refused, tmp_path: Path
    ) -> None:
        for name in set(broken) - {kind}:
            broken[name].unlink()
        said = refused("fit", broken[kind].parent, "-o", tmp_path / "m", *FAST)
        assert str(broken[kind]) in said
        assert not (tmp_path / "m").exists()
        assert "on_error" not in said
        assert ("--on-error skip" in said) == (kind != "1x1")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--coreset-ratio 0", r"coreset_ratio must be a number in \(0, 1\], got 0"),
            ("--coreset-ratio 1.5", r"coreset_ratio must be a number in \(0, 1\], got 1.5"),
            ("--coreset-ratio much", "--coreset-ratio: invalid float value: 'much'"),
            ("--backbone resnet18x", "'resnet18x' is not known to timm .* Did you mean 'resnet18"),
            ("--index flatt", "Did you mean 'flat'"),
            ("--layers blocks.99", "layer 'blocks.99' does not exist"),
            ("--image-size 64x64x3", "--image-size: must be a whole number, HxW or auto"),
            ("--foreground maybe", "--foreground: must be yes or no, got 'maybe'"),
            ("--position-window -1", "position_window must be a whole number"),
            ("--augment mirror", "augment must be None, one of"),
            ("--on-error ignore", "on_error must be one of"),
            ("--false-alarm-rate 2", "false_alarm_rate must be a number"),
            ("--weights no.pth --backbone resnet18", "weights file no.pth does not exist"),
            ("--calibration leave_one_out --index IVF4,Flat", "Use --calibration split"),
        ],
    )
    def test_a_wrong_option_is_named(
        self,
        wall: Path,
        tmp_path: Path,
        options: str,
        message: str,
        refused: Refused,
    ) -> None:
        command = ["fit", wall / "test/good", "-o", tmp_path / "m", *FAST]
        said = refused(*command, *options.split())
        assert re.search(message, said), said

    def test_a_directory_without_images_is_named(
        self, wall: Path, tmp_path: Path, refused: Refused
    ) -> None:
        (tmp_path / "none").mkdir()
        output = tmp_path / "m"
        said = refused("fit", tmp_path / "none", "-o", output)
        assert f"directory {tmp_path / 'none'} holds no image files" in said
        said = refused("fit", wall / "test", "-o", output)
        assert "subdirectories ['good', 'scratch'] do: name one" in said
        said = refused("fit", tmp_path / "nowhere", "-o", output)
        assert f"{tmp_path / 'nowhere'} does not exist" in said

    def test_a_bad_output_path_is_named_before_the_fit(
        self,
        wall: Path,
        tmp_path: Path,
        refused: Refused,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(PatchCore, "fit", lambda *_: pytest.fail("the fit has begun"))
        (tmp_path / "file").touch()
        for place, message in [
            (tmp_path / "file" / "m.safetensors", f"cannot write into {tmp_path / 'file'}: it is"),
            (tmp_path, f"cannot write {tmp_path}: it is a directory"),
        ]:
            assert message in refused("fit", wall / "test/good", "-o", place)


class TestEvaluate:
    def test_options_of_another_layout_are_refused(
        self, wall: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["evaluate", str(model), str(wall), "--anomalous", "scratch"]) == 2
        assert "Add --layout folder, or leave them out" in capsys.readouterr().err

    def test_a_memory_budget_gives_nearly_the_same_pixel_metrics(
        self, wall: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = []
        for more in ([], ["--memory-budget", "64MB"]):
            file = tmp_path / f"{len(more)}.json"
            assert cli.main(["evaluate", str(model), str(wall), "--json", str(file), *more]) == 0
            found.append(json.loads(file.read_text())["metrics"])
        assert found[1] == pytest.approx(found[0], abs=1e-4)
        evaluate = ["evaluate", str(model), str(wall), "--memory-budget", "1000"]
        assert cli.main(evaluate) == 2
        assert "memory_budget must be" in capsys.readouterr().err

    @pytest.mark.parametrize("layout", ["mvtec", "folder"])
    def test_the_report_is_printed_and_written(
        self,
        wall: Path,
        model: Path,
        tmp_path: Path,
        layout: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        root = wall if layout == "mvtec" else wall / "plain"
        files = ["--json", str(tmp_path / "new/r.json"), "--csv", str(tmp_path / "r.csv")]
        assert cli.main(["evaluate", str(model), str(root), *files]) == 0
        out, err = capsys.readouterr()
        report = json.loads((tmp_path / "new/r.json").read_text())
        assert report["dataset"] == root.name
        assert report["counts"]["test_normal"] == 6
        assert report["counts"]["test_anomalous"] == 4
        assert report["metrics"]["image_auroc"] > 0.9
        assert report["metrics"]["aupro"] > 0.5
        assert list(report["per_kind"]) == ["scratch"]
        assert f"PatchCore on {root.name}: fitted before, 6 normal and 4 anomalous" in out
        assert f"{report['metrics']['image_auroc']:.4f}" in out
        assert {row["metric"] for row in read(tmp_path / "r.csv")} > set(report["metrics"])
        assert err == ""

    @pytest.mark.parametrize("options", [[], ["--layout", "mvtec"]])
    def test_mvtec_ad_2(
        self,
        wall: Path,
        model: Path,
        tmp_path: Path,
        options: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        root = tmp_path / "bricks"
        for old, new in (
            ("train", "train"),
            ("test/good", "validation/good"),
            ("test/good", "test_public/good"),
            ("test/scratch", "test_public/bad"),
            ("ground_truth/scratch", "test_public/ground_truth/bad"),
        ):
            shutil.copytree(wall / old, root / new)
        assert cli.main(["evaluate", str(model), str(root), *options]) == 0
        out = capsys.readouterr().out
        assert "PatchCore on bricks: fitted before, 6 normal and 4 anomalous" in out
        assert "AUPRO" in out

    def test_a_published_data_set(
        self, wall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
    ) -> None:
        for i, path in enumerate(sorted((wall / "train/good").iterdir())):
            target = tmp_path / f"tiles/MT_Free/Imgs/exp1_num_{i}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        for i, path in enumerate(sorted((wall / "test/scratch").iterdir()), start=50):
            target = tmp_path / f"tiles/MT_Crack/Imgs/exp1_num_{i}"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                image.save(target.with_suffix(".jpg"))
            mask = wall / "ground_truth/scratch" / f"{path.stem}_mask.png"
            shutil.copy(mask, target.with_suffix(".png"))
        tiles, model = str(tmp_path / "tiles"), str(tmp_path / "m")
        assert cli.main(["fit", tiles, "-o", model, "--layout", "magnetic_tile", *FAST]) == 0
        assert re.search(r"images +16 in", capsys.readouterr().out)
        assert cli.main(["evaluate", model, tiles]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"{tiles}: layout magnetic_tile (MagneticTile), masks\n")
        assert "8 normal and 4 anomalous" in out
        assert "AUPRO" in out
        assert err == ""
        said = refused("fit", tiles, "-o", model, "--layout", "btad")
        assert "train/ok" in said

    def test_copies_of_training_images_are_named(
        self, wall: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = tmp_path / "wall"
        for place in ("train", "test", "ground_truth"):
            shutil.copytree(wall / place, root / place)
        shutil.copy(root / "train/good/003.jpg", root / "test/good/copy.jpg")
        assert cli.main(["evaluate", str(model), str(root)]) == 0
        out, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert err.startswith("warning: evaluate: 1 of 11 test images are also training images")
        assert f"{root / 'test/good/copy.jpg'} (trained on as" in err
        assert "1 test images are training images too" in out

    def test_inverted_masks(
        self, wall: Path, model: Path, tmp_path: Path, refused: Refused
    ) -> None:
        root = shutil.copytree(wall / "plain", tmp_path / "plain")
        for path in (root / "ground_truth").rglob("*.png"):
            with Image.open(path) as mask:
                inverted = mask.point(lambda value: 255 - value)
            inverted.save(path)
        said = refused("evaluate", model, root)
        assert "pass inverted=True (for evaluate: --inverted-masks yes)" in said
        found = []
        for place, options in (
            (wall / "plain", []),
            (root, ["--inverted-masks", "yes"]),
            (root, ["--inverted-masks", "no"]),
        ):
            file = str(tmp_path / "r.json")
            assert cli.main(["evaluate", str(model), str(place), *options, "--json", file]) == 0
            found.append(json.loads(Path(file).read_text())["metrics"]["aupro"])
        assert found[0] == found[1] != found[2]

    def test_directories_can_be_named(
        self, wall: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = "--layout folder --normal train/good --anomalous test/scratch --no-pixel-metrics"
        assert cli.main(["evaluate", str(model), str(wall), *options.split()]) == 0
        out = capsys.readouterr().out
        assert "24 normal and 4 anomalous test images" in out
        assert "AUPRO" not in out

    def test_the_current_directory_has_a_name(
        self,
        wall: Path,
        model: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(wall)
        assert cli.main(["evaluate", str(model), ".", "--no-pixel-metrics"]) == 0
        assert f"PatchCore on {wall.name}:" in capsys.readouterr().out

    def test_pictures_of_predict_are_no_defects(
        self, wall: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = tmp_path / "test"
        shutil.copytree(wall / "test", root)
        command = ["predict", str(model), str(root / "good"), str(root / "scratch")]
        assert cli.main([*command, "-o", str(root)]) == 0
        capsys.readouterr()
        assert cli.main(["evaluate", str(model), str(root)]) == 0
        out, err = capsys.readouterr()
        assert "6 normal and 4 anomalous test images" in out
        assert err.count("overlays of predict: 1 (overlays)") == 1

    def test_no_unreadable_image_is_left_out(
        self,
        wall: Path,
        model: Path,
        broken: dict[str, Path],
        tmp_path: Path,
        refused: Refused,
    ) -> None:
        detector = load(model)
        detector.on_error = "skip"
        detector.save(tmp_path / "m")
        root = shutil.copytree(wall / "plain", tmp_path / "plain")
        shutil.copy(broken["text"], root / "good" / "text.png")
        said = refused("evaluate", tmp_path / "m", root, "--no-pixel-metrics")
        assert str(root / "good" / "text.png") in said

    def test_missing_paths_are_named(
        self, wall: Path, model: Path, tmp_path: Path, refused: Refused
    ) -> None:
        said = refused("evaluate", model, tmp_path / "none")
        assert f"{tmp_path / 'none'} is not an existing directory" in said
        said = refused("evaluate", model, wall / "test/good")
        assert f"must be a directory in a known layout, got {wall / 'test/good'}" in said
        assert "such as --normal ok" in said
        said = refused("evaluate", model, wall / "test/good", "--layout", "folder")
        assert f"normal must be an existing directory, got {wall / 'test/good/good'}" in said
        (tmp_path / "file").touch()
        said = refused("evaluate", model, wall, "--json", tmp_path / "file/r.json")
        assert f"cannot write into {tmp_path / 'file'}" in said
        said = refused("evaluate", model, wall, "--layout", "coco")
        assert "invalid choice: 'coco'" in said


class TestProgram:
    def test_help_imports_no_heavy_library(self) -> None:
        code = (
            "import sys; from anomalib_lite import cli\n"
            "try: cli.main(['--help'])\n"
            "except SystemExit as end: assert end.code == 0\n"
            "print(sorted({'torch', 'sklearn', 'numpy', 'scipy', 'PIL'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"
        for command in ("fit", "predict", "evaluate", "demo"):
            assert re.search(rf"^ +{command} +\w", done.stdout, re.MULTILINE)

    @pytest.mark.parametrize("command", ["fit", "predict", "evaluate", "demo"])
    def test_every_command_has_help(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
        assert f"usage: anomalib-lite {command}" in capsys.readouterr().out

    def test_runs_as_a_program(self, tmp_path: Path) -> None:
        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "anomalib_lite.cli", *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        version = run("--version")
        assert (version.returncode, version.stdout) == (
            0,
            f"anomalib-lite {anomalib_lite.__version__}\n",
        )
        wrong = run("fit", str(tmp_path / "none"), "-o", str(tmp_path / "m"))
        assert wrong.returncode == 2
        assert wrong.stderr == f"anomalib-lite: error: fit: {tmp_path / 'none'} does not exist.\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "the following arguments are required: command. See: anomalib-lite --help"),
            (["fitt"], "invalid choice: 'fitt'"),
            (["fit", "there"], "required: -o/--output. See: anomalib-lite fit --help"),
            (["predict", "m", "-o", "x"], "required: IMAGES"),
        ],
    )
    def test_wrong_arguments_are_named(
        self, arguments: list[str], message: str, refused: Refused
    ) -> None:
        assert message in refused(*arguments)
