"""The results as tables: rows of text, which Markdown and the page lay out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mhmoe_vl.study.config import StudyConfig
from mhmoe_vl.study.results import Comparison, Outcome, Results
from mhmoe_vl.study.statistics import PairedDifference, Summary, rounded, signed

UNKNOWN = "n/a"
#: Columns beside a score, in this order.
BASELINES = ("majority", "blind", "n")


@dataclass(frozen=True)
class Table:
    """Rows of text below a head; the first column is left-aligned."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def outcome_table(results: Results, outcome: Outcome, *, with_speed: bool) -> Table:
    """Mean and standard error of every arm, beside what the arm costs.

    Args:
        with_speed: the time of a step and tokens per second too, which are not the same each time.
    """
    timings = {timing.arm: timing for timing in results.timings if timing.task == outcome.task}
    has_perplexity = any(result.perplexity for result in outcome.arms)
    baselines = [name for name in BASELINES if any(name in result.baselines for result in outcome.arms)]
    published = outcome.published
    head = ["arm", "seeds", outcome.unit or outcome.name, *(["perplexity"] if has_perplexity else []), "sd of one run"]
    head += [*baselines, *([published.source] if published else [])]
    head += ["parameters", "FLOPs / token", "assignments / token", *(["step time", "tokens / s"] if with_speed else [])]
    rows = []
    for result in outcome.arms:
        seeds = str(len(result.values)) + (f", {len(result.diverged)} diverged" if result.diverged else "")
        sd = result.summary.sd if result.summary else None
        row = [result.arm, seeds, mean_and_error(result.summary)]
        row += [mean_and_error(result.perplexity)] if has_perplexity else []
        row.append(UNKNOWN if sd is None else f"{sd:.2g}")
        row += [_baseline(name, result.baselines.get(name)) for name in baselines]
        row += ["" if (value := published.values.get(result.arm)) is None else f"{value:g}"] if published else []
        cost = results.costs[outcome.task][result.arm]
        row += [f"{n:,}" for n in (cost.num_params, cost.flops_per_token, cost.num_assignments_per_token)]
        timing = timings.get(result.arm)
        if with_speed:
            row += [f"{timing.ratio:.2f}", f"{timing.tokens_per_second:,.0f}"] if timing else [UNKNOWN, UNKNOWN]
        rows.append(tuple(row))
    return Table(tuple(head), rows)


def _baseline(name: str, value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}" if name == "n" else f"{value:.2f}"


def figures_table(outcomes: Sequence[Outcome]) -> Table:
    """Figures that are not tested, a column each: mean and standard error of every arm, perplexities where they are in
    nats."""
    rows = [
        (arms[0].arm, *(mean_and_error(result.perplexity or result.summary) for result in arms))
        for arms in zip(*(outcome.arms for outcome in outcomes), strict=True)
    ]
    return Table(("arm", *(figure_name(outcome) for outcome in outcomes)), rows)


def figure_differences_table(outcomes: Sequence[Outcome]) -> Table:
    """Paired differences of figures that are not tested: mean and half of the interval."""
    rows = []
    for comparisons in zip(*(outcome.comparisons for outcome in outcomes), strict=True):
        first = comparisons[0]
        rows.append((f"{first.arm} - {first.reference}", *(_difference(c.difference) for c in comparisons)))
    return Table(("comparison", *(f"{outcome.name} {outcome.unit}".rstrip() for outcome in outcomes)), rows)


def _difference(difference: PairedDifference | None) -> str:
    if difference is None:
        return UNKNOWN
    if not difference.margin:
        return signed(difference.mean) if difference.mean else "0"
    return f"{signed(difference.mean, difference.margin)} ± {rounded(difference.margin, difference.margin)}"


def figure_name(outcome: Outcome) -> str:
    """``de/lm`` -> ``de/lm perplexity``, where that is what is shown."""
    return f"{outcome.name} perplexity" if outcome.unit == "nats" else outcome.name


def comparison_table(outcome: Outcome, *, confidence: float) -> Table:
    """Paired differences with their intervals."""
    head = ["comparison", "pairs", "difference", f"{confidence:.0%} interval"]
    head += [outcome.published.source] if outcome.published else []
    head += ["p", "p, Holm", "verdict"]
    rows = [_comparison_row(comparison, has_published=bool(outcome.published)) for comparison in outcome.comparisons]
    return Table(tuple(head), rows)


