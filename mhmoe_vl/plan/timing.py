"""Expected time of a step, from a device's ceilings.

Compute: every operation takes the larger of its arithmetic at the ceiling of its dtype and its traffic at the memory's
bandwidth; a CPU adds the host's time per operation, a GPU hides it unless it is the longer. Communication: bytes over
bandwidth, without latency, and hidden behind compute where the program overlaps it (FSDP2 and DDP do, an all-to-all
between router and experts cannot be).
"""

from __future__ import annotations

from dataclasses import dataclass

from mhmoe_vl.plan.devices import Device
from mhmoe_vl.plan.layout import Layout, Shards
from mhmoe_vl.plan.trace import Work

#: AdamW reads weight, gradient and two moments and writes all but the gradient; clipping reads gradients twice and
#: writes them once. All float32.
_OPTIMIZER_BYTES = 4 * (7 + 3)
#: Weight and average are read, the average is written.
_AVERAGE_BYTES = 4 * 3


@dataclass(frozen=True)
class Communication:
    """Of one rank in one step, bytes sent and seconds; None where the bandwidth is not known."""

    gather_bytes: int
    reduce_bytes: int
    all_to_all_bytes: int
    data_parallel_seconds: float | None
    all_to_all_seconds: float | None


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        forward, backward: of all micro-batches; what checkpointing computes again belongs to the backward pass.
        communication: data-parallel, mostly hidden.
        optimizer: with the average of the weights, if one is kept.
        expected: compute, or communication if that is longer, and the all-to-alls.
        without_overlap: the sum of everything.
    """

    forward: float
    backward: float
    optimizer: float
    communication: float
    all_to_all: float

    @property
    def compute(self) -> float:
        return self.forward + self.backward + self.optimizer

    @property
    def expected(self) -> float:
        return max(self.compute, self.communication) + self.all_to_all

    @property
    def without_overlap(self) -> float:
        return self.compute + self.communication + self.all_to_all


def step_time(
    forward: Work,
    backward: Work,
    shards: Shards,
    layout: Layout,
    device: Device,
    communication: Communication,
    *,
    keeps_average: bool = False,
) -> StepTime:
    """Time of a step on the busiest rank.

    Args:
        forward, backward: of one micro-batch.
    """
    num_bytes = _OPTIMIZER_BYTES + (_AVERAGE_BYTES if keeps_average else 0)
    optimizer = num_bytes * shards.trained / device.memory_bandwidth / device.reached
    return StepTime(
        forward=layout.num_micro_batches * seconds_of(forward, device),
        backward=layout.num_micro_batches * seconds_of(backward, device),
        optimizer=optimizer,
        communication=communication.data_parallel_seconds or 0.0,
        all_to_all=communication.all_to_all_seconds or 0.0,
    )


def seconds_of(work: Work, device: Device) -> float:
    """Time of traced work."""
    host = work.num_calls * (device.call_seconds or 0.0)
    on_device = work.seconds / device.reached
    return on_device + host if device.kind == "cpu" else max(on_device, host)


def communication_of(
    shards: Shards,
    layout: Layout,
    device: Device,
    *,
    num_passes: int,
    all_to_all: int,
    checkpointed: bool,
) -> Communication:
    """What a rank exchanges in a step.

    Args:
        num_passes: passes through the encoder per micro-batch: FSDP2 gathers every block in the forward and again in
            the backward pass of each, and reduces after each; the root once per micro-batch.
        all_to_all: bytes of all sparse blocks in one direction, per micro-batch.
    """
    size, ring = layout.world_size, (layout.world_size - 1) / layout.world_size
    gather = reduce = 0
    if layout.strategy == "fsdp" and size > 1:
        *blocks, root = shards.units
        gather = int(4 * layout.num_micro_batches * ring * (2 * num_passes * sum(blocks) + root))
        reduce = int(4 * layout.num_micro_batches * ring * (num_passes * sum(blocks) + root))
    elif layout.strategy == "ddp" and size > 1:
        reduce = int(2 * 4 * ring * shards.trained)
    degree = layout.expert_parallel
    # Rows and results, forward and backward; checkpointing sends those of the forward pass again.
    num_trips = 6 if checkpointed else 4
    exchange = all_to_all * num_trips * layout.num_micro_batches * (degree - 1) // degree
    return Communication(
        gather, reduce, exchange,
        _seconds(gather + reduce, ring_bandwidth(device, size), device),
        _seconds(exchange, exchange_bandwidth(device, degree), device),
    )  # fmt: skip


def ring_bandwidth(device: Device, num_ranks: int) -> float | None:
    """Bytes/s per rank of gathers and reductions: a ring leaves a node through all of its network cards at once."""
    if num_ranks <= device.num_per_node or device.inter_node_bandwidth is None:
        return device.intra_node_bandwidth
    across = device.num_per_node * device.inter_node_bandwidth
    return across if device.intra_node_bandwidth is None else min(device.intra_node_bandwidth, across)


def exchange_bandwidth(device: Device, num_ranks: int) -> float | None:
    """Bytes/s per rank of an all-to-all: across nodes every rank has its own card only."""
    return device.intra_node_bandwidth if num_ranks <= device.num_per_node else device.inter_node_bandwidth


def _seconds(num_bytes: int, bandwidth: float | None, device: Device) -> float | None:
    if num_bytes == 0:
        return 0.0
    return None if bandwidth is None else num_bytes / bandwidth / device.reached
