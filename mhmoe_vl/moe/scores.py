"""Scores of a linear router on a CPU: rows in any floating-point type, scores in float32, in blocks that stay in cache.

With many experts the product is a third faster a block at a time, and rows in bfloat16 need not be written down in
float32 for the whole layer, nor kept so for the backward pass.

Shape suffixes: N rows, D row width, E experts, B rows of one block, G groups of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mhmoe_vl.moe import threads
from mhmoe_vl.moe.memory import Workspace, recycled

#: Rows of a block, for many and for few experts, whose blocks would be over in no time.
BLOCK_ROWS, NARROW_BLOCK_ROWS = 512, 2048
MANY_EXPERTS = 64
#: Rows whose parts in the gradient of the weights are added up block after block; the sums of these groups then.
GROUP_ROWS = 4096


def router_scores(x_ND: Tensor, weight_DE: Tensor) -> Tensor:
    """``x @ weight`` in the dtype of ``weight``, ``[N, E]``; differentiable once. On CPU only."""
    return _score(x_ND, weight_DE)


@torch.library.custom_op("mhmoe_vl::router_scores", mutates_args=(), device_types="cpu")
def _score(x_ND: Tensor, weight_DE: Tensor) -> Tensor:
    num_rows, dtype = x_ND.shape[0], weight_DE.dtype
    logits_NE = recycled.empty(num_rows, weight_DE.shape[1], dtype=dtype)
    # For few experts three times as fast with this stride, for many equally fast.
    weight_DE = weight_DE.T.contiguous().T

    block_rows = _block_rows(weight_DE)

    def run(start: int, work: Workspace) -> None:
        block = slice(start, min(start + block_rows, num_rows))
        torch.mm(_widened(x_ND[block], dtype, work), weight_DE, out=logits_NE[block])

    starts = range(0, num_rows, block_rows)
    threads.for_each(starts, [1] * len(starts), run)
    return logits_NE


@_score.register_fake
def _(x_ND, weight_DE):  # type: ignore[no-untyped-def]
    return weight_DE.new_empty(x_ND.shape[0], weight_DE.shape[1])


@torch.library.custom_op("mhmoe_vl::router_scores_backward", mutates_args=(), device_types="cpu")
def _backward(dlogits_NE: Tensor, x_ND: Tensor, weight_DE: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, dim = x_ND.shape
    dtype = weight_DE.dtype
    block_rows = _block_rows(weight_DE)
    dx_ND = recycled.empty(num_rows, dim, dtype=x_ND.dtype)
    dweight_GDE = recycled.empty(-(-num_rows // GROUP_ROWS), *weight_DE.shape, dtype=dtype)

    def run(first: int, work: Workspace) -> None:
        dweight_DE, end = dweight_GDE[first // GROUP_ROWS], min(first + GROUP_ROWS, num_rows)
        for start in range(first, end, block_rows):
            block = slice(start, min(start + block_rows, end))
            dlogits_BE, x_BD = dlogits_NE[block], _widened(x_ND[block], dtype, work)
            dweight_DE.addmm_(x_BD.T, dlogits_BE, beta=0 if start == first else 1)
            if dtype == x_ND.dtype:
                torch.mm(dlogits_BE, weight_DE.T, out=dx_ND[block])
            else:
                dx_ND[block] = torch.mm(dlogits_BE, weight_DE.T, out=x_BD)

    starts = range(0, num_rows, GROUP_ROWS)
    threads.for_each(starts, [1] * len(starts), run)
    return dx_ND, dweight_GDE.sum(0)


@_backward.register_fake
def _(dlogits_NE, x_ND, weight_DE):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_ND), torch.empty_like(weight_DE)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dlogits_NE):  # type: ignore[no-untyped-def]
    return _backward(dlogits_NE.contiguous(), *ctx.saved_tensors)


_score.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.mhmoe_vl.router_scores)
def _(x, weight, *_, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.mhmoe_vl.router_scores_backward)
def _(dlogits, x, weight, *_, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 4 * x[0] * weight[0] * weight[1]


def _block_rows(weight_DE: Tensor) -> int:
    return BLOCK_ROWS if weight_DE.shape[1] > MANY_EXPERTS else NARROW_BLOCK_ROWS


def _widened(x_BD: Tensor, dtype: torch.dtype, work: Workspace) -> Tensor:
    if x_BD.dtype == dtype:
        return x_BD
    return work("rows of a router", x_BD.shape[0], x_BD.shape[1], dtype).copy_(x_BD)
