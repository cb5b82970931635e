"""python -m data_prep.pack_images --images ILSVRC2012/train --out data/imagenet

All images below a folder to shards, without annotations.
"""

from __future__ import annotations

from collections.abc import Sequence

from mhmoe_vl.data.prepare.command_line import packing_of, packing_parser, run_packing
from mhmoe_vl.data.prepare.image_folder import read_image_folder
from mhmoe_vl.data.prepare.records import ImageRoot
from mhmoe_vl.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Pack images; see the top of this file."""
    args = packing_parser(__doc__).parse_args(argv)
    with exit_on_user_error():
        images = ImageRoot(args.images)
        return run_packing(args, packing_of(args, "image"), lambda: read_image_folder(images.path))


if __name__ == "__main__":
    raise SystemExit(main())
