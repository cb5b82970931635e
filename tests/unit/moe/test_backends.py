"""Every backend against the loop, and all of them in low precision."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mhmoe_vl.moe import Experts, MoE, MultiHeadMoE, balance_loss, count_flops
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


#: Those that must do what the loop does.
FAST = ("segments", "segments_recompute", "grouped_mm")
if find_spec("triton") and not torch.cuda.is_available():
    FAST += ("fused",)  # in the interpreter; see conftest.py


def twins(backend: str, num_heads: int | None, **options: Any) -> tuple[Layer, Layer]:
    sizes = {"dim": 32, "ffn_dim": 24, "dtype": torch.float32} | options
    return build(num_heads, backend="loop", **sizes), build(num_heads, backend=backend, **sizes)


def run(layer: Layer, x: Tensor, valid: Tensor | None, *, expanded_grad: bool) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    y, routing = layer(x, valid)
    loss = y.sum() if expanded_grad else (y * random(*y.shape, seed=2, dtype=y.dtype)).sum() + balance_loss(routing)
    loss.backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **gradients(layer)}


@pytest.mark.parametrize("batch", ["full", "padded", "idle_expert", "one_token"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", FAST)
def test_equals_loop(backend: str, case: str, batch: str) -> None:
    assert_equals_loop(backend, *CASES[case], batch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", FAST)
def test_gradients_without_strides(backend: str, case: str) -> None:
    """That of a sum is one value, expanded."""
    assert_equals_loop(backend, *CASES[case], "padded", expanded_grad=True)


def assert_equals_loop(
    backend: str, num_heads: int | None, options: dict[str, Any], batch: str, *, expanded_grad: bool = False
) -> None:
    loop, fast = twins(backend, num_heads, **options)
    x = random(2, 1 if batch == "one_token" else 9, 32, seed=1, dtype=torch.float32)
    valid = torch.arange(18).view(2, 9) % 3 != 1 if batch == "padded" else None
    if batch == "idle_expert":
        for layer in (loop, fast):
            router_of(layer).selection_bias_E[1] = -10
    expected = run(loop, x, valid, expanded_grad=expanded_grad)
    actual = run(fast, x, valid, expanded_grad=expanded_grad)
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(actual[name] / scale, value / scale, rtol=0, atol=1e-5, msg=lambda t, n=name: n + t)


@pytest.mark.parametrize("batch", ["full", "padded", "idle_expert", "one_token"])
@pytest.mark.parametrize("options", [{"top_k": 2}, {"glu": True, "bias": False}, {"capacity_factor": 0.5}], ids=str)
def test_norms_inside_grouped_experts_equal_the_loop(options: dict[str, Any], batch: str) -> None:
    assert_equals_loop("grouped_mm", 2, options | {"sub_ln": True}, batch)


@pytest.mark.parametrize("backend", ["segments", "segments_recompute", "fused"])
def test_whole_layer_backends_have_no_norms(backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{backend}' has no norm for sub_ln"):
        Experts(3, 8, 16, sub_ln=True, backend=backend)
    experts = Experts(3, 8, 16, sub_ln=True)
    assert [experts.explain(device).backend for device in ("cpu", "meta")] == ["loop", "grouped_mm"]
    assert experts.explain("cuda", torch.bfloat16).backend == "grouped_mm"


@pytest.mark.parametrize("backend", ["loop", *FAST])
def test_rows_behind_the_last_segment_give_zeros(backend: str) -> None:
    experts = Experts(3, 8, 16, backend=backend)
    torch.nn.init.ones_(experts.b2_ED)
    rows = random(10, 8, dtype=torch.float32)
    y = experts(rows, torch.tensor([2, 0, 4]))
    assert torch.all(y[6:] == 0)
    assert torch.all(y[:6] != 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 10])
@pytest.mark.parametrize("fast", FAST)
def test_transposed_rows_and_gradients(fast: str, num_rows: int, bias: bool) -> None:
    results = []
    for backend in ("loop", fast):
        torch.manual_seed(0)
        experts = Experts(3, 16, 24, bias=bias, backend=backend)
        rows = random(16, num_rows, seed=1, dtype=torch.float32).requires_grad_()
        y = experts(rows.T, torch.tensor([num_rows // 2, 0, num_rows - num_rows // 2]))
        (y.T * random(16, num_rows, seed=2, dtype=torch.float32)).sum().backward()
        assert rows.grad is not None
        results.append({"y": y.detach(), "rows": rows.grad, **gradients(experts)})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-5, msg=lambda t, n=name: n + t)


@pytest.mark.parametrize("backend", ["loop", *FAST])
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


@pytest.mark.parametrize("backend", ["loop", *FAST])
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


@pytest.mark.parametrize("backend", ["loop", *FAST])
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


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "backend", "reason"),
    [
        ("cpu", torch.float32, 8, "segments", "stay in cache"),
        ("cpu", torch.bfloat16, 8, "segments", "stay in cache"),
        ("cuda", torch.float32, 8, "loop", "need bfloat16, not float32"),
        ("cuda", torch.bfloat16, 6, "loop", "16 bytes, and dim=6"),
        ("cuda", torch.bfloat16, 8, "grouped_mm", "one launch"),
        ("mps", torch.float32, 8, "loop", "on mps"),
    ],
)
def test_auto_says_what_it_chooses_and_why(
    device: str, dtype: torch.dtype, dim: int, backend: str, reason: str
) -> None:
    choice = Experts(2, dim, 8).explain(torch.device(device), dtype)
    assert choice.backend == backend
    assert reason in choice.reason
    assert Experts(2, dim, 8, backend="loop").explain(torch.device(device), dtype) == ("loop", "asked for")


def segment_gradients(experts: Experts, rows: Tensor, counts: Tensor, probe: Tensor) -> dict[str, Tensor]:
    rows = rows.detach().clone().requires_grad_()
    experts.zero_grad()
    y = experts(rows, counts)
    y.backward(probe)
    assert rows.grad is not None
    return {"y": y.detach(), "rows": rows.grad, **gradients(experts)}


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_segments_of_many_blocks(monkeypatch: pytest.MonkeyPatch, glu: bool, bias: bool) -> None:
    """Weight gradients add up over the blocks of an expert, and leftovers of earlier calls do not show."""
    monkeypatch.setattr("mhmoe_vl.moe.segments.BLOCK_ROWS", {8: 3})
    monkeypatch.setattr("mhmoe_vl.moe.segments.BLOCK_ROWS_OF_SUMS", {8: 4})
    torch.manual_seed(0)
    experts = Experts(4, 8, 12, glu=glu, bias=bias).double()
    for counts in ([7, 0, 1, 10], [0, 0, 0, 0], [0, 3, 0, 4]):
        num_rows = sum(counts) + 2
        rows, probe = random(num_rows, 8, seed=1), random(num_rows, 8, seed=2)
        results = []
        for experts.backend in ("loop", "segments", "segments_recompute"):
            results.append(segment_gradients(experts, rows, torch.tensor(counts), probe))
        for name, value in results[0].items():
            for actual in results[1:]:
                torch.testing.assert_close(actual[name], value, msg=lambda t, n=name: n + t)


def test_segments_keep_nothing_without_gradients() -> None:
    """Frozen or without grad, there is no graph and the answer is the same."""
    experts = Experts(2, 8, 12, backend="segments")
    rows, counts = random(6, 8, dtype=torch.float32), torch.tensor([2, 4])
    expected = experts(rows, counts)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(experts(rows, counts), expected)
    experts.requires_grad_(False)
    y = experts(rows, counts)
    assert not y.requires_grad
    assert torch.equal(y, expected)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("backend", ["segments", "segments_recompute"])
def test_segments_keep_pre_activations_at_most(backend: str, glu: bool) -> None:
    """Beside what comes in: neither rows in expert order nor activations nor outputs of experts, 22 rows each."""
    layer = build(glu=glu, top_k=2, dtype=torch.float32, backend=backend)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(random(11, 8, dtype=torch.float32))
    widths = [t.shape[1] for t in kept.values() if t.is_floating_point() and t.shape[0] == 22]
    assert widths == ([24 if glu else 12] if backend == "segments" else [])


def test_the_product_that_is_made_again_is_counted() -> None:
    """Of 22 rows, 8 wide, with 12 pre-activations each."""
    x = random(11, 8, dtype=torch.float32)
    flops = []
    for backend in ("segments", "segments_recompute"):
        layer = build(top_k=2, dtype=torch.float32, backend=backend)
        flops.append(count_flops(lambda layer=layer: layer(x)[0].sum().backward()))
    assert flops[1] - flops[0] == 2 * 22 * 8 * 12


def test_segments_train_from_several_threads() -> None:
    """The backward pass of another thread must not write into this one's scratch memory."""
    experts = [Experts(3, 8, 12, backend="segments") for _ in range(4)]
    rows, counts, probe = random(60, 8, dtype=torch.float32), torch.tensor([20, 0, 40]), random(60, 8, seed=2).float()
    expected = [segment_gradients(layer, rows, counts, probe) for layer in experts]
    for layer in experts:
        layer.zero_grad()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            actual = list(pool.map(lambda layer: segment_gradients(layer, rows, counts, probe), experts))
    for ours, theirs in zip(actual, expected, strict=True):
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("case", ["moe_glu_k2", "mhmoe_k2", "mhmoe_capacity", "mhmoe_cosine_residual", "many_experts"])
def test_compiles_as_one_graph(case: str) -> None:
    num_heads, options = (CASES | {"many_experts": (2, {"num_experts": 20, "top_k": 2})})[case]
    layer = build(num_heads, **{"dim": 32, "ffn_dim": 24, "dtype": torch.float32} | options)
    x = random(2, 9, 32, seed=1, dtype=torch.float32)
    valid = torch.arange(18).view(2, 9) % 3 != 1
    expected = run(layer, x, valid, expanded_grad=False)
    layer.zero_grad()
    layer.compile(fullgraph=True, backend="aot_eager")
    actual = run(layer, x, valid, expanded_grad=False)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_nothing_is_read_back_but_by_the_loop(capacity_factor: float | None) -> None:
    """On fake tensors, whatever needs a value or makes a shape of one raises: no waiting, fixed shapes."""

    def run_on_fake_tensors(backend: str) -> None:
        with FakeTensorMode():
            layer = MultiHeadMoE(32, 24, 4, 2, top_k=2, backend=backend, capacity_factor=capacity_factor)
            y, routing = layer(torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool))
            (y.sum() + balance_loss(routing)).backward()

    torch.set_default_dtype(torch.bfloat16)  # torch 2.11 knows no fake float32 for grouped_mm
    try:
        for backend in FAST:
            run_on_fake_tensors(backend)
        with pytest.raises(DataDependentOutputException):
            run_on_fake_tensors("loop")
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", ["loop", *FAST])
def test_activation_checkpointing_changes_nothing(backend: str) -> None:
    layer = build(2, dim=32, ffn_dim=24, top_k=2, dtype=torch.float32, backend=backend)
    results = []
    for wrap in (lambda x: layer(x)[0], lambda x: checkpoint(lambda t: layer(t)[0], x, use_reentrant=False)):
        layer.zero_grad()
        x = random(9, 32, seed=1, dtype=torch.float32).requires_grad_()
        y = wrap(x)
        (y * random(9, 32, seed=2, dtype=torch.float32)).sum().backward()
        assert x.grad is not None
        results.append({"y": y.detach(), "x": x.grad, **gradients(layer)})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = MultiHeadMoE(32, 24, 4, 2, top_k=2)
        y, routing = layer(torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool))
    y.sum().backward()
    assert y.shape == (2, 9, 32)
    assert routing.experts_NK.shape == (36, 2)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())
    assert layer.explain("meta").backend == "segments"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="backend='triton' must be one of auto, loop, segments, segments_recompute, grouped_mm, fused"
    ):
        Experts(2, 8, 8, backend="triton")
    with pytest.raises(ValueError, match="must all be positive"):
        Experts(0, 8, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_cuda_equals_cpu_float64(case: str, backend: str) -> None:
    """bfloat16 on the device, padding included; weights on the device are the rounded ones."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    num_heads, options = CASES[case]
    options = {"dim": 64, "ffn_dim": 64} | options | {"top_k": 4}
    exact = build(num_heads, backend="loop", **options)
    rounded = build(num_heads, dtype=torch.bfloat16, backend=backend, **options).cuda()
    assert rounded.explain("cuda", torch.bfloat16).backend == ("grouped_mm" if backend == "auto" else "fused")
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
