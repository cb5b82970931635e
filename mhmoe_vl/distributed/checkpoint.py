"""Training checkpoints that resume bit for bit, also with another strategy or world size, or are refused.

``step_0000100/`` holds one safetensors file per rank (its shards of parameters, buffers, averages and AdamW state,
written and resharded by ``torch.distributed.checkpoint``) and a manifest; nothing in it is a pickle. All functions are
collective, and ``root`` must be on a file system that all ranks share.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from mhmoe_vl.distributed.average import WeightAverage
from mhmoe_vl.distributed.collectives import broadcast_object, fail_together
from mhmoe_vl.distributed.manifest import (
    checkpoint_path,
    commit,
    committed,
    delete_old,
    describe_files,
    partial_path,
    verify,
)
from mhmoe_vl.distributed.weights import tensor_names
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import CheckpointError, ConfigError, OutputError, UserError

logger = logging.getLogger(__name__)

#: What the names of parameters and buffers begin with, beside those of the optimizer's tensors and of averages.
_MODEL, _AVERAGE = "model.", "average."


def save_checkpoint(
    root: Path,
    step: int,
    *,
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    progress: dict[str, Any],
    world: World,
    keep: int,
    average: WeightAverage | None = None,
) -> Path:
    """Write ``root/step_<step>``, then delete all but the newest ``keep`` complete checkpoints.

    Args:
        optimizer: AdamW over parameters of ``module``. Its tensors are saved; learning rates and other settings of its
            groups are not, they come from the configuration of the run that resumes.
        progress: JSON-able and equal on all ranks; :func:`load_checkpoint` returns it.
        average: of the parameters, if the run keeps one.

    Raises:
        OutputError: on every rank, if any rank could not write, or an intact checkpoint of this step exists.
    """
    if keep < 1:
        raise ConfigError(f"checkpoints to keep: {keep} must be at least 1")
    manifest = {
        "step": step,
        "world_size": world.world_size,
        "torch_version": str(torch.__version__),
        "progress": json.loads(json.dumps(progress)),
    }
    path = checkpoint_path(root, step)
    partial = partial_path(path)
    _set_aside_damaged(path, world)
    try:
        with fail_together(OutputError, f"{path}: cannot save"):
            if world.is_main:
                _make_room(root, partial)
        _write_tensors(partial, _training_state(module, optimizer, average))
        manifest["files"] = describe_files(partial)
        with fail_together(OutputError, f"{path}: cannot save"):
            if world.is_main:
                commit(partial, path, manifest)
    except UserError:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if world.is_main:
        delete_old(root, keep=keep)
    return path


def load_checkpoint(
    path: Path,
    *,
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    world: World,
    average: WeightAverage | None = None,
) -> dict[str, Any]:
    """Verify ``path``, load it in place into ``module``, ``optimizer`` and ``average``, and return its progress.

    Raises:
        CheckpointError: on every rank, if the checkpoint is damaged, or its tensors differ in name, shape or dtype from
            those of ``module``, ``optimizer`` and ``average``; nothing has been loaded then.
    """
    manifest = verify(path)
    state = _training_state(module, optimizer, average)
    reader = dcp.HuggingFaceStorageReader(str(path))
    with fail_together(CheckpointError, f"{path}: cannot load"):
        _require_same_tensors(state, reader.read_metadata().state_dict_metadata)
    with fail_together(CheckpointError, f"{path}: cannot load"), _dcp_call():
        dcp.load(state, storage_reader=reader)
    if world.is_main:
        logger.info("resumed from %s, written by %d ranks", path, manifest["world_size"])
    return manifest["progress"]


def load_checkpoint_weights(path: Path, module: nn.Module) -> None:
    """Verify ``path`` and load its parameters and buffers in place into ``module``: as they were trained, no averages.

    Raises:
        CheckpointError: on every rank, if the checkpoint is damaged, or is not of such a module; nothing has been
            loaded then.
    """
    verify(path)
    state = {f"{_MODEL}{names[0]}": tensor.detach() for tensor, names in tensor_names(module).items()}
    reader = dcp.HuggingFaceStorageReader(str(path))
    with fail_together(CheckpointError, f"{path}: cannot load"):
        stored = reader.read_metadata().state_dict_metadata
        _require_same_tensors(state, {name: stored[name] for name in stored if name.startswith(_MODEL)})
    with fail_together(CheckpointError, f"{path}: cannot load"), _dcp_call():
        dcp.load(state, storage_reader=reader)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint under ``root`` that verifies; ``None`` if there never was one.

    Raises:
        CheckpointError: checkpoints exist and all are damaged; to start anew silently would hide the loss.
    """
    names = broadcast_object([path.name for path in committed(root)])
    for name in reversed(names):
        try:
            verify(root / name)
        except CheckpointError as error:
            if not dist.is_initialized() or dist.get_rank() == 0:
                logger.warning("skipping a damaged checkpoint: %s", error)
        else:
            return root / name
    if names:
        raise CheckpointError(f"{root}: no intact checkpoint ({len(names)} damaged); remove them to start anew")
    return None


