"""The grouped matmul backend against the loop, and both in low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhmoe_vl.moe import Experts, MoE, balance_loss
from tests.unit.moe.builders import Layer, build, gradients, random, relative_error, router_of

CASES: dict[str, tuple[int | None, dict[str, Any]]] = {
    "moe": (None, {}),
    "moe_glu_k2": (None, {"glu": True, "top_k": 2}),
    "moe_all_experts": (None, {"top_k": 4}),
    "mhmoe_k2": (2, {"top_k": 2}),
    "mhmoe_glu_no_bias": (4, {"glu": True, "bias": False}),
    "mhmoe_cosine_residual": (2, {"router": "cosine", "inner_residual": True, "top_k": 3}),
    "mhmoe_capacity": (2, {"capacity_factor": 0.5, "top_k": 2}),
}


def twins(num_heads: int | None, **options: Any) -> tuple[Layer, Layer]:
    sizes = {"dim": 32, "ffn_dim": 24, "dtype": torch.float32} | options
    return build(num_heads, backend="loop", **sizes), build(num_heads, backend="grouped_mm", **sizes)


def run(layer: Layer, x: Tensor, valid: Tensor | None, *, expanded_grad: bool) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    y, routing = layer(x, valid)
    loss = y.sum() if expanded_grad else (y * random(*y.shape, seed=2, dtype=y.dtype)).sum() + balance_loss(routing)
    loss.backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **gradients(layer)}


@pytest.mark.parametrize("expanded_grad", [False, True], ids=["probe", "sum"])
@pytest.mark.parametrize("batch", ["full", "padded", "idle_expert", "one_token"])
@pytest.mark.parametrize("case", CASES)
def test_grouped_mm_equals_loop(case: str, batch: str, expanded_grad: bool) -> None:
    num_heads, options = CASES[case]
    loop, grouped = twins(num_heads, **options)
    x = random(2, 1 if batch == "one_token" else 9, 32, seed=1, dtype=torch.float32)
    valid = torch.arange(18).view(2, 9) % 3 != 1 if batch == "padded" else None
    if batch == "idle_expert":
        for layer in (loop, grouped):
            router_of(layer).selection_bias_E[1] = -10
    expected = run(loop, x, valid, expanded_grad=expanded_grad)
    actual = run(grouped, x, valid, expanded_grad=expanded_grad)
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(actual[name] / scale, value / scale, rtol=0, atol=1e-5, msg=lambda t, n=name: n + t)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_rows_behind_the_last_segment_give_zeros(backend: str) -> None:
    experts = Experts(3, 8, 16, backend=backend)
    torch.nn.init.ones_(experts.b2_ED)
    rows = random(10, 8, dtype=torch.float32)
    y = experts(rows, torch.tensor([2, 0, 4]))
    assert torch.all(y[6:] == 0)
    assert torch.all(y[:6] != 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 10])
def test_grouped_mm_takes_transposed_rows_and_gradients(num_rows: int, bias: bool) -> None:
    results = []
    for backend in ("loop", "grouped_mm"):
        torch.manual_seed(0)
        experts = Experts(3, 16, 24, bias=bias, backend=backend)
        rows = random(16, num_rows, seed=1, dtype=torch.float32).requires_grad_()
        y = experts(rows.T, torch.tensor([num_rows // 2, 0, num_rows - num_rows // 2]))
        (y.T * random(16, num_rows, seed=2, dtype=torch.float32)).sum().backward()
        assert rows.grad is not None
        results.append({"y": y.detach(), "rows": rows.grad, **gradients(experts)})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-5, msg=lambda t, n=name: n + t)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("case", ["moe_all_experts", "mhmoe_k2", "mhmoe_glu_no_bias"])
def test_bfloat16_is_close_to_float64(case: str, backend: str) -> None:
    """Every expert is chosen, so that rounding cannot change a decision."""
    num_heads, options = CASES[case]
    options = {"dim": 32, "ffn_dim": 24} | options | {"top_k": 4}
    exact = build(num_heads, backend="loop", **options)
    rounded = build(num_heads, backend=backend, dtype=torch.bfloat16, **options)
    exact.load_state_dict(rounded.state_dict())
    x = random(40, 32, seed=1, dtype=torch.bfloat16)
    expected = run(exact, x.double(), None, expanded_grad=False)
    actual = run(rounded, x, None, expanded_grad=False)
    for name, value in actual.items():
        assert value.dtype == torch.bfloat16, name
        assert relative_error(value, expected[name]) < 0.03, name


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_autocast_keeps_the_router_in_float32(router: str, backend: str) -> None:
    layer = build(dim=32, ffn_dim=24, router=router, backend=backend, dtype=torch.float32, top_k=2)
    x = random(50, 32, seed=1, dtype=torch.float32)
    expected, exact_routing = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x)
    assert y.dtype == torch.bfloat16
    assert routing.logits_NE.dtype == routing.weights_NK.dtype == torch.float32
    assert torch.equal(routing.logits_NE, exact_routing.logits_NE)
    assert torch.equal(routing.experts_NK, exact_routing.experts_NK)
    assert 1e-4 < relative_error(y, expected) < 0.02


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_autocast_trains_the_multi_head_layer(backend: str) -> None:
    layer = build(2, dim=32, ffn_dim=24, backend=backend, dtype=torch.float32, top_k=4)
    x = random(30, 32, seed=1, dtype=torch.float32)
    valid = torch.arange(30) % 4 != 0
    expected = run(layer, x, valid, expanded_grad=False)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x, valid)
        loss = (y * random(*y.shape, seed=2, dtype=torch.float32)).sum() + balance_loss(routing)
    assert routing.logits_NE.dtype == torch.float32
    loss.backward()
    for name, grad in {"x": x.grad, **gradients(layer)}.items():
        assert grad is not None
        assert grad.dtype == torch.float32
        assert relative_error(grad, expected[name]) < 0.03, name


@pytest.mark.parametrize(("dim", "ffn_dim", "name"), [(6, 8, "dim=6"), (8, 10, "ffn_dim=10")])
def test_grouped_mm_says_which_size_is_misaligned(dim: int, ffn_dim: int, name: str) -> None:
    layer = MoE(dim, ffn_dim, 4, backend="grouped_mm")
    with pytest.raises(ValueError, match=rf"multiple of 16 bytes.*{name} .*multiple of 4 or backend='loop'"):
        layer(torch.zeros(3, dim))


def test_auto_is_the_loop_on_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert Experts(2, 8, 8).resolve_backend(torch.zeros(1, 8, dtype=dtype)) == "loop"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="backend='triton' must be one of auto, loop, grouped_mm"):
        Experts(2, 8, 8, backend="triton")
    with pytest.raises(ValueError, match="must all be positive"):
        Experts(0, 8, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_cuda_grouped_mm_equals_cpu_float64(case: str) -> None:
    """bfloat16 grouped matmul on the device, padding included; weights on the device are the rounded ones."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    num_heads, options = CASES[case]
    options = {"dim": 64, "ffn_dim": 64} | options | {"top_k": 4}
    exact = build(num_heads, backend="loop", **options)
    rounded = build(num_heads, dtype=torch.bfloat16, **options).cuda()
    experts = rounded.experts if isinstance(rounded, MoE) else rounded.moe.experts
    assert experts.resolve_backend(torch.zeros(1, 64, dtype=torch.bfloat16, device="cuda")) == "grouped_mm"
    exact.load_state_dict(rounded.state_dict())
    x = random(40, 64, seed=1, dtype=torch.bfloat16)
    valid = torch.arange(40) % 3 != 1
    expected, _ = exact(x.double(), valid)
    expected.sum().backward()
    y, _ = rounded(x.cuda(), valid.cuda())
    y.sum().backward()
    assert relative_error(y.cpu(), expected) < 0.03
    expected_grads = gradients(exact)
    for name, grad in gradients(rounded).items():
        assert relative_error(grad.cpu(), expected_grads[name]) < 0.05, name
