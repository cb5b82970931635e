"""VQAv2 files, real and broken, and the list of answers."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from data_prep.pack_vqa import main
from mhmoe_vl.data.decode import decode_json
from mhmoe_vl.data.prepare.answer_list import build_answer_list
from mhmoe_vl.data.shards import ShardReader, find_shards, read_index
from mhmoe_vl.errors import DataError
from tests.unit.data.files import write_images


def packed(folder: Path) -> dict[str, dict[str, Any]]:
    samples, reader = {}, ShardReader()
    for shard in find_shards(folder):
        index = read_index(shard)
        for sample in index.samples:
            samples[sample.key] = decode_json(reader.read(index, sample)["json"])
            assert sample.num_items == len(samples[sample.key]["questions"])
    return samples


def skips(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return [(skip["source"], skip["reason"]) for skip in map(json.loads, lines)]


def question(image: int, number: int, text: str = "What?") -> dict[str, Any]:
    return {"image_id": image, "question_id": image * 1000 + number, "question": text}


def annotation(image: int, number: int, *answers: str) -> dict[str, Any]:
    return {
        "image_id": image,
        "question_id": image * 1000 + number,
        "question_type": "what",
        "answer_type": "other",
        "multiple_choice_answer": answers[0],
        "answers": [{"answer": answer, "answer_id": i + 1} for i, answer in enumerate(answers)],
    }


class Source:
    """A folder with images 1 to 3 and VQA files beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        write_images(folder, [1, 2, 3])

    def write(self, name: str, rows: list[dict[str, Any]], subtype: str = "train2014") -> str:
        key = "annotations" if "annotations" in name else "questions"
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({"data_subtype": subtype, key: rows}))
        return str(path)

    def run(self, *options: str) -> dict[str, dict[str, Any]]:
        fixed = ["--images", str(self.folder), "--image-pattern", "{image_id:012d}.jpg", "--out", str(self.out)]
        assert main([*fixed, "--max-skipped", "1", "--overwrite", *options]) == 0
        return packed(self.out)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_real_questions_of_real_photos(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "coco_cc/annotations"
    questions = folder / "v2_OpenEnded_mscoco_mini_questions.json"
    annotations = folder / "v2_mscoco_mini_annotations.json"
    options = ["--questions", str(questions), "--annotations", str(annotations), "--min-answer-count", "2"]
    images = ["--images", str(shared_data / "coco_cc/images"), "--image-pattern", "train2017/{image_id:012d}.jpg"]
    assert main([*options, *images, "--out", str(tmp_path / "x")]) == 0
    official = {row["question_id"]: row for row in json.loads(annotations.read_bytes())["annotations"]}
    expected = defaultdict(list)
    for row in json.loads(questions.read_bytes())["questions"]:
        given = official[row["question_id"]]
        answers = [answer["answer"] for answer in given["answers"]]
        expected[f"{row['image_id']:012d}"].append((row["question"], given["multiple_choice_answer"], answers))
    found = {
        key: [(q["question"], q["multiple_choice_answer"], q["answers"]) for q in fields["questions"]]
        for key, fields in packed(tmp_path / "x").items()
    }
    assert found == expected
    # These answers are already in normal form, so that plain counting gives the list.
    counts = Counter(row["multiple_choice_answer"] for row in official.values())
    content = json.loads((tmp_path / "x/answers.json").read_bytes())
    assert set(content["answers"]) == {answer for answer, count in counts.items() if count >= 2}
    manifest = json.loads((tmp_path / "x/manifest.json").read_bytes())
    outside = sum(count for count in counts.values() if count < 2)
    assert manifest["share_outside_answers"] == pytest.approx(outside / len(official))
    assert manifest["num_items"] == len(official)


def test_labels_are_soft_scores_of_normalised_answers(source: Source) -> None:
    answers = ["Two", "2", "a 2", "3", "3.", *["the 4"] * 5]
    samples = source.run(
        "--questions", source.write("questions", [question(1, 0, " How  many? ")]),
        "--annotations", source.write("annotations", [annotation(1, 0, *answers)]),
        "--min-answer-count", "1",
    )  # fmt: skip
    (packed_question,) = samples["000000000001"]["questions"]
    assert packed_question["question"] == "How many?"
    assert packed_question["answers"] == answers
    # Three, two and five of ten annotators, leaving each out in turn: 0.9, 0.6 and 1.
    assert packed_question["labels"] == pytest.approx({"2": 0.9, "3": 0.6, "4": 1.0})


def test_every_kind_of_broken_question_is_listed(source: Source) -> None:
    questions = [
        question(1, 0), question(1, 1), question(1, 1), question(2, 0, " \n"), question(2, 1), question(3, 0),
        question(3, 1), question(4, 0), question(4, 1),
    ]  # fmt: skip
    annotations = [
        annotation(1, 0, "a"), annotation(1, 0, "b"), annotation(1, 1, "a"), annotation(2, 0, "a"),
        {**annotation(3, 0, "a"), "image_id": 9}, {**annotation(3, 1, "a"), "answers": []},
        annotation(4, 0, "a"), annotation(4, 1, "a"), annotation(5, 0, "a"),
    ]  # fmt: skip
    samples = source.run(
        "--questions", source.write("questions", questions),
        "--annotations", source.write("annotations", annotations),
        "--min-answer-count", "1",
    )  # fmt: skip
    assert [[q["question_id"] for q in fields["questions"]] for fields in samples.values()] == [[1000, 1001]]
    assert samples["000000000001"]["questions"][0]["answers"] == ["a"]
    assert skips(source.out) == [
        ("annotation of question 1000", "duplicate_id"),
        ("question 1001", "duplicate_id"),
        ("question 2000", "empty_question"),
        ("question 2001", "no_annotation"),
        ("question 3000", "image_id_mismatch"),
        ("question 3001", "no_answers"),
        ("annotation of question 5000", "annotation_without_question"),
        ("2 questions, first 4000", "image_missing"),
    ]


def test_a_test_split_has_neither_answers_nor_labels(source: Source) -> None:
    samples = source.run("--questions", source.write("questions", [question(1, 0)]))
    assert samples["000000000001"]["questions"] == [{"question_id": 1000, "question": "What?"}]
    assert not (source.out / "answers.json").exists()


def test_the_answers_of_another_split(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    train = source.write("annotations", [annotation(1, i, "cat") for i in range(9)])
    val = source.write("annotations-val", [annotation(2, 0, "cat"), annotation(2, 1, "dog")])
    questions = source.write("questions", [question(2, 0), question(2, 1)])
    source.run("--questions", questions, "--annotations", val, "--answers-from", train, val)
    made = source.out / "answers.json"
    assert json.loads(made.read_bytes())["answers"] == ["cat"]
    assert json.loads((source.out / "manifest.json").read_bytes())["share_outside_answers"] == 0.5
    said = "answers outside the list of 1: the commonest answer of 50.00% of the questions\n"
    assert capsys.readouterr().out.startswith(said)
    kept = source.folder / "answers.json"
    kept.write_bytes(made.read_bytes())
    source.run("--questions", questions, "--annotations", val, "--answers", str(kept))
    assert made.read_bytes() == kept.read_bytes()


def test_the_answer_list() -> None:
    counts = Counter({"b": 9, "a": 9, "c": 30, "d": 8, "": 50})
    assert build_answer_list(counts, min_count=9)["answers"] == ["c", "a", "b"]
    with pytest.raises(DataError, match=r"no answer occurs 9 times \(the commonest 8\); lower --min-answer-count"):
        build_answer_list(Counter({"d": 8}), min_count=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--annotations", "{val}", "--min-answer-count", "1"],
            "annotations are of 'val2014' and questions of 'train2014'",
        ),
        (["--annotations", "{questions}"], "must have a list of objects 'annotations'"),
        (["--answers", "{questions}"], "has no list 'answers' of strings"),
        (["--image-pattern", "{{id}}.jpg"], "does not fit image id 1: 'id'"),
        (["--image-pattern", "{{image_id:z}}.jpg"], "does not fit image id 1"),
        (["--image-pattern", "{{image_id.x}}.jpg"], "does not fit image id 1"),
        (["--image-pattern", "{{image_id[x]}}.jpg"], "does not fit image id 1"),
        (
            [],
            "1 of 1 entries were skipped as image_missing, first 1 questions, first 1000: COCO_train2014_000000000001",
        ),
        (["--images", "absent"], "images folder does not exist"),
    ],
)
def test_files_that_do_not_fit(
    source: Source, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    questions = source.write("questions", [question(1, 0)])
    val = source.write("annotations", [annotation(1, 0, "cat")], subtype="val2014")
    options = [option.format(val=val, questions=questions) for option in options]
    with pytest.raises(SystemExit, match="65"):
        main(["--questions", questions, "--images", str(source.folder), "--out", str(source.out), *options])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("value", [None, True, 1.5, [1], {"a": 1}, "x", "a" * 300, "\0", "\ud800", 10**30])
@pytest.mark.parametrize("field", ["question_id", "image_id", "question", "question_type", "answers", "answer"])
def test_one_field_of_another_type_is_a_skip_or_one_line(
    source: Source, capsys: pytest.CaptureFixture[str], field: str, value: Any
) -> None:
    questions = [question(image, 0) for image in (1, 2)]
    annotations = [annotation(image, 0, "cat") for image in (1, 2)]
    for row in (questions[1], annotations[1], annotations[1]["answers"][0]):
        if field in row:
            row[field] = value
    options = ["--questions", source.write("questions", questions), "--min-answer-count", "1"]
    options += ["--annotations", source.write("annotations", annotations)]
    with contextlib.suppress(SystemExit):
        source.run(*options)
    assert capsys.readouterr().err.count("\n") <= 1
