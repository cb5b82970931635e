"""The fused kernels against plain matmuls in float64: in Triton's interpreter, or on the device where there is one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from mhmoe_vl.moe import Experts, fused
from mhmoe_vl.moe.fused import Tiles, TileSet, fused_moe
from tests.unit.moe.builders import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Error by norm of every result; bfloat16 has 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Case(NamedTuple):
    """A random layer and a random, unbalanced routing."""

    x_ND: Tensor
    weights_NK: Tensor
    w1_EDH: Tensor
    b1_EH: Tensor | None
    w2_EFD: Tensor
    b2_ED: Tensor | None
    experts_NK: Tensor
    served_NK: Tensor
    glu: bool

    def leaves(self, dtype: torch.dtype, device: str) -> Case:
        """Copies that collect gradients; combine weights stay in float32 at least."""
        copies = {}
        for name in ("x_ND", "w1_EDH", "b1_EH", "w2_EFD", "b2_ED"):
            value = getattr(self, name)
            copies[name] = None if value is None else value.detach().to(device, dtype, copy=True).requires_grad_()
        weights_dtype = torch.promote_types(dtype, torch.float32)
        weights_NK = self.weights_NK.detach().to(device, weights_dtype, copy=True).requires_grad_()
        return self._replace(weights_NK=weights_NK, **copies)

    def gradients(self) -> dict[str, Tensor]:
        names = ("x_ND", "weights_NK", "w1_EDH", "b1_EH", "w2_EFD", "b2_ED")
        return {name: getattr(self, name).grad for name in names if getattr(self, name) is not None}


def random_case(
    num_rows: int, dim: int, ffn_dim: int, num_experts: int, top_k: int, *, glu: bool, bias: bool, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:  # fmt: skip
    """All values are exact in ``dtype``, so that rounding of the inputs is not counted as an error."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    hidden_dim = 2 * ffn_dim if glu else ffn_dim
    favourite = torch.rand(num_rows, num_experts, generator=generator) + 2.0 * (torch.arange(num_experts) == 0)
    return Case(
        normal(num_rows, dim),
        torch.rand(num_rows, top_k, generator=generator, dtype=torch.float32).double(),
        normal(num_experts, dim, hidden_dim) / 4,
        normal(num_experts, hidden_dim) if bias else None,
        normal(num_experts, ffn_dim, dim) / 4,
        normal(num_experts, dim) if bias else None,
        favourite.argsort(dim=1, descending=True)[:, :top_k],
        torch.rand(num_rows, top_k, generator=generator) < 0.8,
        glu,
    )


def expected_of(case: Case) -> Tensor:
    """Every expert on every row, and a weight of zero where it is not chosen."""
    y_ND = torch.zeros_like(case.x_ND)
    for e in range(case.w1_EDH.shape[0]):
        hidden = case.x_ND @ case.w1_EDH[e] + (0 if case.b1_EH is None else case.b1_EH[e])
        if case.glu:
            gate, up = hidden.chunk(2, -1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden)
        out = hidden @ case.w2_EFD[e] + (0 if case.b2_ED is None else case.b2_ED[e])
        chosen = (case.experts_NK == e) & case.served_NK
        y_ND = y_ND + out * (chosen * case.weights_NK).sum(1, keepdim=True)
    return y_ND


def fused_of(case: Case) -> Tensor:
    num_experts = case.w1_EDH.shape[0]
    key_A = torch.where(case.served_NK, case.experts_NK, num_experts).flatten().to(case.x_ND.device)
    return fused_moe(
        case.x_ND,
        key_A.argsort(stable=True),
        torch.bincount(key_A, minlength=num_experts + 1)[:num_experts],
        case.weights_NK,
        case.w1_EDH,
        case.b1_EH,
        case.w2_EFD,
        case.b2_ED,
        glu=case.glu,
    )


