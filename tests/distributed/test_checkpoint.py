"""Resume is exact, for the same and for other layouts; states that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mhmoe_vl.distributed.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from mhmoe_vl.distributed.parallel import Strategy, accumulating, clip_grad_norm, parallelize, unwrap
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import CheckpointError, ConfigError, OutputError
from tests.distributed.fork_harness import run_ranks
from tests.distributed.toy import make_optimizer, make_rows, make_toy

ONE_PROCESS = World(0, 1, 0, torch.device("cpu"))
Run = tuple[nn.Module, torch.optim.AdamW]


def start(world: World, strategy: Strategy, seed: int = 0, lr: float = 0.01, **options: Any) -> Run:
    toy = make_toy(seed, **options)
    module = parallelize(toy, strategy=strategy, world=world, shard_units=[*toy.blocks])
    return module, make_optimizer(module, lr)


def train(run: Run, world: World, steps: range) -> None:
    module, optimizer = run
    dtype = next(module.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        for part in range(2):
            rows = {"image": 1 + world.rank, "text": 2, "pair": 1 + part}
            batch = {kind: make_rows(100 * step + world.rank, n, dtype) for kind, n in rows.items()}
            with accumulating(module, is_last=part == 1):
                module(batch).backward()
        clip_grad_norm(module, 1.0)
        optimizer.step()


def whole_state(run: Run) -> dict[str, Tensor]:
    """Everything that training changes, gathered by hand rather than by the code under test."""
    module, optimizer = run
    state = dict(unwrap(module).state_dict())
    for name, parameter in unwrap(module).named_parameters():
        state |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for k, t in state.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit; Adam state that one side has not created yet counts as zeros."""
    for name in found.keys() - expected.keys():
        assert "/" in name
        assert not found[name].any(), name
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def save(root: Path, step: int, run: Run, world: World = ONE_PROCESS, keep: int = 3) -> Path:
    module, optimizer = run
    progress = {"samples": {"coco": 12345678901}, "loss": 0.1 + step}
    return save_checkpoint(root, step, module=module, optimizer=optimizer, progress=progress, world=world, keep=keep)


def load(path: Path, run: Run, world: World = ONE_PROCESS) -> dict[str, Any]:
    module, optimizer = run
    return load_checkpoint(path, module=module, optimizer=optimizer, world=world)


def trained(seed: int = 0, **options: Any) -> Run:
    run = start(ONE_PROCESS, "none", seed, **options)
    train(run, ONE_PROCESS, range(1))
    return run


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)])
def test_two_and_two_steps_are_bitwise_four(tmp_path: Path, strategy: Strategy, world_size: int) -> None:
    def run_both(world: World) -> None:
        unbroken = start(world, strategy)
        train(unbroken, world, range(4))
        first = start(world, strategy)
        train(first, world, range(2))
        save(tmp_path, 2, first, world)
        resumed = start(world, strategy, seed=99)
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        assert load(latest, resumed, world) == {"samples": {"coco": 12345678901}, "loss": 2.1}
        train(resumed, world, range(2, 4))
        assert_equal(whole_state(resumed), whole_state(unbroken))

    run_ranks(run_both, world_size)


@pytest.mark.parametrize(
    ("dtype", "savers", "loaders"),
    [
        (torch.float32, [("ddp", 2), ("fsdp", 3)], [("fsdp", 2), ("fsdp", 4)]),
        (torch.bfloat16, [("fsdp", 2)], [("fsdp", 1)]),
    ],
)
def test_any_layout_loads_any_other_exactly(
    tmp_path: Path, dtype: torch.dtype, savers: list[tuple[Strategy, int]], loaders: list[tuple[Strategy, int]]
) -> None:
    def save_as(strategy: Strategy, name: str, world: World) -> dict[str, Tensor]:
        run = start(world, strategy, dtype=dtype)
        train(run, world, range(2))
        # A forward without backward leaves the root of FSDP2 gathered: it is the shards that must be saved.
        with torch.no_grad():
            run[0]({"text": make_rows(0, 1, dtype)})
        save(tmp_path / name, 2, run, world)
        return whole_state(run)

    expected = {"single": save_as("none", "single", ONE_PROCESS)}
    for strategy, world_size in savers:
        name = f"{strategy}{world_size}"
        expected[name] = run_ranks(lambda w, s=strategy, n=name: save_as(s, n, w), world_size)[0]

    def load_all(strategy: Strategy, world: World) -> None:
        for name, state in expected.items():
            run = start(world, strategy, seed=world.rank + 1, dtype=dtype)
            load(tmp_path / name / "step_0000002", run, world)
            assert_equal(whole_state(run), state)

    load_all("none", ONE_PROCESS)
    for strategy, world_size in loaders:
        run_ranks(lambda w, s=strategy: load_all(s, w), world_size)


