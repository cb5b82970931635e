"""Train:  torchrun --nproc-per-node 2 -m mhmoe_vl.train --config configs/pretrain/FILE.yaml a.b=c

Runs without torchrun too. Calling it again with the same configuration resumes the run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from mhmoe_vl.config import dump_config, load_config
from mhmoe_vl.distributed.expert_parallel import require_divisor
from mhmoe_vl.distributed.world import World, launched_rank, launched_world_size, open_world
from mhmoe_vl.errors import exit_on_user_error
from mhmoe_vl.train.config import RunConfig
from mhmoe_vl.train.dry_run import dry_run
from mhmoe_vl.train.run import train


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mhmoe_vl.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="check data and sizes, print costs, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file")
    arguments = parser.parse_args(argv)
    rank = launched_rank()
    with exit_on_user_error(rank=rank, is_shared=True):
        config = load_config(RunConfig, arguments.config, arguments.overrides)
        if arguments.print_config or arguments.dry_run:
            text = dump_config(config) if arguments.print_config else dry_run(config)
            sys.stdout.write(text if rank == 0 else "")
            return 0
        # Here, because one process's refusal leaves the others of a group waiting.
        require_divisor(config.expert_parallel, "processes", launched_world_size())
    with exit_on_user_error(rank=rank), open_world(config.device) as world:
        _log_to_stderr(world)
        train(config, world)
    return 0


def _log_to_stderr(world: World) -> None:
    logging.basicConfig(
        level=logging.INFO if world.is_main else logging.WARNING,
        format="%(message)s" if world.is_main else f"[rank {world.rank}] %(message)s",
        stream=sys.stderr,
    )


if __name__ == "__main__":
    raise SystemExit(main())
