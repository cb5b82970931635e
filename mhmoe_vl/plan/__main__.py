"""Plan:  python -m mhmoe_vl.plan --config configs/pretrain/FILE.yaml --world-size 64 --device h100 a.b=c

Parameters, FLOPs, memory per rank, time of a step and hours of a run, before anything runs, and a refusal of layouts
that cannot be. Needs no data and no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from mhmoe_vl.config import load_config
from mhmoe_vl.errors import exit_on_user_error
from mhmoe_vl.plan.devices import NAMES, find_device
from mhmoe_vl.plan.plan import make_plan
from mhmoe_vl.plan.report import describe
from mhmoe_vl.train.config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mhmoe_vl.plan", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks")
    parser.add_argument(
        "--device", default="this", help=f"{', '.join(NAMES)}; cpu and this one are measured, others from datasheets"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, FLOPs")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file")
    arguments = parser.parse_args(argv)
    with exit_on_user_error():
        config = load_config(RunConfig, arguments.config, arguments.overrides)
        device = find_device(arguments.device, precision=config.precision)
        plan = make_plan(config, device, world_size=arguments.world_size)
        sys.stdout.write(json.dumps(plan.as_dict(), indent=2) + "\n" if arguments.json else describe(plan, config))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
