"""Matched sizes against the published configurations, and the mismatch that rounding leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhmoe_vl.moe import KINDS, MoE, MultiHeadMoE, count_flops, match_ffn


@pytest.mark.parametrize(
    ("num_heads", "top_k", "num_experts_0", "width", "num_experts"),
    [
        # arXiv 2411.16205, equations 8 and 9, for d=768 and an SMoE of width 3072: exact counts rounded.
        (2, 1, 8, 2304, 21),
        (2, 2, 8, 1152, 41),
        (3, 1, 8, 2304, 31),
        (3, 3, 8, 768, 93),
        (4, 1, 8, 2304, 41),
        (4, 2, 8, 1152, 83),
        (2, 1, 32, 2304, 85),
        (4, 1, 32, 2304, 169),
        (3, 1, 32, 2304, 127),
    ],
)
def test_published_gelu_sizes(num_heads: int, top_k: int, num_experts_0: int, width: int, num_experts: int) -> None:
    shape = match_ffn("mhmoe", 768, 3072, num_experts_0, 1, num_heads, top_k)
    assert (shape.ffn_dim, shape.num_experts) == (width, num_experts)
    assert (shape.num_heads, shape.top_k) == (num_heads, top_k)
    assert shape.is_matched


@pytest.mark.parametrize(("num_heads", "top_k", "width", "num_experts"), [(2, 2, 768, 41), (3, 3, 512, 93)])
def test_published_glu_sizes(num_heads: int, top_k: int, width: int, num_experts: int) -> None:
    """The paper's SwiGLU models have widths 768 and 512, with 40 and 96 experts: its own rounding."""
    shape = match_ffn("mhmoe", 768, 2048, 8, 1, num_heads, top_k, glu=True)
    assert shape.ffn_dim == width
    assert abs(shape.num_experts - num_experts) <= 1
    assert shape.is_matched


def test_published_fine_grained_sizes() -> None:
    """arXiv 2411.16205: top-1 of 8 experts of width 2048 becomes top-2 of 16 of width 1024."""
    shape = match_ffn("fine_grained", 768, 2048, 8, 1, top_k=2, glu=True)
    assert (shape.ffn_dim, shape.num_experts, shape.top_k, shape.num_heads) == (1024, 16, 2, 1)


@pytest.mark.parametrize(("num_heads", "num_experts_0", "width"), [(4, 8, 11904), (2, 8, 5952), (4, 16, 12096)])
def test_parameter_matching_of_the_first_paper(num_heads: int, num_experts_0: int, width: int) -> None:
    """arXiv 2404.15045: 4 b h d with b = 1 - 1/(4 E0), for d=768 (b = 63/64 for 16 experts)."""
    shape = match_ffn("mhmoe", 768, 3072, num_experts_0, 1, num_heads, match="params")
    assert (shape.ffn_dim, shape.num_experts) == (width, num_experts_0)
    assert abs(shape.params_mismatch) < 0.01
    # Head and merge layers aside, the experts alone cost about h times the FLOPs.
    assert 0.9 * num_heads < shape.flops_mismatch + 1 < 1.2 * num_heads


def test_no_matching_takes_the_sizes_as_they_are() -> None:
    shape = match_ffn("mhmoe", 768, 3072, 8, 1, 4, 2, match="none")
    assert (shape.ffn_dim, shape.num_experts, shape.num_heads, shape.top_k) == (3072, 8, 4, 2)


@pytest.mark.parametrize("kind", ["smoe", "xmoe"])
@pytest.mark.parametrize("match", ["flops", "params", "none"])
def test_plain_kinds_are_the_reference(kind: str, match: str) -> None:
    shape = match_ffn(kind, 768, 3072, 8, 2, 4, 3, match=match)
    assert (shape.ffn_dim, shape.num_experts, shape.num_heads, shape.top_k) == (3072, 8, 1, 2)


def test_dense_has_the_width_of_the_active_experts() -> None:
    assert match_ffn("dense", 768, 3072, 8, 2).ffn_dim == 6144
    assert match_ffn("dense", 768, 3072, 8, 2, match="none").ffn_dim == 3072
    assert match_ffn("dense", 768, 3072, 8, 2).num_experts == 1


