"""Shards of images that are processed by joblib's workers: processes, or a cluster."""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import joblib
import numpy as np

from anomalib_lite import errors
from anomalib_lite.detectors.fitting.model import EmbeddingModel, ShardResult, ShardTask
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import AnomalibLiteError, InvalidValueError, WorkerError
from anomalib_lite.images import Extractor, ImageSource
from anomalib_lite.images.embeddings import embed_all

__all__ = ["distribute"]

# Errors by which backends report a lost worker, beside BrokenExecutor.
_BACKEND_ERRORS = ("KilledWorker", "PicklingError", "CommClosedError", "CancelledError")

# The backbone of this process, by the name of the fit that uses it: opened once for all shards.
_backbones: dict[str, AnyBackbone] = {}
_LOCK = threading.Lock()


def distribute(
    shards: Iterator[tuple[int, ImageSource]],
    task: ShardTask | None,
    *,
    backbone: AnyBackbone,
    reopen: Callable[[], AnyBackbone],
    extractor: Extractor,
    n_jobs: int,
    where: str,
) -> Iterator[ShardResult]:
    """Carry out the task on each shard in the workers of joblib's backend.

    Parameters
    ----------
    shards : iterator of (int, ImageSource)
        Position and images of each shard.
    task : ShardTask or None
        None means that each result holds the embeddings themselves.
    backbone : Backbone or CompiledBackbone
        The backbone of this process.
    reopen : callable
        Opens the same backbone in another process.
    extractor : Extractor
        Options of embedding: image size, batch size and the like.
    n_jobs : int
    where : str
        First word of error messages.

    Yields
    ------
    ShardResult
        In the order of the shards.

    Raises
    ------
    AnomalibLiteError
        Error of the first shard that failed by a cause a user can remove.
    WorkerError
        If a worker ended, or something could not be sent to it.
    """
    with _kept(backbone) as fit, _translated_errors(where):
        make = _ExtractorMaker(fit, reopen, backbone.sha256, _options(extractor), where)
        results = _start(_tasks(shards, task, make), n_jobs, where)
        try:
            for result in results:
                if result.error is not None:
                    name, message = result.error
                    raise getattr(errors, name)(message)
                yield result
        finally:
            with warnings.catch_warnings():  # joblib warns of work that is cancelled
                warnings.simplefilter("ignore")
                results.close()


@dataclass(frozen=True)
class _ExtractorMaker:
    """Makes the extractor of a fit in the process in which it is called."""

    fit: str
    reopen: Callable[[], AnyBackbone]
    sha256: str
    options: dict[str, Any]
    where: str

    def __call__(self) -> Extractor:
        """Return the extractor; the backbone is opened only for the first shard."""
        with _LOCK:
            backbone = _backbones.get(self.fit)
            if backbone is None:
                backbone = self.reopen()
                if backbone.sha256 != self.sha256:
                    raise InvalidValueError(
                        f"{self.where}: a worker has other weights of the backbone (SHA-256 "
                        f"{backbone.sha256[:12]}, not {self.sha256[:12]}). Put the same file on "
                        "all machines."
                    )
                _backbones.clear()  # that of an earlier fit
                _backbones[self.fit] = backbone
        return Extractor(backbone, **self.options)


def _options(extractor: Extractor) -> dict[str, Any]:
    """Return the fields of an extractor without its backbone."""
    options = {f.name: getattr(extractor, f.name) for f in fields(extractor)}
    del options["backbone"]
    return options | {"verbose": 0}


@contextmanager
def _kept(backbone: AnyBackbone) -> Iterator[str]:
    """Register a backbone for backends that run in this process; yield the name of the fit."""
    fit = uuid.uuid4().hex
    with _LOCK:
        _backbones[fit] = backbone
    try:
        yield fit
    finally:
        with _LOCK:
            _backbones.pop(fit, None)


def _tasks(
    shards: Iterator[tuple[int, ImageSource]],
    task: ShardTask | None,
    make_extractor: _ExtractorMaker,
) -> Iterator[Any]:
    """Yield joblib's tasks; they do not contain the backbone."""
    model, state = None, None
    arrays: dict[str, np.ndarray] = {}
    if task is not None and task.model is not None:
        # Arrays are arguments of their own: backends send or map each to a worker only once.
        arrays, state = task.model._get_state()
        parameters = task.model.get_params(deep=False)
        parameters |= dict.fromkeys({"backbone", "n_jobs"} & parameters.keys())
        model, task = type(task.model)(**parameters), replace(task, model=None)
    for position, shard in shards:
        yield joblib.delayed(_work_on)(
            make_extractor, shard, position, task, model, state, list(arrays), *arrays.values()
        )


def _start(tasks: Iterator[Any], n_jobs: int, where: str) -> Any:
    """Hand the tasks to joblib; return the generator of their results."""
    try:
        return joblib.Parallel(n_jobs=n_jobs, return_as="generator")(tasks)
    except Exception as error:
        if "return_as" not in str(error):
            raise
        raise InvalidValueError(
            f"{where}: this backend of joblib cannot give results one by one. Use 'loky', "
            "'threading' or 'dask', or n_jobs=None."
        ) from error


@contextmanager
def _translated_errors(where: str) -> Iterator[None]:
    """Turn errors of joblib's backend about lost workers into WorkerError."""
    try:
        yield
    except Exception as error:
        lost = isinstance(error, BrokenExecutor) or type(error).__name__ in _BACKEND_ERRORS
        if not lost and not (isinstance(error, TypeError) and "pickle" in str(error)):
            raise
        first_line = str(error).partition("\n")[0]
        raise WorkerError(
            f"{where}: a worker ended, or could not be given its work "
            f"({type(error).__name__}: {first_line}). Give it more memory (or set memory_budget), "
            "pass paths in place of objects, or fit with n_jobs=None."
        ) from error


def _work_on(
    make_extractor: _ExtractorMaker,
    shard: ImageSource,
    position: int,
    task: ShardTask | None,
    model: EmbeddingModel | None,
    state: dict[str, Any] | None,
    names: list[str],
    *arrays: np.ndarray,
) -> ShardResult:
    """Carry out the task in a worker.

    Errors that a user can cause are returned and not raised, so that the caller can raise the error
    of the first shard.
    """
    try:
        extractor = make_extractor()
        if task is not None and model is not None and state is not None:
            model._set_state(dict(zip(names, arrays, strict=True)), state)
            task = replace(task, model=model)
        channels = None if task is None else task.channels
        E, skipped = embed_all(extractor, shard, channels=channels)
        if task is None:
            result = ShardResult(embeddings=E)
        else:
            result = task(E, position, range(position, position + len(shard)))
        result.skipped = skipped
        return result
    except AnomalibLiteError as error:
        return ShardResult(error=(type(error).__name__, str(error)))
