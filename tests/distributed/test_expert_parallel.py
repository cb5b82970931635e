"""Experts spread over ranks against one process that has the tokens of all: every output and every gradient."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mhmoe_vl.distributed.checkpoint import load_checkpoint, save_checkpoint
from mhmoe_vl.distributed.collectives import all_reduce_sum
from mhmoe_vl.distributed.parallel import Strategy, accumulating, clip_grad_norm, parallelize
from mhmoe_vl.distributed.weights import export_weights, load_weights
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.moe import KINDS, MultiHeadMoE
from mhmoe_vl.tasks.base import MicroBatch, Task
from mhmoe_vl.train.step import global_totals
from tests.distributed.fork_harness import run_ranks
from tests.distributed.sparse import (
    DIM,
    Case,
    Outcome,
    Stack,
    assert_same,
    inputs_of,
    inputs_of_all,
    on_one_process,
    on_ranks,
)
from tests.unit.moe.conftest import mended_interpreter  # noqa: F401
from tests.unit.tasks.builders import make_micro_batch, make_task, take

ONE_PROCESS = World(0, 1, 0, torch.device("cpu"))
PER_HEAD = {"pools": "per_head", "num_experts": 12}
CASES: dict[str, Case] = {
    "uneven tokens": Case([5, 2, 7, 1]),
    "x-moe": Case([3, 4, 5, 6], num_heads=None, options={"router": "cosine", "num_experts": 8}),
    "fine-grained": Case([3, 4, 5, 6], num_heads=None, options={"num_experts": 8, "top_k": 3, "ffn_dim": 3}),
    "k = 2 with everything": Case(
        [5, 2, 7, 1],
        options={"top_k": 2, "glu": True, "router": "cosine", "renormalize": True, "inner_residual": True},
        valid=0.6,
    ),
    "no biases": Case([2, 3, 4, 5], options={"bias": False, "top_k": 2, "gate": "sigmoid"}),
    "all sub-tokens on the first expert": Case([5, 2, 7, 1], favoured=0),
    "only the last rank has tokens": Case([0, 0, 0, 9], options={"top_k": 2}),
    "fewer tokens than experts": Case([0, 1, 0, 0], num_heads=None, options={"num_experts": 8}),
    "no tokens at all": Case([0, 0, 0, 0]),
    "nothing but padding": Case([5, 2, 7, 1], valid=0.0),
    "experts that dp does not divide": Case([5, 2, 7, 1], options={"num_experts": 12, "top_k": 2}),
    "heads with everything": Case(
        [5, 2, 7, 1],
        num_heads=4,
        options=PER_HEAD | {"top_k": 2, "glu": True, "renormalize": True, "inner_residual": True},
        valid=0.6,
    ),
    "heads, all sub-tokens of the second on one expert": Case([5, 2, 7, 1], 4, PER_HEAD | {"bias": False}, favoured=4),
    "heads, only the last rank has tokens": Case([0, 0, 0, 9], 4, PER_HEAD | {"top_k": 2}),
    "heads, no tokens at all": Case([0, 0, 0, 0], 4, PER_HEAD, valid=0.5),
    "heads, nothing but padding": Case([5, 2, 7, 1], 4, PER_HEAD, valid=0.0),
    "norms inside experts": Case([5, 2, 7, 1], options={"sub_ln": True, "top_k": 2}, valid=0.7),
    "loop, ranks that receive nothing": Case([5, 2, 7, 1], options={"backend": "loop"}, favoured=0, valid=0.7),
}
# Backends that have no float64.
FLOAT32_CASES = {
    "grouped_mm": Case(
        [5, 2, 7, 1], options={"backend": "grouped_mm", "ffn_dim": 8, "top_k": 2}, num_heads=1, valid=0.7
    ),
    "fused": Case([2, 0, 3, 1], options={"backend": "fused", "top_k": 2}, valid=0.7),
    "heads, fused": Case([2, 0, 3, 1], 4, PER_HEAD | {"backend": "fused"}, valid=0.7),
}
LAYOUTS = [(2, 2), (4, 2), (4, 4)]


def outcomes(cases: list[Case], world_size: int, degree: int) -> list[list[Outcome]]:
    """For each case the outcomes of all ranks."""
    of_ranks = run_ranks(lambda world: [on_ranks(case, world, degree) for case in cases], world_size)
    return [list(of_case) for of_case in zip(*of_ranks, strict=True)]


def on(case: Case, num_ranks: int) -> Case:
    """The same tokens on fewer ranks."""
    width = len(case.tokens) // num_ranks
    return replace(case, tokens=[sum(case.tokens[i * width : (i + 1) * width]) for i in range(num_ranks)])


def test_outputs_losses_and_gradients_equal_one_process() -> None:
    """On two groups of two ranks; other layouts have random cases below."""
    for case, found in zip(CASES.values(), outcomes([*CASES.values()], 4, 2), strict=True):
        assert_same(found, on_one_process(case), case, 1e-12)


@pytest.mark.usefixtures("mended_interpreter")
def test_float32_and_its_backends() -> None:
    everything = CASES["k = 2 with everything"], CASES["heads with everything"]
    cases = [replace(case, dtype=torch.float32) for case in (*everything, *FLOAT32_CASES.values())]
    cases = [on(case, 2) for case in cases]
    for case, found in zip(cases, outcomes(cases, 2, 2), strict=True):
        assert_same(found, on_one_process(case), case, 1e-5)


def random_case(rng: random.Random, world_size: int, degree: int) -> Case:
    num_heads = rng.choice([None, 1, 2, 4, 4, 4])
    is_per_head = num_heads == 4 and rng.random() < 0.7
    num_experts = (4 if is_per_head else degree) * rng.randint(1, 4)
    options: dict[str, Any] = {
        "num_experts": num_experts,
        "top_k": rng.randint(1, min(3, num_experts // 4 if is_per_head else num_experts)),
        "ffn_dim": rng.randint(1, 6),
        # A sub-token of width 2 has too few cosines to be without ties.
        "router": rng.choice(["linear", "cosine"]) if num_heads != 4 else "linear",
        "gate": rng.choice(["softmax", "sigmoid"]),
        "renormalize": rng.random() < 0.5,
        "inner_residual": rng.random() < 0.3,
        "glu": rng.random() < 0.5,
        "bias": rng.random() < 0.5,
        "backend": rng.choice(["auto", "loop"]),
    }
    if is_per_head:
        options["pools"] = "per_head"
    return Case(
        tokens=[rng.choice([0, 0, 1, 2, rng.randint(3, 12)]) for _ in range(world_size)],
        num_heads=num_heads,
        options=options,
        valid=rng.choice([None, 0.0, 0.3, 0.8]),
        favoured=rng.choice([None, None, rng.randrange(num_experts)]),
        seed=rng.randrange(2**16),
    )


@pytest.mark.parametrize(("world_size", "degree"), LAYOUTS)
def test_random_layers_loads_and_masks(world_size: int, degree: int) -> None:
    rng = random.Random(world_size * 10 + degree)
    cases = [random_case(rng, world_size, degree) for _ in range(6)]
    for case, found in zip(cases, outcomes(cases, world_size, degree), strict=True):
        assert_same(found, on_one_process(case), case, 1e-11)


@pytest.mark.parametrize(("world_size", "degree"), [(2, 2), (4, 2)])
def test_capacity_is_that_of_the_same_ranks_without_expert_parallelism(world_size: int, degree: int) -> None:
    """Each rank is a group of GShard's: places are given out among its own rows."""
    cases = [
        on(Case([7, 5, 0, 9], options={"capacity_factor": factor, "top_k": 2}, valid=0.8), world_size)
        for factor in (0.5, 1.0)
    ]
    spread, together = (outcomes(cases, world_size, d) for d in (degree, 1))
    for case, found, expected in zip(cases, spread, together, strict=True):
        for of_rank, wanted in zip(found, expected, strict=True):
            assert_same([of_rank], wanted, case, 1e-12)
        everything = replace(case, options={"top_k": 2})
        assert not torch.allclose(torch.cat([o.outputs for o in found]), on_one_process(everything).outputs)


