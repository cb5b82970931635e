"""What the runs of a study have shown so far, and what follows from it: the content of ``study.json``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mhmoe_vl
from mhmoe_vl.report.collect import read_score_card
from mhmoe_vl.study.cells import Arm, Cell, Plan
from mhmoe_vl.study.cost import ArmCost, Mismatch, costs_of, mismatches
from mhmoe_vl.study.execute import (
    chosen_factor,
    directory_of,
    final_loss,
    has_diverged,
    is_finished,
    run_of,
    score_card_name,
)
from mhmoe_vl.study.statistics import (
    NoiseFloor,
    PairedDifference,
    Summary,
    holm,
    noise_floor,
    paired_difference,
    summarize,
    verdict,
)
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.metrics import read_metrics
from mhmoe_vl.train.trained import cost_of


@dataclass(frozen=True)
class CurvePoint:
    """A validation on the way.

    Attributes:
        seconds: of training up to it, without start, validation and saving.
    """

    step: int
    value: float
    seconds: float


@dataclass(frozen=True)
class ArmResult:
    """One figure of one arm over the seeds that have it.

    Attributes:
        values: at the end of the run, by seed.
        summary: None if no seed has the figure yet.
        perplexity: mean and deviation of exp(value), for figures in nats.
        diverged: seeds whose run diverged; they have no value.
    """

    arm: str
    values: dict[int, float]
    summary: Summary | None
    perplexity: Summary | None
    diverged: list[int]


@dataclass(frozen=True)
class Comparison:
    """One figure of two arms.

    Attributes:
        adjusted_p: by Holm's method over all comparisons of the study.
    """

    arm: str
    reference: str
    difference: PairedDifference | None
    adjusted_p: float | None
    verdict: str


@dataclass(frozen=True)
class Outcome:
    """One figure of all arms in one task.

    Attributes:
        name: such as ``mlm``, or ``vqa: score``.
        unit: ``nats``, ``points`` of a score in percent, or empty.
        noise: how far the seeds of an arm lie apart.
    """

    task: str
    name: str
    unit: str
    arms: list[ArmResult]
    comparisons: list[Comparison]
    noise: NoiseFloor | None


@dataclass(frozen=True)
class SweepResult:
    """Learning rates that were tried for one arm: final value of the task's first metric, by factor."""

    task: str
    arm: str
    losses: dict[float, float | None]
    chosen: float | None
    learning_rate: float | None

    @property
    def is_at_edge(self) -> bool:
        """Whether a rate beyond those that were tried might do better."""
        return len(self.losses) > 2 and self.chosen in (min(self.losses), max(self.losses))


@dataclass(frozen=True)
class Timing:
    """What the clock said about the runs of one arm: comparable only between runs on one quiet machine."""

    task: str
    arm: str
    tokens_per_second: float | None
    train_seconds: float | None
    trained_on: list[str]


@dataclass(frozen=True)
class Results:
    """Everything that a study has shown."""

    plan: Plan
    num_finished: int
    costs: dict[str, dict[str, ArmCost]]
    mismatches: list[Mismatch]
    sweeps: list[SweepResult]
    outcomes: list[Outcome]
    curves: dict[str, dict[str, dict[str, dict[int, list[CurvePoint]]]]]
    timings: list[Timing]

    @property
    def num_comparisons(self) -> int:
        """Those with a p-value, which Holm's method corrects together."""
        return sum(c.adjusted_p is not None for outcome in self.outcomes for c in outcome.comparisons)

    @property
    def is_complete(self) -> bool:
        return self.num_finished == len(self.plan.cells)


