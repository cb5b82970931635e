"""The capacity dispatcher: who gets a place, and what happens to those who do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhmoe_vl.moe import CapacityDispatcher, MoE, Routing, routing_stats
from tests.unit.moe.builders import build, gradients, random, reference_for
from tests.unit.moe.reference import capacity_drops


def routing_of(experts: list[list[int]], num_experts: int, valid: list[bool] | None = None) -> Routing:
    """A routing that chose ``experts`` with weight 1 each."""
    experts_NK = torch.tensor(experts)
    gates_NE = torch.full((len(experts), num_experts), 1 / num_experts)
    valid_N = None if valid is None else torch.tensor(valid)
    return Routing(gates_NE.log(), gates_NE, torch.ones(experts_NK.shape), experts_NK, valid_N)


def test_hand_worked_places_are_given_out_choice_by_choice() -> None:
    """Four rows, two choices, three experts: ceil(1.0 * 2 * 4 / 3) = 3 places each.

    First choices 0 0 0 1 fill expert 0 with rows 0-2. Second choices 1 1 2 0: rows 0 and 1 take the last two places of
    expert 1, row 2 one of expert 2, and row 3 finds expert 0 full, although it is the only choice dropped and row
    order alone would have refused nobody else.
    """
    routing = routing_of([[0, 1], [0, 1], [0, 2], [1, 0]], num_experts=3)
    dispatcher = CapacityDispatcher(1.0)
    assignment = dispatcher.assign(routing)
    assert assignment.routing.kept_NK.tolist() == [[True, True], [True, True], [True, True], [True, False]]
    assert assignment.counts_E.tolist() == [3, 3, 1]
    assert dispatcher.dispatch(torch.arange(4.0)[:, None], assignment)[:7, 0].tolist() == [0, 1, 2, 0, 1, 3, 2]
    assert assignment.slot_NK.tolist() == [[0, 3], [1, 4], [2, 6], [5, 7]]
    stats = routing_stats(assignment.routing)
    assert int(stats.num_dropped) == 1
    assert stats.load_E.tolist() == [4, 3, 1]


def test_first_choices_of_late_rows_come_before_second_choices_of_early_rows() -> None:
    """One place each (ceil(0.5 * 2 * 2 / 2)): row 0 would take both if places went row by row."""
    routing = routing_of([[0, 1], [1, 0]], num_experts=2)
    kept = CapacityDispatcher(0.5).assign(routing).routing.kept_NK
    assert kept.tolist() == [[True, False], [True, False]]


def test_padding_takes_no_places_and_adds_no_room() -> None:
    """Three valid rows of six: ceil(1.0 * 3 / 2) = 2 places; the valid rows are 1, 3 and 4."""
    experts = [[0], [0], [0], [0], [0], [1]]
    routing = routing_of(experts, num_experts=2, valid=[False, True, False, True, True, False])
    dispatcher = CapacityDispatcher(1.0)
    assignment = dispatcher.assign(routing)
    assert assignment.routing.kept_NK[:, 0].tolist() == [False, True, False, True, False, False]
    assert assignment.counts_E.tolist() == [2, 0]
    assert dispatcher.dispatch(torch.arange(6.0)[:, None], assignment)[:2, 0].tolist() == [1, 3]
    assert int(routing_stats(assignment.routing).num_dropped) == 1


def test_the_balance_load_counts_dropped_choices() -> None:
    routing = routing_of([[0], [0], [0], [0]], num_experts=2)
    stats = routing_stats(CapacityDispatcher(0.5).assign(routing).routing)
    assert stats.load_E.tolist() == [4, 0]
    assert int(stats.num_dropped) == 3


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 2, "glu": True, "inner_residual": True}])
@pytest.mark.parametrize("factor", [0.3, 0.75, 1.0])
def test_equals_the_reference_with_the_same_drops(
    factor: float, options: dict[str, Any], num_heads: int | None
) -> None:
    layer = build(num_heads, capacity_factor=factor, **options)
    reference = reference_for(layer, num_heads, **options)
    x, probe = random(11, 8, seed=1), random(11, 8, seed=2)
    valid = [t % 4 != 2 for t in range(11)]
    rows_valid = [v for v in valid for _ in range(num_heads or 1)]
    _, decisions = reference.forward(x, valid)
    choices = [[0] * reference.top_k if d is None else d.experts for d in decisions]
    drops = capacity_drops(choices, rows_valid, 4, factor)
    assert drops
    expected, _ = reference.forward(x, valid, dropped=drops)
    (expected * probe).sum().backward()

    y, routing = layer(x, torch.tensor(valid))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    kept = [[rows_valid[n] and (n, c) not in drops for c in range(reference.top_k)] for n in range(len(rows_valid))]
    assert routing.kept_NK.tolist() == kept
    assert int(routing_stats(routing).num_dropped) == len(drops)
    (y * probe).sum().backward()
    for name, grad in gradients(layer).items():
        expected_grad = reference.params[name].grad
        expected_grad = torch.zeros_like(grad) if expected_grad is None else expected_grad
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_dropped_choice_adds_nothing_whatever_the_experts_made_of_it(top_k: int) -> None:
    """The dispatcher alone: one place for two rows that want the same experts, and every row comes back as 1."""
    routing = routing_of([[0, 1][:top_k], [0, 1][:top_k]], num_experts=2)
    dispatcher = CapacityDispatcher(1 / top_k)
    combined = dispatcher.combine(torch.ones(2 * top_k, 3), dispatcher.assign(routing))
    assert combined.tolist() == [[top_k] * 3, [0] * 3]


def test_a_row_with_all_choices_dropped_gives_zero() -> None:
    layer = build(capacity_factor=0.5, num_experts=2)
    layer.router.selection_bias_E[0] = 10
    y, routing = layer(random(8, 8, seed=1))
    assert routing.kept_NK[:, 0].tolist() == [True] * 2 + [False] * 6
    assert torch.all(y[:2] != 0)
    assert torch.all(y[2:] == 0)


@pytest.mark.parametrize("num_heads", [None, 2])
def test_enough_capacity_is_dropless(num_heads: int | None) -> None:
    """A factor of E has room for every choice at one expert."""
    dropless, roomy = build(num_heads, top_k=2), build(num_heads, top_k=2, capacity_factor=4.0)
    x = random(3, 7, 8, seed=1)
    y, routing = roomy(x)
    assert torch.equal(y, dropless(x)[0])
    assert torch.all(routing.kept_NK)
    assert int(routing_stats(routing).num_dropped) == 0


def test_capacity_factor_must_be_positive() -> None:
    with pytest.raises(ValueError, match="capacity_factor=0 must be positive"):
        MoE(8, 8, 2, capacity_factor=0)


def test_dispatchers_show_in_the_layer() -> None:
    assert "CapacityDispatcher(capacity_factor=1.25)" in repr(MoE(8, 8, 2, capacity_factor=1.25))
    assert "DroplessDispatcher()" in repr(MoE(8, 8, 2))
