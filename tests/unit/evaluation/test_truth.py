"""What is true of a split, read back from packed shards."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from data_prep import pack_pairs, pack_vqa
from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.truth import caption_references, nlvr2_examples, vqa_annotations
from mhmoe_vl.evaluation.vqa_accuracy import vqa_accuracy
from tests.unit.data.files import write_images
from tests.unit.evaluation.splits import pack_caption_split, pack_nlvr2_split, pack_vqa_split


def test_vqa(tmp_path: Path) -> None:
    answers = ["red"] * 3 + ["dark red"] * 7
    shards = pack_vqa_split(
        tmp_path, [(1, 10, "What color?", answers), (1, 11, "Is it?", ["yes"] * 10), (2, 20, "Is it?", ["no"] * 10)]
    )
    found = vqa_annotations([shards])
    assert [(a["image_id"], a["question_id"], a["question"]) for a in found] == [
        (1, 10, "What color?"),
        (1, 11, "Is it?"),
        (2, 20, "Is it?"),
    ]
    assert [given["answer"] for given in found[0]["answers"]] == answers
    assert found[0]["labels"] == pytest.approx({"red": 0.9, "dark red": 1.0})
    score = vqa_accuracy({10: "red", 11: "yes", 20: "yes"}, found)
    assert score.overall == pytest.approx(100 * (0.9 + 1 + 0) / 3)
    assert score.per_answer_type == pytest.approx({"other": 90, "yes/no": 50})


def test_real_vqa_annotations_survive_packing(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "coco_cc/annotations"
    options = ["--questions", str(folder / "v2_OpenEnded_mscoco_mini_questions.json")]
    options += ["--annotations", str(folder / "v2_mscoco_mini_annotations.json"), "--min-answer-count", "2"]
    options += ["--images", str(shared_data / "coco_cc/images"), "--image-pattern", "train2017/{image_id:012d}.jpg"]
    assert pack_vqa.main([*options, "--out", str(tmp_path / "x")]) == 0
    official = json.loads((folder / "v2_mscoco_mini_annotations.json").read_bytes())["annotations"]
    found = vqa_annotations([str(tmp_path / "x")])
    assert len(found) == len(official)
    predictions = {a["question_id"]: "2" for a in official}
    assert vqa_accuracy(predictions, found).official() == vqa_accuracy(predictions, official).official()


def test_nlvr2(tmp_path: Path) -> None:
    rows = [("dev-1-0-0", "One dog", True), ("dev-1-0-1", "Two dogs", False), ("dev-2-1-0", "One dog", False)]
    found = nlvr2_examples([pack_nlvr2_split(tmp_path, rows)])
    assert sorted((e["identifier"], e["sentence"], e["label"]) for e in found) == rows


def test_captions(tmp_path: Path) -> None:
    captions = {139: ["a man", "a woman"], 9: ["food"], 25: ["a giraffe", "trees"]}
    assert caption_references([pack_caption_split(tmp_path, captions)]) == captions


def test_several_shards_are_one_split(tmp_path: Path) -> None:
    first = pack_caption_split(tmp_path / "a", {1: ["x"], 2: ["y"]})
    second = pack_caption_split(tmp_path / "b", {2: ["z"]})
    found = caption_references([first, second])
    assert found == {1: ["x"], 2: ["y", "z"]}


def test_real_captions_survive_packing(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "coco_cc/annotations/dataset_coco_mini_karpathy.json"
    options = ["--karpathy", str(source), "--images", str(shared_data / "coco_cc/images"), "--out", str(tmp_path / "x")]
    assert pack_pairs.main([*options, "--split", "test"]) == 0
    expected = defaultdict(list)
    for image in json.loads(source.read_bytes())["images"]:
        if image["split"] == "test":
            expected[image["cocoid"]] += [" ".join(sentence["raw"].split()) for sentence in image["sentences"]]
    assert expected
    assert caption_references([str(tmp_path / "x")]) == expected


def test_splits_without_truth(tmp_path: Path) -> None:
    shards = pack_vqa_split(tmp_path / "vqa", [(1, 10, "Is it?", None)])
    with pytest.raises(DataError, match=r"question 10 has no answers \(a test split\?\)"):
        vqa_annotations([shards])
    shards = pack_nlvr2_split(tmp_path / "nlvr2", [("test1-1-0-0", "One dog", None)])
    with pytest.raises(DataError, match=r"example test1-1-0-0 has no label \(a test split\?\)"):
        nlvr2_examples([shards])


def test_shards_of_another_kind(tmp_path: Path) -> None:
    shards = pack_caption_split(tmp_path, {1: ["x"]})
    for read, kind in ((vqa_annotations, "vqa"), (nlvr2_examples, "nlvr2")):
        with pytest.raises(DataError, match=f"is a shard of kind 'pair', and '{kind}' is needed here"):
            read([shards])


def test_image_ids_that_cannot_be_scored(tmp_path: Path) -> None:
    write_images(tmp_path, [1])
    (tmp_path / "t.csv").write_text("image,caption\n000000000001.jpg,a man\n")
    command = ["--table", str(tmp_path / "t.csv"), "--images", str(tmp_path), "--out", str(tmp_path / "shards")]
    assert pack_pairs.main(command) == 0
    with pytest.raises(DataError, match="is not a whole number, as caption scoring needs"):
        caption_references([str(tmp_path / "shards")])
