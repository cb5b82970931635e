"""Answers to visual questions, normalised and scored as by the official VQA evaluator.

The rules are those of ``vqaEval.py`` (GT-Vision-Lab/VQA, PythonEvaluationTools) with its quirks, because published
numbers contain them; :mod:`mhmoe_vl.evaluation.vqa_accuracy` is tested against that program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from mhmoe_vl.errors import DataError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The official call passes re.UNICODE (32) where the number of replacements belongs.
_MAX_FULL_STOPS = 32

_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = frozenset(["a", "an", "the"])

# Written without an apostrophe at its place, for the word that is meant. "somebody'd" loses its apostrophe, and
# entries with a capital never apply, since answers are in lower case by then: both are so in the official table.
_CONTRACTIONS = {
    word: contraction
    for contraction, words in {
        "ain't": "aint", "aren't": "arent", "can't": "cant", "could've": "couldve", "couldn't": "couldnt",
        "couldn't've": "couldn'tve couldnt've", "didn't": "didnt", "doesn't": "doesnt", "don't": "dont",
        "hadn't": "hadnt", "hadn't've": "hadnt've hadn'tve", "hasn't": "hasnt", "haven't": "havent", "he'd": "hed",
        "he'd've": "hed've he'dve", "he's": "hes", "how'd": "howd", "how'll": "howll", "how's": "hows",
        "isn't": "isnt", "it'd": "itd", "it'd've": "itd've it'dve", "it'll": "itll", "ma'am": "maam",
        "mightn't": "mightnt", "mightn't've": "mightnt've mightn'tve", "might've": "mightve", "mustn't": "mustnt",
        "must've": "mustve", "needn't": "neednt", "not've": "notve", "o'clock": "oclock", "oughtn't": "oughtnt",
        "'ow's'at": "ow's'at 'ows'at 'ow'sat", "shan't": "shant", "she'd've": "shed've she'dve",
        "should've": "shouldve", "shouldn't": "shouldnt", "shouldn't've": "shouldnt've shouldn'tve",
        "somebodyd": "somebody'd", "somebody'd've": "somebodyd've somebody'dve", "somebody'll": "somebodyll",
        "somebody's": "somebodys", "someone'd": "someoned", "someone'd've": "someoned've someone'dve",
        "someone'll": "someonell", "someone's": "someones", "something'd": "somethingd",
        "something'd've": "somethingd've something'dve", "something'll": "somethingll", "that's": "thats",
        "there'd": "thered", "there'd've": "thered've there'dve", "there're": "therere", "there's": "theres",
        "they'd": "theyd", "they'd've": "theyd've they'dve", "they'll": "theyll", "they're": "theyre",
        "they've": "theyve", "'twas": "twas", "wasn't": "wasnt", "we'd've": "wed've we'dve", "we've": "weve",
        "weren't": "werent", "what'll": "whatll", "what're": "whatre", "what's": "whats", "what've": "whatve",
        "when's": "whens", "where'd": "whered", "where's": "wheres", "where've": "whereve", "who'd": "whod",
        "who'd've": "whod've who'dve", "who'll": "wholl", "who's": "whos", "who've": "whove", "why'll": "whyll",
        "why're": "whyre", "why's": "whys", "won't": "wont", "would've": "wouldve", "wouldn't": "wouldnt",
        "wouldn't've": "wouldnt've wouldn'tve", "y'all": "yall", "y'all'll": "yall'll y'allll",
        "y'all'd've": "yall'd've y'alld've y'all'dve", "you'd": "youd", "you'd've": "youd've you'dve",
        "you'll": "youll", "you're": "youre", "you've": "youve",
    }.items()
    for word in words.split()
}  # fmt: skip


def strip_answer(text: str) -> str:
    """``text`` with newlines and tabs as spaces and without spaces at its ends: done to every answer."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def remove_punctuation(text: str) -> str:
    """The official ``processPunctuation``.

    A mark is deleted if it stands beside a space anywhere in the text, or if the text has digit-comma-digit
    anywhere; otherwise each occurrence becomes a space. Full stops that no digit follows are deleted, 32 at most.
    """
    out = text
    has_grouped_digits = _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            delete = has_grouped_digits or f"{mark} " in text or f" {mark}" in text
            out = out.replace(mark, "" if delete else " ")
    return _FULL_STOP.sub("", out, count=_MAX_FULL_STOPS)


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """The official answer processing: punctuation, then lower case, number words as digits, no articles,
    contractions with their apostrophes. May be empty (``"the"``).
    """
    words = remove_punctuation(strip_answer(text)).lower().split()
    numbered = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def agreement(answer: str, human_answers: Sequence[str]) -> float:
    """Official accuracy, 0 to 1, of ``answer`` against the answers of all annotators, by equality of strings.

    Each annotator is left out in turn; ``answer`` then scores ``min(1, matches among the others / 3)``, and the
    mean is taken. With ten annotators 0, 1, 2, 3 and 4 matches give 0, 0.3, 0.6, 0.9 and 1.
    """
    num_equal = sum(human == answer for human in human_answers)
    # In the order of the annotators, so that the float is the official one to the last bit.
    left_out = [min(1.0, (num_equal - (human == answer)) / 3) for human in human_answers]
    return sum(left_out) / len(left_out)


def soft_targets(answers: Sequence[str]) -> dict[str, float]:
    """Classification targets of one question: :func:`agreement` of each distinct normalised answer, in the order of
    first appearance.

    All ``answers`` (VQA v2 has ten) are normalised first. An answer that normalises to nothing is no target but
    remains one of the annotators. By this rule a single annotator gives 0 and only more than three equal answers
    give 1.

    Raises:
        DataError: ``answers`` is empty.
    """
    if not answers:
        raise DataError("soft_targets: a question needs at least one human answer, got none")
    normalized = [normalize_answer(answer) for answer in answers]
    return {answer: agreement(answer, normalized) for answer in dict.fromkeys(normalized) if answer}
