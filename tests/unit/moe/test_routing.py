"""Selection: ties, order, the selection bias, gates, initial values, and what routers refuse."""

from __future__ import annotations

import math

import pytest
import torch

from mhmoe_vl.moe import CosineRouter, LinearRouter, MoE, MultiHeadMoE, routing_stats
from mhmoe_vl.moe.routing import choose_top_k, cosine_router_dim
from tests.unit.moe.builders import build, random, router_of


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-1.0, -1.0, 5.0, -1.0, 5.0]])
    assert choose_top_k(scores, 1).tolist() == [[1], [0], [2]]
    assert choose_top_k(scores, 2).tolist() == [[1, 2], [0, 1], [2, 4]]
    assert choose_top_k(scores, 4).tolist() == [[1, 2, 4, 3], [0, 1, 2, 3], [2, 4, 0, 1]]


@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
def test_selection_equals_a_stable_sort(top_k: int) -> None:
    """Coarse scores, so that most rows have ties."""
    scores = torch.randint(0, 4, (300, 9), generator=torch.Generator().manual_seed(0)).double()
    expected = [sorted(range(9), key=lambda e: (-row[e], e))[:top_k] for row in scores.tolist()]
    assert choose_top_k(scores, top_k).tolist() == expected


def test_ties_of_saturated_gates_go_to_the_larger_logit() -> None:
    """All of 20, 30 and 25 have a float32 sigmoid of exactly 1."""
    layer = LinearRouter(1, 4, 2, gate="sigmoid")
    with torch.no_grad():
        layer.weight_DE.copy_(torch.tensor([[20.0, 30.0, -1.0, 25.0]]))
    routing = layer(torch.ones(1, 1))
    assert routing.logits_NE.sigmoid()[0, [0, 1, 3]].tolist() == [1, 1, 1]
    assert routing.experts_NK.tolist() == [[1, 3]]
    layer.selection_bias_E[2] = 1.0
    assert layer(torch.ones(1, 1)).experts_NK.tolist() == [[2, 1]], "the bias counts before the logits"


