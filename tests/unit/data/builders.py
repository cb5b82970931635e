"""A tokenizer whose ids can be read off, and indexed shards of any kind, for the tests of the training data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import write_index
from mhmoe_vl.data.text import SPECIAL_TOKENS, TextTokenizer
from tests.unit.data.files import image_bytes, write_tar


def raw_tokenizer(words: Iterable[str], special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """One id per word, after the special tokens."""
    ids = {token: index for index, token in enumerate([*special_tokens, *words])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=SPECIAL_TOKENS[-1]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


def word_tokenizer(num_words: int = 50) -> TextTokenizer:
    """The words ``w0``, ``w1``, ... have the ids 5, 6, ..."""
    return TextTokenizer(raw_tokenizer(f"w{i}" for i in range(num_words)))


def words(first: int, last: int) -> str:
    """``w3 w4 w5`` for 3 and 6."""
    return " ".join(f"w{i}" for i in range(first, last))


def write_shard(path: Path, kind: str, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """An indexed shard; ``samples`` maps key -> extension -> bytes."""
    write_tar(path, [(f"{key}.{name}", data) for key, members in samples.items() for name, data in members.items()])
    write_index(replace(scan_shard(path), kind=kind))
    return path


def json_bytes(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def pair_sample(number: int, *, num_captions: int = 1) -> dict[str, bytes]:
    """Image ``number`` with captions that all start with word ``number``."""
    captions = [f"w{number} w{caption}" for caption in range(num_captions)]
    return {"jpg": image_bytes(number), "json": json_bytes(image_id=1000 + number, captions=captions)}


def damage(shard: Path, text: bytes) -> None:
    """Overwrite ``text`` inside the tar, which its checksum in the index then contradicts."""
    content = shard.read_bytes()
    assert content.count(text) == 1
    shard.write_bytes(content.replace(text, b"#" * len(text)))
