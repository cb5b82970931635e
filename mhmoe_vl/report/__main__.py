"""Report:  python -m mhmoe_vl.report --pretrain runs/x/pretrain --vqa runs/x/vqa --out report.html

Writes one HTML file that opens from disk, without a network. Give any of --pretrain, --vqa, --nlvr2, --captioning,
--retrieval and --classification; a run that is still in training or not evaluated yet shows what it has so far.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.distributed.world import open_world
from mhmoe_vl.errors import ConfigError, exit_on_user_error
from mhmoe_vl.evaluation.results_files import write_text
from mhmoe_vl.report.collect import TASKS, read_run
from mhmoe_vl.report.page import ReportOptions, render_page
from mhmoe_vl.report.scores import write_scores


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m mhmoe_vl.report", description="One HTML page about runs.")
    for task in TASKS:
        parser.add_argument(f"--{task}", type=Path, metavar="RUN", help=f"directory of a {task} run")
    for task in TASKS[1:]:
        parser.add_argument(
            f"--{task}-data", nargs="+", metavar="SHARDS", help="evaluated shards (default: the run's validation)"
        )
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--scores", type=Path, help="JSON file to write the headline scores to")
    parser.add_argument("--title", default="Vision-language pretraining: report", help="heading of the page")
    parser.add_argument("--num-samples", type=int, default=8, help="samples per task; 0 shows none")
    parser.add_argument(
        "--num-analysed",
        type=int,
        default=64,
        help="held-out samples per source on which the experts of --pretrain are measured; 0 leaves that out",
    )
    arguments = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    with exit_on_user_error():
        directories = {task: getattr(arguments, task) for task in TASKS if getattr(arguments, task) is not None}
        if not directories:
            raise ConfigError(f"no run: give at least one of {', '.join(f'--{task}' for task in TASKS)}")
        for option, number in (("num-samples", arguments.num_samples), ("num-analysed", arguments.num_analysed)):
            if number < 0:
                raise ConfigError(f"--{option}: {number} must be 0 or more")
        runs = [read_run(directory, task=task) for task, directory in directories.items()]
        shards = {task: getattr(arguments, f"{task}_data") for task in TASKS[1:]}
        options = ReportOptions(
            title=arguments.title,
            shards={task: of_task for task, of_task in shards.items() if of_task is not None},
            num_samples=arguments.num_samples,
            num_analysed=arguments.num_analysed,
            command=shlex.join(["python", "-m", "mhmoe_vl.report", *given]),
        )
        with open_world() as world:
            write_text(arguments.out, render_page(runs, world, options))
        sys.stdout.write(f"{arguments.out}\n")
        if arguments.scores is not None:
            write_scores(arguments.scores, [run.card for run in runs if run.card is not None])
            sys.stdout.write(f"{arguments.scores}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
