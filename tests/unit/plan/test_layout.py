"""Layouts, memory and time by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.plan.layout import Layout, Shards, layout_of, shards_of
from mhmoe_vl.plan.memory import Part, all_to_all_bytes, memory_of, parts_of
from mhmoe_vl.plan.timing import communication_of, exchange_bandwidth, ring_bandwidth, seconds_of, step_time
from mhmoe_vl.plan.trace import Trace, Tracer, Work
from mhmoe_vl.plan.workload import build_task_without_files, samples_of
from tests.unit.plan.builders import make_device, make_run


class Toy(nn.Module):
    """The names of a task: 3 experts of 8 values in one block, 5 values outside."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.experts = nn.Module()  # named in full: encoder.blocks.0.experts.w
        block.experts.w = nn.Parameter(nn.init.zeros_(nn.Linear(8, 3).weight))
        self.encoder = nn.Module()
        self.encoder.blocks = nn.ModuleList([block])
        self.table = nn.Parameter(nn.init.zeros_(nn.Linear(5, 1).weight))


@pytest.mark.parametrize(
    ("layout", "local", "units"),
    [
        (Layout(1, "none", 1, 1), 29, ()),
        (Layout(4, "ddp", 1, 1), 29, ()),
        # Two ranks: two of three experts (padded to four), and the whole table, which has one row (padded to two).
        (Layout(2, "fsdp", 1, 1), 16 + 5, (32, 10)),
        (Layout(4, "fsdp", 1, 1), 8 + 5, (32, 20)),
        # One expert on each of three; its shard group has two ranks, the table's six.
        (Layout(6, "fsdp", 3, 1), 8 + 5, (16, 30)),
        (Layout(6, "ddp", 3, 1), 8 + 5, ()),
    ],
)
def test_what_rank_0_keeps(layout: Layout, local: int, units: tuple[int, ...]) -> None:
    shards = shards_of(Toy(), layout)  # type: ignore[arg-type]
    assert (shards.total, shards.local, shards.units) == (29, local, units)
    if layout == Layout(4, "fsdp", 1, 1):
        assert shards.padding == 52 / 29
        assert shards.most_padded == "table [1, 5]"


def test_memory_adds_up() -> None:
    shards = Shards(1000, 100, (70, 90, 40), (70, 90, 40), "")
    work = Work()
    parts = [
        Part("block0", Trace(1000, 10, 3, 500, work, work)),
        Part("block0", Trace(2000, 10, 3, 700, work, work)),
        Part("head0", Trace(4000, 20, 0, 600, work, work)),
    ]
    task = build_task_without_files(make_run())
    memory = memory_of(task, shards, Layout(10, "fsdp", 1, 1), parts, all_to_all=7)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.states) == (400, 400, 800, 1600)
    # The root and the two largest blocks there may be, with their gradients.
    assert memory.gathered == 2 * 4 * (40 + 2 * 90)
    # Copies of one block's weights exist once, those of its experts once per source.
    assert memory.weight_copies == 10 + 20 + 3 + 3
    assert (memory.activations, memory.temporary, memory.all_to_all) == (7000, 700, 7)
    # 24 codes of 192 values.
    assert memory.tokenizer == 4 * 24 * 192
    assert memory.total == 1600 + memory.tokenizer + 1760 + 36 + 7000 + 700 + 7
    averaged = memory_of(task, shards, Layout(10, "fsdp", 1, 1), parts, all_to_all=7, keeps_average=True)
    assert (averaged.average, averaged.total) == (400, memory.total + 400)


def test_what_is_frozen_has_neither_gradient_nor_moments_nor_activations() -> None:
    config = make_run("classification", options={"linear_probe": True}, model={"ffn": "dense"})
    probe, layout = build_task_without_files(config), Layout(2, "ddp", 1, 1)
    num_trained = 2 * 32 + 33 * 1000
    shards = shards_of(probe, layout)
    assert shards.trained == num_trained
    tracer = Tracer(config.model, torch.float32, make_device())
    parts = parts_of(probe, tracer, samples_of(config), {"class": 3}, checkpointed=False)
    memory = memory_of(probe, shards, layout, parts, all_to_all=0, keeps_average=True)
    assert (memory.gradients, memory.optimizer, memory.average) == (4 * num_trained, 8 * num_trained, 4 * num_trained)
    assert memory.weights == 4 * sum(parameter.numel() for parameter in probe.parameters())
    *encoder, head = parts
    assert not any(part.trace.kept or part.trace.backward.flops for part in encoder)
    assert all(part.trace.forward.flops for part in encoder)
    assert head.trace.kept > 0
    assert head.trace.backward.flops > 0


