"""Several studies, one after the other: one log, one summary, and none stops the others."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from anomalib_lite._files import make_directory, write_text
from anomalib_lite.errors import InvalidValueError
from anomalib_lite.evaluation import peak_memory
from anomalib_lite.studies._config import Study, open_study
from anomalib_lite.studies._extra import import_extra
from anomalib_lite.studies._feature_cache import FeatureCache
from anomalib_lite.studies._provenance import now, source_hash, surroundings
from anomalib_lite.studies._results import Results
from anomalib_lite.studies._run import Run, log
from anomalib_lite.studies._tables import write_tables

__all__ = ["Experiment", "Summary", "run_studies"]

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


@dataclass
class Experiment:
    """What became of one study: an entry of ``experiments_summary.json``.

    Attributes
    ----------
    name : str
    status : {"not started", "running", "success", "failed", "interrupted"}
    results_file : str or None
        ``rows.csv``, if there are rows.
    seconds : float
    peak_memory : float or None
        Largest memory of this process while the study ran, in MiB.
    rows : int
        Number of rows in the folder.
    left_out : dict of str to str
        Categories and networks that are not on this machine, with the reason.
    error : str or None
    """

    name: str
    status: str = "not started"
    results_file: str | None = None
    seconds: float = 0.0
    peak_memory: float | None = None
    rows: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass
class Summary:
    """What became of all studies.

    Attributes
    ----------
    execution_timestamp : str
        When the run began, in UTC.
    experiments : list of Experiment
    """

    execution_timestamp: str
    experiments: list[Experiment]

    @property
    def failed(self) -> int:
        """Number of studies that failed."""
        return sum(experiment.status == "failed" for experiment in self.experiments)

    def write(self, path: Path) -> None:
        """Write it as JSON, with the numbers of studies in all, successful and failed."""
        successful = sum(experiment.status == "success" for experiment in self.experiments)
        about = {
            "execution_timestamp": self.execution_timestamp,
            "total_experiments": len(self.experiments),
            "successful": successful,
            "failed": self.failed,
            "experiments": [asdict(experiment) for experiment in self.experiments],
        }
        write_text(path, json.dumps(about, indent=2) + "\n")


def run_studies(
    studies: Sequence[str | os.PathLike[str] | Study],
    output: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    seeds: Sequence[int] | None = None,
    quick: bool = False,
    resume: bool = False,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | str = "8GB",
    log_level: str = "INFO",
) -> Summary:
    """Run studies, and write rows, tables, figures, a log and a summary.

    Parameters
    ----------
    studies : sequence of path or Study
        YAML files, see :func:`open_study`.
    output : path
        Directory that gets a folder for each study, the log and ``experiments_summary.json``.
    data_root : path, optional
        Directory of the data sets. By default what ``ANOMALIB_LITE_DATA`` names, or what the
        configuration says.
    seeds : sequence of int, optional
        Instead of those of the configurations.
    quick : bool, default=False
        Few images and one seed, to see that all works; see :func:`open_study`.
    resume : bool, default=False
        Go on with rows that are there. Without it, results that are there are an error.
    cache : path, optional
        Directory of a :class:`FeatureCache`.
    cache_size : int or str, default="8GB"
        Largest size of the cache.
    log_level : {"DEBUG", "INFO", "WARNING", "ERROR"}, default="INFO"

    Returns
    -------
    Summary
        A study that fails is counted there, and the next one runs.

    Raises
    ------
    AnomalibLiteError
        Before anything runs: for a configuration that cannot be used, results that are there, or
        rows made with another configuration, code or study.
    KeyboardInterrupt
        After Ctrl-C; finished rows, their tables and the summary are written.

    Examples
    --------
    docs/studies.md runs one.
    """
    import_extra("pandas")
    opened = [
        s if isinstance(s, Study) else open_study(s, seeds=seeds, quick=quick) for s in studies
    ]
    folder = make_directory(Path(output))
    _check_names([study.name for study in opened])
    about = {"code": source_hash(), "version": surroundings()["version"]}
    results = [Results(folder / s.name, {**s.identity, **about}, resume) for s in opened]
    features = None if cache is None else FeatureCache(cache, cache_size)
    summary = Summary(now(), [Experiment(study.name) for study in opened])
    file = folder / "experiments_summary.json"
    with _logging(folder, log_level):
        log.info("%s", ", ".join(f"{name} {value}" for name, value in surroundings().items()))
        try:
            for study, found, experiment in zip(opened, results, summary.experiments, strict=True):
                root = _data_root(study, data_root)
                _run_one(study, found, experiment, root, features)
                summary.write(file)
        finally:
            summary.write(file)
            log.info("summary: %s", file)
    return summary


def _check_names(names: Sequence[str]) -> None:
    """Raise InvalidValueError if two studies would write into one folder."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidValueError(
            f"studies: two are named {twice[0]!r}. Give each a name: of its own."
        )


