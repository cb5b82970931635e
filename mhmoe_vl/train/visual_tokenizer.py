"""Writing the visual tokenizer that a run has trained.

Shape suffixes: N patches, K codes, M values of a patch.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from mhmoe_vl.data.files import write_atomically
from mhmoe_vl.data.loader import ShardDataset, train_loader
from mhmoe_vl.data.plan import MixturePlan
from mhmoe_vl.distributed.collectives import all_reduce_sum, fail_together
from mhmoe_vl.distributed.parallel import unwrap
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import OutputError
from mhmoe_vl.models.embeddings import normalize_pixels
from mhmoe_vl.models.visual_codebook import to_patches
from mhmoe_vl.models.visual_tokenizer import build_visual_tokenizer
from mhmoe_vl.tasks.visual_tokenizer import VisualTokenizerTask
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.precision import autocast_for

logger = logging.getLogger(__name__)

#: Patches per code, on average, whose mean is the picture of a code.
_PATCHES_PER_CODE = 64


def export_visual_tokenizer(
    config: RunConfig, module: nn.Module, dataset: ShardDataset, plan: MixturePlan, world: World
) -> None:
    """Write ``visual_tokenizer.safetensors`` into the run directory, beside the weights that are there. Collective.

    Raises:
        OutputError: on every rank, if the file cannot be written.
    """
    task = unwrap(module)
    assert isinstance(task, VisualTokenizerTask)
    directory = Path(config.out)
    path = directory / run_directory.VISUAL_TOKENIZER
    mean_patches_KM = _mean_patches(config, module, task, dataset, plan, world)
    with fail_together(OutputError, f"{path}: cannot write the visual tokenizer"):
        if world.is_main:
            # Whole, whatever strategy trained them.
            weights = load_weights(directory / run_directory.WEIGHTS)
            tensors = {name: tensor for name, tensor in weights.items() if name.startswith(("encoder.", "code_head."))}
            tensors |= {"codes_KC": weights["codebook.codes_KC"], "mean_patches_KM": mean_patches_KM}
            write_atomically(path, build_visual_tokenizer(config.model, tensors, task.origin()).serialized())
            logger.info("visual tokenizer: %s", path)


@torch.no_grad()
def _mean_patches(
    config: RunConfig,
    module: nn.Module,
    task: VisualTokenizerTask,
    dataset: ShardDataset,
    plan: MixturePlan,
    world: World,
) -> Tensor:
    """The mean of each code's patches in the samples of the first steps, float32 in [-1, 1]; of a code without patches,
    the mean of all. Collective."""
    num_codes, num_values = task.codebook.num_codes, 3 * config.model.patch_size**2
    totals_KM = torch.zeros(num_codes, num_values + 1, dtype=torch.float64)
    loader = train_loader(
        dataset,
        plan,
        steps=range(_num_steps(config, plan, num_codes)),
        num_micro_batches=config.num_micro_batches,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=config.data.num_workers,
        pin_memory=False,
    )
    module.eval()
    for micro_batch in loader:
        batches = {name: batch.to(world.device) for name, batch in micro_batch.items()}
        with autocast_for(config.precision, world.device):
            output = module(batches, {"patches": 1.0})
        for name, patches in output.patches.items():
            image = micro_batch[name].image
            assert image is not None
            pixels_NM = to_patches(normalize_pixels(image), config.model.patch_size).flatten(0, 1).double()
            counted_NM = torch.cat([pixels_NM, pixels_NM.new_ones(len(pixels_NM), 1)], dim=1)
            totals_KM.index_add_(0, patches.codes_N.cpu(), counted_NM)
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
