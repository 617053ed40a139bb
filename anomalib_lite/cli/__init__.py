"""The command ``anomalib-lite``: fit, predict, evaluate and a demonstration."""

from anomalib_lite.cli._main import main

__all__ = ["main"]
