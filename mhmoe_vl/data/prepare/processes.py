"""Run jobs in worker processes, results in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mhmoe_vl.errors import OutputError

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

_JOBS_AHEAD = 2


def map_in_processes(
    function: Callable[[JobT], ResultT], jobs: Iterable[JobT], *, num_workers: int
) -> Iterator[ResultT]:
    """``map`` over processes that draws only a few jobs ahead; in this process if ``num_workers`` is at most 1.

    Raises:
        OutputError: a worker process was killed.
    """
    if num_workers <= 1:
        yield from map(function, jobs)
        return
    pending: deque[Future[ResultT]] = deque()
    with ProcessPoolExecutor(num_workers, initializer=_follow_parent) as pool:
        try:
            for job in jobs:
                pending.append(pool.submit(function, job))
                if len(pending) >= _JOBS_AHEAD * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise OutputError(
                "a worker process was killed, perhaps for want of memory; run the same command again to go on, "
                "with fewer --workers"
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _follow_parent() -> None:
    """Let the parent alone decide when this worker ends, and end at once if the parent is killed."""
    # Ctrl-C reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker of the standard library would wait for its next job for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
