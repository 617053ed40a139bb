"""One thread a core, each of which computes alone."""

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

__all__ = ["n_cores", "one_blas_thread", "sleeping_when_idle", "workers"]


def n_cores() -> int:
    """Cores that this process should use.

    The variable ``OMP_NUM_THREADS`` limits them, as joblib does in workers that share a machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores or 1, int(limit))) if limit.isdigit() else cores or 1


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """An executor with one thread a core, in which BLAS and torch use one thread each.

    Work is cut into blocks, and each thread takes its block through all steps while it is in the
    core's cache. A BLAS of many threads would parallelise the product alone.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        with one_blas_thread(), ThreadPoolExecutor(n_cores()) as executor:
            yield executor
        return
    # torch keeps its number of threads for each thread, and a default for those to come.
    threads = ThreadPoolExecutor(n_cores(), initializer=torch.set_num_threads, initargs=(1,))
    with one_blas_thread(), _torch_default, threads as executor:
        yield executor


def one_blas_thread() -> AbstractContextManager[Any]:
    """Let small products be made by the calling thread alone.

    A second thread of OpenBLAS would go on spinning for some 20 ms afterwards, on the core that
    the next image's network needs.
    """
    return _one_blas_thread


@contextmanager
def sleeping_when_idle() -> Iterator[None]:
    """Let the OpenMP of a library that is imported within put its threads to sleep after work.

    Else they go on spinning for milliseconds, on the cores that the next image's network needs.
    OpenMP reads the variable once, when it is loaded; one that is set already stays as it is.
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
    """A setting of the whole process: made by the first thread to come in, undone by the last to
    leave. If each undid its own, the last would leave behind what another had set.
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
    return ThreadpoolController()  # looks through all libraries, which takes milliseconds


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
