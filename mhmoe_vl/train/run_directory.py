"""The run directory: everything needed to resume, evaluate or publish a run, without the machine that made it.

config.yaml            the resolved configuration; evaluation rebuilds the model from this file alone
environment.json       versions, git commit, command, world size
cost.json              parameters, FLOPs and assignments per token
metrics.jsonl          one record per logged step and validation
tensorboard/
checkpoints/step_*/    what training resumes from
model.safetensors      the final weights
text_tokenizer.json, answers.json, visual_codebook.safetensors   copies of what the configuration names
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mhmoe_vl.config import dump_config, load_config
from mhmoe_vl.data.files import write_atomically
from mhmoe_vl.errors import ConfigError, OutputError
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import METRICS

CONFIG, ENVIRONMENT, COST, WEIGHTS = "config.yaml", "environment.json", "cost.json", "model.safetensors"
TOKENIZER, ANSWERS, CODEBOOK = "text_tokenizer.json", "answers.json", "visual_codebook.safetensors"
_PACKAGES = ("mhmoe_vl", "torch", "torchvision", "timm", "open_clip_torch", "webdataset", "tokenizers", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write a file that is either old or complete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def prepare(config: RunConfig, *, world_size: int) -> RunConfig:
    """Create the directory of a run, or check that an existing one is the same run; return the configuration with
    its auxiliary files pointing into the directory.

    Raises:
        OutputError: the directory cannot be written, or holds another run.
        ConfigError: a file that the configuration names does not exist.
    """
    directory = Path(config.out)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory}: cannot create the run directory: {error.strerror}") from None
    path = directory / CONFIG
    # A start that failed before the first step leaves a configuration, which the next try may correct.
    has_begun = (directory / METRICS).exists()
    if has_begun:
        _require_same_run(config, load_config(RunConfig, path))
    local = _with_local_files(config, directory, may_replace=not has_begun)
    write_text(path, dump_config(local))
    write_text(directory / ENVIRONMENT, json.dumps(environment(world_size), indent=2) + "\n")
    return local


def load_run(directory: str | Path) -> RunConfig:
    """Configuration of a finished or interrupted run.

    Raises:
        ConfigError: not a run directory.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory}: not a run directory: {CONFIG} is missing")
    return load_config(RunConfig, directory / CONFIG, [f"out={directory}"])


def environment(world_size: int) -> dict[str, Any]:
    """Versions and circumstances of this process; nothing that identifies the machine or its user."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": world_size,
        "num_threads": torch.get_num_threads(),
    }


def _with_local_files(config: RunConfig, directory: Path, *, may_replace: bool) -> RunConfig:
    """Copy the small files that the run depends on, so that the directory stands alone."""
    copy = partial(_copy, may_replace=may_replace)
    data = config.data.model_copy(update={"text_tokenizer": copy(config.data.text_tokenizer, directory / TOKENIZER)})
    task = config.task
    if task.kind == "vqa":
        task = task.model_copy(update={"answers": copy(task.answers, directory / ANSWERS)})
    elif task.kind == "pretrain":
        task = task.model_copy(update={"visual_codebook": copy(task.visual_codebook, directory / CODEBOOK)})
    return config.model_copy(update={"data": data, "task": task})


def _copy(source: str, target: Path, *, may_replace: bool) -> str:
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}, but the configuration names it for {target.stem}") from None
    if not target.exists() or (may_replace and target.read_bytes() != content):
        write_atomically(target, content)
    elif target.read_bytes() != content:
        raise OutputError(
            f"{target.parent}: holds another run ({source} differs from its {target.name}); choose another out= or "
            "restore that file"
        )
    return str(target)


#: Settings that may change when a run is continued; everything else would make it another run.
_FREE = (
    "out",
    "device",
    "strategy",
    "expert_parallel",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_steps",
)


def _require_same_run(new: RunConfig, old: RunConfig) -> None:
    left, right = (_flatten(c.model_dump(mode="json")) for c in (new, old))
    changed = [
        f"{key} was {right.get(key)!r}, is {left.get(key)!r}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and key.split(".")[0] not in _FREE and key not in _FREE_DATA
    ]
    if changed:
        raise OutputError(
            f"{new.out}: holds another run ({'; '.join(changed[:3])}); choose another out= or restore those settings"
        )


_FREE_DATA = (
    "data.num_workers",
    "data.validation_batch_size",
    "data.text_tokenizer",
    "task.answers",
    "task.visual_codebook",
)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of this checkout, with ``+`` if it has uncommitted changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()
