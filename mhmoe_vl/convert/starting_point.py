"""A directory for ``init_from``: weights, and the model that they are of, without a run that made them.

model.safetensors    the weights
model.yaml           the model section of a configuration
unread.safetensors   of a BEiT-3 checkpoint, what our model has no place for; only the way back reads it
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from mhmoe_vl.config import Config, dump_config, load_config
from mhmoe_vl.data.files import write_atomically
from mhmoe_vl.distributed.weights import write_weights
from mhmoe_vl.errors import ConfigError, OutputError
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.train import run_directory

MODEL, UNREAD = "model.yaml", "unread.safetensors"


class _ModelFile(Config):
    model: ModelConfig


def refuse_existing(directory: Path) -> None:
    """Refuse to write over a run or a starting point.

    Raises:
        OutputError: the directory is one.
    """
    for name in (run_directory.WEIGHTS, run_directory.CONFIG):
        if (directory / name).exists():
            raise OutputError(f"{directory / name}: exists; choose another --out")


def write_starting_point(
    directory: Path,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    tied: Mapping[str, str] | None = None,
    unread: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the directory, the weights last.

    Args:
        tied: other names of some weights.
        unread: of a BEiT-3 checkpoint.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / MODEL, dump_config(_ModelFile(model=model)).encode())
        if unread:
            write_weights(directory / UNREAD, unread)
        write_weights(directory / run_directory.WEIGHTS, weights, tied)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{directory}: cannot write: {getattr(error, 'strerror', None) or error}") from None


def model_of(directory: Path) -> ModelConfig:
    """The model of a run, or of a directory like the above.

    Raises:
        ConfigError: neither.
    """
    if (directory / run_directory.CONFIG).is_file():
        return run_directory.load_run(directory).model
    if not (directory / MODEL).is_file():
        raise ConfigError(f"{directory}: neither {run_directory.CONFIG} of a run nor {MODEL} is there")
    return load_config(_ModelFile, directory / MODEL).model
