"""The expert layer on a CPU as one operation with a hand-written gradient: gather, experts, weights and scatter.

What costs time on a CPU beside the matmuls is memory: hidden activations (F wide, the largest tensors of the layer) and
gradients of weights that are touched for the first time, page by page, and rows that are copied from one large tensor
to the next. Here an expert's rows are gathered, sent through it, weighted and put where they belong in blocks that stay
in cache; only pre-activations are kept for the backward pass, which makes the activations again instead of loading
them, and takes the gradient of a weight from ``<dy W2^T, activation>`` instead of the expert's output; weight gradients
are written where they belong; biases and their gradients are taken along by loops that pass over the rows anyway; and
all that is large lives in memory that was used before (:mod:`~mhmoe_vl.moe.memory`). Threads take experts of their own,
if these are many and even enough (:mod:`~mhmoe_vl.moe.threads`); else all threads share every matmul.

Shape suffixes: N rows, K choices per row, A = N K assignments (number n K + k), E experts, D row width, F hidden width,
H width of the first product (F, or 2 F for GLU experts), B rows of one block, P places of rows in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mhmoe_vl.moe import threads
from mhmoe_vl.moe.activations import activate, activate_backward
from mhmoe_vl.moe.memory import Workspace, recycled
from mhmoe_vl.moe.rows import gather, gather_gradient, scatter, sum_parts

#: Rows of one block, by bytes per value: enough for a matmul at full speed, few enough that the block's hidden
#: activations stay in cache. In 16 bits matmuls are so fast that threads wait for each other between smaller ones.
BLOCK_ROWS = {8: 512, 4: 512, 2: 2048}
#: In 16 bits, sums over blocks would be rounded each time: where there are sums, blocks have up to so many rows.
BLOCK_ROWS_OF_SUMS = BLOCK_ROWS | {2: 8192}


def segment_moe(
    x_ND: Tensor,
    order_A: Tensor,
    counts_E: Tensor,
    weights_NK: Tensor,
    w1_EDH: Tensor,
    b1_EH: Tensor | None,
    w2_EFD: Tensor,
    b2_ED: Tensor | None,
    *,
    glu: bool,
    recompute: bool = False,
) -> Tensor:
    """``y_n = sum_k weight_nk * expert_nk(x_n)``, ``[N, D]``; choices that no segment serves add nothing.

    Differentiable once, in all floating-point arguments. On CPU only.

    Args:
        order_A: int64, assignments sorted by expert, those that are not served behind all others.
        counts_E: int64, assignments of each expert; may sum to less than A.
        weights_NK: at least float32.
        glu: the first product holds gate and up projections side by side, joined by SiLU.
        recompute: keep nothing for the backward pass, which makes the pre-activations again: a seventh matmul for six.
    """
    tensors = (x_ND, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED)
    is_trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    keep = is_trained and not recompute
    return _forward(x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, glu, keep)[0]


@torch.library.custom_op("mhmoe_vl::segment_moe", mutates_args=(), device_types="cpu")
def _forward(
    x_ND: Tensor,
    order_A: Tensor,
    counts_E: Tensor,
    weights_NK: Tensor,
    w1_EDH: Tensor,
    b1_EH: Tensor | None,
    w2_EFD: Tensor,
    b2_ED: Tensor | None,
    glu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[N, D]`` and, if they are to be kept, pre-activations ``[A + padding, H]`` without biases."""
    dim, num_choices = x_ND.shape[1], order_A.shape[0]
    width, hidden_width, dtype = w1_EDH.shape[2], w2_EFD.shape[1], x_ND.dtype
    row_A, weight_A = _in_order(order_A, weights_NK, dtype)
    x_ND, w1, w2 = x_ND.contiguous(), w1_EDH.unbind(0), w2_EFD.unbind(0)
    b1, b2 = _biases(b1_EH, len(w1)), _biases(b2_ED, len(w2))
    y_AD = recycled.empty(num_choices, dim, dtype=dtype)
    pre_PH = recycled.empty(_num_places(num_choices, w1_EDH.shape[0], dtype) if keep else 0, width, dtype=dtype)

    def run(segment: Segment, work: Workspace) -> None:
        for expert, start, stop, place, num_rows in segment:
            x_BD = work("x", num_rows, dim, dtype)
            gather(x_ND, row_A[start:stop], out=x_BD, ahead=w1[expert])
            pre_BH = pre_PH[place : place + num_rows] if keep else work("pre", num_rows, width, dtype)
            torch.mm(x_BD, w1[expert], out=pre_BH)
            hidden_BF = work("hidden", num_rows, hidden_width, dtype)
            activate(pre_BH, b1[expert], glu=glu, out=hidden_BF, ahead=w2[expert])
            y_BD = torch.mm(hidden_BF, w2[expert], out=x_BD)
            scatter(y_BD, b2[expert], weight_A[start:stop], order_A[start:stop], out=y_AD)

    segments, end = _segments(counts_E, dtype, BLOCK_ROWS[dtype.itemsize])
    _for_each([[block] for segment in segments for block in segment], run)
    y_AD[order_A[end:]] = 0
    return _sum_choices(y_AD, weights_NK.shape), pre_PH


