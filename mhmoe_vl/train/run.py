"""A whole run: assemble, resume, train, validate, save."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhmoe_vl.data.loader import MicroBatch, ShardDataset, train_loader
from mhmoe_vl.data.plan import MixturePlan
from mhmoe_vl.distributed.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from mhmoe_vl.distributed.collectives import all_reduce_sum, fail_together, gather_objects
from mhmoe_vl.distributed.parallel import parallelize
from mhmoe_vl.distributed.weights import export_weights
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import ConfigError, DataError, NonFiniteError, UserError
from mhmoe_vl.models.cost import EncoderCost, encoder_cost
from mhmoe_vl.moe import RoutingStats
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.build import build_dataset, build_plan, build_task, transfer_weights
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.layout import describe_layout, strategy_of
from mhmoe_vl.train.metrics import MetricsWriter, ProgressBar
from mhmoe_vl.train.optimizer import build_optimizer, build_schedule
from mhmoe_vl.train.precision import autocast_for
from mhmoe_vl.train.step import Figures, train_step
from mhmoe_vl.train.validation import validate

logger = logging.getLogger(__name__)

#: Exit code of a run that was asked to stop and saved: "try again later" in sysexits.
STOPPED = 75


def train(config: RunConfig, world: World) -> None:
    """Train to ``max_steps``, from the newest checkpoint of the run directory if there is one.

    Raises:
        UserError: anything that the user can mend; the message is one line.
    """
    with fail_together(UserError):
        if world.is_main:
            run_directory.prepare(config, world_size=world.world_size)
    config = run_directory.load_run(config.out)
    directory = Path(config.out)
    dataset = build_dataset(config, config.data.train, training=True)
    plan = build_plan(config, dataset)
    held_out = build_dataset(config, config.data.validation, training=False) if config.data.validation else None
    task = build_task(config)
    if config.init_from is not None:
        transfer_weights(task, config.init_from)
    cost = encoder_cost(config.model, num_text_tokens=config.data.text_length)
    if world.is_main:
        run_directory.write_text(directory / run_directory.COST, json.dumps(asdict(cost), indent=2) + "\n")
        _announce(config, task, dataset, cost, world)
    module = parallelize(
        task,
        strategy=strategy_of(config, world.world_size),
        world=world,
        shard_units=task.encoder.shard_units(),
        expert_parallel=config.expert_parallel,
    )
    optimizer = build_optimizer(task, config.optimizer)
    first_step = _resume(config, module, optimizer, plan, world)
    writer = MetricsWriter(directory, num_steps_done=first_step) if world.is_main else None
    with _stop_signals() as stop:
        last_step = _loop(config, world, module, optimizer, dataset, held_out, plan, first_step, writer, stop)
    if writer is not None:
        writer.close()
    if last_step < config.max_steps:
        raise SystemExit(STOPPED)
    export_weights(directory / run_directory.WEIGHTS, module, world=world)


def _loop(
    config: RunConfig,
    world: World,
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    dataset: ShardDataset,
    held_out: ShardDataset | None,
    plan: MixturePlan,
    first_step: int,
    writer: MetricsWriter | None,
    stop: list[int],
) -> int:
    """Steps ``first_step`` to ``max_steps``; returns the number of steps done."""
    schedule = build_schedule(optimizer, config.optimizer, config.max_steps)
    micro_batches = _micro_batches(config, world, dataset, plan, first_step)
    journal = _Journal(config, world, writer, first_step)
    num_bad = 0
    with ProgressBar(config.task.kind, config.max_steps, start=first_step, enabled=world.is_main) as bar:
        for step in range(first_step, config.max_steps):
            module.train()
            schedule.step_update(step)
            of_step = list(islice(micro_batches, config.num_micro_batches))
            num_broken_here = journal.note_problems(of_step)
            result = train_step(
                module,
                optimizer,
                [{name: batch.to(world.device) for name, batch in micro.items()} for micro in of_step],
                clip_norm=config.optimizer.clip_norm,
                autocast=autocast_for(config.precision, world.device),
                figures=journal.figures,
            )
            num_bad = 0 if result.is_good else num_bad + 1
            if num_bad >= config.max_bad_steps:
                raise NonFiniteError(
                    f"{config.out}: loss or gradient was not finite for {num_bad} steps up to step {step}; resume from "
                    "the last checkpoint with a lower optimizer.learning_rate, or look at the data of these steps"
                )
            num_signals, num_broken = all_reduce_sum(torch.tensor([len(stop), num_broken_here])).tolist()
            journal.count_broken(num_broken)
            stopping = num_signals > 0
            done = step + 1
            bar.update(done)
            if done % config.log_every == 0 or done == config.max_steps:
                bar.show(done, journal.log(done, optimizer, result.grad_norm))
            is_last = done == config.max_steps or stopping
            with journal.not_training():
                if held_out is not None and (is_last or (config.validate_every and done % config.validate_every == 0)):
                    scores = validate(config, module, held_out, world)
                    journal.write("validation", done, scores)
                    bar.show(done, "validation " + _summary(scores))
                if is_last or (config.checkpoint_every and done % config.checkpoint_every == 0):
                    _save(config, module, optimizer, plan, done, world)
            if stopping:
                return done
    return config.max_steps


class _Journal:
    """Collects figures between log lines and turns them into records."""

    def __init__(self, config: RunConfig, world: World, writer: MetricsWriter | None, first_step: int) -> None:
        self.config, self.world, self.writer = config, world, writer
        self.figures = Figures()
        self.num_broken = 0
        self.last_problem = ""
        self._since, self._time = first_step, time.perf_counter()

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(kind, step, values)

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Around validation and saving, whose time is no part of the training speed."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start

    def note_problems(self, micro_batches: list[MicroBatch]) -> int:
        """Write down this rank's broken samples; returns their number."""
        lines = [line for micro in micro_batches for batch in micro.values() for line in batch.problems]
        if lines:
            self.last_problem = lines[-1]
            path = Path(self.config.out) / f"broken_samples.rank{self.world.rank}.txt"
            with path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        return len(lines)

    def count_broken(self, number: int) -> None:
        """Stop if broken samples are not exceptions. Collective.

        Args:
            number: of this step, over all ranks.

        Raises:
            DataError: more than 5 % of the samples since the last log line were broken; on all ranks alike.
        """
        self.num_broken += number
        if self.num_broken > max(20, 0.05 * self.config.data.batch_size * self.config.log_every):
            last = next(line for line in reversed(gather_objects(self.last_problem)) if line)
            raise DataError(f"{self.num_broken} broken samples since the last log line; the last: {last}")

    def log(self, step: int, optimizer: torch.optim.Optimizer, grad_norm: float) -> str:
        """Write the ``train`` and ``experts`` records of the interval; return one line for the terminal."""
        values = self.figures.reduced()
        routing = self.figures.expert_load()
        seconds, steps = time.perf_counter() - self._time, step - self._since
        values |= {
            "learning_rate": max(group["lr"] / group["lr_scale"] for group in optimizer.param_groups),
            "grad_norm": grad_norm,
            "samples_per_second": steps * self.config.data.batch_size / seconds,
            "step_seconds": seconds / steps,
        }
        line = f"loss {values.get('loss', math.nan):.3f} {values['samples_per_second']:.0f} samples/s"
        if routing:
            values["max_violation"] = max(stats.max_violation for stats in routing.values())
            line += f" load max {1 + values['max_violation']:.1f}x mean"
        if self.num_broken:
            values["broken_samples"] = self.num_broken
        self.write("train", step, values)
        if routing:
            self.write("experts", step, expert_record(routing))
        self.figures, self.num_broken = Figures(), 0
        self._since, self._time = step, time.perf_counter()
        return line


