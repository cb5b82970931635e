"""NLVR2 accuracy and consistency against the official program's output, and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.nlvr2_accuracy import (
    Nlvr2Score,
    load_nlvr2_predictions,
    nlvr2_accuracy,
    write_nlvr2_predictions,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evaluation"


def test_equals_the_official_program(tmp_path: Path) -> None:
    recorded = json.loads((FIXTURES / "nlvr2_official.json").read_text())
    predictions_path = tmp_path / "predictions.csv"
    predictions_path.write_text(recorded["predictions_csv"])
    labels = {example["identifier"]: example["label"] == "True" for example in recorded["examples"]}
    score = nlvr2_accuracy(load_nlvr2_predictions(predictions_path), labels)
    assert {"accuracy": score.accuracy, "consistency": score.consistency} == recorded["official"]


def test_groups_are_sentences_by_hand() -> None:
    labels = {"dev-1-0-0": True, "dev-1-1-0": False, "dev-1-0-1": True, "dev-2-0-0": True, "test1-1-0-0": True}
    predictions = labels | {"dev-1-1-0": True, "dev-2-0-0": False}
    # Groups: dev-1-0 (one wrong), dev-1-1 (right), dev-2-0 (wrong), test1-1-0 (right).
    assert nlvr2_accuracy(predictions, labels) == Nlvr2Score(accuracy=3 / 5, consistency=2 / 4, n=5, num_groups=4)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"dev-1-0-0": True}, r"1 missing id \(dev-1-1-0\)"),
        ({"dev-1-0-0": True, "dev-1-1-0": True, "dev-9-0-0": True}, r"1 unknown id \(dev-9-0-0\)"),
    ],
)
def test_identifiers_must_match(predictions: dict[str, bool], message: str) -> None:
    with pytest.raises(DataError, match=message):
        nlvr2_accuracy(predictions, {"dev-1-0-0": True, "dev-1-1-0": False})


def test_odd_input_is_refused() -> None:
    with pytest.raises(DataError, match="split-set-pair-sentence"):
        nlvr2_accuracy({"dev-1": True}, {"dev-1": True})
    with pytest.raises(DataError, match="nothing to score"):
        nlvr2_accuracy({}, {})


def test_predictions_csv(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    write_nlvr2_predictions(path, {"dev-1-0-0": True, "dev-1-1-0": False})
    assert path.read_text() == "dev-1-0-0,True\ndev-1-1-0,False\n"
    path.write_bytes(b"\xef\xbb\xbfdev-1-0-0,true\r\n\r\ndev-1-1-0, FALSE\r\n")
    assert load_nlvr2_predictions(path) == {"dev-1-0-0": True, "dev-1-1-0": False}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dev-1-0-0,True\ndev-1-0-0,True\n", r"1 repeated id \(dev-1-0-0\)"),
        ("dev-1-0-0,1\n", "must be True or False"),
        ("dev-1-0-0\n", "must be True or False"),
    ],
)
def test_malformed_predictions_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_nlvr2_predictions(path)
