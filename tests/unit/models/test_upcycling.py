"""Layers of experts that start as a dense layer: exactly where that can be, nearly where not, and measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from mhmoe_vl.models.upcycling import copy_into_experts, fit, missed_share, start_linear
from mhmoe_vl.moe import FeedForward, MoE, MultiHeadMoE
from tests.unit.models.builders import randomize

DIM, FFN_DIM = 16, 24


def make_dense(*, sub_ln: bool = True, glu: bool = False) -> FeedForward:
    dense = FeedForward(DIM, FFN_DIM, sub_ln=sub_ln, glu=glu).double()
    randomize(dense)
    return dense


def tokens(num: int, *, seed: int = 0) -> Tensor:
    """As a dense layer gets them: normalised, and more alike in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1.5, DIM, dtype=torch.float64)
    return F.layer_norm(torch.randn(num, DIM, generator=generator, dtype=torch.float64) * spread, (DIM,))


def make_moe(top_k: int = 2, **options: Any) -> MoE:
    torch.manual_seed(1)
    return MoE(DIM, FFN_DIM, 6, top_k, **options).double()


@pytest.mark.parametrize("router", ["linear", "cosine"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sub_ln", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
def test_copies_with_weights_that_sum_to_one_are_exact(router: str, gate: str, sub_ln: bool, top_k: int) -> None:
    dense = make_dense(sub_ln=sub_ln)
    layer = make_moe(top_k, router=router, gate=gate, renormalize=True, sub_ln=sub_ln)
    copy_into_experts(dense, layer)
    x = tokens(50, seed=1)
    y, routing = layer(x)
    assert_close(y, dense(x)[0])
    # Experts are the same, and yet tokens part.
    assert routing.experts_NK.unique().numel() > top_k


def test_glu_experts_are_copies_too() -> None:
    dense, layer = make_dense(sub_ln=False, glu=True), make_moe(glu=True, renormalize=True)
    copy_into_experts(dense, layer)
    assert_close(layer(tokens(20))[0], dense(tokens(20))[0])


@pytest.mark.parametrize(
    ("router", "gate", "top_k"),
    [
        ("linear", "softmax", 1),
        ("linear", "softmax", 3),
        ("linear", "sigmoid", 2),
        ("cosine", "softmax", 1),
        ("cosine", "softmax", 3),
    ],
)
def test_copies_make_up_for_their_weight(router: str, gate: str, top_k: int) -> None:
    dense, layer = make_dense(), make_moe(top_k, router=router, gate=gate, sub_ln=True)
    chosen = layer(tokens(200))[1].experts_NK
    copy_into_experts(dense, layer)
    assert missed_share(dense, layer, tokens(200)) < 1e-4
    if router == "linear":
        # The router is milder, and decides as before.
        assert torch.equal(layer(tokens(200))[1].experts_NK, chosen)
    assert layer(tokens(200))[1].experts_NK.unique().numel() > top_k


def test_a_norm_is_folded_but_for_the_scale_of_each_token() -> None:
    dense, layer = make_dense(), make_moe(renormalize=True)
    with pytest.raises(ValueError, match="inputs are needed"):
        copy_into_experts(dense, layer)
    copy_into_experts(dense, layer, tokens(500))
    assert 1e-4 < missed_share(dense, layer, tokens(500, seed=1)) < 0.1
    # For a single token there is nothing left to miss.
    x = tokens(1, seed=2)
    copy_into_experts(dense, layer, x)
    assert_close(layer(x)[0], dense(x)[0])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: MoE(DIM, 20, 6), "experts are 20 wide, and the dense layer is 24"),
        (lambda: make_moe(glu=True), "glu=True, and the dense"),
        (lambda: make_moe(inner_residual=True), "inner_residual adds"),
    ],
)
def test_experts_that_cannot_be_the_dense_layer(layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copy_into_experts(make_dense(), layer(), tokens(10))
    with pytest.raises(ValueError, match="gate='sigmoid' of a cosine router"):
        copy_into_experts(make_dense(), make_moe(router="cosine", gate="sigmoid", sub_ln=True))
    with pytest.raises(ValueError, match="sub_ln=True, and the dense layer has no norm"):
        copy_into_experts(make_dense(sub_ln=False), make_moe(sub_ln=True))


def make_multi_head(num_heads: int, ffn_dim: int = FFN_DIM, **options: Any) -> MultiHeadMoE:
    torch.manual_seed(1)
    return MultiHeadMoE(DIM, ffn_dim, 8, num_heads, **options).double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2, "renormalize": True},
        {"gate": "sigmoid"},
        {"router": "cosine"},
        {"pools": "per_head"},
        {"inner_residual": True},
        {"num_head_layers": 0},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_heads", [2, 4])
def test_sub_tokens_start_as_the_nearest_affine_map(num_heads: int, options: dict[str, Any]) -> None:
    dense, layer = make_dense(), make_multi_head(num_heads, **options)
    x = tokens(400)
    assert start_linear(dense, layer, x)
    augmented = torch.cat([x, torch.ones(400, 1, dtype=x.dtype)], dim=1)
    expected = augmented @ torch.linalg.lstsq(augmented, dense(x)[0]).solution
    assert_close(layer(x)[0], expected, atol=2e-2, rtol=0)
    assert layer(x)[1].experts_NK.unique().numel() > 2


@pytest.mark.parametrize(
    "options",
    [{"num_merge_layers": 0}, {"num_merge_layers": 2}, {"num_head_layers": 2}, {"glu": True}, {"ffn_dim": 15}],
    ids=str,
)
def test_what_cannot_be_affine_is_left_as_it_was(options: dict[str, Any]) -> None:
    layer = make_multi_head(2, **options)
    before = [parameter.clone() for parameter in layer.parameters()]
    assert not start_linear(make_dense(), layer, tokens(50))
    assert all(torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True))


def test_a_fit_comes_nearer_and_leaves_the_router() -> None:
    dense, layer = make_dense(), make_multi_head(2, ffn_dim=32)
    x, held_out = tokens(1500), tokens(500, seed=1)
    start_linear(dense, layer, x)
    router, linear = layer.moe.router.weight_DE.clone(), missed_share(dense, layer, held_out)
    fit(dense, layer, x, num_steps=150)
    assert missed_share(dense, layer, held_out) < 0.9 * linear
    assert torch.equal(layer.moe.router.weight_DE, router)
    again = make_multi_head(2, ffn_dim=32)
    start_linear(dense, again, x)
    fit(dense, again, x, num_steps=150)
    assert torch.equal(again.merge.weight, layer.merge.weight)


def test_what_is_missed_by_hand() -> None:
    dense, x = make_dense(), tokens(30)

    class Constant(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return dense(x)[0].mean(0).expand(len(x), -1), None

    assert missed_share(dense, dense, x) == 0
    assert missed_share(dense, Constant(), x) == pytest.approx(1)
