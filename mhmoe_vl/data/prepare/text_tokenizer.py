"""Train a text tokenizer, or convert CLIP's: both with our special tokens as ids 0 to 4.

Special tokens are not added by the tokenizer file; :class:`mhmoe_vl.data.text.TextTokenizer` places them.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mhmoe_vl.data.text import SPECIAL_TOKENS, UNKNOWN
from mhmoe_vl.errors import ConfigError, DataError

TOKENIZER_MODELS = ("bpe", "unigram")

_NUM_BYTES = 256
# 49,408 ids of CLIP less the byte symbols, alone and as word ends, and its two special tokens.
_NUM_CLIP_MERGES = 49_408 - 2 * _NUM_BYTES - 2
_CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class TokenizerStatistics:
    """How a tokenizer splits a set of texts."""

    num_tokens: int
    num_texts: int
    mean_length: float
    unknown_share: float


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model: str = "bpe",
    lowercase: bool = False,
    show_progress: bool = False,
) -> Tokenizer:
    """Learn a vocabulary of at most ``vocab_size`` tokens, special tokens included.

    Args:
        model: ``bpe``: byte-level byte-pair encoding, for which no text is unknown; ``unigram``: SentencePiece's model
            (Kudo, 2018, arXiv:1804.10959), whose trainer sums in a random order, so that scores and the order of
            ids differ a little between runs.
        show_progress: draw the bars of the ``tokenizers`` library, for terminals.

    Raises:
        ConfigError: unknown model, or fewer tokens than bytes for ``bpe``.
    """
    if model not in TOKENIZER_MODELS:
        raise ConfigError(f"model is '{model}'; known are {', '.join(TOKENIZER_MODELS)}")
    least = len(SPECIAL_TOKENS) + (_NUM_BYTES if model == "bpe" else 1)
    if vocab_size < least:
        raise ConfigError(f"vocabulary size is {vocab_size}; '{model}' needs at least {least}")
    tokenizer, trainer = (_byte_level_bpe if model == "bpe" else _unigram)(vocab_size, show_progress)
    tokenizer.normalizer = _normalizer(lowercase)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def clip_tokenizer() -> Tokenizer:
    """The vocabulary of CLIP (Radford et al., 2021), as it ships with open_clip; id = CLIP's id + 5.

    Texts are lower-cased. CLIP's own clean-up of HTML entities and broken encodings is not part of it.

    Raises:
        ConfigError: open_clip is not installed.
    """
    # Found without importing open_clip, which takes seconds.
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise ConfigError("CLIP's vocabulary is part of open_clip: pip install open_clip_torch")
    with gzip.open(Path(package.origin).with_name(_CLIP_MERGES), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _NUM_CLIP_MERGES + 1]
    merges = [(first, second) for first, second in map(str.split, lines)]
    symbols = _byte_symbols()
    tokens = [*SPECIAL_TOKENS, *symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            unk_token=UNKNOWN,
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = _normalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # A word's end becomes the byte symbol of a space, and the last one is cut off.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("</w>", "Ġ"), decoders.ByteLevel(), decoders.Strip(" ", left=0, right=1)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def tokenizer_statistics(tokenizer: Tokenizer, texts: Iterable[str]) -> TokenizerStatistics:
    """Vocabulary size, mean tokens per text without special tokens, and share of tokens that are unknown.

    Raises:
        DataError: no texts.
    """
    # A text that spells out <unk>, as WikiText does, is known.
    tokenizer.encode_special_tokens = True
    # By id: a unigram model calls what it does not know by its own characters.
    unknown = tokenizer.token_to_id(UNKNOWN)
    num_texts = num_tokens = num_unknown = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        num_texts += 1
        num_tokens += len(ids)
        num_unknown += 0 if unknown is None else ids.count(unknown)
    if not num_texts:
        raise DataError("no texts to train a tokenizer on: give folders of shards or text files that are not empty")
    return TokenizerStatistics(
        tokenizer.get_vocab_size(), num_texts, num_tokens / num_texts, num_unknown / max(1, num_tokens)
    )


def _byte_level_bpe(vocab_size: int, show_progress: bool) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    return tokenizer, trainer


def _unigram(vocab_size: int, show_progress: bool) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), unk_token=UNKNOWN, show_progress=show_progress
    )
    return tokenizer, trainer


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.NFC()]
    if lowercase:
        steps.append(normalizers.Lowercase())
    return normalizers.Sequence(steps)


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes in CLIP's (and GPT-2's) order: printable bytes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = _NUM_BYTES - len(printable)
    return [chr(code) for code in (*printable, *range(_NUM_BYTES, _NUM_BYTES + num_others))]
