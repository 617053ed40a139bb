"""The image files of a directory, and what else lies there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from anomalib_lite.errors import InvalidValueError, LeftOutWarning

__all__ = [
    "BELOW",
    "MASK_ENDINGS",
    "OVERLAYS",
    "describe_left_out",
    "image_suffixes",
    "images_and_masks",
    "list_files",
    "visible_directories",
    "warn_left_out",
]

# How the file names of masks end that lie beside their images, in small letters.
MASK_ENDINGS = ("_gt", "_label", "_mask")
# Where ``anomalib-lite predict`` puts its pictures, and the table that it writes beside it.
OVERLAYS, TABLE = "overlays", "scores.csv"

# Formats that Pillow names and does not decode itself, icons, and brushes.
_NO_PHOTOGRAPHS = frozenset(
    {"BUFR", "CUR", "EPS", "GBR", "GRIB", "HDF5", "ICNS", "ICO", "IPTC", "MPEG", "WMF"}
)
# What systems and network drives put into directories, in small letters.
_OF_SYSTEMS = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "#snapshot"),
        *("$recycle.bin", "system volume information", "__macosx", "lost+found"),
    }
)
# Kinds of what is left out, besides suffixes.
_HIDDEN = "hidden or of the system"
_NO_SUFFIX = "without a suffix"
_SPECIAL = "FIFOs, sockets or devices"
_LOOP = "links to a directory above"
_OUTPUT = "overlays of predict"
_MASK = "masks beside images"
BELOW = "subdirectories with images"


def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters, of files in a directory that are taken for images.

    They are those of photographs that Pillow reads, with the plugins that are registered.

    >>> sorted({".png", ".jfif", ".eps", ".txt"} & image_suffixes())
    ['.jfif', '.png']
    """
    known = Image.registered_extensions().items()
    decoded = {suffix for suffix, form in known if form in Image.OPEN.keys() - _NO_PHOTOGRAPHS}
    return frozenset(decoded | {".mpo"})  # which Pillow opens as JPEG


def list_files(
    directory: Path, *, recursive: bool = False, left_out: dict[str, list[Path]] | None = None
) -> list[Path]:
    """List the image files in a directory, in an order that is the same on every machine.

    Parameters
    ----------
    directory : Path
    recursive : bool, default=False
        Whether to list the files in its subdirectories too, links to directories included.
    left_out : dict, optional
        Receives what else is in the directory: kind -> paths. A kind is a suffix such as
        ``".txt"``, or a few words.

    Returns
    -------
    list of Path
        Sorted by the path from ``directory``. A file is an image by its suffix, see
        :func:`image_suffixes`. Left out are hidden files and directories, those that systems and
        network drives make (``Thumbs.db``, ``@eaDir``), FIFOs and devices, and the directory
        ``overlays`` of ``anomalib-lite predict`` beside its ``scores.csv``.

    Raises
    ------
    OSError
        If a directory cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("b.png", "a.JPG", ".c.png", "notes.txt"):
    ...         Path(folder, name).touch()
    ...     left_out = {}
    ...     [path.name for path in list_files(Path(folder), left_out=left_out)]
    ['a.JPG', 'b.png']
    >>> {kind: [path.name for path in paths] for kind, paths in left_out.items()}
    {'hidden or of the system': ['.c.png'], '.txt': ['notes.txt']}
    """
    others: dict[str, list[Path]] = {}
    real = os.path.realpath(directory)
    found = dict(_walk(directory, "", recursive, others, image_suffixes(), (real,)))
    if left_out is not None:
        for kind in sorted(others, reverse=True):  # words first
            left_out.setdefault(kind, []).extend(sorted(others[kind]))
    return [found[name] for name in sorted(found)]


