"""Heads with routers and experts of their own: a layer of its own for every head, side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.moe import MoE, MultiHeadMoE, Routing, balance_loss, expert_load, routing_stats, z_loss
from tests.unit.moe.builders import build, gradients, random

HEADS, EXPERTS, WIDTH = 3, 4, 5  # of each head
SIZES: dict[str, Any] = {"dim": HEADS * WIDTH, "num_experts": HEADS * EXPERTS, "pools": "per_head"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 2, "renormalize": True, "glu": True},
    {"top_k": 3, "gate": "sigmoid", "bias": False, "backend": "loop"},
    {"top_k": 2, "inner_residual": True, "capacity_factor": 0.75},
]


def layers_of(layer: MultiHeadMoE, options: dict[str, Any]) -> list[MoE]:
    """One plain layer per head, with copies of its slices of the weights."""
    parts = []
    for head in range(HEADS):
        part = MoE(WIDTH, 12, EXPERTS, **options).double()
        own = slice(head * EXPERTS, (head + 1) * EXPERTS)
        state = {name: t[own].clone() for name, t in layer.moe.state_dict().items() if "weight_HDE" not in name}
        part.load_state_dict(state | {"router.weight_DE": layer.moe.router.weight_HDE[head].detach().clone()})
        parts.append(part)
    return parts


def run_apart(layer: MultiHeadMoE, parts: list[MoE], x: Tensor, valid: Tensor) -> tuple[Tensor, list[Routing]]:
    sub_TD = F.linear(torch.where(valid[:, None], x, 0.0), layer.head.weight.detach(), layer.head.bias.detach())
    results = [part(x_TW, valid) for part, x_TW in zip(parts, sub_TD.split(WIDTH, dim=1), strict=True)]
    merged = F.linear(torch.cat([y for y, _ in results], dim=1), layer.merge.weight.detach(), layer.merge.bias.detach())
    return torch.where(valid[:, None], merged, 0.0), [routing for _, routing in results]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_head_is_a_layer_of_its_own(options: dict[str, Any]) -> None:
    layer = build(HEADS, **SIZES, **options)
    assert isinstance(layer, MultiHeadMoE)
    layer.moe.router.selection_bias_E.copy_(0.1 * random(HEADS * EXPERTS, seed=3))
    parts = layers_of(layer, options)
    x, valid, probe = random(9, SIZES["dim"], seed=1), torch.arange(9) % 4 != 1, random(9, SIZES["dim"], seed=2)

    expected, routings = run_apart(layer, parts, x, valid)
    balance = torch.stack([balance_loss(routing) for routing in routings]).mean()
    z = torch.stack([z_loss(routing) for routing in routings]).mean()
    ((expected * probe).sum() + 3 * balance + z).backward()

    y, routing = layer(x, valid)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close((balance_loss(routing), z_loss(routing)), (balance, z))
    ((y * probe).sum() + 3 * balance_loss(routing) + z_loss(routing)).backward()
    found = gradients(layer)
    torch.testing.assert_close(
        found.pop("moe.router.weight_HDE"), torch.stack([part.router.weight_DE.grad for part in parts])
    )
    for name, gradient in found.items():
        if ".experts." in name:
            of_parts = [part.get_parameter(name.removeprefix("moe.")).grad for part in parts]
            torch.testing.assert_close(gradient, torch.cat(of_parts))

    # Experts are numbered head by head, and so is their load.
    assert torch.equal(expert_load(routing), torch.cat([expert_load(of_head) for of_head in routings]))
    experts_THK = routing.experts_NK.view(9, HEADS, -1)
    for head, of_head in enumerate(routings):
        assert torch.equal(experts_THK[:, head], of_head.experts_NK + head * EXPERTS)
    stats, of_heads = routing_stats(routing), [routing_stats(of_head) for of_head in routings]
    for figure in ("num_dropped", "gate_entropy_sum", "num_rows"):
        torch.testing.assert_close(getattr(stats, figure), sum(getattr(s, figure) for s in of_heads))


def test_balancing_by_bias_moves_each_head_towards_equal_load() -> None:
    """Every head routes as many rows, so the mean load of all experts is that of each head's."""
    layer = build(HEADS, **SIZES, top_k=2)
    _, routing = layer(random(20, SIZES["dim"], seed=1))
    load_E = expert_load(routing)
    layer.moe.router.update_selection_bias(load_E, rate=0.5)
    for bias, load in zip(
        layer.moe.router.selection_bias_E.view(HEADS, -1), load_E.view(HEADS, -1).double(), strict=True
    ):
        torch.testing.assert_close(bias, 0.5 * torch.sign(load.mean() - load))


def test_one_head_is_the_layer_with_a_shared_pool() -> None:
    per_head, shared = (build(1, dim=6, num_experts=4, top_k=2, pools=pools) for pools in ("per_head", "shared"))
    state = shared.state_dict()
    state["moe.router.weight_HDE"] = state.pop("moe.router.weight_DE")[None]
    per_head.load_state_dict(state)
    x = random(7, 6, seed=1)
    torch.testing.assert_close(per_head(x)[0], shared(x)[0])


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens: int) -> None:
    layer = build(HEADS, **SIZES, top_k=2)
    y, routing = layer(random(num_tokens, SIZES["dim"], seed=1))
    (y.sum() + balance_loss(routing)).backward()
    assert gradients(layer).keys() == dict(layer.named_parameters()).keys()


def test_the_state_dict_shards_by_head() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build(HEADS, **SIZES).state_dict().items()}
    assert shapes["moe.router.weight_HDE"] == (HEADS, WIDTH, EXPERTS)
    assert shapes["moe.router.selection_bias_E"] == (HEADS * EXPERTS,)
    assert shapes["moe.experts.w1_EDF"] == (HEADS * EXPERTS, WIDTH, 12)


def test_it_compiles_whole() -> None:
    layer = build(HEADS, **SIZES, top_k=2, dtype=torch.float32)
    x = random(6, SIZES["dim"], seed=1, dtype=torch.float32)
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 7}, "num_heads=3 must divide num_experts=7: each head has its own"),
        ({"top_k": 5}, "top_k=5 must be at most the 4 experts of a head"),
        ({"router": "cosine"}, "router='cosine': with pools='per_head' only 'linear' is known"),
        ({"pools": "none"}, "pools='none' must be one of shared, per_head"),
    ],
)
def test_impossible_layers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiHeadMoE(ffn_dim=12, num_heads=HEADS, **(SIZES | changes))
