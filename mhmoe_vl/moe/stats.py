"""Figures that tell how a layer uses its experts; no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhmoe_vl.moe.losses import expert_load, rows_valid
from mhmoe_vl.moe.routing import Routing

#: Thresholds at which training writes down how many experts are active; whoever has the loads can take any others.
ACTIVATION_THRESHOLDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
#: Thresholds of a whole curve, from 0 to 3 times the mean load.
ACTIVATION_CURVE = tuple(round(0.05 * step, 2) for step in range(61))

#: A pool has collapsed if the entropy of its load is below this share of its maximum ``log E``: the choices then spread
#: over fewer than ``sqrt(E)`` experts, counted as ``exp(entropy)``.
COLLAPSE_ENTROPY = 0.5
#: Or if its overload is above this: more than half way from balance to every row choosing the same expert.
COLLAPSE_OVERLOAD = 0.5
#: With fewer choices per expert nothing is said: under a uniform router an expert gets none of 10 with ``exp(-10)``.
MIN_CHOICES_PER_EXPERT = 10


def share_active(load_E: Tensor, thresholds: Sequence[float]) -> list[float]:
    """Share of experts whose load is more than ``t`` times the mean load, for every ``t`` of ``thresholds``.

    ``a(t) = |{e : load_e / mean(load) > t}| / E``; ``a(0)`` is the share of experts that are not dead, and no expert is
    above the mean if all are equal. arXiv 2404.15045 reports one point of such a curve, "expert
    activation", and does not state its threshold; it divides the choices of an expert by the number of tokens, which
    is ``h k / E`` times the quotient here. 0 everywhere if nothing was routed.

    Args:
        load_E: choices per expert, or their shares, of any scale.
    """
    load_E = load_E.double()
    relative_E = load_E / load_E.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return [float((relative_E > threshold).double().mean()) for threshold in thresholds]


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
    def overload(self) -> float:
        """:attr:`max_violation` over the largest that it can be, ``E / k - 1``, since a row's k choices differ: 0 is
        perfect balance, 1 is that every row chooses the busiest expert. 0 if there is nothing to choose."""
        num_choices = float(self.load_E.sum())
        if num_choices == 0:
            return 0.0
        largest = self.load_E.numel() * float(self.num_rows) / num_choices - 1
        return self.max_violation / largest if largest > 1e-9 else 0.0

    @property
    def gate_entropy(self) -> float:
        """Mean over rows of the entropy of the gate, in nats: how undecided the router is about a row."""
        return float(self.gate_entropy_sum / self.num_rows.clamp_min(1))

    @property
    def num_dead(self) -> int:
        """Experts that nobody chose."""
        return int((self.load_E == 0).sum())

    @property
    def is_collapsed(self) -> bool:
        """Whether few experts do nearly everything: :data:`COLLAPSE_ENTROPY` or :data:`COLLAPSE_OVERLOAD`."""
        return self.load_entropy < COLLAPSE_ENTROPY or self.overload > COLLAPSE_OVERLOAD

    @property
    def alarms(self) -> tuple[str, ...]:
        """``dead`` (some expert was never chosen) and ``collapsed``; neither if there were too few choices to say so
        (:data:`MIN_CHOICES_PER_EXPERT`). To be asked of a whole pool: that a pool which both modalities share keeps
        an expert for one of them is no defect."""
        if float(self.load_E.sum()) < MIN_CHOICES_PER_EXPERT * self.load_E.numel():
            return ()
        signs = {"dead": self.num_dead > 0, "collapsed": self.is_collapsed}
        return tuple(name for name, is_on in signs.items() if is_on)


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
