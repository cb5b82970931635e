"""Independent pieces of work on the threads of torch's own OpenMP runtime.

torch gives every matmul to all threads. For experts of a few hundred rows each, that is a fork and a join every
millisecond, and caches that change hands. It is better to give every thread experts of its own. Inside a parallel
region of OpenMP, torch and its BLAS use one thread, so that a region opened from here is all it takes, and nobody's
setting is changed. Threads of Python's own would each start as many OpenMP threads as there are processors.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from mhmoe_vl.moe.memory import Workspace

TaskT = TypeVar("TaskT")

#: The longest task may be this much longer than a fair share of all.
LARGEST_IMBALANCE = 1.2


class OpenMP:
    """The runtime that torch has loaded.

    Attributes:
        functions: addresses of ``GOMP_parallel``, ``omp_get_thread_num`` and ``omp_get_num_threads``.

    Raises:
        OSError: it is out of reach.
    """

    _FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    _MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def __init__(self) -> None:
        path = _find_runtime()
        library = ctypes.CDLL(str(path))
        try:
            functions = [getattr(library, name) for name in self._FUNCTIONS]
        except AttributeError as error:
            raise OSError(f"{path}: {error}") from None
        self.functions = [ctypes.cast(function, ctypes.c_void_p) for function in functions]
        self._parallel = functions[0]
        self._parallel.restype = None
        self._parallel.argtypes = [self._MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]

    def run(self, member: Callable[[], None], num_threads: int) -> None:
        """Call ``member()`` on up to ``num_threads`` threads at once, this one among them."""
        failures: list[BaseException] = []

        def call(_: object) -> None:
            # Every thread has its own mode, and a thread that is not Python's has no idea of ours.
            try:
                with torch.no_grad():
                    member()
            except BaseException as error:
                failures.append(error)

        self._parallel(self._MEMBER(call), None, num_threads, 0)
        if failures:
            raise failures[0]


def _find_runtime() -> Path:
    """The runtime of torch's own folder, if there are several in this process."""
    if sys.platform != "linux":
        raise OSError(f"torch's threads are out of reach on {sys.platform}")
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = {Path(line.split()[-1]) for line in lines if "omp" in line}
    runtimes = sorted(path for path in loaded if path.name.startswith(("libgomp", "libiomp5", "libomp")))
    own = [path for path in runtimes if path.is_relative_to(Path(torch.__file__).parent)]
    for candidates in (own, runtimes):
        if len(candidates) == 1:
            return candidates[0]
    raise OSError(f"which OpenMP runtime is torch's: {', '.join(map(str, runtimes)) or 'none is loaded'}")


def _load() -> tuple[OpenMP | None, str]:
    try:
        return OpenMP(), "torch's threads in reach"
    except OSError as error:
        return None, f"torch's threads out of reach ({error})"


#: None where it is out of reach; the reason is in :data:`STATE`.
OPENMP, STATE = _load()


def can_share(sizes: Sequence[int]) -> bool:
    """Whether tasks of these sizes keep all threads of torch busy, one task on one thread each."""
    num_threads = torch.get_num_threads()
    if OPENMP is None or num_threads == 1 or not sizes:
        return False
    return num_threads * max(sizes) <= LARGEST_IMBALANCE * sum(sizes)


def share(tasks: Sequence[TaskT], function: Callable[[TaskT, Workspace], None]) -> None:
    """``function(task, workspace)`` for all tasks, in this order, on all threads of torch."""
    assert OPENMP is not None
    queue = iter(tasks)

    def member() -> None:
        with Workspace.borrow() as workspace:
            # next() of a list's iterator is one step for all threads.
            for task in queue:
                function(task, workspace)

    OPENMP.run(member, min(torch.get_num_threads(), len(tasks)))


def for_each(tasks: Sequence[TaskT], sizes: Sequence[int], function: Callable[[TaskT, Workspace], None]) -> None:
    """``function(task, workspace)`` for all tasks: each on a thread of its own if their sizes allow it, else one after
    the other, so that all threads share what a task calls."""
    if can_share(sizes):
        # The largest first: what is left at the end should be small.
        order = sorted(range(len(tasks)), key=lambda number: sizes[number], reverse=True)
        share([tasks[number] for number in order], function)
        return
    with Workspace.borrow() as workspace:
        for task in tasks:
            function(task, workspace)
