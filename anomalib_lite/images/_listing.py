"""The image files of a directory."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["IMAGE_SUFFIXES", "list_files"]

# The files in a directory that are taken to be images.
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def list_files(directory: Path, *, recursive: bool = False) -> list[Path]:
    """List the image files in a directory, in an order that is the same on every machine.

    Parameters
    ----------
    directory : Path
    recursive : bool, default=False
        Whether to list the files in its subdirectories too.

    Returns
    -------
    list of Path
        Sorted by the path from ``directory``. Hidden files and directories are left out: file
        managers keep notes in them, such as macOS ``._007.png`` on shared drives.

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
    ...     [path.name for path in list_files(Path(folder))]
    ['a.JPG', 'b.png']
    """

    def fail(error: OSError) -> None:  # by default os.walk passes over what it cannot read
        raise error

    found: dict[str, Path] = {}
    for folder, subdirectories, names in os.walk(directory, onerror=fail):
        below = [name for name in subdirectories if recursive and not name.startswith(".")]
        subdirectories[:] = below  # those that os.walk goes on with
        place = Path(folder).relative_to(directory)
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                found[(place / name).as_posix()] = Path(folder, name)
    return [found[name] for name in sorted(found)]
