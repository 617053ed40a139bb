"""The rules of the house: who imports whom, what is loaded when, and how large things are."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import anomalib_lite

PACKAGE = Path(anomalib_lite.__file__).parent
INDEX = PACKAGE.parent / "docs" / "index.md"
NAME = "anomalib_lite"

# From the bottom to the top; a folder stands for all its files. A file imports from floors below,
# and from its own floor what BESIDE lists. docs/index.md has the same as a picture.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors", "_threads"),
    ("_validation", "_files", "_device", "networks", "model_file"),
    (
        *("images", "fusion", "backbones", "engines"),
        *("neighbors", "coreset", "memory_bank", "gaussian", "subspace"),
        *("anomaly_map", "calibration"),
        *("synthetic", "lora", "datasets", "metrics", "domain_shift"),
    ),
    ("detectors",),
    ("cascade",),
    ("persistence", "evaluation", "plotting", "report", "studies"),
    ("__init__", "demo", "cli"),
)
BESIDE = {
    ("_device", "_validation"),
    ("model_file", "_files"),
    ("fusion", "gaussian"),
    ("backbones", "fusion"),
    ("engines", "backbones"),
    ("engines", "fusion"),
    ("coreset", "neighbors"),
    ("memory_bank", "coreset"),
    ("memory_bank", "neighbors"),
    ("subspace", "gaussian"),
    ("synthetic", "images"),
    ("lora", "images"),
    ("lora", "fusion"),
    ("lora", "backbones"),
    ("lora", "gaussian"),
    ("lora", "synthetic"),
    ("datasets", "images"),
    ("domain_shift", "images"),
    ("domain_shift", "backbones"),
    ("report", "evaluation"),
    ("report", "plotting"),
    ("studies", "evaluation"),
    ("cli", "__init__"),
    ("cli", "demo"),
}
# Where torch is loaded with the file; elsewhere only inside functions.
TORCH_HOMES = (
    *("backbones", "lora"),
    *("neighbors.torch_index", "engines._conversion", "cascade._finetuning"),
)

# --- The reader -----------------------------------------------------------------------------


class Import(NamedTuple):
    module: str  # who imports, such as "detectors.base"; the face is "__init__"
    when: str  # "start" (with the file), "late" (inside a function) or "type" (never run)
    target: str  # what, such as "images" (one of ours), or "torch.nn"
    is_own: bool = True


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "__init__"


@cache
def files() -> dict[str, Path]:
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(files()[module].read_text("utf-8"))


def place_of(module: str) -> str:
    """Return the name that a module has in FLOORS: its folder, or itself."""
    return module.split(".")[0]


def folder_of(module: str) -> str:
    is_folder = files()[module].name == "__init__.py"
    return module if is_folder and module != "__init__" else module.rpartition(".")[0]


def is_private(module: str) -> bool:
    name = module.rpartition(".")[2]
    return name.startswith("_") and not name.startswith("__")


def targets_of(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, "imports are absolute"
    assert node.module is not None
    for alias in node.names:
        deeper = f"{node.module}.{alias.name}"
        yield deeper if deeper.removeprefix(f"{NAME}.") in files() else node.module


def read(node: ast.AST, module: str, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            for target in targets_of(child):
                own = target.removeprefix(f"{NAME}.") if target != NAME else "__init__"
                yield Import(module, when, own, is_own=target.split(".")[0] == NAME)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from read(child, module, "type")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and when != "type":
            yield from read(child, module, "late")
        else:
            yield from read(child, module, when)


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module in files() for found in read(tree_of(module), module, "start"))


def own() -> list[Import]:
    return [found for found in imports() if found.is_own]


def others(*libraries: str) -> list[Import]:
    return [i for i in imports() if not i.is_own and i.target.startswith(libraries)]


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return the first circle found, which ends where it begins; nothing if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def lines_of_code(module: str) -> set[int]:
    """Return the numbers of the lines that hold code: no comments, docstrings or blank lines."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    text = files()[module].read_text("utf-8")
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in nothing and token.string
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(tree_of(module)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def test_the_reader_sees_every_kind_of_import() -> None:
    assert Import("memory_bank", "start", "coreset") in imports()
    assert Import("backbones._backbone", "start", "torch", is_own=False) in imports()
    assert Import("neighbors.faiss_index", "start", "faiss", is_own=False) in imports()  # in a with
    assert Import("model_file", "late", "torch", is_own=False) in imports()
    assert Import("__init__", "type", "cascade") in imports()
    assert Import("engines._compiled", "start", "engines._cache") in imports()  # a file as a name
    assert Import("coreset", "start", "coreset._selection") in imports()
    assert folder_of("coreset") == folder_of("coreset._selection") == "coreset"
    assert folder_of("calibration") == folder_of("__init__") == ""


def test_the_reader_finds_circles_and_counts_lines() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    circle = circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    assert circle[0] == circle[-1]
    assert set(circle) == {"b", "c"}
    assert lines_of_code("_version") == {3}


# --- Who imports whom -----------------------------------------------------------------------


def test_no_imports_go_in_circles() -> None:
    """Also those inside functions, and those for types alone."""
    graph: dict[str, set[str]] = {module: set() for module in files()}
    for found in own():
        graph[found.module].add(found.target)
    assert circle_in(graph) == []


def test_every_file_has_its_floor() -> None:
    listed = [name for floor in FLOORS for name in floor]
    assert sorted(listed) == sorted({place_of(module) for module in files()})


def test_imports_come_from_floors_below_or_are_listed() -> None:
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong, beside = set(), set()
    for found in own():
        edge = place_of(found.module), place_of(found.target)
        if floor_of[edge[0]] == floor_of[edge[1]] and edge[0] != edge[1]:
            beside.add(edge)
        elif floor_of[edge[0]] < floor_of[edge[1]]:
            wrong.add((found.module, found.target))
    assert not wrong, "these look upwards"
    assert beside - BESIDE == set(), "these are not listed"
    assert BESIDE - beside == set(), "these are listed, and nobody needs them"


def test_a_private_file_is_imported_by_its_own_folder_alone() -> None:
    assert not [
        f"{i.module} imports {i.target}"
        for i in own()
        if is_private(i.target) and folder_of(i.target) not in ("", folder_of(i.module))
    ]


def test_a_private_file_at_the_top_serves_several() -> None:
    for private in filter(is_private, (name for floor in FLOORS for name in floor)):
        assert len({place_of(i.module) for i in own() if i.target == private}) > 1, private


def test_the_face_is_known_to_the_command_line_alone() -> None:
    assert {place_of(i.module) for i in own() if i.target == "__init__"} <= {"cli"}


def test_the_files_of_folders_hold_imports_alone() -> None:
    for module, path in files().items():
        if path.name == "__init__.py" and module != "__init__":
            first, *rest = tree_of(module).body
            assert isinstance(first, ast.Expr), f"{module} says in a docstring what it holds"
            kinds = {type(node) for node in rest if ast.unparse(node)[:7] != "__all__"}
            assert kinds <= {ast.Import, ast.ImportFrom}, module


# --- What is loaded, and when ---------------------------------------------------------------


def test_faiss_is_at_home_among_the_neighbors() -> None:
    assert {place_of(i.module) for i in others("faiss")} == {"neighbors"}


def test_torch_is_loaded_with_its_homes_alone() -> None:
    found = {i.module for i in others("torch", "timm", "safetensors.torch") if i.when == "start"}
    assert found
    for _ in files():  # who imports such a file with itself loads torch too
        found |= {i.module for i in own() if i.when == "start" and i.target in found}
    homes = tuple(f"{home}." for home in TORCH_HOMES)
    assert sorted(module for module in found if not f"{module}.".startswith(homes)) == []


def loaded_by(code: str) -> set[str]:
    """Return the modules that a new process has loaded after it ran this code."""
    code += "; import sys; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import anomalib_lite, anomalib_lite.errors; dir(anomalib_lite)")
    assert "anomalib_lite.errors" in loaded
    assert not loaded & {"torch", "timm", "faiss", "PIL", "matplotlib"}


