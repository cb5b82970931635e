"""Rank 0 of a world whose other ranks do not exist: a layout for a thousand GPUs is checked on a laptop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from mhmoe_vl.distributed.parallel import Strategy, parallelize
from mhmoe_vl.distributed.world import World


@contextmanager
def fake_world(world_size: int, *, device: str = "meta") -> Iterator[World]:
    """Rank 0 of ``world_size``, its tensors on ``device``. Collectives return at once and their results mean nothing.

    Not inside a real process group. DTensor operations of this process are forgotten afterwards.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield World(rank=0, world_size=world_size, local_rank=0, device=torch.device(device))
    finally:
        dist.destroy_process_group()
        # DTensor remembers the meshes of its results, and takes one of equal shape for the same: rank 1 of a real world
        # of this size would believe itself at rank 0's place, and write its shards over those of rank 0.
        _clear_sharding_prop_cache()


def local_sizes(
    module: nn.Module,
    *,
    strategy: Strategy,
    world_size: int,
    shard_units: Sequence[nn.Module],
    expert_parallel: int = 1,
) -> dict[str, int]:
    """Values of every parameter that rank 0 keeps, by name, once :func:`parallelize` is done with ``module``.

    Args:
        module: on the meta device; is changed in place.
        strategy, shard_units, expert_parallel: as for :func:`parallelize`.

    Raises:
        ConfigError: as :func:`parallelize`.
    """
    with fake_world(world_size) as world:
        if strategy == "fsdp":
            module = parallelize(
                module, strategy=strategy, world=world, shard_units=shard_units, expert_parallel=expert_parallel
            )
        return {
            name: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
            for name, parameter in module.named_parameters()
        }
