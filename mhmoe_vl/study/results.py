"""What the runs of a study have shown so far, and what follows from it: the content of ``study.json``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mhmoe_vl
from mhmoe_vl.evaluation.score_card import ScoreCard
from mhmoe_vl.plan.workload import samples_per_step
from mhmoe_vl.report.collect import read_score_card
from mhmoe_vl.study.cells import Arm, Cell, Plan
from mhmoe_vl.study.config import PublishedConfig, TaskConfig
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
    residual_scatter,
    summarize,
    verdict,
)
from mhmoe_vl.study.stopwatch import read_times, step_seconds
from mhmoe_vl.train.metrics import read_metrics


@dataclass(frozen=True)
class CurvePoint:
    """A validation on the way."""

    step: int
    value: float


@dataclass(frozen=True)
class ArmResult:
    """One figure of one arm over the seeds that have it.

    Attributes:
        values: at the end of the run, by seed.
        summary: None if no seed has the figure yet.
        perplexity: mean and deviation of exp(value), for figures in nats.
        diverged: seeds whose run diverged; they have no value.
        baselines: of a score: mean over seeds of the best constant answer (``majority``) and of what does not see the
            image (``blind``), and the scored items (``n``), as far as the evaluation has them.
    """

    arm: str
    values: dict[int, float]
    summary: Summary | None
    perplexity: Summary | None
    diverged: list[int]
    baselines: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """One figure of two arms.

    Attributes:
        adjusted_p: by Holm's method over all comparisons of the study that are tested; None where this one is not.
        published: the difference that somebody else has found.
    """

    arm: str
    reference: str
    difference: PairedDifference | None
    adjusted_p: float | None
    verdict: str
    published: float | None = None


@dataclass(frozen=True)
class Outcome:
    """One figure of all arms in one task.

    Attributes:
        name: such as ``mlm``, or ``vqa: score``.
        unit: ``nats``, ``points`` of a score in percent, or empty.
        noise: how far the seeds of an arm lie apart.
        is_tested: False for figures that are only shown.
        published: what somebody else has found.
    """

    task: str
    name: str
    unit: str
    arms: list[ArmResult]
    comparisons: list[Comparison]
    noise: NoiseFloor | None
    is_tested: bool
    published: PublishedConfig | None


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
    """How fast one arm trains (:mod:`mhmoe_vl.study.stopwatch`).

    Attributes:
        ratio: time of a training step over that of the ``reference``, median of the pairs; the middle half of them lies
            within ``ratio_range``.
        step_seconds: the ratio times the reference's median.
        tokens_per_second: padding included.
        num_steps: that were timed.
    """

    task: str
    arm: str
    reference: str
    ratio: float
    ratio_range: tuple[float, float]
    step_seconds: float
    tokens_per_second: float
    num_steps: int
    machine: str


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

    def outcomes_of(self, task: str, *, are_tested: bool) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if (outcome.task, outcome.is_tested) == (task, are_tested)]

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
            *(_outcome(plan, task, metric, None) for metric in config.other_metrics),
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
        timings=[timing for task in plan.config.tasks for timing in _timings(plan, task, costs[task])],
    )


def as_json(results: Results) -> dict[str, Any]:
    """Plain values for ``study.json``. What a clock said is under ``timings``; everything else is the same for the same
    configuration, seeds and machine."""
    plan = results.plan
    return {
        "version": mhmoe_vl.__version__,
        "config": plan.config.model_dump(mode="json"),
        "num_cells": len(plan.cells),
        "num_finished": results.num_finished,
        "costs": {task: {arm: asdict(cost) for arm, cost in of.items()} for task, of in results.costs.items()},
        "mismatches": [asdict(mismatch) for mismatch in results.mismatches],
        "sweeps": [asdict(sweep) for sweep in results.sweeps],
        "outcomes": [_outcome_as_json(outcome) for outcome in results.outcomes],
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
        "timings": [asdict(timing) for timing in results.timings],
    }


def _outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    published = outcome.published
    return asdict(replace(outcome, published=None)) | {"published": published and published.model_dump(mode="json")}


def _outcome(plan: Plan, task: str, figure: str, fine_tuning: str | None) -> Outcome:
    arms = []
    is_in_nats = False
    shown = plan.arms if fine_tuning is None else plan.fine_tuned_arms(task, fine_tuning)
    for arm in shown:
        values: dict[int, float] = {}
        diverged = []
        cards: list[ScoreCard] = []
        for cell in _cells(plan, task, arm, fine_tuning):
            directory = directory_of(plan, cell)
            if has_diverged(directory):
                diverged.append(cell.seed)
                continue
            evaluation = plan.evaluation(cell)
            if figure == "score" and evaluation is not None:
                cards.append(read_score_card(directory / score_card_name(evaluation)))
                values[cell.seed] = cards[-1].score
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
                baselines=_baselines(cards),
            )
        )
    by_name = {result.arm: result for result in arms}
    config = plan.config
    is_pooled = config.variance == "pooled"
    scatter = residual_scatter([result.values for result in arms if result.values]) if is_pooled else None
    is_score = figure == "score" and fine_tuning is not None
    published = _published(config.tasks[task], figure, fine_tuning)
    comparisons = [
        Comparison(
            arm.name,
            reference.name,
            paired_difference(
                by_name[arm.name].values, by_name[reference.name].values, confidence=config.confidence, scatter=scatter
            ),
            None,
            "",
            None if published is None else _published_difference(published, arm.name, reference.name),
        )
        for arm, reference in plan.comparisons
        if arm in shown and reference in shown
    ]
    return Outcome(
        task=task,
        name=figure if fine_tuning is None else f"{fine_tuning}: {figure}",
        unit="nats" if is_in_nats else "points" if is_score else "",
        arms=arms,
        comparisons=comparisons,
        noise=noise_floor([list(result.values.values()) for result in arms], confidence=config.confidence),
        is_tested=fine_tuning is not None or figure in config.tasks[task].metrics,
        published=published,
    )


def _baselines(cards: Sequence[ScoreCard]) -> dict[str, float]:
    """Those that all evaluations have."""
    found = {}
    for name in ("majority", "blind", "n"):
        values = [value for card in cards if (value := getattr(card, name)) is not None]
        if values and len(values) == len(cards):
            found[name] = statistics.fmean(values)
    return found


def _published(task: TaskConfig, figure: str, fine_tuning: str | None) -> PublishedConfig | None:
    if fine_tuning is not None:
        return task.fine_tunings[fine_tuning].published if figure == "score" else None
    return task.published if figure == task.metrics[0] else None


def _published_difference(published: PublishedConfig, arm: str, reference: str) -> float | None:
    """In nats where the figures are perplexities."""
    if not {arm, reference} <= published.values.keys():
        return None
    value, of_reference = published.values[arm], published.values[reference]
    return math.log(value / of_reference) if published.is_perplexity else value - of_reference


def _corrected(plan: Plan, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """With p-values corrected for all comparisons of the study at once, and the verdicts that follow."""
    tested = [
        c
        for outcome in outcomes
        if outcome.is_tested
        for c in outcome.comparisons
        if c.difference and c.difference.p is not None
    ]
    adjusted = iter(holm([c.difference.p for c in tested if c.difference and c.difference.p is not None]))
    return [
        replace(outcome, comparisons=[_judged(plan, outcome, c, adjusted) for c in outcome.comparisons])
        for outcome in outcomes
    ]


def _judged(plan: Plan, outcome: Outcome, comparison: Comparison, adjusted: Iterator[float]) -> Comparison:
    arm, reference, difference = comparison.arm, comparison.reference, comparison.difference
    if difference is None:
        return replace(comparison, verdict=f"{arm} and {reference}: no seed in common yet")
    if not outcome.is_tested:
        return replace(comparison, verdict=f"{arm} and {reference}: not tested")
    p = None if difference.p is None else next(adjusted)
    text = verdict(arm, reference, difference, p, unit=outcome.unit, confidence=plan.config.confidence)
    if outcome.unit == "nats" and p is not None and p < 1 - plan.config.confidence:
        text += f" (perplexity {math.expm1(difference.mean):+.1%})"
    return replace(comparison, adjusted_p=p, verdict=text)


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
        curves[cell.seed] = [
            CurvePoint(record["step"], record[metric])
            for record in read_metrics(directory, "validation")
            if record.get(metric) is not None
        ]
    return curves


def _timings(plan: Plan, task: str, costs: dict[str, ArmCost]) -> list[Timing]:
    measured = {times.arm: times for times in read_times(plan, task)}
    if not measured:
        return []
    seconds = step_seconds(list(measured.values()))
    found = []
    for arm in (arm for arm in plan.arms if arm.name in measured):
        times = measured[arm.name]
        run = plan.base_run(Cell("train", task, arm, plan.config.seeds[0]))
        num_tokens = costs[arm.name].num_tokens_per_sample * sum(samples_per_step(run).values())
        lower, median, upper = statistics.quantiles(times.ratios, n=4, method="inclusive")
        found.append(
            Timing(
                task=task,
                arm=arm.name,
                reference=times.reference,
                ratio=median,
                ratio_range=(lower, upper),
                step_seconds=seconds[arm.name],
                tokens_per_second=num_tokens / seconds[arm.name],
                num_steps=len(times.seconds),
                machine=times.machine,
            )
        )
    return found
