"""Damage, kills and failing disks: a checkpoint is whole or it is not used."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mhmoe_vl.distributed import checkpoint, manifest
from mhmoe_vl.distributed.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_checkpoint_weights,
    save_checkpoint,
)
from mhmoe_vl.distributed.parallel import parallelize
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import CheckpointError, OutputError
from tests.distributed.fork_harness import RankError, run_ranks
from tests.distributed.toy import make_optimizer, make_toy

ONE_PROCESS = World(0, 1, 0, torch.device("cpu"))


def save(root: Path, step: int, world: World = ONE_PROCESS) -> Path:
    toy = make_toy(seed=step)
    module = parallelize(toy, strategy="fsdp", world=world, shard_units=[*toy.blocks])
    optimizer = make_optimizer(module)
    return save_checkpoint(root, step, module=module, optimizer=optimizer, progress={"step": step}, world=world, keep=5)


def load(path: Path) -> dict[str, object]:
    toy = make_toy()
    return load_checkpoint(path, module=toy, optimizer=make_optimizer(toy), world=ONE_PROCESS)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, each in two shards."""
    root = tmp_path_factory.mktemp("run")

    def save_both(world: World) -> None:
        save(root, 1, world)
        save(root, 2, world)

    run_ranks(save_both, 2)
    return root


@pytest.fixture
def root(two_checkpoints: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_checkpoints, tmp_path / "run")


def test_every_flipped_bit_is_noticed(root: Path) -> None:
    newest = root / "step_0000002"
    chance = random.Random(0)
    files = sorted(newest.iterdir())
    assert len(files) == 3
    for file in files:
        intact = file.read_bytes()
        for position in [0, len(intact) - 1, *(chance.randrange(len(intact)) for _ in range(70))]:
            damaged = bytearray(intact)
            damaged[position] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="step_0000002"):
                manifest.verify(newest)
        file.write_bytes(intact)
    manifest.verify(newest)


def test_weights_of_a_damaged_checkpoint_are_not_taken(root: Path) -> None:
    newest = root / "step_0000002"
    toy, original = make_toy(seed=5), make_toy(seed=2)
    load_checkpoint_weights(newest, toy)
    for name, tensor in original.state_dict().items():
        assert torch.equal(toy.state_dict()[name], tensor)
    file = max(newest.glob("*.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    toy = make_toy(seed=5)
    with pytest.raises(CheckpointError, match="step_0000002"):
        load_checkpoint_weights(newest, toy)
    for name, tensor in make_toy(seed=5).state_dict().items():
        assert torch.equal(toy.state_dict()[name], tensor)


def truncate(path: Path) -> None:
    file = max(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def remove_shard(path: Path) -> None:
    max(path.glob("*.safetensors")).unlink()


def remove_manifest(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


def add_shard(path: Path) -> None:
    """The reader takes whatever ``*.safetensors`` it finds, so a stray one must count as damage."""
    shutil.copy(max(path.glob("*.safetensors")), path / "more.safetensors")


def add_pickle(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps({"never": "loaded"}))


def list_manifest(path: Path) -> None:
    (path / "MANIFEST.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"has \d+ bytes, not \d+"),
        (remove_shard, "is missing"),
        (remove_manifest, "MANIFEST.json is unreadable"),
        (add_shard, "more.safetensors is not listed"),
        (add_pickle, ".metadata is not listed"),
        (list_manifest, "MANIFEST.json is unreadable"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    root: Path, damage: Callable[[Path], None], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(root / "step_0000002")
    with pytest.raises(CheckpointError, match=message):
        load(root / "step_0000002")
    latest = latest_checkpoint(root)
    assert latest == root / "step_0000001"
    assert "skipping a damaged checkpoint" in caplog.text
    assert load(latest) == {"step": 1}

    damage(root / "step_0000001")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint \(2 damaged\)"):
        latest_checkpoint(root)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_agree_on_the_checkpoint_to_use(root: Path, rank: int) -> None:
    """Ranks hash different files; what one of them finds must reach the others."""
    shards = sorted((root / "step_0000002").glob("*.safetensors"))
    content = bytearray(shards[rank].read_bytes())
    content[-1] ^= 1
    shards[rank].write_bytes(content)
    assert run_ranks(lambda _: str(latest_checkpoint(root)), 2) == [str(root / "step_0000001")] * 2


@pytest.mark.parametrize(
    ("phase", "victim"),
    [("_write_tensors", 0), ("_write_tensors", 1), ("describe_files", 0), ("describe_files", 1), ("commit", 0)],
)
def test_a_kill_before_the_commit_leaves_nothing_behind_that_counts(root: Path, phase: str, victim: int) -> None:
    def save_killed(world: World) -> None:
        if world.rank == victim:
            setattr(checkpoint, phase, lambda *_: os._exit(9))
        save(root, 3, world)

    with pytest.raises(RankError, match=f"rank {victim} exited with 9"):
        run_ranks(save_killed, 2)
    assert not (root / "step_0000003").exists()
    assert latest_checkpoint(root) == root / "step_0000002"
    save(root, 3)
    assert sorted(path.name for path in root.iterdir()) == [f"step_000000{step}" for step in (1, 2, 3)]


def test_a_kill_right_after_the_commit_keeps_the_checkpoint(root: Path) -> None:
    def save_killed(world: World) -> None:
        checkpoint.delete_old = lambda *_, **__: os._exit(9)
        save(root, 3, world)

    with pytest.raises(RankError, match="rank 0 exited with 9"):
        run_ranks(save_killed, 1)
    assert latest_checkpoint(root) == root / "step_0000003"


def fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("owner", [(dcp.HuggingFaceStorageWriter, "write_data"), (manifest, "flush")])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_write_that_fails_on_one_rank_fails_on_all(root: Path, owner: tuple[object, str], victim: int) -> None:
    def save_failing(world: World) -> str:
        if world.rank == victim:
            setattr(*owner, fail)
        with pytest.raises(OutputError) as caught:
            save(root, 3, world)
        return str(caught.value)

    for message in run_ranks(save_failing, 2):
        assert "step_0000003" in message
        assert "No space left on device" in message
        assert "\n" not in message
    assert sorted(path.name for path in root.iterdir()) == ["step_0000001", "step_0000002"]


def test_an_unwritable_root_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"step_0000001: cannot save: (FileExists|NotADirectory)Error"):
        save(tmp_path / "file", 1)


def test_a_failed_delete_does_not_stop_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "rmtree", fail)
    manifest.delete_old(root, keep=1)
    assert "cannot delete the old checkpoint" in caplog.text
    assert manifest.committed(root) == [root / "step_0000002"]


def test_everything_is_on_disk_before_the_name_that_vouches_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(source: Path, target: Path, **_: object) -> None:
        events.append("rename")
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of descriptors come from /proc")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    save(tmp_path / "run", 1)
    shard = "shard-00001-model-00001-of-00001.safetensors"
    ours = events[-5:]
    assert ours == [shard, "MANIFEST.json", "step_0000001.tmp", "rename", "run"]
