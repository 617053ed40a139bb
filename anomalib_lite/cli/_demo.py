"""The command demo: fit and test on photographs of solar cells, and write a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo", help="fit and test on photographs of solar cells, and write a page of the results"
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="demo-output",
        help="directory to write to (default: demo-output)",
    )
    for name, purpose, default, largest in (
        ("--n-train", "fit on", 200, 392),
        ("--n-test", "test on", 300, 509),
    ):
        text = f"number of photographs to {purpose}, at most {largest} (default: {default})"
        parser.add_argument(name, type=int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.05,
        metavar="VALUE",
        help="share of normal cells that may be called anomalous (default: 0.05)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the demonstration."""
    from anomalib_lite._files import make_directory

    output = make_directory(Path(arguments.output))

    from anomalib_lite.demo import run_demo

    run_demo(
        output,
        n_train=arguments.n_train,
        n_test=arguments.n_test,
        false_alarm_rate=arguments.false_alarm_rate,
    )
