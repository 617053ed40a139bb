"""The command ``anomalib-lite``: fit, predict, evaluate, a demonstration, and backbones."""

from anomalib_lite.cli._main import main

__all__ = ["main"]
