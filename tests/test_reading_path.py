"""What a reader opens on the way of an image: from score to the search, from fit to the coreset."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import faiss
import numpy as np
import pytest
from PIL import Image

import anomalib_lite
from anomalib_lite import PatchCore
from anomalib_lite.detectors import patchcore

PACKAGE = str(Path(anomalib_lite.__file__).parent)
# Doors on the way of fit, each with a way of its own behind it: a reader need not open them.
DOORS = (
    "open_backbone",
    "embed",
    "_check_parameters",
    "_check_image_parameters",
    "refuse_labelled",
)


def is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


def stack_of(frame: FrameType | None) -> list[FrameType]:
    """Our frames, the innermost first."""
    frames = []
    while frame is not None:
        if is_ours(frame):
            frames.append(frame)
        frame = frame.f_back
    return frames


class Journey:
    """Our functions, in the order in which they were first entered, in all threads."""

    def __init__(self, doors: tuple[str, ...] = ()) -> None:
        self.doors = doors
        self.entered: dict[CodeType, None] = {}
        self.returns: set[str] = set()
        self.arrived = False

    def watch(self, frame: FrameType, event: str, arg: Any) -> None:
        if event != "call" or self.arrived or not is_ours(frame):
            return
        stack = stack_of(frame)
        if any(f.f_code.co_name in self.doors for f in stack[bool(self.doors) :]):
            return  # behind a door
        if not frame.f_code.co_name.startswith("<") and frame.f_code.co_name not in self.doors:
            self.entered[frame.f_code] = None
            self._look_for_returns(stack)

    def _look_for_returns(self, stack: list[FrameType]) -> None:
        """Note a file that is entered again from a file that it has called."""
        files = [f.f_code.co_filename for f in stack]
        blocks = [file for i, file in enumerate(files) if i == 0 or file != files[i - 1]]
        if len(set(blocks)) < len(blocks):
            self.returns.add(" <- ".join(Path(f).relative_to(PACKAGE).as_posix() for f in blocks))

    @property
    def files(self) -> set[str]:
        return {code.co_filename for code in self.entered}

    @property
    def report(self) -> str:
        return "\n".join(
            f"{Path(code.co_filename).relative_to(PACKAGE)}: {code.co_qualname}"
            for code in self.entered
        )


@contextmanager
def watching(journey: Journey) -> Iterator[None]:
    profiled, threads_profiled = sys.getprofile(), threading.getprofile()
    threading.setprofile(journey.watch)
    sys.setprofile(journey.watch)
    try:
        yield
    finally:
        sys.setprofile(profiled)
        threading.setprofile(threads_profiled)  # type: ignore[arg-type]


def ending(journey: Journey, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which ends the journey when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        journey.arrived = True
        return function(*args, **kwargs)

    return call


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    pixels = np.random.default_rng(0).integers(90, 140, (6, 48, 80, 3)).astype(np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(path)
    return files


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_score_to_search_is_six_files_and_fifteen_functions(
    engine: str, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = PatchCore(image_size=48, false_alarm_rate=0.5, engine=engine).fit(paths)
    journey = Journey()
    monkeypatch.setattr(faiss, "knn", ending(journey, faiss.knn))
    with watching(journey):
        detector.score(paths)
    assert journey.arrived
    # The watch is awake in this thread, in those that decode, and up to the end.
    for landmark in ("DetectorMixin.score", "ImageSource.decode", "MemoryBank.search"):
        assert landmark in journey.report
    assert len(journey.files) <= 6, journey.report
    assert len(journey.entered) <= 15, journey.report


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_fit_to_coreset_is_nine_files_and_enters_none_twice(
    engine: str, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = PatchCore(image_size=48, false_alarm_rate=0.5, engine=engine)
    journey = Journey(DOORS)
    monkeypatch.setattr(patchcore, "select_coreset", ending(journey, patchcore.select_coreset))
    with watching(journey):
        detector.fit(paths)
    assert journey.arrived
    for landmark in ("BaseDetector._fit_shards", "ImageSource.decode", "_fit_accumulated"):
        assert landmark in journey.report
    assert journey.returns == set()
    assert len(journey.files) <= 9, journey.report
    assert len(journey.entered) <= 25, journey.report
