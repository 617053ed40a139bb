"""A demonstration on real photographs: fit, test, and show what was found and what was missed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from anomalib_lite._files import make_directory
from anomalib_lite._validation import check_int
from anomalib_lite.datasets import ELPV, Dataset, Sample
from anomalib_lite.detectors import PatchCore
from anomalib_lite.evaluation import Report, evaluate
from anomalib_lite.report import FILES, write_report

__all__ = ["run_demo"]

_MODEL = "solar-cells.safetensors"


def run_demo(
    output: Path,
    *,
    n_train: int = 200,
    n_test: int = 300,
    false_alarm_rate: float = 0.05,
) -> Report:
    """Fit PatchCore on photographs of solar cells, test it, and write a page of the results.

    Parameters
    ----------
    output : Path
        Directory for ``index.html``, ``overlays.png``, ``scores.csv``, ``report.json`` and
        ``solar-cells.safetensors``; created if it does not exist.
    n_train : int, default=200
        Number of normal cells for the fit, evenly picked from the 392 that are not for testing.
    n_test : int, default=300
        Number of cells for the test, evenly picked from the other 509, so that the share of
        defects stays the same.
    false_alarm_rate : float, default=0.05
        Share of normal cells that may be called anomalous.

    Returns
    -------
    Report
        Results of the test.

    Raises
    ------
    MissingDependencyError
        If the package with the photographs is not installed.
    OutputError
        If ``output`` cannot be written to.
    InvalidValueError
        If a number is out of range.

    Examples
    --------
    >>> from pathlib import Path
    >>> report = run_demo(Path("demo-output"))  # doctest: +SKIP
    """
    cells = ELPV("mono")
    make_directory(output)
    train, test = _pick(cells.train, n_train, "n_train"), _pick(cells.test, n_test, "n_test")
    print(f"Photographs: {cells.name}, {len(train)} to fit on, {len(test)} to test on.")
    print(f"Licence {cells.licence} (non-commercial). Source: {cells.source}")
    print(f"Cite: {cells.citation}\n", flush=True)
    # float32 gives the same scores on every processor.
    detector = PatchCore(false_alarm_rate=false_alarm_rate, dtype="float32", verbose=1)
    start = time.perf_counter()
    detector.fit(train)
    fit_s = time.perf_counter() - start
    detector.verbose = 0
    report = evaluate(detector, Dataset(cells.name, train, test), progress=True)
    report = replace(
        report,
        counts={**report.counts, "train": len(train)},
        timings={"fit_s": fit_s, **report.timings},
    )
    print(report)
    write_report(output, report, detector, false_alarm_rate=false_alarm_rate, cells=cells)
    detector.save(output / _MODEL)
    print(f"\nwritten to {output}: {', '.join((*FILES, _MODEL))}")
    print(f"open {output / 'index.html'}")
    return report


def _pick(samples: Sequence[Sample], n: int, name: str) -> list[Sample]:
    """Pick ``n`` samples evenly; they are in the order of their kinds."""
    check_int(name, n, "demo", low=2, high=len(samples))
    return [samples[i] for i in np.linspace(0, len(samples) - 1, n).round().astype(int)]
