"""The whole expert layer in three GPU kernels: gather, experts, weights and scatter.

A sub-token is narrow (d / num_heads, 192 at d = 768 with 4 heads), so that a block of rows and the block's output fit
on chip together. The forward kernel holds both and streams over the hidden width: a slice of the first matrix, the
activation, a slice of the second matrix, as FlashAttention streams over keys. The hidden activations, the largest
tensors of the layer, never reach memory; the backward kernels make them again, one for the gradients of rows and
weights, one for those of the matrices. Nothing is read back to the host and no shape depends on the routing, so the
layer can be captured in a CUDA graph.

Arithmetic, in products of A x D x F: 2 forward, 3 + 4 backward, against 2 + 4 where hidden activations are kept.

``TRITON_INTERPRET=1`` runs the same kernels on a CPU, slowly, for tests. Their speed on a GPU has not been measured.

Shape suffixes: N rows, K choices per row, A = N K assignments (number n K + k), D row width, F hidden width, H width of
the first product (F, or 2 F for GLU experts), E experts, B blocks of rows.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mhmoe_vl.moe.kernels import backward_rows_kernel, backward_weights_kernel, forward_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Widest row whose block and output block fit on chip together.
MAX_DIM = 256


class Tiles(NamedTuple):
    """Sizes of the blocks that a kernel works on: rows and hidden columns, powers of two and at least 16."""

    rows: int
    hidden: int
    num_warps: int = 8
    num_stages: int = 2


class TileSet(NamedTuple):
    """One size for each kernel."""

    forward: Tiles
    backward_rows: Tiles
    backward_weights: Tiles


#: By bytes per value. Chosen to fit the registers and shared memory of compute capability 8.0 and 9.0 for rows of up to
#: 256 values; not yet tuned on a device.
TILES = {
    2: TileSet(Tiles(128, 32), Tiles(64, 32), Tiles(32, 64)),
    4: TileSet(*[Tiles(32, 16, num_warps=4)] * 3),
}


def fused_moe(
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
) -> Tensor:
    """``y_n = sum_k weight_nk * expert_nk(x_n)``, ``[N, D]``; choices that no segment serves add nothing.

    Differentiable once, in all floating-point arguments.

    Args:
        order_A: int64, assignments sorted by expert, those that are not served behind all others.
        counts_E: int64, assignments of each expert.
        weights_NK: float32.
        w1_EDH: of the dtype of ``x_ND``, like all weights and biases: float32, bfloat16 or float16.
        glu: the first product holds gate and up projections side by side, joined by SiLU.

    Raises:
        ValueError: rows too wide, another dtype, weights of another dtype than the rows, or no GPU and no interpreter.
    """
    if x_ND.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the fused backend: runs on CUDA, not on {x_ND.device.type} (TRITON_INTERPRET=1 simulates it)"
        )
    dim, dtype = x_ND.shape[1], x_ND.dtype
    if why_not(dim, dtype) or any(t is not None and t.dtype != dtype for t in (w1_EDH, b1_EH, w2_EFD, b2_ED)):
        raise ValueError(
            f"the fused backend: {why_not(dim, dtype) or f'weights in {w1_EDH.dtype} do not fit rows in {dtype}'}"
        )
    y_AD = _forward(x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, glu)
    return y_AD if weights_NK.shape[1] == 1 else y_AD.view(*weights_NK.shape, dim).sum(1)


def why_not(dim: int, dtype: torch.dtype) -> str | None:
    """The reason why rows of this width and dtype cannot be taken; None if they can."""
    if dtype not in DTYPES:
        return f"the kernels work in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if dim > MAX_DIM:
        return f"rows of {dim} values do not fit on chip with their outputs, at most {MAX_DIM} do"
    return None


@torch.library.custom_op("mhmoe_vl::fused_moe", mutates_args=())
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
) -> Tensor:
    """Weighted outputs of all assignments ``[A, D]``, in the order of ``weights_NK``."""
    x_ND, w1_EDH, w2_EFD = x_ND.contiguous(), w1_EDH.contiguous(), w2_EFD.contiguous()
    y_AD = x_ND.new_zeros(order_A.shape[0], x_ND.shape[1])
    tiles = TILES[x_ND.element_size()].forward
    blocks = _blocks_of_rows(counts_E, order_A.shape[0], tiles.rows)
    if y_AD.numel():
        forward_kernel[(blocks.expert_B.shape[0],)](
            x_ND, order_A, weights_NK.contiguous(), w1_EDH, b1_EH, w2_EFD, b2_ED, y_AD, *blocks,
            **_constants(x_ND, weights_NK, w1_EDH, w2_EFD, b1_EH, b2_ED, glu, tiles),
        )  # fmt: skip
    return y_AD


@_forward.register_fake
def _(x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, glu):  # type: ignore[no-untyped-def]
    return x_ND.new_empty(order_A.shape[0], x_ND.shape[1])


@torch.library.custom_op("mhmoe_vl::fused_moe_backward", mutates_args=())
def _backward(
    dy_AD: Tensor,
    x_ND: Tensor,
    order_A: Tensor,
    counts_E: Tensor,
    weights_NK: Tensor,
    w1_EDH: Tensor,
    b1_EH: Tensor | None,
    w2_EFD: Tensor,
    b2_ED: Tensor | None,
    glu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the rows of all assignments ``[A, D]``, of ``weights_NK``, ``w1``, ``b1``, ``w2`` and ``b2``."""
    x_ND, w1_EDH, w2_EFD, dy_AD = x_ND.contiguous(), w1_EDH.contiguous(), w2_EFD.contiguous(), dy_AD.contiguous()
    weights_NK = weights_NK.contiguous()
    num_experts, hidden_dim = w1_EDH.shape[0], w2_EFD.shape[1]
    dx_AD, dweights_NK = torch.zeros_like(dy_AD), torch.zeros_like(weights_NK)
    dw1_EDH, dw2_EFD = torch.empty_like(w1_EDH), torch.empty_like(w2_EFD)
    db1_EH, db2_ED = w1_EDH.new_empty(num_experts, w1_EDH.shape[2]), w2_EFD.new_empty(num_experts, w2_EFD.shape[2])
    _, tiles, weight_tiles = TILES[x_ND.element_size()]
    blocks = _blocks_of_rows(counts_E, order_A.shape[0], tiles.rows)
    inputs = (dy_AD, x_ND, order_A, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED)
    fixed = (x_ND, weights_NK, w1_EDH, w2_EFD, b1_EH, b2_ED, glu)
    if dy_AD.numel():
        backward_rows_kernel[(blocks.expert_B.shape[0],)](
            *inputs, dx_AD, dweights_NK, *blocks, **_constants(*fixed, tiles)
        )
    ends_E = counts_E.cumsum(0)
    # Experts without rows have programs too: they write zeros.
    backward_weights_kernel[(num_experts, triton.cdiv(hidden_dim, weight_tiles.hidden))](
        *inputs, dw1_EDH, db1_EH, dw2_EFD, db2_ED, ends_E - counts_E, ends_E, **_constants(*fixed, weight_tiles)
    )
    return dx_AD, dweights_NK, dw1_EDH, db1_EH, dw2_EFD, db2_ED