def expert_record(routing: dict[str, RoutingStats]) -> dict[str, Any]:
    """Load share of every expert, and what it says about balance, per pool and modality."""
    return {
        "load": {name: [round(share, 6) for share in stats.load_share_E.tolist()] for name, stats in routing.items()},
        "entropy": {name: stats.load_entropy for name, stats in routing.items()},
        "num_dead": {name: stats.num_dead for name, stats in routing.items()},
        "dropped": {name: float(s.num_dropped / s.load_E.sum().clamp_min(1)) for name, s in routing.items()},
    }


def _micro_batches(
    config: RunConfig, world: World, dataset: ShardDataset, plan: MixturePlan, first_step: int
) -> Iterator[MicroBatch]:
    return iter(
        train_loader(
            dataset,
            plan,
            steps=range(first_step, config.max_steps),
            num_micro_batches=config.num_micro_batches,
            rank=world.rank,
            world_size=world.world_size,
            num_workers=config.data.num_workers,
            pin_memory=world.device.type == "cuda",
        )
    )


def _progress(config: RunConfig, plan: MixturePlan, step: int) -> dict[str, Any]:
    """What a resumed run must agree on for its data order to continue exactly."""
    return {
        "step": step,
        "samples_consumed": plan.num_consumed(step),
        "data_order": {
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "weights": dict(plan.weights),
            "num_items": dict(plan.num_items),
            "num_micro_batches": config.num_micro_batches,
        },
    }


