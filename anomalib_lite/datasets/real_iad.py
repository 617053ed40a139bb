"""Real-IAD: thirty small parts, each photographed from five sides."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from anomalib_lite._validation import closest
from anomalib_lite.datasets.base import GOOD, Dataset, Sample
from anomalib_lite.datasets.listing import as_path, check_directory, listed_file, subdirectories
from anomalib_lite.errors import InvalidValueError, MissingPathError

__all__ = ["KINDS", "SPLIT", "RealIAD"]

SPLIT = "realiad_jsons"
_WHERE = "RealIAD"
# What the files call the kinds of defect, and what the paper calls them.
KINDS = {
    "AK": "pit",
    "BX": "deformation",
    "CH": "abrasion",
    "HS": "scratch",
    "PS": "damage",
    "QS": "missing_parts",
    "YW": "foreign_objects",
    "ZW": "contamination",
}


class RealIAD(Dataset):
    """One part of Real-IAD: 151,050 photographs of thirty kinds of parts, from five sides each.

    ::

        <root>/realiad_jsons/realiad_jsons/audiojack.json
               realiad_1024/audiojack/OK/S0001/audiojack_0001_OK_C1_....jpg
                                      NG/BX/S0002/audiojack_0002_NG_BX_C1_....jpg
                                                  audiojack_0002_NG_BX_C1_..._mask.png

    The JSON file may also lie in ``<root>/realiad_jsons``, and the images in ``<root>/audiojack``.

    Parameters
    ----------
    root : str or PathLike
        Directory that holds ``realiad_jsons`` and the images.
    category : str
        Name of a part, such as ``"audiojack"``.
    split : str, default="realiad_jsons"
        Directory of the JSON files, which say what is for training and what is normal.
        ``"realiad_jsons"`` has all five sides, ``"realiad_jsons_sv"`` one. Those with anomalous
        images in training (``"realiad_jsons_fuiad_0.1"`` and so on) are refused.
    size : int, str or None, default=None
        Which of several directories of images: 256, 512, 1024 or ``"raw"``, as in
        ``realiad_1024``. None is the one that is there.

    Attributes
    ----------
    name : str
        The part.
    train, test : tuple of Sample
        As the JSON file lists them, sorted by path, normal images first. Kinds are ``"good"``,
        ``"pit"``, ``"deformation"``, ``"abrasion"``, ``"scratch"``, ``"damage"``,
        ``"missing_parts"``, ``"foreign_objects"`` and ``"contamination"``.
    licence, source, citation : str
        Licence of the images (non-commercial), where they come from, and what to cite.

    Raises
    ------
    MissingPathError
        If a directory or file is missing (for an unknown part the error lists those that exist).
    InvalidValueError
        If the JSON file is of another form, there are images of several sizes and ``size`` is None,
        or ``train`` has anomalous images.
    InvalidTypeError
        If ``root`` is not a path.

    Notes
    -----
    A photograph of a bad part from a side where nothing is wrong is normal, as the JSON file says.

    The authors give the data out on request. This reader was written after the readers of anomalib
    and others, without the data. Nothing is downloaded.

    References
    ----------
    Wang et al., "Real-IAD: A Real-World Multi-View Dataset for Benchmarking Versatile Industrial
    Anomaly Detection", CVPR 2024.

    Examples
    --------
    >>> import json
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> good = {"anomaly_class": "OK", "image_path": "OK/0.jpg", "mask_path": None}
    >>> bad = {"anomaly_class": "AK", "image_path": "NG/1.jpg", "mask_path": "NG/1.png"}
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for place in ("toy/OK", "toy/NG", "realiad_jsons"):
    ...         Path(root, place).mkdir(parents=True)
    ...     for name in ("OK/0.jpg", "NG/1.jpg", "NG/1.png"):
    ...         Image.new("L", (6, 4)).save(Path(root, "toy", name))
    ...     text = json.dumps({"train": [good], "test": [bad]})
    ...     _ = Path(root, "realiad_jsons/toy.json").write_text(text)
    ...     RealIAD(root, "toy")
    RealIAD('toy': 1 train, 1 test (1 pit), masks)
    """

    licence = "CC BY-NC-SA 4.0"
    source = "https://realiad4ad.github.io/Real-IAD/"
    citation = (
        "Wang et al., Real-IAD: A Real-World Multi-View Dataset for Benchmarking Versatile "
        "Industrial Anomaly Detection, CVPR 2024"
    )

    def __init__(
        self,
        root: str | os.PathLike[str],
        category: str,
        *,
        split: str = SPLIT,
        size: int | str | None = None,
    ) -> None:
        home = check_directory("root", as_path("root", root, _WHERE), _WHERE)
        files = _split_files(home, split)
        if category not in files:
            raise MissingPathError(
                f"{_WHERE}: category must be one of {list(files)}, the JSON files of {split}, got "
                f"{category!r}.{closest(category, files)}"
            )
        file, images = files[category], _images(home, category, size)
        lists = _read(file)
        train, test = ([_sample(e, images, file) for e in lists[s]] for s in ("train", "test"))
        for samples in (train, test):
            samples.sort(key=lambda s: (s.label, s.path))
        super().__init__(category, train, test)

    @staticmethod
    def categories(root: str | os.PathLike[str], *, split: str = SPLIT) -> list[str]:
        """List the names of the parts in ``root``: those of its JSON files.

        Raises
        ------
        MissingPathError
            If ``root`` is not a directory or has no JSON files.

        Examples
        --------
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "realiad_jsons").mkdir()
        ...     Path(root, "realiad_jsons", "toy.json").touch()
        ...     RealIAD.categories(root)
        ['toy']
        """
        home = check_directory("root", as_path("root", root, _WHERE), _WHERE)
        return list(_split_files(home, split))


def _split_files(home: Path, split: str) -> dict[str, Path]:
    """Map the name of each part to its JSON file."""
    places = (home / SPLIT / split, home / split)
    for place in places:
        if found := sorted(place.glob("*.json")):
            return {file.stem: file for file in found}
    raise MissingPathError(
        f"{_WHERE}: root must hold the JSON files of the split, in {places[0]} or {places[1]}, got "
        "none. Pass the directory right above them, or another split."
    )


def _images(home: Path, category: str, size: int | str | None) -> Path:
    """Return the directory that the paths of the JSON file start from."""
    if size is not None:
        place = home / f"realiad_{size}" / category
        return check_directory("the directory of this size", place, _WHERE)
    homes = [home, *(p for p in subdirectories(home) if p.name.startswith("realiad_"))]
    found = [place / category for place in homes if (place / category).is_dir()]
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidValueError(
            f"{_WHERE}: {category} must have one directory of images, got {list(map(str, found))}. "
            "Choose one by size, such as size=1024."
        )
    raise MissingPathError(
        f"{_WHERE}: {home} must hold the images of {category}, in {category} or such as "
        f"realiad_1024/{category}, got none. Unpack them there."
    )


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        lists = json.loads(file.read_text(encoding="utf-8-sig"))
        for name in ("train", "test"):
            for entry in lists[name]:
                kind, path, mask = (entry[k] for k in ("anomaly_class", "image_path", "mask_path"))
                if not (isinstance(kind, str) and isinstance(path, str)):
                    raise TypeError(f"{kind!r} and {path!r}")
                if not (mask is None or isinstance(mask, str)):
                    raise TypeError(f"mask {mask!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidValueError(
            f"{_WHERE}: {file} must list entries with anomaly_class, image_path and mask_path "
            f"under train and test, got {type(error).__name__}: {error}. Unpack it again."
        ) from error
    return {name: lists[name] for name in ("train", "test")}


def _sample(entry: dict[str, Any], images: Path, file: Path) -> Sample:
    path = listed_file(images, entry["image_path"], file, _WHERE)
    kind = entry["anomaly_class"]
    if kind == "OK":
        return Sample(path, 0, GOOD)
    mask = entry["mask_path"]
    mask_path = listed_file(images, mask, file, _WHERE) if mask else None
    return Sample(path, 1, KINDS.get(kind, kind), mask_path)