def test_a_detector_loads_neither_torch_nor_the_cascade() -> None:
    loaded = loaded_by("from anomalib_lite import PatchCore")
    assert "anomalib_lite.detectors.patchcore" in loaded
    assert not loaded & {"torch", "timm", "anomalib_lite.cascade", "matplotlib"}
    assert not loaded & {"sklearn.isotonic", "sklearn.linear_model._logistic"}


@pytest.mark.parametrize("library", ["pickle", "cloudpickle", "dill", "marshal", "shelve"])
def test_nothing_that_can_run_is_read_or_written(library: str) -> None:
    assert others(library) == []


def test_torch_reads_weights_alone() -> None:
    nodes = [node for module in files() for node in ast.walk(tree_of(module))]
    calls = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call)]
    loads = [call for call in calls if call.startswith("torch.load(")]
    assert loads
    assert all("weights_only=True" in call for call in loads)
    assert not [call for call in calls if "allow_pickle" in call]


def test_every_public_name_can_be_had() -> None:
    for name in anomalib_lite.__all__:
        assert getattr(anomalib_lite, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'PatchCor'"):
        _ = anomalib_lite.PatchCor  # type: ignore[attr-defined]


# --- How large ------------------------------------------------------------------------------


def test_the_top_of_the_package_fits_on_a_page() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 35
    assert len([name for name in entries if is_private(Path(name).stem)]) <= 6


def test_files_have_at_most_400_lines_of_code() -> None:
    lines = {module: len(lines_of_code(module)) for module in files()}
    assert {module: n for module, n in lines.items() if n > 400} == {}


def only_stores(function: Any) -> bool:
    """Tell whether a constructor does nothing but ``self.name = name``."""
    body = function.body[ast.get_docstring(function) is not None :]
    return function.name == "__init__" and all(
        re.fullmatch(r"self\.(\w+) = \1", ast.unparse(statement)) for statement in body
    )


def test_functions_have_at_most_50_lines_of_code() -> None:
    long = {}
    for module in files():
        code = lines_of_code(module)
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not only_stores(node):
                n = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
                if n > 50:
                    long[f"{module}.{node.name}"] = n
    assert long == {}


def test_no_file_is_named_utils_or_the_like() -> None:
    for path in PACKAGE.rglob("*"):
        assert path.stem.strip("_") not in ("utils", "util", "common", "helpers", "helper", "misc")


# --- The picture ----------------------------------------------------------------------------


def picture() -> str:
    """Return the picture of the house in docs/index.md: the first block after its heading."""
    return INDEX.read_text("utf-8").split("\n## The house\n")[1].split("```")[1]


def test_the_picture_shows_every_file_on_its_floor() -> None:
    floors: list[list[str]] = []
    for line in picture().splitlines():
        floors += [[] for _ in re.findall(r"^\d", line)]
        for name in re.findall(r"(\w+)(?:\.py|/)(?= |$)", line):
            assert (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file(), name
            floors[-1].append(name)
    assert [sorted(floor) for floor in reversed(floors)] == [sorted(floor) for floor in FLOORS]


def test_the_picture_shows_who_imports_whom_on_a_floor() -> None:
    drawn = re.findall(r"^ +(\w+) +-> +(\w+(?:, \w+)*)$", picture(), re.MULTILINE)
    assert {(source, target) for source, many in drawn for target in many.split(", ")} == BESIDE
