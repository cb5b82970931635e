"""python -m data_prep.pack_classes --images imagenet/train --out data/imagenet-train

Images in the folder layout of ImageNet, CLASS/.../IMAGE, to shards with the class of each; and classes.json, the list
that a classifier chooses from, sorted by name. A folder without images is no class. Pack the other splits with
--classes data/imagenet-train/classes.json, so that the numbers of the classes are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mhmoe_vl.data.prepare.class_folder import class_list, class_records, classes_of, read_class_list
from mhmoe_vl.data.prepare.command_line import holdout_directory, packing_of, packing_parser, printable, run_packing
from mhmoe_vl.data.prepare.image_folder import list_images
from mhmoe_vl.data.prepare.records import ImageRoot
from mhmoe_vl.data.shards import encode_json
from mhmoe_vl.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Pack images with their classes; see the top of this file."""
    parser = packing_parser(__doc__)
    parser.add_argument("--classes", type=Path, metavar="FILE", help="use this classes.json of another split")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        folder = list_images(ImageRoot(args.images).path, exclude=[args.out, holdout_directory(args.out)])
        if folder.num_ignored:
            print(printable(f"{args.images}: {folder.ignored_line()}"))
        content = read_class_list(args.classes) if args.classes else class_list(classes_of(folder))
        absent = sorted(set(content["classes"]) - set(classes_of(folder)))
        if absent:
            print(printable(f"{args.images}: no image of {len(absent)} classes, first {absent[0]}"))
        encoded = encode_json(content)
        packing = replace(
            packing_of(args, "class"),
            settings={"classes_sha256": hashlib.sha256(encoded).hexdigest()},
            facts={"num_ignored": folder.num_ignored, "num_classes": len(content["classes"])},
            files={"classes.json": encoded},
        )
        return run_packing(args, packing, lambda: class_records(folder, content["classes"]))


if __name__ == "__main__":
    raise SystemExit(main())
