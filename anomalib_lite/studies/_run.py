"""What ``measure`` is handed: cases that are not finished yet, images, backbones, and a test."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from anomalib_lite.datasets import Dataset, Sample
from anomalib_lite.engines import open_backbone, opening_backbones
from anomalib_lite.errors import (
    AnomalibLiteError,
    CalibrationWarning,
    InvalidValueError,
    MissingPathError,
    SharedImagesWarning,
)
from anomalib_lite.evaluation import evaluate
from anomalib_lite.networks import WEIGHTS_VARIABLE, directory_file
from anomalib_lite.studies._config import NetworkConfig, StudyConfig
from anomalib_lite.studies._feature_cache import FeatureCache
from anomalib_lite.studies._provenance import now, of_backbones, surroundings
from anomalib_lite.studies._results import Results, case_id
from anomalib_lite.studies._sources import (
    Images,
    category_names,
    draw_images,
    fingerprint,
    open_category,
)

__all__ = ["METRICS", "Run"]

# Columns of a test -> names of the metrics of a report.
METRICS = {
    "image_auroc": "image_auroc",
    "pixel_auroc": "pixel_auroc",
    "pixel_pr": "pixel_ap",
    "aupro": "aupro",
}
log = logging.getLogger("anomalib_lite.studies")


class Run:
    """One run of a study: the second argument of its ``measure``.

    Parameters
    ----------
    name : str
        Of the study, for the log.
    config : StudyConfig
    results : Results
        Where rows go.
    data_root : Path, optional
        Directory of the data sets.
    cache : FeatureCache, optional
        Used for every backbone that is opened in the run.
    report : callable, optional
        Is told the number of cases done and their total after each case.

    Attributes
    ----------
    seeds : list of int
    categories : list of str
        Those of the configuration that are on this machine.
    left_out : dict of str to str
        Categories and networks that are not, with the reason.
    log : logging.Logger

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = Run("dice", StudyConfig(seeds=[0, 1]), Results(Path(folder), {}, False))
    ...     def measure(run):
    ...         for case in run.cases({"seed": seed} for seed in run.seeds):
    ...             yield {"thrown": 3 + case["seed"]}
    ...     run.collect(measure(run))
    ...     [(row["seed"], row["thrown"]) for row in run.results.read()]
    [(0, 3), (1, 4)]
    """

    def __init__(
        self,
        name: str,
        config: StudyConfig,
        results: Results,
        *,
        data_root: Path | None = None,
        cache: FeatureCache | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.name, self.config, self.results = name, config, results
        self.data_root, self.cache, self.seeds, self.log = data_root, cache, config.seeds, log
        self.left_out: dict[str, str] = {}
        self._report = report
        self._datasets: dict[str, Dataset] = {}
        self._case: dict[str, Any] | None = None
        self._rows: list[dict[str, Any]] = []
        self._opened: list[Any] = []
        self._kept: dict[str, Any] = {}
        self.categories = [name for name in category_names(config.categories) if self._has(name)]

    # --- Cases ----------------------------------------------------------------------------------

    def cases(self, cases: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the cases that have no finished rows yet.

        Parameters
        ----------
        cases : iterable of dict
            What is measured one by one, such as ``{"category": ..., "seed": ...}``.

        Yields
        ------
        dict
            A case. Rows that are yielded before the next one is asked for are its rows: they get
            its keys, and are written at once when it is asked for. What a case left unfinished is
            measured again when the run is resumed.
        """
        if self._case is not None:
            raise InvalidValueError(f"{self.name}: run.cases must not be used inside of run.cases.")
        wanted = [dict(case) for case in cases]
        done = 0
        for number, case in enumerate(wanted, start=1):
            name = case_id(case)
            if name in self.results.finished:
                done += 1
                continue
            began, self._case = time.perf_counter(), case
            self._rows, self._opened = [], []
            try:
                yield case
                self.results.append(name, self._rows)
            finally:
                self._case = None
            done += 1
            seconds = time.perf_counter() - began
            text = ", ".join(f"{key}={value}" for key, value in case.items())
            log.info("%s: %d/%d %s (%.1f s)", self.name, number, len(wanted), text, seconds)
            if self._report is not None:
                self._report(done, len(wanted))
        if done == len(wanted) and self._report is not None:
            self._report(done, len(wanted))

    def collect(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take the rows that ``measure`` yields, to the end."""
        with opening_backbones(self._open_backbone):
            for row in rows:
                if self._case is None:
                    raise InvalidValueError(
                        f"{self.name}: measure must yield rows inside of run.cases(...), got a row "
                        "outside."
                    )
                about = {**of_backbones(self._opened), **surroundings(), "timestamp": now()}
                whole = {"seed": None, **self._case, **row}
                whole |= {key: value for key, value in about.items() if whole.get(key) is None}
                self._rows.append(whole)

    def without_cache(self) -> AbstractContextManager[None]:
        """Return a context in which every embedding is computed, as where times are measured."""
        return contextlib.nullcontext() if self.cache is None else self.cache.paused()

    # --- Data and networks ------------------------------------------------------------------------

    def open(self, category: str, seed: int = 0) -> Images:
        """Draw images of a category that is one of :attr:`categories`.

        Parameters
        ----------
        category : str
        seed : int, default=0
            Draws the images to fit on, at most ``max_train``. Those to test, at most ``max_test``
            and half of them normal, are the same for all seeds.

        Returns
        -------
        Images

        Raises
        ------
        InvalidValueError
            If they are not the images that earlier rows of this folder are of.
        """
        if category not in self._datasets:
            self._datasets[category] = open_category(category, self.data_root)
        dataset, config = self._datasets[category], self.config
        train, test = draw_images(dataset, seed, config.max_train, config.max_test)
        self.check_images(_drawn(category, seed), [*train, *test])
        return Images(category, train, test)

    def check_images(self, name: str, samples: Sequence[Sample]) -> None:
        """Note the images of a study that draws its own; :meth:`open` does this for the others.

        Raises
        ------
        InvalidValueError
            If earlier rows of this folder are of other images of this name.
        """
        self.results.check_data(name, fingerprint(samples))

    def networks(self, networks: Mapping[str, NetworkConfig]) -> dict[str, NetworkConfig]:
        """Return the networks that can be opened on this machine; the others are left out.

        A file of weights that does not exist is looked for in ``ANOMALIB_LITE_WEIGHTS``, under its
        own name, and then under that of the network.

        Raises
        ------
        MissingPathError
            If one cannot, and the configuration says ``missing: refuse``; or if none can.
        InvalidValueError
            If earlier rows of this folder are of other weights of a network of this name.
        """
        found = {}
        for name, given in networks.items():
            network = given.model_copy(update={"weights": self._weights(given)})
            try:
                opened = open_backbone(
                    network.backbone,
                    weights=network.weights,
                    layers=network.layers,
                    engine="torch",  # which converts no graph
                    where=self.name,
                )
            except AnomalibLiteError as error:
                self._leave_out(name, error)
            else:
                self.results.check_data(f"weights of {name}", opened.sha256[:16])
                found[name] = network
        if networks and not found:
            raise self._nothing_left("network")
        return found

    def _weights(self, network: NetworkConfig) -> Path | None:
        """Return the file of the weights; None for what is installed or comes from the hub."""
        file, directory = network.weights, os.environ.get(WEIGHTS_VARIABLE)
        if file is None or file.is_file() or not directory:
            return file
        beside = Path(directory) / file.name
        return beside if beside.is_file() else directory_file(network.backbone, self.name) or file

    def _has(self, category: str) -> bool:
        try:
            self._datasets[category] = open_category(category, self.data_root)
        except (AnomalibLiteError, OSError) as error:
            self._leave_out(category, error)
            return False
        return True

    def check_data(self) -> None:
        """Raise if no category is here, or images differ from those that finished rows are of."""
        if self.config.categories and not self.categories:
            raise self._nothing_left("category")
        for category in self.categories:
            for seed in self.seeds:
                if self.results.knows_data(_drawn(category, seed)):
                    self.open(category, seed)

    def _leave_out(self, name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())
        if self.config.missing == "refuse":
            raise MissingPathError(
                f"{self.name}: {name} is not on this machine, and the configuration says missing: "
                f"refuse. {reason}"
            ) from error
        self.left_out[name] = reason
        log.warning("%s: %s is left out: %s", self.name, name, reason)

    def _nothing_left(self, kind: str) -> MissingPathError:
        first = next(iter(self.left_out.values()), "")
        return MissingPathError(f"{self.name}: no {kind} of it is on this machine. {first}")

    def _open_backbone(self, open_it: Callable[[], Any], arguments: dict[str, Any]) -> Any:
        """Open a backbone with the cache, and note it for the rows of this case.

        To open one takes seconds. Compiled graphs cannot be changed by who uses them, so they are
        kept for the cases that follow.
        """
        key = repr(sorted((name, value) for name, value in arguments.items() if name != "where"))
        backbone = self._kept.get(key)
        if backbone is None:
            backbone = open_it()
            if self.cache is not None:
                backbone = self.cache.wrap(backbone)
            if isinstance(arguments["backbone"], str) and backbone.engine != "torch":
                self._kept[key] = backbone
        self._opened.append(backbone)
        return backbone

    # --- A test -----------------------------------------------------------------------------------

    def fit(self, detector: Any, train: Sequence[Sample]) -> Any:
        """Fit a detector, and return it. Few images give no warning: rates are measured here."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            return detector.fit(list(train))

    def test(self, detector: Any, test: Sequence[Sample]) -> dict[str, Any]:
        """Test a fitted detector, as :func:`~anomalib_lite.evaluation.evaluate` does.

        Parameters
        ----------
        detector : Detector
        test : sequence of Sample

        Returns
        -------
        dict of str to float or None
            ``image_auroc``; ``pixel_auroc``, ``pixel_pr`` (average precision) and ``aupro``, None
            without masks; and ``n_test``.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SharedImagesWarning)
            report = evaluate(detector, test)
        found = {column: report.metrics.get(name) for column, name in METRICS.items()}
        return {**found, "n_test": len(test)}


def _drawn(category: str, seed: int) -> str:
    return f"{category}, seed {seed}"
