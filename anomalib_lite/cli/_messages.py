"""Messages of the library as lines of the command line."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from anomalib_lite.cli._options import ALL_FIT_OPTIONS, CASCADE_PARAMETERS
from anomalib_lite.cli._parser import UsageError


@contextmanager
def one_line_warnings() -> Iterator[list[str]]:
    """Print each warning in one line; yield the list of the original messages, which grows."""
    shown: list[str] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        shown.append(str(message))
        print(f"warning: {in_options(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield shown


def is_user_error(error: Exception) -> bool:
    """Return whether the user can correct the error; others are faults of the program."""
    if isinstance(error, UsageError | OSError):
        return True
    from anomalib_lite.errors import AnomalibLiteError

    return isinstance(error, AnomalibLiteError)


def in_options(message: object) -> str:
    """Rewrite a message of the library in one line, with ``name='value'`` as ``--name value``."""
    names = "|".join([*ALL_FIT_OPTIONS, "threshold", "layout", "normal"])
    text = " ".join(str(message).split())
    for option, name in CASCADE_PARAMETERS.items():  # of the cascade, not of its heatmap model
        text = re.sub(rf"^GatedCascade: {name}\b", f"GatedCascade: {option}", text)
    text = text.replace("pass ImageSource(directory, recursive=True)", "add --recursive")
    for value, answer in (("True", "yes"), ("False", "no")):
        text = text.replace(f"inverted_masks={value}", f"--inverted-masks {answer}")
        text = text.replace(f"ignore_255={value}", f"--ignore-255 {answer}")
    return re.sub(
        rf"\b({names})=(?:'([^']*)'|(\d(?:[\d.,]*\d)?))",
        lambda found: f"--{found[1].replace('_', '-')} {found[2] or found[3]}",
        text,
    )


def print_skipped(reasons: Sequence[str]) -> None:
    """Print one line on standard error for each skipped image."""
    for reason in reasons:
        print(f"skipped: {' '.join(reason.split())}", file=sys.stderr)
