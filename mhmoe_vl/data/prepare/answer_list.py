"""The closed list of answers that a VQA classifier chooses from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from mhmoe_vl.data.prepare.json_files import objects_of, read_json_object
from mhmoe_vl.data.vqa_answers import normalize_answer
from mhmoe_vl.errors import DataError

ANSWERS_FORMAT = "mhmoe_vl/answers/1"


def count_answers(annotation_files: Iterable[Path]) -> Counter[str]:
    """How often each normalised ``multiple_choice_answer`` occurs in official VQAv2 annotation files.

    Raises:
        DataError: a file is not of that format.
    """
    return Counter(answer for path in annotation_files for answer in _answers(path))


def share_outside(annotation_file: Path, answers: Collection[str]) -> float:
    """Share of questions whose ``multiple_choice_answer`` is none of ``answers``: no classifier over them can give it.

    Raises:
        DataError: the file is not of that format.
    """
    known = set(answers)
    inside = [answer in known for answer in _answers(annotation_file)]
    return inside.count(False) / max(1, len(inside))


def build_answer_list(counts: Counter[str], *, min_count: int) -> dict[str, Any]:
    """Content of ``answers.json``: answers seen at least ``min_count`` times, the commonest first.

    Published recipes count the train and val annotations of VQAv2 together and take ``min_count=9`` (3129 answers).

    Raises:
        DataError: no answer is that frequent.
    """
    # What normalises to nothing ("the") is never a target, see soft_targets.
    frequent = (answer for answer, count in counts.items() if count >= min_count and answer)
    kept = sorted(frequent, key=lambda answer: (-counts[answer], answer))
    if not kept:
        commonest = max(counts.values(), default=0)
        raise DataError(
            f"no answer occurs {min_count} times (the commonest {commonest}); lower --min-answer-count, "
            "or name the answers of the training set with --answers"
        )
    return {"format": ANSWERS_FORMAT, "min_count": min_count, "num_answers": len(kept), "answers": kept}


def read_answer_list(path: Path) -> dict[str, Any]:
    """Read an ``answers.json``.

    Raises:
        DataError: not written by :func:`build_answer_list`.
    """
    content = read_json_object(path)
    answers = content.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{path}: has no list 'answers' of strings; use the answers.json of a packed training set")
    return content


def _answers(path: Path) -> Iterator[str]:
    for annotation in objects_of(path, read_json_object(path), "annotations"):
        answer = annotation.get("multiple_choice_answer")
        if not isinstance(answer, str):
            raise DataError(f"{path}: question {annotation.get('question_id')} has no multiple_choice_answer")
        yield normalize_answer(answer)