def _comparison_row(comparison: Comparison, *, has_published: bool) -> tuple[str, ...]:
    name, difference = f"{comparison.arm} - {comparison.reference}", comparison.difference
    published = () if not has_published else ("" if comparison.published is None else signed(comparison.published),)
    if difference is None:
        return (name, "0", UNKNOWN, UNKNOWN, *published, UNKNOWN, UNKNOWN, comparison.verdict)
    mean = signed(difference.mean, difference.margin) if difference.margin else signed(difference.mean)
    if difference.interval is None or difference.margin is None:
        interval = UNKNOWN
    elif difference.is_identical:
        mean, interval = "0", "0 to 0"
    else:
        low, high = (signed(end, difference.margin) for end in difference.interval)
        interval = f"{low} to {high}"
    p_values = (p_value(difference.p), p_value(comparison.adjusted_p))
    return (name, str(difference.n), mean, interval, *published, *p_values, comparison.verdict)


def cost_table(results: Results, task: str) -> Table:
    """Parameters and FLOPs of every arm, and how far they are from those of the arm's reference."""
    by_arm = {mismatch.arm: mismatch for mismatch in results.mismatches if mismatch.task == task}
    head = (
        "arm", "sparse blocks", "parameters", "active", "FLOPs / token", "assignments / token", "against", "Δ FLOPs",
        "Δ active", "Δ parameters",
    )  # fmt: skip
    rows = []
    for arm, cost in results.costs[task].items():
        mismatch = by_arm.get(arm)
        against = ("", "", "", "")
        if mismatch is not None:
            shares = (mismatch.flops, mismatch.active_params, mismatch.params)
            asserted = ("flops" in mismatch.demanded, "flops" in mismatch.demanded, "params" in mismatch.demanded)
            marked = (f"{share:+.2%}" + ("" if has else "*") for share, has in zip(shares, asserted, strict=True))
            against = (mismatch.reference, *marked)  # type: ignore[assignment]
        numbers = (cost.num_params, cost.num_active_params, cost.flops_per_token, cost.num_assignments_per_token)
        rows.append((arm, cost.layer, *(f"{number:,}" for number in numbers), *against))
    return Table(head, rows)


def sweep_table(results: Results, task: str) -> Table:
    """What the learning-rate sweep found."""
    factors = results.plan.config.learning_rates.factors
    rows = []
    for sweep in (sweep for sweep in results.sweeps if sweep.task == task):
        losses = []
        for factor in factors:
            loss = sweep.losses.get(factor)
            text = UNKNOWN if factor not in sweep.losses else "diverged" if loss is None else f"{loss:.4f}"
            losses.append(f"**{text}**" if factor == sweep.chosen else text)
        rate = UNKNOWN if sweep.learning_rate is None else f"{sweep.learning_rate:g}"
        rows.append((sweep.arm, *losses, rate, "at the edge" if sweep.is_at_edge else ""))
    return Table(("arm", *(f"x{factor:g}" for factor in factors), "chosen", ""), rows)


TIMING_SENTENCE = (
    "Times are of whole training steps on the trained weights, each arm in turns with the reference once all runs were "
    "finished: median ratio of the pairs, with the middle half of them. Seconds are that ratio times the reference's "
    "median."
)


def timing_table(results: Results, task: str) -> Table:
    """Of a training step, measured in turns with the reference; without rows where nothing has been measured."""
    timings = [timing for timing in results.timings if timing.task == task]
    rows: list[tuple[str, ...]] = [
        (
            timing.arm,
            f"{timing.ratio:.2f}",
            "{:.2f} to {:.2f}".format(*timing.ratio_range),
            f"{timing.step_seconds:.3f}",
            f"{timing.tokens_per_second:,.0f}",
            f"{timing.num_steps}, {timing.machine}",
        )
        for timing in timings
    ]
    reference = timings[0].reference if timings else UNKNOWN
    return Table(
        ("arm", f"step time / {reference}", "middle half", "seconds / step", "tokens / s", "steps timed, on"), rows
    )


def noise_sentence(outcome: Outcome, *, confidence: float) -> str:
    """How large a difference has to be."""
    noise = outcome.noise
    if noise is None:
        return "One seed per arm: the noise between seeds is not known."
    return (
        f"Noise floor: runs that differ in their seed alone lie {noise.sd:.2g} apart (standard deviation, "
        f"{noise.degrees} degrees of freedom); unpaired means would have to differ by {noise.detectable:.2g} to be "
        f"told apart at {confidence:.0%}."
    )


