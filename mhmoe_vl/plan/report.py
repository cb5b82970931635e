"""A plan in words."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from mhmoe_vl.plan.devices import Device
from mhmoe_vl.plan.memory import USABLE
from mhmoe_vl.plan.plan import Plan, gigabytes
from mhmoe_vl.tasks.pretrain import PretrainConfig
from mhmoe_vl.train.config import RunConfig


def describe(plan: Plan, config: RunConfig) -> str:
    """A page of text."""
    lines = [
        f"{config.task.kind}, ffn={config.model.ffn}: {plan.num_params / 1e6:,.1f}M parameters, "
        f"{plan.num_active_params / 1e6:,.1f}M of the encoder active per token",
        "",
        *_device(plan),
        "",
        *_sources(plan),
        *_targets(plan, config),
        "",
        *_memory(plan),
        "",
        *_experts(plan, config),
        *_time(plan),
        "",
        f"{config.max_steps:,} steps: {plan.hours:,.1f} hours, without validation, saving and waiting for data",
    ]
    return "\n".join(lines) + "\n"


def _device(plan: Plan) -> list[str]:
    device, layout = plan.device, plan.layout
    ceilings = ", ".join(f"{name} {flops / 1e12:,.3g} TFLOP/s" for name, flops in device.matmul_flops.items())
    reached = "" if device.reached == 1 else f"; {device.reached:.0%} of them assumed to be reached, not measured"
    return [
        f"{layout.world_size:,} x {device.name}, strategy {layout.strategy}, {layout.num_micro_batches} micro-batches, "
        f"{plan.dtype}, expert backend {plan.backend}",
        f"  ceilings ({device.source}): {ceilings}, {device.memory_bandwidth / 1e9:,.4g} GB/s{reached}",
    ]


def _sources(plan: Plan) -> list[str]:
    total = sum(source.samples_per_step for source in plan.sources.values())
    lines = ["per sample            tokens   forward   forward + backward    of a step  on busiest rank"]
    mean = 0.0
    for name, source in plan.sources.items():
        share = source.samples_per_step / total
        mean += share * source.cost.training_flops
        lines.append(
            f"  {name:<18} {source.sample.num_tokens:>7,} {source.cost.forward_flops / 1e9:>7,.1f} G "
            f"{source.cost.training_flops / 1e9:>16,.1f} GFLOP {share:>10.1%} {source.busiest_share:>16,}"
        )
    lines.append(f"  {'mixture':<18} {'':>7} {'':>9} {mean / 1e9:>16,.1f} GFLOP")
    if plan.busy_share < 0.95:
        lines.append(f"  samples do not divide: the mean rank works {plan.busy_share:.0%} of the time of the busiest")
    return lines


def _targets(plan: Plan, config: RunConfig) -> list[str]:
    largest = max(source.cost.target_flops for source in plan.sources.values())
    if not isinstance(config.task, PretrainConfig) or not largest:
        return []
    path = config.task.visual_codebook
    tokenizer = path if Path(path).is_file() else f"k-means patches, assumed because {path} does not exist"
    return [f"  of which {largest / 1e9:,.3g} GFLOP of each image are its targets: {tokenizer}"]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    lines = [f"memory per rank (at most {gigabytes(int(USABLE * plan.device.memory))} may be planned)"]
    lines += [f"  {name.replace('_', ' '):<16} {gigabytes(size):>14}" for name, size in asdict(memory).items() if size]
    lines.append(f"  {'total':<16} {gigabytes(memory.total):>14}")
    lines.append(
        "  activations "
        + ", ".join(f"{how} {gigabytes(size)}" for how, size in plan.activations.items())
        + " per micro-batch"
    )
    if plan.shards.padding > 1.05:
        lines += [
            f"  FSDP2 cuts parameters along their first dimension: {plan.layout.world_size:,} ranks pad what they",
            f"  gather {plan.shards.padding:.1f}-fold, most of all {plan.shards.most_padded}",
        ]
    return lines


def _experts(plan: Plan, config: RunConfig) -> list[str]:
    degree = plan.layout.expert_parallel
    if config.model.ffn == "dense":
        return []
    num_experts = config.model.ffn_shape.num_experts
    feasible = [d for d in range(1, num_experts + 1) if num_experts % d == 0 and plan.layout.world_size % d == 0]
    lines = [
        f"experts: {num_experts} per pool, {num_experts // degree} per rank at expert-parallel degree {degree}; "
        f"degrees that divide experts and ranks: {', '.join(f'{d} ({_place(d, plan.device)})' for d in feasible)}",
    ]
    return [*lines, ""]


def _place(degree: int, device: Device) -> str:
    if degree == 1:
        return "no exchange"
    return "in a node" if device.num_per_node % degree == 0 else "across nodes"


def _time(plan: Plan) -> list[str]:
    time, exchange = plan.time, plan.communication
    lines = [
        f"step {time.expected:,.4g} s: forward {time.forward:,.4g}, backward {time.backward:,.4g}, optimizer "
        f"{time.optimizer:,.4g}; {plan.flops_utilization:.1%} of the ceiling in useful FLOPs",
    ]
    sent = exchange.gather_bytes + exchange.reduce_bytes
    for what, size, seconds in (
        ("gradients and parameters", sent, exchange.data_parallel_seconds),
        ("all-to-all", exchange.all_to_all_bytes, exchange.all_to_all_seconds),
    ):
        if size:
            took = "bandwidth not known, left out" if seconds is None else f"{seconds:,.4g} s"
            lines.append(f"  communication of {what}: {gigabytes(size)} per rank, {took}")
    if sent or exchange.all_to_all_bytes:
        lines.append(f"  {time.without_overlap:,.4g} s if nothing overlaps; latency is not included")
    return lines
