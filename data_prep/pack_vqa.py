r"""python -m data_prep.pack_vqa --questions v2_OpenEnded_mscoco_train2014_questions.json \
    --annotations v2_mscoco_train2014_annotations.json --images train2014 --out data/vqa-train

Official VQAv2 files to shards, one sample per image with all its questions; and answers.json, the list that a
classifier chooses from: answers seen at least --min-answer-count times in this split or in the files of --answers-from.
Published results take train and val together (3129 answers):
  --answers-from v2_mscoco_train2014_annotations.json v2_mscoco_val2014_annotations.json
Pack the other splits with --answers data/vqa-train/answers.json; a test split has no --annotations.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mhmoe_vl.data.prepare.answer_list import build_answer_list, count_answers, read_answer_list, share_outside
from mhmoe_vl.data.prepare.command_line import packing_of, packing_parser, positive_int, run_packing
from mhmoe_vl.data.prepare.packing import Packing
from mhmoe_vl.data.prepare.records import ImageRoot, Record
from mhmoe_vl.data.prepare.vqa import COCO_IMAGE_PATTERN, read_vqa
from mhmoe_vl.data.shards import Skip, encode_json
from mhmoe_vl.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Pack VQA; see the top of this file."""
    args = _parse(argv)
    with exit_on_user_error():
        images = ImageRoot(args.images)
        packing = _with_answers(args, packing_of(args, "vqa"))
        if "share_outside_answers" in packing.facts:
            share, num_answers = packing.facts["share_outside_answers"], packing.facts["num_answers"]
            print(f"answers outside the list of {num_answers}: the commonest answer of {share:.2%} of the questions")

        def read() -> list[Record | Skip]:
            return list(read_vqa(args.questions, args.annotations, images, image_pattern=args.image_pattern))

        return run_packing(args, packing, read)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = packing_parser(__doc__, has_holdout=False)
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="answers; leave out for a test split")
    parser.add_argument(
        "--image-pattern",
        default=COCO_IMAGE_PATTERN,
        metavar="PATTERN",
        help=f"image path below --images (default {COCO_IMAGE_PATTERN})",
    )
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument("--answers", type=Path, metavar="FILE", help="use this answers.json of another split")
    answers.add_argument(
        "--answers-from", type=Path, nargs="+", metavar="FILE", help="make the list of answers from these annotations"
    )
    parser.add_argument("--min-answer-count", type=positive_int, default=9, metavar="N", help="(default 9)")
    return parser.parse_args(argv)


def _with_answers(args: argparse.Namespace, packing: Packing) -> Packing:
    settings: dict[str, Any] = {"source": args.questions.name, "image_pattern": args.image_pattern}
    answers = _answers(args)
    if answers is None:
        return replace(packing, settings=settings)
    content = encode_json(answers)
    facts: dict[str, Any] = {"num_answers": len(answers["answers"])}
    if args.annotations:
        facts["share_outside_answers"] = share_outside(args.annotations, answers["answers"])
    settings["answers_sha256"] = hashlib.sha256(content).hexdigest()
    return replace(packing, settings=settings, facts=facts, files={"answers.json": content})


def _answers(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.answers:
        return read_answer_list(args.answers)
    sources = args.answers_from or ([args.annotations] if args.annotations else [])
    return build_answer_list(count_answers(sources), min_count=args.min_answer_count) if sources else None


if __name__ == "__main__":
    raise SystemExit(main())
