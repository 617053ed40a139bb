"""Run studies, as ``anomalib-lite benchmark`` does; without names, all that any machine can run.

python benchmarks/run_all.py
python benchmarks/run_all.py --resume --seeds 0 1 2 benchmarks/backbones/local.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def main(arguments: list[str]) -> int:
    from anomalib_lite.cli import main as command

    named = any(argument.endswith((".yaml", ".yml")) for argument in arguments)
    studies = [] if named else sorted(map(str, HERE.glob("*/local.yaml")))
    # Options of several values come before the studies, so a separator keeps them apart.
    return command(["benchmark", *arguments, *(["--", *studies] if studies else [])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
