"""Fixtures that several test files share."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_fixtures import broken, model, refused, wall

__all__ = ["broken", "data_dir", "model", "refused", "wall"]

# Converted graphs of these tests, also of those in docstrings, are no business of the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="anomalib-lite-", ignore_cleanup_errors=True)
os.environ["ANOMALIB_LITE_CACHE"] = _CACHE.name

# device="auto" is the CPU for all tests, docstrings and pages, also where there is a GPU: what they
# compare is computed in float32, and on the CPU. Those that ask for "cuda" by name are run with
# ANOMALIB_LITE_TEST_GPU=1 pytest -k cuda, and are skipped without.
if not os.environ.get("ANOMALIB_LITE_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Nor are the user's weights.
os.environ.pop("ANOMALIB_LITE_WEIGHTS", None)

_DEFAULT = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="run the files, and the tests of each, shuffled"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle if asked to. A file stays together, so that its fixtures are made once."""
    seed = config.getoption("--shuffle")
    if seed is None:
        return
    shuffled = random.Random(seed)
    files = sorted({item.path for item in items})
    place = dict(zip(files, shuffled.sample(range(len(files)), len(files)), strict=True))
    shuffled.shuffle(items)
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real photographs; tests that need it are skipped where it is absent."""
    path = Path(os.environ.get("ANOMALIB_LITE_DATA") or _DEFAULT)
    if not path.is_dir():
        pytest.skip(f"no folder of real photographs at {path}: set ANOMALIB_LITE_DATA")
    return path


@pytest.fixture(autouse=True)
def _no_idle_workers() -> Iterator[None]:
    """End joblib's processes after each test that started some.

    After minutes of idling they end by themselves, and joblib warns of it in a thread of its own,
    where a warning that is an error would leave the next test waiting for ever.
    """
    yield
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    if loky is not None and loky._executor is not None:
        loky.get_reusable_executor().shutdown(wait=True)