def method_sentences(results: Results) -> list[str]:
    """How the numbers were made, for the reader of the tables."""
    config = results.plan.config
    sentences = [
        f"Seeds {', '.join(map(str, config.seeds))}. In a seed every arm sees the same samples in the same order, and "
        "starts from the same weights where it has the same parts; arms with another seed_offset do not.",
        "Values are those of the last validation: mean ± standard error over seeds. Differences are paired by seed; "
        f"± is half of Student's {config.confidence:.0%} interval of their mean, which is not corrected for the number "
        "of comparisons.",
        _error_sentence(config.variance),
        f"Verdicts are: {results.num_comparisons} comparisons are tested together by Holm's method, so that at most "
        f"{1 - config.confidence:.0%} of such studies find any difference where there is none.",
    ]
    factors = config.learning_rates.factors
    if results.plan.is_swept:
        tried = ", ".join(f"x{factor:g}" for factor in factors)
        sentences.append(
            f"Learning rates: {tried} of the task's own were tried for every arm on seed "
            f"{config.learning_rates.seed}, and the one with the lowest validation loss was taken. "
            f"{_reuse_sentence(config)}Fine-tunings are not swept."
        )
    else:
        sentences.append(f"Learning rates were not swept: every arm has x{factors[0]:g} of the task's own.")
    demanded = " and ".join({"flops": "FLOPs per token and active parameters", "params": "all parameters"}[p]
                            for p in config.demanded_parity)  # fmt: skip
    sentences.append(
        f"Cost: match={config.match}; {demanded or 'nothing'} must agree to 2 % in whole percent between arms that are "
        "compared; what is marked * need not. FLOPs are those of the matrix products of the encoder's blocks."
    )
    return sentences


def _reuse_sentence(config: StudyConfig) -> str:
    if config.learning_rates.seed not in config.seeds:
        return ""
    return (
        "That seed is also one of those compared, where each arm has the best of its tries: all arms are flattered in "
        "the same way. "
    )


def _error_sentence(variance: str) -> str:
    if variance == "own":
        return "The error of a difference comes from the differences of the two arms alone."
    return (
        "The error of a difference comes from the scatter of all arms about the means of arms and seeds (a randomised "
        "block design with seeds as blocks), which is taken to be the same in all arms."
    )


def markdown(results: Results) -> str:
    """All that is the same whenever the study is run: everything but times."""
    config = results.plan.config
    lines = [f"# {config.title}", ""]
    if not results.is_complete:
        lines += [f"Unfinished: {results.num_finished} of {len(results.plan.cells)} runs.", ""]
    for task in config.tasks:
        lines += [f"## {task}", ""]
        for outcome in results.outcomes_of(task, are_tested=True):
            lines += [f"### {outcome.name}", "", *table_lines(outcome_table(results, outcome, with_speed=False)), ""]
            lines += [*table_lines(comparison_table(outcome, confidence=config.confidence)), ""]
            lines += [noise_sentence(outcome, confidence=config.confidence), ""]
        lines += other_figures(results, task)
        lines += ["### Cost", "", *table_lines(cost_table(results, task)), ""]
        if results.plan.is_swept:
            lines += ["### Learning rates", "", *table_lines(sweep_table(results, task)), ""]
    return "\n".join([*lines, "## How to read this", "", *(f"- {line}" for line in method_sentences(results)), ""])


def other_figures(results: Results, task: str) -> list[str]:
    """Lines of Markdown, none where the task has no such figures."""
    others = results.outcomes_of(task, are_tested=False)
    if not others:
        return []
    tables = (figures_table(others), figure_differences_table(others))
    return ["### Other figures, not tested", "", *(line for table in tables for line in (*table_lines(table), ""))]


def timing_markdown(results: Results) -> str:
    """Times, which no two studies have in common."""
    lines = [f"# {results.plan.config.title}: times", ""]
    for task in results.plan.config.tasks:
        lines += [f"## {task}", "", *table_lines(timing_table(results, task)), ""]
    return "\n".join(lines)


def mean_and_error(summary: Summary | None) -> str:
    if summary is None:
        return UNKNOWN
    error = summary.standard_error
    if error is None:
        return f"{summary.mean:.4g}"
    return f"{rounded(summary.mean, error)} ± {rounded(error, error)}"


def p_value(p: float | None) -> str:
    return UNKNOWN if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def table_lines(table: Table) -> list[str]:
    """Of Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    aligned = ["---", *["---:"] * (len(table.head) - 1)]
    return [line(table.head), "|" + "|".join(aligned) + "|", *map(line, table.rows)]
