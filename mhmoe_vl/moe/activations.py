"""Activations of experts on a CPU, into memory that is there already, forward and backward.

Compiled ones (``activations.c``) make a GELU and its gradient in one pass. They are an extra that ``pip install``
builds where there is a C compiler, and that changes nothing but speed. Without it, and for dtypes that it does not
know, torch's own operations do the same in several passes.

Shape suffixes: B rows, F hidden width, H width of the first product (F, or 2 F for GLU experts: gate, then up).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from mhmoe_vl.moe import threads

aten = torch.ops.aten

_GELU, _GELU_BACKWARD, _SWIGLU, _SWIGLU_BACKWARD = range(4)
#: Fewer hidden values than this are not worth waking other threads for (at::internal::GRAIN_SIZE of torch).
_GRAIN = 32768


def activate(pre_BH: Tensor, *, glu: bool, out: Tensor) -> None:
    """``out = gelu(pre)``, or ``silu(gate) * up``; both contiguous."""
    if (compiled := _compiled_for(pre_BH.dtype)) is not None:
        compiled(_SWIGLU if glu else _GELU, pre_BH, None, out, None)
    elif glu:
        gate_BF, up_BF = pre_BH.chunk(2, dim=-1)
        aten.silu.out(gate_BF, out=out)
        out *= up_BF
    else:
        # Exact GELU: the tanh form is 3-5 times slower on CPU.
        aten.gelu.out(pre_BH, out=out)


def activate_backward(
    dhidden_BF: Tensor, pre_BH: Tensor, *, glu: bool, hidden_BF: Tensor, scratch: Callable[[], Tensor]
) -> Tensor:
    """Gradient of the pre-activations; fills ``hidden_BF`` with the activations again. ``dhidden_BF`` is used up.

    Args:
        scratch: gives memory like ``pre_BH``; called for GLU experts only.
    """
    compiled = _compiled_for(pre_BH.dtype)
    if not glu:
        if compiled is not None:
            compiled(_GELU_BACKWARD, pre_BH, dhidden_BF, hidden_BF, None)
            return dhidden_BF
        activate(pre_BH, glu=False, out=hidden_BF)
        return aten.gelu_backward.grad_input(dhidden_BF, pre_BH, grad_input=dhidden_BF)
    dpre_BH = scratch()
    if compiled is not None:
        compiled(_SWIGLU_BACKWARD, pre_BH, dhidden_BF, hidden_BF, dpre_BH)
        return dpre_BH
    gate_BF, up_BF = pre_BH.chunk(2, dim=-1)
    dgate_BF, dup_BF = dpre_BH.chunk(2, dim=-1)
    activate(pre_BH, glu=True, out=hidden_BF)
    aten.silu.out(gate_BF, out=dup_BF)
    dup_BF *= dhidden_BF
    dhidden_BF *= up_BF
    aten.silu_backward.grad_input(dhidden_BF, gate_BF, grad_input=dgate_BF)
    return dpre_BH


class CompiledActivations:
    """The functions of ``activations.c``, on the threads of torch.

    Raises:
        OSError: they were not built, or do not load here, or torch's threads are out of reach.
    """

    DTYPES = (torch.float32, torch.bfloat16)

    def __init__(self) -> None:
        library = ctypes.CDLL(str(_library()))
        if threads.OPENMP is None:
            raise OSError(threads.STATE)
        self._threads = threads.OPENMP.functions
        self._run = library.mhmoe_activation
        self._run.restype = None
        self._run.argtypes = [
            *[ctypes.c_int] * 2, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2, ctypes.c_int, *[ctypes.c_void_p] * 3
        ]  # fmt: skip

    def __call__(self, kind: int, pre: Tensor, dhidden: Tensor | None, hidden: Tensor, dpre: Tensor | None) -> None:
        num_threads = torch.get_num_threads() if hidden.numel() >= _GRAIN else 1
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (pre, dhidden, hidden, dpre)]
        self._run(kind, pre.dtype == torch.bfloat16, *pointers, *hidden.shape, num_threads, *self._threads)


def _library() -> Path:
    here = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        if (path := here / f"_activations{suffix}").is_file():
            return path
    raise OSError("not built: pip install found no C compiler")


def _load() -> tuple[CompiledActivations | None, str]:
    try:
        return CompiledActivations(), "activations compiled"
    except OSError as error:
        return None, f"activations not compiled ({error})"


#: None where they cannot be used; the reason is in :data:`STATE`.
COMPILED, STATE = _load()


def _compiled_for(dtype: torch.dtype) -> CompiledActivations | None:
    return COMPILED if COMPILED is not None and dtype in COMPILED.DTYPES else None
