"""The expert layer on a CPU as one operation with a hand-written gradient: gather, experts, weights and scatter.

What costs time on a CPU beside the matmuls is memory: hidden activations (F wide, the largest tensors of the layer) and
gradients of weights that are touched for the first time, page by page, and rows that are copied from one large tensor
to the next. Here an expert's rows are gathered, sent through it and weighted in blocks that stay in cache; only
pre-activations are kept for the backward pass, which makes the activations again instead of loading them, and takes the
gradient of a weight from ``<dy W2^T, activation>`` instead of the expert's output; weight gradients are written where
they belong; and all that is large lives in memory that was used before (:mod:`~mhmoe_vl.moe.memory`). Threads take
experts of their own, if these are many and even enough (:mod:`~mhmoe_vl.moe.threads`); else all threads share every
matmul.

Shape suffixes: N rows, K choices per row, A = N K assignments (number n K + k), E experts, D row width, F hidden width,
H width of the first product (F, or 2 F for GLU experts), B rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from mhmoe_vl.moe import threads
from mhmoe_vl.moe.activations import activate, activate_backward
from mhmoe_vl.moe.memory import Workspace, recycled

#: Rows of one block, by bytes per value: enough for a matmul at full speed, few enough that the block's hidden
#: activations stay in cache. In 16 bits matmuls are so fast that they need more rows, and sums over blocks would be
#: rounded each time.
BLOCK_ROWS = {8: 512, 4: 512, 2: 8192}


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
    """Outputs ``[N, D]`` and, if they are to be kept, pre-activations ``[A, H]``."""
    dim, num_choices = x_ND.shape[1], order_A.shape[0]
    width, hidden_width, dtype = w1_EDH.shape[2], w2_EFD.shape[1], x_ND.dtype
    row_A = order_A if weights_NK.shape[1] == 1 else order_A // weights_NK.shape[1]
    y_AD = recycled.empty(num_choices, dim, dtype=dtype)
    pre_AH = recycled.empty(num_choices if keep else 0, width, dtype=dtype)
    w1, w2 = w1_EDH.unbind(0), w2_EFD.unbind(0)
    b1, b2 = (None if bias is None else bias.unbind(0) for bias in (b1_EH, b2_ED))

    def run(segment: Segment, work: Workspace) -> None:
        expert, start, stop = segment
        num_block_rows = stop - start
        x_BD = torch.index_select(x_ND, 0, row_A[start:stop], out=work("x", num_block_rows, dim, dtype))
        pre_BH = pre_AH[start:stop] if keep else work("pre", num_block_rows, width, dtype)
        hidden_BF = work("hidden", num_block_rows, hidden_width, dtype)
        _affine(x_BD, w1[expert], None if b1 is None else b1[expert], out=pre_BH)
        activate(pre_BH, glu=glu, out=hidden_BF)
        _affine(hidden_BF, w2[expert], None if b2 is None else b2[expert], out=y_AD[start:stop])

    segments, end = _segments(counts_E)
    _for_each([block for segment in segments for block in segment.blocks(dtype)], run)
    y_AD[end:] = 0
    y_ND = _gather_back(y_AD, _places(order_A).view_as(weights_NK), weights_NK.to(dtype))
    return y_ND, pre_AH


@_forward.register_fake
def _(x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, glu, keep):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_ND), x_ND.new_empty(order_A.shape[0] if keep else 0, w1_EDH.shape[2])


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
    pre_AH: Tensor,
    glu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, combine weights, ``w1``, ``b1``, ``w2``, ``b2``. Without rows, ``pre_AH`` was not kept."""
    num_experts, dim, width = w1_EDH.shape
    (num_choices, hidden_width), top_k, dtype = (order_A.shape[0], w2_EFD.shape[1]), weights_NK.shape[1], x_ND.dtype
    row_A = order_A if top_k == 1 else order_A // top_k
    weight_A = weights_NK.reshape(-1).index_select(0, order_A)
    dx_AD = recycled.empty(num_choices, dim, dtype=dtype)
    dw1_EDH = recycled.empty(*w1_EDH.shape, dtype=dtype)
    dw2_EFD = recycled.empty(*w2_EFD.shape, dtype=dtype)
    db1_EH, db2_ED = w1_EDH.new_empty(num_experts, width), w2_EFD.new_empty(num_experts, dim)
    dweight_A = torch.zeros_like(weight_A)
    w1_T, w2_T = w1_EDH.transpose(1, 2).unbind(0), w2_EFD.transpose(1, 2).unbind(0)
    dw1, db1, dw2, db2 = (gradient.unbind(0) for gradient in (dw1_EDH, db1_EH, dw2_EFD, db2_ED))
    is_kept = pre_AH.shape[0] == num_choices

    def run(segment: Segment, work: Workspace) -> None:
        for expert, start, stop in segment.blocks(dtype):
            num_block_rows, first = stop - start, start == segment.start
            row_B = row_A[start:stop]
            dy_BD = torch.index_select(dy_ND, 0, row_B, out=work("dy", num_block_rows, dim, dtype))
            x_BD = torch.index_select(x_ND, 0, row_B, out=work("x", num_block_rows, dim, dtype))
            if is_kept:
                pre_BH = pre_AH[start:stop]
            else:
                pre_BH = work("pre", num_block_rows, width, dtype)
                _affine(x_BD, w1_EDH[expert], None if b1_EH is None else b1_EH[expert], out=pre_BH)
            hidden_BF = work("hidden", num_block_rows, hidden_width, dtype)
            dhidden_BF = torch.mm(dy_BD, w2_T[expert], out=work("dhidden", num_block_rows, hidden_width, dtype))
            dpre_BH = activate_backward(
                dhidden_BF,
                pre_BH,
                weight_A[start:stop],
                glu=glu,
                hidden_BF=hidden_BF,
                product_B=dweight_A[start:stop],
                scratch=partial(work, "dpre", num_block_rows, width, dtype),
            )
            if b2_ED is not None:
                dweight_A[start:stop] += dy_BD @ b2_ED[expert]
            dy_BD *= weight_A[start:stop, None].to(dtype)
            _accumulate_product(dw2[expert], hidden_BF.T, dy_BD, first=first)
            _accumulate_product(dw1[expert], x_BD.T, dpre_BH, first=first)
            _accumulate_sum(db1[expert], dpre_BH, first=first)
            _accumulate_sum(db2[expert], dy_BD, first=first)
            torch.mm(dpre_BH, w1_T[expert], out=dx_AD[start:stop])

    segments, end = _segments(counts_E)
    _for_each(segments, run)
    for expert in (counts_E == 0).nonzero().flatten().tolist():
        for gradient in (dw1_EDH, db1_EH, dw2_EFD, db2_ED):
            gradient[expert].zero_()
    dx_AD[end:] = 0
    place_A = _places(order_A)
    dx_ND = _gather_back(dx_AD, place_A.view_as(weights_NK), None)
    return dx_ND, dweight_A.index_select(0, place_A).view_as(weights_NK), dw1_EDH, db1_EH, dw2_EFD, db2_ED


