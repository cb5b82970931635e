"""VQA accuracy, equal to the official evaluator (GT-Vision-Lab/VQA) to the last digit.

The evaluator exists in two versions that disagree:

- ``"2021"`` (commit a013f00): answers are normalised only where the ten humans disagree; where they agree
  word for word, the prediction must equal their answer as it stands ("Yes" against ten "yes" scores 0).
- ``"2017"`` (commit a4f1afd): predictions are always normalised; human answers only lose their punctuation, and
  that only where they disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mhmoe_vl.data.vqa_answers import agreement, normalize_answer, remove_punctuation, soft_targets, strip_answer
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.evaluation.results_files import check_same_ids, name_ids, read_results, write_results

__all__ = [
    "EvaluatorVersion",
    "VqaScore",
    "load_vqa_results",
    "normalize_answer",
    "soft_targets",
    "vqa_accuracy",
    "write_vqa_results",
]

EvaluatorVersion = Literal["2021", "2017"]


@dataclass(frozen=True)
class VqaScore:
    """Accuracies in percent, not rounded; ``n`` questions. ``per_question`` holds fractions of 1."""

    overall: float
    per_answer_type: Mapping[str, float]
    per_question_type: Mapping[str, float]
    n: int
    version: EvaluatorVersion
    per_question: Mapping[int, float] = field(repr=False)

    def official(self) -> dict[str, Any]:
        """The ``accuracy`` dictionary of the official evaluator, rounded to two decimals as it does."""
        return {
            "overall": round(self.overall, 2),
            "perQuestionType": {name: round(value, 2) for name, value in self.per_question_type.items()},
            "perAnswerType": {name: round(value, 2) for name, value in self.per_answer_type.items()},
        }


def vqa_accuracy(
    predictions: Mapping[int, str],
    annotations: Sequence[Mapping[str, Any]],
    *,
    version: EvaluatorVersion = "2021",
) -> VqaScore:
    """Score ``{question_id: answer}`` against the ``annotations`` list of an official annotation file.

    Each annotation has ``question_id``, ``question_type``, ``answer_type`` and ``answers``, a list of
    ``{"answer": str, ...}``. The annotators are told apart by their place in the list (the official program does it by
    ``answer_id``, which is the same in official files).

    Raises:
        DataError: missing, unknown or repeated question ids, a malformed annotation, or no annotation at all.
        ConfigError: unknown ``version``.
    """
    if version not in get_args(EvaluatorVersion):
        raise ConfigError(f"version: {version!r} is none of {', '.join(get_args(EvaluatorVersion))}")
    question_ids = _question_ids(annotations)
    check_same_ids(predictions, question_ids, what="VQA predictions")
    compare = _compare_2021 if version == "2021" else _compare_2017

    accuracies: dict[int, float] = {}
    by_answer_type: dict[str, list[float]] = {}
    by_question_type: dict[str, list[float]] = {}
    for question_id, annotation in zip(question_ids, annotations, strict=True):
        answer, humans = compare(predictions[question_id], [row["answer"] for row in annotation["answers"]])
        accuracy = agreement(answer, humans)
        accuracies[question_id] = accuracy
        by_answer_type.setdefault(annotation["answer_type"], []).append(accuracy)
        by_question_type.setdefault(annotation["question_type"], []).append(accuracy)
    return VqaScore(
        overall=_percent(list(accuracies.values())),
        per_answer_type={name: _percent(values) for name, values in by_answer_type.items()},
        per_question_type={name: _percent(values) for name, values in by_question_type.items()},
        n=len(accuracies),
        version=version,
        per_question=accuracies,
    )


def load_vqa_results(path: str | Path) -> dict[int, str]:
    """Read an official results file, a JSON list of ``{"question_id": int, "answer": str}``.

    Raises:
        DataError: unreadable file, malformed row, or a question answered twice.
    """
    return read_results(path, id_key="question_id", text_key="answer")


def write_vqa_results(path: str | Path, predictions: Mapping[int, str]) -> None:
    """Write the official results file, which the evaluation server takes too.

    Raises:
        OutputError: the file cannot be written.
    """
    write_results(path, predictions, id_key="question_id", text_key="answer")


def _compare_2021(prediction: str, humans: Sequence[str]) -> tuple[str, list[str]]:
    prediction, stripped = strip_answer(prediction), [strip_answer(human) for human in humans]
    if len(set(stripped)) > 1:
        return normalize_answer(prediction), [normalize_answer(human) for human in stripped]
    return prediction, stripped


def _compare_2017(prediction: str, humans: Sequence[str]) -> tuple[str, list[str]]:
    disagree = len(set(humans)) > 1
    return normalize_answer(prediction), [remove_punctuation(human) if disagree else human for human in humans]


def _percent(accuracies: Sequence[float]) -> float:
    # The official expression, in the official order: another one differs in the last bit.
    return 100 * float(sum(accuracies)) / len(accuracies)


def _question_ids(annotations: Sequence[Mapping[str, Any]]) -> list[int]:
    if not annotations:
        raise DataError("VQA annotations: the list is empty, so there is nothing to score")
    seen: set[int] = set()
    repeated: list[int] = []
    for position, annotation in enumerate(annotations):
        missing = {"question_id", "question_type", "answer_type", "answers"} - annotation.keys()
        if missing or not annotation["answers"]:
            problem = f"lacks {', '.join(sorted(missing))}" if missing else "has no answers"
            raise DataError(f"VQA annotations: annotation {position} {problem}; test splits cannot be scored here")
        if annotation["question_id"] in seen:
            repeated.append(annotation["question_id"])
        seen.add(annotation["question_id"])
    if repeated:
        raise DataError(f"VQA annotations: {name_ids('repeated', repeated)}; each question must occur once")
    return [annotation["question_id"] for annotation in annotations]
