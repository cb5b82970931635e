"""Gradients and clipping of every strategy against one process, parameter by parameter, in float64.

Loss curves cannot see most gradient bugs (a factor is invisible under AdamW), hence no test here looks at a loss.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mhmoe_vl.distributed.parallel import Strategy, accumulating, clip_grad_norm, parallelize, unwrap
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import ConfigError
from tests.distributed.fork_harness import run_ranks
from tests.distributed.toy import Batch, Toy, make_rows, make_toy

ONE_PROCESS = World(0, 1, 0, torch.device("cpu"))
# scenario -> (rank, world_size) -> row counts by kind, one mapping per micro-batch
SCENARIOS: dict[str, Callable[[int, int], list[dict[str, int]]]] = {
    "uneven batches": lambda rank, _: [{"image": 1 + rank, "text": 3 - rank % 3, "pair": 2 * rank}],
    "only the last rank has rows": lambda rank, world_size: [
        dict.fromkeys(("image", "text", "pair"), 3 if rank == world_size - 1 else 0)
    ],
    "no rank has images": lambda rank, _: [{"image": 0, "text": 2 + rank, "pair": 0}],
    "rank 0 alone uses a parameter of the root": lambda rank, _: [
        {"image": 2, "text": 1} if rank == 0 else {"text": 2, "pair": 1}
    ],
    "three micro-batches": lambda rank, _: [
        {"image": 1 + rank, "pair": 2},
        {"image": 0, "text": 3, "pair": 1},
        {"image": 2, "text": 1 + rank, "pair": 0},
    ],
    "last micro-batch without images": lambda rank, _: [{"image": 2, "text": 1}, {"text": 1 + rank}],
    "one kind three times": lambda rank, _: [{"pair": 1 + rank}, {"pair": 2}, {"pair": 1}],
}


def make_batches(scenario: str, rank: int, world_size: int) -> list[Batch]:
    return [
        {kind: make_rows(1000 * rank + 10 * index + len(kind), rows) for kind, rows in counts.items()}
        for index, counts in enumerate(SCENARIOS[scenario](rank, world_size))
    ]


def backward_all(module: nn.Module, batches: list[Batch]) -> None:
    for index, batch in enumerate(batches):
        with accumulating(module, is_last=index == len(batches) - 1):
            module(batch).backward()


def whole_gradients(module: nn.Module) -> dict[str, Tensor | None]:
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in unwrap(module).named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return gradients


def reference(scenario: str, world_size: int) -> Toy:
    """One process that sees the batches of all ranks."""
    module = make_toy()
    for rank in range(world_size):
        for batch in make_batches(scenario, rank, world_size):
            module(batch).backward()
    return module


def assert_same_gradients(actual: dict[str, Tensor | None], expected: nn.Module) -> None:
    for name, parameter in expected.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = torch.zeros_like(parameter) if actual[name] is None else actual[name]
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("strategy", "world_size", "recompute"),
    [("ddp", 2, True), ("ddp", 4, False), ("fsdp", 2, True), ("fsdp", 2, False), ("fsdp", 4, False)],
)
def test_gradients_of_every_parameter_equal_one_process(strategy: Strategy, recompute: bool, world_size: int) -> None:
    scenarios = set(SCENARIOS)
    if strategy == "fsdp" and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        # Older torch cannot; our tasks run every part on every rank in each micro-batch, so they do not need it.
        scenarios.remove("rank 0 alone uses a parameter of the root")

    def gradients(world: World) -> dict[str, dict[str, Tensor | None]]:
        found = {}
        for scenario in sorted(scenarios):
            # Each rank draws other weights: those of rank 0 must win.
            toy = make_toy(seed=world.rank, recompute=recompute)
            module = parallelize(toy, strategy=strategy, world=world, shard_units=[*toy.blocks])
            backward_all(module, make_batches(scenario, world.rank, world.world_size))
            found[scenario] = whole_gradients(module)
        return found

    for of_rank in run_ranks(gradients, world_size):
        for scenario in scenarios:
            assert_same_gradients(of_rank[scenario], reference(scenario, world_size))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_three_adamw_steps_equal_one_process(strategy: Strategy) -> None:
    scenario = "three micro-batches"

    def train(module: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW([p for n, p in module.named_parameters() if "never" not in n], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            backward_all(module, batches)
            clip_grad_norm(module, 1.0)
            optimizer.step()
        weights = unwrap(module).state_dict()
        return {k: w.full_tensor() if isinstance(w, DTensor) else w for k, w in weights.items()}

    def train_rank(world: World) -> dict[str, Tensor]:
        toy = make_toy()
        module = parallelize(toy, strategy=strategy, world=world, shard_units=[*toy.blocks])
        return train(module, make_batches(scenario, world.rank, world.world_size))

    expected = train(make_toy(), [b for rank in range(2) for b in make_batches(scenario, rank, 2)])
    for weights in run_ranks(train_rank, 2):
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("fraction", [0.5, 2.0])
def test_clipping_uses_the_global_norm(strategy: Strategy, fraction: float) -> None:
    scenario = "uneven batches"
    expected = reference(scenario, 3)
    max_norm = fraction * float(nn.utils.get_total_norm([p.grad for p in expected.parameters() if p.grad is not None]))

    def clip(world: World) -> tuple[Tensor, dict[str, Tensor | None]]:
        toy = make_toy()
        module = parallelize(toy, strategy=strategy, world=world, shard_units=[*toy.blocks])
        backward_all(module, make_batches(scenario, world.rank, world.world_size))
        return clip_grad_norm(module, max_norm), whole_gradients(module)

    norm = nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
    for found, gradients in run_ranks(clip, 3):
        torch.testing.assert_close(found, norm, rtol=1e-12, atol=0)
        assert_same_gradients(gradients, expected)


def test_clipping_mixes_sharded_and_plain_parameters() -> None:
    def clip(world: World) -> tuple[float, list[list[float]]]:
        sharded = parallelize(nn.Linear(1, 4, bias=False), strategy="fsdp", world=world)
        plain = nn.Parameter(torch.zeros(2))
        sharded(torch.ones(1, 1)).sum().backward()
        plain.grad = torch.tensor([3.0, 0.0])
        norm = clip_grad_norm([*sharded.parameters(), plain], 1.0)
        return float(norm), [whole_gradients(sharded)["weight"].flatten().tolist(), plain.grad.tolist()]

    # Each of two ranks adds 1 to each of four gradients: 4 * 2^2 + 3^2 = 25.
    for norm, gradients in run_ranks(clip, 2):
        assert norm == pytest.approx(5.0)
        assert gradients == [pytest.approx([0.4] * 4), pytest.approx([0.6, 0.0])]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_spoils_no_other(bad: float) -> None:
    def clip(world: World) -> tuple[bool, list[float]]:
        sharded = parallelize(nn.Linear(1, 4, bias=False), strategy="fsdp", world=world)
        rows = torch.full((1, 1), 1.0)
        sharded(rows).sum().backward()
        if world.rank == 1:
            sharded.weight.grad.to_local()[0] = bad
        norm = clip_grad_norm(sharded, 0.1)
        return bool(norm.isfinite()), whole_gradients(sharded)["weight"].flatten().tolist()

    for finite, gradients in run_ranks(clip, 2):
        assert not finite
        assert gradients == pytest.approx([2.0, 2.0, bad, 2.0], nan_ok=True)


def test_one_process_without_group_gets_its_module_back() -> None:
    for strategy in ("none", "ddp", "fsdp"):
        toy = make_toy()
        assert parallelize(toy, strategy=strategy, world=ONE_PROCESS, shard_units=[*toy.blocks]) is toy


def test_bad_strategies_are_refused() -> None:
    with pytest.raises(ConfigError, match="'none' needs one process, not 2"):
        parallelize(make_toy(), strategy="none", world=World(0, 2, 0, torch.device("cpu")))
    with pytest.raises(ConfigError, match="'zero' must be none, ddp or fsdp"):
        parallelize(make_toy(), strategy="zero", world=ONE_PROCESS)  # type: ignore[arg-type]
