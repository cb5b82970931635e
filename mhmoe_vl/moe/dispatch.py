"""Dispatchers: how rows reach their experts and come back.

They are plain objects without parameters, so exchanging one (for an expert-parallel one, say) never changes a state
dict.

Shape suffixes: N rows, D width, E experts, K choices per row, A = N*K assignments.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.moe.routing import Routing


class Dispatched(NamedTuple):
    """Rows in expert order.

    Attributes:
        rows_AD: one row per assignment, sorted by expert. Rows behind the last expert's segment belong to padding or
            to dropped choices: experts must ignore them.
        counts_E: rows of each expert, int64.
        slot_NK: position in ``rows_AD`` of each choice.
        routing: the routing, with ``kept_NK`` filled in where choices were dropped.
    """

    rows_AD: Tensor
    counts_E: Tensor
    slot_NK: Tensor
    routing: Routing


class Dispatcher(Protocol):
    """What an MoE layer needs of a dispatcher."""

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, y_AD: Tensor, dispatched: Dispatched) -> Tensor: ...


class DroplessDispatcher:
    """Every choice of every valid row is served, whatever the imbalance."""

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Dispatched:
        return sort_by_expert(x_ND, routing, keep_NK=None)

    def combine(self, y_AD: Tensor, dispatched: Dispatched) -> Tensor:
        return weighted_sum(y_AD, dispatched)

    def __repr__(self) -> str:
        return "DroplessDispatcher()"


class CapacityDispatcher:
    """Each expert serves at most ``ceil(factor * K * N / E)`` choices of N valid rows; the rest contribute
    nothing (GShard).

    Places are given out choice by choice (all first choices before any second choice), within a choice in row
    order, so second choices overflow first: the order of the official MH-MoE code.

    Args:
        capacity_factor: 1.0 leaves room for a perfectly balanced batch only.
    """

    def __init__(self, capacity_factor: float = 1.0) -> None:
        if capacity_factor <= 0:
            raise ValueError(f"capacity_factor={capacity_factor} must be positive")
        self.capacity_factor = capacity_factor

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Dispatched:
        num_rows = routing.experts_NK.shape[0] if routing.valid_N is None else int(routing.valid_N.sum())
        capacity = math.ceil(self.capacity_factor * routing.top_k * num_rows / routing.num_experts)
        return sort_by_expert(x_ND, routing, keep_NK=_within_capacity(routing, capacity))

    def combine(self, y_AD: Tensor, dispatched: Dispatched) -> Tensor:
        return weighted_sum(y_AD, dispatched)

    def __repr__(self) -> str:
        return f"CapacityDispatcher(capacity_factor={self.capacity_factor})"


def _within_capacity(routing: Routing, capacity: int) -> Tensor:
    """True ``[N, K]`` where a choice finds a free place at its expert."""
    experts_KN = routing.experts_NK.T
    if routing.valid_N is not None:
        experts_KN = experts_KN.masked_fill(~routing.valid_N, routing.num_experts)
    experts_A = experts_KN.flatten()
    order_A = experts_A.argsort(stable=True)
    counts = torch.bincount(experts_A, minlength=routing.num_experts + 1)
    starts = counts.cumsum(0) - counts
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(order_A.numel(), device=order_A.device) - starts[experts_A[order_A]]
    return (place_A < capacity).view_as(experts_KN).T


def sort_by_expert(x_ND: Tensor, routing: Routing, keep_NK: Tensor | None) -> Dispatched:
    """Gather one row per assignment, in expert order; unserved assignments go to a segment behind the last expert."""
    num_experts, top_k = routing.num_experts, routing.top_k
    served_NK = keep_NK
    if routing.valid_N is not None:
        valid_N1 = routing.valid_N[:, None]
        served_NK = valid_N1.expand(-1, top_k) if keep_NK is None else keep_NK & valid_N1
    experts_NK = routing.experts_NK
    if served_NK is not None:
        experts_NK = torch.where(served_NK, experts_NK, num_experts)
    experts_A = experts_NK.flatten()
    # Narrow integers sort much faster on CPU.
    order_A = experts_A.to(torch.int16 if num_experts < 2**15 else torch.int64).argsort(stable=True)
    counts_E = torch.bincount(experts_A, minlength=num_experts + 1)[:num_experts]
    slot_A = torch.empty_like(order_A)
    slot_A[order_A] = torch.arange(order_A.numel(), device=order_A.device)
    rows_AD = x_ND.index_select(0, order_A if top_k == 1 else order_A // top_k)
    return Dispatched(rows_AD, counts_E, slot_A.view(-1, top_k), routing._replace(kept_NK=served_NK))


def weighted_sum(y_AD: Tensor, dispatched: Dispatched) -> Tensor:
    """``sum_k weight_k * y_k`` back in row order; zero where a choice was not served."""
    weights_NK = dispatched.routing.weights_NK
    if dispatched.routing.kept_NK is not None:
        weights_NK = torch.where(dispatched.routing.kept_NK, weights_NK, 0.0)
    weights_NK = weights_NK.to(y_AD.dtype)
    slot_NK = dispatched.slot_NK
    if slot_NK.shape[1] == 1:
        return y_AD.index_select(0, slot_NK[:, 0]) * weights_NK
    if slot_NK.numel() == 0:
        return y_AD * weights_NK.sum()
    # One fused un-sort, weight and sum: several times faster than gather, multiply, sum on CPU.
    return F.embedding_bag(slot_NK, y_AD, per_sample_weights=weights_NK, mode="sum")
