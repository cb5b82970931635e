"""Run a function on several gloo ranks by forking: a process group of four is up in a fraction of a second."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

# Imported before the fork, or every child would spend seconds on them at its first collective.
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

from mhmoe_vl.distributed import expert_parallel, parallel
from mhmoe_vl.distributed.world import World

ResultT = TypeVar("ResultT")

# Autograd counts devices at its first backward pass. Once this process has used FSDP2 it would find one, start a thread
# for it, and refuse to work in forked processes.
torch.ones((), requires_grad=True).backward()


class RankError(AssertionError):
    """A rank raised, or ended without a word."""


def run_ranks(function: Callable[[World], ResultT], world_size: int, *, timeout: float = 120.0) -> list[ResultT]:
    """``function(world)`` on ``world_size`` CPU ranks; their results in rank order.

    Raises:
        RankError: with the traceback of each rank that raised, or the exit code of one that died.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("the multi-process tests need fork")
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            fork.Process(target=_child, args=(function, rank, world_size, f"{folder}/store", sender))
            for rank, (_, sender) in enumerate(pipes)
        ]
        # A collection in a child would walk over all that this process holds, and so copy the pages that it is on.
        gc.freeze()
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        gc.unfreeze()
        try:
            outcomes = _collect([receiver for receiver, _ in pipes], timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                process.kill()
                process.join()
    silent = [f"rank {r} exited with {processes[r].exitcode}" for r in range(world_size) if r not in outcomes]
    failures = [f"rank {rank}: {outcome[1]}" for rank, outcome in sorted(outcomes.items()) if not outcome[0]]
    if silent or failures:
        raise RankError("\n".join([*silent, *failures]))
    return [outcomes[rank][1] for rank in range(world_size)]


def _collect(receivers: list[Connection], timeout: float) -> dict[int, tuple[bool, Any]]:
    outcomes = {}
    deadline = time.monotonic() + timeout
    pending: list[Connection] = list(receivers)
    while pending and (remaining := deadline - time.monotonic()) > 0:
        for receiver in wait(pending, remaining):
            pending.remove(receiver)  # type: ignore[arg-type]
            try:
                outcomes[receivers.index(receiver)] = pickle.loads(receiver.recv_bytes())  # type: ignore[arg-type,union-attr]
            except EOFError:
                continue
    return outcomes


def _child(function: Callable[[World], Any], rank: int, world_size: int, store: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=Path(store).as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=20),
        )
        # Without a collective in it, a quick rank would leave while others still connect to it.
        dist.barrier()
        # A mesh makes groups, and a group sockets between all pairs: many cases of one layout share theirs.
        for module in (expert_parallel, parallel):
            module.init_device_mesh = functools.cache(module.init_device_mesh)
        result = function(World(rank, world_size, rank, torch.device("cpu")))
        dist.destroy_process_group()
        sender.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
