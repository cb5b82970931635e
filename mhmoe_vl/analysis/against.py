"""The encoder of another checkpoint, to compare decisions with."""

from __future__ import annotations

import copy
from pathlib import Path

from mhmoe_vl.distributed.checkpoint import load_checkpoint_weights
from mhmoe_vl.distributed.manifest import MANIFEST
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.errors import CheckpointError, ConfigError
from mhmoe_vl.models.encoder import MultiwayEncoder
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.trained import TrainedRun

_ENCODER = "encoder."
#: Settings of a model that change neither its weights nor what its routers decide.
_FREE = {
    "drop_path",
    "checkpoint_activations",
    "moe.backend",
    "moe.balance_weight",
    "moe.z_weight",
    "moe.selection_bias_rate",
    # Heads, which the encoder does not have.
    "num_visual_codes",
    "tie_embeddings",
}


def load_other_encoder(trained: TrainedRun, path: Path) -> MultiwayEncoder:
    """An encoder like that of ``trained`` with the weights at ``path``.

    Args:
        path: another finished run of the same encoder, perhaps of another task; or a checkpoint of a run,
            ``checkpoints/step_0000100``.

    Raises:
        ConfigError: neither, or a run with another encoder.
        CheckpointError: damaged, or weights of another shape.
    """
    if (path / MANIFEST).is_file():
        whole = copy.deepcopy(trained.task)
        load_checkpoint_weights(path, whole)
        return whole.encoder
    if not (path / run_directory.CONFIG).is_file():
        raise ConfigError(
            f"{path}: neither a run directory ({run_directory.CONFIG} is missing) nor a checkpoint; give a run, or "
            "one of its checkpoints/step_*"
        )
    _require_same_encoder(trained, path)
    file = path / run_directory.WEIGHTS
    if not file.is_file():
        raise ConfigError(f"{file}: no weights, the run has not finished; give one of its checkpoints/step_* instead")
    weights = {name.removeprefix(_ENCODER): value for name, value in load_weights(file).items() if _is_encoder(name)}
    encoder = copy.deepcopy(trained.task.encoder)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{file}: {' '.join(str(error).split())[:300]}") from None
    return encoder


def _is_encoder(name: str) -> bool:
    return name.startswith(_ENCODER)


def _require_same_encoder(trained: TrainedRun, path: Path) -> None:
    here, there = (config.model.model_dump(mode="json") for config in (trained.config, run_directory.load_run(path)))
    changes = {
        f"model.{key}": change for key, change in run_directory.differences(there, here).items() if key not in _FREE
    }
    if changes:
        described = run_directory.describe_changes(changes)
        raise ConfigError(
            f"{path}: is a run of another encoder than {trained.config.out} ({described}); "
            "routing can only be compared between checkpoints of one architecture"
        )
