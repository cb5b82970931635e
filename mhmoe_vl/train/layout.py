"""How a run is spread over processes."""

from __future__ import annotations

from mhmoe_vl.distributed.parallel import Strategy
from mhmoe_vl.train.config import RunConfig


def strategy_of(config: RunConfig, world_size: int) -> Strategy:
    """What ``strategy: auto`` stands for: ``ddp`` with several processes, ``fsdp`` where experts are spread."""
    if config.strategy != "auto":
        return config.strategy
    if config.expert_parallel > 1:
        return "fsdp"
    return "ddp" if world_size > 1 else "none"


def describe_layout(config: RunConfig, world_size: int) -> str:
    """One line for people."""
    line = f"layout: {world_size} process{'es' if world_size > 1 else ''}, strategy {strategy_of(config, world_size)}"
    if config.expert_parallel > 1:
        degree, num_experts = config.expert_parallel, config.model.ffn_shape.num_experts
        what = f"{num_experts} experts"
        if config.model.ffn == "mhmoe_head_parallel":
            what = f"{config.model.moe.num_heads} heads with their {what}"
        line += f", the {what} of each pool spread over {degree} ({num_experts // degree} experts on each)"
        if world_size > degree:
            line += f" and sharded once more over {world_size // degree}"
    return line
