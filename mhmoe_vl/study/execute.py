"""Running cells: each is finished once, by whoever locks it first, and goes on where it stopped.

Any number of processes, on any machines that share the study's directory, may do this at once. A lock belongs to a
process and ends with it, however it ends; what is half done then is resumed from its checkpoint by the next one.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import shutil
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mhmoe_vl.distributed.collectives import broadcast_object, fail_together
from mhmoe_vl.distributed.world import World, open_world
from mhmoe_vl.errors import ConfigError, NonFiniteError, OutputError, UserError
from mhmoe_vl.evaluation.results_files import write_text
from mhmoe_vl.study.cells import Arm, Cell, Plan
from mhmoe_vl.study.config import EvaluationConfig
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.run import train

logger = logging.getLogger(__name__)

#: In the directory of a run that diverged, which is a result too: it is not tried again.
DIVERGED = "diverged.json"
#: Below ``out``.
LOCKS = "locks"

_SECONDS_BETWEEN_LOOKS = 2.0
#: Settings without which a run is still the same result.
_FREE = (
    "device",
    "strategy",
    "expert_parallel",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "data.num_workers",
    "init_from",
)


def directory_of(plan: Plan, cell: Cell) -> Path:
    """Run directory of a cell. A run that the sweep has done already is not done again: it is in the sweep's."""
    if cell.kind == "train" and plan.is_swept and cell.seed == plan.config.learning_rates.seed:
        factor = chosen_factor(plan, cell.task, cell.arm)
        if factor is not None:
            return plan.out / Cell("sweep", cell.task, cell.arm, cell.seed, factor).name
    return plan.out / cell.name


def is_finished(plan: Plan, cell: Cell) -> bool:
    """Whether a cell has all its results, divergence being one."""
    directory = directory_of(plan, cell)
    if has_diverged(directory):
        return True
    evaluation = plan.evaluation(cell)
    return (directory / run_directory.WEIGHTS).is_file() and (
        evaluation is None or (directory / score_card_name(evaluation)).is_file()
    )


def has_diverged(directory: Path) -> bool:
    return (directory / DIVERGED).is_file()


def score_card_name(evaluation: EvaluationConfig) -> str:
    return f"{evaluation.program}_score.json"


def final_loss(plan: Plan, cell: Cell) -> float:
    """Of the first metric at the last validation of a finished cell; infinite if it diverged.

    Raises:
        ConfigError: the run has no such figure.
    """
    directory = directory_of(plan, cell)
    if has_diverged(directory):
        return math.inf
    metric = plan.config.tasks[cell.task].metrics[0]
    records = read_metrics(directory, "validation")
    if not records or metric not in records[-1]:
        known = ", ".join(name for name in (records[-1] if records else {}) if name not in ("kind", "step"))
        raise ConfigError(
            f"tasks.{cell.task}.metrics: '{metric}' is not a figure of the validation of {directory}, which has "
            f"{known or 'none'}"
        )
    value = records[-1][metric]
    return math.inf if value is None else float(value)


def chosen_factor(plan: Plan, task: str, arm: Arm) -> float | None:
    """Multiple of the learning rate that did best in the sweep, the smaller one of equals; None before it is done.

    Raises:
        ConfigError: every run of the sweep diverged.
    """
    if not plan.is_swept:
        return plan.config.learning_rates.factors[0]
    sweep = plan.sweep_of(task, arm)
    if not all(is_finished(plan, cell) for cell in sweep):
        return None
    losses = {cell.factor: final_loss(plan, cell) for cell in sweep if cell.factor is not None}
    loss, factor = min((loss, factor) for factor, loss in losses.items())
    if math.isinf(loss):
        raise ConfigError(f"arm {arm.name} of task {task}: diverged at every learning rate; give smaller factors")
    return factor


def run_of(plan: Plan, cell: Cell) -> RunConfig:
    """The whole configuration of a cell whose needs are finished."""
    run = plan.base_run(cell)
    factor = cell.factor if cell.kind == "sweep" else None
    if cell.kind == "train":
        factor = chosen_factor(plan, cell.task, cell.arm)
    if factor is not None:
        rate = float(f"{run.optimizer.learning_rate * factor:.6g}")
        run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"learning_rate": rate})})
    init_from = None
    if cell.kind == "fine":
        (start,) = plan.needs(cell)
        init_from = str(directory_of(plan, start))
    return run.model_copy(update={"out": str(directory_of(plan, cell)), "init_from": init_from})


