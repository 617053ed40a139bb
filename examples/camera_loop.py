"""Use a detector on a production line: load it once, then decide about each frame.

    python camera_loop.py [model.safetensors]

Without a model it first fits one on a photograph of bricks (needs scikit-image). The frames come
from the same photograph, and every fifth frame has a scratch. Replace them by your camera.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anomalib_lite import PatchCore, load
from anomalib_lite.errors import ImageError


def tiles() -> list[np.ndarray]:
    """Cut 40 gray images of 64 x 96 pixels from a photograph."""
    from skimage import data

    photo = data.brick()
    return [photo[y : y + 64, x : x + 96] for y in range(0, 512, 64) for x in range(0, 480, 96)]


def camera() -> Iterator[np.ndarray]:
    """Yield frames as (H, W) uint8 arrays; (H, W, 3) works as well."""
    for i, tile in enumerate(tiles()[30:]):
        frame = tile.copy()
        if i % 5 == 4:
            frame[30:33, 20:70] = 250
        yield frame


def main(model: Path | None) -> None:
    if model is None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "wall.safetensors")
            PatchCore(image_size=64, false_alarm_rate=0.1).fit(tiles()[:30]).save(path)
            detector = load(path)
    else:
        detector = load(model)
    detector.score(np.zeros((64, 96), np.uint8))  # the first call takes longer

    milliseconds = []
    for i, frame in enumerate(camera()):
        start = time.perf_counter()
        try:
            found = detector.detect(frame, maps=False)
            answer = "ANOMALOUS" if found.labels[0] else "normal"
            score = f"score {found.scores[0]:.2f}"
        except ImageError as error:  # a broken frame must not stop the line or count as good
            answer, score = "ANOMALOUS", str(error)
        milliseconds.append(1000 * (time.perf_counter() - start))
        print(f"frame {i}: {answer:9}  {score}  {milliseconds[-1]:.1f} ms")
    print(
        f"threshold {detector.threshold_:.2f}; measured here: median "
        f"{np.median(milliseconds):.1f} ms, slowest {max(milliseconds):.1f} ms a frame"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
