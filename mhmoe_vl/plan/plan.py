"""A plan: everything that is known of a run before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.plan.devices import Device, compute_dtype
from mhmoe_vl.plan.layout import Layout, Shards, layout_of, really_shard, shards_of
from mhmoe_vl.plan.memory import (
    USABLE,
    Memory,
    Part,
    all_to_all_bytes,
    memory_of,
    parts_of,
    passes_of,
    states_and_gathered,
)
from mhmoe_vl.plan.timing import Communication, StepTime, communication_of, step_time
from mhmoe_vl.plan.trace import Tracer, Work
from mhmoe_vl.plan.workload import (
    Sample,
    SampleCost,
    build_task_without_files,
    busiest_share,
    sample_cost,
    samples_of,
    samples_per_step,
)
from mhmoe_vl.tasks.visual_tokenizer import VisualTokenizerConfig
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.cost import encoder_cost_of
from mhmoe_vl.train.layout import strategy_of


@dataclass(frozen=True)
class SourcePlan:
    """One source of the mixture.

    Attributes:
        samples_per_step: over all ranks.
        busiest_share: of the busiest rank in its largest micro-batch.
    """

    sample: Sample
    cost: SampleCost
    samples_per_step: int
    busiest_share: int


@dataclass(frozen=True)
class Plan:
    """What ``python -m mhmoe_vl.plan`` prints.

    Attributes:
        dtype: of matrix products.
        num_active_params: that one token can touch.
        backend: of the experts.
        activations: bytes per rank without and with activation checkpointing, whichever the configuration asks for.
        busy_share: mean work of a rank over that of the busiest.
        flops_utilization: FLOPs of forward and backward passes (nothing recomputed, no targets) of all ranks, over what
            their ceilings would do in the expected time.
    """

    device: Device
    dtype: str
    layout: Layout
    num_params: int
    num_active_params: int
    backend: str
    sources: dict[str, SourcePlan]
    shards: Shards
    memory: Memory
    activations: dict[str, int]
    communication: Communication
    time: StepTime
    busy_share: float
    flops_utilization: float
    hours: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON; derived figures included."""
        tree = asdict(self)
        tree["device"]["matmul_flops"] = dict(self.device.matmul_flops)
        tree["memory"] |= {"states": self.memory.states, "total": self.memory.total}
        tree["time"] |= {
            "compute": self.time.compute,
            "expected": self.time.expected,
            "without_overlap": self.time.without_overlap,
        }
        for name, source in self.sources.items():
            tree["sources"][name]["cost"]["training_flops"] = source.cost.training_flops
        return tree


def make_plan(config: RunConfig, device: Device, *, world_size: int) -> Plan:
    """Plan a run on ``world_size`` devices. Reads no data and needs no files but the configuration.

    Raises:
        ConfigError: a layout that cannot run, with the numbers and a remedy; a task that is not planned.
    """
    if isinstance(config.task, VisualTokenizerConfig):
        raise ConfigError(
            "task.kind: 'visual_tokenizer' cannot be planned, because nothing here knows its teacher; try a few steps "
            "with max_steps=20 instead"
        )
    layout = layout_of(config, world_size)
    draft = _Draft(config, layout, device)
    if draft.memory.total > USABLE * device.memory:
        raise ConfigError(_too_large(draft))
    kept = really_shard(build_task_without_files(config), layout)
    assert kept == draft.shards.local, f"rank 0 keeps {kept} values, and {draft.shards.local} by formula"
    return draft.finish()


