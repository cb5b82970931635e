"""Routing statistics against hand-worked cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.moe import CapacityDispatcher, Routing, RoutingStats, routing_stats, share_active
from mhmoe_vl.moe.stats import MIN_CHOICES_PER_EXPERT
from tests.unit.moe.builders import build, random

GATES = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])


def routing_of(experts: list[list[int]], **fields: torch.Tensor) -> Routing:
    return Routing(GATES.log(), GATES, torch.ones(3, 1), torch.tensor(experts), **fields)


def test_by_hand() -> None:
    stats = routing_stats(routing_of([[0], [0], [1]]))
    assert stats.load_E.tolist() == [2, 1, 0, 0]
    torch.testing.assert_close(stats.load_share_E, torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert stats.num_dead == 2
    assert stats.max_violation == pytest.approx(2 / 0.75 - 1)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert stats.load_entropy == pytest.approx(entropy / math.log(4))
    assert stats.gate_entropy_sum.item() == pytest.approx(math.log(4) + math.log(2))
    assert int(stats.num_rows) == 3
    assert int(stats.num_dropped) == 0


def test_uniform_and_collapsed_load() -> None:
    uniform = routing_stats(build(num_experts=1)(random(4, 8))[1])
    assert (uniform.load_entropy, uniform.max_violation, uniform.num_dead) == (1.0, 0.0, 0)
    collapsed = routing_stats(routing_of([[2], [2], [2]]))
    assert (collapsed.load_entropy, collapsed.max_violation, collapsed.num_dead) == (0.0, 3.0, 3)


@pytest.mark.parametrize("given_to", ["routing", "stats"])
def test_padding_is_left_out(given_to: str) -> None:
    valid = torch.tensor([True, False, True])
    routing = routing_of([[0], [0], [1]], valid_N=valid) if given_to == "routing" else routing_of([[0], [0], [1]])
    stats = routing_stats(routing, valid if given_to == "stats" else None)
    assert stats.load_E.tolist() == [1, 1, 0, 0]
    assert stats.gate_entropy_sum.item() == pytest.approx(math.log(2))
    assert int(stats.num_rows) == 2


def test_drops_among_rows_that_only_the_caller_calls_padding() -> None:
    """Expert 0 has room for two of three rows; the third is dropped, the first is not counted at all."""
    routing = routing_of([[0], [0], [0]])._replace(logits_NE=GATES[:, :2], balance_probs_NE=GATES[:, :2])
    routing = CapacityDispatcher(1.3).assign(routing).routing
    assert routing.kept_NK[:, 0].tolist() == [True, True, False]
    assert int(routing_stats(routing, torch.tensor([False, True, True])).num_dropped) == 1


def test_stats_of_parts_add_up_to_stats_of_the_whole() -> None:
    layer = build(2, top_k=2)
    x = random(9, 8, seed=1)
    valid = torch.arange(9) % 4 != 1
    whole = routing_stats(layer(x, valid)[1])
    parts = routing_stats(layer(x[:4], valid[:4])[1]) + routing_stats(layer(x[4:], valid[4:])[1])
    assert torch.equal(parts.load_E, whole.load_E)
    assert torch.equal(parts.num_rows, whole.num_rows)
    torch.testing.assert_close(parts.gate_entropy_sum, whole.gate_entropy_sum)
    assert int(whole.num_rows) == 2 * int(valid.sum())


def test_nothing_routed() -> None:
    stats = routing_stats(routing_of([[0], [0], [1]]), torch.zeros(3, dtype=torch.bool))
    assert (stats.max_violation, stats.num_dead, int(stats.num_rows)) == (0.0, 4, 0)
    assert stats.load_share_E.tolist() == [0, 0, 0, 0]
    assert stats.overload == 0.0
    assert share_active(stats.load_E, [0.0, 1.0]) == [0.0, 0.0]
    assert stats.alarms == ()


def stats_of(load: list[int], *, top_k: int = 1) -> RoutingStats:
    zero = torch.tensor(0)
    return RoutingStats(torch.tensor(load), zero, zero.double(), torch.tensor(sum(load) // top_k))


def test_activation_by_hand() -> None:
    """Loads over their mean of 10: 0, 0.5, 1, 2.5."""
    assert share_active(torch.tensor([0, 5, 10, 25]), [0, 0.4, 0.5, 0.9, 1, 2, 2.5]) == [
        0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0
    ]  # fmt: skip


@given(
    load=st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    thresholds=st.lists(st.floats(0, 5), min_size=2, max_size=10),
    scale=st.sampled_from([1, 2, 8, 1024]),
)
def test_activation_falls_from_the_living_to_none(load: list[int], thresholds: list[float], scale: int) -> None:
    thresholds = [0.0, *sorted(thresholds), float(len(load))]
    shares = share_active(torch.tensor(load), thresholds)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(sum(count > 0 for count in load) / len(load))
    assert shares[-1] == 0  # no expert has more than everything
    assert share_active(torch.tensor(load) * scale, thresholds) == shares
    assert share_active(torch.tensor(load[::-1]), thresholds) == shares


def test_overload_is_0_for_balance_and_1_if_every_row_chooses_one_expert() -> None:
    assert stats_of([25, 25, 25, 25]).overload == 0
    assert stats_of([100, 0, 0, 0]).overload == pytest.approx(1)
    assert stats_of([100, 100, 0, 0], top_k=2).overload == pytest.approx(1)
    # Half of the rows, where a quarter is balance: one third of the way.
    assert stats_of([50, 50, 0, 0]).overload == pytest.approx(1 / 3)
    assert stats_of([40, 40], top_k=2).overload == 0  # nothing to choose


@pytest.mark.parametrize(
    ("load", "alarms"),
    [
        ([100, 100, 100, 100], ()),
        ([1, 133, 133, 133], ()),
        ([0, 134, 133, 133], ("dead",)),
        ([370, 10, 10, 10], ("collapsed",)),  # entropy 0.25
        ([400, 0, 0, 0], ("dead", "collapsed")),
        ([180] + [20] * 11, ()),  # 45 % on one of 12: overload 0.40, entropy 0.81
        ([280] + [20] * 11, ("collapsed",)),  # 56 %: overload 0.52, entropy 0.70
    ],
)
def test_alarms(load: list[int], alarms: tuple[str, ...]) -> None:
    assert stats_of(load).alarms == alarms


def test_few_choices_prove_nothing() -> None:
    least = 4 * MIN_CHOICES_PER_EXPERT
    assert stats_of([least, 0, 0, 0]).alarms == ("dead", "collapsed")
    assert stats_of([least - 1, 0, 0, 0]).alarms == ()
