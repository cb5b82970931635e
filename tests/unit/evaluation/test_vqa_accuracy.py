"""VQA accuracy against recorded output of the official evaluator, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.data.vqa_answers import agreement, normalize_answer, soft_targets
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.evaluation.vqa_accuracy import (
    EvaluatorVersion,
    load_vqa_results,
    vqa_accuracy,
    write_vqa_results,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evaluation"


def annotation(question_id: int, answers: list[str], **fields: str) -> dict[str, Any]:
    rows = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, start=1)]
    return {"question_id": question_id, "question_type": "what", "answer_type": "other", "answers": rows} | fields


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    """400 questions with awkward answers, and what both official versions (run under Python 3) made of them."""
    return json.loads((FIXTURES / "vqa_official.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", ["2021", "2017"])
def test_equals_the_official_evaluator(official: dict[str, Any], version: EvaluatorVersion) -> None:
    annotations = [
        annotation(row["question_id"], row["answers"]) | {k: row[k] for k in ("question_type", "answer_type")}
        for row in official["annotations"]
    ]
    predictions = {row["question_id"]: row["answer"] for row in official["predictions"]}
    score = vqa_accuracy(predictions, annotations, version=version)
    expected = official["official"][version]
    assert score.official() == expected["accuracy"]
    rounded = {str(key): round(100 * value, 2) for key, value in score.per_question.items()}
    assert rounded == expected["evalQA"]
    assert (score.n, score.version) == (400, version)


def test_normalization_equals_the_official_one(official: dict[str, Any]) -> None:
    wrong = {raw: normalize_answer(raw) for raw, out in official["normalized"] if normalize_answer(raw) != out}
    assert wrong == {}


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The two Dogs.", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("x-ray", "x ray"),
        ("red, white", "red white"),
        ("3.5", "3.5"),
        ("." * 40, "." * 8),
        ("the", ""),
    ],
)
def test_normalization_by_hand(raw: str, normal: str) -> None:
    assert normalize_answer(raw) == normal


@pytest.mark.parametrize(("num_equal", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_agreement_leaves_each_annotator_out(num_equal: int, score: float) -> None:
    humans = ["cat"] * num_equal + [f"other {number}" for number in range(10 - num_equal)]
    assert agreement("cat", humans) == pytest.approx(score, abs=1e-15)


def test_unanimous_answers_are_normalized_in_2017_only() -> None:
    annotations = [annotation(1, ["yes"] * 10)]
    assert vqa_accuracy({1: "Yes"}, annotations).overall == 0.0
    assert vqa_accuracy({1: "Yes"}, annotations, version="2017").overall == 100.0


def test_accuracies_are_per_type_and_not_rounded() -> None:
    annotations = [
        annotation(1, ["cat"] * 3 + list("abcdefg"), answer_type="other", question_type="what"),
        annotation(2, ["2"] * 10, answer_type="number", question_type="how many"),
        annotation(3, ["2"] * 10, answer_type="number", question_type="what"),
    ]
    score = vqa_accuracy({1: "cat", 2: "2", 3: "3"}, annotations)
    assert score.overall == pytest.approx(190 / 3, abs=1e-12)
    assert score.per_answer_type == {"other": pytest.approx(90), "number": 50.0}
    assert score.per_question_type == {"what": pytest.approx(45), "how many": 100.0}
    assert score.official()["overall"] == 63.33


def test_annotations_stay_as_they_are() -> None:
    annotations = [annotation(1, ["The Cat", "dog."] * 5)]
    before = json.dumps(annotations)
    first = vqa_accuracy({1: "cat"}, annotations)
    assert json.dumps(annotations) == before
    assert vqa_accuracy({1: "cat"}, annotations) == first


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({1: "a"}, r"1 missing id \(2\)"),
        ({1: "a", 2: "a", 3: "a"}, r"1 unknown id \(3\)"),
        (dict.fromkeys(range(100, 130), "a"), r"30 unknown ids \(100, .*109, \.\.\.\); 2 missing ids \(1, 2\)"),
    ],
)
def test_question_ids_must_match(predictions: dict[int, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        vqa_accuracy(predictions, [annotation(1, ["a"] * 10), annotation(2, ["a"] * 10)])


def test_broken_annotations_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 repeated id \(1\)"):
        vqa_accuracy({1: "a"}, [annotation(1, ["a"]), annotation(1, ["a"])])
    with pytest.raises(DataError, match="lacks answers"):
        vqa_accuracy({1: "a"}, [{"question_id": 1, "question_type": "what", "answer_type": "other"}])
    with pytest.raises(DataError, match="empty"):
        vqa_accuracy({}, [])
    with pytest.raises(ConfigError, match="2019"):
        vqa_accuracy({1: "a"}, [annotation(1, ["a"])], version="2019")  # type: ignore[arg-type]


def test_results_files(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_vqa_results(path, {3: "café", 1: "yes"})
    assert json.loads(path.read_text(encoding="utf-8"))[0] == {"question_id": 3, "answer": "café"}
    assert load_vqa_results(path) == {3: "café", 1: "yes"}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "b"}]', r"1 duplicate id \(1\)"),
        ('[{"question_id": "1", "answer": "a"}]', "row 0"),
        ('[{"question_id": 1, "answer": null}]', "row 0"),
        ('[{"question_id": true, "answer": "a"}]', "row 0"),
        ('{"1": "a"}', "expected a list"),
        ("[", "JSON"),
    ],
)
def test_malformed_results_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_vqa_results(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_soft_targets_by_hand() -> None:
    targets = soft_targets(["Two"] * 3 + ["2"] + ["the"] * 2 + ["three"] * 2 + ["cat", "a cat."])
    assert targets == {"2": 1.0, "3": pytest.approx(0.6), "cat": pytest.approx(0.6)}
    assert list(targets) == ["2", "3", "cat"]
    with pytest.raises(DataError):
        soft_targets([])


@given(st.lists(st.sampled_from(["yes", "Yes.", "no", "two", "2", "a", "don't", "dont"]), min_size=10, max_size=10))
def test_soft_targets_are_what_the_evaluator_gives(answers: list[str]) -> None:
    targets = soft_targets(answers)
    assert all(0 < value <= 1 for value in targets.values())
    if len(set(answers)) > 1:
        for answer, value in targets.items():
            score = vqa_accuracy({1: answer}, [annotation(1, answers)])
            # An answer such as "2" is its own normal form, so the evaluator reads it as the target does.
            assert score.per_question[1] == value