def _training_state(
    module: nn.Module, optimizer: torch.optim.AdamW, average: WeightAverage | None
) -> dict[str, Tensor]:
    """Every tensor that training changes, under a name that depends on neither strategy nor world size."""
    names = {tensor: aliases[0] for tensor, aliases in tensor_names(module).items()}
    state = {f"{_MODEL}{name}": tensor.detach() for tensor, name in names.items()}
    if average is not None:
        state |= {f"{_AVERAGE}{name}": tensor for name, tensor in average.tensors.items()}
    for group in optimizer.param_groups:
        on_device = bool(group["fused"] or group["capturable"])
        for parameter in group["params"]:
            moments = optimizer.state[parameter]
            if not moments:
                moments.update(_initial_adamw_state(parameter, step_on_device=on_device))
            state.update({f"optimizer.{names[parameter]}.{key}": value for key, value in moments.items()})
    return state


def _initial_adamw_state(parameter: Tensor, *, step_on_device: bool) -> dict[str, Tensor]:
    """What AdamW itself creates at the first gradient, for a parameter that has had none."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if step_on_device else "cpu"),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


def _write_tensors(partial: Path, state: dict[str, Tensor]) -> None:
    with fail_together(OutputError, f"{partial}: cannot save"), _dcp_call():
        if not partial.is_dir():
            raise OutputError("rank 0 made this directory and another rank does not see it; share the file system")
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        dcp.save(state, storage_writer=writer)


@contextmanager
def _dcp_call() -> Iterator[None]:
    """DCP tells all ranks what failed on one, but by a BaseException, which ``except Exception`` misses.

    It also warns about a world of one.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failures = [f"rank {rank}: {failure!r}" for rank, (failure, _) in error.failures.items()]
        raise RuntimeError("; ".join(failures)) from error


def _require_same_tensors(state: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    """DCP alone would accept extra names and cast dtypes without a word."""
    problems = []
    for verb, names in (
        ("lacks", sorted(state.keys() - stored.keys())),
        ("has unexpected", sorted(stored.keys() - state.keys())),
    ):
        if names:
            problems.append(f"the checkpoint {verb} {len(names)} tensors: {_first_few(names)}")
    for name in sorted(state.keys() & stored.keys()):
        here = f"{list(state[name].shape)} {state[name].dtype}"
        there = f"{list(stored[name].size)} {stored[name].properties.dtype}"
        if here != there:
            problems.append(f"{name} is {there} in the checkpoint and {here} in the model")
    if problems:
        raise CheckpointError(f"{_first_few(problems)}; resume with the configuration that it was saved with")


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _make_room(root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _set_aside_damaged(path: Path, world: World) -> None:
    """A run that resumed from before a damaged checkpoint reaches its step again and must be able to save it."""
    if not broadcast_object(path.exists()):
        return
    try:
        verify(path)
    except CheckpointError:
        with fail_together(OutputError, f"{path}: cannot move the damaged checkpoint aside"):
            if world.is_main:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    else:
        raise OutputError(f"{path}: exists and is intact; resume from it, or train into another directory")
