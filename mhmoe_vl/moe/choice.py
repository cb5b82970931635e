"""Softmax over router scores and the best experts of each row, on a CPU as one operation.

With many experts a router's scores are a large tensor (169 experts: nearly as large as rows of 192 values), which
softmax, selection bias, argmax and gather read one after the other. The compiled loops
(:mod:`~mhmoe_vl.moe.compiled`) need one pass, and another for the gradient.

Shape suffixes: N rows, E experts, K choices per row, H pools (row n belongs to pool n % H).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhmoe_vl.moe import compiled
from mhmoe_vl.moe.memory import recycled


def is_faster_for(logits: Tensor) -> bool:
    """Whether :func:`softmax_choice` should take these scores ``[..., E]``."""
    return compiled.LOOPS is not None and logits.device.type == "cpu" and logits.dtype == torch.float32


def softmax_choice(logits_NE: Tensor, bias_HE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities ``[N, E]``, and of the ``top_k`` largest ``probability + bias``, best first and ties to the lowest
    number, the probabilities and the numbers (int64), ``[N, K]``.

    Differentiable once, in ``logits_NE``.
    """
    return _choose(logits_NE, bias_HE, top_k)


@torch.library.custom_op("mhmoe_vl::softmax_choice", mutates_args=(), device_types="cpu")
def _choose(logits_NE: Tensor, bias_HE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    assert compiled.LOOPS is not None
    num_rows, num_experts = logits_NE.shape
    probs_NE = recycled.empty(num_rows, num_experts, dtype=logits_NE.dtype)
    weights_NK = torch.empty(num_rows, top_k, dtype=logits_NE.dtype)
    experts_NK = torch.empty(num_rows, top_k, dtype=torch.int64)
    tensors = [logits_NE.contiguous(), bias_HE.to(logits_NE.dtype).contiguous(), probs_NE, weights_NK, experts_NK]
    sizes = [num_rows, num_experts, bias_HE.shape[0], top_k]
    compiled.LOOPS("mhmoe_choose", [*tensors, *sizes], num_values=probs_NE.numel())
    return probs_NE, weights_NK, experts_NK


@_choose.register_fake
def _(logits_NE, bias_HE, top_k):  # type: ignore[no-untyped-def]
    weights_NK = logits_NE.new_empty(logits_NE.shape[0], top_k)
    return logits_NE.new_empty(logits_NE.shape), weights_NK, torch.empty_like(weights_NK, dtype=torch.int64)


@torch.library.custom_op("mhmoe_vl::softmax_choice_backward", mutates_args=(), device_types="cpu")
def _backward(probs_NE: Tensor, experts_NK: Tensor, dprobs_NE: Tensor | None, dweights_NK: Tensor | None) -> Tensor:
    """Gradient of the scores. That of the probabilities is often one row for all, with a stride of 0."""
    assert compiled.LOOPS is not None
    dlogits_NE = recycled.empty(*probs_NE.shape, dtype=probs_NE.dtype)
    if dprobs_NE is not None and dprobs_NE.stride(-1) != 1:
        dprobs_NE = dprobs_NE.contiguous()
    arguments = [
        probs_NE,
        dprobs_NE,
        0 if dprobs_NE is None else dprobs_NE.stride(0),
        None if dweights_NK is None else dweights_NK.contiguous(),
        experts_NK,
        dlogits_NE,
        *probs_NE.shape,
        experts_NK.shape[1],
    ]
    compiled.LOOPS("mhmoe_choose_backward", arguments, num_values=probs_NE.numel())
    return dlogits_NE


@_backward.register_fake
def _(probs_NE, experts_NK, dprobs_NE, dweights_NK):  # type: ignore[no-untyped-def]
    return torch.empty_like(probs_NE)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    probs_NE, _, experts_NK = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(experts_NK)
    ctx.save_for_backward(probs_NE, experts_NK)


def _differentiate(ctx, dprobs_NE, dweights_NK, _):  # type: ignore[no-untyped-def]
    if dprobs_NE is None and dweights_NK is None:
        return None, None, None
    return _backward(*ctx.saved_tensors, dprobs_NE, dweights_NK), None, None


_choose.register_autograd(_differentiate, setup_context=_save)
