"""Expert parallelism: every rank of a group holds some of the experts, and rows travel to their experts and back.

Ranks form a mesh ``(dp, ep)``. The stacked weights of experts are ``Shard(0)`` over ``ep``, and FSDP2 shards what each
rank then holds once more over ``dp``. The ranks of an ep group have tokens of their own, as under data parallelism, so
the gradient of an expert comes together in two steps: rows of the whole group reach it by all-to-all, and FSDP2 adds up
over ``dp``. Everything is summed, nothing averaged.

Every rank must run every layer forward and backward, with zero rows if it has none: the exchanges are collective.

Shape suffixes: N rows, D width, E experts of all ranks, R ranks of the group, A choices of this rank's rows, B rows
that came in for this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.moe import Dispatcher, DroplessDispatcher, MoE, MultiHeadMoE, Routing
from mhmoe_vl.moe.dispatch import Assignment
from mhmoe_vl.moe.experts import autocast_rows
from mhmoe_vl.moe.routing import PerHeadRouter


def spread_experts(module: nn.Module, *, degree: int, world: World) -> None:
    """Keep ``1 / degree`` of the experts of every layer in ``module`` on each rank, sharded by FSDP2 over the remaining
    ranks. Parameters must be equal on all ranks; they become DTensors under the same names.

    Layers whose heads have experts of their own exchange heads, all others rows that are already routed.

    Raises:
        ConfigError: ``degree`` does not divide the number of experts (of heads, where these have experts of their own),
            there are no experts, or heads are exchanged and their experts have a capacity.
    """
    by_heads = [p for p in module.modules() if isinstance(p, MultiHeadMoE) and p.pools == "per_head"]
    by_rows = [p for p in module.modules() if isinstance(p, MoE) and all(p is not layer.moe for layer in by_heads)]
    if not by_heads and not by_rows:
        raise ConfigError(f"expert_parallel: {degree} needs layers with experts, and this model has none")
    for layer in by_heads:
        require_divisor(degree, "heads", layer.num_heads)
        if not isinstance(layer.moe.dispatcher, DroplessDispatcher):
            raise ConfigError(f"expert_parallel: {degree} exchanges whole heads, which cannot have a capacity_factor")
    for moe in by_rows:
        require_divisor(degree, "experts", moe.experts.num_experts)
    mesh = init_device_mesh(world.mesh_device, (world.world_size // degree, degree), mesh_dim_names=("dp", "ep"))
    for layer in by_heads:
        layer.exchange_heads = HeadExchange(layer.num_heads, mesh.get_group("ep"))
        assert isinstance(layer.moe.router, PerHeadRouter)
        layer.moe.router.first_head = layer.num_heads // degree * mesh.get_local_rank("ep")
        _spread(layer.moe, mesh)
    for moe in by_rows:
        moe.dispatcher = ExpertParallelDispatcher(moe.dispatcher, mesh.get_group("ep"))
        _spread(moe.experts, mesh)


def _spread(owner: nn.Module, mesh: DeviceMesh) -> None:
    ranks = mesh["ep"]
    for part in owner.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            # Each rank cuts out its own slice.
            slices = distribute_tensor(parameter.detach(), ranks, [Shard(0)], src_data_rank=None)
            part.register_parameter(name, nn.Parameter(slices, requires_grad=parameter.requires_grad))
    fully_shard(owner, mesh=mesh["dp"])


def require_divisor(degree: int, what: str, number: int) -> None:
    """Raise a ConfigError that names the nearest degrees that would do, unless ``degree`` divides ``number``."""
    if number % degree:
        nearest = nearest_divisors(number, degree)
        raise ConfigError(f"expert_parallel: {degree} must divide the number of {what}, {number}; use {nearest}")


def nearest_divisors(number: int, degree: int) -> str:
    """The divisors of ``number`` next to ``degree``, as ``2 or 4``."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    nearest = [d for d in divisors if d < degree][-1:] + [d for d in divisors if d > degree][:1]
    return " or ".join(map(str, nearest))


class ExpertParallelDispatcher:
    """Sends each row to the rank that holds its expert, and its output back; a :class:`~mhmoe_vl.moe.Dispatcher`.

    Sizes depend on the routing, so the number of rows per pair of ranks is exchanged first and read by the host.

    Args:
        dispatcher: decides which choices are served, from the rows of this rank alone (for a capacity, each rank is one
            of GShard's groups: the result is that of the same ranks without expert parallelism).
        group: ranks among which the experts are spread, in order.
    """

    is_local = False

    def __init__(self, dispatcher: Dispatcher, group: dist.ProcessGroup) -> None:
        self.dispatcher, self.group = dispatcher, group

    def assign(self, routing: Routing) -> Assignment:
        assignment = self.dispatcher.assign(routing)
        sent_RE = assignment.counts_E.view(self.group.size(), -1)
        received_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(received_RE, sent_RE, group=self.group)
        sent, received = torch.stack([sent_RE.sum(1), received_RE.sum(1)]).tolist()
        exchange = RowExchange(self.group, sent, received, _by_expert(received_RE, sum(received)))
        return assignment._replace(counts_E=received_RE.sum(0), exchange=exchange)

    def dispatch(self, x_ND: Tensor, assignment: Assignment) -> Tensor:
        # Experts would cast rows anyway; before the journey they are half as many bytes.
        rows_AD = self.dispatcher.dispatch(autocast_rows(x_ND), assignment)
        exchange: RowExchange = assignment.exchange
        return _Send.apply(rows_AD[: sum(exchange.sent)], exchange)

    def combine(self, y_BD: Tensor, assignment: Assignment) -> Tensor:
        y_AD = _SendBack.apply(y_BD, assignment.exchange)
        num_unserved = assignment.order_A.shape[0] - y_AD.shape[0]
        return self.dispatcher.combine(F.pad(y_AD, (0, 0, 0, num_unserved)), assignment)

    def __repr__(self) -> str:
        return f"ExpertParallelDispatcher({self.dispatcher!r}, num_ranks={self.group.size()})"


