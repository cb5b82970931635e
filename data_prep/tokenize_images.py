"""python -m data_prep.tokenize_images --shards data/images --tokenizer data/visual_codebook.safetensors --views 8 \\
    --out data/images-coded

The visual codes of images, made once before training instead of in every step. Writes the shards again with the codes
beside each image: of the whole image, or of --views crops, which pretraining then takes in turn, if
data.train.NAME.codes=true.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.data.prepare.command_line import output_parser, positive_int, print_reports
from mhmoe_vl.data.prepare.records import make_key
from mhmoe_vl.errors import exit_on_user_error
from mhmoe_vl.train.tokenize_images import Tokenization, tokenize_images


def main(argv: Sequence[str] | None = None) -> int:
    """Tokenize images; see the top of this file."""
    args = _parse(argv)
    with exit_on_user_error():
        options = Tokenization(
            tokenizer=args.tokenizer,
            image_size=args.image_size,
            num_views=args.views,
            crop_scale=None if args.no_crop else args.crop_scale,
            flip=not args.no_flip,
            seed=args.seed,
            device=args.device,
        )
        report = tokenize_images(
            args.shards,
            options,
            directory=args.out,
            name=make_key(args.name or args.out.resolve().name),
            num_workers=args.workers,
            overwrite=args.overwrite,
        )
        return print_reports([report], args.max_skipped)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = output_parser(__doc__)
    parser.add_argument("--shards", nargs="+", required=True, help="shards with images: directories, files, globs")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="the visual tokenizer")
    parser.add_argument("--image-size", type=positive_int, default=224, metavar="N", help="of the model (default 224)")
    parser.add_argument(
        "--views",
        type=_count,
        default=1,
        metavar="V",
        help="crops of each image; 0 or 1: the whole image (default 1)",
    )
    parser.add_argument(
        "--crop-scale",
        type=_scale,
        default=0.2,
        metavar="S",
        help="as data.augment.crop_scale of the run: smallest share of the area that a crop keeps (default 0.2)",
    )
    parser.add_argument("--no-crop", action="store_true", help="as data.augment.crop_scale=null")
    parser.add_argument("--no-flip", action="store_true", help="as data.augment.flip=false")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the crops (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto)")
    return parser.parse_args(argv)


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {value}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
