from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.analysis.divergence import Divergence, distinct_experts, expected_distinct, is_constant


def test_by_hand() -> None:
    """Three tokens of four sub-tokens, top-1."""
    experts_THK = torch.tensor([[[3], [3], [3], [3]], [[0], [1], [0], [1]], [[2], [0], [3], [1]]])
    assert distinct_experts(experts_THK).tolist() == [1, 2, 4]


@given(
    st.integers(1, 3).flatmap(
        lambda top_k: st.lists(
            st.lists(st.lists(st.integers(0, 5), min_size=top_k, max_size=top_k, unique=True), min_size=3, max_size=3),
            min_size=1,
            max_size=6,
        )
    )
)
def test_it_is_the_size_of_the_set_of_choices(experts: list[list[list[int]]]) -> None:
    expected = [len(set(itertools.chain.from_iterable(token))) for token in experts]
    assert distinct_experts(torch.tensor(experts)).tolist() == expected


def test_one_sub_token_has_always_as_many_as_choices() -> None:
    assert distinct_experts(torch.tensor([[[5]], [[2]]])).tolist() == [1, 1]
    assert distinct_experts(torch.tensor([[[5, 1]], [[2, 0]]])).tolist() == [2, 2]
    assert is_constant(num_heads=1, num_pools=1)
    assert is_constant(num_heads=4, num_pools=4)
    assert not is_constant(num_heads=4, num_pools=1)


def test_chance_by_hand_and_by_enumeration() -> None:
    # Two sub-tokens and two experts: the same one with probability 1/4 + 9/16 ... of loads 1/4 and 3/4.
    assert expected_distinct(torch.tensor([0.25, 0.75]), num_heads=2, top_k=1) == pytest.approx(2 - (1 + 9) / 16)
    share = [0.5, 0.3, 0.2]
    expected = sum(share[a] * share[b] * share[c] * len({a, b, c}) for a, b, c in itertools.product(range(3), repeat=3))
    assert expected_distinct(torch.tensor(share), num_heads=3, top_k=1) == pytest.approx(expected, rel=1e-6)


def test_histograms_of_batches_add_up() -> None:
    divergence = Divergence(num_experts=3, num_heads=4, top_k=1)
    divergence.add(torch.tensor([1, 3, 3]))
    divergence.add(torch.tensor([2]))
    found = divergence.figures(torch.full((3,), 1 / 3))
    assert found is not None
    assert (found.smallest, found.largest, found.num_tokens, found.mean) == (1, 3, 4, 2.25)
    assert found.histogram == [0.25, 0.25, 0.5]
    assert Divergence(num_experts=3, num_heads=4, top_k=1).figures(torch.ones(3)) is None
