"""What a training step of every arm takes, measured in turns with one reference once nothing else of the study runs.

The runs' own clocks cannot say it: cells run beside each other, on machines that do other things too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from mhmoe_vl.config import dump_config
from mhmoe_vl.data.loader import train_loader
from mhmoe_vl.distributed.weights import load_weights
from mhmoe_vl.distributed.world import World, open_world
from mhmoe_vl.errors import UserError
from mhmoe_vl.evaluation.results_files import write_text
from mhmoe_vl.study.cells import Arm, Cell, Plan
from mhmoe_vl.study.execute import directory_of, has_diverged, is_finished
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.build import build_dataset, build_plan, build_task
from mhmoe_vl.train.optimizer import build_optimizer
from mhmoe_vl.train.precision import autocast_for
from mhmoe_vl.train.step import Figures, train_step

logger = logging.getLogger(__name__)

#: Below ``out``: a file for each task.
TIMES = "times"

_NUM_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class StepTimes:
    """Seconds of whole training steps of one arm, each measured right before or after one of the reference on the same
    samples.

    Attributes:
        config: digest of the arm's settings, which the times are no longer of once they change.
        machine: what they were measured on, in words.
    """

    arm: str
    config: str
    reference: str
    seconds: list[float]
    reference_seconds: list[float]
    machine: str

    @property
    def ratios(self) -> list[float]:
        """Time of the arm over that of the reference, pair by pair."""
        return [own / other for own, other in zip(self.seconds, self.reference_seconds, strict=True)]


def reference_of(plan: Plan) -> Arm:
    """The first arm of the study's baseline."""
    return next(arm for arm in plan.arms if arm.family == plan.config.baseline)


def measure_times(plan: Plan) -> None:
    """Measure every task whose runs are finished, unless that has been done for the same arms and settings.

    To be called while nothing else runs. A reference that diverged leaves its task without times, another arm itself.
    A task that cannot be timed any more (its data are gone, two of its models are too large for one device) has none.
    """
    for task in plan.config.tasks:
        starts = {arm: start for arm in plan.arms if (start := _trained(plan, task, arm)) is not None}
        names = sorted(arm.name for arm in starts)
        if reference_of(plan) not in starts or names == sorted(times.arm for times in read_times(plan, task)):
            continue
        logger.info("timing the training steps of %s", task)
        try:
            measured = [asdict(times) for times in _measure(plan, starts)]
        except torch.OutOfMemoryError:
            logger.warning("%s: no times: two of its models do not fit into the memory of one device", task)
            continue
        except UserError as error:
            logger.warning("%s: no times: %s", task, error)
            continue
        _path(plan, task).parent.mkdir(exist_ok=True)
        write_text(_path(plan, task), json.dumps(measured, indent=1) + "\n")


def read_times(plan: Plan, task: str) -> list[StepTimes]:
    """Of the arms that have been measured with their present settings; none if the reference's have changed."""
    path = _path(plan, task)
    found = [StepTimes(**times) for times in json.loads(path.read_text())] if path.is_file() else []
    digests = {arm.name: settings_digest(plan, task, arm) for arm in plan.arms}
    valid = [times for times in found if digests.get(times.arm) == times.config]
    return valid if any(times.arm == reference_of(plan).name for times in valid) else []


def step_seconds(measured: list[StepTimes]) -> dict[str, float]:
    """Seconds of a step by arm: median ratio to the reference, times the reference's median over all its steps."""
    of_reference = statistics.median(second for times in measured for second in times.reference_seconds)
    return {times.arm: statistics.median(times.ratios) * of_reference for times in measured}


def _path(plan: Plan, task: str) -> Path:
    return plan.out / TIMES / f"{task}.json"


def settings_digest(plan: Plan, task: str, arm: Arm) -> str:
    """By which times know whether they are still those of the arm."""
    run = plan.base_run(Cell("train", task, arm, plan.config.seeds[0]))
    return hashlib.sha256(dump_config(run).encode()).hexdigest()[:16]


def _trained(plan: Plan, task: str, arm: Arm) -> Cell | None:
    """The arm's first run that has come to its end, whose router and weights are those that a step meets."""
    cells = (Cell("train", task, arm, seed) for seed in plan.config.seeds)
    return next((c for c in cells if is_finished(plan, c) and not has_diverged(directory_of(plan, c))), None)


def _measure(plan: Plan, starts: dict[Arm, Cell]) -> list[StepTimes]:
    reference, num_steps = reference_of(plan), plan.config.num_timed_steps
    found = []
    with open_world(plan.base_run(starts[reference]).device) as world:
        machine = run_directory.machine_of(run_directory.environment(world.world_size))
        # The reference is measured against itself too, which shows how far to believe the others.
        for arm, start in starts.items():
            own, other = (
                _steps(directory_of(plan, cell), world, _NUM_WARM_UP_STEPS + num_steps)
                for cell in (start, starts[reference])
            )
            seconds: list[float] = []
            reference_seconds: list[float] = []
            turns = [(own, seconds), (other, reference_seconds)]
            for _ in range(_NUM_WARM_UP_STEPS + num_steps):
                for step, taken in turns:
                    taken.append(step())
                turns.reverse()
            found.append(
                StepTimes(
                    arm.name,
                    settings_digest(plan, start.task, arm),
                    reference.name,
                    seconds[_NUM_WARM_UP_STEPS:],
                    reference_seconds[_NUM_WARM_UP_STEPS:],
                    machine,
                )
            )
            logger.info("%s: %.2f of %s", arm.name, statistics.median(found[-1].ratios), reference.name)
    return found


def _steps(directory: Path, world: World, num_steps: int) -> Callable[[], float]:
    """A function that takes the next training step of a finished run, loading its samples too, and returns its seconds.
    The weights stay what they are, but for selection biases."""
    config = run_directory.load_run(directory)
    task = build_task(config)
    task.load_state_dict(load_weights(directory / run_directory.WEIGHTS))
    task.to(world.device).train()
    optimizer = build_optimizer(task, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    dataset = build_dataset(config, config.data.train, training=True)
    micro_batches = iter(
        train_loader(
            dataset,
            build_plan(config, dataset),
            steps=range(num_steps),
            num_micro_batches=config.num_micro_batches,
            rank=0,
            world_size=1,
            num_workers=config.data.num_workers,
            pin_memory=world.device.type == "cuda",
        )
    )

    def step() -> float:
        _wait(world.device)
        start = time.perf_counter()
        of_step = list(islice(micro_batches, config.num_micro_batches))
        train_step(
            task,
            optimizer,
            [{name: batch.to(world.device) for name, batch in micro.items()} for micro in of_step],
            clip_norm=config.optimizer.clip_norm,
            autocast=autocast_for(config.precision, world.device),
            figures=Figures(),
        )
        _wait(world.device)
        return time.perf_counter() - start

    return step


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
