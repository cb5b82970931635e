"""Compiled activations against torch's own in float64, and what happens without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.moe import MultiHeadMoE, activations
from mhmoe_vl.moe.activations import activate, activate_backward
from tests.unit.moe.builders import random, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Error by norm.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 5e-3, torch.float16: 1e-3}

compiled = pytest.mark.skipif(activations.COMPILED is None, reason=activations.STATE)


@pytest.fixture(params=["compiled", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(activations, "COMPILED", None)
    elif activations.COMPILED is None:
        pytest.skip(activations.STATE)
    return str(request.param)


def expected(pre: Tensor, dhidden: Tensor, *, glu: bool) -> tuple[Tensor, Tensor]:
    exact = pre.to(torch.float64, copy=True).requires_grad_()
    gate, up = exact.chunk(2, -1) if glu else (exact, None)
    hidden = F.gelu(exact) if up is None else F.silu(gate) * up
    hidden.backward(dhidden.double())
    assert exact.grad is not None
    return hidden.detach(), exact.grad


def both_ways(pre: Tensor, dhidden: Tensor, *, glu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden values of the forward pass and as made again, and the gradient."""
    hidden, again = torch.full_like(dhidden, torch.nan), torch.full_like(dhidden, torch.nan)
    activate(pre, glu=glu, out=hidden)
    dpre = activate_backward(
        dhidden.clone(), pre, glu=glu, hidden_BF=again, scratch=lambda: torch.full_like(pre, torch.nan)
    )
    return hidden, again, dpre


@pytest.mark.parametrize("glu", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (0, 5), (5, 33), (64, 1000)])
def test_forward_and_backward(implementation: str, shape: tuple[int, int], dtype: torch.dtype, glu: bool) -> None:
    """One value, odd sizes, no rows, and enough values for several threads."""
    num_rows, width = shape
    pre = 3 * random(num_rows, 2 * width if glu else width, seed=1)
    pre, dhidden = pre.to(dtype), random(num_rows, width, seed=2, dtype=dtype)
    hidden, dpre = expected(pre, dhidden, glu=glu)
    for name, actual, wanted in zip(
        ("hidden", "hidden again", "gradient"), both_ways(pre, dhidden, glu=glu), (hidden, hidden, dpre), strict=True
    ):
        assert actual.dtype == dtype
        if num_rows:
            assert relative_error(actual, wanted) < TOLERANCE[dtype], name


@compiled
def test_every_float_between_the_tails() -> None:
    """Absolute errors of GELU and its gradient over [-12, 12], and exact values far outside."""
    pre = torch.linspace(-12, 12, 400_001)[None]
    hidden, dpre = expected(pre, torch.ones_like(pre), glu=False)
    actual, again, gradient = both_ways(pre, torch.ones_like(pre), glu=False)
    assert float((actual.double() - hidden).abs().max()) < 1.5e-6
    assert float((gradient.double() - dpre).abs().max()) < 1.5e-6
    assert torch.equal(actual, again)
    far = torch.tensor([[-3e38, -1e4, -100.0, -5.3, 5.3, 100.0, 1e4, 3e38, 0.0]])
    actual, _, gradient = both_ways(far, torch.ones_like(far), glu=False)
    assert actual[0].tolist() == [0, 0, 0, 0, *far[0, 4:8].tolist(), 0]
    torch.testing.assert_close(gradient[0], torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0.5]), atol=2e-6, rtol=0)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("glu", [False, True])
def test_nan_stays_where_it_is(glu: bool, dtype: torch.dtype) -> None:
    pre = random(4, 16, seed=1, dtype=dtype)
    pre[1, 3] = torch.nan
    dhidden = random(4, 8 if glu else 16, seed=2, dtype=dtype)
    hidden, _, dpre = both_ways(pre, dhidden, glu=glu)
    assert hidden.isnan().nonzero().tolist() == [[1, 3]]
    assert dpre.isnan().nonzero().tolist() == ([[1, 3], [1, 11]] if glu else [[1, 3]])


@compiled
def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    """GELU of large values is the identity in float32: results are the inputs, rounded as torch rounds."""
    pre = torch.cat([random(1, 1000, seed=3, dtype=torch.bfloat16).abs() * 50 + 6])
    hidden, _, _ = both_ways(pre, torch.ones_like(pre), glu=False)
    assert torch.equal(hidden, pre)
    gate = torch.full((1, 1000), 20.0, dtype=torch.bfloat16)
    up = random(1, 1000, seed=4, dtype=torch.bfloat16)
    hidden, _, _ = both_ways(torch.cat([gate, up], 1), torch.ones_like(up), glu=True)
    assert torch.equal(hidden, (20.0 * up.float()).bfloat16())


@compiled
def test_threads_do_not_change_results() -> None:
    """In a process of its own, which has not started any thread before, and whose threads no later fork misses."""
    code = (
        "import torch, hashlib; from mhmoe_vl.moe import activations as a\n"
        "for number in (1, 2, 5):\n"
        "    torch.set_num_threads(number)\n"
        "    x = torch.randn(67, 1001, generator=torch.Generator().manual_seed(0)); h = torch.empty_like(x)\n"
        "    d = a.activate_backward(torch.ones_like(x), x, glu=False, hidden_BF=h, scratch=lambda: x)\n"
        "    print(torch.get_num_threads(), hashlib.sha256(h.numpy().tobytes() + d.numpy().tobytes()).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    outputs = [line.split() for line in printed.splitlines()]
    assert [int(number) for number, _ in outputs] == [1, 2, 5]
    assert len({digest for _, digest in outputs}) == 1


def test_explain_says_whether_they_are_compiled() -> None:
    assert activations.STATE in MultiHeadMoE(8, 8, 2, 2).explain("cpu").reason


def test_absent_ones_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "EXTENSION_SUFFIXES", [".nothing"])
    assert activations._load() == (None, "activations not compiled (not built: pip install found no C compiler)")
    broken = tmp_path / "_activations.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(activations, "_library", lambda: broken)
    found, reason = activations._load()
    assert found is None
    assert "not compiled" in reason
