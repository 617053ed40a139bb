"""ELPV: photographs of solar cells in electroluminescence, from a PyPI package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from anomalib_lite._validation import check_choice, check_number
from anomalib_lite.datasets.base import Dataset, Sample
from anomalib_lite.datasets.listing import split_normal
from anomalib_lite.errors import MissingDependencyError, MissingPathError

__all__ = ["ELPV"]

# Defect probability in thirds, from the votes of the annotators.
_NORMAL, _DEFECT = 0, 3
_KINDS = {0: "normal", 1: "uncertain_33", 2: "uncertain_67", 3: "defect"}
# Labels of the uncertain cells; those without a label are not in the test images.
_UNCERTAIN: dict[str, dict[int, int]] = {
    "exclude": {},
    "round": {1: 0, 2: 1},
    "anomalous": {1: 1, 2: 1},
}
_CELLS = {"all": ("mono", "poly"), "mono": ("mono",), "poly": ("poly",)}


class ELPV(Dataset):
    """ELPV: 2,624 photographs of solar cells in electroluminescence, 300 x 300 pixels, gray.

    The images come with the package ``elpv-dataset`` (``pip install "anomalib-lite[demo]"``);
    nothing else is downloaded, and no image is decoded here. There are no masks.

    Parameters
    ----------
    cell : {"all", "mono", "poly"}, default="all"
        Monocrystalline cells, polycrystalline cells, or both.
    uncertain : {"exclude", "round", "anomalous"}, default="exclude"
        Use of the cells whose defect probability is 1/3 or 2/3 in ``test``. ``"exclude"`` leaves
        them out; ``"round"`` adds 1/3 as normal and 2/3 as anomalous; ``"anomalous"`` adds both
        as anomalous, since they are not certainly good. They are never in ``train``.
    test_size : float, default=1/3
        Share of the normal cells that is kept for testing, in (0, 1).
    random_state : int, RandomState or None, default=0
        Seed of the split. The same number gives the same split on every machine.

    Attributes
    ----------
    name : str
        ``"elpv_"`` and the value of ``cell``.
    train, test : tuple of Sample
        Kinds are ``"normal"`` (probability 0), ``"uncertain_33"``, ``"uncertain_67"`` and
        ``"defect"`` (probability 1).
    licence, source, citation : str
        Licence of the images (non-commercial), where they come from, and what to cite.

    Raises
    ------
    MissingDependencyError
        If ``elpv-dataset`` is not installed.
    MissingPathError
        If the installed package lacks its images or labels.
    InvalidValueError
        If an argument has a value that is not allowed.

    Notes
    -----
    The cells were cut from 44 solar modules, and the labels do not say which: cells of one module
    are in training and in test. Results therefore hold for known modules.

    References
    ----------
    Deitsch et al., "Automatic classification of defective photovoltaic module cells in
    electroluminescence images", Solar Energy 185, 2019.

    Examples
    --------
    >>> ELPV("mono", uncertain="anomalous")  # doctest: +SKIP
    ELPV('elpv_mono': 392 train, 682 test (196 normal, 117 uncertain_33, 56 uncertain_67,
    313 defect), no masks)
    >>> ELPV.licence
    'CC BY-NC-SA 4.0'
    """

    licence = "CC BY-NC-SA 4.0"
    source = "https://github.com/zae-bayern/elpv-dataset"
    citation = (
        "Buerhop-Lutz et al., A Benchmark for Visual Identification of Defective Solar Cells in "
        "Electroluminescence Imagery, EU PVSEC, 2018, doi:10.4229/35thEUPVSEC20182018-5CV.3.15; "
        "Deitsch et al., Automatic classification of defective photovoltaic module cells in "
        "electroluminescence images, Solar Energy 185, 2019, doi:10.1016/j.solener.2019.02.067; "
        "Deitsch et al., Segmentation of photovoltaic module cells in uncalibrated "
        "electroluminescence images, Machine Vision and Applications 32(4), 2021, "
        "doi:10.1007/s00138-021-01191-9"
    )

    def __init__(
        self,
        cell: str = "all",
        *,
        uncertain: str = "exclude",
        test_size: float = 1 / 3,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        types = _CELLS[check_choice("cell", cell, _CELLS, "ELPV")]
        labels = _UNCERTAIN[check_choice("uncertain", uncertain, _UNCERTAIN, "ELPV")]
        share = check_number("test_size", test_size, "ELPV", "(0, 1)")
        cells = _read_labels(types)
        normal = [path for path, thirds in cells if thirds == _NORMAL]
        train, held_out = split_normal(normal, share, random_state, "ELPV")
        test = [Sample(path, 0, _KINDS[_NORMAL]) for path in held_out]
        for thirds, label in [*labels.items(), (_DEFECT, 1)]:
            test += [Sample(path, label, _KINDS[thirds]) for path, t in cells if t == thirds]
        super().__init__(f"elpv_{cell}", [Sample(p, 0, _KINDS[_NORMAL]) for p in train], test)


def _read_labels(types: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Read the path and the defect probability in thirds of every cell of these types, sorted."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "ELPV: the package elpv-dataset must be installed, got none. "
            'Run: pip install "anomalib-lite[demo]"'
        )
    # Its own loader would decode all images at once (236 MB).
    data = Path(spec.submodule_search_locations[0]) / "data"
    if not (data / "labels.csv").is_file():
        raise MissingPathError(
            f"ELPV: elpv-dataset must hold {data / 'labels.csv'}, got no such file. "
            "Install it again: pip install --force-reinstall elpv-dataset"
        )
    cells = []
    for line in (data / "labels.csv").read_text(encoding="utf-8").splitlines():
        file, probability, kind = line.split()
        if kind in types:
            cells.append((data / file, round(3 * float(probability))))
    return sorted(cells)
