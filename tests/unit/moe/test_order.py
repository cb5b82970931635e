"""The order of choices, by counting and by torch's sort, against Python's stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhmoe_vl.moe.order import sort_choices
from tests.unit.moe.builders import needs_loops


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_experts=st.integers(1, 9), choices=st.lists(st.integers(0, 9), max_size=60))
def test_any_choices(implementation: str, num_experts: int, choices: list[int]) -> None:
    """The number of experts itself is nobody's."""
    choices = [min(choice, num_experts) for choice in choices]
    order, slot, counts = sort_choices(torch.tensor(choices, dtype=torch.int64), num_experts)
    wanted = sorted(range(len(choices)), key=lambda i: choices[i])
    assert order.tolist() == wanted
    assert slot.tolist() == [wanted.index(i) for i in range(len(choices))]
    assert counts.tolist() == [choices.count(e) for e in range(num_experts)]


@needs_loops
def test_numbers_of_no_expert_harm_no_memory() -> None:
    order, slot, counts = sort_choices(torch.tensor([2**40, 1, -1, 0, -(2**63)]), 2)
    assert (order.tolist(), slot.tolist(), counts.tolist()) == ([3, 1, 0, 2, 4], [2, 1, 3, 0, 4], [1, 1])


@needs_loops
def test_the_operation_is_what_torch_expects_of_one() -> None:
    experts = torch.tensor([1, 0, 3, 1])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mhmoe_vl.sort_choices.default, (experts, 3), test_utils=tests)


def test_many_experts_need_more_than_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhmoe_vl.moe.compiled.LOOPS", None)
    order, _, counts = sort_choices(torch.tensor([40_000, 7, 39_999]), 40_001)
    assert order.tolist() == [1, 2, 0]
    assert counts.nonzero().flatten().tolist() == [7, 39_999, 40_000]
