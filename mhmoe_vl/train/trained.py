"""Load what a run has trained, for evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.loader import evaluation_loader
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.distributed.collectives import fail_together
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import CheckpointError, ConfigError, UserError
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.build import build_dataset, build_task, load_tokenizer
from mhmoe_vl.train.config import RunConfig, SourceConfig
from mhmoe_vl.train.metrics import read_metrics

_COUNTS = ("num_params", "num_active_params", "flops_per_token", "num_assignments_per_token")


@dataclass(frozen=True)
class TrainedRun:
    """A run with its final weights, in evaluation mode."""

    config: RunConfig
    task: Task
    tokenizer: TextTokenizer
    world: World

    def batches(self, shards: list[str], *, batch_size: int, num_workers: int = 0) -> Iterator[Batch]:
        """All samples of ``shards``, shared out over the ranks, on the run's device."""
        kind = next(iter(self.config.data.train.values())).kind
        sources = {"evaluation": SourceConfig(kind=kind, shards=tuple(shards))}
        dataset = build_dataset(self.config, sources, training=False)
        loader = evaluation_loader(
            dataset,
            "evaluation",
            batch_size=batch_size,
            rank=self.world.rank,
            world_size=self.world.world_size,
            num_workers=num_workers,
        )
        for micro_batch in loader:
            yield micro_batch["evaluation"].to(self.world.device)


def load_trained(directory: str | Path, world: World, *, task_kind: str) -> TrainedRun:
    """Rebuild a finished run's model from its directory alone. Collective.

    Raises:
        ConfigError: not a run directory, a run of another task, or one that has not finished.
        CheckpointError: the weights do not fit the configuration.
    """
    with fail_together(UserError):
        config = run_directory.load_run(directory)
        if config.task.kind != task_kind:
            raise ConfigError(f"{directory}: is a run of task '{config.task.kind}', and '{task_kind}' is needed")
        weights = Path(directory) / run_directory.WEIGHTS
        if not weights.is_file():
            raise ConfigError(f"{weights}: no weights; finish the run with python -m mhmoe_vl.train first")
        task = build_task(config)
        try:
            task.load_state_dict(load_weights(weights))
        except RuntimeError as error:
            raise CheckpointError(f"{weights}: {' '.join(str(error).split())[:300]}") from None
        task.to(world.device).eval()
        return TrainedRun(config, task, load_tokenizer(config), world)


def cost_of(directory: str | Path) -> dict[str, Any]:
    """Parameters and FLOPs that the run printed when it started, and the wall-clock time that it took and where.

    ``weights`` says which weights the run exported: the last ones, or their moving average.
    ``train_seconds`` is the time of all steps, without start, validation and saving; ``train_samples_per_second`` the
    median over the log lines. Both are comparable only between runs on one quiet machine.
    """
    cost = json.loads((Path(directory) / run_directory.COST).read_text())
    records = read_metrics(Path(directory), "train")
    first_steps = [0, *(record["step"] for record in records)]
    lengths = [last - first for first, last in pairwise(first_steps)]
    decay = run_directory.load_run(directory).optimizer.ema_decay
    return {
        **{name: cost[name] for name in _COUNTS},
        "train_seconds": round(sum(n * r["step_seconds"] for n, r in zip(lengths, records, strict=True)), 1),
        "train_samples_per_second": round(median(r["samples_per_second"] for r in records), 1) if records else None,
        "trained_on": _machines(Path(directory)) or None,
        "weights": "last" if decay is None else f"moving average, decay {decay}",
    }


def _machines(directory: Path) -> str:
    """On how many of what the steps were done; where that changed, from which step on."""
    machines: list[str] = []
    last = None
    for start in run_directory.starts_of(directory):
        machine = run_directory.machine_of(start)
        if machine != last:
            machines.append(machine if last is None else f"from step {start['first_step']:,} on {machine}")
        last = machine
    return "; ".join(machines)


def seed_of(directory: str | Path) -> int:
    """The seed that the run was started with."""
    return run_directory.load_run(directory).seed


def train_shards(directory: str | Path) -> list[str]:
    """The shards that the run was trained on, for baselines; streamed ones cannot be counted again."""
    config = run_directory.load_run(directory)
    return [path for source in config.data.train.values() if not source.is_stream for path in source.paths]
