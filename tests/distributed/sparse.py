"""Small stacks of expert layers, and tokens for any number of ranks, to compare ranks with one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mhmoe_vl.distributed.collectives import all_reduce_sum
from mhmoe_vl.distributed.parallel import accumulating, parallelize
from mhmoe_vl.distributed.world import World
from mhmoe_vl.moe import MoE, MultiHeadMoE, balance_loss, expert_load, z_loss

DIM = 8


@dataclass(frozen=True)
class Case:
    """One layer configuration and what each rank feeds it.

    Attributes:
        tokens: number of tokens of each rank; its length is the number of ranks.
        num_heads: None is an ``MoE`` on whole tokens.
        options: arguments of the layer.
        valid: share of the tokens that are not padding; None passes no mask.
        favoured: expert that the selection bias makes the first choice of every row; None leaves routing alone.
    """

    tokens: Sequence[int]
    num_heads: int | None = 2
    options: dict[str, Any] = field(default_factory=dict)
    valid: float | None = None
    favoured: int | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0


@dataclass
class Outcome:
    """What a step leaves behind: of one process, or of all ranks put together."""

    outputs: Tensor
    loss: Tensor
    input_gradients: Tensor
    gradients: dict[str, Tensor]


class Stack(nn.Module):
    """Two pre-norm expert layers with residuals; the second sees what the first made of its rows."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = {"dim": DIM, "ffn_dim": 6, "num_experts": 4, "top_k": 1} | case.options
        make = MoE if case.num_heads is None else MultiHeadMoE
        heads = {} if case.num_heads is None else {"num_heads": case.num_heads}
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.layers = nn.ModuleList(make(**sizes, **heads) for _ in range(2))
        self.to(case.dtype)
        generator = torch.Generator().manual_seed(case.seed)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.5 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
            for layer in self.layers:
                if case.favoured is not None:
                    router_of(layer).selection_bias_E[case.favoured] = 10.0

    def forward(self, x_TD: Tensor, valid_T: Tensor | None, probe_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs, and this rank's share of ``<output, probe>`` plus auxiliary losses."""
        loss = x_TD.new_zeros(())
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y_TD, routing = layer(norm(x_TD), valid_T)
            x_TD = x_TD + y_TD
            load_E = all_reduce_sum(expert_load(routing))
            loss = loss + balance_loss(routing, global_load_E=load_E) + 0.1 * z_loss(routing, global_load_E=load_E)
        # Padding has arbitrary outputs in a residual stream; nobody may look at them.
        seen_TD = x_TD if valid_T is None else torch.where(valid_T[:, None], x_TD, 0.0)
        return x_TD, loss + (seen_TD * probe_TD).sum()


def router_of(layer: nn.Module) -> nn.Module:
    return layer.router if isinstance(layer, MoE) else layer.moe.router


def inputs_of(case: Case, rank: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens, mask and probe of one rank."""
    generator = torch.Generator().manual_seed(1000 * case.seed + rank)
    shape = (case.tokens[rank], DIM)
    x_TD = torch.randn(shape, generator=generator, dtype=torch.float64)
    probe_TD = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
    valid_T = None
    if case.valid is not None:
        valid_T = torch.rand(shape[0], generator=generator) < case.valid
        x_TD = torch.where(valid_T[:, None], x_TD, 100.0)
    return x_TD.to(case.dtype), valid_T, probe_TD


def inputs_of_all(case: Case) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens, mask and probe of all ranks in a row."""
    parts = [inputs_of(case, rank) for rank in range(len(case.tokens))]
    x_TD, probe_TD = (torch.cat([part[i] for part in parts]) for i in (0, 2))
    valid_T = None if case.valid is None else torch.cat([part[1] for part in parts if part[1] is not None])
    return x_TD, valid_T, probe_TD


def on_one_process(case: Case) -> Outcome:
    """The step of one process that has the tokens of all ranks."""
    x_TD, valid_T, probe_TD = inputs_of_all(case)
    stack = Stack(case)
    outputs, loss = stack(x_TD.requires_grad_(), valid_T, probe_TD)
    loss.backward()
    return Outcome(outputs.detach(), loss.detach(), x_TD.grad, whole_gradients(stack))


def on_ranks(case: Case, world: World, degree: int) -> Outcome:
    """This rank's part of the step; outputs and gradients of inputs are its own, all else is of all ranks."""
    stack = Stack(case)
    if world.rank > 0:
        with torch.no_grad():
            for parameter in stack.parameters():  # weights of rank 0 must win
                parameter.add_(1.0)
    parallelize(stack, strategy="fsdp", world=world, shard_units=[*stack.layers], expert_parallel=degree)
    x_TD, valid_T, probe_TD = inputs_of(case, world.rank)
    with accumulating(stack, is_last=True):
        outputs, loss = stack(x_TD.requires_grad_(), valid_T, probe_TD)
        loss.backward()
    return Outcome(outputs.detach(), all_reduce_sum(loss), x_TD.grad, whole_gradients(stack))


def whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient in full; fails where there is none."""
    gradients = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"no gradient: {name}"
        gradients[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return gradients


def assert_same(found: Sequence[Outcome], expected: Outcome, case: Case, tolerance: float) -> None:
    def same(left: Tensor, right: Tensor, name: str) -> None:
        torch.testing.assert_close(
            left, right, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name} of {case}: {text}"
        )

    same(torch.cat([of_rank.outputs for of_rank in found]), expected.outputs, "outputs")
    same(torch.cat([of_rank.input_gradients for of_rank in found]), expected.input_gradients, "input gradients")
    for of_rank in found:
        same(of_rank.loss, expected.loss, "loss")
        assert of_rank.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            same(of_rank.gradients[name], gradient, name)