def is_ready(plan: Plan, cell: Cell) -> bool:
    return all(is_finished(plan, needed) for needed in plan.needs(cell))


def require_same_study(plan: Plan) -> None:
    """Raises:
    OutputError: a run that is there already is not the one that the configuration asks for.
    """
    for cell in plan.cells:
        if not is_ready(plan, cell):
            continue
        directory = directory_of(plan, cell)
        if not (directory / run_directory.CONFIG).is_file():
            continue
        changes = run_directory.setting_changes(run_of(plan, cell), run_directory.load_run(directory))
        changes = {
            key: change
            for key, change in changes.items()
            # A run that was stopped early goes on to its end; shards are compared by their checksums.
            if key not in _FREE and not key.endswith(".shards")
        }
        if changes:
            raise OutputError(
                f"{directory}: holds another run ({run_directory.describe_changes(changes)}); choose another out= or "
                "restore those settings"
            )


def run_all(plan: Plan) -> None:
    """Run what is not finished, until everything is: also what others are at, should they give up.

    Raises:
        UserError: of a cell that cannot be run.
        SystemExit: once asked to stop; what was running has been saved.
    """
    is_waiting = False
    while True:
        unfinished = [cell for cell in plan.cells if not is_finished(plan, cell)]
        if not unfinished:
            return
        # A cell that makes others ready comes before them: look at all of them again after each.
        if any(is_ready(plan, cell) and try_cell(plan, cell) for cell in unfinished):
            is_waiting = False
            continue
        if not is_waiting:
            logger.info("the rest is run by other processes, or waits for what they run")
        is_waiting = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def try_cell(plan: Plan, cell: Cell) -> bool:
    """Run a cell to its end in this process, unless another one is at it.

    Returns:
        Whether it is finished now.
    """
    device = plan.base_run(cell).device
    lock: FileLock | None = None
    try:
        with open_world(device) as world:
            lock = _lock_of(plan, cell) if world.is_main else None
            with fail_together(UserError):
                is_mine = lock is None or _acquire(lock)
            if not broadcast_object(is_mine):
                return False
            with fail_together(UserError):
                is_done = is_finished(plan, cell) if world.is_main else None
            if broadcast_object(is_done):
                return True
            logger.info("cell %s", cell.name)
            _train(plan, cell, world)
        # The evaluation makes a world of its own.
        evaluation = plan.evaluation(cell)
        if evaluation is not None and not is_finished(plan, cell):
            _evaluate(directory_of(plan, cell), evaluation)
        return True
    finally:
        if lock is not None:
            lock.release()


def _train(plan: Plan, cell: Cell, world: World) -> None:
    """Collective."""
    directory = directory_of(plan, cell)
    with fail_together(UserError):
        run = run_of(plan, cell)
    if run.init_from is not None and has_diverged(Path(run.init_from)):
        _write_diverged(directory, f"{run.init_from} diverged", world)
        return
    if not (directory / run_directory.WEIGHTS).is_file():
        try:
            train(run, world)
        except NonFiniteError as error:
            _write_diverged(directory, str(error), world)
            return
    if world.is_main and not plan.config.keep_checkpoints:
        shutil.rmtree(directory / run_directory.CHECKPOINTS, ignore_errors=True)


def _evaluate(directory: Path, evaluation: EvaluationConfig) -> None:
    """Raises:
    ConfigError: there is no such program; ``eval`` is no part of the package.
    SystemExit: the program has said why it could not go on.
    """
    name = f"eval.{evaluation.program}"
    try:
        program = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, "eval"):
            raise
        raise ConfigError(f"{name}: no such program; evaluations run from a checkout of the project") from None
    # What it prints is for people; the study prints where its results are.
    with redirect_stdout(sys.stderr):
        program.main(["--run", str(directory), "--data", *evaluation.shards, *evaluation.options])


def _write_diverged(directory: Path, message: str, world: World) -> None:
    logger.warning("%s", message)
    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / DIVERGED, json.dumps({"message": message}, indent=2) + "\n")


def _lock_of(plan: Plan, cell: Cell) -> FileLock:
    path = plan.out / LOCKS / (cell.name.replace("/", "__") + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be created: {error.strerror or error}") from None
    return FileLock(path, timeout=0)


def _acquire(lock: FileLock) -> bool:
    with suppress(Timeout):
        lock.acquire()
        return True
    return False


def is_running(plan: Plan, cell: Cell) -> bool:
    """Whether a process is at it, as far as locks tell."""
    lock = _lock_of(plan, cell)
    if _acquire(lock):
        lock.release()
        return False
    return True
