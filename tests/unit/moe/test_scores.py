"""Scores of a router, block by block, against one product in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_vl.moe import scores
from mhmoe_vl.moe.scores import router_scores
from tests.unit.moe.builders import assert_threads_do_not_change, random, relative_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [1, 8, 65])
@pytest.mark.parametrize("num_rows", [0, 1, 700, 9000])
def test_forward_and_backward(num_rows: int, num_experts: int, dtype: torch.dtype) -> None:
    """Less than a block, several blocks, several groups of blocks."""
    wide = torch.promote_types(dtype, torch.float32)
    x, weight = random(num_rows, 12, seed=1, dtype=dtype), random(12, num_experts, seed=2, dtype=wide)
    probe = random(num_rows, num_experts, seed=3, dtype=wide)
    results = []
    for function, inputs in (
        (torch.matmul, (x.double(), weight.double())),
        (router_scores, (x, weight)),
    ):
        leaves = [leaf.clone().requires_grad_() for leaf in inputs]
        logits = function(*leaves)
        results.append([logits, *torch.autograd.grad(logits, leaves, probe.to(logits.dtype))])
    for wanted, actual, own in zip(*results, (wide, dtype, wide), strict=True):
        assert actual.dtype == own
        assert actual.shape == wanted.shape
        if num_rows:
            assert relative_error(actual, wanted) < {torch.float64: 1e-13, torch.float32: 3e-6}.get(own, 3e-3)
        else:
            assert not actual.any()


def test_rows_with_strides_and_expanded_gradients() -> None:
    x, weight = random(6, 20).T.requires_grad_(), random(6, 3, seed=1).requires_grad_()
    router_scores(x, weight).sum().backward()
    assert relative_error(x.grad, weight.sum(1).expand(20, 6)) < 1e-14
    assert relative_error(weight.grad, x.sum(0)[:, None].expand(6, 3)) < 1e-14


def test_blocks_and_groups_do_not_overlap() -> None:
    """Sizes that nothing divides: each row counts once."""
    for num_experts in (3, 70):
        x = torch.ones(2 * scores.GROUP_ROWS + scores.BLOCK_ROWS + 1, 2, requires_grad=True)
        weight = torch.ones(2, num_experts, requires_grad=True)
        logits = router_scores(x, weight)
        assert (logits == 2).all()
        logits.sum().backward()
        assert (x.grad == num_experts).all()
        assert (weight.grad == len(x)).all()


def test_flops_are_those_of_three_products() -> None:
    x, weight = random(10, 6).requires_grad_(), random(6, 3).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        router_scores(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 6 * 3


def test_the_operation_is_what_torch_expects_of_one() -> None:
    inputs = random(6, 5, dtype=torch.float32).requires_grad_(), random(5, 3, dtype=torch.float32).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mhmoe_vl.router_scores.default, inputs, test_utils=tests)


def test_threads_do_not_change_results() -> None:
    assert_threads_do_not_change(
        "from mhmoe_vl.moe.scores import router_scores; x = torch.randn(25000, 24, generator=generator); "
        "x.requires_grad_(); w = torch.randn(24, 70, generator=generator).requires_grad_(); "
        "y = router_scores(x, w); y.square().sum().backward()",
        "y, x.grad, w.grad",
    )
