"""The compiled choice of experts against torch's operations, which do the same where nothing is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhmoe_vl.moe import CosineRouter, LinearRouter, MultiHeadMoE, compiled
from mhmoe_vl.moe.choice import softmax_choice
from mhmoe_vl.moe.routing import PerHeadRouter, choose_top_k
from tests.unit.moe.builders import assert_threads_do_not_change, random, relative_error

pytestmark = pytest.mark.skipif(compiled.LOOPS is None, reason=compiled.STATE)


def expected(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    probs = logits.softmax(-1)
    pool = torch.arange(logits.shape[0]) % bias.shape[0]
    experts = choose_top_k(probs + bias[pool], top_k)
    return probs, probs.gather(1, experts), experts


@pytest.mark.parametrize("num_pools", [1, 3])
@pytest.mark.parametrize("num_experts", [1, 2, 7, 8, 9, 16, 41, 64, 65, 169])
@pytest.mark.parametrize("num_rows", [0, 1, 900])
def test_forward_and_backward(num_rows: int, num_experts: int, num_pools: int) -> None:
    """Scores of few and of many experts, on one and on several threads; all gradients, one of them, expanded ones."""
    logits = (4 * random(num_rows, num_experts, seed=1)).float().double()
    bias = (0.3 * random(num_pools, num_experts, seed=2)).float().double()
    for top_k in {1, min(3, num_experts), min(8, num_experts)}:
        wanted = expected(exact := logits.clone().requires_grad_(), bias, top_k)
        actual = softmax_choice(single := logits.float().requires_grad_(), bias.float(), top_k)
        assert torch.equal(actual[2], wanted[2])
        dprobs, dweights = random(num_rows, num_experts, seed=3), random(num_rows, top_k, seed=4)
        one_row, transposed = random(1, num_experts, seed=5), random(num_experts, num_rows, seed=6).T
        for dp, dw in [(dprobs, dweights), (dprobs, None), (None, dweights), (one_row, dweights), (transposed, None)]:
            for outputs, scores in ((wanted, exact), (actual, single)):
                scores.grad = None
                # Expanded last: conversion would give every row memory of its own.
                pairs = [
                    (o, g.to(o.dtype).expand_as(o)) for o, g in zip(outputs[:2], (dp, dw), strict=True) if g is not None
                ]
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs], retain_graph=True)
            assert exact.grad is not None
            assert single.grad is not None
            # With one expert the softmax is 1 and its gradient 0, up to rounding.
            torch.testing.assert_close(single.grad.double(), exact.grad, rtol=0, atol=3e-6)
        if num_rows:
            # Rounding the difference of two scores of 15 is an error of 1e-6 of what is smallest.
            assert relative_error(actual[0].detach(), wanted[0].detach()) < 3e-7
            assert relative_error(actual[1].detach(), wanted[1].detach()) < 1.5e-6


def test_ties_go_to_the_lowest_number() -> None:
    """Rows side by side, and of many experts one by one: in several lanes, and in the rest behind the last of them."""
    for num_experts in (3, 8, 21, 64, 65, 101):
        _, _, experts = softmax_choice(torch.zeros(4, num_experts), torch.zeros(1, num_experts), 3)
        assert experts.tolist() == [[0, 1, 2]] * 4
        bias = torch.zeros(1, num_experts)
        bias[0, [num_experts - 1, num_experts - 2]] = 0.5
        _, _, experts = softmax_choice(torch.zeros(4, num_experts), bias, 3)
        assert experts.tolist() == [[num_experts - 2, num_experts - 1, 0]] * 4


@pytest.mark.parametrize("num_experts", [19, 83])
@pytest.mark.parametrize("top_k", [1, 2, 5, 19])
def test_coarse_scores_equal_a_stable_sort(top_k: int, num_experts: int) -> None:
    bias = torch.randint(0, 4, (300, num_experts), generator=torch.Generator().manual_seed(0)).float()
    wanted = [sorted(range(num_experts), key=lambda e: (-row[e], e))[:top_k] for row in bias.tolist()]
    assert softmax_choice(torch.zeros(300, num_experts), bias, top_k)[2].tolist() == wanted


@pytest.mark.parametrize("num_experts", [5, 70])
def test_experts_that_are_ruled_out_come_last(num_experts: int) -> None:
    """A bias of minus infinity leaves one expert; then the others in the order of their numbers."""
    bias = torch.full((1, num_experts), -torch.inf)
    bias[0, 0] = 0
    _, _, experts = softmax_choice(torch.zeros(20, num_experts), bias, 2)
    assert experts.tolist() == [[0, 1]] * 20


@pytest.mark.parametrize("num_others", [0, 70])
def test_large_scores_and_nan(num_others: int) -> None:
    """With others of no probability, too, which make them many."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, -1e30, -2e30], [1.0, torch.nan, 2.0], [-torch.inf, 0.0, 0.0]])
    logits = torch.cat([logits, torch.full((4, num_others), -torch.inf)], 1)
    probs, weights, experts = softmax_choice(logits, torch.zeros(1, 3 + num_others), 1)
    assert probs[[0, 1, 3], :3].tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]
    assert experts.flatten().tolist() == [0, 0, 0, 1], "any number for NaN, if it is one of an expert"
    assert probs[2].isnan().all()
    assert weights.flatten().isnan().tolist() == [False, False, True, False]


