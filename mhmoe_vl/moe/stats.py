"""Figures that tell how a layer uses its experts; no gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhmoe_vl.moe.losses import expert_load, rows_valid
from mhmoe_vl.moe.routing import Routing


@dataclass(frozen=True)
class RoutingStats:
    """Sums that can be added over batches and ranks, and the figures derived from them.

    Attributes:
        load_E: choices per expert.
        num_dropped: choices that a capacity dispatcher dropped.
        gate_entropy_sum: sum over rows of the entropy of the gate, in nats.
        num_rows: valid rows.
    """

    load_E: Tensor
    num_dropped: Tensor
    gate_entropy_sum: Tensor
    num_rows: Tensor

    def __add__(self, other: RoutingStats) -> RoutingStats:
        return RoutingStats(
            self.load_E + other.load_E,
            self.num_dropped + other.num_dropped,
            self.gate_entropy_sum + other.gate_entropy_sum,
            self.num_rows + other.num_rows,
        )

    @property
    def load_share_E(self) -> Tensor:
        """Share of all choices that each expert gets; sums to 1."""
        return self.load_E / self.load_E.sum().clamp_min(1)

    @property
    def max_violation(self) -> float:
        """MaxVio of arXiv 2408.15664: ``max(load) / mean(load) - 1``; 0 is perfect balance."""
        mean = self.load_E.double().mean()
        return float(self.load_E.max() / mean - 1) if mean > 0 else 0.0

    @property
    def load_entropy(self) -> float:
        """Entropy of the load divided by its maximum ``log E``: 1 is uniform, 0 is collapse on one expert."""
        share_E = self.load_share_E.double()
        num_experts = share_E.numel()
        if num_experts == 1:
            return 1.0
        return float(torch.special.entr(share_E).sum() / torch.log(torch.tensor(float(num_experts))))

    @property
    def num_dead(self) -> int:
        """Experts that nobody chose."""
        return int((self.load_E == 0).sum())


@torch.no_grad()
def routing_stats(routing: Routing, valid: Tensor | None = None) -> RoutingStats:
    """Statistics of one forward pass; padding is left out."""
    valid_N = rows_valid(routing, valid)
    load_E = expert_load(routing, valid)
    entropy_N = torch.special.entr(routing.balance_probs_NE).sum(-1)
    if valid_N is None:
        num_rows = torch.tensor(entropy_N.numel(), device=load_E.device)
    else:
        entropy_N = torch.where(valid_N, entropy_N, 0.0)
        num_rows = valid_N.sum()
    if routing.kept_NK is None:
        num_dropped = torch.zeros((), dtype=torch.long, device=load_E.device)
    else:
        kept_NK = routing.kept_NK if valid_N is None else routing.kept_NK & valid_N[:, None]
        num_dropped = load_E.sum() - kept_NK.sum()
    return RoutingStats(load_E, num_dropped, entropy_N.sum().double(), num_rows)
