"""Memory that is used again instead of being asked of the operating system anew.

Memory that is touched for the first time is filled in by the kernel page by page, which on a CPU costs more than what a
layer then does with it: at 169 experts, twice the matmuls that write the experts' gradients. So large results take over
the memory of earlier ones of the same size that nobody holds any longer, as the GPU's allocator does.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

#: Smaller tensors come from torch: the C library keeps such pieces by itself.
SMALLEST = 1 << 20


class RecycledMemory:
    """Hands out uninitialised tensors on the CPU, in memory that returns when the last tensor in it is gone.

    Memory that nobody uses is given back to the system once it is more than what is in use, whenever a new size is
    asked for. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Filled by finalizers, which may run anywhere, in the middle of empty() too: appending is all they do.
        self._returned: deque[Tensor] = deque()
        # By size, and in the order of their return: the oldest go first.
        self._idle: dict[int, deque[Tensor]] = {}
        self._num_idle_bytes = 0
        self._num_used_bytes = 0

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with arbitrary values."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < SMALLEST:
            return torch.empty(shape, dtype=dtype, device="cpu")
        slab = self._take(num_bytes)
        # The tensor's storage holds the lease, and the lease's end returns the slab.
        lease = (ctypes.c_char * num_bytes).from_address(slab.data_ptr())
        weakref.finalize(lease, self._returned.append, slab).atexit = False
        return torch.frombuffer(lease, dtype=dtype).view(shape)

    @property
    def num_idle_bytes(self) -> int:
        """Bytes that are kept for later."""
        with self._lock:
            self._collect()
            return self._num_idle_bytes

    def _take(self, num_bytes: int) -> Tensor:
        with self._lock:
            self._collect()
            self._num_used_bytes += num_bytes
            if self._idle.get(num_bytes):
                self._num_idle_bytes -= num_bytes
                return self._idle[num_bytes].pop()
            self._shrink()
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def _collect(self) -> None:
        while self._returned:
            slab = self._returned.popleft()
            self._num_used_bytes -= slab.numel()
            self._num_idle_bytes += slab.numel()
            # Sizes in the order of their last return.
            slabs = self._idle.pop(slab.numel(), None) or deque()
            slabs.append(slab)
            self._idle[slab.numel()] = slabs

    def _shrink(self) -> None:
        for num_bytes, slabs in list(self._idle.items()):
            while slabs and self._num_idle_bytes > self._num_used_bytes:
                slabs.popleft()
                self._num_idle_bytes -= num_bytes
            if not slabs:
                del self._idle[num_bytes]


class Workspace:
    """Scratch tensors, by name, width and dtype, that grow to the most rows asked for and stay in cache."""

    _idle: ClassVar[deque[Workspace]] = deque()

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int, torch.dtype], Tensor] = {}

    @classmethod
    @contextmanager
    def borrow(cls) -> Iterator[Workspace]:
        """A workspace that nobody else has until the end of the block. They are few, one for each thread that works at
        the same time, and not bound to threads: those of OpenMP are new to Python every time."""
        try:
            workspace = cls._idle.pop()
        except IndexError:
            workspace = cls()
        try:
            yield workspace
        finally:
            cls._idle.append(workspace)

    def __call__(self, name: str, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """``[num_rows, width]``, with arbitrary values; another call of the same name takes it over."""
        buffer = self._buffers.get((name, width, dtype))
        if buffer is None or buffer.shape[0] < num_rows:
            buffer = self._buffers[name, width, dtype] = torch.empty(num_rows, width, dtype=dtype, device="cpu")
        return buffer[:num_rows]


recycled = RecycledMemory()
