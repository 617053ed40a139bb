"""The parser of arguments; it knows no command."""

from __future__ import annotations

import argparse
from typing import NoReturn

PROGRAM = "anomalib-lite"


def add_recursive(command: argparse.ArgumentParser) -> None:
    """Add the option that takes the images of subdirectories too."""
    command.add_argument(
        "--recursive", action="store_true", help="take the images in subdirectories, too"
    )


class UsageError(Exception):
    """Arguments that are wrong or do not go together."""


class Parser(argparse.ArgumentParser):
    """A parser that raises errors and leaves exit and output to its caller."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the program."""
        raise UsageError(f"{message}. See: {self.prog} --help")
