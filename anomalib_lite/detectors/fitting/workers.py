"""Shards of images, worked on by others: processes, or a cluster that joblib knows."""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np

from anomalib_lite import errors
from anomalib_lite.adapter import Adapter
from anomalib_lite.detectors._patch_accumulator import Collector
from anomalib_lite.embeddings import Embeddings
from anomalib_lite.engines import AnyBackbone
from anomalib_lite.errors import AnomalibLiteError, InvalidValueError, WorkerError
from anomalib_lite.images import ImageSource

if TYPE_CHECKING:
    from anomalib_lite.detectors.base import BaseDetector

__all__ = ["Part", "Work", "distribute"]

# How the backends say that a worker is gone or cannot be reached, beside BrokenExecutor.
_BACKEND_ERRORS = ("KilledWorker", "PicklingError", "CommClosedError", "CancelledError")

# A process's backbone, under the name of the fit that it serves: built once, not once a shard.
_backbones: dict[str, AnyBackbone] = {}
_LOCK = threading.Lock()


@dataclass
class Part:
    """What became of one shard: its embeddings or what was collected of them, and its scores."""

    collected: Any = None
    scores: np.ndarray | None = None
    skipped: Sequence[tuple[int, str]] = ()
    error: tuple[str, str] | None = None  # class and message: not all backends can send the object


@dataclass
class Work:
    """What is to be done with the embeddings of a shard."""

    blank: Collector | None = None  # an empty collector: put them into one like it
    learned: BaseDetector | None = None  # what was learned so far
    score: bool = False  # with ``learned``

    @property
    def channels(self) -> np.ndarray | None:
        """Channels of the embeddings that it needs; None for all."""
        if self.blank is not None:
            return self.blank.channels
        return None if self.learned is None else self.learned._channels

    def __call__(self, E: Embeddings, position: int) -> Part:
        """Do it; ``position`` is that of the shard's first image."""
        if len(E) == 0:
            return Part()
        known = None if self.learned is None else self.learned._known_rows()
        scores = self.learned._image_scores(E) if self.learned and self.score else None
        return Part(None if self.blank is None else self.blank.of(E, position, known), scores)


def distribute(
    detector: BaseDetector,
    backbone: AnyBackbone,
    shards: Iterator[tuple[int, ImageSource]],
    work: Work | None,
) -> Iterator[Part]:
    """Do the work on each shard where joblib's backend decides; the parts come in order.

    Without ``work``, a part holds the embeddings themselves.
    """
    bare = type(detector)(**detector.get_params(deep=False)).set_params(verbose=0, n_jobs=None)
    # Not what "auto" would become there: embeddings of one kind alone belong into one bank.
    bare.set_params(engine=backbone.engine, dtype=str(backbone.dtype).removeprefix("torch."))
    fit = uuid.uuid4().hex
    with _LOCK:
        _backbones[fit] = backbone  # for backends that stay in this process
    state: Any = None
    arrays: dict[str, np.ndarray] = {}
    if work is not None and work.learned is not None:
        # As arrays among the arguments: backends send or map each to a worker only once.
        arrays, state = work.learned._get_state()
        work = replace(work, learned=None)
    tasks = (
        joblib.delayed(_work_on)(
            bare,
            fit,
            (backbone.sha256, backbone.adapter),
            shard,
            position,
            work,
            state,
            list(arrays),
            *arrays.values(),
        )
        for position, shard in shards
    )
    parts: Any = None
    try:
        parts = joblib.Parallel(n_jobs=detector.n_jobs, return_as="generator")(tasks)
        for part in parts:
            if part.error is not None:
                name, message = part.error
                raise getattr(errors, name)(message)
            yield part
    except Exception as error:
        if parts is None and "return_as" in str(error):
            raise InvalidValueError(
                f"{type(detector).__name__}: this backend of joblib cannot give results one by "
                "one. Use 'loky', 'threading' or 'dask', or n_jobs=None."
            ) from error
        lost = isinstance(error, BrokenExecutor) or type(error).__name__ in _BACKEND_ERRORS
        if not lost and not (isinstance(error, TypeError) and "pickle" in str(error)):
            raise
        first_line = str(error).partition("\n")[0]
        raise WorkerError(
            f"{type(detector).__name__}: a worker ended, or could not be given its work "
            f"({type(error).__name__}: {first_line}). Give it more memory (or set memory_budget), "
            "pass paths in place of objects, or fit with n_jobs=None."
        ) from error
    finally:
        with warnings.catch_warnings():  # joblib's, of work that is not needed any more
            warnings.simplefilter("ignore")
            if parts is not None:
                parts.close()
        with _LOCK:
            _backbones.pop(fit, None)


def _work_on(
    detector: BaseDetector,
    fit: str,
    weights: tuple[str, Adapter | None],
    shard: ImageSource,
    position: int,
    work: Work | None,
    state: dict[str, Any] | None,
    names: list[str],
    *arrays: np.ndarray,
) -> Part:
    """In a worker. An error that is the user's is returned: the first shard's is raised there."""
    try:
        with _LOCK:
            backbone = _backbones.get(fit)
            if backbone is None:
                sha256, adapter = weights
                backbone = detector._open_backbone(adapter=adapter)
                if backbone.sha256 != sha256:
                    raise InvalidValueError(
                        f"{type(detector).__name__}: a worker has other weights of the backbone "
                        f"(SHA-256 {backbone.sha256[:12]}, not {sha256[:12]}). Put the same file "
                        "on all machines."
                    )
                _backbones.clear()  # that of an earlier fit
                _backbones[fit] = backbone
        if work is not None and state is not None:
            detector._set_state(dict(zip(names, arrays, strict=True)), state)
            work = replace(work, learned=detector)
        channels = None if work is None else work.channels
        E, skipped = detector._embed_all(backbone, shard, channels=channels)
        part = Part(E) if work is None else work(E, position)
        part.skipped = skipped
        return part
    except AnomalibLiteError as error:
        return Part(error=(type(error).__name__, str(error)))