def _walk(
    folder: Path,
    place: str,
    recursive: bool,
    others: dict[str, list[Path]],
    suffixes: frozenset[str],
    above: tuple[str, ...],
) -> Iterator[tuple[str, Path]]:
    """Yield the images with their names from the top, where ``folder`` is ``place``.

    ``above`` are the real paths of the directories on the way, this one last.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            kind = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 (faster than Path's)
            if _is_litter(entry.name):  # of which nobody misses what holds no images
                if not (_holds_images(path, suffixes) if entry.is_dir() else kind in suffixes):
                    continue
                kind = _HIDDEN
            elif entry.is_dir():
                real = os.path.join(above[-1], entry.name)  # noqa: PTH118
                if entry.is_symlink():
                    real = os.path.realpath(path)
                kind = _kind_of_directory(path, real in above)
                if not kind and recursive:
                    below = f"{place}{entry.name}/"
                    yield from _walk(path, below, True, others, suffixes, (*above, real))
                    continue
                kind = kind or (BELOW if _holds_images(path, suffixes) else "")
                if not kind:
                    continue
            elif not entry.is_file() and path.exists():  # a broken link is said when it is read
                kind = _SPECIAL
            elif kind in suffixes:
                yield place + entry.name, path
                continue
            others.setdefault(kind or _NO_SUFFIX, []).append(path)


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _kind_of_directory(path: Path, is_loop: bool) -> str:
    """Return why a directory is left out, or nothing."""
    if is_loop:
        return _LOOP
    return _OUTPUT if path.name == OVERLAYS and (path.parent / TABLE).is_file() else ""


def _holds_images(folder: Path, suffixes: frozenset[str]) -> bool:
    try:
        found = _walk(folder, "", True, {}, suffixes, (os.path.realpath(folder),))
        return next(found, None) is not None
    except OSError:  # nobody knows
        return True


def visible_directories(directory: Path, left_out: dict[str, list[Path]]) -> list[Path]:
    """List the directories in ``directory`` that may hold images, sorted by name.

    ``left_out`` receives the pictures that ``predict`` made.
    """
    found = sorted(p for p in directory.iterdir() if p.is_dir() and not _is_litter(p.name))
    outputs = [path for path in found if _kind_of_directory(path, False)]
    if outputs:
        left_out.setdefault(_OUTPUT, []).extend(outputs)
    return [path for path in found if path not in outputs]


def describe_left_out(left_out: Mapping[str, list[Path]]) -> str:
    """Say how many of each kind there are, with the name of the first.

    >>> describe_left_out({".txt": [Path("a.txt"), Path("b.txt")], "without a suffix": [Path("x")]})
    '.txt: 2 (a.txt ...); without a suffix: 1 (x)'
    """
    return "; ".join(
        f"{kind}: {len(paths)} ({paths[0].name}{' ...' if len(paths) > 1 else ''})"
        for kind, paths in left_out.items()
    )


def warn_left_out(
    directory: Path,
    left_out: Mapping[str, list[Path]],
    where: str,
    remedy: str = "If images are among them, move or rename these.",
) -> None:
    """Give a LeftOutWarning that says what in a directory is not looked at, if there is any."""
    if left_out:
        warnings.warn(
            f"{where}: not looked at in {directory}: {describe_left_out(left_out)}. {remedy}",
            LeftOutWarning,
            stacklevel=2,
        )


def images_and_masks(
    name: str,
    directory: Path,
    where: str,
    *,
    recursive: bool = False,
    with_masks: bool = False,
    left_out: dict[str, list[Path]],
) -> list[tuple[Path, Path | None]]:
    """List the images in a directory, each with the mask that lies beside it, if there is one.

    Parameters
    ----------
    name : str
        Name of the directory in errors.
    directory : Path
    where : str
        Caller, named in errors.
    recursive : bool, default=False
        Whether to list the files in subdirectories too.
    with_masks : bool, default=False
        Whether the masks are wanted; otherwise they count as left out.
    left_out : dict
        Receives what else is there, as by :func:`list_files`.

    Returns
    -------
    list of (Path, Path or None)
        Sorted by the path of the image. ``7_GT.png``, ``7_label.png`` or ``7_mask.png`` (small
        or capital letters, any image suffix) beside ``7.jpg`` is its mask and no image.

    Raises
    ------
    InvalidValueError
        If two files differ by their suffix alone (one may be the mask of the other), an image has
        two masks, or a directory cannot be read.
    """
    try:
        found = list_files(directory, recursive=recursive, left_out=left_out)
    except OSError as error:
        raise InvalidValueError(
            f"{where}: {name} must be a directory that can be read, got "
            f"{error.filename or directory}: {error.strerror}. Change its permissions, or leave it "
            "out."
        ) from error
    # By names as text: a hash or a parent of a Path takes many times as long.
    stems: dict[str, Path] = {}
    masks: dict[str, Path] = {}  # by the image's stem
    for path in found:
        stem = os.path.splitext(path)[0]  # noqa: PTH122
        if stem in stems:
            raise InvalidValueError(
                f"{where}: {name} must hold one file for each image, got {stems[stem]} and {path}. "
                "If one is the mask of the other, add _mask to its name; if it is a copy, remove "
                "it; otherwise rename it."
            )
        stems[stem] = path
    for stem in [stem for stem in stems if stem.lower().endswith(MASK_ENDINGS)]:
        image = stem[: stem.rindex("_")]
        if image not in stems:
            continue  # only a name that ends so
        mask = stems.pop(stem)
        if image in masks:
            raise InvalidValueError(
                f"{where}: {name} must hold one mask for each image, got {masks[image]} and {mask} "
                f"for {stems[image]}. Keep one of them."
            )
        masks[image] = mask
    if masks and not with_masks:
        left_out.setdefault(_MASK, []).extend(masks.values())
    return [(path, masks.get(stem)) for stem, path in stems.items()]
