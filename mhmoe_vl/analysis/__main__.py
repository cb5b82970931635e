r"""What the experts of a trained run do:

    python -m mhmoe_vl.analysis --run runs/x/pretrain --data data/pairs-val data/text-val --out runs/x/analysis
    python -m mhmoe_vl.analysis --run runs/x/pretrain --out runs/x/analysis \
        --against runs/x/pretrain/checkpoints/step_0000200

Passes held-out samples through the encoder, unmasked, and writes analysis.json (all numbers) and analysis.html (one
page that opens from disk, without a network). docs/analysis.md defines the figures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.analysis.against import load_other_encoder
from mhmoe_vl.analysis.measure import analyse_experts, require_experts
from mhmoe_vl.analysis.sources import analysed_sources
from mhmoe_vl.distributed.world import open_world
from mhmoe_vl.errors import ConfigError, OutputError, exit_on_user_error
from mhmoe_vl.evaluation.results_files import write_text
from mhmoe_vl.report.analysis_page import render_analysis
from mhmoe_vl.train import run_directory
from mhmoe_vl.train.trained import load_trained


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write both files; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m mhmoe_vl.analysis", description="What the experts of a run do.")
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished run")
    parser.add_argument("--data", nargs="+", metavar="SHARDS", help="shards to look at (default: the run's validation)")
    parser.add_argument("--out", type=Path, required=True, help="folder for analysis.json and analysis.html")
    parser.add_argument(
        "--against", type=Path, metavar="RUN_OR_CHECKPOINT", help="an earlier state of the run, for routing fluctuation"
    )
    parser.add_argument("--num-samples", type=int, default=512, help="of each kind of shards (default: 512)")
    parser.add_argument("--num-pictures", type=int, default=8, help="images with coloured patches (default: 8)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per forward pass (default: 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    with exit_on_user_error():
        for option, least in (("num_samples", 1), ("num_pictures", 0), ("batch_size", 1)):
            if (value := getattr(arguments, option)) < least:
                raise ConfigError(f"--{option.replace('_', '-')}: {value} must be {least} or more")
        config = run_directory.load_run(arguments.run)
        require_experts(config)
        sources = analysed_sources(config, arguments.data)
        with open_world(arguments.device) as world:
            trained = load_trained(arguments.run, world, task_kind=config.task.kind)
            against = None if arguments.against is None else load_other_encoder(trained, arguments.against)
            analysis = analyse_experts(
                trained,
                sources,
                num_samples=arguments.num_samples,
                against=against,
                against_name=None if arguments.against is None else str(arguments.against),
                num_pictures=arguments.num_pictures,
                batch_size=arguments.batch_size,
                show_progress=True,
            )
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{arguments.out}: cannot create the folder: {error.strerror or error}") from None
        command = shlex.join(["python", "-m", "mhmoe_vl.analysis", *given])
        for name, text in (
            ("analysis.json", analysis.as_json()),
            ("analysis.html", render_analysis(analysis, command=command)),
        ):
            write_text(arguments.out / name, text)
            sys.stdout.write(f"{arguments.out / name}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
