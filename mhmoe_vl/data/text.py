"""Text tokenization with any HF ``tokenizers`` file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mhmoe_vl.errors import DataError

PAD, BOS, EOS, MASK, UNKNOWN = "<pad>", "<s>", "</s>", "<mask>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, MASK, UNKNOWN)


class TextTokenizer:
    """A ``tokenizer.json`` and the ids of the special tokens it must contain.

    Picklable, so that loader workers can have it.
    """

    def __init__(self, tokenizer: Tokenizer, name: str = "tokenizer") -> None:
        ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
        missing = [token for token, index in zip(SPECIAL_TOKENS, ids, strict=True) if index is None]
        if missing:
            raise DataError(
                f"{name}: the tokenizer lacks {', '.join(missing)}; "
                "train one with python -m data_prep.train_text_tokenizer"
            )
        # A caption that spells out <mask> is text, not a special token.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        special: list[int] = [index for index in ids if index is not None]
        self._special_ids = frozenset(special)
        self.pad_id, self.bos_id, self.eos_id, self.mask_id, self.unknown_id = special
        self.num_tokens: int = tokenizer.get_vocab_size()
        #: Ids that random replacement may draw and that decoding may produce.
        self.ordinary_ids: list[int] = [index for index in range(self.num_tokens) if index not in special]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The setting is no part of a tokenizer's file, so a pickle loses it.
        self.tokenizer.encode_special_tokens = True

    @staticmethod
    def load(path: str | Path) -> TextTokenizer:
        """Read ``tokenizer.json``.

        Raises:
            DataError: absent, malformed, or without our special tokens.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer; train one with python -m data_prep.train_text_tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust binding raises bare Exception
            raise DataError(f"{path}: not a tokenizers file: {str(error)[:200]}") from None
        return TextTokenizer(tokenizer, str(path))

    def encode(self, text: str, max_length: int) -> list[int]:
        """``<s> text </s>``, cut to ``max_length`` ids with the end token kept."""
        return [self.bos_id, *self.ordinary_tokens(text)[: max_length - 2], self.eos_id]

    def ordinary_tokens(self, text: str) -> list[int]:
        """The ids of ``text`` alone."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; empty if there are no others."""
        ordinary = [i for i in ids if i not in self._special_ids]
        return self.tokenizer.decode(ordinary, skip_special_tokens=True).strip() if ordinary else ""

    def _read_special_tokens_as_text(self) -> None:
        """A caption that spells out ``<mask>`` hides nothing."""
        self.tokenizer.encode_special_tokens = True