class HeadExchange:
    """Sends the sub-tokens of each head to the rank that owns the head, before they are routed, and their outputs back
    (Head Parallel, arXiv 2602.04870).

    Every rank gets the same share of all sub-tokens, whatever the routing and however many experts each of them
    chooses. Scores come back with the outputs, so that a rank knows the routing of its own tokens.

    Args:
        num_heads: of a token; rank r of the group owns the r-th block of them.
        group: ranks among which heads are spread, in order.
    """

    def __init__(self, num_heads: int, group: dist.ProcessGroup) -> None:
        self.num_heads, self.group = num_heads, group

    def __call__(self, moe: MoE, sub_ND: Tensor, valid_N: Tensor | None) -> tuple[Tensor, Routing]:
        """``moe(sub_ND, valid_N)`` as if ``moe``, which has this rank's heads, had all of them."""
        num_ranks, num_tokens = self.group.size(), sub_ND.shape[0] // self.num_heads
        heads_here = self.num_heads // num_ranks
        sent_R = torch.full((num_ranks,), num_tokens, device=sub_ND.device)
        received_R = torch.empty_like(sent_R)
        dist.all_to_all_single(received_R, sent_R, group=self.group)
        exchange = RowExchange(self.group, [num_tokens] * num_ranks, received_R.tolist())

        def to_owners(rows_ND: Tensor) -> Tensor:
            """From one row per head to one row per head of this rank, of the tokens of all ranks."""
            width = rows_ND.shape[1]
            by_rank = rows_ND.reshape(num_tokens, num_ranks, heads_here * width).transpose(0, 1).flatten(0, 1)
            return _Send.apply(by_rank, exchange).view(-1, width)

        def to_tokens(rows_BD: Tensor) -> Tensor:
            width = rows_BD.shape[1]
            by_rank = _SendBack.apply(rows_BD.reshape(-1, heads_here * width), exchange)
            return by_rank.view(num_ranks, num_tokens, heads_here * width).transpose(0, 1).reshape(-1, width)

        valid_B = None if valid_N is None else to_owners(valid_N[:, None])[:, 0]
        y_BD, routing_here = moe(to_owners(sub_ND), valid_B)
        logits_NE = to_tokens(routing_here.logits_NE)
        assert isinstance(moe.router, PerHeadRouter)
        routing = moe.router.choose(logits_NE.view(num_tokens, self.num_heads, logits_NE.shape[1]))
        if valid_N is not None:
            routing = routing.replace(valid_N=valid_N, kept_NK=valid_N[:, None].expand_as(routing.experts_NK))
        return to_tokens(y_BD), routing


@dataclass(frozen=True)
class RowExchange:
    """A permutation of rows over ranks. :meth:`send` and :meth:`send_back` are each other's inverse, and so also each
    other's gradient.

    Attributes:
        sent, received: rows to and from each rank of the group; rows lie in rank order.
        order_B: arrived row that takes each place; None leaves them as they arrived.
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    order_B: Tensor | None = None

    def send(self, rows_AD: Tensor) -> Tensor:
        rows_BD = self._all_to_all(rows_AD, self.sent, self.received)
        return rows_BD if self.order_B is None else rows_BD.index_select(0, self.order_B)

    def send_back(self, rows_BD: Tensor) -> Tensor:
        if self.order_B is not None:
            rows_BD = torch.empty_like(rows_BD).index_copy_(0, self.order_B, rows_BD)
        return self._all_to_all(rows_BD, self.received, self.sent)

    def _all_to_all(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=self.group)
        return result


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.send(rows_AD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.send_back(grad_BD), None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.send_back(rows_BD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.send(grad_AD), None


def _by_expert(received_RE: Tensor, num_rows: int) -> Tensor:
    """Order ``[B]`` that sorts rows from (rank, expert) to (expert, rank)."""
    starts_RE = (received_RE.flatten().cumsum(0) - received_RE.flatten()).view_as(received_RE)
    lengths = received_RE.T.flatten()
    shifts = starts_RE.T.flatten() - (lengths.cumsum(0) - lengths)
    rows = torch.arange(num_rows, device=received_RE.device)
    return rows + shifts.repeat_interleave(lengths, output_size=num_rows)
