"""FAISS indexes: a factory string -> a trained index -> bytes. The only import of FAISS."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from anomalib_lite._threads import sleeping_when_idle
from anomalib_lite._validation import check_int, closest
from anomalib_lite.errors import InvalidValueError

with sleeping_when_idle():
    import faiss

__all__ = ["build", "check_index", "deserialize", "faiss", "serialize", "set_search_parameters"]

_WELL_KNOWN = ("flat", "HNSW32", "IVF64,Flat", "IVF256,Flat", "SQ8", "PQ8", "IVF64,PQ8")


def check_index(index: object, where: str, **parameters: int | None) -> None:
    """Raise InvalidValueError unless FAISS can build ``index`` and it has the search parameters.

    ``"flat"`` is valid too; it has no search parameters. See :func:`set_search_parameters`.
    """
    built = None
    try:
        if not isinstance(index, str):
            raise RuntimeError("not a string")
        if index != "flat":
            # The dimension is not known yet, and some indexes need one that their numbers divide:
            # use a common multiple of all numbers in the string.
            dividing = re.sub("(IVF|HNSW)[0-9]+", "", index)
            dimension = math.lcm(*(int(n) for n in re.findall("[1-9][0-9]*", dividing)))
            built = faiss.index_factory(min(dimension, 65536), index)
    except RuntimeError as error:
        raise InvalidValueError(
            f"{where}: index must be 'flat' or a FAISS index-factory string such as "
            f"{list(_WELL_KNOWN[1:])}, got {index!r}.{closest(index, _WELL_KNOWN)}"
        ) from error
    set_search_parameters(built, index, where, **parameters)


def build(X: np.ndarray, index: str) -> Any:
    """Build the index that the string names, train it on ``X`` (N, D) and add ``X`` to it."""
    try:
        built = faiss.index_factory(X.shape[1], index)
        _silence_training(built)
        built.train(X)
        built.add(X)
    except RuntimeError as error:
        raise InvalidValueError(
            f"MemoryBank: index={index!r} cannot hold {X.shape[0]} embeddings of "
            f"{X.shape[1]} dimensions ({_reason(error)}). Use index='flat', or one "
            "with fewer lists or other sub-quantisers."
        ) from error
    return built


def set_search_parameters(index: Any, string: str, where: str, **parameters: int | None) -> None:
    """Set FAISS's search parameters ``nprobe`` and ``efSearch``; None keeps FAISS's own value."""
    for name, value in parameters.items():
        if value is None:
            continue
        ours = {"efSearch": "ef_search"}.get(name, name)
        check_int(ours, value, where, low=1)
        try:
            if index is None:
                raise RuntimeError("a flat index always looks at all")
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError as error:
            kind = {"nprobe": "IVF256,Flat", "efSearch": "HNSW32"}[name]
            raise InvalidValueError(
                f"{where}: index={string!r} has no {ours} to set to {value}. Leave it None, or "
                f"take an index such as {kind!r}."
            ) from error


def serialize(index: Any) -> np.ndarray:
    """Write an index to bytes, (n,) uint8."""
    return np.asarray(faiss.serialize_index(index))


def deserialize(serialized: np.ndarray, shape: tuple[int, ...]) -> Any:
    """Read an index from the bytes of :func:`serialize`; it must hold embeddings of ``shape``."""
    serialized = np.asarray(serialized)
    if serialized.dtype != np.uint8 or serialized.ndim != 1:
        raise InvalidValueError(
            "MemoryBank: the serialized index must have shape (n,) and dtype uint8, got "
            f"{serialized.shape} and {serialized.dtype}."
        )
    try:
        index = faiss.deserialize_index(serialized)
    except RuntimeError as error:
        raise InvalidValueError(
            f"MemoryBank: the serialized index is broken ({_reason(error)})."
        ) from error
    if (index.ntotal, index.d) != shape:
        raise InvalidValueError(
            f"MemoryBank: the index holds {index.ntotal} embeddings of "
            f"{index.d} dimensions, expected {shape}."
        )
    return index


def _silence_training(index: Any) -> None:
    """Keep FAISS from printing that a coreset has few rows per centroid."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    for clustered in (index, getattr(index, "pq", index)):
        if hasattr(clustered, "cp"):
            clustered.cp.min_points_per_centroid = 1


def _reason(error: RuntimeError) -> str:
    """Return FAISS's message without its function and file names."""
    return str(error).rsplit("Error: ", 1)[-1].splitlines()[0].strip()