def test_equal_logits_choose_the_first_experts() -> None:
    layer = build(2, top_k=2)
    with torch.no_grad():
        router_of(layer).weight_DE.zero_()
    _, routing = layer(random(5, 8, seed=1))
    assert routing.experts_NK.tolist() == [[0, 1]] * 10
    torch.testing.assert_close(routing.weights_NK, torch.full((10, 2), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_the_selection_bias_changes_choices_but_not_weights(router: str, gate: str) -> None:
    layer = build(router=router, gate=gate, top_k=2)
    x = random(20, 8, seed=1)
    _, before = layer(x)
    router_of(layer).selection_bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    _, after = layer(x)
    assert torch.all(after.experts_NK[:, 0] == 3)
    assert not torch.all(before.experts_NK[:, 0] == 3)
    assert torch.equal(before.logits_NE, after.logits_NE)
    assert torch.equal(before.balance_probs_NE, after.balance_probs_NE)
    gates_NE = after.logits_NE.softmax(-1) if gate == "softmax" else after.logits_NE.sigmoid()
    assert torch.equal(after.weights_NK, gates_NE.gather(1, after.experts_NK))


def test_updating_the_selection_bias_by_hand() -> None:
    """Mean load 4: up for 1 and 3, down for 8, unchanged for 4."""
    router = LinearRouter(8, 4)
    router.update_selection_bias(torch.tensor([1, 8, 4, 3]), rate=0.25)
    assert router.selection_bias_E.tolist() == [0.25, -0.25, 0, 0.25]
    router.update_selection_bias(torch.tensor([5, 5, 5, 5]), rate=0.25)
    assert router.selection_bias_E.tolist() == [0.25, -0.25, 0, 0.25]


@pytest.mark.parametrize("num_heads", [None, 2])
def test_updating_the_selection_bias_balances_the_load(num_heads: int | None) -> None:
    layer = build(num_heads, top_k=2)
    router = router_of(layer)
    # Tokens with much in common: they all like the same experts.
    x = random(400, 8, seed=1) + 2 * random(8, seed=2)
    before = routing_stats(layer(x)[1]).max_violation
    for _ in range(300):
        router.update_selection_bias(routing_stats(layer(x)[1]).load_E, rate=2e-3)
    after = routing_stats(layer(x)[1]).max_violation
    assert before > 0.2
    assert after < 0.1


def test_renormalized_weights_sum_to_one() -> None:
    for gate in ("softmax", "sigmoid"):
        _, routing = build(gate=gate, renormalize=True, top_k=3)(random(20, 8, seed=1))
        torch.testing.assert_close(routing.weights_NK.sum(-1), torch.ones(20, dtype=torch.float64))
        assert torch.all(routing.weights_NK[:, :-1] >= routing.weights_NK[:, 1:])


def test_tiny_gates_renormalize_too() -> None:
    """Sigmoids of -30 are 1e-13; those of -200 are zero, and must not give 0/0."""
    router = LinearRouter(1, 2, 2, gate="sigmoid", renormalize=True)
    torch.nn.init.ones_(router.weight_DE)
    x = torch.tensor([[-30.0], [-200.0]], requires_grad=True)
    weights_NK = router(x).weights_NK
    torch.testing.assert_close(weights_NK, torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    (weights_NK * torch.tensor([3.0, 1.0])).sum().backward()
    assert torch.all(router.weight_DE.grad.isfinite())


def test_cosine_scores_ignore_the_length_of_the_input() -> None:
    layer = build(router="cosine")
    x = random(20, 8, seed=1)
    torch.testing.assert_close(layer(x)[1].logits_NE, layer(7 * x)[1].logits_NE)


@pytest.mark.parametrize(("num_experts", "expected"), [(1, 2), (3, 2), (4, 2), (8, 4), (41, 20), (128, 64)])
def test_the_cosine_router_is_half_as_wide_as_there_are_experts(num_experts: int, expected: int) -> None:
    assert cosine_router_dim(num_experts) == expected
    assert CosineRouter(16, num_experts).embedding_ER.shape == (num_experts, expected)


@pytest.mark.parametrize(("gate", "temperature"), [("softmax", 0.3), ("sigmoid", 0.07)])
def test_the_initial_temperature_follows_the_gate(gate: str, temperature: float) -> None:
    router = CosineRouter(16, 8, gate=gate)
    assert router.log_temperature.item() == pytest.approx(math.log(temperature))


def test_initial_values() -> None:
    """Xavier-uniform matrices per expert, a gain of 1/sqrt(2) on the head layer, zero biases."""
    torch.manual_seed(0)
    layer = MultiHeadMoE(64, 96, 5, 2, glu=True)
    bounds = {
        "head.weight": math.sqrt(3 / 64) / math.sqrt(2),
        "merge.weight": math.sqrt(3 / 64),
        "moe.experts.w1_EDF": math.sqrt(6 / (32 + 96)),
        "moe.experts.w2_EFD": math.sqrt(6 / (96 + 32)),
    }
    for name, bound in bounds.items():
        assert 0.99 * bound < layer.get_parameter(name).abs().max().item() <= bound, name
    for name in ("head.bias", "merge.bias", "moe.experts.b1_EF", "moe.experts.b2_ED"):
        assert torch.all(layer.get_parameter(name) == 0), name
    assert layer.moe.router.weight_DE.std().item() == pytest.approx(0.02, rel=0.2)


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k=5 must lie between 1 and num_experts=4"):
        MoE(8, 8, 4, top_k=5)
    with pytest.raises(ValueError, match="top_k=0 must lie between 1 and num_experts=4"):
        MoE(8, 8, 4, top_k=0)
    with pytest.raises(ValueError, match="gate='relu' must be 'softmax' or 'sigmoid'"):
        MoE(8, 8, 4, gate="relu")
    with pytest.raises(ValueError, match="router='hash' must be one of linear, cosine"):
        MoE(8, 8, 4, router="hash")
    with pytest.raises(ValueError, match="num_heads=3 must divide dim=8"):
        MultiHeadMoE(8, 8, 4, 3)
    with pytest.raises(ValueError, match="num_heads=0 must divide dim=8"):
        MultiHeadMoE(8, 8, 4, 0)
