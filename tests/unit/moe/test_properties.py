"""Random sizes, options and padding against the brute-force reference."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_vl.moe import balance_loss, routing_stats, z_loss
from tests.unit.moe.builders import build, gradients, random, reference_for, router_of
from tests.unit.moe.reference import balance, capacity_drops, z


@st.composite
def layers(draw: st.DrawFn) -> tuple[int | None, dict[str, Any]]:
    num_heads = draw(st.sampled_from([None, 1, 2, 3, 4]))
    num_experts = draw(st.integers(1, 6))
    options = {
        # A row of width 1 has a cosine of -1 or 1 at most: ties everywhere, which rounding would break.
        "dim": draw(st.integers(2, 4)) * (num_heads or 1),
        "ffn_dim": draw(st.integers(1, 6)),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, num_experts)),
        "router": draw(st.sampled_from(["linear", "cosine"])),
        "gate": draw(st.sampled_from(["softmax", "sigmoid"])),
        "renormalize": draw(st.booleans()),
        "inner_residual": draw(st.booleans()),
        "glu": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "capacity_factor": draw(st.sampled_from([None, 0.4, 1.0])),
    }
    return num_heads, options


@settings(deadline=None, max_examples=150)
@given(
    sizes=layers(),
    valid=st.lists(st.booleans(), min_size=1, max_size=6).filter(any),
    padding=st.sampled_from([0.0, 1e6, float("nan"), float("-inf")]),
    seed=st.integers(0, 2**16),
)
def test_any_layer_equals_the_reference(
    sizes: tuple[int | None, dict[str, Any]], valid: list[bool], padding: float, seed: int
) -> None:
    num_heads, options = sizes
    layer = build(num_heads, seed=seed, **options)
    reference = reference_for(layer, num_heads, **options)
    is_valid = torch.tensor(valid)
    x = random(len(valid), options["dim"], seed=seed + 1)
    probe = random(*x.shape, seed=seed + 2)

    _, decisions = reference.forward(x, valid)
    drops = []
    if options["capacity_factor"] is not None:
        rows_valid = [v for v in valid for _ in range(num_heads or 1)]
        choices = [[0] * options["top_k"] if d is None else d.experts for d in decisions]
        drops = capacity_drops(choices, rows_valid, options["num_experts"], options["capacity_factor"])
    expected, decisions = reference.forward(x, valid, dropped=drops)
    ((expected * probe).sum() + balance(decisions, options["num_experts"]) + z(decisions)).backward()

    y, routing = layer(x.masked_fill(~is_valid[:, None], padding), is_valid)
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-9)
    ((y * probe).sum() + balance_loss(routing, is_valid) + z_loss(routing, is_valid)).backward()
    for name, grad in gradients(layer).items():
        expected_grad = reference.params[name].grad
        expected_grad = torch.zeros_like(grad) if expected_grad is None else expected_grad
        torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-8, msg=lambda t, n=name: f"{n}: {t}")

    stats = routing_stats(routing)
    routed = [d for d in decisions if d is not None]
    assert stats.load_E.tolist() == [sum(d.experts.count(e) for d in routed) for e in range(options["num_experts"])]
    assert int(stats.num_dropped) == len(drops)
    assert int(stats.num_rows) == len(routed)


@settings(deadline=None, max_examples=60)
@given(
    sizes=layers(),
    num_tokens=st.integers(1, 40),
    pulls=st.lists(st.sampled_from([-9.0, 0.0, 0.0, 9.0]), min_size=6, max_size=6),
    block_rows=st.integers(1, 7),
    num_threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**16),
)
def test_blocks_and_threads_equal_the_loop(
    sizes: tuple[int | None, dict[str, Any]],
    num_tokens: int,
    pulls: list[float],
    block_rows: int,
    num_threads: int,
    seed: int,
) -> None:
    """Loads from none to all rows: experts are pulled towards and away from by their selection biases."""
    num_heads, options = sizes
    x = random(num_tokens, options["dim"], seed=seed + 1)
    probe = random(*x.shape, seed=seed + 2)
    is_valid = random(num_tokens, seed=seed + 3) > -1
    results = []
    threads_before = torch.get_num_threads()
    for backend in ("loop", "segments"):
        layer = build(num_heads, seed=seed, backend=backend, **options)
        router_of(layer).selection_bias_E.copy_(torch.tensor(pulls[: options["num_experts"]]))
        leaf = x.clone().requires_grad_()
        try:
            torch.set_num_threads(num_threads)
            with (
                patch("mhmoe_vl.moe.segments.BLOCK_ROWS", {8: block_rows}),
                patch("mhmoe_vl.moe.segments.BLOCK_ROWS_OF_SUMS", {8: 8 - block_rows}),
            ):
                y, _ = layer(leaf, is_valid)
                y.backward(probe)
        finally:
            torch.set_num_threads(threads_before)
        results.append({"y": y.detach(), "x": leaf.grad, **gradients(layer)})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-10, msg=lambda t, n=name: f"{n}: {t}")
