"""Scores on held-out data while training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from mhmoe_vl.data.loader import ShardDataset, evaluation_loader
from mhmoe_vl.distributed.collectives import any_rank
from mhmoe_vl.distributed.parallel import unwrap
from mhmoe_vl.distributed.world import World
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.precision import autocast_for
from mhmoe_vl.train.step import Figures

#: Figures that are a mean negative log-likelihood per predicted token, so that exp() of them is a perplexity.
_LIKELIHOODS = ("mim", "mlm", "pair_mim", "pair_mlm", "captioning")


@torch.no_grad()
def validate(
    config: RunConfig, module: nn.Module, held_out: ShardDataset, world: World, *, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Mean loss, accuracy and perplexity of every objective over every held-out sample. Collective.

    Masks are the same at every call and for every number of ranks; samples are counted once.

    Args:
        should_stop: asked before every batch.

    Returns:
        None, on all ranks, once any of them should stop.
    """
    module.eval()
    task = unwrap(module)
    assert isinstance(task, Task)
    figures = Figures()
    for source in held_out.sources:
        loader = evaluation_loader(
            held_out,
            source,
            batch_size=config.data.validation_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            num_workers=config.data.num_workers,
        )
        for micro_batch in loader:
            if any_rank(should_stop()):
                return None
            batches = {name: batch.to(world.device) for name, batch in micro_batch.items()}
            # Losses are read as sum and count, so the totals that scale the gradient do not matter here.
            ones = dict.fromkeys(task.num_targets([batches]), 1.0)
            with autocast_for(config.precision, world.device):
                figures.add(module(batches, ones))
    figures.shares.clear()
    scores = figures.reduced()
    return scores | {f"{n}_perplexity": math.exp(min(scores[n], 80.0)) for n in _LIKELIHOODS if n in scores}
