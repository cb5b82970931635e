"""VQAv2 question and annotation files (the official format) to one record per image."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from mhmoe_vl.data.decode import clean_text
from mhmoe_vl.data.prepare.json_files import id_of, json_type, objects_of, read_json_object
from mhmoe_vl.data.prepare.records import ImageRoot, Record, Records, numeric_key
from mhmoe_vl.data.shards import Skip
from mhmoe_vl.data.vqa_answers import soft_targets
from mhmoe_vl.errors import DataError

COCO_IMAGE_PATTERN = "COCO_{data_subtype}_{image_id:012d}.jpg"


def read_vqa(
    questions: Path, annotations: Path | None, images: ImageRoot, *, image_pattern: str = COCO_IMAGE_PATTERN
) -> Records:
    """Records with all questions of an image, in the order of the question file.

    Args:
        annotations: None for a test split; its questions then have no answers and no labels.
        image_pattern: path below the images root, with ``{image_id}`` and ``{data_subtype}``.

    Raises:
        DataError: not of that format, files of two different splits, or a pattern that does not fit the image ids.
    """
    content = read_json_object(questions)
    data_subtype = str(content.get("data_subtype", ""))
    answers = None
    if annotations is not None:
        answers = yield from _read_annotations(annotations, data_subtype)
    by_image: dict[Any, list[dict[str, Any]]] = {}
    seen = set()
    for question in objects_of(questions, content, "questions"):
        question_id = id_of(questions, question, "question_id")
        if question_id in seen:
            yield Skip(f"question {question_id}", "duplicate_id", "an earlier question has this id")
            continue
        seen.add(question_id)
        image_id = id_of(questions, question, "image_id")
        try:
            packed_question = _pack(question, answers)
        except _UnusableQuestionError as error:
            yield Skip(f"question {question_id}", error.reason, str(error))
        else:
            by_image.setdefault(image_id, []).append(packed_question)
    for question_id in answers or {}:
        if question_id not in seen:
            place = f"annotation of question {question_id}"
            yield Skip(place, "annotation_without_question", f"{questions.name} does not ask it")
    for image_id, packed in by_image.items():
        file = _image_file(image_pattern, image_id, data_subtype)
        if images.has(file):
            fields = {"image_id": image_id, "file": file, "questions": packed}
            yield Record(numeric_key(image_id), images={"": file}, fields=fields)
        else:
            place = f"{len(packed)} questions, first {packed[0]['question_id']}"
            yield Skip(place, "image_missing", f"{file} is not in the images folder '{images.path.name}'")


class _UnusableQuestionError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _read_annotations(path: Path, data_subtype: str) -> Generator[Skip, None, dict[Any, dict[str, Any]]]:
    content = read_json_object(path)
    if content.get("data_subtype", data_subtype) != data_subtype:
        raise DataError(
            f"{path}: annotations are of '{content['data_subtype']}' and questions of '{data_subtype}': "
            "give files of the same split"
        )
    answers: dict[Any, dict[str, Any]] = {}
    for annotation in objects_of(path, content, "annotations"):
        question_id = id_of(path, annotation, "question_id")
        if question_id in answers:
            yield Skip(f"annotation of question {question_id}", "duplicate_id", "an earlier annotation has this id")
        answers.setdefault(question_id, annotation)
    return answers


def _pack(question: Mapping[str, Any], annotations: Mapping[Any, Mapping[str, Any]] | None) -> dict[str, Any]:
    """The entry of one question in the JSON member."""
    asked = question.get("question")
    text = clean_text(asked) if isinstance(asked, str) else ""
    if not text:
        raise _UnusableQuestionError("empty_question", "no visible character")
    packed = {"question_id": question["question_id"], "question": text}
    if annotations is None:
        return packed
    annotation = annotations.get(question["question_id"])
    if annotation is None:
        raise _UnusableQuestionError("no_annotation", "the annotation file has no answers to it")
    if annotation.get("image_id") != question["image_id"]:
        detail = f"asked about image {question['image_id']}, answered about image {annotation.get('image_id')}"
        raise _UnusableQuestionError("image_id_mismatch", detail)
    given = annotation.get("answers")
    rows = given if isinstance(given, list) else []
    answers = [entry["answer"] for entry in rows if isinstance(entry, dict) and isinstance(entry.get("answer"), str)]
    if not answers or len(answers) != len(rows):
        raise _UnusableQuestionError("no_answers", "answers must be a list of objects with a string 'answer'")
    described = {name: annotation.get(name) for name in ("question_type", "answer_type", "multiple_choice_answer")}
    wrong = next((name for name, value in described.items() if not isinstance(value, str | None)), None)
    if wrong is not None:
        raise _UnusableQuestionError("bad_annotation", f"'{wrong}' is {json_type(described[wrong])}, not a string")
    return {
        **packed,
        **described,
        "answers": answers,
        "labels": soft_targets(answers),
    }


def _image_file(pattern: str, image_id: Any, data_subtype: str) -> str:
    try:
        return pattern.format(image_id=image_id, data_subtype=data_subtype)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"--image-pattern '{pattern}' does not fit image id {image_id!r}: {error}; "
            "it may use {image_id} (of numbers also {image_id:012d}) and {data_subtype}"
        ) from None
