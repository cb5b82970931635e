"""Activations of experts on a CPU, into memory that is there already, forward and backward.

Compiled ones (:mod:`~mhmoe_vl.moe.compiled`) make a GELU and its gradient in one pass. Without them, and for dtypes
that they do not know, torch's own operations do the same in several passes.

Shape suffixes: B rows, F hidden width, H width of the first product (F, or 2 F for GLU experts: gate, then up), G
groups of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhmoe_vl.moe import compiled
from mhmoe_vl.moe.memory import Workspace

aten = torch.ops.aten


def activate(pre_BH: Tensor, bias_H: Tensor | None, *, glu: bool, out: Tensor, ahead: Tensor | None = None) -> None:
    """``out = gelu(pre + bias)``, or ``silu(gate) * up`` of its halves; all contiguous.

    Args:
        ahead: what is needed next; fetched into the cache meanwhile.
    """
    if (loops := compiled.loops_for(pre_BH.dtype)) is not None:
        arguments = [glu, pre_BH.dtype == torch.bfloat16, pre_BH, bias_H, out, *out.shape, *compiled.ahead(ahead)]
        loops("mhmoe_activate", arguments, num_values=out.numel())
        return
    if bias_H is not None:
        pre_BH = pre_BH + bias_H
    if glu:
        gate_BF, up_BF = pre_BH.chunk(2, dim=-1)
        aten.silu.out(gate_BF, out=out)
        out *= up_BF
    else:
        # Exact GELU: the tanh form is 3-5 times slower on CPU.
        aten.gelu.out(pre_BH, out=out)


def activate_backward(
    dhidden_BF: Tensor,
    pre_BH: Tensor,
    bias_H: Tensor | None,
    weight_B: Tensor,
    *,
    glu: bool,
    hidden_BF: Tensor,
    dpre_BH: Tensor,
    product_B: Tensor,
    work: Workspace,
    ahead: Tensor | None = None,
) -> Tensor | None:
    """Of rows ``weight * (activation W2)``, given ``dhidden = dy W2^T``.

    Fills ``hidden_BF`` with weighted activations, ``dpre_BH`` with the gradient of the pre-activations, and adds
    ``<dhidden, activation>``, the gradient of the weight, to ``product_B``. ``dhidden_BF`` is used up.

    Args:
        weight_B, product_B: float32, or float64 if the rest is.
        dpre_BH: without GLU, ``dhidden_BF`` itself.
        ahead: what is needed next; fetched into the cache meanwhile.

    Returns:
        Gradient of the bias, ``[H]``, of the dtype of ``weight_B``; None without a bias.
    """
    num_rows, width = len(weight_B), pre_BH.shape[1]
    if (loops := compiled.loops_for(pre_BH.dtype)) is not None:
        num_groups = 0 if bias_H is None else compiled.num_groups(num_rows)
        dbias_GH = work("sums of dpre", num_groups, width, torch.float32)
        tensors = [pre_BH, bias_H, dhidden_BF, hidden_BF, dpre_BH, weight_B, product_B, dbias_GH]
        arguments = [
            glu,
            pre_BH.dtype == torch.bfloat16,
            *tensors,
            num_rows,
            hidden_BF.shape[1],
            *compiled.ahead(ahead),
        ]
        loops("mhmoe_activate_backward", arguments, num_values=hidden_BF.numel())
        return None if bias_H is None else dbias_GH.sum(0)
    dhidden_BF, pre_BH, hidden_BF, dpre_BH = (part[:num_rows] for part in (dhidden_BF, pre_BH, hidden_BF, dpre_BH))
    weight_B1 = weight_B.to(pre_BH.dtype)[:, None]
    activate(pre_BH, bias_H, glu=glu, out=hidden_BF)
    if bias_H is not None:
        pre_BH = pre_BH + bias_H
    product_B += (dhidden_BF * hidden_BF).sum(-1, dtype=product_B.dtype)
    hidden_BF *= weight_B1
    dhidden_BF *= weight_B1
    if glu:
        gate_BF, up_BF = pre_BH.chunk(2, dim=-1)
        dgate_BF, dup_BF = dpre_BH.chunk(2, dim=-1)
        aten.silu.out(gate_BF, out=dup_BF)
        dup_BF *= dhidden_BF
        dhidden_BF *= up_BF
        aten.silu_backward.grad_input(dhidden_BF, gate_BF, grad_input=dgate_BF)
    else:
        aten.gelu_backward.grad_input(dhidden_BF, pre_BH, grad_input=dpre_BH)
    return None if bias_H is None else dpre_BH.sum(0, dtype=weight_B.dtype)
