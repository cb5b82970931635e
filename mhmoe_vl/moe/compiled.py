"""The compiled loops of the CPU engine, on the threads of torch: an extra that may be absent.

``pip install`` builds the C files beside this one where there is a C compiler. Without them torch's own
operations do the same, in several passes over memory.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from mhmoe_vl.moe import threads

#: Fewer values than this are not worth waking other threads for (at::internal::GRAIN_SIZE of torch).
_GRAIN = 32768

#: As ``GROUP_ROWS`` of ``vector.h``: of sums over rows, each group of so many has its own.
GROUP_ROWS = 32

SOURCES = ("activations.c", "activations_bfloat16.c", "choice.c", "order.c", "rows.c", "activations.h", "vector.h")
DTYPES = (torch.float32, torch.bfloat16)

_POINTER, _NUMBER, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_AHEAD = [_POINTER, _NUMBER]
_ARGUMENTS = {
    "mhmoe_activate": [_FLAG, _FLAG, *[_POINTER] * 3, *[_NUMBER] * 2, *_AHEAD],
    "mhmoe_activate_backward": [_FLAG, _FLAG, *[_POINTER] * 8, *[_NUMBER] * 2, *_AHEAD],
    "mhmoe_choose": [*[_POINTER] * 5, *[_NUMBER] * 4],
    "mhmoe_choose_backward": [_POINTER, _POINTER, _NUMBER, *[_POINTER] * 3, *[_NUMBER] * 3],
    "mhmoe_gather": [_FLAG, *[_POINTER] * 7, *[_NUMBER] * 3, *_AHEAD],
    "mhmoe_sort": [*[_POINTER] * 5, *[_NUMBER] * 2],
    "mhmoe_scatter": [_FLAG, *[_POINTER] * 5, *[_NUMBER] * 2],
    "mhmoe_sum_parts": [_FLAG, *[_POINTER] * 2, *[_NUMBER] * 3],
}


class CompiledLoops:
    """The functions of the C files.

    Raises:
        OSError: they were not built, or from other sources than are here, or do not load, or torch's threads are out of
            reach.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(str(_library()))
        here = Path(__file__).parent
        # Installed in place, the sources may change after they were compiled.
        sources = [path.read_bytes() for name in SOURCES if (path := here / name).is_file()]
        if sources and library.mhmoe_checksum() != checksum(sources):
            raise OSError("built from other sources: run pip install again")
        if threads.OPENMP is None:
            raise OSError(threads.STATE)
        self._openmp = (_POINTER * 3)(*threads.OPENMP.functions)
        self._functions = {}
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.restype = None
            function.argtypes = [*arguments, ctypes.c_int, _POINTER]
            self._functions[name] = function

    def __call__(self, name: str, arguments: Sequence[Tensor | int | None], *, num_values: int) -> None:
        """Call one of them; tensors are passed by address, so that they must be contiguous, and on a CPU."""
        num_threads = torch.get_num_threads() if num_values >= _GRAIN else 1
        plain = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        self._functions[name](*plain, num_threads, self._openmp)


def checksum(sources: Sequence[bytes]) -> int:
    """What setup.py gives the compiler, so that a library knows what it was made of."""
    return zlib.crc32(b"".join(sources)) & 0x7FFFFFFF


def _library() -> Path:
    here = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        if (path := here / f"_compiled{suffix}").is_file():
            return path
    raise OSError("not built: pip install found no C compiler")


def _load() -> tuple[CompiledLoops | None, str]:
    try:
        return CompiledLoops(), "loops compiled"
    except OSError as error:
        return None, f"loops not compiled ({error})"


#: None where they cannot be used; the reason is in :data:`STATE`.
LOOPS, STATE = _load()


def loops_for(dtype: torch.dtype) -> CompiledLoops | None:
    """Those that work on values of this dtype in memory, and with weights and sums in float32."""
    return LOOPS if dtype in DTYPES else None


def ahead(tensor: Tensor | None) -> list[Tensor | int | None]:
    """Arguments for memory that is needed next: some functions fetch it while they work on something else."""
    return [None, 0] if tensor is None else [tensor, tensor.nbytes]


def num_groups(num_rows: int) -> int:
    """Of rows whose sums are taken apart, so that they do not depend on threads."""
    return -(-num_rows // GROUP_ROWS)
