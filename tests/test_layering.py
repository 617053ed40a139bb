"""Imports point one way, and every file stays one that fits in the head."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import anomalib_lite

PACKAGE = Path(anomalib_lite.__file__).parent
NAME = "anomalib_lite"

# From the bottom to the top; a folder stands for all its modules. A module imports from below,
# and beside itself only what BESIDE lists. Private modules belong to whoever imports them.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("_validation",),
    (
        "images",
        "backbones",
        "fusion",
        "engines",
        "coreset",
        "memory_bank",
        "gaussian",
        "anomaly_map",
        "calibration",
        "synthetic",
        "lora",
        "datasets",
        "metrics",
        "domain_shift",
    ),
    ("detectors",),
    ("evaluation", "persistence", "export", "plotting", "report"),
    ("cli", "demo"),
)
STAGES = LAYERS[2]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
STAGES_BESIDE = {
    ("memory_bank", "coreset"),
    # Normal images come in as they do everywhere.
    ("synthetic", "images"),
    ("lora", "synthetic"),
    ("lora", "backbones"),
    # It goes the way of an image itself, from the file to the embedding, with gradients.
    ("lora", "images"),
    ("lora", "fusion"),
    ("lora", "gaussian"),
    # A backbone gives its maps fused, as the graphs of other engines do, which are made of both.
    ("backbones", "fusion"),
    ("engines", "backbones"),
}
BESIDE = STAGES_BESIDE | {
    ("_graph", "backbones"),
    ("_graph", "fusion"),
    ("_lora_task", "backbones"),
    ("_lora_task", "fusion"),
    ("_lora_task", "gaussian"),
    ("report", "plotting"),
    ("cli", "demo"),
}
# save is a method; what writes files must know all detectors, so it comes after them.
LAZY = {("detectors.base", "save", "persistence")}

TORCH = {
    *("images", "backbones", "fusion", "lora", "export", "coreset", "memory_bank", "gaussian"),
    *("persistence", "detectors.gate_tuning"),
}
FAISS = {"memory_bank", "coreset"}
MOST_LINES = 400


class Import(NamedTuple):
    module: str  # who imports, such as "detectors.base"
    function: str  # inside which function, or ""
    target: str  # what, such as "anomalib_lite.images" or "torch.nn"


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def place_of(module: str) -> str:
    """The name that a module has in LAYERS: its folder, or itself."""
    return module.split(".")[0]


def collect(node: ast.AST, module: str, function: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue  # never run
        if isinstance(child, ast.Import):
            yield from (Import(module, function, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: imports are absolute"
            assert child.module is not None
            for alias in child.names:
                deeper = f"{child.module}.{alias.name}"
                known = deeper.removeprefix(f"{NAME}.") in modules()
                yield Import(module, function, deeper if known else child.module)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from collect(child, module, child.name)
        else:
            yield from collect(child, module, function)


@cache
def modules() -> frozenset[str]:
    return frozenset(module_of(path) for path in files())


@cache
def imports() -> tuple[Import, ...]:
    return tuple(
        found
        for path in files()
        for found in collect(ast.parse(path.read_text("utf-8")), module_of(path), "")
    )


def own_imports() -> list[Import]:
    """Imports of our own modules, their targets without the package's name."""
    prefix = f"{NAME}."
    return [
        i._replace(target=i.target.removeprefix(prefix))
        for i in imports()
        if i.target.startswith(prefix)
    ]


def rank_of(place: str) -> int:
    """Layer of a module; of a private one, the lowest layer among those who import it."""
    if place in RANK:
        return RANK[place]
    importers = {place_of(i.module) for i in own_imports() if place_of(i.target) == place}
    ranks = [rank_of(p) for p in importers - {place, ""}]
    assert ranks, f"nobody imports {place}"
    return min(ranks)


def test_the_reader_of_imports_sees_them() -> None:
    assert Import("detectors.base", "save", "anomalib_lite.persistence") in imports()
    assert Import("memory_bank", "", "anomalib_lite.coreset") in imports()
    assert Import("fusion", "", "torch") in imports()
    assert Import("_faiss_index", "", "faiss") in imports()
    assert rank_of("_device") == rank_of("backbones")


