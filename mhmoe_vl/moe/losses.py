"""Auxiliary routing losses: pure functions of a :class:`Routing`.

Over several ranks, or several forward passes of one layer, sum :func:`expert_load` first and hand the sum to the
losses as ``global_load_E``. Each call then returns its *share* of the loss of the whole batch: shares add up to it,
so gradients must be summed, not averaged.

Shape suffixes: N rows, E experts, K choices per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhmoe_vl.moe.routing import Routing


def expert_load(routing: Routing, valid: Tensor | None = None) -> Tensor:
    """Choices per expert, int64 ``[E]``, over valid rows; all K choices count, dropped ones too (as in GShard)."""
    valid_N = rows_valid(routing, valid)
    experts_NK = routing.experts_NK
    load_E = torch.zeros(routing.num_experts, dtype=torch.long, device=experts_NK.device)
    ones_NK = torch.ones_like(experts_NK) if valid_N is None else valid_N.long()[:, None].expand_as(experts_NK)
    return load_E.scatter_add_(0, experts_NK.flatten(), ones_NK.flatten())


def balance_loss(routing: Routing, valid: Tensor | None = None, *, global_load_E: Tensor | None = None) -> Tensor:
    """Load-balance loss ``E * sum_e load_e * mean_gate_e``; exactly 1 when load or gate is uniform.

    GShard / MH-MoE (arXiv 2404.15045, equation 10), with all K choices counted and padding left out. If each head has
    experts of its own, this is the mean over heads of their losses.

    Args:
        routing: what the layer returned.
        valid: bool ``[...]``, one value per token (not per sub-token); combined with what the layer was given.
        global_load_E: :func:`expert_load` summed over all ranks and passes; None means this routing is the batch.

    Returns:
        Scalar in the router's dtype; 0 if no row is valid.
    """
    load_E = expert_load(routing, valid) if global_load_E is None else global_load_E
    valid_N = rows_valid(routing, valid)
    probs_NE = routing.balance_probs_NE
    if valid_N is not None:
        probs_NE = torch.where(valid_N[:, None], probs_NE, 0.0)
    num_choices = load_E.sum().clamp_min(1)
    share_E = load_E.to(probs_NE.dtype) / num_choices
    # Pools take turns, so that rows of all pools side by side have a column for every expert.
    gate_E = probs_NE.reshape(-1, routing.num_experts).sum(0)
    mean_gate_E = gate_E * (routing.top_k / num_choices.to(probs_NE.dtype))
    return routing.num_experts * (share_E * mean_gate_E).sum()


def z_loss(routing: Routing, valid: Tensor | None = None, *, global_load_E: Tensor | None = None) -> Tensor:
    """Router z-loss, ``mean(logsumexp(logits)^2)`` over valid rows (ST-MoE, arXiv 2202.08906, equation 5).

    Arguments and result as in :func:`balance_loss`.
    """
    load_E = expert_load(routing, valid) if global_load_E is None else global_load_E
    valid_N = rows_valid(routing, valid)
    squared_N = routing.logits_NE.logsumexp(-1).square()
    if valid_N is not None:
        squared_N = torch.where(valid_N, squared_N, 0.0)
    return squared_N.sum() * (routing.top_k / load_E.sum().clamp_min(1).to(squared_N.dtype))


def rows_valid(routing: Routing, valid: Tensor | None) -> Tensor | None:
    """Valid flag of every routed row ``[N]``: the layer's own, and ``valid`` repeated for each sub-token."""
    if valid is None:
        return routing.valid_N
    valid_N = valid.reshape(-1).repeat_interleave(routing.num_heads)
    if valid_N.shape[0] != routing.experts_NK.shape[0]:
        raise ValueError(
            f"valid has {valid.numel()} values, but the layer routed "
            f"{routing.experts_NK.shape[0] // routing.num_heads} tokens"
        )
    return valid_N if routing.valid_N is None else valid_N & routing.valid_N
