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

#: Figures that are a mean negative log-likelihood, so that exp() of them is a perplexity; under which name.
_PERPLEXITIES = {name: f"{name}_perplexity" for name in ("mim", "mlm", "pair_mim", "pair_mlm", "captioning", "lm")} | {
    "lm_per_byte": "lm_byte_perplexity",
    "lm_per_character": "lm_character_perplexity",
}


@torch.no_grad()
def validate(
    config: RunConfig, module: nn.Module, held_out: ShardDataset, world: World, *, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Mean loss, accuracy and perplexity of every objective over every held-out sample. Collective.

    With several sources, the figures of each are there too, as ``source/figure``. Language modeling has perplexities
    per token, and per byte and per character of the text (and bits per byte): those of different tokenizers or
    languages can only be compared in the latter.

    Masks are the same at every call and for every number of ranks; samples are counted once.

    Args:
        should_stop: asked before every batch.

    Returns:
        None, on all ranks, once any of them should stop.
    """
    module.eval()
    task = unwrap(module)
    assert isinstance(task, Task)
    by_source: dict[str, Figures] = {}
    for source in held_out.sources:
        figures = by_source[source] = Figures()
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
    together = Figures()
    for figures in by_source.values():
        figures.shares.clear()
        together.merge(figures)
    scores = _with_perplexities(together.reduced())
    if len(by_source) > 1:
        for source, figures in by_source.items():
            scores |= {f"{source}/{name}": score for name, score in _with_perplexities(figures.reduced()).items()}
    return scores


def _with_perplexities(scores: dict[str, float]) -> dict[str, float]:
    scores = scores | {
        perplexity: math.exp(min(scores[name], 80.0)) for name, perplexity in _PERPLEXITIES.items() if name in scores
    }
    if "lm_per_byte" in scores:
        scores["lm_bits_per_byte"] = scores["lm_per_byte"] / math.log(2)
    return scores
