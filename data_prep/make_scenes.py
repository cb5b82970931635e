"""python -m data_prep.make_scenes --out data/scenes --seed 0

Generates the embedded sample data: pictures of coloured shapes with captions, questions and statements in the
official file formats of COCO captions, VQAv2 and NLVR2, and plain text. The same options give the same bytes,
whatever the number of workers; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mhmoe_vl import __version__
from mhmoe_vl.data.files import TEMPORARY_SUFFIX, write_atomically
from mhmoe_vl.data.prepare.command_line import positive_int
from mhmoe_vl.data.prepare.processes import map_in_processes
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.prepare.scene_language import (
    QUESTION_KINDS,
    balanced_questions,
    balanced_statements,
    captions,
    crowd_answers,
    text_document,
)
from mhmoe_vl.data.prepare.scenes import COLORS, SPLITS, Scene, Split, sample_scenes, write_scene_image
from mhmoe_vl.errors import OutputError, exit_on_user_error

# Images of the two splits never share an id; a question id is its image id times 1000 plus a number, as in VQAv2.
FIRST_IMAGE_ID = {"train": 1, "val": 5_000_001}
IMAGE_PATTERN = "COCO_{data_subtype}_{image_id:012d}.png"

README = f"""Scenes: generated sample data (no photographs, no people), dedicated to the public domain under CC0 1.0.

Made by data_prep.make_scenes with the options in options.json. Everything said about an image follows from its scene
graph in scenes_SPLIT.json (rows and columns of a 4x4 grid, from the top left).

images/SPLIT/             PNG images, named {IMAGE_PATTERN} with data_subtype scenes_SPLIT
captions_SPLIT.json       COCO captions format, five captions an image
vqa_SPLIT_questions.json  VQAv2 format; pack with --image-pattern '{IMAGE_PATTERN}'
vqa_SPLIT_annotations.json
nlvr2_SPLIT.json          NLVR2 format plus left_file and right_file, relative to images/; "query" is its kind
text_SPLIT.txt            one document a line
manifest.json             counts of each split, and the SHA-256 of every file

Each question is asked equally often with each of its answers; each statement is true of two of its four image pairs.
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_prep.make_scenes", description="Generate the sample data.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--image-size", type=positive_int, default=64, help="pixels a side, a multiple of 4 (default 64)"
    )
    parser.add_argument(
        "--num-colors",
        type=int,
        choices=range(2, len(COLORS) + 1),
        default=len(COLORS),
        help=f"fewer are learnt sooner (default {len(COLORS)})",
    )
    parser.add_argument("--questions-per-image", type=positive_int, default=7, help="on average (default 7)")
    for split, images, statements, texts in (("train", 4000, 1500, 8000), ("val", 400, 150, 400)):
        parser.add_argument(f"--num-{split}-images", type=positive_int, default=images, help=f"default {images}")
        parser.add_argument(
            f"--num-{split}-statements",
            type=positive_int,
            default=statements,
            help=f"four pairs each (default {statements})",
        )
        parser.add_argument(
            f"--num-{split}-texts", type=positive_int, default=texts, help=f"documents (default {texts})"
        )
    parser.add_argument("--workers", type=positive_int, default=1, help="processes that draw (default 1)")
    return parser.parse_args(argv)


