"""How long does each option take? All options in one process, in turns; medians of rounds.

    python benchmarks/options/timing.py --study front --options "256, 10 %" "384, 5,000"

Run nothing else meanwhile. The rows of run.py have times too, each measured once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

# One category of each group.
CATEGORIES = ("magnetic_tile", "PA_BDP01_TL", "elpv_mono", "elpv_poly", "textile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", default="options")
    parser.add_argument("--options", nargs="+", help="some of the study; by default all")
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("benchmark-options/timing.jsonl"))
    args = parser.parse_args()

    from run import FALSE_ALARM_RATE, surroundings
    from sources import draw_images
    from studies import STUDIES, make

    args.output.parent.mkdir(parents=True, exist_ok=True)
    about = surroundings()
    for category in args.categories:
        images = draw_images(category, 0, args.train, args.test)
        rows: dict[str, dict[str, Any]] = {}
        for name in args.options or STUDIES[args.study]:
            option = STUDIES[args.study][name]
            detector = make(option, false_alarm_rate=FALSE_ALARM_RATE, random_state=0)
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                detector.fit(images.train)
            fit_s = time.perf_counter() - began
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "model.safetensors")
                detector.save(file)
                kilobytes = file.stat().st_size / 1000
            rows[name] = {"detector": detector, "fit_s": fit_s, "file_kb": kilobytes, "ms": []}
        for _ in range(args.rounds):
            for row in rows.values():
                began = time.perf_counter()
                row["detector"].detect(images.test)
                row["ms"].append(1000 * (time.perf_counter() - began) / len(images.test))
        for name, row in rows.items():
            del row["detector"]
            row["ms"] = statistics.median(row["ms"])
            head = {"study": args.study, "option": name, "category": category, "seed": 0}
            with args.output.open("a") as file_:
                file_.write(json.dumps(head | row | about) + "\n")
            print(category, name, f"{row['ms']:.1f} ms, fit {row['fit_s']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