def test_the_number_of_experts_suits_the_expert_parallel_degree() -> None:
    shape = match_ffn("mhmoe", 768, 3072, 32, 1, 4, num_experts_multiple=8)
    assert shape.num_experts % 8 == 0
    assert shape.is_matched


@st.composite
def realistic(draw: st.DrawFn) -> dict[str, Any]:
    dim = draw(st.sampled_from([384, 768, 1152, 1536, 1920]))
    return {
        "kind": draw(st.sampled_from(["mhmoe", "fine_grained"])),
        "dim": dim,
        "reference_ffn_dim": draw(st.sampled_from([8 * dim // 3, 3 * dim, 4 * dim])),
        "reference_num_experts": draw(st.sampled_from([8, 16, 32, 64, 128])),
        "reference_top_k": draw(st.integers(1, 2)),
        "num_heads": draw(st.sampled_from([1, 2, 3, 4, 6, 8])),
        "top_k": draw(st.integers(1, 4)),
        "glu": draw(st.booleans()),
    }


def closed_form(sizes: dict[str, Any]) -> tuple[float, float]:
    """Experts that the papers' rule asks for, and what their router adds to the reference's FLOPs."""
    matrices = 3 if sizes["glu"] else 2
    dim, width_0, num_experts_0 = (sizes[n] for n in ("dim", "reference_ffn_dim", "reference_num_experts"))
    heads, overhead = (sizes["num_heads"], 2 * dim / matrices) if sizes["kind"] == "mhmoe" else (1, 0)
    width = (sizes["reference_top_k"] * width_0 - overhead) / sizes["top_k"]
    num_experts = heads * (num_experts_0 * width_0 - overhead) / width
    return num_experts, (num_experts - num_experts_0) / (matrices * sizes["reference_top_k"] * width_0)


@settings(deadline=None, max_examples=300)
@given(sizes=realistic())
def test_mismatch_is_at_most_two_percent(sizes: dict[str, Any]) -> None:
    """Wherever it can be: with very few experts whole numbers are too coarse, with very many the router is too dear."""
    num_experts, router_share = closed_form(sizes)
    assume(num_experts >= 15 and router_share <= 0.15)
    shape = match_ffn(**sizes)
    assert round(100 * abs(shape.flops_mismatch)) <= 2
    assert round(100 * abs(shape.params_mismatch)) <= 2
    assert shape.is_matched
    assert shape.ffn_dim % 8 == 0
    assert shape.num_experts >= shape.top_k


def test_a_mismatch_is_reported() -> None:
    """A thousand narrow experts on a small model: their router alone costs a third of the reference."""
    shape = match_ffn("mhmoe", 384, 1024, 128, 1, 4, 2)
    assert not shape.is_matched
    assert shape.flops_mismatch > 0.1


@pytest.mark.parametrize(
    ("kind", "glu"),
    [("mhmoe", False), ("mhmoe", True), ("mhmoe_head_parallel", False), ("fine_grained", False)],
)
def test_mismatch_is_that_of_the_built_modules(kind: str, glu: bool) -> None:
    shape = match_ffn(kind, 96, 384, 4, 1, 3, 2, glu=glu)
    if kind != "fine_grained":
        pools = "shared" if kind == "mhmoe" else "per_head"
        sizes = (shape.ffn_dim, shape.num_experts, shape.num_heads, shape.top_k)
        layer = MultiHeadMoE(96, *sizes, pools=pools, glu=glu)
    else:
        layer = MoE(96, shape.ffn_dim, shape.num_experts, shape.top_k, glu=glu)
    reference = MoE(96, 384, 4, 1, glu=glu)
    x = torch.zeros(10, 96)
    num_params, num_params_0 = (sum(p.numel() for p in m.parameters()) for m in (layer, reference))
    flops, flops_0 = (count_flops(lambda m=m: m(x)) for m in (layer, reference))
    assert shape.params_mismatch == pytest.approx(num_params / num_params_0 - 1)
    assert shape.flops_mismatch == pytest.approx(flops / flops_0 - 1)


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(KINDS),
    dim=st.integers(1, 64),
    ffn_dim=st.integers(1, 256),
    num_experts=st.integers(1, 8),
    top_k_0=st.integers(0, 9),
    num_heads=st.integers(0, 5),
    top_k=st.integers(0, 9),
    match=st.sampled_from(["flops", "params", "none"]),
)
def test_any_sizes_give_a_buildable_layer_or_a_clear_error(
    kind: str, dim: int, ffn_dim: int, num_experts: int, top_k_0: int, num_heads: int, top_k: int, match: str
) -> None:
    try:
        shape = match_ffn(kind, dim, ffn_dim, num_experts, top_k_0, num_heads, top_k, match)
    except ValueError as error:
        assert "=" in str(error)  # noqa: PT017 - names the argument that is wrong
        return
    num_pools = shape.num_heads if kind == "mhmoe_head_parallel" else 1
    assert shape.num_experts % num_pools == 0
    assert 1 <= shape.top_k <= shape.num_experts // num_pools
    assert shape.ffn_dim >= 1
    assert shape.dim % shape.num_heads == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "moe"}, "kind='moe' must be one of dense, smoe, xmoe, fine_grained, mhmoe"),
        ({"match": "time"}, "match='time' must be one of flops, params, none"),
        ({"num_heads": 5}, "num_heads=5 must divide dim=768"),
        ({"reference_ffn_dim": 768}, "reference_ffn_dim=768 .*: use a wider reference"),
        ({"top_k": 0}, "top_k=0 must be positive"),
        ({"reference_top_k": 9}, "reference_top_k=9 must lie between 1 and reference_num_experts=8"),
        ({"match": "none", "top_k": 9}, "top_k=9 must be at most num_experts=8"),
        (
            {"kind": "mhmoe_head_parallel", "match": "none", "top_k": 3},
            "top_k=3 must be at most the experts of a head=2",
        ),
        (
            {"kind": "mhmoe_head_parallel", "match": "none", "num_heads": 3},
            "num_heads=3 must divide num_experts=8: each head has experts of its own",
        ),
    ],
)
def test_impossible_matches_are_refused(options: dict[str, Any], message: str) -> None:
    sizes = {
        "kind": "mhmoe",
        "dim": 768,
        "reference_ffn_dim": 3072,
        "reference_num_experts": 8,
        "num_heads": 4,
    }
    with pytest.raises(ValueError, match=message):
        match_ffn(**(sizes | options))


