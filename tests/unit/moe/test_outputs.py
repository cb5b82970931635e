"""Outputs and all gradients against the brute-force reference, and the identities the layer must satisfy."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mhmoe_vl.moe import MoE, MultiHeadMoE, balance_loss, z_loss
from tests.unit.moe.builders import build, gradients, random, reference_for
from tests.unit.moe.reference import balance, z

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 2},
    "top1": {},
    "renormalize": {"top_k": 3, "renormalize": True},
    "inner_residual": {"top_k": 2, "inner_residual": True},
    "glu": {"top_k": 2, "glu": True},
    "no_bias": {"bias": False},
    "sub_ln": {"top_k": 2, "sub_ln": True},
    "glu_sub_ln": {"glu": True, "sub_ln": True},
    "glu_no_bias_renormalize": {"top_k": 2, "glu": True, "bias": False, "renormalize": True},
}


def assert_equals_reference(num_heads: int | None, *, num_tokens: int = 5, **options: Any) -> None:
    layer = build(num_heads, **options)
    reference = reference_for(layer, num_heads, **options)
    x = random(num_tokens, 8, seed=1).requires_grad_()
    x_ref = x.detach().clone().requires_grad_()
    probe = random(num_tokens, 8, seed=2)

    y, routing = layer(x)
    y_ref, decisions = reference.forward(x_ref)
    torch.testing.assert_close(y, y_ref, rtol=1e-9, atol=1e-10)
    assert routing.experts_NK.tolist() == [d.experts for d in decisions]

    # The weights of the losses are large, so that their gradients weigh as much as the output's.
    ((y * probe).sum() + 3 * balance_loss(routing) + 2 * z_loss(routing)).backward()
    ((y_ref * probe).sum() + 3 * balance(decisions, reference.num_experts) + 2 * z(decisions)).backward()
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-8, atol=1e-9)
    for name, grad in gradients(layer).items():
        expected = reference.params[name].grad
        expected = torch.zeros_like(grad) if expected is None else expected
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("router", "gate"), list(product(["linear", "cosine"], ["softmax", "sigmoid"])))
@pytest.mark.parametrize("num_heads", [None, 1, 2, 4])
def test_equals_the_reference(num_heads: int | None, router: str, gate: str, variant: str) -> None:
    assert_equals_reference(num_heads, router=router, gate=gate, **VARIANTS[variant])


@pytest.mark.parametrize("router", ["linear", "cosine"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
def test_equals_the_reference_for_every_k(top_k: int, router: str) -> None:
    assert_equals_reference(2, router=router, num_experts=5, top_k=top_k)


@pytest.mark.parametrize("num_heads", [None, 2])
def test_equals_the_reference_with_one_expert(num_heads: int | None) -> None:
    assert_equals_reference(num_heads, num_experts=1)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_equals_the_reference_with_fewer_tokens_than_experts(num_tokens: int) -> None:
    assert_equals_reference(2, num_tokens=num_tokens, num_experts=7, top_k=2)


def test_all_experts_chosen_is_the_full_mixture() -> None:
    """Dense einsums over all experts, without any selection."""
    layer = build(num_experts=6, top_k=6)
    x = random(9, 8, seed=1)
    params = dict(layer.named_parameters())
    gates = torch.softmax(x @ params["router.weight_DE"], dim=-1)
    hidden = torch.einsum("nd,edf->enf", x, params["experts.w1_EDF"]) + params["experts.b1_EF"][:, None]
    hidden = torch.nn.functional.gelu(hidden)
    outputs = torch.einsum("enf,efd->end", hidden, params["experts.w2_EFD"]) + params["experts.b2_ED"][:, None]
    torch.testing.assert_close(layer(x)[0], torch.einsum("ne,end->nd", gates, outputs), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "glu": True}, {"router": "cosine", "capacity_factor": 0.5}])
def test_one_head_between_identities_is_moe(options: dict[str, Any]) -> None:
    moe = build(**options)
    wrapper = build(1, **options)
    assert isinstance(wrapper, MultiHeadMoE)
    wrapper.moe.load_state_dict(moe.state_dict())
    with torch.no_grad():
        for linear in (wrapper.head, wrapper.merge):
            linear.weight.copy_(torch.eye(8))
            linear.bias.zero_()
    x = random(2, 6, 8, seed=1)
    valid = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    y, routing = moe(x, valid)
    y_wrapper, routing_wrapper = wrapper(x, valid)
    assert torch.equal(y, y_wrapper)
    assert torch.equal(routing.weights_NK, routing_wrapper.weights_NK)


def test_sub_tokens_are_neighbours_of_their_token() -> None:
    """With all sub-tokens of head 1 blanked by the head layer, only its rows lose their input."""
    layer = build(2, top_k=1)
    assert isinstance(layer, MultiHeadMoE)
    with torch.no_grad():
        layer.head.weight[4:] = 0
        layer.head.bias[4:] = 0
    _, routing = layer(random(3, 8, seed=1))
    assert routing.num_heads == 2
    assert routing.logits_NE.shape == (6, 4)
    assert torch.all(routing.logits_NE[1::2] == 0)
    assert torch.all(routing.logits_NE[0::2] != 0)


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_gradients_agree_with_finite_differences(router: str) -> None:
    layer = build(2, dim=4, ffn_dim=3, num_experts=3, top_k=2, router=router)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        y, routing = functional_call(layer, dict(zip(names, params, strict=True)), (x,))
        return y, z_loss(routing) + balance_loss(routing)

    inputs = (
        random(3, 4, seed=1).requires_grad_(),
        *(p.detach().requires_grad_() for p in layer.parameters()),
    )
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_any_leading_shape(num_heads: int | None, shape: tuple[int, ...]) -> None:
    layer = build(num_heads, top_k=2)
    x = random(*shape, seed=1)
    y, routing = layer(x)
    assert y.shape == shape
    torch.testing.assert_close(y.reshape(-1, 8), layer(x.reshape(-1, 8))[0], rtol=1e-12, atol=1e-13)
    assert routing.experts_NK.shape == (x.numel() // 8 * (num_heads or 1), 2)


@pytest.mark.parametrize("num_heads", [None, 2])
def test_non_contiguous_input(num_heads: int | None) -> None:
    layer = build(num_heads, top_k=2)
    valid = torch.tensor([[True, True, False], [True, False, True]]).T
    transposed = random(2, 3, 8, seed=1).transpose(0, 1)
    strided = random(3, 2, 16, seed=1)[..., ::2]
    for x in (transposed, strided):
        assert not x.is_contiguous()
        torch.testing.assert_close(layer(x, valid)[0], layer(x.contiguous(), valid.contiguous())[0])


def test_moe_needs_no_heads() -> None:
    with pytest.raises(TypeError):
        MoE(8, 12, 4, num_heads=2)
