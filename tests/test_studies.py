"""Studies: configurations, rows, killed runs, failures, and a new one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_fixtures import DICE, Noise, make_mvtec_ad, write_study

from anomalib_lite.cli import main
from anomalib_lite.errors import InvalidValueError, MissingPathError, OutputError

for package in ("pandas", "pydantic", "yaml", "tabulate", "matplotlib"):
    pytest.importorskip(package, reason="needs the extra benchmarks")

from anomalib_lite.studies import open_study, run_studies, summarize  # noqa: E402
from anomalib_lite.studies._results import Results  # noqa: E402

ROOT = Path(__file__).parents[1]
VOLATILE = ("timestamp",)

# PatchCore on one category: one study, and all that there is to write.
PLATES = """
from anomalib_lite import PatchCore
from anomalib_lite.studies import StudyConfig


class Config(StudyConfig):
    coreset_ratio: float = 0.5


def measure(config, run):
    for case in run.cases(
        {"category": category, "seed": seed} for category in run.categories for seed in run.seeds
    ):
        images = run.open(case["category"], case["seed"])
        detector = PatchCore(
            image_size=64,
            coreset_ratio=config.coreset_ratio,
            false_alarm_rate=0.5,
            random_state=case["seed"],
        )
        yield run.test(run.fit(detector, images.train), images.test)
