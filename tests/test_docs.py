"""Every page runs, shows the true output, has valid links, and lists all public names."""

from __future__ import annotations

import argparse
import doctest
import inspect
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import beta

from anomalib_lite import (
    GatedCascade,
    MahalanobisVFM,
    PaDiM,
    PatchCore,
    ProductRouter,
    SubspaceAD,
    errors,
    load,
    plotting,
)
from anomalib_lite.backbones._timm import default_layers
from anomalib_lite.calibration import calibration_size
from anomalib_lite.cascade.routing import min_anomalies
from anomalib_lite.cli import main
from anomalib_lite.cli._main import make_parser
from anomalib_lite.networks import NETWORKS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, DOCS, EXAMPLES = ROOT / "anomalib_lite", ROOT / "docs", ROOT / "examples"
README = ROOT / "README.md"
PAGES = [*sorted(DOCS.glob("*.md")), *([README] if README.exists() else [])]

# Modules that are described on the page of another module.
TOLD_ELSEWHERE = {
    "cascade": "gated_cascade",
    "demo": "cli",
    "embeddings": "detectors",
    "model_file": "persistence",
    "neighbors": "memory_bank",
    "networks": "backbones",
    "report": "cli",
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NOT_EXECUTED = {"bash", "console", "text"}
NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->$")  # above a block of Python, with the reason


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: with images this small, threads wait longer than they work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


# --- blocks ---------------------------------------------------------------------------------


def blocks(text: str) -> list[tuple[str, str, int]]:
    """Return language, content, and the line before the first, of each fenced block."""
    return [(m[1], m[2], text.count("\n", 0, m.start(2))) for m in FENCE.finditer(text)]


class Page:
    """Runs the Python blocks of a page in one namespace and checks the output of each print."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = path.read_text(encoding="utf-8").splitlines()
        self.namespace = {"__name__": "__main__", "print": self.print}
        self.output = ""  # output of the block that ran last

    def run(self, code: str, offset: int) -> None:
        # The empty lines before it let a traceback name the line of the page.
        compiled = compile("\n" * offset + code, self.path.name, "exec")
        with redirect_stdout(io.StringIO()) as output:
            exec(compiled, self.namespace)
        self.output = output.getvalue()

    def print(self, *values: object) -> None:
        buffer = io.StringIO()
        print(*values, file=buffer)
        print(*values)
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        line = frame.f_back.f_lineno
        _, has_comment, said = self.lines[line - 1].rpartition("  # ")
        if has_comment:
            printed = buffer.getvalue().strip()
            assert says(said, printed), f"{self.path.name}:{line} prints {printed!r}, not {said!r}"


def run_commands(content: str, place: str) -> None:
    """Run the lines ``$ anomalib-lite ...`` and compare the lines below each with its output."""
    commands = re.split(r"^\$ anomalib-lite ", content, flags=re.MULTILINE)[1:]
    for command in commands:
        line, _, expected = command.partition("\n")
        with redirect_stdout(io.StringIO()) as output, redirect_stderr(output):
            main(shlex.split(line))
        check_output(expected, output.getvalue(), place)


def check_output(expected: str, printed: str, place: str) -> None:
    """Compare as doctest does, ``...`` for anything; line breaks count as spaces."""
    expected, printed = " ".join(expected.split()), " ".join(printed.split())
    same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
    assert same, f"{place} says {expected!r}, printed is {printed!r}"


def says(said: str, printed: str) -> bool:
    """Tell whether a comment gives the output: all of it, its beginning, or rounded.

    ``...`` stands for any text, and words after ``": "`` are an explanation.
    """
    said, printed = " ".join(said.split()), " ".join(printed.split())
    for text in (said, said.split(": ")[0]):
        pattern = re.escape(text).replace(re.escape("..."), ".*")
        if re.fullmatch(pattern, printed) or (len(text) > 9 and text in printed):
            return True
        if re.fullmatch(r"-?\d+\.\d+", text) and re.fullmatch(r"-?\d+\.\d+", printed):
            return float(text) == round(float(printed), len(text.split(".")[1]))
    return False


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Page(path)
    python_ends = 0
    for language, content, offset in blocks(path.read_text(encoding="utf-8")):
        place = f"{path.name}:{offset}"
        if language == "python":
            page.run(content, offset)
            python_ends = offset + content.count("\n") + 1
        elif language == "text" and offset == python_ends + 2:  # directly below code: its output
            check_output(content, page.output, place)
        elif language == "py":
            assert NOT_RUN.search(page.lines[offset - 2]), f"{place}: no reason why it is not run"
        else:
            assert language in NOT_EXECUTED, f"{place}: block of {language!r}"
            run_commands(content, place)


def test_says_can_fail() -> None:
    assert says("0.99: the small defect", "0.9912")
    assert says("(400, 600, 3)", "(400, 600, 3)")
    assert says("a list: ['x', ...", "a list: ['x', 'y']")
    assert not says("0.99", "0.9812")
    assert not says("True", "False")
    assert not says("[4, 5]", "[4, 5, 6]")
    assert not says("1", "10")


def test_a_wrong_comment_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```python\nx = 1\nprint(x)  # 2\n```\n", encoding="utf-8")
    [(language, content, offset)] = blocks(page.read_text(encoding="utf-8"))
    assert language == "python"
    with pytest.raises(AssertionError, match=r"page.md:5 prints '1', not '2'"):
        Page(page).run(content, offset)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_fences_are_closed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(text))


# --- links and places -----------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links(path: Path) -> None:
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target) if target else path
        assert file.exists(), f"{path.name} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(file), f"{path.name} links to {link}: no such heading"


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes from a page's headings."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_absolute_paths(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.~/:>-])/(?:[a-z]\w+)/\S*|\b[A-Z]:\\\S*", text)


def test_each_module_has_its_page() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    modules |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    public = {TOLD_ELSEWHERE.get(name, name) for name in modules if not name.startswith("_")}
    no_module = {"index", "quickstart", "options", "benchmarks", "scaling", "speed"}
    no_module |= {"foreground", "position_window"}  # parameters of PatchCore
    pages = {path.stem for path in DOCS.glob("*.md")} - no_module
    assert public - pages == set()
    inner = {path.stem for path in PACKAGE.glob("*/*.py") if not path.name.startswith("_")}
    assert pages - public - inner == set(), "a page without a module"


def test_index_lists_each_page_once() -> None:
    links = LINK.findall((DOCS / "index.md").read_text(encoding="utf-8"))
    rows = [link for link in links if link.endswith(".md") and link != "quickstart.md"]
    pages = {path.name for path in DOCS.glob("*.md")} - {"index.md", "quickstart.md"}
    assert sorted(rows) == sorted(pages)


# --- what pages say about the code ------------------------------------------------------------


def table(page: str, first_cell: str) -> list[list[str]]:
    """Return the rows of the table whose head begins with this cell, without backquotes."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    assert rows
    return rows


def test_default_layers() -> None:
    for name, layers, n_features, pixels in table("backbones.md", "backbone"):
        with torch.device("meta"):  # only the structure
            timm_name = NETWORKS[name].timm if name in NETWORKS else name
            network = timm.create_model(timm_name, features_only=True)
        info = network.feature_info.info
        chosen = [stage for stage in info if stage["module"] in default_layers(info, (8, 16))]
        assert [stage["module"] for stage in chosen] == layers.split(", "), name
        assert sum(stage["num_chs"] for stage in chosen) == int(n_features), name
        assert min(stage["reduction"] for stage in chosen) == int(pixels), name


def test_short_names() -> None:
    rows = table("backbones.md", "short name")
    assert [name for name, *_ in rows] == list(NETWORKS)
    for name, *cells in rows:
        figures = NETWORKS[name]
        numbers = [f"{figures.millions:.1f}", str(figures.n_features), str(figures.image_size)]
        gflops = f"{figures.gflops:.3g}"
        assert cells == [figures.timm, *numbers, gflops, figures.speed, figures.licence], name


def test_numbers_of_images() -> None:
    for row in table("calibration.md", "`false_alarm_rate`"):
        rate, held_back, images, leave_one_out = (float(cell) for cell in row[:4])
        n = calibration_size(rate)
        assert held_back == leave_one_out == n
        assert calibration_size(rate, int(images)) == n
        assert calibration_size(rate, int(images) - 1) < n
        # The rate that follows is Beta(n + 1 - k, k) with k = n: see conformal_threshold.
        percent = float(row[4].removesuffix("%"))
        digits = len(row[4].removesuffix("%").strip().partition(".")[2])
        assert percent == round(100 * beta(1, n).ppf(0.95), digits)


def test_numbers_of_anomalies() -> None:
    for max_missed, labelled in table("gated_cascade.md", "`max_missed`"):
        assert int(labelled) == 2 * min_anomalies(float(max_missed))


@pytest.mark.parametrize(
    "detector", [PatchCore, PaDiM, MahalanobisVFM, SubspaceAD, GatedCascade, ProductRouter]
)
def test_every_parameter_is_explained(detector: Any) -> None:
    others = {GatedCascade: "gated_cascade.md", ProductRouter: "router.md"}
    page = others.get(detector, "detectors.md")
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, parameter in inspect.signature(detector).parameters.items():
        default = parameter.default
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        shown = f"{default:,}" if name == "max_pixels" else shown
        assert f"`{name}` ({shown})" in text, f"{name} with its default {shown}"


def test_every_error_is_listed() -> None:
    listed = {row[0]: row[1] for row in table("errors.md", "class")}
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    for name in errors.__all__:
        assert f"`{name}`" in text
    for name, parents in listed.items():
        bases = {base.__name__ for base in getattr(errors, name).__mro__[1:]}
        for parent in parents.replace("scikit-learn's ", "").split(", "):
            assert not parent or parent in bases, f"{name} is no {parent}"


def test_every_picture_is_shown() -> None:
    text = (DOCS / "plotting.md").read_text(encoding="utf-8")
    for name in plotting.__all__:
        assert name == "SCALE" or f"{name}(" in text or f"`{name}`" in text


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = make_parser()._actions
    [commands] = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return dict(commands.choices)


def test_every_option_is_explained() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, parser in subcommands().items():
        assert f"\n## {name}\n" in text
        for option in parser._option_string_actions:
            if option.startswith("--") and option not in {"--help", "--output"}:
                assert re.search(rf"{option}\b", text), f"{name} {option}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_is_understood(path: Path) -> None:
    """Check also commands that are not run, as they need the reader's images or an extra."""
    for language, content, _ in blocks(path.read_text(encoding="utf-8")):
        if language in {"bash", "console"}:
            for line in re.findall(r"^(?:\$ |\S*/)?anomalib-lite (.+)$", content, re.MULTILINE):
                make_parser().parse_args(shlex.split(line, comments=True))


# --- examples ---------------------------------------------------------------------------------

WORDS = {
    "own_folder.py": ["fitted; threshold", "038.png", "2 of 4 images are anomalous"],
    "own_embeddings.py": ["memory bank   AUROC 0.9", "PatchCore     AUROC 0.9", "of 54"],
    "camera_loop.py": ["frame 4: ANOMALOUS", "frame 9: ANOMALOUS", "measured here: median"],
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Any]]]:
    """Start all examples at once, each in its own process and empty directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    processes = {}
    for name in WORDS:
        directory = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, cwd=directory, env=environment
        )
        processes[name] = directory, process
    yield processes
    for _, process in processes.values():  # processes that no test waited for
        process.kill()
        process.communicate()


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix} == set(WORDS)


@pytest.mark.parametrize("name", sorted(WORDS))
def test_example(name: str, started: dict[str, tuple[Path, Any]]) -> None:
    directory, process = started[name]
    output, errors_shown = process.communicate(timeout=120)
    assert process.returncode == 0, errors_shown
    for words in WORDS[name]:
        assert words in output
    assert errors_shown == ""
    assert list(directory.iterdir()) == [], "an example leaves files behind"


def test_own_folder_takes_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("good", "new"):
        Path(folder).mkdir()
        for i in range(8):
            pixels = rng.integers(90, 150, (64, 80), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{i}.png")
    options = "--image-size 64 --false-alarm-rate 0.2 --model part.safetensors"
    monkeypatch.setattr(sys, "argv", ["own_folder.py", "good", "new", *options.split()])
    runpy.run_path(str(EXAMPLES / "own_folder.py"), run_name="__main__")
    assert "of 8 images are anomalous" in capsys.readouterr().out
    assert load("part.safetensors").false_alarm_rate == 0.2
