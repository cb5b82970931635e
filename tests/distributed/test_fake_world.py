"""Shards of a world that does not exist against those of one that does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mhmoe_vl.distributed.fake_world import fake_world, local_sizes
from mhmoe_vl.distributed.parallel import parallelize
from mhmoe_vl.distributed.world import World
from mhmoe_vl.models.encoder import MultiwayEncoder
from tests.distributed.fork_harness import run_ranks
from tests.unit.models.builders import make_config


def real_sizes(world: World) -> dict[str, int]:
    encoder = MultiwayEncoder(make_config("mhmoe"))
    module = parallelize(encoder, strategy="fsdp", world=world, shard_units=encoder.shard_units())
    return {n: p.to_local().numel() for n, p in module.named_parameters() if isinstance(p, DTensor)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_rank_0_keeps_what_it_really_keeps(world_size: int) -> None:
    with torch.device("meta"):
        encoder = MultiwayEncoder(make_config("mhmoe"))
    sizes = local_sizes(encoder, strategy="fsdp", world_size=world_size, shard_units=encoder.shard_units())
    assert sizes == run_ranks(real_sizes, world_size)[0]


def test_a_thousand_ranks_and_none_afterwards() -> None:
    """A first dimension of 4 experts cannot be cut into a thousand parts: rank 0 keeps one whole expert."""
    with torch.device("meta"):
        encoder = MultiwayEncoder(make_config("mhmoe"))
    sizes = local_sizes(encoder, strategy="fsdp", world_size=1000, shard_units=encoder.shard_units())
    # Four sub-tokens of 4 values, experts 24 wide.
    assert sizes["blocks.1.ffn.pools.vision.moe.experts.w1_EDF"] == 4 * 24
    assert sizes["blocks.1.ffn.pools.vision.head.weight"] == 16
    assert not dist.is_initialized()


def fail_inside() -> None:
    with fake_world(4) as world:
        assert (world.rank, world.world_size, dist.get_world_size()) == (0, 4, 4)
        raise RuntimeError("inside")


def test_the_world_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert not dist.is_initialized()


def place_of_a_result(world: World) -> tuple[int, ...]:
    """Where in its mesh a rank believes itself after an operation, which takes its result's mesh from a memory."""
    weights = parallelize(nn.Linear(4, 4), strategy="fsdp", world=world).weight
    return tuple(weights.detach().device_mesh.get_coordinate())


def test_ranks_of_a_real_world_afterwards_know_their_places() -> None:
    """Processes forked from this one inherit what it remembers; so would a script that plans and then trains."""
    with fake_world(2, device="cpu") as world:
        assert place_of_a_result(world) == (0,)
    assert run_ranks(place_of_a_result, 2) == [(0,), (1,)]
