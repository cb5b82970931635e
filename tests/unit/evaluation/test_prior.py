"""What can be answered without looking, by hand."""

from __future__ import annotations

import pytest

from mhmoe_vl.evaluation.prior import TextPrior, nlvr2_prior, vqa_prior

TRAINING = [
    ("What color is the bus?", {"red": 1.0, "blue": 0.3}),
    ("What color is the bus?", {"blue": 0.9}),
    ("What color is the dog?", {"brown": 1.0}),
    ("What color is it", {"green": 1.0}),
    ("Is it raining?", {"no": 1.0}),
    ("Is it cold?", {"yes": 0.6}),
    ("Is there a cat?", {"no": 0.6}),
]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("What color is the bus?", "blue"),  # 1.2 against 1.0
        ("  what COLOR is the   dog? ", "brown"),  # case and spaces aside
        ("What color is the sky?", "blue"),  # "what color is the": blue 1.2, red 1.0, brown 1.0
        ("What color is it", "green"),
        ("What color is it today?", "green"),  # its longest known opening is the whole of another text
        ("Is it hot?", "no"),  # "is it": no 1.0, yes 0.6
        ("Is there nobody?", "no"),
        ("What is this?", "blue"),  # "what"
        ("How many?", "no"),  # nothing known: 1.6 for no, more than for any other
        ("", "no"),
    ],
)
def test_the_longest_known_opening(text: str, answer: str) -> None:
    assert TextPrior(TRAINING).answer(text) == answer


def test_the_majority_adds_up_votes() -> None:
    assert TextPrior(TRAINING).majority == "no"
    assert TextPrior([("a", {"x": 1.0}), ("b", {"y": 0.6}), ("c", {"y": 0.6})]).majority == "y"


def test_a_whole_text_is_told_from_an_opening() -> None:
    prior = TextPrior([("is it", {"whole": 1.0}), ("is it red", {"longer": 3.0})])
    assert (prior.answer("is it"), prior.answer("is it blue")) == ("whole", "longer")


def test_ties_go_to_the_first_in_the_alphabet() -> None:
    for votes in ({"b": 1.0, "a": 1.0}, {"a": 1.0, "b": 1.0}):
        assert TextPrior([("x", votes)]).majority == "a"


def test_nothing_to_count() -> None:
    with pytest.raises(ValueError, match="a prior needs at least one example"):
        TextPrior([])


def test_priors_of_the_tasks() -> None:
    vqa = vqa_prior([{"question": "Is it?", "labels": {"yes": 0.3, "no": 0.9}}])
    assert vqa.answer("Is it?") == vqa.majority == "no"
    sentences = [("Two dogs", True), ("Two dogs", True), ("Two dogs", False), ("Cats", False), ("Cows", False)]
    nlvr2 = nlvr2_prior([{"sentence": sentence, "label": label} for sentence, label in sentences])
    assert (nlvr2.majority, nlvr2.answer("Two dogs"), nlvr2.answer("Two dogs run"), nlvr2.answer("Pigs")) == (
        "False", "True", "True", "False",
    )  # fmt: skip
