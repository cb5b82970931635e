"""The moving average of weights: its definition, and that it is laid out, used and saved as the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from mhmoe_vl.distributed.average import WeightAverage
from mhmoe_vl.distributed.checkpoint import load_checkpoint, load_checkpoint_weights, save_checkpoint
from mhmoe_vl.distributed.parallel import Strategy, accumulating, parallelize, unwrap
from mhmoe_vl.distributed.weights import export_weights, load_weights
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import CheckpointError
from tests.distributed.fork_harness import run_ranks
from tests.distributed.sparse import Case, Stack
from tests.distributed.toy import make_optimizer, make_rows, make_toy

ONE_PROCESS = World(0, 1, 0, torch.device("cpu"))
DECAY = 0.8


class Run:
    """A toy in training, with an average of its weights."""

    def __init__(self, world: World, strategy: Strategy, seed: int = 0) -> None:
        toy = make_toy(seed)
        toy.image_scale.requires_grad_(False)
        self.world = world
        self.module = parallelize(toy, strategy=strategy, world=world, shard_units=[*toy.blocks])
        self.optimizer = make_optimizer(self.module)
        self.average = WeightAverage(self.module, DECAY)

    def train(self, steps: range) -> None:
        for step in steps:
            # All ranks together have the same five rows, whatever their number.
            rows = make_rows(step, 5)[self.world.rank :: self.world.world_size]
            with accumulating(self.module, is_last=True):
                self.module({"image": rows, "text": rows, "pair": rows}).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update()

    def loss(self) -> Tensor:
        with torch.no_grad():
            return self.module({"text": make_rows(99, 2)}).clone()

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in unwrap(self.module).state_dict().items()}

    @property
    def averages(self) -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in self.average.tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def unbroken() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Averages by hand, and weights, of four steps on one process."""
    run = Run(ONE_PROCESS, "none")
    of_steps = [run.weights]
    for step in range(4):
        run.train(range(step, step + 1))
        of_steps.append(run.weights)
    # 0.8^4 of the first, and 0.2 * 0.8^age of every later one.
    factors = [DECAY**4, *((1 - DECAY) * DECAY ** (4 - step) for step in range(1, 5))]
    names = [name for name in of_steps[0] if name not in ("head.weight", "image_scale") and "shift" not in name]
    return {n: sum(f * w[n] for f, w in zip(factors, of_steps, strict=True)) for n in names}, of_steps[-1]


@pytest.mark.parametrize(("strategy", "world_size"), [("none", 1), ("ddp", 2), ("fsdp", 2)])
def test_the_average_by_hand_on_any_number_of_ranks(strategy: Strategy, world_size: int) -> None:
    """A tied weight is averaged once, a frozen one and buffers never."""
    expected, weights = unbroken()
    assert not torch.allclose(expected["embedding.weight"], weights["embedding.weight"], atol=1e-4)

    def check(world: World) -> None:
        run = Run(world, strategy)
        run.train(range(4))
        found = run.averages
        assert found.keys() == expected.keys()
        for name, average in expected.items():
            assert_close(found[name], average, atol=1e-12, rtol=0, msg=name)
        if strategy == "fsdp":
            sharded = [t for t in run.average.tensors.values() if isinstance(t, DTensor)]
            assert len(sharded) == len(expected)
            assert sum(t.to_local().numel() for t in sharded) < sum(t.numel() for t in sharded)

    check(ONE_PROCESS) if world_size == 1 else run_ranks(check, world_size)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_average_is_used_and_put_back_bit_for_bit(tmp_path: Path, strategy: Strategy) -> None:
    def check(world: World) -> None:
        run, same = (Run(world, strategy) for _ in range(2))
        for each in (run, same):
            each.train(range(2))
        weights, averages, loss = run.weights, run.averages, run.loss()
        plain = make_toy()
        plain.load_state_dict(weights | averages | {"head.weight": averages["embedding.weight"]})
        with run.average.in_use():
            assert_close(run.loss(), plain({"text": make_rows(99, 2)}).detach(), atol=1e-12, rtol=0)
            assert not torch.allclose(run.loss(), loss)
            export_weights(tmp_path / "average.safetensors", run.module, world=world)
        exported = load_weights(tmp_path / "average.safetensors")
        assert_equal({name: exported[name] for name in averages}, averages)
        assert torch.equal(run.loss(), loss)
        assert_equal(run.averages, averages)
        # And training goes on as if nobody had looked.
        for each in (run, same):
            each.train(range(2, 3))
        assert_equal(run.weights, same.weights)
        assert_equal(run.averages, same.averages)

    run_ranks(check, 2)


def save(run: Run, root: Path) -> Path:
    return save_checkpoint(
        root, 2, module=run.module, optimizer=run.optimizer, progress={}, world=run.world, keep=1, average=run.average
    )


def load(run: Run, path: Path) -> None:
    load_checkpoint(path, module=run.module, optimizer=run.optimizer, world=run.world, average=run.average)


def test_four_steps_are_two_and_two_bit_for_bit_and_any_layout_loads_any_other(tmp_path: Path) -> None:
    def resume_on_two(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        unbroken, first, second = (Run(world, "fsdp", seed) for seed in (0, 0, 7))
        unbroken.train(range(4))
        first.train(range(2))
        load(second, save(first, tmp_path / "of_two"))
        assert_equal(second.averages, first.averages)
        second.train(range(2, 4))
        assert_equal(second.weights, unbroken.weights)
        assert_equal(second.averages, unbroken.averages)
        return first.weights, first.averages

    weights, averages = run_ranks(resume_on_two, 2)[0]
    alone = Run(ONE_PROCESS, "none", seed=7)
    load(alone, tmp_path / "of_two" / "step_0000002")
    assert_equal(alone.averages, averages)
    # What looks at checkpoints sees the weights as they were trained.
    looked_at = make_toy(5)
    load_checkpoint_weights(tmp_path / "of_two" / "step_0000002", looked_at)
    assert_equal(dict(looked_at.state_dict()), weights)
    path = save(alone, tmp_path / "of_one")

    def load_on_two(world: World) -> None:
        run = Run(world, "ddp", seed=7)
        load(run, path)
        assert_equal(run.averages, averages)

    run_ranks(load_on_two, 2)


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    run = Run(ONE_PROCESS, "none")
    run.train(range(1))
    arguments: dict[str, Any] = {"module": run.module, "optimizer": run.optimizer, "world": ONE_PROCESS}
    path = save_checkpoint(tmp_path, 1, progress={}, keep=1, **arguments)
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors: average\.blocks.*configuration that it was saved"):
        load_checkpoint(path, average=run.average, **arguments)


def test_experts_that_are_spread_over_ranks_are_averaged_where_they_are() -> None:
    def check(world: World) -> None:
        stack = Stack(Case([3, 3]))
        parallelize(stack, strategy="fsdp", world=world, shard_units=[*stack.layers], expert_parallel=2)
        before = {name: whole(tensor) for name, tensor in stack.state_dict().items()}
        average = WeightAverage(stack, DECAY)
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter.mul_(3.0)
        average.update()
        assert any(".experts." in name for name in average.tensors)
        with average.in_use():
            used = {name: whole(tensor) for name, tensor in stack.state_dict().items()}
        for name, tensor in average.tensors.items():
            assert_close(whole(tensor), before[name] * (0.8 + 0.2 * 3), atol=1e-12, rtol=0)
            assert torch.equal(used[name], whole(tensor))
        named = dict(nn.Module.named_parameters(stack))
        assert all(tensor.to_local().shape == named[n].to_local().shape for n, tensor in average.tensors.items())

    run_ranks(check, 2)
