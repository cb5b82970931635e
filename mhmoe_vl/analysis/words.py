"""Tokens as words, and words in classes.

There is no part-of-speech tagger without a download, so classes are what can be told from the spelling alone:

* *punctuation*: no letter and no digit in it,
* *number*: has a digit, or is an English number word up to ``twelve``, or ``hundred`` or ``thousand``,
* *function word*: in a closed list of English articles, prepositions, pronouns, auxiliaries, conjunctions and the like,
* *content word*: everything else; in other languages than English that is every word.

A tagger would call some of them otherwise: ``left`` is a content word here, and so is every verb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from mhmoe_vl.data.text import TextTokenizer

SPECIAL = "special tokens"
WORD_CLASSES = ("content words", "function words", "numbers", "punctuation", SPECIAL)
#: Places of a piece within a word; punctuation and special tokens have none.
PIECE_PLACES = ("first pieces", "continuation pieces")

FUNCTION_WORDS = frozenset(
    """
    a an the this that these those
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself
    we us our ours ourselves they them their theirs themselves
    who whom whose which what when where why how
    and or but nor so yet if then else than as because while although though unless until since whether
    of in on at by for with about against between among into through during before after above below to from
    up down out off over under near beside behind beyond upon within without along across toward towards onto per via
    am is are was were be been being have has had having do does did doing will would shall should can could may might
    must ought
    not no nor only very too also just there here all any both each few more most other some such own same every
    either neither another again once ever never
    """.split()  # noqa: SIM905
)
NUMBER_WORDS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve hundred thousand".split()  # noqa: SIM905
)

_APOSTROPHES = "'\u2019"


@dataclass(frozen=True)
class Piece:
    """A token of a text.

    Attributes:
        word: number of its word in the row; -1 for special tokens.
        is_first: it begins its word.
    """

    text: str
    word: int
    is_first: bool


@dataclass(frozen=True)
class Word:
    """A word of a row, in lower case, and the places of its pieces."""

    text: str
    word_class: str
    places: tuple[int, ...]


def word_class(word: str) -> str:
    """One of :data:`WORD_CLASSES`, by the rules at the top of this file."""
    word = word.strip().lower()
    if not any(character.isalnum() for character in word):
        return "punctuation"
    if any(character.isdigit() for character in word) or word in NUMBER_WORDS:
        return "numbers"
    return "function words" if word in FUNCTION_WORDS else "content words"


class WordSplitter:
    """Puts the tokens of a row together to words.

    A word begins where the decoded text has white space, at the start of a text, and wherever letters or digits meet
    punctuation (an apostrophe between letters is part of the word). Scripts without spaces have long "words".
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {
            tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.unknown_id
        }  # fmt: skip
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        # A token alone may be decoded without the space before it: what it adds to another one tells. Pairs repeat.
        self._added_text = lru_cache(maxsize=1 << 16)(self._decode_behind)

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """One for every id; the text of special tokens is empty."""
        found: list[Piece] = []
        number, before = -1, None
        for token in ids:
            if token in self._special:
                found.append(Piece("", -1, False))
                before = None
                continue
            text = self._added_text(before, token)
            is_first = before is None or text[:1].isspace() or _breaks(found[-1].text, text)
            number += is_first
            found.append(Piece(text, number, is_first))
            before = token
        return found

    def words(self, pieces: Sequence[Piece]) -> list[Word]:
        """The words of :meth:`pieces`, in their order; white space that no word follows is none."""
        places: dict[int, list[int]] = {}
        for place, piece in enumerate(pieces):
            if piece.word >= 0:
                places.setdefault(piece.word, []).append(place)
        words = []
        for of_word in places.values():
            text = "".join(pieces[place].text for place in of_word).strip().lower()
            if text:
                words.append(Word(text, word_class(text), tuple(of_word)))
        return words

    def _decode_behind(self, before: int | None, token: int) -> str:
        decode = self._tokenizer.tokenizer.decode
        if before is None:
            return decode([token], skip_special_tokens=False)
        start, whole = decode([before], skip_special_tokens=False), decode([before, token], skip_special_tokens=False)
        # The bytes of an unfinished character are shown as a replacement character, which the next token replaces.
        return whole[len(start) :] if whole.startswith(start) else decode([token], skip_special_tokens=False)


def _breaks(before: str, text: str) -> bool:
    """Whether a word ends between two pieces that no space parts."""
    if not before or not text:
        return False
    last, first = before[-1], text[0]
    if last.isspace() or last in _APOSTROPHES or first in _APOSTROPHES:
        return False
    return last.isalnum() != first.isalnum() and "\ufffd" not in (last, first)
