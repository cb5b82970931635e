"""Which tokens may influence what: padding, order, idle experts, and batches with next to nothing in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mhmoe_vl.moe import balance_loss, routing_stats, z_loss
from tests.unit.moe.builders import Layer, build, gradients, random, router_of

VALID = torch.tensor([[True, True, False, True, False], [False, True, True, True, False]])

CASES = {
    "moe": (None, {"top_k": 2}),
    "moe_residual": (None, {"inner_residual": True}),
    "moe_cosine_capacity": (None, {"router": "cosine", "capacity_factor": 0.75, "top_k": 2}),
    "mhmoe": (2, {"top_k": 2}),
    "mhmoe_residual": (2, {"inner_residual": True, "renormalize": True, "top_k": 2}),
    "mhmoe_cosine": (4, {"router": "cosine", "gate": "sigmoid"}),
    "mhmoe_capacity_glu": (2, {"capacity_factor": 0.5, "top_k": 2, "glu": True}),
}


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN, so reading it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def run(layer: Layer, x: Tensor, probe: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of ``x``, gradients of the parameters, under a loss that uses everything a layer returns."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y, routing = layer(x, valid)
    ((y * probe).sum() + balance_loss(routing, valid) + z_loss(routing, valid)).backward()
    assert x.grad is not None
    return y.detach(), x.grad, gradients(layer)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("content", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case: str, backend: str, content: float) -> None:
    """The padded batch equals the batch of only the valid tokens, whatever the padding holds."""
    num_heads, options = CASES[case]
    dtype = torch.float64 if backend == "loop" else torch.float32
    layer = build(num_heads, dim=16, backend=backend, dtype=dtype, **options)
    x, probe = random(2, 5, 16, seed=1, dtype=dtype), random(2, 5, 16, seed=2, dtype=dtype)
    expected_y, expected_x_grad, expected_grads = run(layer, x[VALID], probe[VALID], None)

    padded = x.masked_fill(~VALID[..., None], content)
    y, x_grad, grads = run(layer, padded, probe, VALID)
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if backend == "loop" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y[VALID], expected_y, **tolerance)
    torch.testing.assert_close(x_grad[VALID], expected_x_grad, **tolerance)
    assert torch.all(y[~VALID] == 0)
    assert torch.all(x_grad[~VALID] == 0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], **tolerance, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("num_heads", [None, 2])
def test_only_padding_gives_zeros_and_zero_gradients(num_heads: int | None) -> None:
    layer = build(num_heads, top_k=2)
    none_valid = torch.zeros(3, dtype=torch.bool)
    y, x_grad, grads = run(layer, torch.full((3, 8), float("nan"), dtype=torch.float64), random(3, 8), none_valid)
    assert torch.all(y == 0)
    assert torch.all(x_grad == 0)
    assert all(torch.all(grad == 0) for grad in grads.values())


@pytest.mark.parametrize("num_heads", [None, 2])
def test_valid_must_have_one_value_per_token(num_heads: int | None) -> None:
    layer = build(num_heads)
    with pytest.raises(ValueError, match=r"valid has shape \(4,\), tokens have \(2, 2\)"):
        layer(random(2, 2, 8), torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("case", [name for name in CASES if "capacity" not in name])
def test_permuting_tokens_permutes_outputs(case: str) -> None:
    num_heads, options = CASES[case]
    layer = build(num_heads, **options)
    x, probe = random(12, 8, seed=1), random(12, 8, seed=2)
    valid = torch.arange(12) % 4 != 1
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    y, x_grad, grads = run(layer, x, probe, valid)
    y_permuted, x_grad_permuted, grads_permuted = run(layer, x[order], probe[order], valid[order])
    torch.testing.assert_close(y_permuted, y[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x_grad_permuted, x_grad[order], rtol=1e-10, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_permuted[name], grad, rtol=1e-9, atol=1e-11)


def test_tokens_do_not_see_each_other() -> None:
    layer = build(4, top_k=2, renormalize=True)
    x = random(6, 8, seed=1)
    changed = x.clone()
    changed[2] = random(8, seed=9)
    y, y_changed = layer(x)[0], layer(changed)[0]
    others = torch.arange(6) != 2
    torch.testing.assert_close(y_changed[others], y[others], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(y_changed[2], y[2])


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_an_idle_expert_has_zero_gradients_and_trains_later(backend: str) -> None:
    layer = build(2, dim=16, backend=backend, dtype=torch.float32, top_k=2)
    router = router_of(layer)
    x, probe = random(6, 16, seed=1, dtype=torch.float32), random(6, 16, seed=2, dtype=torch.float32)
    idle = 3

    router.selection_bias_E[idle] = -10
    _, _, grads = run(layer, x, probe, None)
    assert routing_stats(layer(x)[1]).load_E[idle] == 0
    expert_grads = {name: grad for name, grad in grads.items() if ".experts." in name}
    assert len(expert_grads) == 4
    assert all(torch.all(grad[idle] == 0) for grad in expert_grads.values())
    assert all(torch.any(grad[0] != 0) for grad in expert_grads.values())

    router.selection_bias_E[idle] = 10
    before = layer.moe.experts.w1_EDF[idle].clone()
    _, _, grads = run(layer, x, probe, None)
    assert all(torch.any(grad[idle] != 0) for name, grad in grads.items() if ".experts." in name)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert torch.any(layer.moe.experts.w1_EDF[idle] != before)


@pytest.mark.parametrize(
    "options",
    [{}, {"router": "cosine"}, {"glu": True}, {"top_k": 4}, {"gate": "sigmoid", "renormalize": True}],
)
@pytest.mark.parametrize("num_heads", [None, 2])
def test_every_parameter_gets_a_gradient(num_heads: int | None, options: dict[str, Any]) -> None:
    """From the output alone: without auxiliary losses, and with enough tokens for every expert."""
    layer = build(num_heads, **({"top_k": 2} | options))
    y, _ = layer(random(64, 8, seed=1))
    (y * random(64, 8, seed=2)).sum().backward()
    for name, grad in gradients(layer).items():
        assert torch.all(grad.flatten(1).abs().sum(1) > 0 if grad.dim() > 1 else grad.abs().sum() > 0), name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("num_heads", [None, 2])
def test_no_tokens(num_heads: int | None, top_k: int, capacity_factor: float | None, backend: str) -> None:
    """A rank without tokens still has (zero) gradients everywhere, or gradient averaging would hang."""
    options = {"top_k": top_k, "capacity_factor": capacity_factor, "backend": backend}
    layer = build(num_heads, dim=16, dtype=torch.float32, **options)
    x = torch.zeros(2, 0, 16, requires_grad=True)
    for valid in (None, torch.zeros(2, 0, dtype=torch.bool)):
        layer.zero_grad()
        y, routing = layer(x, valid)
        assert y.shape == (2, 0, 16)
        loss = y.sum() + balance_loss(routing, valid) + z_loss(routing, valid)
        assert loss == 0
        loss.backward()
        assert all(torch.all(grad == 0) for grad in gradients(layer).values())
