"""Packages of the extra ``benchmarks``: imported when they are needed, with one clear error."""

from __future__ import annotations

import importlib
from typing import Any

from anomalib_lite.errors import MissingDependencyError

__all__ = ["import_extra", "missing_extra"]


def import_extra(name: str) -> Any:
    """Import a package of the extra ``benchmarks``.

    >>> import_extra("json").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(name) from error


def missing_extra(name: str) -> MissingDependencyError:
    """Return the error to raise where a package is not installed."""
    return MissingDependencyError(
        f"studies: the package {name} is not installed. Install it with: "
        "pip install 'anomalib-lite[benchmarks]'"
    )
