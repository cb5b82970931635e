"""Curves of one run, and how its experts were used, as figures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mhmoe_vl.moe import share_active
from mhmoe_vl.moe.stats import ACTIVATION_CURVE
from mhmoe_vl.report.collect import RunRecord
from mhmoe_vl.report.figures import Points, curves, load_heat_map, pool_curves

Records = Sequence[Mapping[str, Any]]

#: Pretraining objectives as the reader of the page calls them.
OBJECTIVE_NAMES = {
    "mim": "patches",
    "mlm": "words",
    "pair_mim": "patches of pairs",
    "pair_mlm": "words of pairs",
}
_UNITS = {
    "vqa": "nats per question",
    "nlvr2": "nats per sentence",
    "captioning": "nats per word",
    "retrieval": "nats per choice",
    "classification": "nats per image",
}


@dataclass(frozen=True)
class Panel:
    """A figure with its heading."""

    title: str
    svg: str


@dataclass(frozen=True)
class HeldOutRow:
    """Scores of one pretraining objective at the last validation."""

    objective: str
    loss: float
    perplexity: float
    accuracy: float


@dataclass(frozen=True)
class Progress:
    """Curves of one run, and the last held-out scores of pretraining, which are of step ``held_out_step``."""

    panels: list[Panel]
    held_out: list[HeldOutRow]
    held_out_step: int | None


@dataclass(frozen=True)
class PoolRow:
    """Use of one expert pool in the last interval; ``busiest`` is the largest load over the mean load, ``entropy`` that
    of the load over its maximum, ``dropped`` a share of the choices."""

    pool: str
    num_experts: int
    busiest: float
    entropy: float
    num_dead: int
    dropped: float


@dataclass(frozen=True)
class ExpertUse:
    """Figures about the expert pools of one run; the heat map and the table speak of ``step``.

    Attributes:
        alarms: which pools had dead or collapsed experts in which steps.
    """

    step: int
    heat_map: str
    panels: list[Panel]
    pools: list[PoolRow]
    alarms: list[str]


def progress(run: RunRecord) -> Progress | None:
    """Curves of a run, or None if it has logged nothing yet."""
    if not run.train:
        return None
    panels = _pretraining_panels(run) if run.task == "pretrain" else _fine_tuning_panels(run)
    speed = {"samples": points(run.train, "samples_per_second")}
    if speed["samples"]:
        panels.append(
            Panel("Throughput", curves(speed, ylabel="samples per second", from_zero=True, name=f"{run.task}/speed"))
        )
    last = run.validation[-1] if run.validation else {}
    return Progress(panels, _held_out_rows(last), last.get("step"))


def expert_use(run: RunRecord) -> ExpertUse | None:
    """How a run has used its experts, or None if it has none."""
    if not run.experts:
        return None
    last = run.experts[-1]
    entropy = {pool: points(run.experts, "entropy", pool) for pool in last["load"]}
    num_dead = {pool: points(run.experts, "num_dead", pool) for pool in last["load"]}
    activation = {
        pool: list(zip(ACTIVATION_CURVE, share_active(torch.tensor(load), ACTIVATION_CURVE), strict=True))
        for pool, load in last["load"].items()
    }
    violation = {"busiest pool": points(run.train, "max_violation")}
    panels = [
        Panel("Entropy of the load", pool_curves(entropy, ylabel="1 = uniform", name=f"{run.task}/entropy")),
        Panel("Dead experts per pool", pool_curves(num_dead, ylabel="dead experts", name=f"{run.task}/dead")),
        Panel(
            f"Experts active before step {last['step']:,}",
            pool_curves(
                activation,
                xlabel="threshold: load / mean load",
                ylabel="share of experts",
                name=f"{run.task}/activation",
            ),
        ),
    ]
    if violation["busiest pool"]:
        figure = curves(violation, ylabel="max load / mean load - 1", name=f"{run.task}/violation")
        panels.insert(1, Panel("Largest overload", figure))
    pools = [
        PoolRow(
            pool=pool,
            num_experts=len(shares),
            busiest=max(shares) * len(shares),
            entropy=last["entropy"][pool],
            num_dead=last["num_dead"][pool],
            dropped=last["dropped"][pool],
        )
        for pool, shares in last["load"].items()
    ]
    heat_map = load_heat_map(last["load"], name=f"{run.task}/load")
    return ExpertUse(last["step"], heat_map, panels, pools, alarm_spans(run.experts))


def alarm_spans(records: Records) -> list[str]:
    """Such as ``block3/text: dead experts in steps 11 to 40``, in the order in which alarms began.

    Args:
        records: of kind ``experts``, of intervals that follow one another.
    """
    spans: list[tuple[str, str, int, int]] = []
    on: dict[tuple[str, str], int] = {}  # index of the span
    first = 1
    for record in records:
        now: dict[tuple[str, str], int] = {}
        # Records of earlier versions know of no alarms.
        for pool, alarms in record.get("alarms", {}).items():
            for alarm in alarms:
                begun = on.get((pool, alarm), len(spans))
                if begun == len(spans):
                    spans.append((pool, alarm, first, record["step"]))
                spans[begun] = (*spans[begun][:3], record["step"])
                now[pool, alarm] = begun
        on = now
        first = record["step"] + 1
    return [f"{pool}: {alarm} experts in steps {start:,} to {end:,}" for pool, alarm, start, end in spans]


def points(records: Records, *path: str) -> Points:
    """``(step, value)`` of every record that has the value; ``path`` leads into nested records."""
    found = []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found.append((record["step"], value))
    return found


def _pretraining_panels(run: RunRecord) -> list[Panel]:
    def by_objective(records: Records, suffix: str = "") -> dict[str, Points]:
        return _known((label, points(records, name + suffix)) for name, label in OBJECTIVE_NAMES.items())

    panels = []
    for title, series, ylabel, log in (
        ("Training loss", by_objective(run.train), "nats per prediction", False),
        ("Training accuracy", by_objective(run.train, "_accuracy"), "accuracy", False),
        ("Held-out perplexity", by_objective(run.validation, "_perplexity"), "perplexity", True),
    ):
        # A single validation is in the table.
        if any(len(of_objective) > 1 for of_objective in series.values()):
            panels.append(Panel(title, curves(series, ylabel=ylabel, log=log, name=f"{run.task}/{title}")))
    return panels


def _fine_tuning_panels(run: RunRecord) -> list[Panel]:
    panels = []
    for title, figure, ylabel in (
        ("Loss", run.task, _UNITS[run.task]),
        ("Accuracy", f"{run.task}_accuracy", "accuracy"),
    ):
        series = _known(
            (name, points(records, figure)) for name, records in (("training", run.train), ("held out", run.validation))
        )
        if series:
            panels.append(Panel(title, curves(series, ylabel=ylabel, name=f"{run.task}/{title}")))
    return panels


def _known(series: Iterable[tuple[str, Points]]) -> dict[str, Points]:
    return {name: of_series for name, of_series in series if of_series}


def _held_out_rows(record: Mapping[str, Any]) -> list[HeldOutRow]:
    return [
        HeldOutRow(label, record[name], record[f"{name}_perplexity"], record[f"{name}_accuracy"])
        for name, label in OBJECTIVE_NAMES.items()
        if name in record
    ]
