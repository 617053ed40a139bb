"""Fit on a folder of good images, save the detector, and score another folder.

    python own_folder.py path/to/good path/to/new --model part.safetensors

Without arguments it makes two small folders from a photograph of bricks (needs scikit-image).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from anomalib_lite import PatchCore, load


def make_folders(root: Path) -> tuple[Path, Path]:
    """Make 36 good images, and 4 new images of which the last two have a scratch."""
    from skimage import data
    from skimage.draw import line

    photo = data.brick()  # (512, 512), gray
    tiles = [photo[y : y + 64, x : x + 96] for y in range(0, 512, 64) for x in range(0, 480, 96)]
    for name in ("good", "new"):
        (root / name).mkdir()
    for i, tile in enumerate(tiles):
        image = tile.copy()
        if i >= 38:
            rows, columns = line(12, 15, 44, 80)
            image[rows, columns] = image[rows + 1, columns] = 255
        Image.fromarray(image).save(root / ("good" if i < 36 else "new") / f"{i:03d}.png")
    return root / "good", root / "new"


def run(good: Path, new: Path, model: Path, image_size: int | str, false_alarm_rate: float) -> None:
    detector = PatchCore(image_size=image_size, false_alarm_rate=false_alarm_rate)
    detector.fit(good)
    detector.save(model)
    print(f"fitted; threshold {detector.threshold_:.2f}, saved {model.stat().st_size / 1e6:.1f} MB")

    # In practice this is another program, on another day.
    detector = load(model)
    found = detector.detect(new)
    for name, score, heatmap, anomalous in zip(
        found.names, found.scores, found.maps, found.labels, strict=True
    ):
        row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
        answer = f"anomalous, worst at row {row}, column {column}" if anomalous else "normal"
        print(f"{Path(name).name}  score {score:6.2f}  {answer}")
    print(f"{found.labels.sum()} of {len(found.labels)} images are anomalous")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("good", type=Path, nargs="?", help="folder of good images to learn from")
    parser.add_argument("new", type=Path, nargs="?", help="folder of images to score")
    parser.add_argument("--model", type=Path, help="file to write (default: a temporary one)")
    parser.add_argument("--image-size", type=int, help="default: by the images' own")
    parser.add_argument("--false-alarm-rate", type=float, default=0.01)
    arguments = parser.parse_args()
    if arguments.good is not None and arguments.new is None:
        parser.error("give both folders, or none")

    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or Path(directory, "model.safetensors")
        if arguments.good is None:
            good, new = make_folders(Path(directory))
            run(good, new, model, image_size=64, false_alarm_rate=0.1)
        else:
            image_size, rate = arguments.image_size or "auto", arguments.false_alarm_rate
            run(arguments.good, arguments.new, model, image_size, rate)


if __name__ == "__main__":
    main()