class _Draft:
    """Memory of one candidate, which is all that decides whether it can run."""

    def __init__(self, config: RunConfig, layout: Layout, device: Device) -> None:
        self.config, self.layout, self.device = config, layout, device
        self.dtype = compute_dtype(config.precision, device.kind)
        self.task = build_task_without_files(config)
        self.samples = samples_of(config)
        self.costs = {name: sample_cost(self.task, sample) for name, sample in self.samples.items()}
        self.shares = busiest_share(
            config, self.costs, world_size=layout.world_size, num_micro_batches=layout.num_micro_batches
        )
        self.shards = shards_of(self.task, layout)
        self.tracer = Tracer(config.model, self.dtype, device)
        self.parts = self.parts_with(config.model.checkpoint_activations)
        self.memory = memory_of(
            self.task, self.shards, layout, self.parts,
            all_to_all=self._all_to_all_buffers(), keeps_average=keeps_average(config),
        )  # fmt: skip

    def parts_with(self, checkpointed: bool) -> list[Part]:
        return parts_of(self.task, self.tracer, self.samples, self.shares, checkpointed=checkpointed)

    def finish(self) -> Plan:
        config, layout, device = self.config, self.layout, self.device
        checkpointed = config.model.checkpoint_activations
        forward = sum((part.trace.forward for part in self.parts), Work())
        backward = sum((part.trace.backward for part in self.parts), Work())
        communication = communication_of(
            self.shards, layout, device,
            num_passes=len(passes_of(self.task, self.samples, self.shares)),
            all_to_all=self._exchanged(),
            checkpointed=checkpointed,
        )  # fmt: skip
        time = step_time(
            forward, backward, self.shards, layout, device, communication, keeps_average=keeps_average(config)
        )
        costs, numbers = self.costs, samples_per_step(config)
        busiest = layout.num_micro_batches * sum(
            costs[name].training_flops * number for name, number in self.shares.items()
        )
        mean = sum(costs[name].training_flops * number for name, number in numbers.items()) / layout.world_size
        useful = sum(costs[name].useful_flops * number for name, number in numbers.items())
        dtype = str(self.dtype).removeprefix("torch.")
        ceiling = device.matmul_flops[dtype] * layout.world_size
        return Plan(
            device=device,
            dtype=dtype,
            layout=layout,
            num_params=self.shards.total,
            num_active_params=encoder_cost_of(config).num_active_params,
            backend=self.tracer.backend(),
            sources={
                name: SourcePlan(sample, costs[name], numbers[name], self.shares[name])
                for name, sample in self.samples.items()
            },
            shards=self.shards,
            memory=self.memory,
            activations={
                ("with" if on else "without") + " checkpointing": sum(part.trace.kept for part in self.parts_with(on))
                for on in (False, True)
            },
            communication=communication,
            time=time,
            busy_share=mean / busiest,
            flops_utilization=useful / (time.expected * ceiling),
            hours=time.expected * config.max_steps / 3600,
        )

    def _exchanged(self) -> int:
        """Bytes of all sparse blocks in one direction, per micro-batch."""
        if self.layout.expert_parallel == 1:
            return 0
        return all_to_all_bytes(self.task, self.samples, self.shares, self.dtype.itemsize)

    def _all_to_all_buffers(self) -> int:
        """Rows and results of one block in the largest pass, each once to send and once as received."""
        if self.layout.expert_parallel == 1:
            return 0
        return 4 * max(
            sample.num_tokens * number * self.config.model.ffn_shape.top_k
            for sample, number in passes_of(self.task, self.samples, self.shares)
        ) * self.config.model.dim * self.dtype.itemsize  # fmt: skip


def keeps_average(config: RunConfig) -> bool:
    """Whether the run averages its weights."""
    return config.optimizer.ema_decay is not None


def _too_large(draft: _Draft) -> str:
    """By how much, what takes it, and the smallest change that fits."""
    memory, device = draft.memory, draft.device
    limit = int(USABLE * device.memory)
    largest = max(asdict(memory).items(), key=lambda item: item[1])
    message = (
        f"does not fit: {gigabytes(memory.total)} per rank, but {device.name} has {gigabytes(device.memory)} of which "
        f"{USABLE:.0%} may be planned; {gigabytes(memory.total - limit)} too much "
        f"(states {gigabytes(memory.states)}, {largest[0]} {gigabytes(largest[1])})"
    )
    for candidate in _alternatives(draft.config, draft.layout):
        strategy = strategy_of(candidate, draft.layout.world_size)
        layout = replace(draft.layout, strategy=strategy, num_micro_batches=candidate.num_micro_batches)
        states, gathered = states_and_gathered(shards_of(draft.task, layout), keeps_average=keeps_average(candidate))
        if sum(states.values()) + gathered > limit:
            continue  # without looking at activations, which takes longer
        other = _Draft(candidate, layout, device)
        if other.memory.total <= limit:
            return f"{message}; fits with {_changes(draft, other)} ({gigabytes(other.memory.total)})"
    message += "; more micro-batches, checkpointing and fsdp are not enough: "
    if draft.layout.strategy == "fsdp" and draft.shards.padding > 1.05:
        return message + (
            f"FSDP2 cuts parameters along their first dimension, so that {draft.layout.world_size} ranks pad what they "
            f"gather {draft.shards.padding:.1f}-fold (most of all {draft.shards.most_padded}); use fewer ranks or "
            "expert_parallel"
        )
    return message + "use more ranks"


def _alternatives(config: RunConfig, layout: Layout) -> Iterator[RunConfig]:
    """Configurations that need less memory, those that cost least first."""
    strategies = dict.fromkeys((layout.strategy, "fsdp" if layout.world_size > 1 else layout.strategy))
    for strategy in strategies:
        for checkpointed in dict.fromkeys((config.model.checkpoint_activations, True)):
            number = config.num_micro_batches
            while number * layout.world_size <= config.data.batch_size:
                model = config.model.model_copy(update={"checkpoint_activations": checkpointed})
                yield config.model_copy(update={"strategy": strategy, "model": model, "num_micro_batches": number})
                number *= 2


def _changes(draft: _Draft, other: _Draft) -> str:
    changes = []
    if other.layout.strategy != draft.layout.strategy:
        changes.append(f"strategy={other.layout.strategy}")
    if other.config.model.checkpoint_activations != draft.config.model.checkpoint_activations:
        changes.append("model.checkpoint_activations=true")
    if other.layout.num_micro_batches != draft.layout.num_micro_batches:
        changes.append(f"num_micro_batches={other.layout.num_micro_batches}")
    return " ".join(changes)


def gigabytes(num_bytes: int) -> str:
    """In units of 10^9 bytes, as memory is sold."""
    return f"{num_bytes / 1e9:,.2f} GB"
