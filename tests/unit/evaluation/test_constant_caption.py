"""The constant-caption baseline against rescoring every candidate with pycocoevalcap."""

from __future__ import annotations

import random

import pytest
from pycocoevalcap.cider.cider import Cider

from mhmoe_vl.errors import DataError
from mhmoe_vl.evaluation.caption_scores import score_captions
from mhmoe_vl.evaluation.constant_caption import ConstantCider, best_constant_caption


def captions(seed: int, num: int) -> list[str]:
    rng = random.Random(seed)
    return [
        f"a {rng.choice(['dog', 'cat', 'man'])} {rng.choice(['sits', 'runs'])} "
        f"{rng.choice(['on a sofa', 'in the park', 'near the sea', ''])}".strip()
        for _ in range(num)
    ]


def references() -> dict[int, list[str]]:
    pool = captions(1, 200)
    return {image: pool[3 * image : 3 * image + 1 + image % 3] for image in range(40)}


@pytest.mark.parametrize("caption", ["a dog sits on a sofa", "a a a dog", "unseen words only", "dog", ""])
def test_constant_cider_equals_pycocoevalcap(caption: str) -> None:
    expected, _ = Cider().compute_score(references(), {image: [caption] for image in references()})
    assert ConstantCider(references()).score(caption) == pytest.approx(expected, abs=1e-12)


def test_the_best_candidate_wins() -> None:
    train = captions(2, 60)
    caption, scores = best_constant_caption(train, references(), tokenizer="python")
    by_caption = {
        candidate: score_captions(
            dict.fromkeys(references(), candidate), references(), metrics=(), tokenizer="python"
        ).cider
        for candidate in set(train)
    }
    assert scores.cider == pytest.approx(max(by_caption.values()), abs=1e-12)
    assert by_caption[caption] == pytest.approx(scores.cider, abs=1e-12)
    assert (scores.n, scores.meteor, scores.coverage) == (40, None, 1.0)


def test_frequent_captions_are_tried_first() -> None:
    train = ["something else entirely"] * 3 + ["A dog sits on a sofa."] + ["a man runs"] * 5
    caption, _ = best_constant_caption(train, references(), max_candidates=2, tokenizer="python")
    assert caption == "a man runs"


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(DataError, match="none of 1 captions"):
        best_constant_caption(["."], references())
    with pytest.raises(DataError, match="at least one caption"):
        best_constant_caption(["a dog"], {1: []})
