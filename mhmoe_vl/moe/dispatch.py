"""Dispatchers: how rows reach their experts and come back.

They are plain objects without parameters, so exchanging one (for an expert-parallel one, say) never changes a state
dict.

Shape suffixes: N rows, D width, E experts, K choices per row, A = N*K assignments.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.moe.order import sort_choices
from mhmoe_vl.moe.routing import Routing


class Assignment(NamedTuple):
    """Who is served by whom.

    Attributes:
        order_A: int64, choices (number ``n * K + k``) sorted by expert; behind the last expert's segment are those that
            nobody serves, of padding or dropped.
        counts_E: rows that each expert of this rank gets, int64; these are all experts if the dispatcher is local.
        slot_NK: position in ``order_A`` of each choice.
        routing: the routing, with ``kept_NK`` filled in where choices are not served.
        exchange: what a dispatcher that is not local must remember to find the way back.
    """

    order_A: Tensor
    counts_E: Tensor
    slot_NK: Tensor
    routing: Routing
    exchange: Any = None


class Dispatcher(Protocol):
    """What an MoE layer needs of a dispatcher.

    Attributes:
        is_local: rows stay on this rank, so that experts may fetch and combine them on their own.
    """

    is_local: bool

    def assign(self, routing: Routing) -> Assignment:
        """Which choices are served, in what order."""

    def dispatch(self, x_ND: Tensor, assignment: Assignment) -> Tensor:
        """One row per choice, ``[A, D]``, in the order of the assignment; if not local, the rows that came in for the
        experts of this rank, sorted by expert."""

    def combine(self, y_AD: Tensor, assignment: Assignment) -> Tensor:
        """``sum_k weight_k * y_k`` back in row order; zero where a choice was not served."""


class DroplessDispatcher:
    """Every choice of every valid row is served, whatever the imbalance."""

    is_local = True

    def assign(self, routing: Routing) -> Assignment:
        return sort_by_expert(routing, keep_NK=None)

    def dispatch(self, x_ND: Tensor, assignment: Assignment) -> Tensor:
        return gather_rows(x_ND, assignment)

    def combine(self, y_AD: Tensor, assignment: Assignment) -> Tensor:
        return weighted_sum(y_AD, assignment)

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

    is_local = True

    def __init__(self, capacity_factor: float = 1.0) -> None:
        if capacity_factor <= 0:
            raise ValueError(f"capacity_factor={capacity_factor} must be positive")
        self.capacity_factor = capacity_factor

    def assign(self, routing: Routing) -> Assignment:
        return sort_by_expert(routing, keep_NK=_within_capacity(routing, self._capacity(routing)))

    def dispatch(self, x_ND: Tensor, assignment: Assignment) -> Tensor:
        return gather_rows(x_ND, assignment)

    def combine(self, y_AD: Tensor, assignment: Assignment) -> Tensor:
        return weighted_sum(y_AD, assignment)

    def _capacity(self, routing: Routing) -> int | Tensor:
        if routing.valid_N is None:
            num_rows = routing.experts_NK.shape[0]
            return math.ceil(self.capacity_factor * routing.top_k * num_rows / routing.num_experts)
        # Stays on the device: reading the number of valid rows would wait for it.
        num_valid = routing.valid_N.sum().double()
        return torch.ceil(self.capacity_factor * routing.top_k * num_valid / routing.num_experts)

    def __repr__(self) -> str:
        return f"CapacityDispatcher(capacity_factor={self.capacity_factor})"


def _within_capacity(routing: Routing, capacity: int | Tensor) -> Tensor:
    """True ``[N, K]`` where a choice finds a free place at its expert."""
    experts_KN = routing.experts_NK.T
    if routing.valid_N is not None:
        experts_KN = experts_KN.masked_fill(~routing.valid_N, routing.num_experts)
    experts_A = experts_KN.flatten()
    order_A = experts_A.argsort(stable=True)
    experts = torch.arange(routing.num_experts + 1, device=order_A.device)
    sorted_A = experts_A[order_A]
    starts = torch.searchsorted(sorted_A, experts)
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(order_A.numel(), device=order_A.device) - starts[sorted_A]
    return (place_A < capacity).view_as(experts_KN).T


def sort_by_expert(routing: Routing, keep_NK: Tensor | None) -> Assignment:
    """Choices in expert order; those that are not kept, and those of padding, behind the last expert's segment."""
    num_experts, top_k = routing.num_experts, routing.top_k
    served_NK = keep_NK
    if routing.valid_N is not None:
        valid_N1 = routing.valid_N[:, None]
        served_NK = valid_N1.expand(-1, top_k) if keep_NK is None else keep_NK & valid_N1
    experts_NK = routing.experts_NK
    if served_NK is not None:
        experts_NK = torch.where(served_NK, experts_NK, num_experts)
    order_A, slot_A, counts_E = sort_choices(experts_NK.flatten(), num_experts)
    return Assignment(order_A, counts_E, slot_A.view(-1, top_k), routing.replace(kept_NK=served_NK))


def gather_rows(x_ND: Tensor, assignment: Assignment) -> Tensor:
    """One row per choice, in expert order."""
    top_k = assignment.routing.top_k
    return x_ND.index_select(0, assignment.order_A if top_k == 1 else assignment.order_A // top_k)


def served_weights(routing: Routing) -> Tensor:
    """Combine weights ``[N, K]``, zero where a choice is not served."""
    if routing.kept_NK is None:
        return routing.weights_NK
    return torch.where(routing.kept_NK, routing.weights_NK, 0.0)


def weighted_sum(y_AD: Tensor, assignment: Assignment) -> Tensor:
    """``sum_k weight_k * y_k`` back in row order; zero where a choice was not served."""
    weights_NK = served_weights(assignment.routing).to(y_AD.dtype)
    slot_NK = assignment.slot_NK
    if slot_NK.shape[1] == 1:
        return y_AD.index_select(0, slot_NK[:, 0]) * weights_NK
    if slot_NK.numel() == 0:
        return y_AD * weights_NK.sum()
    # One fused un-sort, weight and sum: several times faster than gather, multiply, sum on CPU.
    return F.embedding_bag(slot_NK, y_AD, per_sample_weights=weights_NK, mode="sum")