@_forward.register_fake
def _(x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, glu, keep):  # type: ignore[no-untyped-def]
    num_places = _num_places(order_A.shape[0], w1_EDH.shape[0], x_ND.dtype) if keep else 0
    return torch.empty_like(x_ND), x_ND.new_empty(num_places, w1_EDH.shape[2])


@torch.library.custom_op("mhmoe_vl::segment_moe_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    order_A: Tensor,
    counts_E: Tensor,
    weights_NK: Tensor,
    w1_EDH: Tensor,
    b1_EH: Tensor | None,
    w2_EFD: Tensor,
    b2_ED: Tensor | None,
    pre_PH: Tensor,
    glu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, combine weights, ``w1``, ``b1``, ``w2``, ``b2``. Without rows, ``pre_PH`` was not kept."""
    num_experts, dim, width = w1_EDH.shape
    num_choices, hidden_width, dtype = order_A.shape[0], w2_EFD.shape[1], x_ND.dtype
    row_A, weight_A = _in_order(order_A, weights_NK, dtype)
    x_ND, dy_ND = x_ND.contiguous(), dy_ND.contiguous()
    dx_AD = recycled.empty(num_choices, dim, dtype=dtype)
    dw1_EDH = recycled.empty(*w1_EDH.shape, dtype=dtype)
    dw2_EFD = recycled.empty(*w2_EFD.shape, dtype=dtype)
    db1_EH, db2_ED = w1_EDH.new_zeros(num_experts, width), w2_EFD.new_zeros(num_experts, dim)
    dweight_A = torch.zeros_like(weight_A)
    w1, w2 = w1_EDH.unbind(0), w2_EFD.unbind(0)
    b1, b2 = _biases(b1_EH, num_experts), _biases(b2_ED, num_experts)
    dw1, db1, dw2, db2 = (gradient.unbind(0) for gradient in (dw1_EDH, db1_EH, dw2_EFD, db2_ED))
    is_kept = pre_PH.shape[0] > 0

    def run(segment: Segment, work: Workspace) -> None:
        for expert, start, stop, place, num_rows in segment:
            first, count = start == segment[0].start, stop - start
            row_B, weight_B, product_B = row_A[start:stop], weight_A[start:stop], dweight_A[start:stop]
            x_BD, dy_BD = work("x", num_rows, dim, dtype), work("dy", num_rows, dim, dtype)
            gather(x_ND, row_B, out=x_BD, ahead=w2[expert])
            db2_D = gather_gradient(dy_ND, row_B, b2[expert], weight_B, out=dy_BD, product_B=product_B, work=work)
            if is_kept:
                pre_BH = pre_PH[place : place + num_rows]
            else:
                pre_BH = torch.mm(x_BD, w1[expert], out=work("pre", num_rows, width, dtype))
            dhidden_BF = torch.mm(dy_BD, w2[expert].T, out=work("dhidden", num_rows, hidden_width, dtype))
            hidden_BF = work("hidden", num_rows, hidden_width, dtype)
            dpre_BH = work("dpre", num_rows, width, dtype) if glu else dhidden_BF
            db1_H = activate_backward(
                dhidden_BF,
                pre_BH,
                b1[expert],
                weight_B,
                glu=glu,
                hidden_BF=hidden_BF,
                dpre_BH=dpre_BH,
                product_B=product_B,
                work=work,
                ahead=w1[expert],
            )
            if count < num_rows:
                # Whatever is in memory, times zeros, may be NaN.
                hidden_BF[count:], dpre_BH[count:] = 0, 0
            _accumulate_product(dw2[expert], hidden_BF.T, dy_BD, first=first)
            _accumulate_product(dw1[expert], x_BD.T, dpre_BH, first=first)
            _accumulate(db1[expert], db1_H, first=first)
            _accumulate(db2[expert], db2_D, first=first)
            dx_BD = torch.mm(dpre_BH, w1[expert].T, out=x_BD)
            scatter(dx_BD, None, None, order_A[start:stop], out=dx_AD)

    segments, end = _segments(counts_E, dtype, BLOCK_ROWS_OF_SUMS[dtype.itemsize])
    _for_each(segments, run)
    for expert in (counts_E == 0).nonzero().flatten().tolist():
        dw1[expert].zero_()
        dw2[expert].zero_()
    dx_AD[order_A[end:]] = 0
    dx_ND = _sum_choices(dx_AD, weights_NK.shape)
    dweights_NK = torch.empty_like(dweight_A).index_copy_(0, order_A, dweight_A).view_as(weights_NK)
    return dx_ND, dweights_NK.to(weights_NK.dtype), dw1_EDH, db1_EH, dw2_EFD, db2_ED


@_backward.register_fake
def _(dy_ND, x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, pre_PH, glu):  # type: ignore[no-untyped-def]
    num_experts = w1_EDH.shape[0]
    db1_EH, db2_ED = w1_EDH.new_empty(num_experts, w1_EDH.shape[2]), w2_EFD.new_empty(num_experts, w2_EFD.shape[2])
    dw1_EDH, dw2_EFD = torch.empty_like(w1_EDH), torch.empty_like(w2_EFD)
    return torch.empty_like(x_ND), torch.empty_like(weights_NK), dw1_EDH, db1_EH, dw2_EFD, db2_ED


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, ctx.glu, _ = inputs
    ctx.set_materialize_grads(False)  # what is kept gets no gradient, and zeros in its place would be large
    ctx.save_for_backward(x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, output[1])


def _differentiate(ctx, dy_ND, *_):  # type: ignore[no-untyped-def]
    if dy_ND is None:
        return (None,) * 10
    *_, b1_EH, _, b2_ED, _ = saved = ctx.saved_tensors
    dx_ND, dweights_NK, dw1, db1, dw2, db2 = _backward(dy_ND, *saved, ctx.glu)
    db1, db2 = db1 if b1_EH is not None else None, db2 if b2_ED is not None else None
    return dx_ND, None, None, dweights_NK, dw1, db1, dw2, db2, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.mhmoe_vl.segment_moe)
def _(x, order, counts, weights, w1, b1, w2, *_, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Two products per assignment."""
    return 2 * order[0] * (w1[1] * w1[2] + w2[1] * w2[2])


@register_flop_formula(torch.ops.mhmoe_vl.segment_moe_backward)
def _(dy, x, order, counts, weights, w1, b1, w2, b2, pre, *_, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Each product has two gradients; the first is made again if its results were not kept."""
    num_again = 2 * order[0] * w1[1] * w1[2] if pre[0] < order[0] else 0
    return 4 * order[0] * (w1[1] * w1[2] + w2[1] * w2[2]) + num_again


class Block(NamedTuple):
    """Assignments ``start`` to ``stop`` in expert order, all of one expert.

    Attributes:
        place: of the first row among the rows of all blocks.
        num_rows: rows that are calculated, zeros behind the assignments.
    """

    expert: int
    start: int
    stop: int
    place: int
    num_rows: int


#: Blocks of one expert, one behind the other.
Segment = list[Block]


def _segments(counts_E: Tensor, dtype: torch.dtype, block_rows: int) -> tuple[list[Segment], int]:
    """The segments that are not empty, in blocks, and the end of the last.

    Places do not depend on ``block_rows``: only the last block of a segment has more rows than assignments, and room
    for them before the next segment, as ``block_rows`` is a power of two where rows are padded.
    """
    segments, start, place = [], 0, 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            cuts = _cuts(count, block_rows, is_padded=dtype.itemsize == 2)
            blocks = [
                Block(expert, start + first, start + last, place + first, _padded(last - first, dtype))
                for first, last in pairwise(cuts)
            ]
            segments.append(blocks)
        start += count
        place += _padded(count, dtype)
    return segments, start


def _cuts(count: int, block_rows: int, *, is_padded: bool) -> list[int]:
    """Where blocks of so many assignments begin and end: whole ones and a rest, or, where any size is as good, all of
    nearly the same size, so that none is tiny."""
    if is_padded:
        return [*range(0, count, block_rows), count]
    num_blocks = -(-count // block_rows)
    return [count * block // num_blocks for block in range(num_blocks + 1)]


def _padded(count: int, dtype: torch.dtype) -> int:
    """Rows of a block with so many assignments.

    In 16 bits a library compiles a matmul for every number of rows that it meets, which takes a millisecond, and loads
    of experts are new in every step: so their numbers are made few, 32 from one power of two to the next.
    """
    if dtype.itemsize > 2:
        return count
    return _round_up(count, max(4, 1 << max(count.bit_length() - 6, 0)))


def _num_places(num_choices: int, num_experts: int, dtype: torch.dtype) -> int:
    """The most rows that blocks may have, whatever the counts."""
    return num_choices if dtype.itemsize > 2 else num_choices + num_choices // 32 + 3 * num_experts


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _in_order(order_A: Tensor, weights_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Row and weight of each assignment."""
    top_k = weights_NK.shape[1]
    weight_A = weights_NK.reshape(-1).to(torch.promote_types(dtype, torch.float32)).index_select(0, order_A)
    return order_A if top_k == 1 else order_A // top_k, weight_A


def _biases(bias_EH: Tensor | None, num_experts: int) -> Sequence[Tensor | None]:
    return [None] * num_experts if bias_EH is None else bias_EH.contiguous().unbind(0)


def _sum_choices(y_AD: Tensor, shape_NK: torch.Size) -> Tensor:
    """Of each row, ``[N, D]``."""
    num_rows, top_k = shape_NK
    if top_k == 1:
        return y_AD
    y_ND = recycled.empty(num_rows, y_AD.shape[1], dtype=y_AD.dtype)
    sum_parts(y_AD.view(num_rows, top_k, y_AD.shape[1]), out=y_ND)
    return y_ND


def _for_each(segments: list[Segment], run: Callable[[Segment, Workspace], None]) -> None:
    threads.for_each(segments, [segment[-1].stop - segment[0].start for segment in segments], run)


def _accumulate_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    if first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def _accumulate(total: Tensor, part: Tensor | None, *, first: bool) -> None:
    if part is None:
        return
    if first:
        total.copy_(part)
    else:
        total += part
