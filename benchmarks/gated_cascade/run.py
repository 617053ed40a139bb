"""Does a gate in front of a heatmap model pay? Cascades on normal, mixed and foreign images.

    python benchmarks/gated_cascade/run.py
    python benchmarks/gated_cascade/run.py --weights resnet18=resnet18.safetensors --hub
    python benchmarks/gated_cascade/run.py --kolektor KolektorSDD --mvtec mvtec_ad --neu NEU-DET
    python benchmarks/gated_cascade/run.py --quick

README.md says what is measured; report.py makes the tables and pictures from what this writes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

DATA = Path(os.environ.get("ANOMALIB_LITE_DATA", HERE.parents[2] / "shared" / "data"))


def measure(names: list[str], seed: int, options: dict[str, Any], out: Path) -> dict[str, Any]:
    """All experiments on the splits of one seed, in this process."""
    import measuring
    from experiments import EXPERIMENTS, build, fit
    from pictures import samples
    from splits import SPLITS, counts, draw_splits

    splits, parts = draw_splits(seed, **options["sources"])
    found: dict[str, Any] = {"counts": counts(splits), "runs": [], "streams": []}
    found |= {"sweeps": {}, "notes": {}}
    models, answers = {}, {}
    for name in names:
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            models[name] = fit(build(name, seed, options), name, splits, parts)
        fit_s = time.perf_counter() - began
        answers[name] = {split: measuring.ask(models[name], splits[split])[0] for split in SPLITS}
        for split in SPLITS:
            head = {"experiment_id": name, "split": split, "seed": seed}
            found["runs"].append(head | measuring.judge(answers[name][split]) | {"fit_s": fit_s})
        notes = [str(w.message) for w in said]
        found["notes"][name] = notes
        print(f"seed {seed}: {name} fitted in {fit_s:.0f} s", *notes, sep="\n  ", flush=True)
    ms = measuring.time_all(models, splits, options["rounds"])
    for run in found["runs"]:
        run["ms"] = ms[run["experiment_id"]][run["split"]]
    for name in names:
        alone = EXPERIMENTS[name].get("alone")
        if alone is not None:
            of_line = measuring.stream(answers[name], answers[alone], ms[name], ms[alone])
            head = {"experiment_id": name, "alone": alone, "seed": seed}
            found["streams"].append(head | of_line)
            pairs = measuring.grids(answers[name]["val_mix"].probabilities)
            found["sweeps"][name] = [
                {"seed": seed, "split": split} | row
                for split in ("val_mix", "test_mix")
                for row in measuring.sweep(
                    models[name],
                    splits[split],
                    answers[name][split],
                    pairs,
                    2 * options["false_alarm_rate"],
                )
            ]
        if seed == options["seeds"][0]:
            sheet = samples(models[name], splits, answers[name], name)
            sheet.save(out / f"samples_{name}.png")
    return found


def main() -> None:
    from experiments import EXPERIMENTS, not_at_hand
    from report import report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="holds magnetic_tile and neu_det")
    parser.add_argument("--kolektor", type=Path, help="KolektorSDD, in place of magnetic tiles")
    parser.add_argument("--mvtec", type=Path, help="all categories of MVTec AD, likewise")
    parser.add_argument("--neu", type=Path, help="NEU-DET (default: neu_det in --data)")
    parser.add_argument(
        "--as-delivered", action="store_true", help="the data sets' own train and test, see README"
    )
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--hub", action="store_true", help="ask the hub for weights not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--false-alarm-rate", type=float, default=0.05)
    parser.add_argument("--max-missed", type=float, default=0.02)
    parser.add_argument("--rounds", type=int, default=3, help="of each time, the median counts")
    parser.add_argument("--train", type=int, help="images to fit on, at most (default: all)")
    parser.add_argument("--test", type=int, help="images of each other split, at most")
    parser.add_argument("--engine", default="auto", help="what runs the networks")
    parser.add_argument("--quick", action="store_true", help="does it all work? about a minute")
    parser.add_argument("--out", type=Path, default=Path("gated_cascade-output"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.rounds = arguments.seeds[:1], 1
        arguments.train, arguments.test = arguments.train or 60, arguments.test or 45
    if any("=" not in pair for pair in arguments.weights):
        parser.error(f"--weights takes NAME=FILE, got {arguments.weights}")
    options = {
        "seeds": arguments.seeds,
        "rounds": arguments.rounds,
        "false_alarm_rate": arguments.false_alarm_rate,
        "max_missed": arguments.max_missed,
        "engine": arguments.engine,
        "shrink": 2 if arguments.quick else 1,
        "weights": {
            name: Path(file) for name, file in (pair.split("=", 1) for pair in arguments.weights)
        },
        "sources": {
            "data": arguments.data,
            "kolektor": arguments.kolektor,
            "mvtec": arguments.mvtec,
            "neu": arguments.neu,
            "n_train": arguments.train,
            "n_test": arguments.test,
            "delivered": arguments.as_delivered,
        },
    }
    rows = [EXPERIMENTS[name] for name in arguments.experiments]
    wanted = {row.get("alone") for row in rows} | {*arguments.experiments}
    names = [name for name in EXPERIMENTS if name in wanted]
    missing = not_at_hand(names, options["weights"], hub=arguments.hub)
    names = [name for name in names if name not in missing]
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "experiments": names,
        "not_run": missing,
        "options": options,
        "seeds": {},
    }
    for seed in arguments.seeds:
        found["seeds"][str(seed)] = measure(names, seed, options, arguments.out)
        text = json.dumps(found, default=lambda o: o.item() if hasattr(o, "item") else o.name)
        (arguments.out / "results.json").write_text(text)
    report(arguments.out)


if __name__ == "__main__":
    main()
