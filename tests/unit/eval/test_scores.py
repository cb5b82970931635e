"""The ``score`` step of the evaluation scripts: predictions and shards, no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eval import captioning, classification, nlvr2, retrieval, vqa
from eval.text_baselines import text_baselines
from mhmoe_vl.config import dump_config, validate_config
from mhmoe_vl.evaluation.classification_accuracy import write_class_predictions
from mhmoe_vl.evaluation.prior import TextPrior
from mhmoe_vl.evaluation.retrieval_recall import Rankings, RetrievalPredictions, write_rankings
from mhmoe_vl.evaluation.truth import class_labels
from mhmoe_vl.train.config import RunConfig
from tests.unit.evaluation.splits import pack_caption_split, pack_class_split, pack_nlvr2_split, pack_vqa_split

SCRIPTS = {
    "vqa": vqa,
    "nlvr2": nlvr2,
    "captioning": captioning,
    "retrieval": retrieval,
    "classification": classification,
}


def score(script: ModuleType, folder: Path, predictions: Path, shards: str, *options: str) -> dict[str, Any]:
    """Run the step and return the score card it wrote."""
    card = folder / "card.json"
    command = ["score", "--predictions", str(predictions), "--data", shards, "--out", str(card), *options]
    assert script.main(command) == 0
    return json.loads(card.read_text())


def shown(output: str) -> dict[str, str]:
    """Rows of the printed table."""
    cells = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in output.splitlines() if "│" in line]
    return dict(cells)


@pytest.fixture
def vqa_split(tmp_path: Path) -> dict[str, str]:
    train = [
        (1, 10, "Is it red?", ["no"] * 10),
        (1, 11, "Is it cold?", ["yes"] * 10),
        (2, 20, "What color?", ["red"] * 10),
        (2, 21, "What color?", ["red"] * 10),
        (3, 30, "Is it red?", ["no"] * 10),
        (3, 31, "Is it far?", ["no"] * 10),
    ]
    val = [
        (4, 40, "Is it red?", ["no"] * 10),
        (4, 41, "Is it cold?", ["yes"] * 10),
        (5, 50, "What color?", ["blue"] * 10),
        (5, 51, "What color?", ["red"] * 2 + ["blue"] * 8),
    ]
    return {
        "train": pack_vqa_split(tmp_path / "train", train),
        "val": pack_vqa_split(tmp_path / "val", val),
        "predictions": write_json(tmp_path / "results.json", {40: "no", 41: "no", 50: "blue", 51: "blue"}, "answer"),
    }


def write_json(path: Path, texts: dict[int, str], text_key: str) -> str:
    id_key = "question_id" if text_key == "answer" else "image_id"
    path.write_text(json.dumps([{id_key: key, text_key: text} for key, text in texts.items()]))
    return str(path)


def test_vqa(vqa_split: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--train-data", vqa_split["train"])
    card = score(vqa, tmp_path, Path(vqa_split["predictions"]), vqa_split["val"], *options)
    # Right: 40, 50 and 51. "no" is the commonest answer: right once. By question: no, yes, and red twice, for which
    # two of ten annotators speak once: 0.6.
    assert (card["score"], card["majority"], card["n"]) == (75, 25, 4)
    assert card["blind"] == pytest.approx(100 * (1 + 1 + 0 + 0.6) / 4)
    assert card["details"] == {"answer type other": 100, "answer type yes/no": 50}
    assert card["metric"] == "accuracy (official evaluator, 2021)"
    rows = shown(capsys.readouterr().out)
    assert (rows["score"], rows["majority"], rows["blind (text only)"], rows["n"]) == ("75.00", "25.00", "65.00", "4")


def test_vqa_with_the_older_evaluator(vqa_split: dict[str, str], tmp_path: Path) -> None:
    predictions = tmp_path / "capital.json"
    write_json(predictions, {40: "No.", 41: "Yes", 50: "Blue", 51: "blue"}, "answer")
    scores = {
        version: score(vqa, tmp_path, predictions, vqa_split["val"], "--evaluator", version)["score"]
        for version in ("2021", "2017")
    }
    # The newer one takes answers as they stand where all annotators agree.
    assert scores == {"2021": 25, "2017": 100}


def test_without_training_data_there_are_no_baselines(
    vqa_split: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = score(vqa, tmp_path, Path(vqa_split["predictions"]), vqa_split["val"])
    assert (card["score"], card["majority"], card["blind"]) == (75, None, None)
    rows = shown(capsys.readouterr().out)
    assert (rows["majority"], rows["blind (text only)"]) == ("not available", "not available")


def write_run(folder: Path, train_shards: str) -> Path:
    """As much of a fine-tuning run as scoring reads."""
    tree = {
        "out": str(folder),
        "task": {"kind": "vqa", "answers": "answers.json"},
        "model": {"dim": 16, "depth": 2, "num_heads": 2, "ffn_dim": 32, "ffn": "dense"},
        "data": {
            "train": {"x": {"kind": "vqa", "shards": train_shards}},
            "text_tokenizer": "tokenizer.json",
            "batch_size": 4,
        },
        "max_steps": 10,
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(validate_config(RunConfig, tree)))
    cost = ("num_params", "num_active_params", "flops_per_token", "num_assignments_per_token")
    (folder / "cost.json").write_text(json.dumps(dict.fromkeys(cost, 1)))
    return folder


def test_the_run_s_own_training_shards_may_be_gone(
    vqa_split: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The score comes all the same, and says beside it what is missing."""
    predictions = Path(vqa_split["predictions"])
    whole = score(
        vqa, tmp_path, predictions, vqa_split["val"], "--run", str(write_run(tmp_path / "a", vqa_split["train"]))
    )
    assert (whole["score"], whole["majority"]) == (75, 25)
    run = write_run(tmp_path / "b", str(tmp_path / "gone"))
    card = score(vqa, tmp_path, predictions, vqa_split["val"], "--run", str(run))
    assert (card["score"], card["majority"], card["blind"]) == (75, None, None)
    (note,) = card["notes"]
    assert note.startswith(f"no baselines counted on training shards: no shards at {tmp_path / 'gone'}")
    assert note.endswith("name the shards with --train-data")
    assert shown(capsys.readouterr().out)["majority"] == "not available"
    # Shards that somebody names must be there, and so must those that are scored.
    for options in (
        ["--train-data", str(tmp_path / "gone"), "--data", vqa_split["val"]],
        ["--data", str(tmp_path / "no")],
    ):
        with pytest.raises(SystemExit) as stopped:
            vqa.main(["score", "--run", str(run), "--predictions", str(predictions), *options])
        assert stopped.value.code == 65


