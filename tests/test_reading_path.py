"""How much a reader opens from ``score`` to the search, and from ``fit`` to the coreset."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import faiss
import numpy as np
import pytest
from detector_fixtures import skip_without
from PIL import Image

import anomalib_lite
from anomalib_lite import PatchCore
from anomalib_lite.detectors import patchcore

PACKAGE = str(Path(anomalib_lite.__file__).parent)
MOST_FILES = 6
MOST_FUNCTIONS = 15


class Journey:
    """Our functions, in the order in which they were first entered, in all threads.

    A leaf counts as one function, and whatever it calls does not count. All of ``_validation`` is
    part of the leaf ``_check_parameters``.
    """

    def __init__(self, *leaves: str) -> None:
        self.entered: dict[CodeType, None] = {}
        self.returns: set[str] = set()  # stacks that come back to a file by way of another
        self.leaves, self.arrived = leaves, False
        self.thread = threading.get_ident()

    def watch(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event != "call" or self.arrived or not code.co_filename.startswith(PACKAGE):
            return
        stack = [code]
        while (caller := frame.f_back) is not None:
            frame = caller
            if frame.f_code.co_filename.startswith(PACKAGE):
                stack.append(frame.f_code)
        above = {c.co_name for c in stack[1:]}
        if threading.get_ident() != self.thread:
            above.add("embed_batches")  # which alone starts threads
        if above & set(self.leaves) or (self.leaves and place(code) == "_validation.py"):
            return
        if not code.co_name.startswith("<"):
            self.entered[code] = None
        if code.co_name not in self.leaves:
            self.note_return([place(c) for c in stack])

    def note_return(self, files: list[str]) -> None:
        passed = [f for i, f in enumerate(files) if i == 0 or f != files[i - 1]]
        if len(set(passed)) < len(passed):
            self.returns.add(" <- ".join(passed))

    def __str__(self) -> str:
        return "\n".join(f"{place(code)}: {code.co_qualname}" for code in self.entered)

    def follow(self, go: Callable[[], Any]) -> None:
        profiled, threads_profiled = sys.getprofile(), threading.getprofile()
        threading.setprofile(self.watch)
        sys.setprofile(self.watch)
        try:
            go()
        finally:
            sys.setprofile(profiled)
            threading.setprofile(threads_profiled)  # type: ignore[arg-type]
        assert self.arrived


def place(code: CodeType) -> str:
    return str(Path(code.co_filename).relative_to(PACKAGE))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    pixels = np.random.default_rng(0).integers(90, 140, (6, 48, 80, 3)).astype(np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_six_files_and_fifteen_functions(
    engine: str, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(engine)
    detector = PatchCore(image_size=48, false_alarm_rate=0.5, engine=engine).fit(paths)
    journey, search = Journey(), faiss.knn

    def knn(*args: Any, **kwargs: Any) -> Any:
        journey.arrived = True
        return search(*args, **kwargs)

    monkeypatch.setattr(faiss, "knn", knn)
    journey.follow(lambda: detector.score(paths))
    report = str(journey)
    # The watch is awake in this thread, in those that decode, and up to the end.
    for landmark in ("DetectorMixin.score", "ImageSource.decode", "MemoryBank.search"):
        assert landmark in report
    assert len({code.co_filename for code in journey.entered}) <= MOST_FILES, report
    assert len(journey.entered) <= MOST_FUNCTIONS, report


# What is checked or measured aside: the last is for the threshold of the heatmaps.
SIDE_CHECKS = ("_check_parameters", "device_of", "default_groups", "patch_pixels")


@pytest.mark.parametrize(
    ("leaves", "most_files", "most_functions"),
    [
        # What embeds images is on the way of score too, which is held above. The aim is 9 files and
        # 22 functions; budgets, copies, statistics, ways to calibrate and heatmaps made it longer.
        (("_open_to_fit", "embed_batches"), 10, 32),
        (("open_backbone", "embed", "look"), 13, 40),  # look: in threads, for copies
    ],
)
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_from_fit_to_the_coreset(
    engine: str,
    leaves: tuple[str, ...],
    most_files: int,
    most_functions: int,
    paths: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_without(engine)
    parameters: dict[str, Any] = {"image_size": 48, "false_alarm_rate": 0.5, "engine": engine}
    PatchCore(**parameters).fit(paths)  # so that the graph of the engine is there
    journey, select, detector = (
        Journey(*SIDE_CHECKS, *leaves),
        patchcore.select_coreset,
        PatchCore(**parameters),
    )

    def select_coreset(*args: Any, **kwargs: Any) -> Any:
        journey.arrived = True
        return select(*args, **kwargs)

    monkeypatch.setattr(patchcore, "select_coreset", select_coreset)
    journey.follow(lambda: detector.fit(paths))
    report = str(journey)
    for landmark in ("BaseDetector.fit", "embed_batches", "InMemory.to_fit", "_fit_accumulated"):
        assert landmark in report
    assert not journey.returns
    assert len({code.co_filename for code in journey.entered}) <= most_files, report
    assert len(journey.entered) <= most_functions, report


def test_a_detector_loads_neither_the_cascade_nor_what_its_gate_needs() -> None:
    others = "'anomalib_lite.cascade', 'sklearn.isotonic', 'sklearn.linear_model'"
    code = f"""
import sys
from anomalib_lite import PatchCore
PatchCore()
found = [name for name in sys.modules if name.startswith(({others}))]
sys.exit(str(found) if found else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(PACKAGE).parent)
