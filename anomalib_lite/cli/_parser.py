"""The parser of arguments; it knows no command."""

from __future__ import annotations

import argparse
from typing import NoReturn

PROGRAM = "anomalib-lite"


class UsageError(Exception):
    """Arguments that are wrong or do not go together."""


class Parser(argparse.ArgumentParser):
    """A parser that raises errors and leaves exit and output to its caller."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the program."""
        raise UsageError(f"{message}. See: {self.prog} --help")