def claim_folder(args: argparse.Namespace) -> None:
    """Mark ``args.out`` with the options that shape its content; refuse a folder with anything else in it."""
    options = _options(args)
    stamp = args.out / "options.json"
    try:
        if not stamp.exists():
            if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
                raise OutputError(f"{args.out}: not an empty folder; choose another --out")
        elif stamp.read_bytes() != _json(options).encode():
            raise OutputError(
                f"{args.out}: made with other options (see {stamp.name}); choose another --out or delete it"
            )
        for split in SPLITS:
            (args.out / "images" / split).mkdir(parents=True, exist_ok=True)
        for leftover in args.out.rglob(f"*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
    except OSError as error:
        raise OutputError(f"{args.out}: cannot write: {error.strerror}; choose another --out") from None
    _write_if_absent(stamp, lambda: _json(options))
    _write_if_absent(args.out / "README.txt", lambda: README)


def draw_images(scenes: dict[int, Scene], split: Split, args: argparse.Namespace) -> None:
    """Draw the images that are not there yet."""
    folder = args.out / "images" / split
    jobs = [
        (scene, folder / image_name(image_id, split), args.image_size, (abs(args.seed), image_id))
        for image_id, scene in scenes.items()
    ]
    jobs = [job for job in jobs if not job[1].exists()]
    drawn = map_in_processes(_draw, jobs, num_workers=args.workers)
    for _ in show_progress(drawn, label=f"drawing {split} images", amount=lambda _: 1, total=len(jobs)):
        pass


def image_name(image_id: int, split: Split) -> str:
    return IMAGE_PATTERN.format(data_subtype=f"scenes_{split}", image_id=image_id)


def coco_captions(scenes: dict[int, Scene], split: Split, args: argparse.Namespace) -> dict[str, Any]:
    """The scenes as a COCO captions annotation file."""
    rng = random.Random(f"{args.seed}/{split}/captions")
    size = {"height": args.image_size, "width": args.image_size}
    no_source = {"coco_url": "", "flickr_url": "", "date_captured": ""}
    images = [{"id": i, "file_name": image_name(i, split), "license": 1, **size, **no_source} for i in scenes]
    texts = [(image_id, caption) for image_id, scene in scenes.items() for caption in captions(scene, rng)]
    annotations = [{"image_id": i, "id": number, "caption": text} for number, (i, text) in enumerate(texts, start=1)]
    return {"info": _info(), "licenses": [_license(id=1)], "images": images, "annotations": annotations}


def vqa_files(
    scenes: dict[int, Scene], split: Split, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The questions file and the annotations file of VQAv2."""
    rng = random.Random(f"{args.seed}/{split}/vqa")
    asked = balanced_questions(list(scenes.values()), len(scenes) * args.questions_per_image, rng)
    questions, annotations = [], []
    for image_id, batch in zip(scenes, asked, strict=True):
        for number, question in enumerate(rng.sample(batch, len(batch))):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            kind = QUESTION_KINDS[question.kind]
            answers = [
                {"answer": answer, "answer_confidence": "yes" if answer == question.answer else "maybe", "answer_id": n}
                for n, answer in enumerate(crowd_answers(question, rng), start=1)
            ]
            questions.append({**ids, "question": question.text})
            annotations.append(
                {
                    "question_type": kind.question_type,
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                    "answer_type": kind.answer_type,
                    **ids,
                }
            )
    shared = {"info": _info(), "license": _license(), "data_type": "scenes", "data_subtype": f"scenes_{split}"}
    return {**shared, "task_type": "Open-Ended", "questions": questions}, {**shared, "annotations": annotations}


def nlvr2_lines(scenes: dict[int, Scene], split: Split, args: argparse.Namespace) -> list[str]:
    """One NLVR2 example a line: a statement with one of its four pairs of images."""
    rng = random.Random(f"{args.seed}/{split}/nlvr2")
    files = [f"{split}/{image_name(image_id, split)}" for image_id in scenes]
    statements = balanced_statements(list(scenes.values()), getattr(args, f"num_{split}_statements"), rng)
    return [
        json.dumps(
            {
                "identifier": f"{split}-{set_number}-{pair_number}-0",
                "sentence": statement.text,
                "label": str(truth),
                "left_file": files[left],
                "right_file": files[right],
                "left_url": "",
                "right_url": "",
                "writer": "generated",
                "validation": {"generated": str(truth)},
                "synset": "scene",
                "query": statement.kind,
            }
        )
        for set_number, statement in enumerate(statements)
        for pair_number, (left, right, truth) in enumerate(statement.pairs)
    ]


def text_lines(split: Split, args: argparse.Namespace) -> list[str]:
    """Documents about scenes of ``split`` other than the ones that are drawn."""
    rng = random.Random(f"{args.seed}/{split}/text")
    scenes = sample_scenes(
        split, getattr(args, f"num_{split}_texts"), seed=args.seed, stream="text", num_colors=args.num_colors
    )
    return [text_document(scene, rng) for scene in scenes]


def make_split(split: Split, args: argparse.Namespace) -> None:
    """Write everything of one split that is not there yet."""
    drawn = sample_scenes(split, getattr(args, f"num_{split}_images"), seed=args.seed, num_colors=args.num_colors)
    scenes = dict(enumerate(drawn, start=FIRST_IMAGE_ID[split]))
    draw_images(scenes, split, args)
    graph = [{"image_id": image_id, **asdict(scene)} for image_id, scene in scenes.items()]
    _write_if_absent(args.out / f"scenes_{split}.json", lambda: _json(graph))
    _write_if_absent(args.out / f"captions_{split}.json", lambda: _json(coco_captions(scenes, split, args)))
    questions, annotations = args.out / f"vqa_{split}_questions.json", args.out / f"vqa_{split}_annotations.json"
    if not (questions.exists() and annotations.exists()):
        for path, tree in zip((questions, annotations), vqa_files(scenes, split, args), strict=True):
            _write_if_absent(path, partial(_json, tree))
    _write_if_absent(args.out / f"nlvr2_{split}.json", lambda: _lines(nlvr2_lines(scenes, split, args)))
    _write_if_absent(args.out / f"text_{split}.txt", lambda: _lines(text_lines(split, args)))


def write_manifest(args: argparse.Namespace) -> None:
    """Say how much there is of everything, and the checksum of each file; written last."""
    manifest = args.out / "manifest.json"
    paths = sorted(path for path in args.out.rglob("*") if path.is_file() and path != manifest)
    content = {
        "format": "mhmoe_vl/scenes/1",
        "version": __version__,
        "options": _options(args),
        "counts": {split: _counts(args.out, split) for split in SPLITS},
        "files": {
            path.relative_to(args.out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
        },
    }
    text = json.dumps(content, indent=1) + "\n"
    if not manifest.exists() or manifest.read_text() != text:
        write_atomically(manifest, text.encode())


def main(argv: Sequence[str] | None = None) -> int:
    with exit_on_user_error():
        args = parse_args(argv)
        claim_folder(args)
        for split in SPLITS:
            make_split(split, args)
        write_manifest(args)
        print(args.out)
    return 0


def _draw(job: tuple[Scene, Path, int, tuple[int, ...]]) -> None:
    scene, path, image_size, noise_seed = job
    write_scene_image(scene, path, image_size=image_size, noise_seed=noise_seed)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the content."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "workers")}


def _counts(out: Path, split: Split) -> dict[str, int]:
    return {
        "num_images": sum(1 for _ in (out / "images" / split).iterdir()),
        "num_captions": len(json.loads((out / f"captions_{split}.json").read_bytes())["annotations"]),
        "num_questions": len(json.loads((out / f"vqa_{split}_questions.json").read_bytes())["questions"]),
        "num_nlvr2_examples": len((out / f"nlvr2_{split}.json").read_bytes().splitlines()),
        "num_texts": len((out / f"text_{split}.txt").read_bytes().splitlines()),
    }


def _info() -> dict[str, Any]:
    return {
        "description": "Scenes: generated sample data (data_prep.make_scenes)",
        "url": "",
        "version": "1.0",
        "year": 2025,
        "contributor": "mhmoe_vl",
        "date_created": "2025-01-01",
    }


def _license(**more: int) -> dict[str, Any]:
    return {"url": "https://creativecommons.org/publicdomain/zero/1.0/", "name": "CC0 1.0", **more}


def _json(tree: Any) -> str:
    return json.dumps(tree) + "\n"


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _write_if_absent(path: Path, make_text: Callable[[], str]) -> None:
    if not path.exists():
        write_atomically(path, make_text().encode())


if __name__ == "__main__":
    raise SystemExit(main())
