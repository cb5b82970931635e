"""python -m data_prep.pack_pairs --coco captions_train2017.json --images train2017 --out data/coco-train

Images with captions to shards, from one of:
  --coco       an official COCO caption file; image names are relative to --images
  --karpathy   dataset_coco.json or dataset_flickr30k.json, with --split train+restval, val or test
  --table      a .csv or .tsv with a header, or a .jsonl, with a column of image paths and columns of captions
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mhmoe_vl.data.prepare.caption_table import read_caption_table
from mhmoe_vl.data.prepare.coco_captions import read_coco_captions
from mhmoe_vl.data.prepare.command_line import packing_of, packing_parser, run_packing
from mhmoe_vl.data.prepare.karpathy import read_karpathy
from mhmoe_vl.data.prepare.records import ImageRoot, Records
from mhmoe_vl.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Pack pairs; see the top of this file."""
    args = _parse(argv)
    with exit_on_user_error():
        images = ImageRoot(args.images)
        source = args.coco or args.karpathy or args.table
        settings: dict[str, object] = {"source": source.name}
        if args.karpathy:
            settings |= {"split": args.split}
        elif args.table:
            settings |= {"image_column": args.image_column, "caption_columns": args.caption_columns}
        return run_packing(
            args, replace(packing_of(args, "pair"), settings=settings), lambda: list(_read(args, images))
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = packing_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--coco", type=Path, metavar="FILE")
    source.add_argument("--karpathy", type=Path, metavar="FILE")
    source.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--split", default="train+restval", help="of --karpathy, joined by + (default train+restval)")
    parser.add_argument("--image-column", default="image", help="of --table (default image)")
    parser.add_argument("--caption-columns", nargs="+", default=["caption"], help="of --table (default caption)")
    return parser.parse_args(argv)


def _read(args: argparse.Namespace, images: ImageRoot) -> Records:
    if args.coco:
        return read_coco_captions(args.coco, images)
    if args.karpathy:
        return read_karpathy(args.karpathy, args.split.split("+"), images)
    return read_caption_table(args.table, images, image_column=args.image_column, caption_columns=args.caption_columns)


if __name__ == "__main__":
    raise SystemExit(main())
