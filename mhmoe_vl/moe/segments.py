"""Experts over contiguous segments of rows as one operation with a hand-written gradient: the CPU engine.

What costs time on a CPU beside the matmuls is memory: the hidden activations (F wide, the largest tensors of the layer)
are touched for the first time, page by page, in several fresh tensors, and every expert's weight gradient starts as a
copy. Here hidden activations live in a small workspace that stays in cache, block by block; only the pre-activations
are kept for the backward pass, which makes GELU again instead of loading it, and weight gradients are written where
they belong. Half the memory of what autograd would keep, and no more arithmetic than the matmuls need.

Shape suffixes: E experts, A rows in expert order, D expert input width, F hidden width, H width of the first product
(F, or 2 F for GLU experts), B rows of one block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

aten = torch.ops.aten

#: Rows of one block, by bytes per value: enough for a matmul at full speed, few enough that the block's hidden
#: activations stay in cache. In 16 bits matmuls are so fast that they need more rows, and sums over blocks would be
#: rounded each time.
BLOCK_ROWS = {8: 512, 4: 512, 2: 8192}


def segment_ffn(
    rows_AD: Tensor,
    counts_E: Tensor,
    w1_EDH: Tensor,
    b1_EH: Tensor | None,
    w2_EFD: Tensor,
    b2_ED: Tensor | None,
    *,
    glu: bool,
) -> Tensor:
    """``act(x W1 + b1) W2 + b2`` with the weights of each row's expert; zeros behind the last segment.

    Differentiable once, in all floating-point arguments. On CPU only.

    Args:
        rows_AD: sorted by expert.
        counts_E: int64, rows of each expert; may sum to less than A.
        glu: the first product holds gate and up projections side by side, joined by SiLU.
    """
    tensors = (rows_AD, w1_EDH, b1_EH, w2_EFD, b2_ED)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _forward(rows_AD, counts_E, w1_EDH, b1_EH, w2_EFD, b2_ED, glu, keep)[0]


@torch.library.custom_op("mhmoe_vl::segment_ffn", mutates_args=(), device_types="cpu")
def _forward(
    rows_AD: Tensor,
    counts_E: Tensor,
    w1_EDH: Tensor,
    b1_EH: Tensor | None,
    w2_EFD: Tensor,
    b2_ED: Tensor | None,
    glu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[A, D]``, and pre-activations ``[A, H]`` if they are to be kept (else ``[0, H]``)."""
    width, hidden_width = w1_EDH.shape[2], w2_EFD.shape[1]
    y_AD = torch.empty_like(rows_AD)
    pre_AH = rows_AD.new_empty(rows_AD.shape[0] if keep else 0, width)
    work = _Workspace(rows_AD.dtype)
    w1, w2 = w1_EDH.unbind(0), w2_EFD.unbind(0)
    end = 0
    for expert, start, stop in _blocks(counts_E, rows_AD.dtype):
        num_rows, end = stop - start, stop
        pre_BH = pre_AH[start:stop] if keep else work("pre", num_rows, width)
        hidden_BF = work("hidden", num_rows, hidden_width)
        _affine(rows_AD[start:stop], w1[expert], None if b1_EH is None else b1_EH[expert], out=pre_BH)
        _activate(pre_BH, glu, out=hidden_BF)
        _affine(hidden_BF, w2[expert], None if b2_ED is None else b2_ED[expert], out=y_AD[start:stop])
    y_AD[end:] = 0
    return y_AD, pre_AH


@_forward.register_fake
def _(rows_AD, counts_E, w1_EDH, b1_EH, w2_EFD, b2_ED, glu, keep):  # type: ignore[no-untyped-def]
    return torch.empty_like(rows_AD), rows_AD.new_empty(rows_AD.shape[0] if keep else 0, w1_EDH.shape[2])


