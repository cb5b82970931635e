"""Layers with random parameters, and the brute-force reference that has the same ones."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhmoe_vl.moe import MoE, MultiHeadMoE, compiled
from tests.unit.moe.reference import Reference

Layer = MoE | MultiHeadMoE

needs_loops = pytest.mark.skipif(compiled.LOOPS is None, reason=compiled.STATE)


def build(num_heads: int | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Layer:
    """``MultiHeadMoE``, or ``MoE`` if ``num_heads`` is None; every parameter random, biases too."""
    sizes = {"dim": 8, "ffn_dim": 12, "num_experts": 4, "top_k": 1} | options
    layer: Layer = MoE(**sizes) if num_heads is None else MultiHeadMoE(num_heads=num_heads, **sizes)
    layer.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * noise if parameter.numel() > 1 else parameter + 0.2 * noise)
    return layer


def reference_for(layer: Layer, num_heads: int | None = None, **options: Any) -> Reference:
    """The reference with copies of the layer's parameters, which collect gradients of their own."""
    unknown_to_reference = ("dim", "ffn_dim", "bias", "backend", "capacity_factor", "sub_ln")
    options = {name: value for name, value in options.items() if name not in unknown_to_reference}
    params = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    return Reference(params, num_heads=num_heads, **({"num_experts": 4, "top_k": 1} | options))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_threads_do_not_change(code: str, results: str) -> None:
    """The tensors ``results`` of ``code`` are the same bit for bit on 1, 2 and 5 threads.

    In a process of its own, which has not started any thread before, and whose threads no later fork misses.
    """
    program = (
        "import torch, hashlib\n"
        "for number in (1, 2, 5):\n"
        "    torch.set_num_threads(number)\n"
        "    generator = torch.Generator().manual_seed(0)\n"
        f"    {code}\n"
        f"    digest = hashlib.sha256(b''.join(t.detach().numpy().tobytes() for t in ({results}))).hexdigest()\n"
        "    print(torch.get_num_threads(), digest)"
    )
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    outputs = [line.split() for line in printed.splitlines()]
    assert [int(number) for number, _ in outputs] == [1, 2, 5]
    assert len({digest for _, digest in outputs}) == 1


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter; fails where there is none."""
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def router_of(layer: Layer) -> nn.Module:
    return layer.router if isinstance(layer, MoE) else layer.moe.router


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()
