"""Images, a model and commands that fail, for all tests of the command line."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from skimage.draw import line

from anomalib_lite import cli

Refused = Callable[..., str]

FAST = ["--image-size", "64", "--coreset-ratio", "0.2", "--false-alarm-rate", "0.2"]


def read(path: Path) -> list[dict[str, str]]:
    """Read a table."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def tiles(photo: np.ndarray) -> list[np.ndarray]:
    """Cut a photograph into pieces of 64 x 96 pixels."""
    return [photo[y : y + 64, x : x + 96] for y in range(0, 512, 64) for x in range(0, 480, 96)]


def scratched(tile: np.ndarray) -> np.ndarray:
    tile = tile.copy()
    rows, columns = line(12, 15, 44, 80)
    for offset in range(3):
        tile[rows + offset, columns] = 255
    return tile


def save(tile: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tile).save(path)
    return path


@pytest.fixture(scope="session")
def wall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A brick wall in the layout of MVTec AD, and the same test images in the folder layout."""
    root = tmp_path_factory.mktemp("wall")
    pieces = tiles(skimage.data.brick())
    for i, tile in enumerate(pieces[:24]):
        save(tile, root / "train/good" / f"{i:03d}.jpg")
    for i, tile in enumerate(pieces[24:30]):
        save(tile, root / "test/good" / f"{i:03d}.png")
    for i, tile in enumerate(pieces[30:34]):
        save(scratched(tile), root / "test/scratch" / f"{i:03d}.png")
        mask = scratched(np.zeros_like(tile))
        save(mask, root / "ground_truth/scratch" / f"{i:03d}_mask.png")
    shutil.copytree(root / "test", root / "plain")
    shutil.copytree(root / "ground_truth", root / "plain/ground_truth")
    return root


@pytest.fixture(scope="session")
def model(wall: Path) -> Path:
    path = wall / "models" / "wall.safetensors"
    assert cli.main(["fit", str(wall / "train/good"), "-o", str(path), *FAST]) == 0
    return path


@pytest.fixture
def broken(tmp_path: Path, wall: Path) -> dict[str, Path]:
    """Files that cannot be used as images, by what is wrong with them."""
    folder = tmp_path / "broken"
    whole = (wall / "train/good/000.jpg").read_bytes()
    save(np.zeros((1, 1), np.uint8), folder / "1x1.png")
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail, and return the one line that it prints."""

    def run(*arguments: object) -> str:
        assert cli.main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("anomalib-lite: error: ")
        return err

    return run
