"""How much a reader opens between ``PatchCore.score(paths)`` and the search for neighbours."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import faiss
import numpy as np
import pytest
from PIL import Image

import anomalib_lite
from anomalib_lite import PatchCore

PACKAGE = str(Path(anomalib_lite.__file__).parent)
MOST_FILES = 6
MOST_FUNCTIONS = 15


class Journey:
    """Our functions, in the order in which they were first entered, in all threads."""

    def __init__(self) -> None:
        self.entered: dict[CodeType, None] = {}
        self.arrived = False

    def watch(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        ours = code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<")
        if event == "call" and ours and not self.arrived:
            self.entered[code] = None


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_six_files_and_fifteen_functions(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(90, 140, (6, 48, 80, 3)).astype(np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    detector = PatchCore(image_size=48, false_alarm_rate=0.5, engine=engine).fit(paths)
    journey, search = Journey(), faiss.knn

    def knn(*args: Any, **kwargs: Any) -> Any:
        journey.arrived = True
        return search(*args, **kwargs)

    monkeypatch.setattr(faiss, "knn", knn)
    profiled, threads_profiled = sys.getprofile(), threading.getprofile()
    threading.setprofile(journey.watch)
    sys.setprofile(journey.watch)
    try:
        detector.score(paths)
    finally:
        sys.setprofile(profiled)
        threading.setprofile(threads_profiled)  # type: ignore[arg-type]
    assert journey.arrived
    report = "\n".join(
        f"{Path(code.co_filename).relative_to(PACKAGE)}: {code.co_qualname}"
        for code in journey.entered
    )
    # The watch is awake in this thread, in those that decode, and up to the end.
    for landmark in ("DetectorMixin.score", "ImageSource.decode", "MemoryBank.search"):
        assert landmark in report
    assert len({code.co_filename for code in journey.entered}) <= MOST_FILES, report
    assert len(journey.entered) <= MOST_FUNCTIONS, report