def collect(plan: Plan) -> Results:
    """Read every finished run; those that are missing are left out.

    Raises:
        UserError: a run has not the figures that the configuration names.
    """
    costs = costs_of(plan)
    outcomes = [
        outcome
        for task, config in plan.config.tasks.items()
        for outcome in (
            *(_outcome(plan, task, metric, None) for metric in config.metrics),
            *(
                _outcome(plan, task, metric, name)
                for name, fine_tuning in config.fine_tunings.items()
                for metric in (*(("score",) if fine_tuning.evaluation else ()), *fine_tuning.metrics)
            ),
        )
    ]
    return Results(
        plan=plan,
        num_finished=sum(is_finished(plan, cell) for cell in plan.cells),
        costs=costs,
        mismatches=mismatches(plan, costs),
        sweeps=[_sweep(plan, task, arm) for task in plan.config.tasks for arm in plan.arms] if plan.is_swept else [],
        outcomes=_corrected(plan, outcomes),
        curves={
            task: {
                metric: {arm.name: _curves(plan, task, arm, metric) for arm in plan.arms} for metric in config.metrics
            }
            for task, config in plan.config.tasks.items()
        },
        timings=[_timing(plan, task, arm, costs) for task in plan.config.tasks for arm in plan.arms],
    )


def as_json(results: Results) -> dict[str, Any]:
    """Plain values for ``study.json``. What a clock said is under ``timing`` and in the seconds of curves; everything
    else is the same for the same configuration, seeds and machine."""
    plan = results.plan
    return {
        "version": mhmoe_vl.__version__,
        "config": plan.config.model_dump(mode="json"),
        "num_cells": len(plan.cells),
        "num_finished": results.num_finished,
        "costs": {task: {arm: asdict(cost) for arm, cost in of.items()} for task, of in results.costs.items()},
        "mismatches": [asdict(mismatch) for mismatch in results.mismatches],
        "sweeps": [asdict(sweep) for sweep in results.sweeps],
        "outcomes": [asdict(outcome) for outcome in results.outcomes],
        "num_comparisons": results.num_comparisons,
        "curves": {
            task: {
                metric: {
                    arm: {
                        str(seed): {
                            "step": [point.step for point in points],
                            "value": [point.value for point in points],
                        }
                        for seed, points in of_arm.items()
                    }
                    for arm, of_arm in of_metric.items()
                }
                for metric, of_metric in of_task.items()
            }
            for task, of_task in results.curves.items()
        },
        "timing": {
            "arms": [asdict(timing) for timing in results.timings],
            "seconds": {
                task: {
                    arm: {str(seed): [round(point.seconds, 3) for point in points] for seed, points in of_arm.items()}
                    for arm, of_arm in next(iter(of_task.values())).items()
                }
                for task, of_task in results.curves.items()
            },
        },
    }


def _outcome(plan: Plan, task: str, figure: str, fine_tuning: str | None) -> Outcome:
    arms = []
    is_in_nats = False
    for arm in plan.arms:
        values: dict[int, float] = {}
        diverged = []
        for cell in _cells(plan, task, arm, fine_tuning):
            directory = directory_of(plan, cell)
            if has_diverged(directory):
                diverged.append(cell.seed)
                continue
            evaluation = plan.evaluation(cell)
            if figure == "score" and evaluation is not None:
                values[cell.seed] = read_score_card(directory / score_card_name(evaluation)).score
                continue
            last = read_metrics(directory, "validation")[-1:]
            if last and last[0].get(figure) is not None:
                values[cell.seed] = last[0][figure]
                is_in_nats = is_in_nats or f"{figure}_perplexity" in last[0]
        perplexities = [math.exp(min(value, 80.0)) for value in values.values()]
        arms.append(
            ArmResult(
                arm=arm.name,
                values=values,
                summary=summarize(list(values.values())) if values else None,
                perplexity=summarize(perplexities) if values and is_in_nats else None,
                diverged=diverged,
            )
        )
    by_name = {result.arm: result for result in arms}
    comparisons = [
        Comparison(
            arm.name,
            reference.name,
            paired_difference(
                by_name[arm.name].values, by_name[reference.name].values, confidence=plan.config.confidence
            ),
            None,
            "",
        )
        for arm, reference in plan.comparisons
    ]
    is_score = figure == "score" and fine_tuning is not None
    return Outcome(
        task=task,
        name=figure if fine_tuning is None else f"{fine_tuning}: {figure}",
        unit="nats" if is_in_nats else "points" if is_score else "",
        arms=arms,
        comparisons=comparisons,
        noise=noise_floor([list(result.values.values()) for result in arms], confidence=plan.config.confidence),
    )


