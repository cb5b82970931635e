"""Top-1 and top-5 by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.classification_accuracy import (
    classification_accuracy,
    commonest_classes,
    load_class_predictions,
    write_class_predictions,
)


def test_first_and_among_five() -> None:
    best = ["a", "b", "c", "d", "e", "f"]
    labels = {"1": "a", "2": "b", "3": "e", "4": "f", "5": "g"}
    score = classification_accuracy(dict.fromkeys(labels, best), labels)
    # f is the sixth.
    assert (score.top_1, score.top_5, score.n) == (1 / 5, 3 / 5, 5)


def test_other_images() -> None:
    with pytest.raises(DataError, match=r"classes of images: .*1 unknown id \(2\); 1 missing id \(1\)"):
        classification_accuracy({"2": ["a"]}, {"1": "a"})
    with pytest.raises(DataError, match="nothing to score"):
        classification_accuracy({}, {})


def test_the_commonest() -> None:
    assert commonest_classes(list("babcdefa")) == ["a", "b", "c", "d", "e"]


def test_the_file(tmp_path: Path) -> None:
    predictions = {"x": ["ä", 'b"'], "y": ["c"]}
    write_class_predictions(tmp_path / "p.json", predictions)
    assert load_class_predictions(tmp_path / "p.json") == predictions
    for content, message in (("{", "cannot be read as JSON"), ("[]", "must be an object"), ('{"x": [1]}', "must be")):
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(DataError, match=message):
            load_class_predictions(tmp_path / "p.json")
