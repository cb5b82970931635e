"""The run directory: everything needed to resume, evaluate or publish a run, without the machine that made it.

config.yaml            the resolved configuration; evaluation rebuilds the model from this file alone
environment.json       versions, git commit, command, world size of the last start that trained, from which step on and
                       with which settings changed; those of earlier starts under "earlier"
cost.json              parameters, FLOPs and assignments per token
metrics.jsonl          one record per logged step and validation
tensorboard/
checkpoints/step_*/    what training resumes from
model.safetensors      the final weights
visual_tokenizer.safetensors   of a run that trains one: what pretraining names as its visual_codebook
text_tokenizer.json, answers.json, classes.json, visual_codebook.safetensors   copies of what the configuration names
"""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from fnmatch import fnmatchcase
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mhmoe_vl.config import dump_config, load_config
from mhmoe_vl.data.files import write_atomically
from mhmoe_vl.errors import ConfigError, DataError, OutputError
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import METRICS

CONFIG, ENVIRONMENT, COST, WEIGHTS = "config.yaml", "environment.json", "cost.json", "model.safetensors"
CHECKPOINTS = "checkpoints"
TOKENIZER, CODEBOOK = "text_tokenizer.json", "visual_codebook.safetensors"
VISUAL_TOKENIZER = "visual_tokenizer.safetensors"
ANSWERS, CLASSES = "answers.json", "classes.json"

logger = logging.getLogger(__name__)

_PACKAGES = ("mhmoe_vl", "torch", "torchvision", "timm", "open_clip_torch", "webdataset", "tokenizers", "numpy")


def prepare(config: RunConfig) -> RunConfig:
    """Create the directory of a run, or check that an existing one is the same run; return the configuration with
    its auxiliary files pointing into the directory. What is known about the run is left as it is.

    Raises:
        OutputError: the directory cannot be written, or holds another run.
        ConfigError: a file that the configuration names does not exist.
    """
    directory = Path(config.out)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory}: cannot create the run directory: {error.strerror}") from None
    # A start that failed before the first step may leave files, which the next try may correct.
    has_begun = (directory / METRICS).exists()
    if has_begun:
        _require_same_run(config, load_config(RunConfig, directory / CONFIG))
    return _with_local_files(config, directory, has_begun=has_begun)


def record_start(config: RunConfig, *, first_step: int, world_size: int, cost: dict[str, Any]) -> None:
    """Write down with what a run trains from ``first_step`` on; a start that has nothing left to do leaves no trace.

    Args:
        config: from :func:`prepare`.
        cost: of the model.

    Raises:
        OutputError: the directory cannot be written.
    """
    directory = Path(config.out)
    start: dict[str, Any] = {"first_step": first_step, **environment(world_size)}
    if (directory / METRICS).exists():
        if first_step >= config.max_steps:
            return
        before = _read_environment(directory)
        changes = setting_changes(config, load_config(RunConfig, directory / CONFIG))
        start["changed"] = {key: {"was": was, "is": now} for key, (was, now) in changes.items()}
        start["earlier"] = [*before.pop("earlier", []), before] if before else []
    write_atomically(directory / COST, _pretty(cost))
    write_atomically(directory / ENVIRONMENT, _pretty(start))
    write_atomically(directory / CONFIG, dump_config(config).encode())


def starts_of(directory: Path) -> list[dict[str, Any]]:
    """Where and by what command a run was trained, in the order of steps: one environment for each start that trained,
    without those whose steps were all done again by a later one."""
    last = _read_environment(directory)
    starts: list[dict[str, Any]] = []
    for start in [*last.pop("earlier", []), last] if last else []:
        # Environments of earlier versions do not say where they began.
        first_step = start.get("first_step", 0)
        starts = [kept for kept in starts if kept.get("first_step", 0) < first_step] + [start]
    return starts


