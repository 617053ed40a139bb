"""The command benchmark: run studies, and write their rows, tables and figures."""

from __future__ import annotations

import argparse
from typing import Any

_FAILED = 1


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "benchmark",
        help="run studies, and write rows, tables and figures",
        description="Run studies: each YAML file names a Python file and its configuration. Needs "
        "the extra: pip install 'anomalib-lite[benchmarks]'. The exit status is 1 if a study "
        "failed.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML file of a study")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        default="benchmark-output",
        help="directory to write to (default: benchmark-output)",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="directory of the data sets (default: ANOMALIB_LITE_DATA, or what a study says)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="seeds (default: those of each study)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few images and one seed, to see that all works"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the rows that are in the directory"
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="keep embeddings there (default: they are not kept)"
    )
    parser.add_argument(
        "--cache-size",
        metavar="SIZE",
        default="8GB",
        help="largest size of the cache; what was used longest ago is removed (default: 8GB)",
    )
    parser.add_argument(
        "--log-level",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default="INFO",
        help="least important messages of the log (default: INFO)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the studies; 1 if one failed."""
    from anomalib_lite.studies import run_studies

    summary = run_studies(
        arguments.configs,
        arguments.output,
        data_root=arguments.data_root,
        seeds=arguments.seeds,
        quick=arguments.quick,
        resume=arguments.resume,
        cache=arguments.cache,
        cache_size=arguments.cache_size,
        log_level=arguments.log_level,
    )
    for experiment in summary.experiments:
        where = experiment.results_file or experiment.error
        print(f"{experiment.name}: {experiment.status}, {experiment.rows} rows, {where}")
    return _FAILED if summary.failed else 0
