"""The CPU engine in the precisions of its compiled loops and padded rows, against a plain float64 loop."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mhmoe_vl.moe import segments
from mhmoe_vl.moe.memory import Workspace
from mhmoe_vl.moe.segments import segment_moe
from tests.unit.moe.builders import random

#: Error by norm, as a part of the values' own and of ones'.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}


def plain(
    x: Tensor,
    order: Tensor,
    counts: list[int],
    weights: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    glu: bool,
) -> Tensor:
    """One assignment after the other."""
    y, start = 0 * x, 0
    for expert, count in enumerate(counts):
        for assignment in order[start : start + count].tolist():
            row, choice = divmod(assignment, weights.shape[1])
            hidden = x[row] @ w1[expert] + b1[expert]
            hidden = F.silu(hidden[: len(hidden) // 2]) * hidden[len(hidden) // 2 :] if glu else F.gelu(hidden)
            y = y.index_add(0, torch.tensor([row]), (weights[row, choice] * (hidden @ w2[expert] + b2[expert]))[None])
        start += count
    return y


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Scratch memory that is full of NaN."""
    Workspace._idle.clear()
    original = torch.empty

    def empty(*shape: int, **options: object) -> Tensor:
        tensor = original(*shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    Workspace._idle.clear()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    num_rows=st.integers(1, 24),
    num_experts=st.integers(1, 4),
    top_k=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    glu=st.booleans(),
    recompute=st.booleans(),
    num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_any_assignment(
    implementation: str,
    poisoned: None,
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    top_k: int,
    sizes: tuple[int, int],
    glu: bool,
    recompute: bool,
    num_threads: int,
    seed: int,
) -> None:
    """Any expert, or none, for any choice; a row may choose an expert twice."""
    dim, hidden = sizes
    width, generator = 2 * hidden if glu else hidden, torch.Generator().manual_seed(seed)
    experts = torch.randint(0, num_experts + 1, (num_rows * top_k,), generator=generator)
    order = experts.sort(stable=True).indices
    counts = experts.bincount(minlength=num_experts + 1)[:num_experts]
    shapes = (
        (num_rows, dim),
        (num_experts, dim, width),
        (num_experts, width),
        (num_experts, hidden, dim),
        (num_experts, dim),
    )
    inputs = [random(*shape, seed=seed + number, dtype=dtype) for number, shape in enumerate(shapes)]
    inputs.append(random(num_rows, top_k, seed=seed + 7, dtype=torch.promote_types(dtype, torch.float32)))
    exact, rounded = ([t.to(kind).requires_grad_() for t in inputs] for kind in (torch.float64, None))
    probe = random(num_rows, dim, seed=seed + 8, dtype=dtype)
    x, w1, b1, w2, b2, weights = exact
    wanted = plain(x, order, counts.tolist(), weights, w1, b1, w2, b2, glu)
    wanted_grads = torch.autograd.grad(wanted, exact, probe.double(), allow_unused=True)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        x, w1, b1, w2, b2, weights = rounded
        y = segment_moe(x, order, counts, weights, w1, b1, w2, b2, glu=glu, recompute=recompute)
        grads = torch.autograd.grad(y, rounded, probe)
    finally:
        torch.set_num_threads(threads_before)
    for value, exact_value in zip((y, *grads), (wanted, *wanted_grads), strict=True):
        assert value.isfinite().all()
        if exact_value is None or not exact_value.any():
            assert not value.any()
        else:
            # Of what is summed up, not of a sum that is nearly 0.
            exact_value = exact_value.detach()
            size = float(exact_value.norm()) + exact_value.numel() ** 0.5
            assert float((value.detach().double() - exact_value).norm()) < TOLERANCE[dtype] * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_both_passes_share_their_places(dtype: torch.dtype) -> None:
    """Every assignment is in one block, blocks do not overlap, and both passes put a row in the same place."""
    generator = torch.Generator().manual_seed(0)
    for largest in (1, 3, 70, 600, 3000, 30_000):
        counts = torch.randint(0, largest + 1, (9,), generator=generator)
        places = []
        for block_rows in (segments.BLOCK_ROWS[dtype.itemsize], segments.BLOCK_ROWS_OF_SUMS[dtype.itemsize]):
            found, end = segments._segments(counts, dtype, block_rows)
            blocks = [block for segment in found for block in segment]
            assert [a for b in blocks for a in range(b.start, b.stop)] == list(range(end))
            assert end == int(counts.sum())
            assert all(0 < b.stop - b.start <= b.num_rows <= block_rows for b in blocks)
            assert all(a.place + a.num_rows <= b.place for a, b in pairwise(blocks))
            assert blocks[-1].place + blocks[-1].num_rows <= segments._num_places(end, len(counts), dtype)
            places.append({a: b.place + a - b.start for b in blocks for a in (b.start, b.stop - 1)})
        assert all(places[0][a] == place for a, place in places[1].items() if a in places[0])


def test_numbers_of_rows_are_few_in_16_bits() -> None:
    padded = [segments._padded(count, torch.bfloat16) for count in range(1, 8193)]
    assert len(set(padded)) < 32 * 8
    assert all(count <= rows <= count + max(3, count / 32) for count, rows in enumerate(padded, 1))
    assert segments._padded(77, torch.float32) == 77