@pytest.mark.parametrize(("num_heads", "top_k"), [(2, 1), (4, 1), (4, 2), (6, 3)])
def test_heads_with_experts_of_their_own_are_matched_too(num_heads: int, top_k: int) -> None:
    shape = match_ffn("mhmoe_head_parallel", 768, 3072, 16, 1, num_heads, top_k, num_experts_multiple=4)
    assert shape.is_matched
    assert shape.num_experts % num_heads == shape.num_experts % 4 == 0


def test_layers_that_are_left_out_are_paid_back_in_experts() -> None:
    """Without head and merge layers there is nothing to pay for: k f = k0 f0 and E = h E0 f0 / f."""
    shape = match_ffn("mhmoe", 768, 3072, 8, 1, 2, num_projections=0)
    assert (shape.ffn_dim, shape.num_experts) == (3072, 16)
    assert shape.is_matched
    one_head = match_ffn("mhmoe", 768, 3072, 8, 1, 1, num_projections=0)
    assert (one_head.ffn_dim, one_head.num_experts) == (3072, 8)
    assert one_head.flops_mismatch == one_head.params_mismatch == 0
    # Three layers cost half as much again as two: f0 - 1.5 d.
    assert match_ffn("mhmoe", 768, 3072, 8, 1, 2, num_projections=3).ffn_dim == 1920
    without = match_ffn("mhmoe", 768, 3072, 8, 1, 4, match="params", num_projections=0)
    assert without.ffn_dim == 4 * 3072
