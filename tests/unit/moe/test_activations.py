"""Activations, compiled and of torch, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.moe.activations import activate, activate_backward
from mhmoe_vl.moe.memory import Workspace
from tests.unit.moe.builders import assert_threads_do_not_change, needs_loops, random, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Error by norm.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def expected(
    pre: Tensor, dhidden: Tensor, weight: Tensor, *, glu: bool, bias: Tensor | None = None
) -> dict[str, Tensor]:
    exact = pre.to(torch.float64, copy=True).requires_grad_()
    biased = exact if bias is None else exact + bias.double()
    gate, up = biased.chunk(2, -1) if glu else (biased, None)
    hidden = F.gelu(biased) if up is None else F.silu(gate) * up
    hidden.backward(dhidden.double() * weight.double()[:, None])
    assert exact.grad is not None
    hidden = hidden.detach()
    results = {
        "hidden": hidden,
        "again": hidden * weight.double()[:, None],
        "dpre": exact.grad,
        "product": 1 + (hidden * dhidden.double()).sum(-1),
    }
    return results if bias is None else results | {"dbias": exact.grad.sum(0)}


def both_ways(
    pre: Tensor, dhidden: Tensor, weight: Tensor, *, glu: bool, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Hidden values, weighted ones as made again, gradients, and 1 plus ``<dhidden, hidden>`` of each row."""
    hidden, again = torch.full_like(dhidden, torch.nan), torch.full_like(dhidden, torch.nan)
    activate(pre, bias, glu=glu, out=hidden, ahead=pre)
    product, used_up = torch.ones_like(weight), dhidden.clone()
    dpre = torch.full_like(pre, torch.nan) if glu else used_up
    dbias = activate_backward(
        used_up,
        pre,
        bias,
        weight,
        glu=glu,
        hidden_BF=again,
        dpre_BH=dpre,
        product_B=product,
        work=Workspace(),
        ahead=hidden,
    )
    results = {"hidden": hidden, "again": again, "dpre": dpre, "product": product}
    return results if dbias is None else results | {"dbias": dbias}


def ones_for(pre: Tensor) -> Tensor:
    return torch.ones(pre.shape[0], dtype=torch.promote_types(pre.dtype, torch.float32))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("glu", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (0, 5), (5, 33), (33, 300), (64, 1000)])
def test_forward_and_backward(
    implementation: str, shape: tuple[int, int], dtype: torch.dtype, glu: bool, has_bias: bool
) -> None:
    """One value, odd sizes, no rows, several pieces and groups, and enough values for several threads."""
    num_rows, width = shape
    pre_width = 2 * width if glu else width
    pre, dhidden = 2 * random(num_rows, pre_width, seed=1), random(num_rows, width, seed=2, dtype=dtype)
    pre, bias = pre.to(dtype), 2 * random(pre_width, seed=4, dtype=dtype) if has_bias else None
    weight = random(num_rows, seed=3, dtype=torch.promote_types(dtype, torch.float32))
    wanted, actual = (f(pre, dhidden, weight, glu=glu, bias=bias) for f in (expected, both_ways))
    assert actual.keys() == wanted.keys()
    for name, value in actual.items():
        assert value.dtype == (weight.dtype if name in ("product", "dbias") else dtype), name
        if num_rows:
            # Torch's operations round biased pre-activations, hidden values and their product one after the other.
            num_roundings = 4 if implementation == "torch" or num_rows == 1 else 1
            assert relative_error(value, wanted[name]) < num_roundings * TOLERANCE[dtype], name
    if has_bias and not num_rows:
        assert not actual["dbias"].any()


@pytest.mark.parametrize("glu", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_weight_stay_as_they_are(implementation: str, dtype: torch.dtype, glu: bool) -> None:
    pre, dhidden, weight = random(9, 24, dtype=dtype), random(9, 12 if glu else 24, dtype=dtype), torch.ones(7)
    hidden, dpre = torch.zeros_like(dhidden), torch.zeros_like(pre) if glu else dhidden
    before, bias = dpre[7:].clone(), torch.zeros(24, dtype=dtype)
    weight = weight.to(torch.promote_types(dtype, torch.float32))
    dbias = activate_backward(
        dhidden,
        pre,
        bias,
        weight,
        glu=glu,
        hidden_BF=hidden,
        dpre_BH=dpre,
        product_B=torch.zeros_like(weight),
        work=Workspace(),
    )
    assert hidden[:7].all()
    assert not hidden[7:].any()
    assert torch.equal(dpre[7:], before)
    assert relative_error(dbias, dpre[:7].double().sum(0)) < TOLERANCE[dtype]


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
def test_every_bfloat16() -> None:
    """All 65,280 finite values: within a unit in the last place, or 4e-6 where GELU dies away."""
    pre = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    pre = pre[pre.isfinite()][None]
    ones = torch.ones_like(pre)
    wanted, actual = (function(pre, ones, ones_for(pre), glu=False) for function in (expected, both_ways))
    for name, smallest in (("hidden", 4e-6), ("again", 4e-6), ("dpre", 2e-5)):
        error = (actual[name].double() - wanted[name]).abs()
        assert float((error / (2.0**-8 * wanted[name].abs()).clamp_min(smallest)).max()) < 1, name
    assert torch.equal(actual["hidden"][pre > 5], pre[pre > 5])
    assert not actual["hidden"][pre < -5.3].any()


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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_do_not_change_results(dtype: str) -> None:
    assert_threads_do_not_change(
        "from mhmoe_vl.moe.activations import activate_backward; from mhmoe_vl.moe.memory import Workspace; "
        f"x = torch.randn(67, 1001, generator=generator).to(torch.{dtype}); h = torch.empty_like(x); "
        "w = torch.linspace(0, 1, 67); p = torch.zeros(67); d = torch.ones_like(x); b = activate_backward("
        "d, x, x[0], w, glu=False, hidden_BF=h, dpre_BH=d, product_B=p, work=Workspace())",
        "h.float(), d.float(), p, b",
    )