def test_rows_that_experts_exchange() -> None:
    """One sparse block; heads do not matter: 2 images of 17 tokens and 3 texts of 14, 32 wide, in 16 bits."""
    config = make_run(model={"ffn": "mhmoe"})
    task, samples = build_task_without_files(config), samples_of(config)
    assert all_to_all_bytes(task, samples, {"image": 2, "text": 3, "pair": 0}, 2) == (2 * 17 + 3 * 14) * 32 * 2


def test_traffic_of_a_step_by_hand() -> None:
    shards, device = Shards(100, 25, (40, 60, 20), (40, 60, 20), ""), make_device()
    fsdp = communication_of(shards, Layout(4, "fsdp", 2, 5), device, num_passes=3, all_to_all=1000, checkpointed=False)
    assert fsdp.gather_bytes == 5 * 4 * (2 * 3 * 100 + 20) * 3 / 4
    assert fsdp.reduce_bytes == 5 * 4 * (3 * 100 + 20) * 3 / 4
    # Half of the rows stay; there and back, forward and backward.
    assert fsdp.all_to_all_bytes == 5 * 4 * 1000 / 2
    # Four ranks are two nodes: a ring leaves a node through both cards, an exchange of two ranks stays inside.
    assert fsdp.data_parallel_seconds == pytest.approx((fsdp.gather_bytes + fsdp.reduce_bytes) / 2e7)
    assert fsdp.all_to_all_seconds == pytest.approx(fsdp.all_to_all_bytes / 1e8)
    again = communication_of(shards, Layout(4, "fsdp", 2, 5), device, num_passes=3, all_to_all=1000, checkpointed=True)
    assert again.all_to_all_bytes == 5 * 6 * 1000 / 2
    ddp = communication_of(shards, Layout(4, "ddp", 1, 5), device, num_passes=3, all_to_all=0, checkpointed=False)
    assert (ddp.gather_bytes, ddp.reduce_bytes) == (0, 2 * 4 * 25 * 3 / 4)
    alone = communication_of(shards, Layout(1, "none", 1, 1), device, num_passes=3, all_to_all=0, checkpointed=False)
    assert (alone.data_parallel_seconds, alone.all_to_all_seconds) == (0, 0)


def test_bandwidths() -> None:
    device = make_device()
    assert (ring_bandwidth(device, 2), ring_bandwidth(device, 3)) == (1e8, 2e7)
    assert (exchange_bandwidth(device, 2), exchange_bandwidth(device, 4)) == (1e8, 1e7)
    unknown = make_device(intra_node_bandwidth=None, inter_node_bandwidth=None)
    assert ring_bandwidth(unknown, 2) is None


def test_step_time_by_hand() -> None:
    shards, layout = Shards(100, 100, (), (), ""), Layout(2, "ddp", 1, 3)
    device = make_device("cuda", reached=0.5)
    communication = communication_of(shards, layout, device, num_passes=1, all_to_all=0, checkpointed=False)
    time = step_time(Work(0, 1.0, 9), Work(0, 2.0, 9), shards, layout, device, communication)
    assert (time.forward, time.backward) == (3 * 1.0 / 0.5, 3 * 2.0 / 0.5)
    assert time.optimizer == pytest.approx(100 * 40 / 1e9 / 0.5)
    assert time.communication == pytest.approx(400 / 1e8 / 0.5)
    assert time.expected == pytest.approx(time.compute)
    assert time.without_overlap == pytest.approx(time.compute + time.communication)


def test_a_cpu_pays_for_every_call_and_a_gpu_for_the_longer() -> None:
    work = Work(0, 2.0, 10)
    assert seconds_of(work, make_device("cpu", call_seconds=0.1)) == pytest.approx(3.0)
    assert seconds_of(work, make_device("cuda", call_seconds=0.1)) == pytest.approx(2.0)
    assert seconds_of(work, make_device("cuda", call_seconds=0.3)) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("changes", "world_size", "degree", "message"),
    [
        ({}, 13, 1, r"12 samples are fewer than 13 ranks x 1 micro-batches = 13.*data\.batch_size=13.*at most 12"),
        ({"num_micro_batches": 4}, 4, 1, "12 samples are fewer than 4 ranks x 4 micro-batches = 16.*at most 3 ranks"),
        ({"strategy": "none"}, 2, 1, "'none' needs one process, not 2"),
        ({}, 0, 1, "--world-size: 0 must be positive"),
        ({"model": {"ffn": "mhmoe"}}, 3, 2, "expert_parallel: 2 must divide the number of processes, 3; use 1 or 3"),
    ],
)
def test_layouts_that_cannot_be(changes: dict[str, object], world_size: int, degree: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_of(make_run(expert_parallel=degree, **changes), world_size)
