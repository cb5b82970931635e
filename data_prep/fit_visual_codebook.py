"""python -m data_prep.fit_visual_codebook --shards data/images data/pairs --out data/visual_codebook.safetensors

The simplest visual tokenizer: k-means over the patches of images, pixel values scaled to [-1, 1]. Masked image modeling
then predicts the number of the nearest mean. Prints how evenly the codes are used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mhmoe_vl.errors import exit_on_user_error
from mhmoe_vl.train.visual_codebook import fit_visual_codebook


def main(argv: Sequence[str] | None = None) -> int:
    """Fit a codebook; see the top of this file."""
    parser = argparse.ArgumentParser(description="K-means codebook over image patches.")
    parser.add_argument("--shards", nargs="+", required=True, help="shards with images: directories, files, globs")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--num-codes", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=224, help="images are resized to this square")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--max-images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with exit_on_user_error():
        fitted = fit_visual_codebook(
            args.shards,
            num_codes=args.num_codes,
            image_size=args.image_size,
            patch_size=args.patch_size,
            max_images=args.max_images,
            seed=args.seed,
        )
        fitted.codebook.save(args.out)
        print(
            f"{args.out}: {fitted.codebook.num_codes} codes of {args.patch_size}-px patches from {fitted.num_patches} "
            f"patches of {fitted.num_images} images; {fitted.num_used} codes used, perplexity {fitted.perplexity:.1f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
