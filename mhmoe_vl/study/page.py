"""The study as one HTML page that needs no other file and no network."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mhmoe_vl
from mhmoe_vl.config import dump_config
from mhmoe_vl.report.figures import Band, bands
from mhmoe_vl.report.progress import Panel
from mhmoe_vl.report.template import page_environment
from mhmoe_vl.study.cells import Arm
from mhmoe_vl.study.results import Comparison, CurvePoint, Outcome, Results
from mhmoe_vl.study.tables import (
    TIMING_SENTENCE,
    Table,
    comparison_table,
    cost_table,
    figure_differences_table,
    figures_table,
    method_sentences,
    noise_sentence,
    outcome_table,
    sweep_table,
    timing_table,
)


@dataclass(frozen=True)
class OutcomeSection:
    """One figure of one task."""

    name: str
    verdicts: list[Comparison]
    panels: list[Panel]
    values: Table
    comparisons: Table
    noise: str


@dataclass(frozen=True)
class TaskSection:
    """One task."""

    name: str
    outcomes: list[OutcomeSection]
    others: list[Table]
    costs: Table
    sweep: Table | None
    timing: Table


def render_page(results: Results) -> str:
    """The same results give the same bytes."""
    config = results.plan.config
    tasks = [
        TaskSection(
            name=task,
            outcomes=[_outcome(results, outcome) for outcome in results.outcomes_of(task, are_tested=True)],
            others=_others(results.outcomes_of(task, are_tested=False)),
            costs=cost_table(results, task),
            sweep=sweep_table(results, task) if results.plan.is_swept else None,
            timing=timing_table(results, task),
        )
        for task in config.tasks
    ]
    return (
        page_environment("mhmoe_vl.study")
        .get_template("study.html.jinja")
        .render(
            title=config.title,
            results=results,
            tasks=tasks,
            methods=method_sentences(results),
            timing_sentence=TIMING_SENTENCE,
            level=1 - config.confidence,
            config_yaml=dump_config(config),
            command=_command(),
            version=mhmoe_vl.__version__,
        )
    )


def _outcome(results: Results, outcome: Outcome) -> OutcomeSection:
    confidence = results.plan.config.confidence
    return OutcomeSection(
        name=outcome.name,
        verdicts=outcome.comparisons,
        panels=_panels(results, outcome),
        values=outcome_table(results, outcome, with_speed=True),
        comparisons=comparison_table(outcome, confidence=confidence),
        noise=noise_sentence(outcome, confidence=confidence),
    )


def _others(outcomes: list[Outcome]) -> list[Table]:
    return [figures_table(outcomes), figure_differences_table(outcomes)] if outcomes else []


def _panels(results: Results, outcome: Outcome) -> list[Panel]:
    """Against steps, FLOPs and time, for every number of experts."""
    return [
        Panel(f"Against {axis.name}" + ("" if number is None else f", {number} experts"), figure)
        for number, arms in groups_of(results.plan.arms)
        for axis in AXES
        if (
            figure := curves_of(
                results, outcome, arms, axis, name=f"{outcome.task}/{outcome.name}/{number}/{axis.name}"
            )
        )
    ]


@dataclass(frozen=True)
class Axis:
    """What curves are drawn against."""

    name: str
    label: str
    per_step: Callable[[Results, str, Arm], float | None]


STEPS = Axis("steps", "step", lambda results, task, arm: 1)
TIME = Axis("time", "seconds of training", lambda results, task, arm: _step_seconds(results, task, arm))
AXES = (
    STEPS,
    Axis("compute", "training FLOPs", lambda results, task, arm: results.costs[task][arm.name].training_flops_per_step),
    TIME,
)


def _step_seconds(results: Results, task: str, arm: Arm) -> float | None:
    return next((t.step_seconds for t in results.timings if (t.task, t.arm) == (task, arm.name)), None)


def curves_of(results: Results, outcome: Outcome, arms: Sequence[Arm], axis: Axis, *, name: str) -> str | None:
    """SVG of a figure on the way, with bands over the seeds; None if no validation has it, or the axis is not known.

    Args:
        name: of the picture, unlike every other's on a page.
    """
    curves = results.curves[outcome.task].get(outcome.name)
    if curves is None:
        return None
    in_nats = outcome.unit == "nats"
    series = {
        arm.name: band
        for arm in arms
        if (per_step := axis.per_step(results, outcome.task, arm)) is not None
        and (band := _band(list(curves[arm.name].values()), per_step, in_nats=in_nats))
    }
    if not series:
        return None
    return bands(series, xlabel=axis.label, ylabel="perplexity" if in_nats else outcome.name, name=name, log=in_nats)


def groups_of(arms: Sequence[Arm]) -> list[tuple[int | None, list[Arm]]]:
    """Arms that are looked at together: those of each number of experts, and with each those that have none."""
    numbers = list(dict.fromkeys(arm.num_experts for arm in arms if arm.num_experts is not None))
    if not numbers:
        return [(None, list(arms))]
    return [(number, [arm for arm in arms if arm.num_experts in (number, None)]) for number in numbers]


def _band(seeds: Sequence[Sequence[CurvePoint]], per_step: float, *, in_nats: bool) -> Band | None:
    """Mean and range over the seeds, at the steps that all of them have."""
    if not seeds:
        return None
    by_step = [{point.step: point for point in points} for points in seeds]
    steps = sorted(set.intersection(*(set(points) for points in by_step)))
    if not steps:
        return None
    at = [[points[step] for points in by_step] for step in steps]

    def shown(value: float) -> float:
        return math.exp(min(value, 80.0)) if in_nats else value

    return Band(
        x=[per_step * step for step in steps],
        # In nats: the geometric mean of perplexities, which is what the tables compare.
        y=[shown(math.fsum(point.value for point in points) / len(points)) for points in at],
        low=[shown(min(point.value for point in points)) for points in at],
        high=[shown(max(point.value for point in points)) for points in at],
    )


def _command() -> str:
    return shlex.join(["python", "-m", "mhmoe_vl.study", *sys.argv[1:]])
