"""Experts spread over ranks against one process that has the tokens of all: every output and every gradient."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.fork_harness import run_ranks
from tests.distributed.sparse import Case, Outcome, assert_same, on_one_process, on_ranks
from tests.unit.moe.conftest import mended_interpreter  # noqa: F401

CASES: dict[str, Case] = {
    "uneven tokens": Case([5, 2, 7, 1]),
    "whole tokens": Case([5, 2, 7, 1], num_heads=None),
    "x-moe": Case([3, 4, 5, 6], num_heads=None, options={"router": "cosine", "num_experts": 8}),
    "fine-grained": Case([3, 4, 5, 6], num_heads=None, options={"num_experts": 8, "top_k": 3, "ffn_dim": 3}),
    "k = 2 with everything": Case(
        [5, 2, 7, 1],
        options={"top_k": 2, "glu": True, "router": "cosine", "renormalize": True, "inner_residual": True},
        valid=0.6,
    ),
    "no biases": Case([2, 3, 4, 5], options={"bias": False, "top_k": 2, "gate": "sigmoid"}),
    "all sub-tokens on the first expert": Case([5, 2, 7, 1], favoured=0),
    "all sub-tokens on the last expert": Case([5, 2, 7, 1], favoured=3, options={"top_k": 2}),
    "only the last rank has tokens": Case([0, 0, 0, 9], options={"top_k": 2}),
    "fewer tokens than experts": Case([0, 1, 0, 0], num_heads=None, options={"num_experts": 8}),
    "no tokens at all": Case([0, 0, 0, 0]),
    "padding": Case([5, 2, 7, 1], valid=0.5, options={"top_k": 2}),
    "nothing but padding": Case([5, 2, 7, 1], valid=0.0),
    "experts that dp does not divide": Case([5, 2, 7, 1], options={"num_experts": 12, "top_k": 2}),
    "one expert per rank": Case([5, 2, 7, 1], num_heads=4),
    "loop": Case([5, 2, 7, 1], options={"backend": "loop", "top_k": 2}, valid=0.7),
}
# Backends that have no float64.
FLOAT32_CASES = {
    "grouped_mm": Case(
        [5, 2, 7, 1], options={"backend": "grouped_mm", "ffn_dim": 8, "top_k": 2}, num_heads=1, valid=0.7
    ),
    "fused": Case([2, 0, 3, 1], options={"backend": "fused", "top_k": 2}, valid=0.7),
}
LAYOUTS = [(2, 2), (4, 2), (4, 4)]


def outcomes(cases: list[Case], world_size: int, degree: int) -> list[list[Outcome]]:
    """For each case the outcomes of all ranks."""
    of_ranks = run_ranks(lambda world: [on_ranks(case, world, degree) for case in cases], world_size)
    return [list(of_case) for of_case in zip(*of_ranks, strict=True)]


def on(case: Case, num_ranks: int) -> Case:
    """The same tokens on fewer ranks."""
    width = len(case.tokens) // num_ranks
    return replace(case, tokens=[sum(case.tokens[i * width : (i + 1) * width]) for i in range(num_ranks)])


@pytest.mark.parametrize(("world_size", "degree"), LAYOUTS)
def test_outputs_losses_and_gradients_equal_one_process(world_size: int, degree: int) -> None:
    cases = [on(case, world_size) for case in CASES.values()]
    for case, found in zip(cases, outcomes(cases, world_size, degree), strict=True):
        assert_same(found, on_one_process(case), case, 1e-12)


@pytest.mark.usefixtures("mended_interpreter")
def test_float32_and_its_backends() -> None:
    cases = [replace(case, dtype=torch.float32) for case in (CASES | FLOAT32_CASES).values()]
    for case, found in zip(cases, outcomes(cases, 4, 2), strict=True):
        assert_same(found, on_one_process(case), case, 1e-5)


def random_case(rng: random.Random, world_size: int, degree: int) -> Case:
    num_heads = rng.choice([None, 1, 2, 4])
    num_experts = degree * rng.randint(1, 4)
    options: dict[str, Any] = {
        "num_experts": num_experts,
        "top_k": rng.randint(1, min(3, num_experts)),
        "ffn_dim": rng.randint(1, 6),
        "router": rng.choice(["linear", "cosine"]) if num_heads != 4 else "linear",
        "gate": rng.choice(["softmax", "sigmoid"]),
        "renormalize": rng.random() < 0.5,
        "inner_residual": rng.random() < 0.3,
        "glu": rng.random() < 0.5,
        "bias": rng.random() < 0.5,
        "backend": rng.choice(["auto", "loop"]),
    }
    return Case(
        tokens=[rng.choice([0, 0, 1, 2, rng.randint(3, 12)]) for _ in range(world_size)],
        num_heads=num_heads,
        options=options,
        valid=rng.choice([None, 0.0, 0.3, 0.8]),
        favoured=rng.choice([None, None, rng.randrange(num_experts)]),
        seed=rng.randrange(2**16),
    )


@pytest.mark.parametrize(("world_size", "degree"), LAYOUTS)
def test_random_layers_loads_and_masks(world_size: int, degree: int) -> None:
    rng = random.Random(world_size * 10 + degree)
    cases = [random_case(rng, world_size, degree) for _ in range(20)]
    for case, found in zip(cases, outcomes(cases, world_size, degree), strict=True):
        assert_same(found, on_one_process(case), case, 1e-11)
