"""Miniatures of data sets, and studies of a few lines, for the tests of studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DICE = '''
"""Which die throws higher? The number of the throw is all there is."""
from anomalib_lite.studies import StudyConfig

COMPARED, METRICS, OVER = "die", ("thrown",), "throw"


class Config(StudyConfig):
    sides: int = 20
    throws: int = 3
    fail_at: int = -1


def measure(config, run):
    for case in run.cases(
        {"die": die, "throw": throw, "seed": seed}
        for die in ("red", "blue")
        for throw in range(config.throws)
        for seed in run.seeds
    ):
        yield {"thrown": (case["throw"] + case["seed"] + len(case["die"])) % config.sides + 1}
        yield {"thrown": case["throw"] % config.sides + 1}
        pause(case)


def pause(case):
    """Tests replace this, to stop between two rows of a case and the next."""
'''


def write_study(folder: Path, code: str = DICE, name: str = "dice", more: str = "") -> Path:
    """Write a study and its configuration, and return the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.py").write_text(code)
    file = folder / f"{name}.yaml"
    file.write_text(f"study: study.py\nname: {name}\nseeds: [0, 1]\n{more}")
    return file


def photo(random: np.random.RandomState, share: float = 1.0) -> Image.Image:
    """A gray plate of noise, 48 wide and 40 high; a defect has this share of the light."""
    pixels = random.randint(110, 146, (40, 48, 3)).astype(np.uint8)
    pixels[12:28, 16:32] = pixels[12:28, 16:32] * share
    return Image.fromarray(pixels)


def light(number: int) -> float:
    """Defects of every other category are plain to see; the others are not."""
    return 0.97 if number % 2 else 0.25


def mask() -> Image.Image:
    truth = np.zeros((40, 48), np.uint8)
    truth[12:28, 16:32] = 255
    return Image.fromarray(truth)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def make_mvtec_ad(root: Path, categories: tuple[str, ...], n: int = 6) -> None:
    """Write categories in MVTec AD's layout: n normal images to fit on, n of each to test."""
    for number, name in enumerate(categories):
        random, home = np.random.RandomState(number), root / name
        for i in range(n):
            save(photo(random), home / "train/good" / f"{i:03d}.png")
            save(photo(random), home / "test/good" / f"{i:03d}.png")
            save(photo(random, light(number)), home / "test/dark" / f"{i:03d}.png")
            save(mask(), home / "ground_truth/dark" / f"{i:03d}_mask.png")


def make_visa(root: Path, categories: tuple[str, ...], n: int = 6) -> None:
    """Write categories in VisA's layout, likewise."""
    lines = ["object,split,label,image,mask"]
    for number, name in enumerate(categories):
        random, place = np.random.RandomState(100 + number), f"{name}/Data"
        for i in range(2 * n):
            image = f"{place}/Images/Normal/{i:04d}.JPG"
            save(photo(random), root / image)
            lines.append(f"{name},{'train' if i < n else 'test'},normal,{image},")
        for i in range(n):
            image, truth = f"{place}/Images/Anomaly/{i:03d}.JPG", f"{place}/Masks/{i:03d}.png"
            save(photo(random, light(number)), root / image)
            save(mask(), root / truth)
            lines.append(f"{name},test,anomaly,{image},{truth}")
    (root / "split_csv").mkdir(parents=True)
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")


class Noise:
    """A detector that knows nothing."""

    threshold_ = 0.5

    def __init__(self, **parameters: Any) -> None:
        self.random = np.random.RandomState(parameters["random_state"])

    def fit(self, images: Any) -> Noise:
        return self

    def detect(self, images: Any, **_: Any) -> Any:
        from anomalib_lite.detectors import Detections

        scores = self.random.rand(len(images)).astype(np.float32)
        maps = self.random.rand(len(images), 40, 48).astype(np.float32)
        return Detections(scores, scores > 0.5, maps, [str(s.path) for s in images])
