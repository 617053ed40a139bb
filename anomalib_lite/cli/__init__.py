"""The command ``anomalib-lite``."""

from anomalib_lite.cli._main import main

__all__ = ["main"]
