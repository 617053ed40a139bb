"""The program: its commands, its exit status, and how it reports errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from anomalib_lite._version import __version__
from anomalib_lite.cli import _backbones, _benchmark, _calibrate, _demo, _evaluate, _fit, _predict
from anomalib_lite.cli._messages import in_options, is_user_error, one_line_warnings
from anomalib_lite.cli._parser import PROGRAM, Parser

__all__ = ["main"]

# torch, scikit-learn and all modules that need them are imported inside the commands: this takes
# seconds, and --help, --version and most mistakes need none of them.

_COMMANDS = (_fit, _predict, _evaluate, _calibrate, _demo, _backbones, _benchmark)
_WRONG_USE, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the name of the program; by default those of this process.

    Returns
    -------
    int
        0 for success, 1 if a study of ``benchmark`` failed, 2 for an error that the user can
        correct (one line on standard error describes it), 130 after Ctrl-C.

    Examples
    --------
    >>> main(["fit", "no/such/directory", "-o", "model.safetensors"])
    2
    """
    try:
        arguments = make_parser().parse_args(argv)
        with one_line_warnings():
            return arguments.run(arguments) or 0
    except KeyboardInterrupt as interrupt:
        print(" ".join([f"{PROGRAM}: interrupted.", *interrupt.args]), file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"{PROGRAM}: error: {in_options(error)}", file=sys.stderr)
        return _WRONG_USE


def make_parser() -> Parser:
    """Make the parser of all commands."""
    parser = Parser(
        prog=PROGRAM,
        description="Visual anomaly detection, trained on good images only.",
        epilog="Try it without images of your own: pip install 'anomalib-lite[demo]', then "
        "anomalib-lite demo.",
    )
    version = f"{PROGRAM} {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser
