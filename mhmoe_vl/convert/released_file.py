"""Files of tensors as other people's code writes them: ``{"model": state_dict}``, pickled by torch, or safetensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhmoe_vl.data.files import completed
from mhmoe_vl.distributed.weights import load_weights, write_weights
from mhmoe_vl.errors import CheckpointError, OutputError

#: Under which released code looks for weights, in this order.
_KEYS = ("model", "module")
_SAFETENSORS = ".safetensors"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU.

    Of a pickle only tensors and plain containers are read (``weights_only``): whatever else it holds is refused, and
    no code of it runs.

    Raises:
        CheckpointError: absent, damaged, not a state dict, or with other objects than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == _SAFETENSORS:
        return load_weights(path)
    try:
        # A file in torch's newer format is a zip archive, which need not be read at once.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_reason(str(error))}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable torch file: {' '.join(str(error).split())[:200]}") from None
    for key in _KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            return _tensors_of(loaded[key], f"{path}: '{key}'")
    return _tensors_of(loaded, str(path))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors if the name says so, otherwise what the released code reads: ``{"model": tensors}``.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    if path.exists():
        raise OutputError(f"{path}: exists; choose another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == _SAFETENSORS:
            write_weights(path, tensors)
        else:
            with completed(path) as temporary:
                torch.save({_KEYS[0]: dict(tensors)}, temporary)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from None


def _tensors_of(loaded: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{where}: not a state dict but {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{where}: not a state dict: {name!r} is {type(value).__name__}, and a tensor is expected; weights are "
                f"looked for under {' and '.join(map(repr, _KEYS))}"
            )
    return dict(loaded)


def _reason(message: str) -> str:
    """Torch's advice spreads over lines and names ways round the check."""
    found = message.partition("Unsupported global: GLOBAL ")[2].split()
    if found:
        return (
            f"holds {found[0]}, and only tensors are read from a pickle; where you trust the file, save its weights "
            "alone: torch.save({'model': torch.load(FILE, weights_only=False)['model']}, NEW_FILE)"
        )
    return f"not a readable torch file: {' '.join(message.split())[:200]}"
