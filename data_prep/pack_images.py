"""python -m data_prep.pack_images --images ILSVRC2012/train --out data/imagenet

All images below a folder to shards, without annotations. Links to folders are followed; hidden files, and files with
other extensions than those of images, are counted and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mhmoe_vl.data.prepare.command_line import holdout_directory, packing_of, packing_parser, printable, run_packing
from mhmoe_vl.data.prepare.image_folder import list_images
from mhmoe_vl.data.prepare.records import ImageRoot
from mhmoe_vl.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Pack images; see the top of this file."""
    args = packing_parser(__doc__).parse_args(argv)
    with exit_on_user_error():
        packing = packing_of(args, "image")
        folder = list_images(ImageRoot(args.images).path, exclude=[args.out, holdout_directory(args.out)])
        if folder.num_ignored:
            print(printable(f"{args.images}: {folder.ignored_line()}"))
        return run_packing(args, replace(packing, facts={"num_ignored": folder.num_ignored}), folder.records)


if __name__ == "__main__":
    raise SystemExit(main())
