"""What a plan says about FSDP2's traffic, against the collectives of a real forward and backward pass."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from mhmoe_vl.distributed.fake_world import fake_world
from mhmoe_vl.distributed.parallel import parallelize
from mhmoe_vl.plan.layout import Layout, layout_of, really_shard, shards_of
from mhmoe_vl.plan.timing import communication_of
from mhmoe_vl.plan.workload import build_task_without_files, synthetic_batch
from tests.unit.plan.builders import make_device, make_run


class Collectives(TorchDispatchMode):
    """Bytes of the whole side of every gather and reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather_base" in str(func):
            self.gathered += args[0].nbytes
        if "reduce_scatter_base" in str(func):
            self.reduced += args[1].nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_source_gathers_and_reduces_every_block(
    world_size: int, num_micro_batches: int, checkpointed: bool
) -> None:
    """Real tensors, and ranks that do not exist; four experts on three ranks are padded."""
    config = make_run(
        model={"ffn": "mhmoe", "checkpoint_activations": checkpointed},
        num_micro_batches=num_micro_batches,
        strategy="fsdp",
    )
    task = build_task_without_files(config, device="cpu")
    layout = layout_of(config, world_size)
    planned = communication_of(
        shards_of(task, layout), layout, make_device(), num_passes=3, all_to_all=0, checkpointed=checkpointed
    )
    with fake_world(world_size, device="cpu") as world:
        module = parallelize(task, strategy="fsdp", world=world, shard_units=task.encoder.shard_units())
        micro_batch = {source: synthetic_batch(config, source, 2) for source in config.data.train}
        totals = task.num_targets([micro_batch])
        with Collectives() as seen:
            for _ in range(num_micro_batches):
                module(micro_batch, totals, num_micro_batches).loss.backward()
    sent = (world_size - 1) / world_size
    assert planned.gather_bytes == pytest.approx(sent * seen.gathered, abs=1)
    assert planned.reduce_bytes == pytest.approx(sent * seen.reduced, abs=1)


@pytest.mark.parametrize("ffn", ["dense", "smoe", "mhmoe"])
@pytest.mark.parametrize("world_size", [2, 3, 64])
def test_the_formula_agrees_with_torch(ffn: str, world_size: int) -> None:
    config = make_run(model={"ffn": ffn}, strategy="fsdp", data={"batch_size": 300})
    layout = Layout(world_size, "fsdp", 1, 1)
    assert (
        really_shard(build_task_without_files(config), layout)
        == shards_of(build_task_without_files(config), layout).local
    )
