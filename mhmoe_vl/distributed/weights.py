"""The weights of a model as one safetensors file, whatever strategy trained it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mhmoe_vl.distributed.collectives import fail_together
from mhmoe_vl.distributed.manifest import flush
from mhmoe_vl.distributed.parallel import unwrap
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import CheckpointError, OutputError

_TIED = "tied"


def tensor_names(module: nn.Module) -> dict[Tensor, list[str]]:
    """Parameters and persistent buffers of the unwrapped ``module``, each with its names (several if tied)."""
    names: dict[Tensor, list[str]] = {}
    for name, tensor in unwrap(module).state_dict(keep_vars=True).items():
        names.setdefault(tensor, []).append(name)
    return names


def export_weights(path: Path, module: nn.Module, *, world: World) -> None:
    """Write the whole state dict of the unwrapped ``module`` to the file ``path``. Collective; rank 0 writes.

    A tied weight is stored once, under its first name; the file's metadata maps its other names to that one.

    Raises:
        OutputError: on every rank, if the file cannot be written; an older file of that name is then untouched.
    """
    weights: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    with _without_advice():
        for tensor, (name, *aliases) in tensor_names(module).items():
            # One tensor at a time: only rank 0 ever holds the whole model, in host memory.
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if world.is_main:
                weights[name] = whole.detach().cpu().contiguous()
                tied.update(dict.fromkeys(aliases, name))
    with fail_together(OutputError, f"{path}: cannot write weights"):
        if world.is_main:
            write_weights(path, weights, tied)


def write_weights(path: Path, weights: Mapping[str, Tensor], tied: Mapping[str, str] | None = None) -> None:
    """Write what :func:`load_weights` reads. Not collective.

    Args:
        weights: on the CPU, contiguous, and without memory in common.
        tied: other names of some of them.

    Raises:
        OSError, SafetensorError: the file cannot be written; an older file of that name is then untouched.
    """
    partial = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Safetensors makes a file that only its owner may read; an ordinary one tells what the umask allows.
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    save_file(dict(weights), partial, metadata={"format": "pt", _TIED: json.dumps(dict(tied or {}))})
    partial.chmod(mode)
    flush(partial)
    partial.replace(path)
    flush(path.parent)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Torch warns that experts, sharded on two axes, are gathered in two steps; that is so, and exact."""
    advisor = logging.getLogger("torch.distributed.tensor._redistribute")
    level = advisor.level
    advisor.setLevel(logging.ERROR)
    try:
        yield
    finally:
        advisor.setLevel(level)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, complete for ``load_state_dict`` of the module that was exported. Not collective.

    Any safetensors file will do; pickled weights (``.pt``, ``.bin``) are refused unread.

    Raises:
        CheckpointError: the file is missing or is not an undamaged safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tied = json.loads((file.metadata() or {}).get(_TIED, "{}"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
    return {**weights, **{alias: weights[name] for alias, name in tied.items()}}
