"""Traces on fake tensors against what autograd really keeps, and against hand-worked sums."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mhmoe_vl.plan.memory import parts_of
from mhmoe_vl.plan.trace import Tracer, Work
from mhmoe_vl.plan.workload import build_task_without_files, sample_cost, samples_of, samples_per_step, synthetic_batch
from mhmoe_vl.train.config import RunConfig
from tests.unit.plan.builders import TASKS, make_device, make_run

#: Wide enough that the bookkeeping of routing is small against activations, as in every real model.
WIDER = {"dim": 64, "ffn_dim": 256}


def really_kept(config: RunConfig, dtype: torch.dtype) -> int:
    """Bytes of storages that a forward pass saves, without those of parameters."""
    task = build_task_without_files(config, device="cpu").train()
    micro_batch = {source: synthetic_batch(config, source, 4) for source in config.data.train}
    own = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    totals = task.num_targets([micro_batch])
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        output = task(micro_batch, totals)
    assert output.loss.requires_grad
    return sum(saved.values())


CASES: list[tuple[str, dict[str, Any], torch.dtype]] = [
    *((task, {"ffn": "mhmoe"}, torch.float32) for task in TASKS),
    *(("pretrain", {"ffn": ffn}, torch.float32) for ffn in ("dense", "smoe", "xmoe", "fine_grained")),
    ("pretrain", {"ffn": "mhmoe", "drop_path": 0.1, "glu": True}, torch.float32),
    ("pretrain", {"ffn": "mhmoe", "vl_ffn_layers": 1, "shared_attention": True, "sub_ln": False}, torch.float32),
    ("pretrain", {"ffn": "mhmoe"}, torch.bfloat16),
    ("language_modeling", {"ffn": "mhmoe", "positions": "rotary", "drop_path": 0.1}, torch.float32),
    *(
        ("pretrain", {"ffn": "mhmoe", "moe": {"num_experts": 4, "match": "none", "backend": backend}}, torch.float32)
        for backend in ("loop", "grouped_mm", "segments_recompute")
    ),
]


@pytest.mark.parametrize(("task_kind", "model", "dtype"), CASES, ids=str)
def test_activations_are_what_autograd_keeps(task_kind: str, model: dict[str, Any], dtype: torch.dtype) -> None:
    config = make_run(task_kind, model=WIDER | model, data={"batch_size": 4 * (3 if task_kind == "pretrain" else 1)})
    task, samples = build_task_without_files(config), samples_of(config)
    tracer = Tracer(config.model, dtype, make_device())
    shares = samples_per_step(config)
    assert set(shares.values()) == {4}
    parts = parts_of(task, tracer, samples, shares, checkpointed=False)
    copies = {part.name: part.trace.weight_copies for part in parts}
    predicted = sum(part.trace.kept + part.trace.expert_copies for part in parts) + sum(copies.values())
    assert (sum(copies.values()) > 0) == (dtype == torch.bfloat16)
    assert predicted == pytest.approx(really_kept(config, dtype), rel=0.15)


def test_checkpointing_keeps_the_residual_stream_and_the_routing() -> None:
    config = make_run(model={"ffn": "smoe"})
    sample, tracer = samples_of(config)["image"], Tracer(config.model, torch.float32, make_device())
    dense = tracer.block(0, sample, 3, checkpointed=True)
    assert dense.kept == 3 * 17 * 32 * 4
    # Four scores and four probabilities in float32 (the balance loss uses the latter), one weight, one choice as int64.
    sparse = tracer.block(1, sample, 3, checkpointed=True)
    assert sparse.kept == 3 * 17 * (32 * 4 + 4 * 4 + 4 * 4 + 4 + 8)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_work_of_a_block_is_its_flops(checkpointed: bool) -> None:
    """Both blocks of a pair: forward as the sizes say; backward twice as much, scores of attention once more, and the
    forward pass again if it was checkpointed."""
    config = make_run(model={"ffn": "mhmoe"})
    sample, tracer = samples_of(config)["pair"], Tracer(config.model, torch.float32, make_device())
    traces = [tracer.block(layer, sample, 3, checkpointed=checkpointed) for layer in range(2)]
    forward = sum(trace.forward.flops for trace in traces)
    cost = sample_cost(build_task_without_files(config), sample)
    outside = 2 * 16 * 192 * 32 + 2 * 32 * (6 * 24 + 6 * 50)
    assert forward == 3 * (cost.forward_flops - outside)
    backward = 2 * forward + 2 * 3 * 2 * 31 * 31 * 32
    if checkpointed:
        # All but the dense block's very last product, that of its text, whose result nothing needs.
        backward += forward - 3 * 14 * 2 * 64 * 32
    assert sum(trace.backward.flops for trace in traces) == backward


def test_time_is_arithmetic_or_traffic_on_a_gpu_and_their_sum_on_a_cpu() -> None:
    """One head: a product of 10 x 32 x 24 with bias, then a log-softmax (and as much as that backward)."""
    config = make_run()
    head = build_task_without_files(config).mim_head
    slow = {"matmul_flops": {"float32": 1.0}}
    product = 2 * 10 * 32 * 24
    inputs_and_outputs = 4 * (24 + 10 * 32 + 32 * 24 + 10 * 24)
    softmax = 4 * 2 * 10 * 24
    for kind, expected in (
        ("cuda", product + softmax / 1e9),
        ("cpu", product + (inputs_and_outputs + softmax) / 1e9),
    ):
        trace = Tracer(config.model, torch.float32, make_device(kind, **slow)).head(head, 10)  # type: ignore[arg-type]
        assert trace.forward.flops == product
        assert trace.forward.seconds == pytest.approx(expected, rel=1e-12)
        assert trace.backward.flops == 2 * product


def test_narrow_products_take_longer() -> None:
    """The narrowest side of 10 x 32 x 24 is 10: half of a half-speed width of 20, so three times the time."""
    config, device = make_run(), make_device("cuda", matmul_flops={"float32": 1.0}, half_speed_width=20.0)
    head = build_task_without_files(config).mim_head
    trace = Tracer(config.model, torch.float32, device).head(head, 10)  # type: ignore[arg-type]
    assert trace.forward.seconds == pytest.approx(3 * 2 * 10 * 32 * 24, rel=1e-6)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_one_weight_for_each_row_is_no_narrow_product(kind: str) -> None:
    """Sub-tokens are 16 wide, and there are 16 experts: no product has a narrower side, forward or backward."""
    model = make_run(
        model={"dim": 64, "ffn_dim": 256, "ffn": "mhmoe", "moe": {"num_experts": 16, "match": "none", "num_heads": 4}}
    ).model
    sample = samples_of(make_run())["image"]
    devices = (make_device(kind, matmul_flops={"float32": 1.0}, half_speed_width=width) for width in (16.0, 0.0))
    slow, fast = (Tracer(model, torch.float32, device).block(1, sample, 4, checkpointed=False) for device in devices)
    for part in ("forward", "backward"):
        assert 1 < getattr(slow, part).seconds / getattr(fast, part).seconds <= 2


def test_functions_have_a_bandwidth_of_their_own() -> None:
    config, device = make_run(), make_device(function_bandwidth=1.0)
    head = build_task_without_files(config).mim_head
    trace = Tracer(config.model, torch.float32, device).head(head, 10)  # type: ignore[arg-type]
    assert trace.forward.seconds == pytest.approx(4 * 2 * 10 * 24, rel=1e-3)


def test_the_fused_kernels_keep_no_hidden_activations() -> None:
    pytest.importorskip("triton")
    config = make_run(model=WIDER | {"ffn": "mhmoe"})
    moe = config.model.moe
    kept = {}
    for backend in ("grouped_mm", "fused"):
        model = config.model.model_copy(update={"moe": moe.model_copy(update={"backend": backend})})
        tracer = Tracer(model, torch.bfloat16, make_device("cuda"))
        assert tracer.backend() == backend
        kept[backend] = tracer.block(1, samples_of(config)["image"], 4, checkpointed=False).kept
    # Sub-tokens: pre-activations and activations, 256 wide, in 16 bits.
    assert kept["grouped_mm"] - kept["fused"] >= 4 * 17 * 4 * 2 * 256 * 2


def test_the_backend_is_the_devices_own() -> None:
    model = make_run(model={"ffn": "mhmoe"}).model
    assert Tracer(model, torch.float32, make_device("cpu")).backend() == "segments"
    assert Tracer(model, torch.bfloat16, make_device("cuda")).backend() == "grouped_mm"
    assert Tracer(model, torch.float32, make_device("cuda")).backend() == "loop"
    assert Tracer(make_run(model={"ffn": "dense"}).model, torch.float32, make_device()).backend() == "-"


def test_norms_of_a_gpu_are_taken_in_float32() -> None:
    """Norms inside a block get 16-bit inputs, which CUDA's autocast casts: it keeps two wider copies."""
    model, sample = make_run(model={"ffn": "dense"}).model, samples_of(make_run())["image"]
    on_cpu, on_cuda = (
        Tracer(model, torch.bfloat16, make_device(kind)).block(0, sample, 4, checkpointed=False).kept
        for kind in ("cpu", "cuda")
    )
    assert on_cuda > on_cpu


def test_work_adds_up() -> None:
    assert Work(1, 2.0, 3) + Work(10, 20.0, 30) == Work(11, 22.0, 33)
