"""Convert weights.

python -m mhmoe_vl.convert from-beit3 --checkpoint beit3_base_patch16_224.pth --out runs/beit3-base
python -m mhmoe_vl.convert from-beit3 --checkpoint beit3_base_patch16_480_vqa.pth --out runs/released-vqa \\
  --config configs/beit3/vqa.yaml
python -m mhmoe_vl.convert to-beit3 --run runs/beit3-vqa --out vqa.pth
python -m mhmoe_vl.convert upcycle --run runs/beit3-base --config configs/beit3/mhmoe.yaml --out runs/beit3-mhmoe-start
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.config import load_config
from mhmoe_vl.convert.beit3 import from_beit3, to_beit3
from mhmoe_vl.convert.upcycle import describe, upcycle
from mhmoe_vl.data.prepare.command_line import positive_int
from mhmoe_vl.errors import ConfigError, exit_on_user_error
from mhmoe_vl.train.config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    with exit_on_user_error():
        sys.stdout.write(_COMMANDS[args.command](args))
    return 0


def _from_beit3(args: argparse.Namespace) -> str:
    if args.config is None and (args.overrides or args.answer2label):
        raise ConfigError("--config: is required with settings (a.b=c) and with --answer2label")
    return from_beit3(
        args.checkpoint,
        args.out,
        config=None if args.config is None else load_config(RunConfig, args.config, args.overrides),
        answer2label=args.answer2label,
        num_heads=args.num_heads,
        keep_unknown=args.keep_unknown,
    )


def _to_beit3(args: argparse.Namespace) -> str:
    return to_beit3(args.run, args.out)


def _upcycle(args: argparse.Namespace) -> str:
    config = load_config(RunConfig, args.config, args.overrides)
    closeness = upcycle(args.run, config, args.out, num_samples=args.num_samples, fit_steps=args.fit_steps)
    return describe(closeness, config, args.out)


_COMMANDS = {"from-beit3": _from_beit3, "to-beit3": _to_beit3, "upcycle": _upcycle}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mhmoe_vl.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("from-beit3", help="a released checkpoint as a directory that init_from can name")
    command.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help=".pth, or safetensors of the same names"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--config", metavar="FILE", help="of the same fine-tuning: makes a run that eval.* can score")
    command.add_argument("--answer2label", type=Path, metavar="FILE", help="the released VQA code's list of answers")
    command.add_argument("--num-heads", type=int, metavar="N", help="attention heads (default: one for 64 values)")
    command.add_argument("--keep-unknown", action="store_true", help="put tensors of unknown names aside")
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override --config")

    command = commands.add_parser("to-beit3", help="weights of a run as the released code reads them")
    command.add_argument("--run", type=Path, required=True, metavar="DIR")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help=".pth, or .safetensors")

    command = commands.add_parser("upcycle", help="a dense run as the start of a sparse one")
    command.add_argument("--run", type=Path, required=True, metavar="DIR", help="dense; or what from-beit3 wrote")
    command.add_argument("--config", required=True, metavar="FILE", help="of the sparse run that is to start")
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument(
        "--num-samples", type=positive_int, default=96, metavar="N", help="of the training data to look at (default 96)"
    )
    command.add_argument(
        "--fit-steps", type=int, default=300, metavar="N", help="for each layer on sub-tokens (default 300)"
    )
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override --config")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
