from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhmoe_vl.analysis.fluctuation import Fluctuation, chance_of_change, changed_choices
from mhmoe_vl.moe import Routing


def routing_of(experts_NK: Tensor, *, num_experts: int, num_heads: int = 1, valid_N: Tensor | None = None) -> Routing:
    probs_NE = torch.full((experts_NK.shape[0], num_experts), 1 / num_experts)
    weights_NK = torch.ones(experts_NK.shape)
    return Routing(probs_NE.log(), probs_NE, weights_NK, experts_NK, valid_N=valid_N, num_heads=num_heads)


def test_with_one_expert_per_token_it_is_the_paper_s_share_of_tokens() -> None:
    fluctuation = Fluctuation()
    before, after = torch.tensor([[0], [1], [2], [1]]), torch.tensor([[0], [2], [2], [0]])
    fluctuation.add(routing_of(before, num_experts=3), routing_of(after, num_experts=3))
    found = fluctuation.figures()
    assert found is not None
    assert (found.num_rows, found.choices, found.tokens) == (4, 0.5, 0.5)
    # Loads 1/4, 1/2, 1/4 and 1/2, 0, 1/2.
    assert found.by_chance == pytest.approx(1 - 1 / 4)


def test_the_order_of_choices_does_not_count() -> None:
    before, after = torch.tensor([[0, 1], [2, 3], [0, 3]]), torch.tensor([[1, 0], [2, 0], [1, 2]])
    assert changed_choices(before, after).tolist() == [0, 1, 2]


def test_sub_tokens_padding_and_batches() -> None:
    """Two tokens of two sub-tokens and k = 2, and one of padding, which changes most."""
    before = torch.tensor([[0, 1], [2, 3], [0, 1], [0, 1], [0, 1], [0, 1]])
    after = torch.tensor([[0, 1], [3, 2], [0, 2], [3, 2], [2, 3], [2, 3]])
    valid = torch.tensor([True] * 4 + [False] * 2)
    fluctuation = Fluctuation()
    for part in (slice(0, 2), slice(2, 6)):
        fluctuation.add(
            *(routing_of(experts[part], num_experts=4, num_heads=2, valid_N=valid[part]) for experts in (before, after))
        )
    found = fluctuation.figures()
    assert found is not None
    assert (found.num_rows, found.choices, found.tokens) == (4, 3 / 8, 1 / 2)


def test_nothing_routed() -> None:
    assert Fluctuation().figures() is None


@pytest.mark.parametrize(("num_experts", "top_k", "num_pools"), [(6, 1, 1), (6, 3, 1), (8, 2, 2)])
def test_chance_is_what_independent_uniform_routers_give(num_experts: int, top_k: int, num_pools: int) -> None:
    of_pool = num_experts // num_pools
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        chosen = torch.rand(40_000, of_pool, generator=generator).argsort(-1)[:, :top_k]
        return chosen + of_pool * (torch.arange(40_000) % num_pools)[:, None]

    uniform = torch.full((num_experts,), 1 / num_experts)
    expected = chance_of_change(uniform, uniform, top_k=top_k, num_pools=num_pools)
    assert changed_choices(draw(), draw()).double().mean() / top_k == pytest.approx(expected, abs=0.01)
