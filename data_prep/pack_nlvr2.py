"""python -m data_prep.pack_nlvr2 --examples dev.json --images nlvr2/images --out data/nlvr2-dev

NLVR2 files (one JSON object per line) to shards, one sample per image pair with all sentences about it. Images are
looked for as {split}/{directory}/{pair}-img0.png and in the folders above it; rows with left_file and right_file, paths
below --images, name their images themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mhmoe_vl.data.prepare.command_line import packing_of, packing_parser, run_packing
from mhmoe_vl.data.prepare.nlvr2 import read_nlvr2
from mhmoe_vl.data.prepare.records import ImageRoot
from mhmoe_vl.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Pack NLVR2; see the top of this file."""
    parser = packing_parser(__doc__, has_holdout=False)
    parser.add_argument("--examples", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        images = ImageRoot(args.images)
        packing = replace(packing_of(args, "nlvr2"), settings={"source": args.examples.name})
        return run_packing(args, packing, lambda: list(read_nlvr2(args.examples, images)))


if __name__ == "__main__":
    raise SystemExit(main())
