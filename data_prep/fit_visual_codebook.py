"""python -m data_prep.fit_visual_codebook --shards data/images data/pairs --out data/visual_codebook.safetensors

The simplest visual tokenizer: k-means over the patches of images, pixel values scaled to [-1, 1]. Masked image modeling
then predicts the number of the nearest mean. Prints how evenly the codes are used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mhmoe_vl.data.files import check_writable, write_atomically
from mhmoe_vl.data.prepare.command_line import positive_int, print_skips
from mhmoe_vl.errors import exit_on_user_error
from mhmoe_vl.train.visual_codebook import fit_visual_codebook


def main(argv: Sequence[str] | None = None) -> int:
    """Fit a codebook; see the top of this file."""
    args = _parse(argv)
    with exit_on_user_error():
        check_writable(args.out)
        fitted = fit_visual_codebook(
            args.shards,
            num_codes=args.num_codes,
            image_size=args.image_size,
            patch_size=args.patch_size,
            max_images=args.max_images,
            seed=args.seed,
            num_workers=args.workers,
        )
        write_atomically(args.out, fitted.codebook.serialized())
        print(
            f"{args.out}: {fitted.codebook.num_codes} codes of {args.patch_size}-px patches from {fitted.num_patches} "
            f"patches of {fitted.num_images} images; {fitted.num_used} codes used, perplexity {fitted.perplexity:.1f}"
        )
        if fitted.skipped:
            print_skips(Console(), fitted.skipped, title=f"skipped {len(fitted.skipped)} images")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", required=True, help="shards with images: directories, files, globs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--num-codes", type=positive_int, default=512, metavar="N", help="(default 512)")
    parser.add_argument(
        "--image-size", type=positive_int, default=224, metavar="N", help="images become this square (default 224)"
    )
    parser.add_argument("--patch-size", type=positive_int, default=16, metavar="N", help="(default 16)")
    parser.add_argument(
        "--max-images", type=positive_int, default=2000, metavar="N", help="drawn at random (default 2000)"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="(default 0)")
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=1,
        metavar="N",
        help="processes that decode images; the result is the same",
    )
    return parser.parse_args(argv)


def _seed(text: str) -> int:
    value = int(text)
    # What scikit-learn takes.
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^32 - 1, not {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