def assert_fused_equals_expected(case: Case, dtype: torch.dtype) -> None:
    exact, ours = case.leaves(torch.float64, "cpu"), case.leaves(dtype, DEVICE)
    probe = torch.randn(case.x_ND.shape, generator=torch.Generator().manual_seed(9)).to(dtype).double()
    expected, y = expected_of(exact), fused_of(ours)
    (expected * probe).sum().backward()
    (y * probe.to(y)).sum().backward()
    assert y.dtype == dtype
    results = {"y": (y, expected)}
    results |= {name: (grad, exact.gradients()[name]) for name, grad in ours.gradients().items()}
    for name, (actual, wanted) in results.items():
        assert actual is not None, name
        assert actual.isfinite().all(), name
        if wanted.norm() == 0:
            assert not actual.any(), name
        else:
            assert relative_error(actual.cpu(), wanted) < TOLERANCE[dtype], name


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of hidden columns even for small sizes; unequal, so that they cannot be mixed up."""
    if DEVICE == "cpu":
        tiles = TileSet(Tiles(16, 32), Tiles(32, 16), Tiles(16, 16))
        monkeypatch.setattr(fused, "TILES", {2: tiles, 4: tiles})


@pytest.mark.parametrize(
    ("glu", "bias", "dtype"),
    [
        *((glu, bias, torch.float32) for glu in (False, True) for bias in (False, True)),
        *((is_glu, not is_glu, dtype) for is_glu in (False, True) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
@pytest.mark.parametrize(("dim", "top_k"), [(16, 1), (24, 3), (96, 2)])
def test_outputs_and_gradients(dim: int, top_k: int, glu: bool, bias: bool, dtype: torch.dtype) -> None:
    """Widths of one part, of a part and a padded part, and of two; 40 hidden columns are no multiple of a block."""
    assert_fused_equals_expected(random_case(35, dim, 40, 3, top_k, glu=glu, bias=bias, dtype=dtype), dtype)


@settings(deadline=None, max_examples=6)
@given(
    num_rows=st.integers(0, 40),
    dim=st.integers(1, 40),
    ffn_dim=st.integers(1, 40),
    num_experts=st.integers(1, 6),
    choices=st.integers(1, 3),
    glu=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_sizes(
    num_rows: int, dim: int, ffn_dim: int, num_experts: int, choices: int, glu: bool, bias: bool, seed: int
) -> None:
    top_k = min(choices, num_experts)
    case = random_case(num_rows, dim, ffn_dim, num_experts, top_k, glu=glu, bias=bias, seed=seed)
    assert_fused_equals_expected(case, torch.float32)


def test_nobody_served_gives_zeros() -> None:
    case = random_case(5, 16, 16, 3, 2, glu=False, bias=True)
    assert_fused_equals_expected(case._replace(served_NK=torch.zeros(5, 2, dtype=torch.bool)), torch.float32)


def test_uninitialised_memory_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ``empty`` returns is overwritten: here it returns NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args: Any, _original: Any = original, **options: Any) -> Tensor:
            fresh = _original(*args, **options)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(owner, name, poisoned)
    assert_fused_equals_expected(random_case(20, 24, 20, 4, 1, glu=True, bias=True), torch.float32)


def test_gradients_are_reproducible() -> None:
    case = random_case(60, 16, 32, 3, 2, glu=False, bias=True)
    results = []
    for _ in range(2):
        leaves = case.leaves(torch.float32, DEVICE)
        fused_of(leaves).sum().backward()
        results.append(leaves.gradients())
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_flops_are_counted() -> None:
    """A profiler's counter sees two products forward, and 3 + 4 backward, of 2 A D F each."""
    leaves = random_case(10, 16, 32, 3, 2, glu=False, bias=False).leaves(torch.float32, DEVICE)
    product = 2 * 20 * 16 * 32
    with FlopCounterMode(display=False) as counter:
        y = fused_of(leaves)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 7 * product


@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [(257, torch.float32, "rows of 257 values do not fit"), (16, torch.float64, "not in float64")],
)
def test_what_cannot_be_taken(dim: int, dtype: torch.dtype, reason: str) -> None:
    experts = Experts(2, dim, 8, backend="fused").to(dtype)
    with pytest.raises(ValueError, match=f"the fused backend: .*{reason}"):
        experts(torch.zeros(3, dim, dtype=dtype), torch.tensor([1, 2]))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import torch
from mhmoe_vl.moe import fused, kernels

KERNELS = (kernels.forward_kernel, kernels.backward_rows_kernel, kernels.backward_weights_kernel)
INTEGERS = ("order_ptr", "expert_ptr", "start_ptr", "end_ptr", "starts_ptr", "ends_ptr")
for capability, limit, dim, ffn_dim, glu in ((80, 166_912, 256, 2048, True), (90, 232_448, 192, 2304, False)):
    for kernel, tiles in zip(KERNELS, fused.TILES[2], strict=True):
        on_meta = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        w1, w2 = on_meta(8, dim, ffn_dim * (1 + glu)), on_meta(8, ffn_dim, dim)
        fixed = fused._constants(on_meta(9, dim), torch.empty(9, 2), w1, w2, w1[:, 0], w2[:, 0], glu, tiles)
        options = {option: fixed.pop(option) for option in ("num_warps", "num_stages")}
        signature = {
            name: "constexpr" if name in fixed else "*i64" if name in INTEGERS
            else "*fp32" if "weight_ptr" in name else "*bf16"
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.metadata.shared <= limit, (kernel.__name__, capability, compiled.metadata.shared)
"""


@pytest.mark.slow
def test_kernels_compile_and_fit_without_a_device() -> None:
    """The interpreter does not see what the compiler refuses. Compute capabilities 8.0 and 9.0, shared memory included.

    In a process of its own: here Triton may be interpreting.
    """
    environment = {"TRITON_INTERPRET": "0", "PATH": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
