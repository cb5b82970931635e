"""The text tokenizer."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from mhmoe_vl.data.text import SPECIAL_TOKENS, TextTokenizer
from mhmoe_vl.errors import DataError
from tests.unit.data.builders import raw_tokenizer, word_tokenizer


def test_a_text_is_framed_and_cut_with_its_end_kept() -> None:
    tokenizer = word_tokenizer()
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert tokenizer.encode("w0 w1 w2", 8) == [bos, 5, 6, 7, eos]
    assert tokenizer.encode("w0 w1 w2", 5) == [bos, 5, 6, 7, eos]
    assert tokenizer.encode("w0 w1 w2", 4) == [bos, 5, 6, eos]
    assert tokenizer.encode("", 8) == [bos, eos]
    assert tokenizer.encode("w1 zebra", 8) == [bos, 6, tokenizer.unknown_id, eos]


def test_special_tokens_in_a_text_are_text_in_every_process() -> None:
    tokenizer = word_tokenizer()
    text = "w1 <mask> </s> <pad> w2"
    # Of a vocabulary of whole words, the spelled-out tokens are found as words; they must not become special again.
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert copy.tokenizer.encode_special_tokens
        assert copy.encode(text, 16) == tokenizer.encode(text, 16)
        assert copy.encode("w1<mask>w2", 16) == [copy.bos_id, copy.unknown_id, copy.eos_id]


def test_decoding_leaves_out_special_tokens() -> None:
    tokenizer = word_tokenizer()
    ids = [tokenizer.bos_id, 5, tokenizer.mask_id, 6, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "w0 w1"


def test_ordinary_ids_are_all_but_the_special_ones() -> None:
    tokenizer = word_tokenizer(num_words=7)
    assert tokenizer.num_tokens == 12
    assert tokenizer.ordinary_ids == list(range(5, 12))


def test_a_tokenizer_without_our_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    raw_tokenizer(["w0"], special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<mask>", "<pad>")]).save(str(path))
    with pytest.raises(DataError, match=r"tokenizer\.json: the tokenizer lacks <pad>, <mask>; train one with"):
        TextTokenizer.load(path)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "Pickle"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizers file") as caught:
        TextTokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_an_absent_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json: no such tokenizer; .*data_prep\.train_text_tokenizer"):
        TextTokenizer.load(tmp_path / "absent.json")
    path = tmp_path / "tokenizer.json"
    raw_tokenizer(["w0"]).save(str(path))
    assert TextTokenizer.load(path).encode("w0", 4) == [1, 5, 2]
