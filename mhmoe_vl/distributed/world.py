"""The processes that train together, as torchrun started them; without torchrun, a world of one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mhmoe_vl.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among ``world_size`` others, and the device that it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that logs and writes shared files."""
        return self.rank == 0

    @property
    def mesh_device(self) -> str:
        """Type of device for a mesh of all ranks. The meta device, on which layouts are checked without memory, cannot
        have one."""
        return "cpu" if self.device.type == "meta" else self.device.type


@contextmanager
def open_world(device: str = "auto", *, timeout: timedelta = timedelta(minutes=10)) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment and leave it at exit.

    CPU tensors always travel over gloo, CUDA tensors over NCCL, so small flags and JSON never wait for the GPU.

    Args:
        device: ``auto`` (CUDA if there is any), ``cpu`` or ``cuda``; each local rank takes the GPU of its number.
        timeout: how long a collective waits for a rank that does not come before it raises.

    Raises:
        ConfigError: the device does not exist, or there are more local ranks than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not _is_launched():
        yield World(rank=0, world_size=1, local_rank=0, device=chosen)
        return
    world = World(int(os.environ["RANK"]), launched_world_size(), local_rank, chosen)
    _warn_about_shared_store(world)
    on_cuda = chosen.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout, device_id=chosen if on_cuda else None
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def launched_world_size() -> int:
    """The number of processes that torchrun started, known before they form a group; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if _is_launched() else 1


def launched_rank() -> int:
    """This process among those that torchrun started, known before they form a group; 0 without torchrun."""
    return int(os.environ["RANK"]) if _is_launched() else 0


def _is_launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: '{device}' must be auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        error = ConfigError(
            f"device: local rank {local_rank} has no GPU ({num_gpus} visible); "
            f"use device=cpu or torchrun --nproc-per-node {max(num_gpus, 1)}"
        )
        # The first of a machine's ranks without a GPU speaks for the others.
        error.is_shared = local_rank > num_gpus
        raise error
    return torch.device("cuda", local_rank)


def _warn_about_shared_store(world: World) -> None:
    """A restarted worker that reuses the agent's store reads addresses of dead ranks (pytorch#135712)."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if world.is_main and restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        logger.warning(
            "torchrun --max-restarts %d often cannot recover with a shared store: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun",
            restarts,
        )
