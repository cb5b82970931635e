"""A whole run: assemble, resume, train, validate, save."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhmoe_vl.config import validate_config
from mhmoe_vl.data.loader import MicroBatch, ShardDataset, train_loader
from mhmoe_vl.data.plan import MixturePlan
from mhmoe_vl.distributed.average import WeightAverage
from mhmoe_vl.distributed.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from mhmoe_vl.distributed.collectives import all_reduce_sum, broadcast_object, fail_together
from mhmoe_vl.distributed.parallel import parallelize
from mhmoe_vl.distributed.weights import export_weights
from mhmoe_vl.distributed.world import World
from mhmoe_vl.errors import ConfigError, NonFiniteError, UserError
from mhmoe_vl.models.cost import EncoderCost
from mhmoe_vl.tasks.base import Task
from mhmoe_vl.tasks.visual_tokenizer import VisualTokenizerTask
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.build import build_dataset, build_plan, build_task, data_checksums, transfer_weights
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.cost import encoder_cost_of
from mhmoe_vl.train.journal import Journal
from mhmoe_vl.train.layout import describe_layout, strategy_of
from mhmoe_vl.train.metrics import MetricsWriter, ProgressBar, read_metrics
from mhmoe_vl.train.optimizer import build_optimizer, build_schedule
from mhmoe_vl.train.precision import autocast_for
from mhmoe_vl.train.step import train_step
from mhmoe_vl.train.stop import STOPPED, stop_signals
from mhmoe_vl.train.validation import validate
from mhmoe_vl.train.visual_tokenizer import export_visual_tokenizer

logger = logging.getLogger(__name__)


def train(config: RunConfig, world: World) -> None:
    """Train to ``max_steps``, from the newest checkpoint of the run directory if there is one.

    Raises:
        UserError: anything that the user can mend; the message is one line.
        SystemExit: with :data:`STOPPED`, once the run was asked to stop and has saved.
    """
    with fail_together(UserError):
        prepared = run_directory.prepare(config).model_dump(mode="json") if world.is_main else None
    config = validate_config(RunConfig, broadcast_object(prepared))
    with fail_together(UserError):
        checkpoint = latest_checkpoint(_checkpoints(config))
    with fail_together(UserError):
        dataset = build_dataset(config, config.data.train, training=True)
        plan = build_plan(config, dataset)
        held_out = build_dataset(config, config.data.validation, training=False) if config.data.validation else None
        task = build_task(config)
        if config.init_from is not None and checkpoint is None:
            transfer_weights(task, config.init_from)
    cost = encoder_cost_of(config)
    if world.is_main:
        _announce(config, task, plan, cost, world)
    module = parallelize(
        task,
        strategy=strategy_of(config, world.world_size),
        world=world,
        shard_units=task.encoder.shard_units(),
        expert_parallel=config.expert_parallel,
    )
    decay = config.optimizer.ema_decay
    run = _Run(
        config=config,
        world=world,
        task=task,
        module=module,
        optimizer=build_optimizer(task, config.optimizer),
        average=None if decay is None else WeightAverage(module, decay),
        plan=plan,
        dataset=dataset,
        held_out=held_out,
    )
    first_step = 0 if checkpoint is None else run.resume(checkpoint)
    with fail_together(UserError):
        if world.is_main:
            run_directory.record_start(config, first_step=first_step, world_size=world.world_size, cost=asdict(cost))
        writer = MetricsWriter(Path(config.out), num_steps_done=first_step) if world.is_main else None
    with stop_signals(announce=world.is_main) as stop:
        is_finished = _loop(run, first_step, writer, stop)
    if writer is not None:
        writer.close()
    if not is_finished:
        raise SystemExit(STOPPED)
    with run.exported():
        export_weights(Path(config.out) / run_directory.WEIGHTS, run.module, world=world)
    if isinstance(task, VisualTokenizerTask):
        # Of the file, and so of the average where there is one.
        export_visual_tokenizer(config, task.origin(), dataset, plan, world)
    if world.is_main and decay is not None:
        logger.info(
            "%s/%s is the moving average (optimizer.ema_decay=%s); the last weights are in the last checkpoint",
            config.out, run_directory.WEIGHTS, decay,
        )  # fmt: skip


def _loop(run: _Run, first_step: int, writer: MetricsWriter | None, stop: list[int]) -> bool:
    """Steps ``first_step`` to ``max_steps``; returns False if the run was asked to stop before all was done."""
    config, world = run.config, run.world
    schedule = build_schedule(run.optimizer, config.optimizer, config.max_steps)
    micro_batches = run.micro_batches(first_step)
    journal = Journal(config, world, writer, first_step)
    last_saved, num_bad = first_step, 0
    with ProgressBar(config.task.kind, config.max_steps, start=first_step, enabled=world.is_main) as bar:

        def validated(done: int) -> bool:
            """Validate if step ``done`` is due; False if that was broken off because the run is to stop."""
            if run.held_out is None or not _is_due(config.validate_every, done, config.max_steps):
                return True
            with run.exported():
                scores = validate(config, run.module, run.held_out, world, should_stop=lambda: bool(stop))
            if scores is not None:
                journal.write("validation", done, scores)
                bar.note(done, f"validation{'' if run.average is None else ' of the average'} {_summary(scores)}")
            return scores is not None

        # Whoever is asked to stop saves first, and has no time to validate: that is done when the run goes on.
        if first_step > 0 and not _has_validated(config, first_step):
            with journal.not_training():
                if not validated(first_step):
                    return False
        for step in range(first_step, config.max_steps):
            run.module.train()
            run.task.step = step
            schedule.step_update(step)
            of_step = list(islice(micro_batches, config.num_micro_batches))
            num_broken_here = journal.note_problems(of_step)
            result = train_step(
                run.module,
                run.optimizer,
                [{name: batch.to(world.device) for name, batch in micro.items()} for micro in of_step],
                clip_norm=config.optimizer.clip_norm,
                autocast=autocast_for(config.precision, world.device),
                figures=journal.figures,
            )
            done = step + 1
            if not result.is_good:
                journal.count_skipped(done)
            elif run.average is not None:
                run.average.update()
            num_bad = 0 if result.is_good else num_bad + 1
            if num_bad >= config.max_bad_steps:
                raise _divergence(config, num_bad, step)
            num_signals, num_broken = all_reduce_sum(torch.tensor([len(stop), num_broken_here])).tolist()
            journal.count_broken(num_broken)
            is_stopping = num_signals > 0
            bar.update(done)
            if done % config.log_every == 0 or done == config.max_steps:
                bar.show(done, journal.log(done, run.optimizer, result.grad_norm))
            with journal.not_training():
                if is_stopping or _is_due(config.checkpoint_every, done, config.max_steps):
                    run.save(done)
                    last_saved = done
                if not is_stopping and not validated(done):
                    is_stopping = True
                    if last_saved < done:
                        run.save(done)
            if is_stopping:
                return False
    return True


def _is_due(every: int | None, done: int, max_steps: int) -> bool:
    return done == max_steps or (every is not None and done % every == 0)


def _has_validated(config: RunConfig, step: int) -> bool:
    """Collective."""
    return broadcast_object(any(record["step"] == step for record in read_metrics(Path(config.out), "validation")))


def _divergence(config: RunConfig, num_bad: int, step: int) -> NonFiniteError:
    error = NonFiniteError(
        f"{config.out}: loss or gradient was not finite for {num_bad} steps up to step {step}; resume from "
        "the last checkpoint with a lower optimizer.learning_rate (or another optimizer.clip_norm or precision) in the "
        "same command, or look at the data of these steps"
    )
    error.is_shared = True
    return error


@dataclass(frozen=True)
class _Run:
    """What training changes and what it reads; ``module`` is ``task``, wrapped."""

    config: RunConfig
    world: World
    task: Task
    module: nn.Module
    optimizer: torch.optim.AdamW
    average: WeightAverage | None
    plan: MixturePlan
    dataset: ShardDataset
    held_out: ShardDataset | None

    def micro_batches(self, first_step: int) -> Iterator[MicroBatch]:
        """Of all steps from ``first_step`` on."""
        return iter(
            train_loader(
                self.dataset,
                self.plan,
                steps=range(first_step, self.config.max_steps),
                num_micro_batches=self.config.num_micro_batches,
                rank=self.world.rank,
                world_size=self.world.world_size,
                num_workers=self.config.data.num_workers,
                pin_memory=self.world.device.type == "cuda",
            )
        )

    def exported(self) -> AbstractContextManager[None]:
        """Around what is done with the weights that the run will export: their average, if it keeps one."""
        return nullcontext() if self.average is None else self.average.in_use()

    def save(self, step: int) -> None:
        """Write a checkpoint. Collective."""
        path = save_checkpoint(
            _checkpoints(self.config),
            step,
            module=self.module,
            optimizer=self.optimizer,
            progress={
                "step": step,
                "samples_consumed": self.plan.num_consumed(step),
                "data_order": self._data_order(),
            },
            world=self.world,
            keep=self.config.keep_checkpoints,
            average=self.average,
        )
        logger.info("saved %s", path)

    def resume(self, path: Path) -> int:
        """Load a checkpoint; returns the first step to do. Collective.

        Raises:
            CheckpointError: the checkpoint does not fit the model.
            ConfigError: the data are not those that the run began with.
        """
        progress = load_checkpoint(
            path, module=self.module, optimizer=self.optimizer, world=self.world, average=self.average
        )
        with fail_together(ConfigError):
            self._require_same_data(path, progress["data_order"])
        if self.world.is_main:
            logger.info("resuming %s at step %d", self.config.out, progress["step"])
            for name in (name for name, size in self.plan.num_items.items() if size is None):
                logger.warning(
                    "source %s is streamed: it goes on with other samples than without the interruption", name
                )
        return int(progress["step"])

    def _require_same_data(self, path: Path, before: dict[str, Any]) -> None:
        # Checkpoints of earlier versions know less about the data.
        now = {name: value for name, value in self._data_order().items() if name in before}
        changes = run_directory.describe_changes(run_directory.differences(before, now))
        if changes:
            raise ConfigError(f"{path}: the data order would change: {changes}; restore these settings and shards")

    def _data_order(self) -> dict[str, Any]:
        """What a resumed run must agree on for its data order to continue exactly, and its validation to compare."""
        sources = {"train": self.dataset, "validation": self.held_out}
        return {
            "seed": self.plan.seed,
            "batch_size": self.plan.batch_size,
            "weights": dict(self.plan.weights),
            "num_items": dict(self.plan.num_items),
            "num_micro_batches": self.config.num_micro_batches,
            "checksums": {split: data_checksums(dataset) for split, dataset in sources.items() if dataset is not None},
        }


def _checkpoints(config: RunConfig) -> Path:
    return Path(config.out) / run_directory.CHECKPOINTS


def _announce(config: RunConfig, task: Task, plan: MixturePlan, cost: EncoderCost, world: World) -> None:
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
    for name, size in plan.num_items.items():
        found = "streamed, not exactly resumable" if size is None else f"{size} items"
        logger.info("source %s: %s, %.1f %% of each step", name, found, 100 * plan.share(name))


def _summary(scores: dict[str, float]) -> str:
    """Of single sources only the perplexity of their language: ``metrics.jsonl`` has the rest."""
    shown = {n: value for n, value in scores.items() if "/" not in n or n.endswith("/lm_perplexity")}
    return ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
