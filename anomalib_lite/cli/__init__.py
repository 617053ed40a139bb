"""The command ``anomalib-lite``: fit, predict, evaluate, a demonstration, backbones, studies."""

from anomalib_lite.cli._main import main

__all__ = ["main"]