def machine_of(start: dict[str, Any]) -> str:
    """On how many of what, by :func:`environment`."""
    machine = f"{start['world_size']} x {start['gpu'] or start['processor']}"
    if not start["gpu"]:
        machine += f", {start['num_threads']} thread{'s' if start['num_threads'] > 1 else ''}"
    return machine


def _read_environment(directory: Path) -> dict[str, Any]:
    """Empty if there is none.

    Raises:
        DataError: not a JSON object.
    """
    path = directory / ENVIRONMENT
    return read_json_object(path) if path.is_file() else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file of a run says.

    Raises:
        DataError: it cannot be read, is not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _pretty(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


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


def _with_local_files(config: RunConfig, directory: Path, *, has_begun: bool) -> RunConfig:
    """Copy the small files that the run depends on, so that the directory stands alone."""
    copy = partial(_copy, has_begun=has_begun)
    data, task = config.data, config.task
    if data.text_tokenizer is not None:
        data = data.model_copy(update={"text_tokenizer": copy(data.text_tokenizer, directory / TOKENIZER)})
    if task.kind == "vqa":
        task = task.model_copy(update={"answers": copy(task.answers, directory / ANSWERS)})
    elif task.kind == "pretrain":
        task = task.model_copy(update={"visual_codebook": copy(task.visual_codebook, directory / CODEBOOK)})
    elif task.kind == "classification":
        task = task.model_copy(update={"classes": copy(task.classes, directory / CLASSES)})
    return config.model_copy(update={"data": data, "task": task})


def _copy(source: str, target: Path, *, has_begun: bool) -> str:
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        if has_begun and target.exists():
            logger.warning("%s: %s; going on with the run's own copy, %s", source, error.strerror, target)
            return str(target)
        raise ConfigError(f"{source}: {error.strerror}, but the configuration names it for {target.stem}") from None
    if not target.exists() or (not has_begun and target.read_bytes() != content):
        write_atomically(target, content)
    elif target.read_bytes() != content:
        raise OutputError(
            f"{target.parent}: holds another run ({source} differs from its {target.name}); choose another out= or "
            "restore that file"
        )
    return str(target)


#: Patterns of settings that may change when a run is continued; those of neither list would make it another run.
_FREE = (
    "device",
    "strategy",
    "expert_parallel",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_steps",
    "data.num_workers",
    "data.validation_batch_size",
)
#: Settings with which a run that diverged, or whose shards have moved, goes on, with a warning. That the shards hold
#: the same data is checked against the checkpoint.
_FREE_WITH_WARNING = (
    "optimizer.learning_rate",
    "optimizer.clip_norm",
    "max_bad_steps",
    "precision",
    "data.train.*.shards",
    "data.validation.*.shards",
)
#: Where the run is, and its own copies of files.
_PLACES = ("out", "data.text_tokenizer", "task.answers", "task.classes", "task.visual_codebook")


def _require_same_run(new: RunConfig, old: RunConfig) -> None:
    changes = setting_changes(new, old)
    refused = {key: change for key, change in changes.items() if not _matches(key, (*_FREE, *_FREE_WITH_WARNING))}
    if refused:
        raise OutputError(
            f"{new.out}: holds another run ({describe_changes(refused)}); choose another out= or restore those settings"
        )
    warned = {key: change for key, change in changes.items() if not _matches(key, _FREE)}
    if warned:
        logger.warning("%s: goes on with other settings: %s", new.out, describe_changes(warned))


def setting_changes(new: RunConfig, old: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of two runs that differ, wherever the runs are: dotted key -> value in ``old`` and in ``new``."""
    changes = differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
    return {key: change for key, change in changes.items() if not _matches(key, _PLACES)}


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two trees disagree on: dotted key -> value before and now, None where there is none."""
    old, new = _flatten(before), _flatten(now)
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def describe_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    """The first few, for people; empty if there are none."""
    shown = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in list(changes.items())[:3]]
    return "; ".join(shown) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


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