def _save(
    config: RunConfig, module: nn.Module, optimizer: torch.optim.AdamW, plan: MixturePlan, step: int, world: World
) -> None:
    path = save_checkpoint(
        Path(config.out) / "checkpoints",
        step,
        module=module,
        optimizer=optimizer,
        progress=_progress(config, plan, step),
        world=world,
        keep=config.keep_checkpoints,
    )
    logger.info("saved %s", path)


def _resume(config: RunConfig, module: nn.Module, optimizer: torch.optim.AdamW, plan: MixturePlan, world: World) -> int:
    """Load the newest checkpoint; returns the first step to do."""
    path = latest_checkpoint(Path(config.out) / "checkpoints")
    if path is None:
        return 0
    progress = load_checkpoint(path, module=module, optimizer=optimizer, world=world)
    expected = _progress(config, plan, progress["step"])
    if progress != expected:
        raise ConfigError(
            f"{path}: the data order would change: the checkpoint has {progress['data_order']}, "
            f"this run {expected['data_order']}; restore these settings and shards"
        )
    logger.info("resuming %s at step %d", config.out, progress["step"])
    for name in (name for name, size in plan.num_items.items() if size is None):
        logger.warning("source %s is streamed: it goes on with other samples than without the interruption", name)
    return int(progress["step"])


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that becomes non-empty once SIGTERM or SIGUSR1 arrives: the step ends, the run saves and exits with 75."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _announce(config: RunConfig, task: Task, dataset: ShardDataset, cost: EncoderCost, world: World) -> None:
    model = config.model
    total = sum(parameter.numel() for parameter in task.parameters())
    logger.info(
        "%s, ffn=%s: %.2fM parameters (%.2fM encoder, %.2fM active), %.2f MFLOP per token, %d assignments per token",
        config.task.kind, model.ffn, total / 1e6, cost.num_params / 1e6, cost.num_active_params / 1e6,
        cost.flops_per_token / 1e6, cost.num_assignments_per_token,
    )  # fmt: skip
    if model.ffn != "dense":
        shape = model.ffn_shape
        logger.info(
            "sparse layers: %d experts of width %d, top-%d, %d heads; against the reference SMoE: FLOPs %+.2f %%, "
            "parameters %+.2f %%",
            shape.num_experts, shape.ffn_dim, shape.top_k, shape.num_heads,
            100 * shape.flops_mismatch, 100 * shape.params_mismatch,
        )  # fmt: skip
    logger.info("%s", describe_layout(config, world.world_size))
    total_weight = sum(source.weight for source in config.data.train.values())
    for name, size in dataset.num_items().items():
        found = "streamed, not exactly resumable" if size is None else f"{size} items"
        share = 100 * config.data.train[name].weight / total_weight
        logger.info("source %s: %s, %.0f %% of each step", name, found, share)


def _summary(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
