"""The sixteen categories that are measured: real photographs that anyone can have on disk."""

from __future__ import annotations

import os
from pathlib import Path

from anomalib_lite import studies
from anomalib_lite.studies import PAPERS, Images, open_category

DATA = Path(os.environ.get("ANOMALIB_LITE_DATA", Path(__file__).parents[3] / "shared" / "data"))

# Tables have one column for each of these: name -> categories.
GROUPS = {
    "tiles": ("magnetic_tile",),
    "papers": PAPERS,
    "solar cells, mono": ("elpv_mono",),
    "solar cells, poly": ("elpv_poly",),
    "textile": ("textile",),
}
CATEGORIES = tuple(name for names in GROUPS.values() for name in names)


def draw_images(category: str, seed: int, n_train: int, n_test: int) -> Images:
    """Draw normal images to fit on, and as many normal as anomalous ones to test.

    The seed draws the images to fit on. The images to test are the same for every seed.
    """
    # Rows that are published have these names, the studies others.
    name = f"piped/{category}" if category in PAPERS else category.replace("elpv_", "elpv/")
    drawn = studies.draw_images(open_category(name, DATA), seed, n_train, n_test)
    return Images(name, *drawn)
