"""Joining the process group that torchrun describes."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

from mhmoe_vl.distributed.collectives import gather_objects
from mhmoe_vl.distributed.world import World, open_world
from mhmoe_vl.errors import ConfigError
from tests.distributed.fork_harness import run_ranks


@pytest.fixture(autouse=True)
def outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_there_is_one_process_and_no_group() -> None:
    with open_world("cpu") as world:
        assert world == World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
        assert world.is_main
        assert not dist.is_initialized()


def test_torchrun_environment_makes_a_group_and_takes_it_down() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def join(harness: World) -> list[object]:
        dist.destroy_process_group()
        os.environ |= {
            "RANK": str(harness.rank),
            "LOCAL_RANK": str(harness.rank),
            "WORLD_SIZE": str(harness.world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        with open_world("cpu") as world:
            seen = gather_objects([world.rank, world.world_size, world.is_main, str(world.device)])
        assert not dist.is_initialized()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return seen

    assert run_ranks(join, 2) == [[[0, 2, True, "cpu"], [1, 2, False, "cpu"]]] * 2


def test_devices_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'tpu' must be auto, cpu or cuda"), open_world("tpu"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"local rank 2 has no GPU \(2 visible\)"), open_world("auto"):
        pass


@pytest.mark.parametrize(("shared", "restarts"), [("True", "3"), ("False", "3"), ("True", "0")])
def test_restarts_over_a_shared_store_are_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, shared: str, restarts: str
) -> None:
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": shared,
        "TORCHELASTIC_MAX_RESTARTS": restarts,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with open_world("cpu"):
        pass
    advised = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text
    assert advised == (shared == "True" and restarts != "0")
