"""Look before training: sizes and costs on the meta device, and whether the data fit."""

from __future__ import annotations

from pathlib import Path

import torch

from mhmoe_vl.distributed.expert_parallel import require_divisor
from mhmoe_vl.distributed.manifest import committed
from mhmoe_vl.distributed.world import launched_world_size
from mhmoe_vl.train.build import build_dataset, build_plan, build_task, initial_weights
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.cost import encoder_cost_of
from mhmoe_vl.train.layout import describe_layout
from mhmoe_vl.train.run_directory import CHECKPOINTS


def dry_run(config: RunConfig) -> str:
    """A few lines about model, cost and data; reads one sample of every source.

    Raises:
        UserError: whatever would stop the real run.
    """
    with torch.device("meta"):
        task = build_task(config)
    cost = encoder_cost_of(config)
    lines = [
        f"task {config.task.kind}, ffn {config.model.ffn}",
        f"parameters {sum(p.numel() for p in task.parameters()):,} (encoder {cost.num_params:,}, "
        f"active per token {cost.num_active_params:,})",
        f"forward FLOPs per token {cost.flops_per_token:,} for {cost.num_image_tokens} image and "
        f"{cost.num_text_tokens} text tokens; {cost.num_assignments_per_token} assignments per token",
    ]
    if config.model.ffn != "dense":
        shape = config.model.ffn_shape
        lines.append(
            f"sparse layers: {shape.num_experts} experts of width {shape.ffn_dim}, top-{shape.top_k}, "
            f"{shape.num_heads} heads; against the reference SMoE FLOPs {shape.flops_mismatch:+.2%}, parameters "
            f"{shape.params_mismatch:+.2%}"
        )
    world_size = launched_world_size()
    if world_size == 1:
        # Looked at without torchrun: the smallest number of processes that can run it.
        world_size = config.expert_parallel
    require_divisor(config.expert_parallel, "processes", world_size)
    lines.append(describe_layout(config, world_size))
    saved = committed(Path(config.out) / CHECKPOINTS)
    if saved:
        lines.append(f"resumes {config.out} from {saved[-1].name}")
    elif config.init_from is not None:
        num_taken = len(initial_weights(task, config.init_from))
        lines.append(f"starts from {config.init_from}: {num_taken} of {len(task.state_dict())} tensors")
    for split, sources in (("train", config.data.train), ("validation", config.data.validation)):
        dataset = build_dataset(config, sources, training=split == "train")
        plan = build_plan(config, dataset) if split == "train" else None
        for name, size in dataset.num_items().items():
            dataset.batch(name, [])  # decodes one sample
            share = "" if plan is None else f", {plan.share(name):.1%} of each step"
            lines.append(f"{split}.{name}: " + ("streamed" if size is None else f"{size:,} items") + share)
    return "\n".join(lines) + "\n"