def test_every_module_has_its_place() -> None:
    public = {place_of(m) for m in modules() if m and not place_of(m).startswith("_")}
    assert public <= set(RANK), "say in LAYERS where the new module belongs"
    assert {"images", "backbones", "coreset", "detectors", "persistence"} <= public


def test_imports_point_one_way() -> None:
    wrong = []
    for found in own_imports():
        source, target = place_of(found.module), place_of(found.target)
        if source in ("", target) or (found.module, found.function, target) in LAZY:
            continue
        below = rank_of(target) < rank_of(source)
        shared = rank_of(target) == rank_of(source) and (
            (source, target) in BESIDE or target.startswith("_")
        )
        if not below and not shared:
            wrong.append(f"{found.module} imports {found.target}")
    assert not wrong


def test_errors_stand_alone_and_validation_on_errors() -> None:
    assert {i.target for i in own_imports() if i.module == "errors"} == set()
    assert {i.target for i in own_imports() if i.module == "_validation"} == {"errors"}


def test_stages_do_not_know_each_other_nor_any_detector() -> None:
    for found in own_imports():
        source, target = place_of(found.module), place_of(found.target)
        if source in STAGES and source != target:
            assert target != "detectors"
            assert target not in STAGES or (source, target) in STAGES_BESIDE, found


def test_detectors_write_files_inside_save_alone() -> None:
    to_persistence = {
        (i.module, i.function, i.target)
        for i in own_imports()
        if i.target == "persistence" and place_of(i.module) == "detectors"
    }
    assert to_persistence == LAZY


@pytest.mark.parametrize(("library", "allowed"), [("torch", TORCH), ("faiss", FAISS)])
def test_heavy_libraries_stay_where_they_belong(library: str, allowed: set[str]) -> None:
    importers = {i.module for i in imports() if i.target.split(".")[0] == library}
    assert importers
    for found in own_imports() * len(modules()):  # a private module is part of whoever imports it
        lazily = found.module == "engines" and found.function != ""
        if found.target in importers and found.target.startswith("_") and not lazily:
            importers.add(found.module)
    assert {m for m in importers if not m.startswith("_")} <= allowed


def test_engines_load_torch_only_where_a_function_needs_it() -> None:
    """Where a converted graph is at hand, torch is not imported: see test_engines.py."""
    torch_too = {"torch", "timm", "torchvision", f"{NAME}.backbones", f"{NAME}.fusion"}
    torch_too |= {i.module for i in imports() if i.target == "torch" and not i.function}
    torch_too = {name if "." in name else f"{NAME}.{name}" for name in torch_too} | {
        "torch",
        "timm",
    }
    assert f"{NAME}._graph" in torch_too
    warm = ("engines", "_runtimes", "_cache", "persistence", "detectors.base", "images")
    at_import = {(i.module, i.target) for i in imports() if i.module in warm and not i.function}
    assert not {(module, target) for module, target in at_import if target in torch_too}
    assert any(i.target == f"{NAME}.backbones" and i.module == "engines" for i in imports())


@pytest.mark.parametrize("library", ["pickle", "cloudpickle", "dill", "marshal", "shelve"])
def test_nothing_that_can_run_is_read_or_written(library: str) -> None:
    assert [i for i in imports() if i.target.split(".")[0] == library] == []


def test_files_fit_in_the_head() -> None:
    lines = {module_of(path): len(path.read_text("utf-8").splitlines()) for path in files()}
    assert {m: n for m, n in lines.items() if n > MOST_LINES} == {}


def test_no_file_is_named_for_what_does_not_belong_together() -> None:
    for path in (*files(), *(p for p in PACKAGE.rglob("*") if p.is_dir())):
        assert path.stem.strip("_") not in ("utils", "util", "common", "helpers", "misc")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, anomalib_lite, anomalib_lite.errors\n"
        "assert 'PatchCore' in dir(anomalib_lite)\n"
        "sys.exit(str({'torch', 'timm', 'faiss', 'PIL'} & set(sys.modules) or '') or 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
    metrics = "import sys, anomalib_lite.metrics; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", metrics], check=True, cwd=PACKAGE.parent)


def test_every_public_name_can_be_had() -> None:
    for name in anomalib_lite.__all__:
        assert getattr(anomalib_lite, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'PatchCor'"):
        _ = anomalib_lite.PatchCor  # type: ignore[attr-defined]
