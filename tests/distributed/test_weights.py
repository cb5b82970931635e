"""Exported weights equal the state dict, whatever strategy held them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mhmoe_vl.distributed.parallel import Strategy, parallelize
from mhmoe_vl.distributed.weights import export_weights, load_weights
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import CheckpointError, OutputError
from tests.distributed.fork_harness import run_ranks
from tests.distributed.toy import make_toy

ONE_PROCESS = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp", 3)])
def test_export_equals_the_state_dict_of_the_plain_module(tmp_path: Path, strategy: Strategy, world_size: int) -> None:
    path = tmp_path / "export" / "model.safetensors"

    def export(world: World) -> None:
        toy = make_toy()
        module = parallelize(toy, strategy=strategy, world=world, shard_units=[*toy.blocks])
        export_weights(path, module, world=world)

    run_ranks(export, world_size)
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    expected = make_toy().state_dict()
    weights = load_weights(path)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    assert make_toy(seed=1).load_state_dict(weights).missing_keys == []


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export_weights(path, make_toy(), world=ONE_PROCESS)
    with safe_open(path, framework="pt") as file:
        assert "embedding.weight" in file.keys()  # noqa: SIM118
        assert "head.weight" not in file.keys()  # noqa: SIM118
    weights = load_weights(path)
    assert weights["head.weight"] is weights["embedding.weight"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_the_weights_is_for_the_umask_to_say(tmp_path: Path, umask: int, mode: int) -> None:
    path = tmp_path / "model.safetensors"
    before = os.umask(umask)
    try:
        export_weights(path, make_toy(), world=ONE_PROCESS)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    pickled = tmp_path / "model.pt"
    torch.save(make_toy().state_dict(), pickled)
    cut = tmp_path / "cut.safetensors"
    export_weights(cut, make_toy(), world=ONE_PROCESS)
    cut.write_bytes(cut.read_bytes()[:-1])
    for path in (pickled, cut, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=f"{path.name}: not a readable safetensors file"):
            load_weights(path)


def test_failure_of_the_writing_rank_reaches_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def export(world: World) -> None:
        with pytest.raises(OutputError, match="cannot write weights"):
            export_weights(tmp_path / "file" / "model.safetensors", make_toy(), world=world)

    run_ranks(export, 2)
