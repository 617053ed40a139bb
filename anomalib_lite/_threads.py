"""One thread per core, each of which computes alone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

__all__ = ["n_cores", "one_blas_thread", "requested_threads", "sleeping_when_idle", "workers"]


def n_cores() -> int:
    """Number of cores that this process should use: at most :func:`requested_threads`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, requested_threads() or sys.maxsize)


def requested_threads() -> int | None:
    """Number in the variable ``OMP_NUM_THREADS``, which torch and FAISS obey too; None without.

    joblib sets it in workers that share a machine.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else None


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Open an executor with one thread per core, in which BLAS and torch use one thread each.

    Work is cut into blocks, and each thread takes its block through all steps while the block is
    in the core's cache. A BLAS with many threads would parallelise the product alone.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        with one_blas_thread(), ThreadPoolExecutor(n_cores()) as executor:
            yield executor
        return
    # torch stores a number of threads per thread, and a default for new threads.
    threads = ThreadPoolExecutor(n_cores(), initializer=torch.set_num_threads, initargs=(1,))
    with one_blas_thread(), _torch_default, threads as executor:
        yield executor


def one_blas_thread() -> AbstractContextManager[Any]:
    """Let the calling thread alone compute small products.

    A second thread of OpenBLAS would go on spinning for some 20 ms afterwards, on the core that
    the network needs for the next image.
    """
    return _one_blas_thread


@contextmanager
def sleeping_when_idle() -> Iterator[None]:
    """Import a library within this context, and its OpenMP threads sleep when they are idle.

    Otherwise they go on spinning for milliseconds, on the cores that the network needs for the
    next image. OpenMP reads ``OMP_WAIT_POLICY`` once, when it is loaded; a value that is already
    set stays as it is.
    """
    name = "OMP_WAIT_POLICY"
    if name in os.environ:
        yield
        return
    os.environ[name] = "passive"
    try:
        yield
    finally:
        del os.environ[name]


class _Shared:
    """A setting of the whole process, shared by all threads that ask for it.

    The first thread to enter makes it, and the last to leave undoes it. If each thread restored
    the value it had found, the last would restore what another thread had set.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._lock, self._n_inside = make, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._setting = self._make()
                self._setting.__enter__()
            self._n_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                self._setting.__exit__(None, None, None)


@cache
def _controller(has_torch: bool) -> ThreadpoolController:
    return ThreadpoolController()  # searches all loaded libraries, which takes milliseconds


@contextmanager
def _keep_torch_default() -> Iterator[None]:
    torch = sys.modules["torch"]
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


_one_blas_thread = _Shared(
    lambda: _controller("torch" in sys.modules).limit(limits=1, user_api="blas")
)
_torch_default = _Shared(_keep_torch_default)