def _run_one(
    study: Study, results: Results, experiment: Experiment, root: Path | None, cache: Any
) -> None:
    """Run one study; what goes wrong is noted in its experiment."""
    began = time.perf_counter()
    experiment.status = "running"
    _forget_peak()
    log.info("%s: begins, %d cases are finished", study.name, len(results.finished))
    try:
        with _bar(study.name) as report:
            run = Run(study.name, study.config, results, data_root=root, cache=cache, report=report)
            experiment.left_out = run.left_out
            run.check_data()
            run.collect(study.module.measure(study.config, run))
        experiment.status = "success"
    except KeyboardInterrupt:
        experiment.status = "interrupted"
        raise
    except Exception as error:
        _note_failure(study, experiment, error)
    finally:
        _conclude(study, results, experiment)
        experiment.seconds = round(time.perf_counter() - began, 2)
        experiment.peak_memory = peak_memory()
        log.info("%s: %s, %.1f s", study.name, experiment.status, experiment.seconds)


def _conclude(study: Study, results: Results, experiment: Experiment) -> None:
    """Write tables and figures of the rows that there are, also after an error."""
    rows = results.read()
    experiment.rows = len(rows)
    if not rows:
        return
    experiment.results_file = str(results.folder / "rows.csv")
    try:
        table = write_tables(study, rows, results.folder)
        if hasattr(study.module, "draw"):
            study.module.draw(table, results.folder, study.config)
    except Exception as error:
        # Figures of half a study may be impossible, which then is not what went wrong.
        if experiment.status == "success":
            _note_failure(study, experiment, error)
        else:
            log.warning("%s: no tables or figures of what there is: %s", study.name, error)


def _note_failure(study: Study, experiment: Experiment, error: Exception) -> None:
    experiment.status = "failed"
    experiment.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
    log.error("%s: failed: %s", study.name, experiment.error, exc_info=error)


def _data_root(study: Study, given: str | os.PathLike[str] | None) -> Path | None:
    chosen = given or os.environ.get("ANOMALIB_LITE_DATA") or study.config.data_root
    return None if chosen is None else Path(chosen)


@contextmanager
def _logging(folder: Path, level: str) -> Iterator[None]:
    """Write the log into a file of this run, and to standard error."""
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    handlers: list[logging.Handler] = [
        logging.FileHandler(folder / f"experiments_run_{stamp}.log", encoding="utf-8"),
        _Stderr(),
    ]
    before, log.propagate = (log.level, log.propagate), False
    log.setLevel(level)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(before[0])
        log.propagate = before[1]


class _Stderr(logging.Handler):
    """Prints lines above the bar, without tracebacks, which the file has."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the level and the message of a record as one line."""
        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _bar(name: str) -> Iterator[Any]:
    """Show a bar with the time left on a terminal; yield what is told of cases done."""
    with tqdm(desc=name, unit="case", leave=False, disable=None) as bar:

        def report(done: int, total: int) -> None:
            if bar.total is None:
                bar.total, bar.initial = total, max(0, done - 1)
            bar.update(done - bar.n)

        yield report


def _forget_peak() -> None:
    """Let the peak of the memory begin anew, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
