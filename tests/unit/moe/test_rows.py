"""Rows to experts and back, with compiled loops and with torch's own operations, against plain formulas."""

from __future__ import annotations

import pytest
import torch

from mhmoe_vl.moe.memory import Workspace
from mhmoe_vl.moe.rows import gather, gather_gradient, scatter, sum_parts
from tests.unit.moe.builders import assert_threads_do_not_change, needs_loops, random, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}

pytestmark = pytest.mark.usefixtures("implementation")


def weights(num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    return random(num_rows, seed=9, dtype=torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("numbers", "num_padding"), [([], 0), ([], 3), ([4], 0), ([2, 0, 2, 5, 1, 4], 35)])
def test_rows_are_fetched_and_zeros_follow(dtype: torch.dtype, numbers: list[int], num_padding: int) -> None:
    x, out = random(6, 11, dtype=dtype), torch.full((len(numbers) + num_padding, 11), torch.nan, dtype=dtype)
    gather(x, torch.tensor(numbers, dtype=torch.int64), out=out, ahead=x)
    assert torch.equal(out[: len(numbers)], x[numbers])
    assert not out[len(numbers) :].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_padding"), [(0, 2), (1, 0), (31, 0), (32, 1), (33, 40), (900, 3)])
def test_gradients_of_weights_and_of_the_bias_come_along(dtype: torch.dtype, num_rows: int, num_padding: int) -> None:
    dy, number, bias = random(40, 50, seed=1, dtype=dtype), torch.arange(num_rows) * 7 % 40, random(50, dtype=dtype)
    weight, product = (
        weights(num_rows, dtype),
        torch.full((num_rows,), 2.0, dtype=torch.promote_types(dtype, torch.float32)),
    )
    out = torch.full((num_rows + num_padding, 50), torch.nan, dtype=dtype)
    dbias = gather_gradient(dy, number, bias, weight, out=out, product_B=product, work=Workspace())
    rows = dy[number].double()
    assert torch.equal(out[:num_rows], dy[number])
    assert not out[num_rows:].any()
    assert dbias.dtype == product.dtype == weight.dtype
    if num_rows:
        assert relative_error(product, 2 + rows @ bias.double()) < TOLERANCE[dtype]
        assert relative_error(dbias, weight.double() @ rows) < TOLERANCE[dtype]
    assert gather_gradient(dy, number, None, weight, out=out, product_B=product, work=Workspace()) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
def test_rows_go_where_they_belong(dtype: torch.dtype, has_bias: bool, has_weight: bool) -> None:
    """Two more rows than numbers: those go nowhere; nobody's places stay as they are."""
    x, number = random(7, 19, seed=1, dtype=dtype), torch.tensor([8, 0, 3, 6, 1])
    bias, weight = random(19, dtype=dtype) if has_bias else None, weights(5, dtype) if has_weight else None
    out = torch.full((9, 19), 5.0, dtype=dtype)
    scatter(x, bias, weight, number, out=out)
    rows = x[:5].double() + (0 if bias is None else bias.double())
    rows = rows if weight is None else rows * weight.double()[:, None]
    assert relative_error(out[number], rows) < TOLERANCE[dtype]
    assert (out[[2, 4, 5, 7]] == 5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 2, 5), (3, 1, 5), (5, 2, 33), (400, 3, 100)])
def test_parts_are_added(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x = random(*shape, dtype=dtype)
    out = torch.full((shape[0], shape[2]), torch.nan, dtype=dtype)
    sum_parts(x, out=out)
    torch.testing.assert_close(out.double(), x.double().sum(1), rtol=0, atol=10 * TOLERANCE[dtype])


@needs_loops
def test_threads_do_not_change_results() -> None:
    assert_threads_do_not_change(
        "from mhmoe_vl.moe.rows import gather_gradient; from mhmoe_vl.moe.memory import Workspace; "
        "x = torch.randn(900, 100, generator=generator); o = torch.empty_like(x); p = torch.zeros(900); "
        "b = gather_gradient(x, torch.arange(900), x[0], x[:, 0].contiguous(), out=o, product_B=p, work=Workspace())",
        "o, p, b",
    )
