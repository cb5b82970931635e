"""The study as a page of the documentation: Markdown, and pictures beside it.

What people have written about it is kept in files of their own, which are taken over word by word: ``reading.md``, in
front of the tables, and ``published.md``, behind them, in the folder of the pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mhmoe_vl.errors import ConfigError, OutputError
from mhmoe_vl.evaluation.results_files import write_text
from mhmoe_vl.report.figures import Interval, forest, standalone
from mhmoe_vl.study.page import STEPS, TIME, curves_of, groups_of
from mhmoe_vl.study.results import Comparison, Outcome, Results
from mhmoe_vl.study.tables import (
    TIMING_SENTENCE,
    comparison_table,
    cost_table,
    method_sentences,
    noise_sentence,
    other_figures,
    outcome_table,
    sweep_table,
    table_lines,
    timing_table,
)

READING, PUBLISHED = "reading.md", "published.md"


@dataclass(frozen=True)
class Picture:
    """A file beside the document.

    Attributes:
        of: task and name of the figure that it belongs to.
        alt: what it shows, for those who do not see it.
    """

    of: tuple[str, str]
    file_name: str
    alt: str
    svg: str


def write_document(results: Results, path: Path, *, command: str) -> list[Path]:
    """Write ``path`` and its pictures into the folder of the same name, ``docs/results/`` of ``docs/RESULTS.md``.

    The same results give the same bytes. Pictures of an earlier time that are none any more are deleted.

    Args:
        command: that makes the document again.

    Returns:
        What was written.

    Raises:
        ConfigError: ``path`` is no Markdown file.
        OutputError: it cannot be written.
    """
    if path.suffix != ".md":
        raise ConfigError(f"--document: '{path}' must be a Markdown file, such as docs/RESULTS.md")
    folder = folder_of(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror or error}") from None
    pictures = _pictures(results)
    for picture in pictures:
        write_text(folder / picture.file_name, picture.svg)
    names = {picture.file_name for picture in pictures}
    for old in folder.glob("*.svg"):
        if old.name not in names:
            old.unlink()
    written = {name: _written(folder / name) for name in (READING, PUBLISHED)}
    write_text(path, document(results, pictures, folder=folder.name, command=command, written=written))
    return [path, *(folder / picture.file_name for picture in pictures)]


def folder_of(path: Path) -> Path:
    return path.with_name(path.stem.lower())


def document(
    results: Results, pictures: Sequence[Picture], *, folder: str, command: str, written: dict[str, list[str]]
) -> str:
    """Markdown of everything, times too.

    Args:
        folder: of the pictures, seen from the document.
        written: lines of :data:`READING` and :data:`PUBLISHED`.
    """
    config = results.plan.config
    lines = [
        f"# {config.title}",
        "",
        f"Tables and pictures of this page are the output of `{command}`; only what stands in "
        f"[{READING}]({folder}/{READING}) and [{PUBLISHED}]({folder}/{PUBLISHED}) is written by hand.",
        "",
    ]
    if not results.is_complete:
        lines += [f"**Unfinished: {results.num_finished} of {len(results.plan.cells)} runs.**", ""]
    lines += [*written[READING], "## Verdicts", ""]
    for outcome in (outcome for outcome in results.outcomes if outcome.is_tested and outcome.comparisons):
        found = [c.verdict for c in outcome.comparisons if _is_different(c, config.confidence)]
        others = len(outcome.comparisons) - len(found)
        rest = [f"no difference found in {others} {'others' if found else 'comparisons'}"] if others else []
        lines.append(f"- **{outcome.task}, {outcome.name}**: {'; '.join([*found, *rest])}")
    lines.append("")
    for task in config.tasks:
        lines += [f"## {task}", ""]
        for outcome in results.outcomes_of(task, are_tested=True):
            lines += [f"### {task}: {outcome.name}", ""]
            shown = [picture for picture in pictures if picture.of == (task, outcome.name)]
            lines += [f"![{picture.alt}]({folder}/{picture.file_name})" for picture in shown]
            lines += ["", *table_lines(outcome_table(results, outcome, with_speed=True)), ""]
            lines += [*table_lines(comparison_table(outcome, confidence=config.confidence)), ""]
            lines += [noise_sentence(outcome, confidence=config.confidence), ""]
        lines += [line.replace("### ", f"### {task}: ") for line in other_figures(results, task)]
        lines += [f"### {task}: cost", "", *table_lines(cost_table(results, task)), ""]
        timing = timing_table(results, task)
        lines += [*table_lines(timing), ""] if timing.rows else []
        if results.plan.is_swept:
            lines += [f"### {task}: learning rates", "", *table_lines(sweep_table(results, task)), ""]
    lines += ["## How to read this", "", *(f"- {line}" for line in method_sentences(results))]
    lines += [f"- {TIMING_SENTENCE}", ""]
    return "\n".join([*lines, *written[PUBLISHED]]).rstrip("\n") + "\n"


def _pictures(results: Results) -> list[Picture]:
    pictures = []
    for outcome in (outcome for outcome in results.outcomes if outcome.is_tested):
        of = (outcome.task, outcome.name)
        slug = re.sub(r"[^a-z0-9]+", "-", " ".join(of).lower())
        for number, arms in groups_of(results.plan.arms):
            behind = "" if number is None else f", {number} experts"
            for axis in (STEPS, TIME):  # FLOPs per step are the same, but for 2 %
                name = f"{slug}-{axis.name}" + ("" if number is None else f"-{number}")
                svg = curves_of(results, outcome, arms, axis, name=name)
                if svg is not None:
                    alt = f"{outcome.task}: {outcome.name} against {axis.name}{behind}; bands reach over all seeds"
                    pictures.append(Picture(of, f"{name}.svg", alt, standalone(svg)))
        svg = _forest(outcome, confidence=results.plan.config.confidence, name=f"{slug}-differences")
        if svg is not None:
            alt = f"{outcome.task}: differences of {outcome.name} with their intervals"
            pictures.append(Picture(of, f"{slug}-differences.svg", alt, standalone(svg)))
    return pictures


def _forest(outcome: Outcome, *, confidence: float, name: str) -> str | None:
    intervals = [
        Interval(
            label=f"{c.arm} - {c.reference}",
            value=c.difference.mean,
            low=c.difference.interval[0],
            high=c.difference.interval[1],
            is_marked=_is_different(c, confidence),
            other=c.published,
        )
        for c in outcome.comparisons
        if c.difference is not None and c.difference.interval is not None
    ]
    if not intervals:
        return None
    unit = f" in {outcome.unit}" if outcome.unit else ""
    label = f"difference of {outcome.name}{unit}, {confidence:.0%} interval"
    source = outcome.published.source if outcome.published else ""
    return forest(intervals, xlabel=label, name=name, other_label=source)


def _is_different(comparison: Comparison, confidence: float) -> bool:
    return comparison.adjusted_p is not None and comparison.adjusted_p < 1 - confidence


def _written(path: Path) -> list[str]:
    """Lines of a file that may be absent."""
    try:
        return [*path.read_text(encoding="utf-8").strip("\n").split("\n"), ""] if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
