"""Tokens to words with the project's own kinds of tokenizer, and sums over them."""

from __future__ import annotations

import pytest
import torch

from mhmoe_vl.analysis.word_sums import WordSums
from mhmoe_vl.analysis.words import WordSplitter, word_class
from mhmoe_vl.data.batch import Batch
from mhmoe_vl.data.prepare.text_tokenizer import clip_tokenizer, train_tokenizer
from mhmoe_vl.data.text import TextTokenizer

CORPUS = ["the red circle is left of 7 squares , don't stop .", "a redder circle (caf\u00e9), no ?"] * 4


@pytest.fixture(scope="module", params=["bpe", "unigram", "clip"])
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    if request.param == "clip":
        return TextTokenizer(clip_tokenizer())
    size = 300 if request.param == "bpe" else 60
    return TextTokenizer(train_tokenizer(CORPUS, vocab_size=size, model=request.param))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the red circle is left of 7 squares.", ["the", "red", "circle", "is", "left", "of", "7", "squares", "."]),
        ("a redder circle (caf\u00e9), no?", ["a", "redder", "circle", "(", "caf\u00e9", "),", "no", "?"]),
    ],
)
def test_pieces_make_up_the_words_of_the_text(tokenizer: TextTokenizer, text: str, words: list[str]) -> None:
    splitter = WordSplitter(tokenizer)
    pieces = splitter.pieces(tokenizer.encode(text, max_length=99))
    found = [word.text for word in splitter.words(pieces)]
    assert [character for word in found for character in word] == [character for word in words for character in word]
    # Neighbouring signs of punctuation may be one word or several.
    assert [word for word in found if word[0].isalnum()] == [word for word in words if word[0].isalnum()]
    assert pieces[0].word == pieces[-1].word == -1
    firsts = [piece.word for piece in pieces if piece.is_first]
    assert firsts == list(range(len(found)))


def test_documents_of_one_row_do_not_share_a_word(tokenizer: TextTokenizer) -> None:
    splitter = WordSplitter(tokenizer)
    one = tokenizer.encode("red", max_length=9)[:-1]
    words = splitter.words(splitter.pieces([*one, *one]))
    assert [word.text for word in words] == ["red", "red"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (" The", "function words"),
        ("of", "function words"),
        ("left", "content words"),
        ("Apfel", "content words"),
        ("12", "numbers"),
        ("3rd", "numbers"),
        ("two", "numbers"),
        ("...", "punctuation"),
        ("\u3002", "punctuation"),
    ],
)
def test_classes(word: str, expected: str) -> None:
    assert word_class(word) == expected


def test_sums_by_hand() -> None:
    """Bytes are the only pieces, so every letter is one; two layers, of which the second has twice as many experts."""
    tokenizer = TextTokenizer(train_tokenizer(["x"], vocab_size=261))
    ids = torch.tensor([tokenizer.encode("of ab.", max_length=20), [tokenizer.bos_id, *[tokenizer.pad_id] * 7]])
    assert ids.shape == (2, 8)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 1:] = False
    first = torch.tensor([[1, 2, 1, 2, 2, 3, 1, 1], [4] + [9] * 7])
    sums = WordSums(WordSplitter(tokenizer), min_count=1)
    batch = Batch(("a", "b"), torch.zeros(2, dtype=torch.long), text_ids=ids, text_valid=valid)
    sums.add(batch, {"block1/text": first, "block3/text": 2 * first})
    by_name = {of_class.name: of_class for of_class in sums.classes()}
    # <s> | o f | space a b | . | </s>: the space is a byte of its own, which begins the word.
    assert by_name["function words"].num_pieces == 2
    assert by_name["function words"].mean == pytest.approx(1.5 * 3 / 2)
    assert by_name["content words"].num_pieces == 3
    assert by_name["content words"].mean == pytest.approx(1.5 * (2 + 2 + 3) / 3)
    assert by_name["punctuation"].by_layer == {"block1/text": 1.0, "block3/text": 2.0}
    assert by_name["special tokens"].num_pieces == 3
    assert by_name["special tokens"].by_layer["block1/text"] == pytest.approx((1 + 1 + 4) / 3)
    assert by_name["first pieces"].by_layer["block1/text"] == pytest.approx((2 + 2) / 2)
    assert by_name["continuation pieces"].by_layer["block1/text"] == pytest.approx((1 + 2 + 3) / 3)
    assert "numbers" not in by_name
    most, least = sums.extremes()
    assert [(word.word, word.count) for word in most] == [("ab", 1)]
    assert most[0].mean == pytest.approx(3.5)
    assert [word.word for word in least] == ["."]


def test_words_that_a_packed_row_cuts_are_left_out() -> None:
    """The end of one document, a whole one, and the beginning of another."""
    tokenizer = TextTokenizer(train_tokenizer(["x"], vocab_size=261))
    first, second, third = (tokenizer.encode(text, max_length=99) for text in ("xab cd", "ef", "gh ijx"))
    parts = [first[2:-1], second[:-1], third[:-2]]
    ids = torch.tensor([[token for part in parts for token in part]])
    positions = torch.tensor([[place for part in parts for place in range(len(part))]])
    follows = [first[3:], second[1:], third[1:-1]]
    targets = torch.tensor([[token for part in follows for token in part]])
    sums = WordSums(WordSplitter(tokenizer), min_count=1)
    batch = Batch(
        ("a",), torch.zeros(1, dtype=torch.long), text_ids=ids, text_targets=targets, text_positions=positions
    )
    sums.add(batch, {"block1/text": torch.arange(ids.shape[1])[None]})
    most, least = sums.extremes()
    assert {word.word for word in (*most, *least)} <= {"cd", "ef", "gh"}
    by_name = {of_class.name: of_class.num_pieces for of_class in sums.classes()}
    # " cd", "ef" and "gh": nothing of "ab" and " ij".
    assert by_name["content words"] == 3 + 2 + 2
    assert by_name["special tokens"] == 2


def test_white_space_is_no_word() -> None:
    splitter = WordSplitter(TextTokenizer(train_tokenizer(["x"], vocab_size=261)))
    ids = splitter._tokenizer.encode("a ", max_length=9)
    assert [word.text for word in splitter.words(splitter.pieces(ids))] == ["a"]


def test_rare_words_are_not_ranked() -> None:
    tokenizer = TextTokenizer(train_tokenizer(["x"], vocab_size=261))
    sums = WordSums(WordSplitter(tokenizer), min_count=2)
    ids = torch.tensor([tokenizer.encode("b a b", max_length=20)])
    batch = Batch(("a",), torch.zeros(1, dtype=torch.long), text_ids=ids)
    sums.add(batch, {"block1/text": torch.ones_like(ids)})
    assert sums.extremes() == ([], [])
    sums.add(batch, {"block1/text": 2 * torch.ones_like(ids)})
    most, least = sums.extremes()
    assert [(word.word, word.count, word.mean) for word in (*most, *least)] == [("a", 2, 1.5), ("b", 4, 1.5)]
