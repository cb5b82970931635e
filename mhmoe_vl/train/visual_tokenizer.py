"""Writing the visual tokenizer that a run has trained.

Shape suffixes: N patches, K codes, M values of a patch.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhmoe_vl.data.files import write_atomically
from mhmoe_vl.data.loader import ShardDataset, train_loader
from mhmoe_vl.data.plan import MixturePlan
from mhmoe_vl.distributed.collectives import all_reduce_sum, fail_together
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import CheckpointError, OutputError
from mhmoe_vl.models.embeddings import normalize_pixels
from mhmoe_vl.models.visual_codebook import to_patches
from mhmoe_vl.models.visual_tokenizer import VisualTokenizer, build_visual_tokenizer
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.config import RunConfig

logger = logging.getLogger(__name__)

#: Patches per code, on average, whose mean is the picture of a code.
_PATCHES_PER_CODE = 64


def export_visual_tokenizer(
    config: RunConfig, origin: dict[str, Any], dataset: ShardDataset, plan: MixturePlan, world: World
) -> None:
    """Make ``visual_tokenizer.safetensors`` of the final weights in the run directory. Collective.

    Args:
        origin: what the file says about its making.

    Raises:
        CheckpointError: the weights cannot be read, on this rank or another.
        OutputError: on every rank, if the file cannot be written.
    """
    directory = Path(config.out)
    path = directory / run_directory.VISUAL_TOKENIZER
    with fail_together(CheckpointError):
        # Whole, whatever strategy trained them, so that no module needs to be gathered, and without the teacher.
        weights = load_weights(directory / run_directory.WEIGHTS)
        tensors = {name: tensor for name, tensor in weights.items() if name.startswith(("encoder.", "code_head."))}
        tensors["codes_KC"] = codes_KC = weights["codebook.codes_KC"]
        tensors["mean_patches_KM"] = torch.zeros(len(codes_KC), 3 * config.model.patch_size**2)
        tokenizer = build_visual_tokenizer(config.model, tensors, origin).to(world.device)
    tokenizer.mean_patches_KM.copy_(_mean_patches(config, tokenizer, dataset, plan, world))
    with fail_together(OutputError, f"{path}: cannot write the visual tokenizer"):
        if world.is_main:
            write_atomically(path, tokenizer.serialized())
            logger.info("visual tokenizer: %s", path)


def _mean_patches(
    config: RunConfig, tokenizer: VisualTokenizer, dataset: ShardDataset, plan: MixturePlan, world: World
) -> Tensor:
    """The mean of each code's patches in the samples of the first steps, float32 in [-1, 1]; of a code without patches,
    the mean of all. Collective."""
    totals_KM = torch.zeros(tokenizer.num_codes, 3 * tokenizer.patch_size**2 + 1, dtype=torch.float64)
    loader = train_loader(
        dataset,
        plan,
        steps=range(_num_steps(config, plan, tokenizer.num_codes)),
        num_micro_batches=config.num_micro_batches,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=config.data.num_workers,
        pin_memory=False,
    )
    for micro_batch in loader:
        for batch in micro_batch.values():
            assert batch.image is not None
            codes_N = tokenizer.encode(batch.image.to(world.device)).flatten().cpu()
            pixels_NM = to_patches(normalize_pixels(batch.image), tokenizer.patch_size).flatten(0, 1).double()
            totals_KM.index_add_(0, codes_N, torch.cat([pixels_NM, torch.ones_like(pixels_NM[:, :1])], dim=1))
    totals_KM = all_reduce_sum(totals_KM)
    sums_KM, counts_K1 = totals_KM[:, :-1], totals_KM[:, -1:]
    mean_of_all_M = sums_KM.sum(0) / counts_K1.sum()
    return torch.where(counts_K1 > 0, sums_KM / counts_K1.clamp_min(1), mean_of_all_M).float()


def _num_steps(config: RunConfig, plan: MixturePlan, num_codes: int) -> int:
    """Enough for the pictures, and at most one epoch."""
    wanted = _PATCHES_PER_CODE * num_codes
    sizes = list(plan.num_items.values())
    if None not in sizes:
        wanted = min(wanted, sum(size or 0 for size in sizes) * config.model.num_patches)
    return max(1, wanted // (config.data.batch_size * config.model.num_patches))