@_backward.register_fake
def _(dy_ND, x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, pre_AH, glu):  # type: ignore[no-untyped-def]
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
    dx_ND, dweights_NK, dw1, db1, dw2, db2 = _backward(dy_ND.contiguous(), *saved, ctx.glu)
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


def _places(order_A: Tensor) -> Tensor:
    """Where in ``order_A`` each assignment stands."""
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(order_A.shape[0])
    return place_A


def _gather_back(y_AD: Tensor, place_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    """Sum over the choices of each row, weighted if there are weights, ``[N, D]``."""
    if place_NK.shape[1] == 1:
        y_ND = torch.index_select(y_AD, 0, place_NK[:, 0], out=recycled.empty(*y_AD.shape, dtype=y_AD.dtype))
        return y_ND if weights_NK is None else y_ND.mul_(weights_NK)
    if place_NK.numel() == 0:
        return y_AD.new_zeros(place_NK.shape[0], y_AD.shape[1])
    # One fused un-sort, weight and sum: several times faster than gather, multiply, sum.
    return F.embedding_bag(place_NK, y_AD, per_sample_weights=weights_NK, mode="sum")


class Segment(NamedTuple):
    """Rows ``start`` to ``stop`` in expert order, all of one expert."""

    expert: int
    start: int
    stop: int

    def blocks(self, dtype: torch.dtype) -> list[Segment]:
        """Parts of nearly the same size, so that none is tiny."""
        count = self.stop - self.start
        num_blocks = -(-count // BLOCK_ROWS[dtype.itemsize])
        ends = [self.start + count * block // num_blocks for block in range(num_blocks + 1)]
        return [Segment(self.expert, start, stop) for start, stop in pairwise(ends)]


def _segments(counts_E: Tensor) -> tuple[list[Segment], int]:
    """The segments that are not empty, and the end of the last."""
    segments, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            segments.append(Segment(expert, start, start + count))
        start += count
    return segments, start


def _for_each(segments: list[Segment], run: Callable[[Segment, Workspace], None]) -> None:
    sizes = [segment.stop - segment.start for segment in segments]
    if threads.can_share(sizes):
        # The largest first: what is left at the end should be small.
        threads.share([segment for _, segment in sorted(zip(sizes, segments, strict=True), reverse=True)], run)
        return
    with Workspace.borrow() as workspace:
        for segment in segments:
            run(segment, workspace)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _accumulate_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    if first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def _accumulate_sum(total: Tensor, x: Tensor, *, first: bool) -> None:
    if first:
        torch.sum(x, dim=0, out=total)
    else:
        total += x.sum(0)
