"""The Penn Treebank tokenizer against the jar of pycocoevalcap: recorded always, live where Java is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.evaluation.java_metrics import jar_tokenize, java_runtime
from mhmoe_vl.evaluation.ptb_tokenizer import clean_caption_for_scoring, ptb_tokenize, ptb_tokens

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evaluation"

needs_java = pytest.mark.skipif(java_runtime() is None, reason="no Java runtime on PATH")


def recorded() -> list[tuple[str, str]]:
    """Hard captions, in the order in which they were given to the jar, and its tokens (with punctuation)."""
    return [tuple(pair) for pair in json.loads((FIXTURES / "ptb_tokens.json").read_text(encoding="utf-8"))]


def test_equals_the_recorded_jar() -> None:
    captions, expected = zip(*recorded(), strict=True)
    tokens = [" ".join(line) for line in ptb_tokens(captions)]
    wrong = [(c, e, t) for c, e, t in zip(captions, expected, tokens, strict=True) if e != t]
    assert wrong == []


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog can't sit, it runs!", "a man 's dog ca n't sit it runs"),
        ("Two-thirds of $5.99 (cash)", "two-thirds of $ 5.99 -lrb- cash -rrb-"),
        ("He cannot... 'tis gonna rain.", "he can not 't is gon na rain"),
        ("“Quoted” — 10:30am in the U.S.", "quoted 10:30 am in the u.s."),
        ("", ""),
        (" . ", ""),
    ],
)
def test_by_hand(caption: str, tokens: str) -> None:
    assert ptb_tokenize([caption]) == [tokens]


def test_an_abbreviation_at_the_end_is_read_with_the_next_caption() -> None:
    assert ptb_tokenize(["plan b.", "The dog"])[0] == "plan b"
    assert ptb_tokenize(["plan b.", "a dog"])[0] == "plan b."


@pytest.mark.parametrize(
    "separator", ["\r", "\n", "\r\n", "\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1e", "\t", "\x00"]
)
def test_separators_do_not_shift_captions(separator: str) -> None:
    captions = [f"a{separator}dog", f"{separator}two cats{separator}", "three"]
    assert [clean_caption_for_scoring(caption) for caption in captions] == ["a dog", "two cats", "three"]
    assert ptb_tokenize(captions) == ["a dog", "two cats", "three"]


def test_lone_surrogates_are_dropped() -> None:
    assert clean_caption_for_scoring("a\ud800 dog") == "a dog"


@given(st.lists(st.text(max_size=30), max_size=5))
def test_one_line_per_caption(captions: list[str]) -> None:
    cleaned = [clean_caption_for_scoring(caption) for caption in captions]
    assert all(len(line.splitlines()) <= 1 for line in cleaned)
    assert cleaned == [clean_caption_for_scoring(line) for line in cleaned]
    tokens = ptb_tokenize(captions)
    assert len(tokens) == len(captions)
    assert tokens == ptb_tokenize(cleaned)


@given(st.lists(st.text(alphabet="ab.,'-/@<&1 ", min_size=1, max_size=2000), max_size=2))
def test_any_text_is_tokenized(captions: list[str]) -> None:
    assert len(ptb_tokens(captions)) == len(captions)


@pytest.mark.java
@needs_java
def test_equals_the_jar_on_generated_captions() -> None:
    rng = random.Random(0)
    words = [word for caption, _ in recorded() for word in caption.split()]
    signs = list(
        "aB1 .,;:!?'\"`-_/\\&@#$%*()[]{}<>=+~\u2019\u2018\u201c\u201d\u2013\u2014\u2026\xe9\u65e5\xbd\xa3\u20ac\xb0"
    )
    captions = []
    for _ in range(3000):
        parts = rng.choices(words, k=4) if rng.random() < 0.5 else rng.choices(signs, k=8)
        captions.append("".join(part + rng.choice(["", "", " "]) for part in parts))
    jar, ours = jar_tokenize(captions), ptb_tokenize(captions)
    wrong = [(c, j, o) for c, j, o in zip(captions, jar, ours, strict=True) if j != o]
    assert wrong == []


@pytest.mark.java
@pytest.mark.shared
@needs_java
def test_equals_the_jar_on_coco_captions(shared_data: Path) -> None:
    with (shared_data / "coco_annotations" / "captions_val2017.json").open(encoding="utf-8") as file:
        captions = [row["caption"] for row in json.load(file)["annotations"]][::3]
    assert len(captions) > 8000
    assert ptb_tokenize(captions) == jar_tokenize(captions)
