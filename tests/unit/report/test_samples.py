from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.errors import DataError
from mhmoe_vl.report.collect import RunRecord, read_run
from mhmoe_vl.report.samples import (
    caption_samples,
    class_samples,
    evaluated_shards,
    nlvr2_samples,
    retrieval_samples,
    sample_order,
    vqa_samples,
)
from tests.unit.report.runs import run_config, write_pairs, write_run, write_shard, write_tokenizer


@given(st.integers(1, 300))
def test_the_order_has_every_item_once(num_items: int) -> None:
    assert sorted(sample_order(num_items)) == list(range(num_items))


def test_the_order_is_not_that_of_the_shards() -> None:
    assert list(sample_order(100))[:10] != list(range(10))


def read(tmp_path: Path, task: dict[str, Any], source: dict[str, Any], files: dict[str, str]) -> RunRecord:
    config = run_config(tmp_path / "run", task, source, write_tokenizer(tmp_path / "tokenizer.json"))
    directory = write_run(config)
    for name, text in files.items():
        (directory / name).write_text(text)
    return read_run(directory, task=task["kind"])


def vqa_run(tmp_path: Path, questions: list[dict[str, Any]], predictions: dict[int, str]) -> tuple[RunRecord, str]:
    shard = write_shard(tmp_path / "vqa.tar", "vqa", [({"image_id": 1, "questions": questions}, ["png"])])
    (tmp_path / "answers.json").write_text(json.dumps({"answers": ["2", "3"]}))
    task = {"kind": "vqa", "answers": str(tmp_path / "answers.json")}
    rows = [{"question_id": number, "answer": answer} for number, answer in predictions.items()]
    files = {"vqa_predictions.json": json.dumps(rows)}
    return read(tmp_path, task, {"kind": "vqa", "shards": str(shard)}, files), str(shard)


def question(number: int, answers: list[str]) -> dict[str, Any]:
    kinds = {"question_type": "how many", "answer_type": "number"}
    return {"question_id": number, "question": f"how many, {number}?", "answers": answers} | kinds


def test_a_question_has_the_official_credit_of_its_prediction(tmp_path: Path) -> None:
    # Two of ten agree: left out in turn, two annotators leave one match (1/3) and eight leave two (2/3).
    questions = [question(7, ["2"] * 2 + ["3"] * 8), question(8, ["2"] * 10)]
    run, shard = vqa_run(tmp_path, questions, {7: "2", 8: "2"})
    by_text = {sample.question: sample for sample in vqa_samples(run, [shard], num_samples=5)}
    assert len(by_text) == 2
    sample = by_text["how many, 7?"]
    assert sample.credit == pytest.approx(0.6)
    assert sample.prediction == "2"
    assert sample.humans == [("3", 8), ("2", 2)]
    assert sample.image.startswith("data:image/png;base64,")
    assert by_text["how many, 8?"].credit == 1.0


def test_as_many_samples_as_asked_for(tmp_path: Path) -> None:
    run, shard = vqa_run(tmp_path, [question(n, ["2"] * 10) for n in range(9)], dict.fromkeys(range(9), "2"))
    few, more = (vqa_samples(run, [shard], num_samples=n) for n in (2, 5))
    assert len(few) == 2
    assert more[:2] == few


def test_predictions_of_another_split_name_the_option(tmp_path: Path) -> None:
    run, shard = vqa_run(tmp_path, [question(7, ["2"] * 10)], {99: "2"})
    with pytest.raises(DataError, match=r"vqa_predictions\.json: has no prediction for 7 .*--vqa-data"):
        vqa_samples(run, [shard], num_samples=1)


def test_a_split_without_answers_names_the_option(tmp_path: Path) -> None:
    run, shard = vqa_run(tmp_path, [{"question_id": 7, "question": "?"}], {7: "2"})
    with pytest.raises(DataError, match=r"no true answers.*--vqa-data"):
        vqa_samples(run, [shard], num_samples=1)


def test_sentences_have_both_images_and_the_label(tmp_path: Path) -> None:
    examples = [{"identifier": "dev-0-0-0", "sentence": "both are red.", "label": False}]
    shard = write_shard(
        tmp_path / "n.tar", "nlvr2", [({"pair": "dev-0-0", "examples": examples}, ["left.png", "right.png"])]
    )
    source = {"kind": "nlvr2", "shards": str(shard)}
    run = read(tmp_path, {"kind": "nlvr2"}, source, {"nlvr2_predictions.csv": "dev-0-0-0,True\n"})
    (sample,) = nlvr2_samples(run, [str(shard)], num_samples=3)
    assert (sample.sentence, sample.prediction, sample.label) == ("both are red.", True, False)
    assert sample.left.startswith("data:image/png")
    assert sample.right.startswith("data:image/png")


def test_captions_stand_beside_their_references(tmp_path: Path) -> None:
    shard = write_pairs(tmp_path / "pairs.tar", 3)
    rows = [{"image_id": number, "caption": f"caption {number}"} for number in range(3)]
    source = {"kind": "pair", "shards": str(shard)}
    run = read(tmp_path, {"kind": "captioning"}, source, {"caption_predictions.json": json.dumps(rows)})
    samples = caption_samples(run, [str(shard)], num_samples=3)
    assert sorted(sample.prediction for sample in samples) == ["caption 0", "caption 1", "caption 2"]
    assert samples[0].references == ["a small red square above the circle", "the large blue circle"]


def test_found_captions_stand_beside_the_image_s_own(tmp_path: Path) -> None:
    shard = write_pairs(tmp_path / "pairs.tar", 2)
    best = {"0": ["1/0", "0/1", "1/1", "0/0"], "1": ["1/1", "1/0", "0/0", "0/1"]}
    whole = {"captions_of": best, "images_of": {}}
    files = {"retrieval_rankings.json": json.dumps({"whole": whole, "fold_size": None, "captions_per_image": None})}
    run = read(tmp_path, {"kind": "retrieval"}, {"kind": "pair", "shards": str(shard)}, files)
    by_first = {sample.found[0][1]: sample for sample in retrieval_samples(run, [str(shard)], num_samples=2)}
    red, blue = "a small red square above the circle", "the large blue circle"
    assert by_first[False].found == [(red, False), (blue, True), (blue, False)]
    assert by_first[True].found == [(blue, True), (red, True), (red, False)]
    assert by_first[True].captions == [red, blue]
    assert by_first[True].image.startswith("data:image/png")
    with pytest.raises(DataError, match=r"has no prediction for 2 of the shards; name .*--retrieval-data"):
        retrieval_samples(run, [str(write_pairs(tmp_path / "more.tar", 3))], num_samples=3)


def test_the_first_three_classes_beside_the_true_one(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "c.tar", "class", [({"class": name}, ["png"]) for name in ("cat", "dog")])
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    files = {"class_predictions.json": json.dumps({"0000": ["dog", "cat", "a", "b"], "0001": ["dog"]})}
    task = {"kind": "classification", "classes": str(tmp_path / "classes.json")}
    run = read(tmp_path, task, {"kind": "class", "shards": str(shard)}, files)
    found = {sample.label: sample.predictions for sample in class_samples(run, [str(shard)], num_samples=5)}
    assert found == {"cat": ["dog", "cat", "a"], "dog": ["dog"]}


def test_named_shards_come_before_those_of_the_validation(tmp_path: Path) -> None:
    run, shard = vqa_run(tmp_path, [question(7, ["2"] * 10)], {7: "2"})
    assert evaluated_shards(run, None) == [shard]
    assert evaluated_shards(run, ["elsewhere"]) == ["elsewhere"]