def _corrected(plan: Plan, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """With p-values corrected for all comparisons of the study at once, and the verdicts that follow."""
    tested = [c for outcome in outcomes for c in outcome.comparisons if c.difference and c.difference.p is not None]
    adjusted = iter(holm([c.difference.p for c in tested if c.difference and c.difference.p is not None]))
    return [
        replace(outcome, comparisons=[_judged(plan, outcome, c, adjusted) for c in outcome.comparisons])
        for outcome in outcomes
    ]


def _judged(plan: Plan, outcome: Outcome, comparison: Comparison, adjusted: Iterator[float]) -> Comparison:
    arm, reference, difference = comparison.arm, comparison.reference, comparison.difference
    if difference is None:
        return Comparison(arm, reference, None, None, f"{arm} and {reference}: no seed in common yet")
    p = None if difference.p is None else next(adjusted)
    text = verdict(arm, reference, difference, p, unit=outcome.unit, confidence=plan.config.confidence)
    if outcome.unit == "nats" and p is not None and p < 1 - plan.config.confidence:
        text += f" (perplexity {math.expm1(difference.mean):+.1%})"
    return Comparison(arm, reference, difference, p, text)


def _cells(plan: Plan, task: str, arm: Arm, fine_tuning: str | None = None) -> list[Cell]:
    """Finished runs of an arm that are compared, by seed."""
    kind = "train" if fine_tuning is None else "fine"
    return [
        cell
        for cell in plan.cells
        if (cell.kind, cell.task, cell.arm, cell.fine_tuning) == (kind, task, arm, fine_tuning)
        and is_finished(plan, cell)
    ]


def _sweep(plan: Plan, task: str, arm: Arm) -> SweepResult:
    losses: dict[float, float | None] = {}
    for cell in plan.sweep_of(task, arm):
        if cell.factor is not None and is_finished(plan, cell):
            loss = final_loss(plan, cell)
            losses[cell.factor] = None if math.isinf(loss) else loss
    chosen = chosen_factor(plan, task, arm)
    seed = plan.config.seeds[0]
    rate = None if chosen is None else run_of(plan, Cell("train", task, arm, seed)).optimizer.learning_rate
    return SweepResult(task, arm.name, losses, chosen, rate)


def _curves(plan: Plan, task: str, arm: Arm, metric: str) -> dict[int, list[CurvePoint]]:
    curves = {}
    for cell in _cells(plan, task, arm):
        directory = directory_of(plan, cell)
        clock = _Clock(directory)
        curves[cell.seed] = [
            CurvePoint(record["step"], record[metric], clock.seconds_at(record["step"]))
            for record in read_metrics(directory, "validation")
            if record.get(metric) is not None
        ]
    return curves


class _Clock:
    """Training time of a run up to a step, by its log lines."""

    def __init__(self, directory: Path) -> None:
        self._records = read_metrics(directory, "train")

    def seconds_at(self, step: int) -> float:
        seconds, last = 0.0, 0
        for record in self._records:
            seconds += (min(record["step"], step) - last) * record["step_seconds"]
            last = record["step"]
            if last >= step:
                break
        return seconds


def _timing(plan: Plan, task: str, arm: Arm, costs: dict[str, dict[str, ArmCost]]) -> Timing:
    directories = [directory_of(plan, cell) for cell in _cells(plan, task, arm)]
    found = [cost_of(directory) for directory in directories if (directory / run_directory.COST).is_file()]
    rates = [cost["train_samples_per_second"] for cost in found if cost["train_samples_per_second"]]
    seconds = [cost["train_seconds"] for cost in found]
    tokens = costs[task][arm.name].num_tokens_per_sample
    return Timing(
        task=task,
        arm=arm.name,
        tokens_per_second=round(statistics.median(rates) * tokens, 1) if rates else None,
        train_seconds=round(statistics.median(seconds), 1) if seconds else None,
        trained_on=list(dict.fromkeys(cost["trained_on"] for cost in found if cost["trained_on"])),
    )