@torch.library.custom_op("mhmoe_vl::segment_ffn_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy_AD: Tensor,
    rows_AD: Tensor,
    counts_E: Tensor,
    w1_EDH: Tensor,
    w2_EFD: Tensor,
    pre_AH: Tensor,
    glu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, ``w1``, ``b1``, ``w2``, ``b2``."""
    num_experts, _, width = w1_EDH.shape
    hidden_width = w2_EFD.shape[1]
    dx_AD = torch.empty_like(rows_AD)
    dw1_EDH, dw2_EFD = torch.empty_like(w1_EDH), torch.empty_like(w2_EFD)
    db1_EH, db2_ED = w1_EDH.new_empty(num_experts, width), w2_EFD.new_empty(num_experts, w2_EFD.shape[2])
    work = _Workspace(rows_AD.dtype)
    w1_T, w2_T = w1_EDH.transpose(1, 2).unbind(0), w2_EFD.transpose(1, 2).unbind(0)
    end, previous = 0, -1
    for expert, start, stop in _blocks(counts_E, rows_AD.dtype):
        num_rows, end = stop - start, stop
        x_BD, dy_BD, pre_BH = rows_AD[start:stop], dy_AD[start:stop], pre_AH[start:stop]
        hidden_BF = work("hidden", num_rows, hidden_width)
        dhidden_BF = torch.mm(dy_BD, w2_T[expert], out=work("dhidden", num_rows, hidden_width))
        dpre_BH = _activate_backward(dhidden_BF, pre_BH, glu, hidden_BF, work)
        first = expert != previous
        _accumulate_product(dw2_EFD[expert], hidden_BF.T, dy_BD, first=first)
        _accumulate_product(dw1_EDH[expert], x_BD.T, dpre_BH, first=first)
        _accumulate_sum(db1_EH[expert], dpre_BH, first=first)
        _accumulate_sum(db2_ED[expert], dy_BD, first=first)
        torch.mm(dpre_BH, w1_T[expert], out=dx_AD[start:stop])
        previous = expert
    for expert in (counts_E == 0).nonzero().flatten().tolist():
        for gradient in (dw1_EDH, db1_EH, dw2_EFD, db2_ED):
            gradient[expert].zero_()
    dx_AD[end:] = 0
    return dx_AD, dw1_EDH, db1_EH, dw2_EFD, db2_ED


@_backward.register_fake
def _(dy_AD, rows_AD, counts_E, w1_EDH, w2_EFD, pre_AH, glu):  # type: ignore[no-untyped-def]
    num_experts = w1_EDH.shape[0]
    db1_EH, db2_ED = w1_EDH.new_empty(num_experts, w1_EDH.shape[2]), w2_EFD.new_empty(num_experts, w2_EFD.shape[2])
    return torch.empty_like(rows_AD), torch.empty_like(w1_EDH), db1_EH, torch.empty_like(w2_EFD), db2_ED


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    rows_AD, counts_E, w1_EDH, b1_EH, w2_EFD, b2_ED, ctx.glu, _ = inputs
    ctx.has_bias = (b1_EH is not None, b2_ED is not None)
    ctx.set_materialize_grads(False)  # the pre-activations get none, and a tensor of zeros for them is large
    ctx.save_for_backward(rows_AD, counts_E, w1_EDH, w2_EFD, output[1])


def _differentiate(ctx, dy_AD, _):  # type: ignore[no-untyped-def]
    if dy_AD is None:
        return (None,) * 8
    rows_AD, counts_E, w1_EDH, w2_EFD, pre_AH = ctx.saved_tensors
    gradients = _backward(dy_AD.contiguous(), rows_AD, counts_E, w1_EDH, w2_EFD, pre_AH, ctx.glu)
    dx_AD, dw1_EDH, db1_EH, dw2_EFD, db2_ED = gradients
    has_b1, has_b2 = ctx.has_bias
    return dx_AD, None, dw1_EDH, db1_EH if has_b1 else None, dw2_EFD, db2_ED if has_b2 else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.mhmoe_vl.segment_ffn)
def _(rows, counts, w1, b1, w2, *_, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Two products per row."""
    return 2 * rows[0] * (w1[1] * w1[2] + w2[1] * w2[2])


@register_flop_formula(torch.ops.mhmoe_vl.segment_ffn_backward)
def _(dy, rows, counts, w1, w2, *_, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Each product has two gradients."""
    return 4 * rows[0] * (w1[1] * w1[2] + w2[1] * w2[2])


def _blocks(counts_E: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of every block; an expert's rows are cut evenly, so that no block is tiny."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        num_blocks = -(-count // BLOCK_ROWS[dtype.itemsize])
        for block in range(num_blocks):
            yield expert, start + count * block // num_blocks, start + count * (block + 1) // num_blocks
        start += count


class _Workspace:
    """Scratch tensors that are kept from call to call, per thread: fresh memory costs more than what is done in it."""

    _kept = threading.local()

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, name: str, num_rows: int, width: int) -> Tensor:
        kept, key = self._kept.__dict__, f"{name} {self.dtype}"
        buffer = kept.get(key)
        if buffer is None or buffer.numel() < num_rows * width:
            buffer = kept[key] = torch.empty(num_rows * width, dtype=self.dtype)
        return buffer[: num_rows * width].view(num_rows, width)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _activate(pre_BH: Tensor, glu: bool, *, out: Tensor) -> None:
    if glu:
        gate_BF, up_BF = pre_BH.chunk(2, dim=-1)
        aten.silu.out(gate_BF, out=out)
        out *= up_BF
    else:
        # Exact GELU: the tanh form is 3-5 times slower on CPU.
        aten.gelu.out(pre_BH, out=out)


def _activate_backward(dhidden_BF: Tensor, pre_BH: Tensor, glu: bool, hidden_BF: Tensor, work: _Workspace) -> Tensor:
    """Gradient of the pre-activations; fills ``hidden_BF`` with the activations again. ``dhidden_BF`` is used up."""
    _activate(pre_BH, glu, out=hidden_BF)
    if not glu:
        return aten.gelu_backward.grad_input(dhidden_BF, pre_BH, grad_input=dhidden_BF)
    gate_BF, up_BF = pre_BH.chunk(2, dim=-1)
    dpre_BH = work("dpre", *pre_BH.shape)
    dgate_BF, dup_BF = dpre_BH.chunk(2, dim=-1)
    aten.silu.out(gate_BF, out=dup_BF)
    dup_BF *= dhidden_BF
    dhidden_BF *= up_BF
    aten.silu_backward.grad_input(dhidden_BF, gate_BF, grad_input=dgate_BF)
    return dpre_BH


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