def steps_of(case: Case, module: Stack, rank: int | None) -> dict[str, Tensor]:
    """Three clipped AdamW steps, in two micro-batches each; the norms, and what they leave behind."""
    optimizer = torch.optim.AdamW(groups_of(module), lr=0.01, weight_decay=0.1, fused=True)
    norms = []
    for step in range(3):
        for part in range(2):
            of_part = replace(case, seed=case.seed + 2 * step + part)
            with accumulating(module, is_last=part == 1):
                x_TD, valid_T, probe_TD = inputs_of_all(of_part) if rank is None else inputs_of(of_part, rank)
                module(x_TD, valid_T, probe_TD)[1].backward()
        norms.append(clip_grad_norm(module, 1.0))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": torch.stack(norms)} | whole(
        {f"{name}/{key}": value for name, p in module.named_parameters() for key, value in optimizer.state[p].items()}
        | module.state_dict()
    )


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """One group per mesh."""
    groups: dict[str, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        groups.setdefault(str(getattr(parameter, "device_mesh", "")), []).append(parameter)
    return [{"params": group} for group in groups.values()]


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


@pytest.mark.parametrize(("layers", "world_size", "degree"), [("rows", 4, 2), ("rows", 2, 2), ("heads", 4, 4)])
def test_clipped_adamw_steps_equal_one_process(layers: str, world_size: int, degree: int) -> None:
    """Weights, moments, and the one global norm over shards on two meshes."""
    options = {"top_k": 2} | (PER_HEAD if layers == "heads" else {"num_experts": 12})
    case = on(Case([5, 0, 7, 1], 4, options, valid=0.8), world_size)

    def on_rank(world: World) -> dict[str, Tensor]:
        stack = Stack(case)
        parallelize(stack, strategy="fsdp", world=world, shard_units=[*stack.layers], expert_parallel=degree)
        return steps_of(case, stack, world.rank)

    expected = steps_of(case, Stack(case), None)
    assert (expected["norms"] > 1).all()  # so that clipping matters
    for found in run_ranks(on_rank, world_size):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_experts_are_sharded_over_all_ranks_and_the_state_dict_keeps_its_keys() -> None:
    case = Case([1] * 4, options={"num_experts": 8})

    def sizes(world: World) -> dict[str, tuple[int, ...]]:
        stack = Stack(case)
        parallelize(stack, strategy="fsdp", world=world, shard_units=[*stack.layers], expert_parallel=2)
        return {
            name: tuple(tensor.shape) if name.endswith("bias_E") else tuple(tensor.to_local().shape)
            for name, tensor in stack.state_dict().items()
        }

    whole_sizes = {name: tuple(tensor.shape) for name, tensor in Stack(case).state_dict().items()}
    for of_rank in run_ranks(sizes, 4):
        assert of_rank.keys() == whole_sizes.keys()
        for name, size in of_rank.items():
            if ".experts." in name:
                assert size == (2, *whole_sizes[name][1:]), name


#: Number of ranks, and over how many of them experts are spread.
SAVED_BY, LOADED_BY = {"rows": [(2, 2)], "heads": [(4, 2)]}, [(1, 1), (4, 4)]


@pytest.mark.parametrize("layers", ["rows", "heads"])
def test_a_checkpoint_of_any_layout_loads_into_any_other_and_training_goes_on(tmp_path: Path, layers: str) -> None:
    options = PER_HEAD if layers == "heads" else {"num_experts": 12, "top_k": 2}
    saved_by = SAVED_BY[layers]
    case = Case([6], 4, options)

    def start(world: World, degree: int, seed: int) -> tuple[Stack, torch.optim.AdamW]:
        stack = Stack(replace(case, seed=seed))
        strategy: Strategy = "none" if world.world_size == 1 else "fsdp"
        parallelize(stack, strategy=strategy, world=world, shard_units=[*stack.layers], expert_parallel=degree)
        return stack, torch.optim.AdamW(groups_of(stack), lr=0.01, weight_decay=0.1, fused=True)

    def train(stack: Stack, optimizer: torch.optim.AdamW, world: World, steps: range) -> None:
        for step in steps:
            x_TD, _, probe_TD = (
                None if t is None else t[world.rank :: world.world_size] for t in inputs_of(replace(case, seed=step), 0)
            )
            with accumulating(stack, is_last=True):
                stack(x_TD, None, probe_TD)[1].backward()
            clip_grad_norm(stack, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def state_of(stack: Stack, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
        moments = {f"{n}/{k}": v for n, p in stack.named_parameters() for k, v in optimizer.state[p].items()}
        return whole(moments | stack.state_dict())

    def save(world: World, degree: int, name: str) -> dict[str, Tensor]:
        stack, optimizer = start(world, degree, seed=0)
        train(stack, optimizer, world, range(2))
        save_checkpoint(tmp_path / name, 2, module=stack, optimizer=optimizer, progress={}, world=world, keep=1)
        export_weights(tmp_path / f"{name}.safetensors", stack, world=world)
        return state_of(stack, optimizer)

    def load(world: World, degree: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The state right after loading each checkpoint, and two steps later."""
        found = []
        for size, of_degree in saved_by:
            stack, optimizer = start(world, degree, seed=1)
            path = tmp_path / f"{size}-{of_degree}" / "step_0000002"
            load_checkpoint(path, module=stack, optimizer=optimizer, world=world)
            loaded = state_of(stack, optimizer)
            train(stack, optimizer, world, range(2, 4))
            found.append((loaded, state_of(stack, optimizer)))
        return found

    saved = []
    for world_size, degree in saved_by:
        name = f"{world_size}-{degree}"
        run = partial(save, degree=degree, name=name)
        saved.append(run(ONE_PROCESS) if world_size == 1 else run_ranks(run, world_size)[0])
        weights = load_weights(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(weights[key], saved[-1][key]) for key in Stack(case).state_dict())
    unbroken, optimizer = start(ONE_PROCESS, 1, seed=0)
    train(unbroken, optimizer, ONE_PROCESS, range(4))
    expected = state_of(unbroken, optimizer)
    for world_size, degree in LOADED_BY:
        run = partial(load, degree=degree)
        of_rank = run(ONE_PROCESS) if world_size == 1 else run_ranks(run, world_size)[0]
        for (loaded, trained), state in zip(of_rank, saved, strict=True):
            assert loaded.keys() == state.keys()
            assert all(torch.equal(loaded[name], state[name]) for name in state)
            torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-10)


TASKS: dict[str, dict[str, Any]] = {
    **{kind: {"ffn": kind} for kind in KINDS if kind != "dense"},
    "shared and joint pools": {"ffn": "mhmoe", "vl_ffn_layers": 1, "moe": {"experts": "shared"}},
    "recomputed": {"ffn": "mhmoe", "vl_ffn_layers": 1, "checkpoint_activations": True},
    "recomputed whole tokens": {"ffn": "xmoe", "checkpoint_activations": True},
    "recomputed heads": {
        "ffn": "mhmoe_head_parallel",
        "vl_ffn_layers": 1,
        "checkpoint_activations": True,
        "moe": {"experts": "shared"},
    },
}


def task_gradients(task: Task, module: nn.Module, batches: MicroBatch) -> dict[str, Tensor]:
    with accumulating(module, is_last=True):
        output = module(batches, global_totals(task, [batches]))
        output.loss.backward()
    missing = [name for name, p in task.named_parameters() if p.grad is None]
    assert missing == []
    loads = {f"load of {name}": load for name, load in output.load_E.items()}
    return loads | {"loss": all_reduce_sum(output.loss)} | whole({n: p.grad for n, p in task.named_parameters()})


@pytest.mark.parametrize(
    ("cuts", "tasks"), [([(0, 2), (2, 2), (2, 3), (3, 5)], ["recomputed heads"]), ([(0, 5), (5, 5)], [*TASKS])]
)
def test_pretraining_tasks_equal_one_process(cuts: list[tuple[int, int]], tasks: list[str]) -> None:
    """One of the ranks has no samples of any kind."""
    batches = make_micro_batch("pretrain", 5)

    def make(options: dict[str, Any]) -> Task:
        moe = {"balance_weight": 0.5, "z_weight": 0.1} | options.get("moe", {})
        return make_task("pretrain", **options | {"moe": moe}).train()

    def on_rank(world: World) -> list[dict[str, Tensor]]:
        found = []
        for name in tasks:
            task = make(TASKS[name])
            units = task.encoder.shard_units()
            parallelize(task, strategy="fsdp", world=world, shard_units=units, expert_parallel=2)
            found.append(task_gradients(task, task, take(batches, *cuts[world.rank])))
        return found

    for of_rank in run_ranks(on_rank, len(cuts)):
        for name, found in zip(tasks, of_rank, strict=True):
            task = make(TASKS[name])
            torch.testing.assert_close(found, task_gradients(task, task, batches), rtol=1e-11, atol=1e-11)


def test_selection_bias_moves_alike_on_all_ranks() -> None:
    batches = make_micro_batch("pretrain", 4)

    def update(task: Task, part: MicroBatch) -> dict[str, Tensor]:
        output = task(part, global_totals(task, [part]))
        task.update_selection_bias(output.load_E)
        return {name: buffer for name, buffer in task.named_buffers() if name.endswith("selection_bias_E")}

    def on_rank(world: World) -> dict[str, Tensor]:
        task = make_task("pretrain", moe={"selection_bias_rate": 0.1})
        parallelize(task, strategy="fsdp", world=world, expert_parallel=2)
        return update(task, take(batches, 3 * world.rank, 3 + world.rank))

    expected = update(make_task("pretrain", moe={"selection_bias_rate": 0.1}), batches)
    assert any(bias.any() for bias in expected.values())
    for found in run_ranks(on_rank, 2):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"pools": "per_head"}], ids=["rows", "heads"])
def test_experts_never_see_padding(options: dict[str, Any]) -> None:
    """It would change no result, as it is masked in the end, but cost time."""
    case = Case([5, 2, 7, 1], 4, options | {"num_experts": 8, "top_k": 2}, valid=0.5)

    def rows_served(world: World) -> int:
        stack = Stack(case)
        parallelize(stack, strategy="fsdp", world=world, expert_parallel=2)
        served: list[int] = []
        for layer in stack.layers:
            layer.moe.experts.backend = "loop"  # not one of those that take the whole layer
            layer.moe.experts.register_forward_pre_hook(lambda _, inputs: served.append(int(inputs[1].sum())))
        stack(*inputs_of(case, world.rank))
        return sum(served)

    num_valid = int(inputs_of_all(case)[1].sum())
    assert 0 < num_valid < 15
    assert sum(run_ranks(rows_served, 4)) == 2 * 4 * 2 * num_valid  # layers, heads, choices


def test_traffic_of_heads_depends_on_neither_routing_nor_number_of_choices() -> None:
    """Bytes that each rank sends and receives in a forward pass; for rows that are already routed they grow with k."""

    def traffic(case: Case, world: World) -> list[tuple[int, int]]:
        stack = Stack(case)
        parallelize(stack, strategy="fsdp", world=world, expert_parallel=4)
        sizes: list[tuple[int, int]] = []
        exchange = dist.all_to_all_single

        def counted(received: Tensor, sent: Tensor, *arguments: Any, **options: Any) -> None:
            sizes.append((sent.nbytes, received.nbytes))
            exchange(received, sent, *arguments, **options)

        with mock.patch.object(dist, "all_to_all_single", counted), torch.no_grad():
            stack(*inputs_of(case, world.rank))
        return sizes

    def cases(options: dict[str, Any]) -> list[Case]:
        return [
            Case([6] * 4, 4, options | {"num_experts": 16, "top_k": top_k}, favoured=favoured)
            for top_k in (1, 2, 3)
            for favoured in (None, 0)
        ]

    def both(world: World) -> tuple[list[Any], list[Any]]:
        rows, heads = ([traffic(case, world) for case in cases(options)] for options in ({}, {"pools": "per_head"}))
        return rows, heads

    found = run_ranks(both, 4)
    of_heads = [sizes for _, heads in found for sizes in heads]
    assert all(sizes == of_heads[0] for sizes in of_heads)
    # A count per rank; rows of 8 and scores of 16 values in float64; twice.
    assert of_heads[0] == [(4 * 8, 4 * 8), (6 * 8 * 8, 6 * 8 * 8), (6 * 16 * 8, 6 * 16 * 8), (6 * 8 * 8, 6 * 8 * 8)] * 2
    of_rows = [
        sum(received for sizes in of_ranks for _, received in sizes)
        for of_ranks in zip(*(rows for rows, _ in found), strict=True)
    ]
    assert of_rows[0] < of_rows[2] < of_rows[4]


def test_the_fused_backend_says_what_stays_outside_its_kernel() -> None:
    layer = MultiHeadMoE(DIM, 6, 4, 2, backend="fused")
    assert layer.explain("cuda") == ("fused", "asked for")

    def explain(world: World) -> tuple[str, str]:
        parallelize(layer, strategy="fsdp", world=world, expert_parallel=2)
        return layer.explain("cuda")

    reason = "asked for; rows come from other ranks, so gather, weights and scatter stay outside the kernel"
    assert run_ranks(explain, 2) == [("fused", reason)] * 2


@pytest.mark.parametrize(
    ("world_size", "degree", "strategy", "options", "message"),
    [
        (4, 3, "fsdp", {}, "expert_parallel: 3 must divide the number of processes, 4; use 2 or 4"),
        (2, 4, "fsdp", {}, "expert_parallel: 4 must divide the number of processes, 2; use 2"),
        (2, 2, "ddp", {}, "expert_parallel: 2 needs strategy=fsdp, not 'ddp'"),
    ],
)
def test_impossible_layouts_are_refused(
    world_size: int, degree: int, strategy: Strategy, options: dict[str, Any], message: str
) -> None:
    world = World(0, world_size, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=re.escape(message)):
        parallelize(Stack(Case([1], options=options)), strategy=strategy, world=world, expert_parallel=degree)


def test_models_that_cannot_be_spread_are_refused() -> None:
    def refusals(world: World) -> list[str]:
        messages = []
        capped = MultiHeadMoE(DIM, 6, 4, 2, pools="per_head", capacity_factor=1.0)
        one_head = MultiHeadMoE(DIM, 6, 4, 1, pools="per_head")
        for module in (Stack(Case([1], options={"num_experts": 9})), nn.Linear(3, 3), one_head, capped):
            with pytest.raises(ConfigError) as refused:
                parallelize(module, strategy="fsdp", world=world, expert_parallel=2)
            messages.append(str(refused.value))
        return messages

    assert run_ranks(refusals, 2)[1] == [
        "expert_parallel: 2 must divide the number of experts, 9; use 1 or 3",
        "expert_parallel: 2 needs layers with experts, and this model has none",
        "expert_parallel: 2 must divide the number of heads, 1; use 1",
        "expert_parallel: 2 exchanges whole heads, which cannot have a capacity_factor",
    ]
