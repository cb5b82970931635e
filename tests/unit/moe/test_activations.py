"""Compiled activations against torch's own in float64, and what happens without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.moe import compiled
from mhmoe_vl.moe.activations import activate, activate_backward
from tests.unit.moe.builders import assert_threads_do_not_change, random, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Error by norm.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 1e-3}

needs_loops = pytest.mark.skipif(compiled.LOOPS is None, reason=compiled.STATE)


@pytest.fixture(params=["compiled", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(compiled, "LOOPS", None)
    elif compiled.LOOPS is None:
        pytest.skip(compiled.STATE)
    return str(request.param)


def expected(pre: Tensor, dhidden: Tensor, weight: Tensor, *, glu: bool) -> dict[str, Tensor]:
    exact = pre.to(torch.float64, copy=True).requires_grad_()
    gate, up = exact.chunk(2, -1) if glu else (exact, None)
    hidden = F.gelu(exact) if up is None else F.silu(gate) * up
    hidden.backward(dhidden.double() * weight.double()[:, None])
    assert exact.grad is not None
    hidden = hidden.detach()
    return {"hidden": hidden, "again": hidden, "dpre": exact.grad, "product": (hidden * dhidden.double()).sum(-1)}


def both_ways(pre: Tensor, dhidden: Tensor, weight: Tensor, *, glu: bool) -> dict[str, Tensor]:
    """Hidden values of the forward pass and as made again, the gradient, and ``<dhidden, hidden>`` of each row."""
    hidden, again, product = (torch.full_like(like, torch.nan) for like in (dhidden, dhidden, weight))
    activate(pre, glu=glu, out=hidden)
    scratch = torch.full_like(pre, torch.nan)
    dpre = activate_backward(
        dhidden.clone(), pre, weight, glu=glu, hidden_BF=again, product_B=product, scratch=lambda: scratch
    )
    return {"hidden": hidden, "again": again, "dpre": dpre, "product": product}


def ones_for(pre: Tensor) -> Tensor:
    return torch.ones(pre.shape[0], dtype=torch.promote_types(pre.dtype, torch.float32))


@pytest.mark.parametrize("glu", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (0, 5), (5, 33), (64, 1000)])
def test_forward_and_backward(implementation: str, shape: tuple[int, int], dtype: torch.dtype, glu: bool) -> None:
    """One value, odd sizes, no rows, and enough values for several threads."""
    num_rows, width = shape
    pre = 3 * random(num_rows, 2 * width if glu else width, seed=1)
    pre, dhidden = pre.to(dtype), random(num_rows, width, seed=2, dtype=dtype)
    weight = random(num_rows, seed=3, dtype=torch.promote_types(dtype, torch.float32))
    wanted = expected(pre, dhidden, weight, glu=glu)
    for name, actual in both_ways(pre, dhidden, weight, glu=glu).items():
        assert actual.dtype == (weight.dtype if name == "product" else dtype)
        if num_rows:
            assert relative_error(actual, wanted[name]) < TOLERANCE[dtype], name


@needs_loops
def test_every_float_between_the_tails() -> None:
    """Absolute errors of GELU and its gradient over [-12, 12], and exact values far outside."""
    pre = torch.linspace(-12, 12, 400_001)[None]
    ones = torch.ones_like(pre)
    wanted, actual = (function(pre, ones, ones_for(pre), glu=False) for function in (expected, both_ways))
    for name in ("hidden", "dpre"):
        assert float((actual[name].double() - wanted[name]).abs().max()) < 1.5e-6, name
    assert torch.equal(actual["hidden"], actual["again"])
    far = torch.tensor([[-3e38, -1e4, -100.0, -5.3, 5.3, 100.0, 1e4, 3e38, 0.0]])
    actual = both_ways(far, torch.ones_like(far), ones_for(far), glu=False)
    assert actual["hidden"][0].tolist() == [0, 0, 0, 0, *far[0, 4:8].tolist(), 0]
    torch.testing.assert_close(actual["dpre"][0], torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0.5]), atol=2e-6, rtol=0)


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("glu", [False, True])
def test_nan_stays_where_it_is(glu: bool, dtype: torch.dtype) -> None:
    pre = random(4, 16, seed=1, dtype=dtype)
    pre[1, 3] = torch.nan
    dhidden = random(4, 8 if glu else 16, seed=2, dtype=dtype)
    actual = both_ways(pre, dhidden, ones_for(pre), glu=glu)
    assert actual["hidden"].isnan().nonzero().tolist() == [[1, 3]]
    assert actual["dpre"].isnan().nonzero().tolist() == ([[1, 3], [1, 11]] if glu else [[1, 3]])
    assert actual["product"].isnan().tolist() == [False, True, False, False]


@needs_loops
def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    """GELU of large values is the identity in float32: results are the inputs, rounded as torch rounds."""
    pre = random(1, 1000, seed=3, dtype=torch.bfloat16).abs() * 50 + 6
    assert torch.equal(both_ways(pre, torch.ones_like(pre), ones_for(pre), glu=False)["hidden"], pre)
    gate = torch.full((1, 1000), 20.0, dtype=torch.bfloat16)
    up = random(1, 1000, seed=4, dtype=torch.bfloat16)
    hidden = both_ways(torch.cat([gate, up], 1), torch.ones_like(up), ones_for(up), glu=True)["hidden"]
    assert torch.equal(hidden, (20.0 * up.float()).bfloat16())


@needs_loops
def test_threads_do_not_change_results() -> None:
    assert_threads_do_not_change(
        "from mhmoe_vl.moe.activations import activate_backward; x = torch.randn(67, 1001, generator=generator); "
        "h = torch.empty_like(x); w = torch.linspace(0, 1, 67); p = torch.empty_like(w); d = activate_backward("
        "torch.ones_like(x), x, w, glu=False, hidden_BF=h, product_B=p, scratch=None)",
        "h, d, p",
    )