def test_the_configuration_keeps_its_hyper_parameters(tmp_path: Path) -> None:
    path = save(tmp_path, 1, trained())
    resumed = start(ONE_PROCESS, "none", lr=0.5)
    load(path, resumed)
    assert [group["lr"] for group in resumed[1].param_groups] == [0.5, 0.25]
    assert [group["lr_scale"] for group in resumed[1].param_groups] == [1.0, 0.5]


def test_saving_does_not_disturb_training(tmp_path: Path) -> None:
    """Adam state is created early for parameters without gradient; their later steps must not notice."""
    plain, saved = (start(ONE_PROCESS, "none") for _ in range(2))
    save(tmp_path, 0, saved)
    for module, optimizer in (plain, saved):
        train((module, optimizer), ONE_PROCESS, range(2))
        module.never_used.grad = torch.ones(3, dtype=torch.float64)
        optimizer.step()
    assert_equal(whole_state(saved), whole_state(plain))


def test_files_hold_no_pickle(tmp_path: Path) -> None:
    def save_rank(world: World) -> None:
        run = start(world, "fsdp")
        train(run, world, range(1))
        save(tmp_path, 1, run, world)

    run_ranks(save_rank, 2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", ".safetensors", ".safetensors"]
    for path in files:
        content = path.read_bytes()
        assert b"torch._utils" not in content
        if path.suffix == ".safetensors":
            header_size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + header_size])
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            assert 8 + header_size + end == len(content)
        else:
            json.loads(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 1}, r"has unexpected \d+ tensors: model\.blocks\.1\..* and \d+ more"),
        ({"num_blocks": 3}, r"lacks \d+ tensors: model\.blocks\.2\."),
        ({"dtype": torch.float32}, r"is \[\d+\] torch\.float64 in the checkpoint and \[\d+\] torch\.float32 in the"),
    ],
)
def test_another_model_is_refused_before_anything_is_loaded(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = save(tmp_path, 1, trained())
    other = trained(seed=5, **options)
    before = whole_state(other)
    with pytest.raises(CheckpointError, match=message):
        load(path, other)
    assert_equal(whole_state(other), before)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, trained())
    run = start(ONE_PROCESS, "none")
    run[0].image_scale = nn.Parameter(torch.ones(7, dtype=torch.float64))
    other = (run[0], make_optimizer(run[0]))
    with pytest.raises(CheckpointError, match=r"image_scale is \[6\] .* in the checkpoint and \[7\] .* in the model"):
        load(path, other)


def test_saving_the_same_step_again_is_refused_unless_it_is_damaged(tmp_path: Path) -> None:
    run = trained()
    path = save(tmp_path, 1, run)
    with pytest.raises(OutputError, match="exists and is intact"):
        save(tmp_path, 1, run)
    assert load(path, trained(seed=3))["loss"] == 1.1

    next(path.glob("*.safetensors")).write_bytes(b"")
    save(tmp_path, 1, run)
    assert latest_checkpoint(tmp_path) == path
    assert (tmp_path / "step_0000001.damaged").is_dir()


def test_retention_counts_only_complete_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trained()
    for step in (1, 2, 3):
        save(tmp_path, step, run, keep=10)
    for step in (7, 8, 9):
        (tmp_path / f"step_{step:07d}").mkdir()
    save(tmp_path, 4, run, keep=2)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "4", "7", "8", "9"]
    assert "step_0000009 does not count" in caplog.text
    assert latest_checkpoint(tmp_path) == tmp_path / "step_0000004"
    with pytest.raises(ConfigError, match="0 must be at least 1"):
        save(tmp_path, 5, run, keep=0)


def test_an_empty_or_missing_root_has_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step_0000001.tmp").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
