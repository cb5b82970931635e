"""Documents for causal language modeling: nothing is lost, and every token is predicted once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_vl.data.decode import clean_document
from mhmoe_vl.data.loader import ShardDataset, Source
from mhmoe_vl.data.plan import SampleRef
from mhmoe_vl.data.samples import DocumentSamples
from mhmoe_vl.data.shards import IndexedSample, Member
from mhmoe_vl.data.text import BOS, EOS, TextTokenizer
from mhmoe_vl.errors import DataError
from tests.unit.data.builders import raw_tokenizer, word_tokenizer, words, write_shard

TOKENIZER = word_tokenizer()
SEGMENT = 300


def segments(
    text: str, segment_bytes: int = SEGMENT, tokenizer: TextTokenizer = TOKENIZER
) -> list[tuple[list[int], int]]:
    """Tokens (inputs and the last target) and bytes of every item of a document."""
    builder, data = DocumentSamples(tokenizer, 16, segment_bytes), text.encode()
    num_items = builder.num_items(IndexedSample("k", 1, {"txt": Member(0, len(data), 0)}))
    examples = [builder({"txt": data}, item, key="k", seed=1) for item in range(num_items)]
    for example in examples:
        assert example.text_ids[1:] == example.text_targets[:-1]
        assert example.num_bytes <= segment_bytes
    return [([*e.text_ids, e.text_targets[-1]], e.num_bytes) for e in examples]


def test_a_short_document() -> None:
    assert segments("w3 w4\nw5") == [([TOKENIZER.bos_id, 8, 9, 10, TOKENIZER.eos_id], 8)]


def test_a_long_document_is_cut_at_white_space() -> None:
    text = words(0, 50) + "\n" + words(10, 40) + " " + words(0, 50)
    found = segments(text)
    assert len(found) == 2
    assert all(tokens[0] == TOKENIZER.bos_id for tokens, _ in found)
    assert [tokens[-1] == TOKENIZER.eos_id for tokens, _ in found] == [False, True]
    ordinary = [i for tokens, _ in found for i in tokens if i not in (TOKENIZER.bos_id, TOKENIZER.eos_id)]
    assert ordinary == TOKENIZER.ordinary_tokens(text)
    assert sum(size for _, size in found) == len(text) - 1  # the white space of the cut


@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1, max_size=900))
@settings(max_examples=60, deadline=None)
def test_no_character_is_lost_or_cut_in_half(raw: str) -> None:
    """Also without white space, with characters of four bytes; a tokenizer of one token per character counts them."""
    text = clean_document(raw)
    if not text:
        return
    characters = TextTokenizer(raw_tokenizer(sorted({c for c in text if not c.isspace()})))
    characters.tokenizer.pre_tokenizer = _split_characters()
    found = segments(text, 257, characters)
    ordinary = [i for tokens, _ in found for i in tokens if i not in (characters.bos_id, characters.eos_id)]
    assert ordinary == [characters.tokenizer.token_to_id(c) for c in text if not c.isspace()]


def _split_characters():  # type: ignore[no-untyped-def]
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\S"), behavior="isolated")]
    )


def test_items_of_shards(tmp_path: Path) -> None:
    """A source has an item per segment, whatever the index says; they come in the order of the document."""
    texts = {"a": words(0, 50), "b": words(0, 50) + " " + words(0, 50), "c": "w1"}
    assert [len(text) for text in texts.values()] == [189, 379, 2]
    shard = write_shard(tmp_path / "x-00000.tar", "text", {key: {"txt": text.encode()} for key, text in texts.items()})
    source = Source("x", [shard], DocumentSamples(TOKENIZER, 16, SEGMENT))
    assert len(source) == 4
    dataset = ShardDataset({"x": source}, seed=0, pad_id=TOKENIZER.pad_id)
    batch = dataset.batch("x", [SampleRef("x", 0, item) for item in range(4)])
    assert batch.sample_ids == ("a", "b/0", "b/1", "c")
    targets = batch.text_targets[batch.text_valid]
    # Every token of the documents and their three ends.
    assert len(targets) == 50 + 100 + 1 + 3
    assert (targets == TOKENIZER.eos_id).sum() == 3
    assert batch.text_ids.shape[1] == 16


def test_bytes_that_are_no_text() -> None:
    builder = DocumentSamples(TOKENIZER, 16, SEGMENT)
    with pytest.raises(DataError, match="not UTF-8"):
        builder({"txt": b"\x80" * 700}, 1, key="k", seed=0)
    with pytest.raises(DataError, match="empty"):
        builder({"txt": b" "}, 0, key="k", seed=0)
    assert (BOS, EOS) == ("<s>", "</s>")


def test_a_segment_has_room_to_look_back() -> None:
    with pytest.raises(ValueError, match="must be more than 256"):
        DocumentSamples(TOKENIZER, 16, 256)
