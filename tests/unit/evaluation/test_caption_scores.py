"""Caption scores against pycocoevalcap's own scorers, by hand, and with the Java parts absent."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.evaluation import java_metrics
from mhmoe_vl.evaluation.caption_scores import (
    CaptionScores,
    load_caption_results,
    score_captions,
    write_caption_results,
)
from mhmoe_vl.evaluation.java_metrics import MetricUnavailableError, java_runtime

needs_java = pytest.mark.skipif(java_runtime() is None, reason="no Java runtime on PATH")

REFERENCES = {
    7: ["A dog runs on the beach.", "The dog is running, on sand!"],
    3: ["A red bus (double-decker) in the U.K.", "A bus on a street"],
    5: ["Two cats can't sleep on a sofa", "Two cats on a couch", "Cats."],
}
PREDICTIONS = {3: "a red bus on a street", 5: "two cats on a sofa", 7: "a dog runs on the beach"}


def python_scores(predictions: dict[int, str], references: dict[int, list[str]], **options: Any) -> CaptionScores:
    return score_captions(predictions, references, metrics=("BLEU", "CIDEr"), tokenizer="python", **options)


def test_equals_the_scorers_of_pycocoevalcap() -> None:
    tokens = {
        7: ["a dog runs on the beach", "the dog is running on sand"],
        3: ["a red bus -lrb- double-decker -rrb- in the u.k.", "a bus on a street"],
        5: ["two cats ca n't sleep on a sofa", "two cats on a couch", "cats"],
    }
    predicted = {key: [PREDICTIONS[key]] for key in tokens}
    scores = python_scores(PREDICTIONS, REFERENCES)
    bleu, _ = Bleu(4).compute_score(tokens, predicted, verbose=0)
    assert [scores.bleu_1, scores.bleu_2, scores.bleu_3, scores.bleu_4] == pytest.approx(bleu, abs=1e-12)
    assert scores.rouge_l == pytest.approx(Rouge().compute_score(tokens, predicted)[0], abs=1e-12)
    cider, per_image = Cider().compute_score(tokens, predicted)
    assert scores.cider == pytest.approx(cider, abs=1e-12)
    assert scores.cider_per_image == {key: pytest.approx(value) for key, value in zip(tokens, per_image, strict=True)}
    assert (scores.n, scores.num_empty, scores.tokenizer, scores.coverage) == (3, 0, "python", 1.0)


def test_perfect_captions_by_hand() -> None:
    references = {1: ["a dog runs on sand"], 2: ["two cats sleep here now"]}
    scores = python_scores({1: "A dog runs on sand.", 2: "Two cats sleep here now"}, references)
    assert scores.bleu_4 == pytest.approx(1, abs=1e-6)
    assert scores.rouge_l == pytest.approx(1)
    # Every n-gram is in one of two images: all idf weights are log 2, all cosines 1, times 10.
    assert scores.cider == pytest.approx(10)
    assert scores.percent()["CIDEr"] == pytest.approx(1000)


def test_half_a_caption_by_hand() -> None:
    # Three of four words are right: BLEU-1 3/4, no brevity penalty; longest common subsequence 3 of 4.
    scores = python_scores({1: "a dog runs fast"}, {1: ["a dog runs slowly"]})
    assert scores.bleu_1 == pytest.approx(3 / 4, abs=1e-6)
    assert scores.bleu_2 == pytest.approx((3 / 4 * 2 / 3) ** 0.5, abs=1e-6)
    assert scores.rouge_l == pytest.approx(3 / 4)


def test_one_image_has_no_cider() -> None:
    scores = python_scores({1: "a dog"}, {1: ["a dog"]})
    assert scores.cider == 0
    assert any("single image" in note for note in scores.notes)


def test_empty_captions_are_scored_and_counted() -> None:
    full = python_scores(PREDICTIONS, REFERENCES)
    empty = python_scores(PREDICTIONS | {5: " ... "}, REFERENCES)
    assert (empty.n, empty.num_empty) == (3, 1)
    assert empty.cider_per_image[5] == 0
    assert empty.cider < full.cider
    assert any("no word" in note for note in empty.notes)
    nothing = python_scores(dict.fromkeys(PREDICTIONS, ""), REFERENCES)
    assert (nothing.bleu_1, nothing.cider, nothing.num_empty) == (0, 0, 3)


def test_image_ids_must_match() -> None:
    with pytest.raises(DataError, match=r"1 missing id \(5\)"):
        python_scores({3: "a", 7: "b"}, REFERENCES)
    with pytest.raises(DataError, match=r"1 unknown id \(9\)"):
        python_scores(PREDICTIONS | {9: "a"}, REFERENCES, allow_subset=True)
    with pytest.raises(DataError, match=r"1 empty id \(3\)"):
        python_scores(PREDICTIONS, REFERENCES | {3: []})
    with pytest.raises(DataError, match="nothing to score"):
        python_scores({}, REFERENCES, allow_subset=True)
    with pytest.raises(DataError, match="no caption has a word"):
        python_scores({1: "a"}, {1: ["."]})


def test_subset_reports_coverage() -> None:
    scores = python_scores({3: PREDICTIONS[3], 7: PREDICTIONS[7]}, REFERENCES, allow_subset=True)
    subset = {key: REFERENCES[key] for key in (7, 3)}
    assert scores.cider == python_scores({3: PREDICTIONS[3], 7: PREDICTIONS[7]}, subset).cider
    assert scores.coverage == pytest.approx(2 / 3)
    assert any("2 of 3 images" in note for note in scores.notes)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'METEOR'"):
        score_captions(PREDICTIONS, REFERENCES, metrics=("METEORS",))
    with pytest.raises(ConfigError, match="auto, java, python"):
        score_captions(PREDICTIONS, REFERENCES, tokenizer="jar")  # type: ignore[arg-type]


def test_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java_metrics, "java_runtime", lambda: None)
    scores = score_captions(PREDICTIONS, REFERENCES)
    assert scores.tokenizer == "python"
    assert (scores.meteor, scores.spice) == (None, None)
    assert "install a Java runtime" in scores.unavailable["METEOR"]
    assert scores.percent()["METEOR"] is None
    with pytest.raises(ConfigError, match="choose 'python'"):
        score_captions(PREDICTIONS, REFERENCES, tokenizer="java")


def test_spice_never_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(urllib.request, "urlretrieve", forbidden)
    monkeypatch.setattr(java_metrics, "_package_folder", lambda: tmp_path)
    with pytest.raises(MetricUnavailableError, match=r"stanford-corenlp-3\.6\.0\.jar"):
        java_metrics.spice({1: ["a dog"]}, {1: ["a dog"]})


def test_meteor_refuses_a_path_with_a_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java_metrics.close_meteor()
    monkeypatch.setattr(java_metrics, "java_runtime", lambda: "java")
    monkeypatch.setattr(java_metrics, "_package_folder", lambda: tmp_path / "site packages")
    with pytest.raises(MetricUnavailableError, match="path with a space"):
        java_metrics.meteor({1: ["a dog"]}, {1: ["a dog"]})


@pytest.mark.java
@needs_java
def test_a_silent_meteor_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    java_metrics.close_meteor()
    monkeypatch.setattr(java_metrics, "_METEOR_START_S", 0.2)
    with pytest.raises(MetricUnavailableError, match="no answer in 0 s"):
        java_metrics.meteor({1: ["a dog"]}, {1: ["a dog"]})


@pytest.mark.java
@pytest.mark.slow
@needs_java
def test_meteor_scores_and_stays_for_the_next_call() -> None:
    scores = score_captions(PREDICTIONS, REFERENCES, metrics=("METEOR",))
    assert scores.meteor is not None
    assert 0.4 < scores.meteor < 0.8
    assert java_metrics.meteor({1: ["a dog runs"]}, {1: ["a dog runs"]}) > 0.9
    assert java_metrics.meteor({1: ["a dog runs"]}, {1: [""]}) == 0
    java_metrics.close_meteor()


@pytest.mark.java
@pytest.mark.shared
@needs_java
def test_equals_stock_pycocoevalcap_on_coco_captions(shared_data: Path) -> None:
    with (shared_data / "coco_annotations" / "captions_val2017.json").open(encoding="utf-8") as file:
        rows = json.load(file)["annotations"]
    captions: dict[int, list[str]] = {}
    for row in rows:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    images = sorted(captions)[:400]
    predictions = {key: captions[key][-1] for key in images}
    references = {key: captions[key][:-1] for key in images}

    stock = PTBTokenizer()
    expected_tokens = stock.tokenize({key: [{"caption": text} for text in references[key]] for key in images})
    predicted_tokens = stock.tokenize({key: [{"caption": predictions[key]}] for key in images})
    bleu, _ = Bleu(4).compute_score(expected_tokens, predicted_tokens, verbose=0)
    rouge_l, _ = Rouge().compute_score(expected_tokens, predicted_tokens)
    cider, _ = Cider().compute_score(expected_tokens, predicted_tokens)
    for tokenizer in ("java", "python"):
        scores = score_captions(predictions, references, metrics=(), tokenizer=tokenizer)
        assert [scores.bleu_1, scores.bleu_2, scores.bleu_3, scores.bleu_4] == pytest.approx(bleu, abs=1e-12)
        assert scores.rouge_l == pytest.approx(rouge_l, abs=1e-12)
        assert scores.cider == pytest.approx(cider, abs=1e-12)
        assert scores.tokenizer == tokenizer


def test_results_files(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    write_caption_results(path, PREDICTIONS)
    assert load_caption_results(path) == PREDICTIONS
    path.write_text('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]')
    with pytest.raises(DataError, match=r"1 duplicate id \(1\)"):
        load_caption_results(path)