def test_the_run_has_two_names(vqa_split: dict[str, str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", vqa_split["train"])
    cards = [
        score(vqa, tmp_path, Path(vqa_split["predictions"]), vqa_split["val"], option, str(run))
        for option in ("--run", "--run-dir")
    ]
    assert cards[0] == {**cards[1], "command": cards[0]["command"]}


def test_nlvr2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = pack_nlvr2_split(
        tmp_path / "train",
        [
            ("train-1-0-0", "One dog", True), ("train-2-0-0", "One dog", True),
            ("train-3-0-0", "No cats", False), ("train-4-0-0", "No cows", False), ("train-5-0-0", "A pig", False),
        ],
    )  # fmt: skip
    dev = [("dev-1-0-0", "One dog", True), ("dev-1-1-0", "One dog", False), ("dev-2-0-0", "No pigs", False)]
    predictions = tmp_path / "predictions.csv"
    predictions.write_text("dev-1-0-0,True\ndev-1-1-0,True\ndev-2-0-0,False\n")
    shards = pack_nlvr2_split(tmp_path / "dev", dev)
    card = score(nlvr2, tmp_path, predictions, shards, "--train-data", train)
    # "False" is the commonest label: right for two. By sentence: True, True, False: right for two as well.
    assert (card["score"], card["majority"], card["blind"]) == pytest.approx((200 / 3, 200 / 3, 200 / 3))
    assert (card["n"], card["details"]) == (3, {"consistency": 50})
    rows = shown(capsys.readouterr().out)
    assert (rows["score"], rows["n"], rows["consistency"]) == ("66.67", "3", "50.00")


def test_captioning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = {1: ["a red bus on a street"], 2: ["a cat on a mat"], 3: ["two dogs run on grass"]}
    train = pack_caption_split(tmp_path / "train", {7: ["a cat on a street"], 8: ["a plane in the sky"]})
    shards = pack_caption_split(tmp_path / "test", captions)
    predictions = Path(write_json(tmp_path / "results.json", {n: texts[0] for n, texts in captions.items()}, "caption"))
    write_json(tmp_path / "results_blind.json", {1: "a cat on a mat", 2: "a cat on a mat", 3: "grass"}, "caption")
    options = ("--train-data", train, "--metrics", "BLEU", "CIDEr")
    card = score(captioning, tmp_path, predictions, shards, *options)
    # The references themselves: nothing can score more than 10 times 100.
    assert card["score"] == pytest.approx(1000)
    assert card["details"]["BLEU-4"] == pytest.approx(100)
    assert 0 < card["majority"] < card["score"]
    assert 0 < card["blind"] < card["score"]
    assert card["n"] == 3
    assert "best constant caption: a cat on a street" in card["notes"]
    rows = shown(capsys.readouterr().out)
    assert (rows["score"], rows["n"]) == ("1000.00", "3")
    assert rows["best constant caption"] == f"{card['majority']:.2f}"
    assert rows["blind (text only)"] == f"{card['blind']:.2f}"


def test_retrieval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = pack_caption_split(
        tmp_path / "test", {1: ["a bus", "a car"], 2: ["a cat", "a mat"], 3: ["a dog", "a fox"]}
    )
    captions_of = {
        "1": ["1/1", "2/0", "3/0", "1/0", "3/1", "2/1"],
        "2": ["1/0", "2/1", "1/1", "3/0", "3/1", "2/0"],
        "3": ["1/0", "1/1", "2/0", "2/1", "3/0", "3/1"],
    }
    images_of = {f"{image}/{number}": ["1", "2", "3"] for image in (1, 2, 3) for number in (0, 1)}
    predictions = tmp_path / "rankings.json"
    write_rankings(predictions, RetrievalPredictions(Rankings(captions_of, images_of)))
    card = score(retrieval, tmp_path, predictions, shards)
    # Of the images the first; of the captions, those of the first.
    assert (card["score"], card["n"], card["blind"]) == (pytest.approx(100 / 3), 3, None)
    assert card["majority"] == pytest.approx(100 / 3)
    assert card["details"]["image to text, recall@1"] == pytest.approx(100 / 3)
    assert card["details"]["text to image, recall@5"] == 100
    # Of six captions only one is not among the first five, and an image has two.
    assert card["details"]["chance: image to text, recall@5"] == 100
    assert not any(name.startswith("folds") for name in card["details"])
    assert card["notes"] == ["3 images, 6 captions"]
    rows = shown(capsys.readouterr().out)
    assert (rows["score"], rows["chance"], rows["n"]) == ("33.33", "33.33", "3")
    assert "majority" not in rows
    assert "blind (text only)" not in rows


def test_retrieval_in_folds_of_the_first_caption(tmp_path: Path) -> None:
    shards = pack_caption_split(tmp_path / "test", {1: ["a bus", "a car"], 2: ["a cat", "a mat"]})
    rankings = Rankings({"1": ["2/0", "1/0"], "2": ["1/0", "2/0"]}, {"1/0": ["2", "1"], "2/0": ["1", "2"]})
    folds = Rankings({"1": ["1/0"], "2": ["2/0"]}, {"1/0": ["1"], "2/0": ["2"]})
    predictions = tmp_path / "rankings.json"
    write_rankings(predictions, RetrievalPredictions(rankings, folds, 1, 1))
    card = score(retrieval, tmp_path, predictions, shards)
    assert (card["score"], card["notes"]) == (0, ["2 images, 2 captions"])
    assert card["details"]["folds of 1: text to image, recall@1"] == 100


def test_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = pack_class_split(tmp_path / "train", ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"])
    shards = pack_class_split(tmp_path / "val", ["cat/1.jpg", "dog/2.jpg", "dog/3.jpg", "fox/4.jpg"])
    keys = {name: key for key, name in class_labels([shards]).items()}
    labels = class_labels([shards])
    guesses = {key: ["dog", "cat"] for key in labels} | {keys["fox"]: ["fox"], keys["cat"]: ["dog", "fox"]}
    predictions = tmp_path / "predictions.json"
    write_class_predictions(predictions, guesses)
    card = score(classification, tmp_path, predictions, shards, "--train-data", train)
    assert (card["score"], card["n"], card["blind"]) == (75, 4, None)
    # Cats are commonest in training: one of four here; with dogs, which come second, three of four.
    assert card["majority"] == 25
    assert card["details"] == {"top-5": 75, "top-5 of the commonest classes": 75}
    rows = shown(capsys.readouterr().out)
    assert (rows["score"], rows["majority"], rows["n"]) == ("75.00", "25.00", "4")
    assert "blind (text only)" not in rows
    alone = score(classification, tmp_path, predictions, shards)
    assert (alone["score"], alone["majority"], alone["details"]) == (75, None, {"top-5": 75})


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("options", [[], ["predict"], ["score"], ["predict", "--predictions", "x"]])
def test_without_a_run(name: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].main([*options, "--data", "absent"])
    assert stopped.value.code == 64
    message = capsys.readouterr().err
    assert message == "error: --run: is required, unless step is 'score' and --predictions is given\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_not_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "absent"
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].main(["score", "--predictions", "x.json", "--data", str(missing)])
    assert stopped.value.code == 65
    assert str(missing) in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].main(["--run", str(missing), "--data", "x"])
    assert stopped.value.code == 64
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert str(missing) in message


@pytest.mark.parametrize(
    ("name", "option"), [("vqa", "--batch-size"), ("captioning", "--num-beams"), ("captioning", "--max-length")]
)
def test_counts_are_at_least_one(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        SCRIPTS[name].main(["--run", "x", "--data", "x", option, "0"])
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err


def test_blind_is_the_better_of_prior_and_twin() -> None:
    truth = {1: "red", 2: "no", 3: "yes", 4: "no"}

    def accuracy(answers: Mapping[int, str]) -> float:
        return 25.0 * sum(answers[key] == answer for key, answer in truth.items())

    texts = dict.fromkeys(truth, "Is it?")
    prior = TextPrior([("Is it?", {"no": 1.0})])
    twin = {1: "red", 2: "no", 3: "yes", 4: "yes"}
    both = text_baselines(accuracy, texts, prior, twin)
    assert (both.majority, both.blind) == (50, 75)
    assert both.notes == ("blind is the text-only twin (the text-only prior counted on the training split: 50.00)",)
    worse = dict.fromkeys(truth, "blue")
    assert text_baselines(accuracy, texts, prior, worse).blind == 50
    assert text_baselines(accuracy, texts, prior, None).blind == 50
    alone = text_baselines(accuracy, texts, None, twin)
    assert (alone.majority, alone.blind) == (None, 75)
    assert text_baselines(accuracy, texts, None, None).blind is None


def test_predictions_for_another_split(
    vqa_split: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = write_json(tmp_path / "few.json", {40: "no", 99: "x"}, "answer")
    with pytest.raises(SystemExit) as stopped:
        vqa.main(["score", "--predictions", predictions, "--data", vqa_split["val"]])
    assert stopped.value.code == 65
    message = capsys.readouterr().err
    assert "1 unknown id (99)" in message
    assert "3 missing ids (41, 50, 51)" in message
