"""How rows get to their expert and back on a CPU, with weights and output biases on the way.

Compiled loops (:mod:`~mhmoe_vl.moe.compiled`) do each in one pass over memory and fetch rows, which lie anywhere,
ahead of time. Without them, and for dtypes that they do not know, torch's own operations do the same.

Shape suffixes: N rows, B rows of a block, K parts of a row, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhmoe_vl.moe import compiled
from mhmoe_vl.moe.memory import Workspace


def gather(x_ND: Tensor, number_B: Tensor, *, out: Tensor, ahead: Tensor | None = None) -> None:
    """``out[b] = x[number[b]]``, and zeros behind them, where ``out`` has more rows. ``x`` is contiguous.

    Args:
        ahead: what is needed next; fetched into the cache meanwhile.
    """
    if (loops := compiled.loops_for(x_ND.dtype)) is not None:
        _gather(loops, x_ND, number_B, out, None, None, None, None, ahead=ahead)
        return
    torch.index_select(x_ND, 0, number_B, out=out[: len(number_B)])
    out[len(number_B) :].zero_()


def gather_gradient(
    dy_ND: Tensor,
    number_B: Tensor,
    bias_D: Tensor | None,
    weight_B: Tensor,
    *,
    out: Tensor,
    product_B: Tensor,
    work: Workspace,
) -> Tensor | None:
    """:func:`gather`, for gradients of rows ``weight * (y + bias)``.

    Adds ``<dy, bias>``, the bias's part in the gradient of the weight, to ``product_B``, and returns the gradient of
    the bias, ``[D]``, of the dtype of ``weight_B``; None without a bias.
    """
    if bias_D is None:
        gather(dy_ND, number_B, out=out)
        return None
    if (loops := compiled.loops_for(dy_ND.dtype)) is not None:
        sums_GD = work("sums of rows", compiled.num_groups(out.shape[0]), out.shape[1], torch.float32)
        _gather(loops, dy_ND, number_B, out, bias_D, weight_B, product_B, sums_GD)
        return sums_GD.sum(0)
    gather(dy_ND, number_B, out=out)
    dy_BD = out[: len(number_B)].to(weight_B.dtype)
    product_B += dy_BD @ bias_D.to(weight_B.dtype)
    return weight_B @ dy_BD


def _gather(
    loops: compiled.CompiledLoops,
    x_ND: Tensor,
    number_B: Tensor,
    out: Tensor,
    *others: Tensor | None,
    ahead: Tensor | None = None,
) -> None:
    arguments: list[Tensor | int | None] = [x_ND.dtype == torch.bfloat16, x_ND, number_B, out, *others]
    arguments += [len(number_B), *out.shape, *compiled.ahead(ahead)]
    loops("mhmoe_gather", arguments, num_values=out.numel())


def scatter(x_BD: Tensor, bias_D: Tensor | None, weight_B: Tensor | None, number_B: Tensor, *, out: Tensor) -> None:
    """``out[number[b]] = weight[b] * (x[b] + bias)``, for as many rows as have numbers; all contiguous."""
    if (loops := compiled.loops_for(x_BD.dtype)) is not None:
        arguments: list[Tensor | int | None] = [x_BD.dtype == torch.bfloat16, x_BD, bias_D, weight_B, number_B, out]
        loops("mhmoe_scatter", [*arguments, len(number_B), x_BD.shape[1]], num_values=x_BD.numel())
        return
    x_BD = x_BD[: len(number_B)]
    if bias_D is not None:
        x_BD = x_BD + bias_D
    out.index_copy_(0, number_B, x_BD if weight_B is None else x_BD * weight_B[:, None].to(x_BD.dtype))


def sum_parts(x_NKD: Tensor, *, out: Tensor) -> None:
    """``out = x.sum(1)``, both contiguous; in bfloat16 rounded once."""
    if (loops := compiled.loops_for(x_NKD.dtype)) is not None:
        loops("mhmoe_sum_parts", [x_NKD.dtype == torch.bfloat16, x_NKD, out, *x_NKD.shape], num_values=x_NKD.numel())
    else:
        torch.sum(x_NKD, 1, out=out)
