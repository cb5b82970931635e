"""Running sums against formulas over all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_vl.analysis.representation import ExpertScatter


def reference(x: np.ndarray, experts: np.ndarray, num_experts: int, num_pools: int = 1) -> tuple[float, float, float]:
    """Traces of both scatter matrices, and of the product with the pseudo-inverse, from all rows."""
    dim = x.shape[1]
    within, between = np.zeros((dim, dim)), np.zeros((dim, dim))
    of_pool = num_experts // num_pools
    for expert in range(num_experts):
        rows = x[experts == expert]
        if len(rows) == 0:
            continue
        center = x[experts // of_pool == expert // of_pool].mean(0)
        mean = rows.mean(0)
        within += (rows - mean).T @ (rows - mean) / len(x)
        between += len(rows) * np.outer(mean - center, mean - center) / len(x)
    return np.trace(within), np.trace(between), np.trace(within @ np.linalg.pinv(between, rcond=1e-11))


def test_by_hand() -> None:
    """Expert 0 has (0, 0) and (2, 0), expert 1 (10, 0) and (12, 0): means 1 and 11, and 6 of all."""
    scatter = ExpertScatter(3, 2)
    scatter.add(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([0, 1]))
    scatter.add(torch.tensor([[2.0, 0.0], [12.0, 0.0]]), torch.tensor([0, 1]))
    found = scatter.collapse()
    assert found is not None
    assert (found.num_rows, found.within, found.between) == (4, pytest.approx(1), pytest.approx(25))
    assert found.ratio == pytest.approx(1 / 25)
    assert found.with_inverse == pytest.approx(1 / 25)


def test_rows_that_are_the_mean_of_their_expert_have_collapsed_entirely() -> None:
    scatter = ExpertScatter(2, 3)
    scatter.add(torch.eye(3, dtype=torch.float64)[[0, 0, 1]], torch.tensor([0, 0, 1]))
    found = scatter.collapse()
    assert found is not None
    assert found.within == pytest.approx(0, abs=1e-12)
    assert found.ratio == pytest.approx(0, abs=1e-12)


def test_without_rows_or_without_difference_there_is_no_ratio() -> None:
    scatter = ExpertScatter(2, 3)
    scatter.add(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert scatter.collapse() is None
    scatter.add(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(5, dtype=torch.long))
    found = scatter.collapse()
    assert found is not None
    assert (found.ratio, found.with_inverse) == (None, None)
    assert found.within > 0


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(8, 60),
    num_experts=st.sampled_from([2, 4, 6]),
    num_pools=st.sampled_from([1, 2]),
    dim=st.integers(2, 7),
    offset=st.sampled_from([0.0, 1e5]),
    cut=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
def test_sums_over_batches_equal_the_formula_over_all_rows(
    num_rows: int, num_experts: int, num_pools: int, dim: int, offset: float, cut: int, seed: int
) -> None:
    """Wherever the rows are cut into batches, and however far they are from the origin."""
    rng = np.random.default_rng(seed)
    experts = rng.integers(0, num_experts, num_rows)
    x = rng.normal(size=(num_rows, dim)) + rng.normal(size=(num_experts, dim))[experts] + offset
    scatter = ExpertScatter(num_experts, dim, num_pools)
    for part in (slice(0, cut), slice(cut, None)):
        scatter.add(torch.from_numpy(x[part]), torch.from_numpy(experts[part]))
    found = scatter.collapse()
    assert found is not None
    within, between, with_inverse = reference(x, experts, num_experts, num_pools)
    assert found.within == pytest.approx(within, rel=1e-8, abs=1e-8)
    assert found.between == pytest.approx(between, rel=1e-8, abs=1e-8)
    if found.ratio is not None:
        assert found.ratio == pytest.approx(within / between, rel=1e-7)
        assert found.with_inverse == pytest.approx(with_inverse, rel=1e-4)


def test_heads_with_experts_of_their_own_are_compared_within_each_head() -> None:
    """The heads are far apart, the two experts of each are not."""
    x = torch.tensor([[0.0], [2.0], [100.0], [102.0]])
    experts = torch.tensor([0, 1, 2, 3])
    together, apart = ExpertScatter(4, 1), ExpertScatter(4, 1, num_pools=2)
    for scatter in (together, apart):
        scatter.add(x, experts)
    found, found_apart = together.collapse(), apart.collapse()
    assert found is not None
    assert found_apart is not None
    assert found.between == pytest.approx(2501)
    assert found_apart.between == pytest.approx(1)
