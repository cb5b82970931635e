"""Activations of experts on a CPU, into memory that is there already, forward and backward.

Compiled ones (:mod:`~mhmoe_vl.moe.compiled`) make a GELU and its gradient in one pass. Without them, and for dtypes
that they do not know, torch's own operations do the same in several passes.

Shape suffixes: B rows, F hidden width, H width of the first product (F, or 2 F for GLU experts: gate, then up).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mhmoe_vl.moe import compiled

aten = torch.ops.aten

COMPILED_DTYPES = (torch.float32, torch.bfloat16)


def activate(pre_BH: Tensor, *, glu: bool, out: Tensor) -> None:
    """``out = gelu(pre)``, or ``silu(gate) * up``; both contiguous."""
    if (loops := _loops_for(pre_BH.dtype)) is not None:
        is_bfloat16 = pre_BH.dtype == torch.bfloat16
        loops("mhmoe_activate", [glu, is_bfloat16, pre_BH, out, *out.shape], num_values=out.numel())
    elif glu:
        gate_BF, up_BF = pre_BH.chunk(2, dim=-1)
        aten.silu.out(gate_BF, out=out)
        out *= up_BF
    else:
        # Exact GELU: the tanh form is 3-5 times slower on CPU.
        aten.gelu.out(pre_BH, out=out)


def activate_backward(
    dhidden_BF: Tensor,
    pre_BH: Tensor,
    weight_B: Tensor,
    *,
    glu: bool,
    hidden_BF: Tensor,
    product_B: Tensor,
    scratch: Callable[[], Tensor],
) -> Tensor:
    """Gradient of the pre-activations, times the weight of each row. ``dhidden_BF`` is used up.

    Args:
        weight_B: float32, or float64 if the rest is.
        hidden_BF: filled with the activations.
        product_B: like ``weight_B``; filled with ``<dhidden, hidden>`` of each row.
        scratch: gives memory like ``pre_BH``.
    """
    if (loops := _loops_for(pre_BH.dtype)) is not None:
        dpre_BH = scratch() if glu else dhidden_BF
        tensors = [pre_BH, dhidden_BF, hidden_BF, dpre_BH, weight_B, product_B]
        arguments = [glu, pre_BH.dtype == torch.bfloat16, *tensors, *hidden_BF.shape]
        loops("mhmoe_activate_backward", arguments, num_values=hidden_BF.numel())
        return dpre_BH
    dpre_BH, weight_B1 = scratch(), weight_B.to(pre_BH.dtype)[:, None]
    activate(pre_BH, glu=glu, out=hidden_BF)
    products_BF = dpre_BH[:, : hidden_BF.shape[1]]
    torch.mul(dhidden_BF, hidden_BF, out=products_BF)
    torch.sum(products_BF, -1, dtype=product_B.dtype, out=product_B)
    dhidden_BF *= weight_B1
    if not glu:
        return aten.gelu_backward.grad_input(dhidden_BF, pre_BH, grad_input=dhidden_BF)
    gate_BF, up_BF = pre_BH.chunk(2, dim=-1)
    dgate_BF, dup_BF = dpre_BH.chunk(2, dim=-1)
    aten.silu.out(gate_BF, out=dup_BF)
    dup_BF *= dhidden_BF
    dhidden_BF *= up_BF
    aten.silu_backward.grad_input(dhidden_BF, gate_BF, grad_input=dgate_BF)
    return dpre_BH


def _loops_for(dtype: torch.dtype) -> compiled.CompiledLoops | None:
    return compiled.LOOPS if dtype in COMPILED_DTYPES else None