def make_routers() -> dict[str, torch.nn.Module]:
    return {
        "linear": LinearRouter(12, 19, 2),
        "renormalized": LinearRouter(12, 19, 2, renormalize=True),
        "cosine": CosineRouter(12, 19, 2),
        "sigmoid": LinearRouter(12, 19, 2, gate="sigmoid"),
        "per_head": PerHeadRouter(12, 80, 4, 2),
    }


@pytest.mark.parametrize("num_rows", [0, 48])
@pytest.mark.parametrize("name", make_routers())
def test_routers_do_not_change(name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    router = make_routers()[name]
    router.selection_bias_E.copy_(0.2 * random(router.num_experts, seed=1))
    results = []
    for loops in (compiled.LOOPS, None):
        monkeypatch.setattr(compiled, "LOOPS", loops)
        x = random(num_rows, 12, seed=2, dtype=torch.float32).requires_grad_()
        routing = router(x)
        probe = routing.balance_probs_NE.square().sum() + routing.weights_NK.square().sum() + routing.logits_NE.sum()
        results.append((routing, torch.autograd.grad(probe, [x, *router.parameters()])))
    (with_loops, gradients), (without, wanted) = results
    assert torch.equal(with_loops.experts_NK, without.experts_NK)
    for field in ("logits_NE", "balance_probs_NE", "weights_NK"):
        torch.testing.assert_close(getattr(with_loops, field), getattr(without, field), rtol=1e-5, atol=1e-6)
    for gradient, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5)


def test_the_operation_is_what_torch_expects_of_one() -> None:
    """Its results have the announced shapes and strides, its gradient is registered, and compilation takes it."""
    logits, bias = random(6, 5, seed=1, dtype=torch.float32).requires_grad_(), torch.zeros(1, 5)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mhmoe_vl.softmax_choice.default, (logits, bias, 2), test_utils=tests)


def test_layers_use_it() -> None:
    _, routing = MultiHeadMoE(8, 8, 3, 2)(random(3, 8, dtype=torch.float32))
    assert "softmax_choice" in type(routing.balance_probs_NE.grad_fn.next_functions[0][0]).__name__


def test_threads_do_not_change_results() -> None:
    assert_threads_do_not_change(
        "from mhmoe_vl.moe.choice import softmax_choice; "
        "x = torch.randn(6007, 141, generator=generator).requires_grad_(); "
        "p, w, e = softmax_choice(x, torch.zeros(1, 141), 2); (p.square().sum() + w.sum()).backward()",
        "p, w, e, x.grad",
    )
