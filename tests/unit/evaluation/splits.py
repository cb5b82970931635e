"""Small splits, packed by the project's own packers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from data_prep import pack_classes, pack_nlvr2, pack_pairs, pack_vqa
from tests.unit.data.files import image_bytes, write_images


def pack_vqa_split(folder: Path, questions: Sequence[tuple[int, int, str, Sequence[str] | None]]) -> str:
    """Rows of image id, question id, text and answers (None for a test split); returns the shards."""
    write_images(folder, {image for image, *_ in questions})
    rows = [{"image_id": image, "question_id": number, "question": text} for image, number, text, _ in questions]
    (folder / "questions.json").write_text(json.dumps({"data_subtype": "x", "questions": rows}))
    command = ["--questions", str(folder / "questions.json"), "--images", str(folder)]
    command += ["--image-pattern", "{image_id:012d}.jpg", "--out", str(folder / "shards")]
    annotations = [
        {
            "image_id": image,
            "question_id": number,
            "question_type": " ".join(text.split()[:2]).lower(),
            "answer_type": "yes/no" if answers[0] in ("yes", "no") else "other",
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": answer, "answer_id": n + 1} for n, answer in enumerate(answers)],
        }
        for image, number, text, answers in questions
        if answers is not None
    ]
    if annotations:
        (folder / "annotations.json").write_text(json.dumps({"data_subtype": "x", "annotations": annotations}))
        command += ["--annotations", str(folder / "annotations.json"), "--min-answer-count", "1"]
    assert pack_vqa.main(command) == 0
    return str(folder / "shards")


def pack_nlvr2_split(folder: Path, examples: Sequence[tuple[str, str, bool | None]]) -> str:
    """Rows of identifier, sentence and label."""
    folder.mkdir(parents=True, exist_ok=True)
    for identifier, *_ in examples:
        for number in (0, 1):
            name = f"{identifier.rsplit('-', 1)[0]}-img{number}.png"
            (folder / name).write_bytes(image_bytes(number, format="PNG"))
    lines = [json.dumps({"identifier": i, "sentence": s, "label": label}) for i, s, label in examples]
    (folder / "rows.json").write_text("\n".join(lines))
    command = ["--examples", str(folder / "rows.json"), "--images", str(folder), "--out", str(folder / "shards")]
    assert pack_nlvr2.main(command) == 0
    return str(folder / "shards")


def pack_caption_split(folder: Path, captions: dict[int, Sequence[str]]) -> str:
    """COCO captions by image id."""
    write_images(folder, captions)
    rows = [(image, caption) for image, of_image in captions.items() for caption in of_image]
    source = {
        "images": [{"id": image, "file_name": f"{image:012d}.jpg"} for image in captions],
        "annotations": [{"image_id": image, "id": n, "caption": caption} for n, (image, caption) in enumerate(rows)],
    }
    (folder / "captions.json").write_text(json.dumps(source))
    command = ["--coco", str(folder / "captions.json"), "--images", str(folder), "--out", str(folder / "shards")]
    assert pack_pairs.main(command) == 0
    return str(folder / "shards")


def pack_class_split(folder: Path, files: Sequence[str]) -> str:
    """Files such as ``dog/1.jpg``."""
    for number, file in enumerate(files):
        (folder / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / file).write_bytes(image_bytes(number))
    assert pack_classes.main(["--images", str(folder / "images"), "--out", str(folder / "shards")]) == 0
    return str(folder / "shards")
