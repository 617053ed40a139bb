"""One thread a core, each of which computes alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController, threadpool_limits

__all__ = ["n_cores", "one_blas_thread", "workers"]


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
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(n_cores()) as executor:
            yield executor
        return
    before = torch.get_num_threads()
    # torch keeps its number of threads for each thread, and a default for those to come.
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(n_cores(), initializer=torch.set_num_threads, initargs=(1,)) as executor,
    ):
        try:
            yield executor
        finally:
            torch.set_num_threads(before)


def one_blas_thread() -> AbstractContextManager[Any]:
    """Let small products be made by the calling thread alone.

    A second thread of OpenBLAS would go on spinning for some 20 ms afterwards, on the core that
    the next image's network needs.
    """
    limit: AbstractContextManager[Any] = _controller().limit(limits=1, user_api="blas")
    return limit


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all libraries, which takes milliseconds