@_backward.register_fake
def _(dy_AD, x_ND, order_A, counts_E, weights_NK, w1_EDH, b1_EH, w2_EFD, b2_ED, glu):  # type: ignore[no-untyped-def]
    db1_EH = w1_EDH.new_empty(w1_EDH.shape[0], w1_EDH.shape[2])
    db2_ED = w2_EFD.new_empty(w2_EFD.shape[0], w2_EFD.shape[2])
    like = torch.empty_like
    return like(dy_AD), like(weights_NK), like(w1_EDH), db1_EH, like(w2_EFD), db2_ED


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.glu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy_AD):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: activation checkpointing makes them again each time
    x_ND, _, _, weights_NK, _, b1_EH, _, b2_ED = saved
    dx_AD, dweights_NK, dw1_EDH, db1_EH, dw2_EFD, db2_ED = _backward(dy_AD, *saved, ctx.glu)
    dx_ND = dx_AD if weights_NK.shape[1] == 1 else dx_AD.view(*weights_NK.shape, x_ND.shape[1]).sum(1)
    return (
        dx_ND,
        None,
        None,
        dweights_NK,
        dw1_EDH,
        None if b1_EH is None else db1_EH,
        dw2_EFD,
        None if b2_ED is None else db2_ED,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


class _Blocks(NamedTuple):
    """Rows of each program: ``expert_B`` is E for programs that are left over; ``order_A[start:end]`` are its rows."""

    expert_B: Tensor
    start_B: Tensor
    end_B: Tensor


def _blocks_of_rows(counts_E: Tensor, num_assignments: int, size: int) -> _Blocks:
    """Cut every expert's segment into blocks; as many as any routing could need, so that no count is read back."""
    num_experts = counts_E.shape[0]
    max_blocks = num_assignments // size + min(num_experts, num_assignments)
    ends_E, blocks_E = counts_E.cumsum(0), (counts_E + size - 1) // size
    block_ends_E = blocks_E.cumsum(0)
    number_B = torch.arange(max_blocks, device=counts_E.device)
    expert_B = torch.searchsorted(block_ends_E, number_B, right=True)
    within_B = expert_B.clamp_max(num_experts - 1)
    first_E = ends_E - counts_E - (block_ends_E - blocks_E) * size
    return _Blocks(expert_B, first_E[within_B] + number_B * size, ends_E[within_B])


def _constants(
    x_ND: Tensor,
    weights_NK: Tensor,
    w1_EDH: Tensor,
    w2_EFD: Tensor,
    b1_EH: Tensor | None,
    b2_ED: Tensor | None,
    glu: bool,
    tiles: Tiles,
) -> dict[str, object]:
    """What is fixed when a kernel is compiled."""
    dim = x_ND.shape[1]
    head = max(16, 1 << (dim.bit_length() - 1))
    tail = max(16, triton.next_power_of_2(dim - head)) if dim > head else 0
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    return {
        "E": w1_EDH.shape[0],
        "K": weights_NK.shape[1],
        "D": dim,
        "F": w2_EFD.shape[1],
        "H": w1_EDH.shape[2],
        "D0": head,
        "D1": tail,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_F": tiles.hidden,
        "GLU": glu,
        "BIAS1": b1_EH is not None,
        "BIAS2": b2_ED is not None,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


@register_flop_formula(torch.ops.mhmoe_vl.fused_moe)
def _(x, order, counts, weights, w1, b1, w2, *_, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Two products per assignment."""
    return 2 * order[0] * (w1[1] * w1[2] + w2[1] * w2[2])


@register_flop_formula(torch.ops.mhmoe_vl.fused_moe_backward)
def _(dy, x, order, counts, weights, w1, b1, w2, *_, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """The first product twice again, and the gradients of both; the gradient of the activations is made twice."""
    return 2 * order[0] * (4 * w1[1] * w1[2] + 3 * w2[1] * w2[2])
