"""Study:  python -m mhmoe_vl.study --config configs/study/FILE.yaml a.b=c

Trains every arm on every task with every seed, and compares them. Calling it again goes on where it stopped. Several
processes may do so at once, on all machines that share the study's directory:

  python -m mhmoe_vl.study --config FILE --workers 4                            four processes on this machine
  python -m mhmoe_vl.study --config FILE --list                                 names and states of all cells
  torchrun --nproc-per-node 8 -m mhmoe_vl.study --config FILE --cell NAME       one cell, on many GPUs
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.config import dump_config, load_config
from mhmoe_vl.distributed.world import launched_rank, launched_world_size
from mhmoe_vl.errors import ConfigError, exit_on_user_error
from mhmoe_vl.evaluation.results_files import write_text
from mhmoe_vl.study.cells import Cell, Plan
from mhmoe_vl.study.config import StudyConfig
from mhmoe_vl.study.cost import costs_of, mismatches, require_parity
from mhmoe_vl.study.execute import (
    directory_of,
    has_diverged,
    is_finished,
    is_ready,
    is_running,
    require_same_study,
    run_all,
    try_cell,
)
from mhmoe_vl.study.results import Results, as_json, collect
from mhmoe_vl.study.stopwatch import measure_times
from mhmoe_vl.study.tables import markdown, timing_markdown
from mhmoe_vl.study.workers import run_workers


def main(argv: Sequence[str] | None = None) -> int:
    """Run or describe a study; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m mhmoe_vl.study", description=__doc__.partition("\n\n")[2])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="YAML file; see configs/study/")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print every cell with its state, and stop")
    what.add_argument("--dry-run", action="store_true", help="print costs and their mismatch, train nothing")
    what.add_argument("--cell", metavar="NAME", help="run this cell alone")
    what.add_argument("--only-run", action="store_true", help="run what is not finished, no times, no results")
    what.add_argument("--only-report", action="store_true", help="write the results of what is finished")
    parser.add_argument(
        "--document",
        type=Path,
        metavar="FILE",
        help="write the results as Markdown too, such as docs/RESULTS.md, with pictures in docs/results/",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of the study that override the file")
    arguments = parser.parse_args(argv)
    rank = launched_rank()
    with exit_on_user_error(rank=rank, is_shared=True):
        if arguments.workers < 1:
            raise ConfigError(f"--workers: {arguments.workers} must be 1 or more")
        if arguments.document and (arguments.list or arguments.dry_run or arguments.cell or arguments.only_run):
            raise ConfigError(
                "--document: is written where results are: leave out --list, --dry-run, --cell, --only-run"
            )
        if launched_world_size() > 1 and arguments.cell is None:
            raise ConfigError("torchrun trains one cell on several processes: name it with --cell; --list shows them")
        plan = Plan(load_config(StudyConfig, arguments.config, arguments.overrides))
        found = mismatches(plan, costs_of(plan))
        require_parity(found)
        cell = None if arguments.cell is None else plan.cell(arguments.cell)
    if arguments.list:
        with exit_on_user_error():
            sys.stdout.writelines(f"{state_of(plan, cell):9} {cell.name}\n" for cell in plan.cells)
        return 0
    _log_to_stderr(is_main=rank == 0)
    logger = logging.getLogger("mhmoe_vl.study")
    for mismatch in found:
        logger.info(
            "%s: %s against %s: FLOPs per token %+.2f %%, active parameters %+.2f %%, parameters %+.2f %%",
            mismatch.task, mismatch.arm, mismatch.reference,
            100 * mismatch.flops, 100 * mismatch.active_params, 100 * mismatch.params,
        )  # fmt: skip
    logger.info("%d cells, %d arms, match=%s", len(plan.cells), len(plan.arms), plan.config.match)
    if arguments.dry_run:
        return 0
    with exit_on_user_error(rank=rank):
        require_same_study(plan)
        if cell is not None:
            _run_one(plan, cell)
            return 0
        if not arguments.only_report:
            if arguments.workers > 1:
                given = ["--config", arguments.config, *arguments.overrides]
                run_workers(plan, given, num_workers=arguments.workers)
            else:
                run_all(plan)
        if not arguments.only_run:
            if not arguments.only_report:
                measure_times(plan)
            results = collect(plan)
            paths = write_results(plan, results)
            if arguments.document is not None:
                from mhmoe_vl.study.document import write_document

                # What does not change the results is left out: however they came about, the page is the same.
                given = ["--config", arguments.config, "--document", str(arguments.document), *arguments.overrides]
                command = shlex.join(["python", "-m", "mhmoe_vl.study", *given])
                paths += write_document(results, arguments.document, command=command)
            sys.stdout.writelines(f"{path}\n" for path in paths)
    return 0


def write_results(plan: Plan, results: Results) -> list[Path]:
    """``study.json``, the tables and the page, of what is finished."""
    from mhmoe_vl.study.page import render_page  # matplotlib takes seconds to import, and workers draw nothing

    texts = {
        "config.yaml": dump_config(plan.config),
        "study.json": json.dumps(as_json(results), indent=1) + "\n",
        "study.md": markdown(results),
        "times.md": timing_markdown(results),
        "study.html": render_page(results),
    }
    plan.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(plan.out / name, text)
    return [plan.out / name for name in texts]


def state_of(plan: Plan, cell: Cell) -> str:
    """``finished``, ``diverged``, ``running``, ``ready``, or ``waiting`` for other cells."""
    if not is_ready(plan, cell):
        return "waiting"
    if is_finished(plan, cell):
        return "diverged" if has_diverged(directory_of(plan, cell)) else "finished"
    return "running" if is_running(plan, cell) else "ready"


def _run_one(plan: Plan, cell: Cell) -> None:
    missing = [needed.name for needed in plan.needs(cell) if not is_finished(plan, needed)]
    if missing:
        raise ConfigError(f"--cell: {cell.name} needs {', '.join(missing)}, which is not finished")
    if not try_cell(plan, cell):
        raise ConfigError(f"--cell: {cell.name} is being run by another process")


def _log_to_stderr(*, is_main: bool) -> None:
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
