"""Balance loss and z-loss: hand-worked numbers, the reference, shares of a split batch, padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mhmoe_vl.moe import CosineRouter, Routing, balance_loss, expert_load, z_loss
from tests.unit.moe.builders import Layer, build, gradients, random, reference_for, router_of
from tests.unit.moe.reference import balance, z

CASES: dict[str, tuple[int | None, dict[str, Any]]] = {
    "moe": (None, {}),
    "moe_sigmoid": (None, {"gate": "sigmoid", "top_k": 2}),
    "mhmoe": (2, {"top_k": 2}),
    "mhmoe_cosine": (4, {"router": "cosine", "top_k": 3}),
    "mhmoe_cosine_sigmoid": (2, {"router": "cosine", "gate": "sigmoid"}),
}


def routing_of(gates: list[list[float]], experts: list[list[int]], **fields: Any) -> Routing:
    gates_NE = torch.tensor(gates, dtype=torch.float64)
    return Routing(gates_NE.log(), gates_NE, torch.ones(len(gates), 1), torch.tensor(experts), **fields)


def test_balance_loss_by_hand() -> None:
    """Loads 2/3 and 1/3, mean gates (0.9 + 0.6 + 0.3) / 3 = 0.6 and 0.4: 2 (2/3 * 0.6 + 1/3 * 0.4) = 16/15."""
    gates = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]
    routing = routing_of(gates, [[0], [0], [1]])
    assert float(balance_loss(routing)) == pytest.approx(16 / 15, rel=1e-12)
    assert expert_load(routing).tolist() == [2, 1]


def test_balance_loss_by_hand_with_two_choices_and_padding() -> None:
    """Valid rows 0 and 2 choose (0, 1) and (2, 0): loads 2/4, 1/4, 1/4; mean gates 0.35, 0.25, 0.4."""
    gates = [[0.5, 0.3, 0.2], [0.0, 0.0, 1.0], [0.2, 0.2, 0.6]]
    valid = torch.tensor([True, False, True])
    expected = 3 * (0.5 * 0.35 + 0.25 * 0.25 + 0.25 * 0.4)
    choices = [[0, 1], [2, 1], [2, 0]]
    for routing, argument in (
        (routing_of(gates, choices), valid),
        (routing_of(gates, choices, valid_N=valid), None),
    ):
        assert float(balance_loss(routing, argument)) == pytest.approx(expected, rel=1e-12)
        assert expert_load(routing, argument).tolist() == [2, 1, 1]


def test_z_loss_by_hand() -> None:
    """logsumexp of two equal scores s is s + log 2."""
    scores = torch.tensor([[1.0, 1.0], [3.0, 3.0], [50.0, 50.0]], dtype=torch.float64)
    routing = Routing(scores, scores.softmax(-1), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long))
    expected = ((1 + math.log(2)) ** 2 + (3 + math.log(2)) ** 2) / 2
    assert float(z_loss(routing, torch.tensor([True, True, False]))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_experts", [1, 2, 7])
@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_of_a_uniform_layer_is_one(num_experts: int, top_k: int) -> None:
    top_k = min(top_k, num_experts)
    generator = torch.Generator().manual_seed(0)
    choices = [torch.randperm(num_experts, generator=generator)[:top_k].tolist() for _ in range(5)]
    uniform_gate = routing_of([[1 / num_experts] * num_experts] * 5, choices)
    assert float(balance_loss(uniform_gate)) == pytest.approx(1, rel=1e-12)
    gates = random(num_experts, num_experts, seed=1).softmax(-1).tolist()
    uniform_load = routing_of(gates, [[e] for e in range(num_experts)])
    assert float(balance_loss(uniform_load)) == pytest.approx(1, rel=1e-12)


def test_balance_loss_of_a_collapsed_layer_is_the_number_of_experts() -> None:
    assert float(balance_loss(routing_of([[1.0, 0, 0, 0]] * 3, [[0]] * 3))) == pytest.approx(4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given_to", ["layer", "loss", "one_row_each"])
def test_losses_equal_the_reference_without_padding(case: str, given_to: str) -> None:
    """``valid`` counts the same wherever it is given; gradients included."""
    num_heads, options = CASES[case]
    layer = build(num_heads, **options)
    reference = reference_for(layer, num_heads, **options)
    x = random(2, 4, 8, seed=1)
    valid = torch.tensor([[True, False, True, True], [False, True, True, False]])
    _, decisions = reference.forward(x.view(8, 8), valid.flatten().tolist())
    expected = balance(decisions, reference.num_experts), z(decisions)
    (3 * expected[0] + expected[1]).backward()

    to_layer, to_loss = (valid, None) if given_to == "layer" else (None, valid)
    if given_to == "one_row_each":
        first = torch.tensor([[True], [False]])
        to_layer, to_loss = valid | first, valid | ~first
    _, routing = layer(x, to_layer)
    actual = balance_loss(routing, to_loss), z_loss(routing, to_loss)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    (3 * actual[0] + actual[1]).backward()
    for name, parameter in layer.named_parameters():
        if "router" in name:
            torch.testing.assert_close(parameter.grad, reference.params[name].grad, rtol=1e-8, atol=1e-10)


def auxiliary(layer: Layer, x: Tensor, valid: Tensor, load_E: Tensor | None) -> Tensor:
    _, routing = layer(x, valid)
    losses = (loss(routing, valid, global_load_E=load_E) for loss in (balance_loss, z_loss))
    return torch.stack(list(losses))


@pytest.mark.parametrize("case", CASES)
def test_shares_of_a_split_batch_add_up(case: str) -> None:
    """Unequal parts with unequal padding, one of them empty: values and gradients add up to those of the whole."""
    num_heads, options = CASES[case]
    layer = build(num_heads, **options)
    x = random(13, 8, seed=1)
    valid = torch.arange(13) % 3 != 1
    whole = auxiliary(layer, x, valid, None)
    whole.sum().backward()
    expected_grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}

    layer.zero_grad()
    parts = [slice(0, 6), slice(6, 6), slice(6, 8), slice(8, 13)]
    load_E = torch.stack([expert_load(layer(x[part], valid[part])[1]) for part in parts]).sum(0)
    shares = torch.stack([auxiliary(layer, x[part], valid[part], load_E) for part in parts])
    torch.testing.assert_close(shares.sum(0), whole, rtol=1e-10, atol=1e-12)
    shares.sum().backward()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, grad, rtol=1e-9, atol=1e-11)


def test_the_balance_loss_of_the_cosine_router_ignores_the_learned_temperature() -> None:
    layer = build(2, router="cosine", top_k=2)
    router = router_of(layer)
    assert isinstance(router, CosineRouter)
    x = random(9, 8, seed=1)
    _, before = layer(x)
    with torch.no_grad():
        router.log_temperature += 1.0
    _, after = layer(x)
    assert not torch.allclose(before.logits_NE, after.logits_NE)
    assert not torch.allclose(before.weights_NK, after.weights_NK)
    assert torch.equal(balance_loss(before), balance_loss(after))
    assert torch.autograd.grad(balance_loss(after), router.log_temperature, allow_unused=True) == (None,)


def test_losses_train_the_router_only() -> None:
    layer = build(2, top_k=2)
    x = random(9, 8, seed=1)
    y, routing = layer(x)
    (0 * y.sum() + balance_loss(routing) + z_loss(routing)).backward()
    touched = {name for name, grad in gradients(layer).items() if torch.any(grad != 0)}
    assert touched == {"head.weight", "head.bias", "moe.router.weight_DE"}


def test_no_valid_row_gives_zero() -> None:
    routing = routing_of([[0.9, 0.1]], [[0]])
    nothing = torch.tensor([False])
    assert float(balance_loss(routing, nothing)) == 0
    assert float(z_loss(routing, nothing)) == 0


def test_valid_of_the_wrong_size_is_refused() -> None:
    _, routing = build(2)(random(3, 8))
    with pytest.raises(ValueError, match="valid has 6 values, but the layer routed 3 tokens"):
        balance_loss(routing, torch.ones(6, dtype=torch.bool))
