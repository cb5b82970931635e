"""Cost formulas against built modules and a FLOP counter."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE, count_flops, ffn_cost
from mhmoe_vl.moe.cost import MULTI_HEAD_KINDS
from tests.unit.moe.builders import random

SPARSE_KINDS = ("smoe", "xmoe", "fine_grained", "mhmoe", "mhmoe_head_parallel")
SWITCHES = list(product([None, "linear", "cosine"], [False, True], [False, True]))
NUM_EXPERTS = {kind: 12 if kind == "mhmoe_head_parallel" else 9 for kind in SPARSE_KINDS}


def build_kind(kind: str, router: str | None, *, glu: bool, bias: bool, backend: str = "loop") -> nn.Module:
    router = router or ("cosine" if kind == "xmoe" else "linear")
    if kind in MULTI_HEAD_KINDS:
        pools = "shared" if kind == "mhmoe" else "per_head"
        options = {"pools": pools, "router": router, "glu": glu, "bias": bias, "backend": backend}
        return MultiHeadMoE(16, 24, NUM_EXPERTS[kind], 4, 2, **options)
    return MoE(16, 24, 9, 2, router=router, glu=glu, bias=bias, backend=backend)


@pytest.mark.parametrize(("router", "glu", "bias"), SWITCHES)
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_sparse_cost_equals_the_built_module(kind: str, router: str | None, glu: bool, bias: bool) -> None:
    num_heads = 4 if kind in MULTI_HEAD_KINDS else 1
    sizes = (kind, 16, 24, NUM_EXPERTS[kind], 2, num_heads)
    if kind == "mhmoe_head_parallel" and router == "cosine":
        with pytest.raises(ValueError, match="router='cosine'"):
            ffn_cost(*sizes, router=router)
        return
    cost = ffn_cost(*sizes, router=router, glu=glu, bias=bias)
    x = random(3, 5, 16, dtype=torch.float32)
    for backend in ("loop", "grouped_mm"):
        layer = build_kind(kind, router, glu=glu, bias=bias, backend=backend)
        assert cost.num_params == sum(p.numel() for p in layer.parameters())
        flops = count_flops(lambda layer=layer: layer(x))
        assert flops == 15 * cost.flops_per_token
        _, routing = layer(x)
        assert routing.experts_NK.numel() == 15 * cost.num_assignments_per_token


@pytest.mark.parametrize(("glu", "kind"), list(product([False, True], ["smoe", "mhmoe"])))
def test_norms_of_experts_are_parameters_and_no_flops(glu: bool, kind: str) -> None:
    num_heads = 4 if kind == "mhmoe" else 1
    plain, cost = (ffn_cost(kind, 16, 24, 9, 2, num_heads, glu=glu, sub_ln=sub_ln) for sub_ln in (False, True))
    options = {"glu": glu, "sub_ln": True}
    layer = MoE(16, 24, 9, 2, **options) if kind == "smoe" else MultiHeadMoE(16, 24, 9, 4, 2, **options)
    assert cost.num_params == plain.num_params + 9 * 2 * 24 == sum(p.numel() for p in layer.parameters())
    assert cost.num_active_params == plain.num_active_params + min(9, 2 * num_heads) * 2 * 24
    assert cost.flops_per_token == plain.flops_per_token


def test_experts_of_the_first_paper_have_norms() -> None:
    """Table 11 of arXiv 2404.15045: 8 experts in 6 layers have 227M parameters."""
    experts = ffn_cost("smoe", 768, 3072, 8, sub_ln=True).num_params - 768 * 8
    assert experts == 8 * 4_728_576
    assert round(6 * experts / 1e6) == 227


@pytest.mark.parametrize(("glu", "bias", "sub_ln"), list(product([False, True], repeat=3)))
def test_dense_cost_equals_the_built_module(glu: bool, bias: bool, sub_ln: bool) -> None:
    cost = ffn_cost("dense", 16, 24, glu=glu, bias=bias, sub_ln=sub_ln)
    layer = FeedForward(16, 24, glu=glu, bias=bias, sub_ln=sub_ln)
    assert cost.num_params == cost.num_active_params == sum(p.numel() for p in layer.parameters())
    x = random(3, 5, 16, dtype=torch.float32)
    assert count_flops(lambda: layer(x)) == 15 * cost.flops_per_token
    assert cost.num_assignments_per_token == 0
    assert layer(x)[1] is None


@pytest.mark.parametrize(("num_experts", "num_active_experts"), [(3, 3), (8, 8), (9, 8)])
def test_active_parameters_leave_out_experts_a_token_cannot_reach(num_experts: int, num_active_experts: int) -> None:
    """Four heads with two choices each reach at most eight experts; one expert is 4*6 + 6*4 + 6 + 4 = 58."""
    cost = ffn_cost("mhmoe", 16, 6, num_experts, 2, 4)
    assert cost.num_params - cost.num_active_params == (num_experts - num_active_experts) * 58


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("foo", 768, 3072, 8), "kind='foo' must be one of dense, smoe"),
        (("smoe", 768, 0, 8), "ffn_dim=0 and num_experts=8 must all be positive"),
        (("smoe", 768, 3072, 8, 9), "top_k=9 must lie between 1 and num_experts=8"),
        (("smoe", 768, 3072, 8, 1, 4), "has no sub-tokens: num_heads=4 must be 1"),
        (("mhmoe", 770, 3072, 8, 1, 4), "num_heads=4 must divide dim=770"),
    ],
)
def test_impossible_sizes_have_no_cost(arguments: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ffn_cost(*arguments)
    with pytest.raises(ValueError, match="router='linea' must be one of linear, cosine"):
        ffn_cost("smoe", 768, 3072, 8, router="linea")


def test_dense_flops_by_hand() -> None:
    """A 768 x 3072 layer: two matrices, two operations per multiply-add."""
    assert ffn_cost("dense", 768, 3072).flops_per_token == 2 * 2 * 768 * 3072
    assert ffn_cost("dense", 768, 3072).num_params == 2 * 768 * 3072 + 3072 + 768


def test_grouped_matmuls_are_counted_forward_and_backward() -> None:
    """The backward pass of a matmul costs twice its forward, except towards inputs that need no gradient."""
    x = random(15, 16, dtype=torch.float32).requires_grad_()
    for backend in ("loop", "grouped_mm"):
        layer = build_kind("mhmoe", None, glu=False, bias=True, backend=backend)
        forward = count_flops(lambda layer=layer: layer(x))
        assert forward == 15 * ffn_cost("mhmoe", 16, 24, 9, 2, 4).flops_per_token
        assert count_flops(lambda layer=layer: layer(x)[0].sum().backward()) == 3 * forward


def test_kinds_without_sub_tokens_have_one_head() -> None:
    with pytest.raises(ValueError, match="kind='smoe' has no sub-tokens: num_heads=2 must be 1"):
        ffn_cost("smoe", 16, 24, 4, 1, 2)