"""
FAILING = DICE.replace("    for case", "    raise OSError('no cup')\n    for case")
PLATES_YAML = "categories: [mvtec_ad/bottle, mvtec_ad/screw]\n"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "experiments_summary.json").read_text())
    return found


# --- Configurations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("side: 8", r"dice\.yaml: unknown key 'side'\. Did you mean 'sides'\? Known keys: "),
        ("sides: many", r"dice\.yaml: sides: Input should be a valid integer.*got 'many'"),
        ("max_test: 1", r"dice\.yaml: max_test: .* got 1"),
        ("missing: ignore", r"dice\.yaml: missing: .*'skip' or 'refuse'.*got 'ignore'"),
        ("sides: [", r"dice\.yaml: not a YAML file"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path: Path, more: str, says: str) -> None:
    with pytest.raises(InvalidValueError, match=says):
        open_study(write_study(tmp_path, more=more))


def test_an_unknown_key_deeper_down_is_named(tmp_path: Path) -> None:
    code = DICE.replace("import StudyConfig", "import NetworkConfig, StudyConfig").replace(
        "    sides: int", "    nets: dict[str, NetworkConfig] = {}\n    sides: int"
    )
    file = write_study(tmp_path, code, more="nets: {a: {backbone: resnet18, weigths: x}}")
    with pytest.raises(InvalidValueError, match=r"nets\.a: unknown key 'weigths'.*'weights'\?"):
        open_study(file)


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"none\.yaml does not exist"):
        open_study(tmp_path / "none.yaml")
    file = write_study(tmp_path, "def measure(config, run):\n    yield {}\n")
    with pytest.raises(InvalidValueError, match=r"study\.py: must have a class Config"):
        open_study(file)
    file = write_study(tmp_path, DICE.replace("yield", "return"))
    with pytest.raises(InvalidValueError, match=r"measure.*that yields rows"):
        open_study(file)
    (tmp_path / "study.py").unlink()
    with pytest.raises(MissingPathError, match=r"study must be a Python file, got .*study\.py"):
        open_study(file)


def test_an_unknown_category_names_the_closest(tmp_path: Path) -> None:
    file = write_study(tmp_path, more="categories: [mvtec_ad/botle]\n")
    summary = run_studies([file], tmp_path / "out")
    assert "Did you mean 'mvtec_ad/bottle'?" in str(summary.experiments[0].error)


# --- Rows and tables ----------------------------------------------------------------------------


def test_rows_tables_and_the_summary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["benchmark", str(write_study(tmp_path)), "-o", str(out)]) == 0
    rows = rows_of(out / "dice")
    assert len(rows) == 2 * 3 * 2 * 2  # dice, throws, seeds, rows a case
    assert rows[0].items() >= {"die": "red", "throw": 0, "seed": 0, "thrown": 4}.items()
    about = {"seed", "version", "commit", "machine", "cores", "torch", "engine", "dtype"}
    assert all(about | {"weights_sha256"} <= set(row) for row in rows)
    import pandas as pd

    table = pd.read_csv(out / "dice/table.csv", index_col=0)
    assert list(table.index) == ["blue", "red"]
    # Naively, from the rows.
    thrown = {die: [r["thrown"] for r in rows if r["die"] == die] for die in ("red", "blue")}
    assert table.loc["red", "thrown"] == pytest.approx(np.mean(thrown["red"]))
    assert table.loc["blue", "rank"] < table.loc["red", "rank"]
    assert (table["rank_low"] <= table["rank"]).all()
    assert len(pd.read_csv(out / "dice/rows.csv")) == len(rows)
    assert "| blue" in (out / "dice/table.md").read_text()
    summary = summary_of(out)
    assert (summary["total_experiments"], summary["successful"], summary["failed"]) == (1, 1, 0)
    [experiment] = summary["experiments"]
    assert (experiment["name"], experiment["status"]) == ("dice", "success")
    assert Path(experiment["results_file"]).is_file()
    assert experiment["seconds"] > 0
    [log] = out.glob("experiments_run_*.log")
    assert "dice: 12/12 die=blue, throw=2, seed=1" in log.read_text()


def test_half_a_study_is_summarised_over_the_categories_that_all_have() -> None:
    import pandas as pd

    # "a" is better wherever both are measured; it alone has the hard category, without masks.
    cases = [
        *((name, 0, category) for name in "ab" for category in ("easy", "plain")),
        *(("a", 0, "hard"), ("a", 1, "easy"), ("a", 1, "plain"), ("b", 1, "easy")),
    ]
    scores = {"easy": 0.9, "plain": 0.7, "hard": 0.2}
    rows = pd.DataFrame(cases, columns=["method", "seed", "category"])
    better = (rows["method"] == "a") * 0.06 + rows["seed"] * 0.02
    rows["auroc"] = rows["category"].map(scores) + better
    rows["aupro"] = rows["auroc"].where(rows["category"] == "plain")
    rows["f1"] = rows["auroc"].where(rows["method"] == "b")
    table = summarize(rows, "method", ["auroc", "aupro", "f1"])
    assert table.index.tolist() == ["a", "b"]
    assert table["rank"].tolist() == [1, 2]
    assert table["auroc"].tolist() == pytest.approx([0.87, 0.805])
    assert table["aupro"].tolist() == pytest.approx([0.77, 0.7])
    assert table["categories"].tolist() == [2, 2]
    assert table["measured"].tolist() == [3, 2]
    assert table["aupro_categories"].tolist() == [1, 1]
    # Without any value of "a", those of "b" are over its own categories.
    assert np.isnan(table.loc["a", "f1"])
    assert table.loc["b", "f1"] == pytest.approx(0.805)
    # Of "b", one seed alone has both categories.
    assert table.loc["a", "auroc_spread"] == pytest.approx(np.std([0.86, 0.88], ddof=1))
    assert np.isnan(table.loc["b", "auroc_spread"])


def test_nothing_is_compared_without_a_category_in_common() -> None:
    import pandas as pd

    rows = pd.DataFrame({"method": ["a", "b"], "category": ["x", "y"], "seed": 0, "auroc": 0.9})
    table = summarize(rows, "method", ["auroc"])
    assert table[["auroc", "rank"]].isna().all(axis=None)
    assert table["categories"].tolist() == [0, 0]
    assert table["measured"].tolist() == [1, 1]


def test_reported_values_have_a_table_of_their_own(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    (tmp_path / "reported.csv").write_text("die,thrown,source\nred,5.9,a brochure\n")
    run_studies([file], tmp_path / "out")
    assert "5.9" not in (tmp_path / "out/dice/rows.csv").read_text()
    assert "5.9" not in (tmp_path / "out/dice/table.csv").read_text()
    text = (tmp_path / "out/dice/table.md").read_text()
    assert "5.9" in text.split("## Reported elsewhere, not measured here")[1]


def test_a_failing_study_does_not_stop_the_others(tmp_path: Path) -> None:
    code = DICE.replace(
        "        pause(case)", "        if case['throw'] == 1: raise OSError('cup')"
    )
    bad = write_study(tmp_path / "bad", code, "bad")
    good = write_study(tmp_path / "good")
    out = tmp_path / "out"
    assert main(["benchmark", str(bad), str(good), "-o", str(out)]) == 1
    first, second = summary_of(out)["experiments"]
    assert (first["status"], first["error"], first["rows"]) == ("failed", "OSError: cup", 4)
    assert (second["status"], second["rows"]) == ("success", 24)
    [log] = out.glob("*.log")
    assert "Traceback" in log.read_text()


def test_a_row_outside_of_a_case_is_an_error(tmp_path: Path) -> None:
    code = DICE.replace("def measure(config, run):", "def measure(config, run):\n    yield {}")
    summary = run_studies([write_study(tmp_path, code)], tmp_path / "out")
    assert "inside of run.cases" in str(summary.experiments[0].error)


# --- Killed and resumed -------------------------------------------------------------------------


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    file, out = write_study(tmp_path), tmp_path / "out"
    run_studies([file], out)
    before = (out / "dice/rows.jsonl").read_text()
    with pytest.raises(OutputError, match=r"holds results already\. Go on with --resume"):
        run_studies([file], out)
    run_studies([file], out, resume=True)  # nothing is left to measure
    assert (out / "dice/rows.jsonl").read_text() == before


@pytest.mark.parametrize("at", [("red", 0, 0), ("red", 2, 1), ("blue", 1, 0)])
def test_a_stopped_run_gives_equal_rows(
    tmp_path: Path, at: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study(tmp_path)
    run_studies([file], tmp_path / "whole")

    def stop(case: dict[str, Any]) -> None:
        if (case["die"], case["throw"], case["seed"]) == at:
            raise KeyboardInterrupt

    study, out = open_study(file), tmp_path / "out"
    monkeypatch.setattr(study.module, "pause", stop)
    with pytest.raises(KeyboardInterrupt):
        run_studies([study], out)
    assert summary_of(out)["experiments"][0]["status"] == "interrupted"
    assert len(rows_of(out / "dice")) < 24 if (out / "dice/rows.jsonl").exists() else True
    run_studies([file], out, resume=True)
    assert rows_of(out / "dice") == rows_of(tmp_path / "whole/dice")


def test_a_killed_process_gives_equal_rows(tmp_path: Path) -> None:
    code = DICE.replace('"""Tests replace this', 'import time; time.sleep(0.2)\n    """Tests')
    file, out = write_study(tmp_path, code), tmp_path / "out"
    command = [sys.executable, "-m", "anomalib_lite.cli", "benchmark", str(file), "-o", str(out)]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    rows = out / "dice/rows.jsonl"
    while not rows.exists() or rows.read_bytes().count(b"\n") < 4:
        assert running.poll() is None
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert 4 <= len(rows_of(out / "dice")) < 24
    with rows.open("a") as file_:
        file_.write('{"case": "torn, as by a pow')
    run_studies([file], out, resume=True)
    run_studies([file], tmp_path / "whole")
    # The first rows come from another process. It may have been given another number of cores, as
    # by OMP_NUM_THREADS or its affinity; each row says how many there were when it was made.
    resumed, whole = (rows_of(folder) for folder in (out / "dice", tmp_path / "whole/dice"))
    for row in (*resumed, *whole):
        assert row.pop("cores") >= 1
    assert resumed == whole


def test_each_row_says_how_many_cores_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out, there = open_study(write_study(tmp_path)), tmp_path / "out", [100]
    monkeypatch.setattr("anomalib_lite.studies._provenance.n_cores", lambda: there[-1])
    monkeypatch.setattr(study.module, "pause", lambda case: there.append(there[-1] + 1))
    run_studies([study], out)
    # Each of the 12 cases has two rows, before the number changes.
    assert [row["cores"] for row in rows_of(out / "dice")] == [100 + i // 2 for i in range(24)]


def test_rows_hold_what_json_can(tmp_path: Path) -> None:
    results = Results(tmp_path, {"code": "1"}, resume=False)
    row = {"n": np.int64(3), "x": np.float32(0.5), "none": np.nan, "on": np.bool_(True)}
    results.append("a", [row | {"high": np.inf, "path": Path("a/b"), "deep": [np.int64(4)]}])
    [found] = results.read()
    expected = {"n": 3, "x": 0.5, "none": None, "on": True, "high": None, "path": "a/b"}
    assert found == expected | {"deep": [4], "case": "a", "case_rows": 1}


def test_rows_of_half_a_case_are_cut_off(tmp_path: Path) -> None:
    results = Results(tmp_path, {"code": "1"}, resume=False)
    results.append("a", [{"x": 1}, {"x": 2}])
    results.append("b", [{"x": 3}, {"x": 4}])
    lines = results.rows_file.read_bytes().splitlines(keepends=True)
    results.rows_file.write_bytes(b"".join(lines[:3]) + lines[3][:10])
    again = Results(tmp_path, {"code": "1"}, resume=True)
    assert again.finished == {"a"}
    assert [row["x"] for row in again.read()] == [1, 2]


def test_a_run_without_rows_begins_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_studies([write_study(tmp_path, FAILING)], out)
    assert summary_of(out)["failed"] == 1
    run_studies([write_study(tmp_path)], out)  # corrected: no --resume, and no complaint
    assert len(rows_of(out / "dice")) == 24


def test_a_file_that_says_nothing_of_its_rows_is_refused(tmp_path: Path) -> None:
    file, out = write_study(tmp_path), tmp_path / "out"
    run_studies([file], out)
    (out / "dice/run.json").write_text("{")
    with pytest.raises(InvalidValueError, match=r"run\.json is missing or broken"):
        run_studies([file], out, resume=True)


def test_more_seeds_may_follow(tmp_path: Path) -> None:
    file, out = write_study(tmp_path), tmp_path / "out"
    run_studies([file], out, seeds=[0])
    run_studies([file], out, seeds=[0, 1], resume=True)
    assert len(rows_of(out / "dice")) == 24


def test_a_quick_run_takes_few_images_and_the_keys_of_the_study(tmp_path: Path) -> None:
    file, out = write_study(tmp_path, DICE + '\nQUICK = {"throws": 1}\n'), tmp_path / "out"
    study = open_study(file, quick=True)
    assert (study.config.max_train, study.config.max_test, study.config.seeds) == (16, 8, [0])
    assert study.config.throws == 1
    run_studies([file], out, quick=True)
    assert len(rows_of(out / "dice")) == 4
    with pytest.raises(InvalidValueError, match="before the configuration changed"):
        run_studies([file], out, resume=True)  # its rows are no others'


def test_rows_of_others_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write_study(tmp_path), tmp_path / "out"
    run_studies([file], out)
    write_study(tmp_path, more="sides: 8\n")
    with pytest.raises(InvalidValueError, match="before the configuration changed"):
        run_studies([file], out, resume=True)
    write_study(tmp_path, DICE + "\n# Another.\n")
    with pytest.raises(InvalidValueError, match="before the Python file of the study changed"):
        run_studies([file], out, resume=True)
    write_study(tmp_path)
    monkeypatch.setattr("anomalib_lite.studies._runner.source_hash", lambda: "another")
    with pytest.raises(InvalidValueError, match="before the code of anomalib-lite changed"):
        run_studies([file], out, resume=True)


# --- With a detector ------------------------------------------------------------------------------


def test_a_file_beside_a_study_is_part_of_it(tmp_path: Path) -> None:
    code = DICE.replace("class Config", "from .sides import LAST\n\n\nclass Config")
    code = code.replace("% config.sides", "% LAST")
    studies = []
    for name, last in (("one", 2), ("two", 3)):  # both have a file of this name
        studies.append(write_study(tmp_path / name, code, name))
        (tmp_path / name / "sides.py").write_text(f"LAST = {last}")
    out = tmp_path / "out"
    assert run_studies(studies, out, log_level="ERROR").failed == 0
    thrown = [{row["thrown"] for row in rows_of(out / name)} for name in ("one", "two")]
    assert thrown == [{1, 2}, {1, 2, 3}]
    (tmp_path / "one/sides.py").write_text("LAST = 20")
    with pytest.raises(InvalidValueError, match="Python file"):
        run_studies(studies[:1], out, resume=True, log_level="ERROR")


def test_a_file_that_a_study_names_is_part_of_it(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("print(1)")
    code = DICE.replace("class Config", f"SOURCES = [{str(worker)!r}]\n\n\nclass Config")
    study, out = write_study(tmp_path / "study", code), tmp_path / "out"
    assert run_studies([study], out, log_level="ERROR").failed == 0
    assert run_studies([study], out, resume=True, log_level="ERROR").failed == 0
    worker.write_text("print(2)")
    with pytest.raises(InvalidValueError, match="Python file"):
        run_studies([study], out, resume=True, log_level="ERROR")


def test_a_new_study_is_one_file_and_one_configuration(tmp_path: Path) -> None:
    make_mvtec_ad(tmp_path / "data/mvtec_ad", ("bottle",))
    file, out = write_study(tmp_path, PLATES, "plates", PLATES_YAML), tmp_path / "out"
    summary = run_studies([file], out, data_root=tmp_path / "data")
    assert summary.experiments[0].status == "success"
    rows = rows_of(out / "plates")
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        assert row["image_auroc"] > 0.9  # dark squares on plates are plain to see
        assert row["pixel_auroc"] > 0.9
        assert row["n_test"] == 12
        assert len(row["weights_sha256"]) == 16
        assert row["dtype"] == "float32"
    # The other category is not there, and that is said.
    [(name, reason)] = summary.experiments[0].left_out.items()
    assert name == "mvtec_ad/screw"
    assert "screw" in reason
    assert "screw is left out" in next(out.glob("*.log")).read_text()


def test_missing_data_can_be_refused(tmp_path: Path) -> None:
    make_mvtec_ad(tmp_path / "data/mvtec_ad", ("bottle",))
    file = write_study(tmp_path, PLATES, "plates", PLATES_YAML + "missing: refuse\n")
    summary = run_studies([file], tmp_path / "out", data_root=tmp_path / "data")
    assert summary.failed == 1
    assert "screw is not on this machine" in str(summary.experiments[0].error)


def test_changed_images_are_not_mixed(tmp_path: Path) -> None:
    make_mvtec_ad(tmp_path / "data/mvtec_ad", ("bottle", "screw"))
    file, out = write_study(tmp_path, PLATES, "plates", PLATES_YAML), tmp_path / "out"
    run_studies([file], out, data_root=tmp_path / "data")
    good = tmp_path / "data/mvtec_ad/screw/train/good"
    (good / "000.png").write_bytes((good / "001.png").read_bytes())
    summary = run_studies([file], out, data_root=tmp_path / "data", resume=True)
    assert "made before the data changed" in str(summary.experiments[0].error)


def test_noise_has_an_auroc_of_a_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mvtec_ad(tmp_path / "data/mvtec_ad", ("bottle",), n=12)
    file = write_study(tmp_path, PLATES, "plates", "categories: [mvtec_ad/bottle]\n")
    study = open_study(file, seeds=range(40))
    monkeypatch.setattr(study.module, "PatchCore", Noise)
    run_studies([study], tmp_path / "out", data_root=tmp_path / "data")
    rows = rows_of(tmp_path / "out/plates")
    # 24 images: the deviation of one AUROC is 0.12, that of a mean of 40 is 0.02.
    assert abs(np.mean([row["image_auroc"] for row in rows]) - 0.5) < 0.1
    assert all(abs(row["pixel_auroc"] - 0.5) < 0.05 for row in rows)


def test_swapped_labels_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from anomalib_lite.studies import Run

    make_mvtec_ad(tmp_path / "data/mvtec_ad", ("bottle",))
    file = write_study(tmp_path, PLATES, "plates", "categories: [mvtec_ad/bottle]\n")
    run_studies([file], tmp_path / "right", data_root=tmp_path / "data")
    opened = Run.open

    def swapped(self: Run, category: str, seed: int = 0) -> Any:
        images = opened(self, category, seed)
        test = [replace(s, label=1 - s.label, mask_path=None) for s in images.test]
        return replace(images, test=test)

    monkeypatch.setattr(Run, "open", swapped)
    run_studies([file], tmp_path / "wrong", data_root=tmp_path / "data")
    for right, wrong in zip(
        rows_of(tmp_path / "right/plates"), rows_of(tmp_path / "wrong/plates"), strict=True
    ):
        assert wrong["image_auroc"] == pytest.approx(1 - right["image_auroc"])
        assert wrong["pixel_auroc"] is None  # no masks, no number
