"""Mixture-of-Experts layers that need nothing but torch.

from mhmoe_vl.moe import MultiHeadMoE, balance_loss

layer = MultiHeadMoE(dim=768, ffn_dim=2304, num_experts=41, num_heads=4, top_k=1)
y, routing = layer(x, valid=None)
loss = task_loss + 0.01 * balance_loss(routing)
"""

from mhmoe_vl.moe.cost import KINDS, FfnCost, count_flops, ffn_cost
from mhmoe_vl.moe.dispatch import CapacityDispatcher, Dispatcher, DroplessDispatcher
from mhmoe_vl.moe.experts import Experts
from mhmoe_vl.moe.feed_forward import FeedForward
from mhmoe_vl.moe.layer import MoE, MultiHeadMoE
from mhmoe_vl.moe.losses import balance_loss, expert_load, z_loss
from mhmoe_vl.moe.match import FfnShape, match_ffn
from mhmoe_vl.moe.routing import CosineRouter, LinearRouter, Routing
from mhmoe_vl.moe.stats import RoutingStats, routing_stats, share_active

__all__ = [
    "KINDS",
    "CapacityDispatcher",
    "CosineRouter",
    "Dispatcher",
    "DroplessDispatcher",
    "Experts",
    "FeedForward",
    "FfnCost",
    "FfnShape",
    "LinearRouter",
    "MoE",
    "MultiHeadMoE",
    "Routing",
    "RoutingStats",
    "balance_loss",
    "count_flops",
    "expert_load",
    "ffn_cost",
    "match_ffn",
    "routing_stats",
    "share_active",
    "z_loss",
]
