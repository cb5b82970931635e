"""Penn Treebank tokenizer for caption scores, without Java.

Published caption scores are computed over the tokens of the Stanford ``PTBTokenizer`` (CoreNLP 3.4.1,
``-preserveLines -lowerCase``) that ``pycocoevalcap`` ships as a jar, less a list of punctuation tokens. This is
a longest-match lexer that gives the same tokens. Like the jar it reads all captions as one text: an abbreviation
that ends a caption is judged by the first word of the next one.

Measured against the jar: no caption differs among the 25,014 of COCO val2017, no line among 35,478 of WikiText-2
(validation), XQuAD (English) and tiny Shakespeare, and none of 329,975 generated hard strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mhmoe_vl.evaluation import ptb_lexicon as lexicon

# The brackets never match, because the tokens are in lower case by then; the official list has them all the same,
# and "-lrb-" counts as a word in every published score.
REMOVED_TOKENS = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Windows-1252 quotes and dashes (80, 91-97) stay: they are control characters that the jar reads as punctuation.
_CONTROL = r"\x00-\x1f\x7f\x81-\x90\x98-\x9f"
_BLANKS = re.compile(rf" *(?:[^\S ]|[{_CONTROL}])[\s{_CONTROL}]*")
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean_caption_for_scoring(caption: str) -> str:
    """``caption`` on one line: every run of Unicode white space, line separators and control characters becomes
    one space, the ends are stripped and lone surrogates dropped. Plain double spaces stay: to the jar they are
    not the same as one.

    The tokenizers work line by line, so a ``\\r``, U+0085 or U+2028 left in a caption would shift all later ones.
    """
    return _BLANKS.sub(" ", _SURROGATES.sub("", caption)).strip()


def remove_punctuation(tokens: Sequence[str]) -> str:
    """Tokens joined by spaces, without the punctuation that pycocoevalcap removes."""
    return " ".join(token for token in tokens if token not in REMOVED_TOKENS)


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """What pycocoevalcap's ``PTBTokenizer`` makes of ``captions``, in their order: lower-case tokens joined by
    spaces, punctuation removed. Captions are cleaned first; one may come out empty.
    """
    return [remove_punctuation(tokens) for tokens in ptb_tokens(captions)]


def ptb_tokens(captions: Sequence[str]) -> list[list[str]]:
    """The lower-case tokens of each caption, with punctuation."""
    text = "".join(clean_caption_for_scoring(caption) + "\n" for caption in captions)
    lines: list[list[str]] = [[]]
    for token in _lex(text):
        if token == "\n":
            lines.append([])
        else:
            # A token such as "1 1/2" keeps its space as U+00A0, on which str.split() of the scorers divides.
            lines[-1].append(token.replace(" ", "\u00a0").lower())
    return lines[:-1]


@dataclass(frozen=True, slots=True)
class _Rule:
    """Group 1 of ``pattern`` is the token; what follows in the match must stand there and counts for its length."""

    pattern: re.Pattern[str]
    write: Callable[[str], str]
    # An abbreviation at the end of a sentence: its full stop is read once more, as a token.
    reread_stop: bool = False


def _lex(text: str) -> Iterator[str]:
    position = 0
    while position < len(text):
        plain = _PLAIN.match(text, position)
        if plain and plain[0].lower() not in lexicon.COMPOUNDS and not _KEEPS_STOP.match(text, position):
            yield plain[0]
            position = plain.end()
            continue
        longest, end = 0, position
        for rule in _RULES:
            match = rule.pattern.match(text, position)
            if match and match.end() - position > longest:
                longest, end, best = match.end() - position, match.end(1), rule
        if longest:
            written = best.write(text[position:end])
            if written:
                yield written
            position = end - best.reread_stop
        else:
            position += 1  # a space, or a character that the jar drops


def _as_word(token: str) -> str:
    # A soft hyphen inside a word is dropped; alone it is a hyphen.
    return token.replace(lexicon.SOFT_HYPHEN, "") or "-"


def _as_ampersand_word(token: str) -> str:
    return re.sub("(?i)&amp;", "&", _as_word(token))


def _as_clitic(token: str) -> str:
    return _symbol_by_symbol(re.sub("(?i)&apos;", "'", _as_word(token)))


def _with_round_brackets(token: str) -> str:
    return token.replace("(", "-LRB-").replace(")", "-RRB-")


def _without_stop(token: str) -> str:
    return token[:-1]


def _symbol_by_symbol(token: str) -> str:
    return "".join(lexicon.REWRITTEN.get(symbol, symbol) for symbol in token)


def _always(written: str) -> Callable[[str], str]:
    return lambda token: written


_APOSTROPHE = r"(?:['\x92\u2019]|(?i:&apos;))"
_ANY_QUOTE = r"(?:['\x92\u2019`\x91\u2018\u201b]|(?i:&apos;))"

_LETTER = rf"(?:[{lexicon.LETTERS}{lexicon.MARKS}]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_LETTER_OR_DIGIT = rf"(?:[{lexicon.LETTERS}{lexicon.MARKS}{lexicon.DIGITS}]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_PURE_LETTER = rf"[{lexicon.LETTERS}]"
_ALNUM = rf"[{lexicon.LETTERS}{lexicon.DIGITS}]"
_DIGIT = rf"[{lexicon.DIGITS}]"
# What most text consists of, tried first for speed: the rules would say the same.
_PLAIN = re.compile(r"[A-Za-z]+(?=[ \n]|\.\n)|,(?=[ \n])|\.(?=\n)")
_KEEPS_STOP = re.compile(rf"(?:{lexicon.ABBREVIATIONS}|{lexicon.TITLES}|{lexicon.COUNTED}|[A-Za-z])\.")

_ACRONYM = (
    r"(?:(?i:canada|sino|korean|eu|japan|non)-[uU]\.[sS]|[uU]\.[sS]\.-(?i:u\.k|u\.s\.s\.r)|[A-Za-z](?:\.[A-Za-z])+)"
)
_WORD = rf"{_LETTER}{_LETTER_OR_DIGIT}*(?:[.!?]{_LETTER}{_LETTER_OR_DIGIT}*)*"
# Mixed letters and digits with hyphens; a part may begin as in o'er, d'un.
_PART = rf"(?:[dDoOlL]{_ANY_QUOTE}{_ALNUM}{{2,}}|{_ALNUM}+)"
_THING = rf"{_PART}(?:[{lexicon.HYPHENS}]{_PART})*"
# ASCII only, with full stops and commas in the first part: u.s.-led, 1,000-foot, anti-U.S.
_HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+"
_AMPERSAND_WORD = r"[A-Z]+(?:(?:[+&]|(?i:&amp;))[A-Z]+)+"
_CLITIC = rf"{_APOSTROPHE}(?i:[msd]|re|ve|ll)"
_NOT = rf"[nN]{_ANY_QUOTE}[tT]"
_NUMBER = rf"[-+]?(?:{_DIGIT}+(?:[.:,\u00ad\u066b\u066c]{_DIGIT}+)*|(?:[.:,\u00ad\u066b\u066c]{_DIGIT}+)+)"
_TAG_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_TAG = (
    rf"<(?:[!?][A-Za-z-][^>\n]*|/{_TAG_NAME} *"
    rf"""|{_TAG_NAME}(?: +{_TAG_NAME}(?: *= *(?:"[^"\n]*"|'[^'\n]*'))?)* */? *)>"""
)
_CAPITAL_AFTER_GAP = rf"[ \n](?:[ \n]|[A-Z]|{_TAG})"
_NEW_SENTENCE = rf"(?:[ \n]+{lexicon.SENTENCE_STARTERS}|[ \n]{_TAG})[ \n]"
_URL_INNER = r'[^ \n"<>|(){}]'
_URL_PATH_INNER = r'[^ \n"<>|()]'
_URL_LAST = r'[^ \n"<>|.!?(){},\-]'
_WWW_PART = r"""[^ \n"<>|.!?(){},]+"""
# Between "," and "_" lie the digits and capitals: the range is the jar's, so "1.com" is no address.
_HOST_PART = r"""[^ \n"`'<>|.!?(){}$,-_]+"""
_HOST = rf"(?i:www)\.(?:{_WWW_PART}\.)+[A-Za-z]{{2,4}}|(?:{_HOST_PART}\.)+(?i:com|net|org|edu)"
_HOST_BEFORE_PATH = rf"(?:(?i:www)\.(?:{_WWW_PART}\.)+?[A-Za-z]{{2,4}}?|(?:{_HOST_PART}\.)+?(?i:com|net|org|edu))"
_MAIL_INNER = r'[^ \n"<>|()\u00a0{}]'
_MAIL_HOST = r'[^ \n"<>|(){}.\u00a0]+'


def _rule(token: str, ahead: str = "", write: Callable[[str], str] = _as_word, *, reread_stop: bool = False) -> _Rule:
    return _Rule(re.compile(f"({token})(?:{ahead})", re.ASCII), write, reread_stop)


def _compound_rules() -> Iterator[_Rule]:
    for compound, cut in lexicon.COMPOUNDS.items():
        yield _rule(f"(?i:{compound[:cut]})", f"(?i:{compound[cut:]})")


# The longest match wins, the first of equals.
_RULES: tuple[_Rule, ...] = (
    _rule(_TAG, write=str),
    _rule("&(?i:md|mdash|ndash);|-{2,4}", write=_always("--")),
    _rule("(?i:&amp;)", write=_always("&")),
    _rule("(?i:&lt;)", write=_always("<")),
    _rule("(?i:&gt;)", write=_always(">")),
    _rule("(?i:&nbsp;)", write=_always("")),
    _rule("&(?:(?i:ht|tl|ur|lr|qc|ql|qr|odq|cdq)|#[0-9]+);"),
    *_compound_rules(),
    _rule("'[tT]", "(?i:is|was)"),
    # Words before clitics, and the clitics.
    _rule("[A-Za-z\u00ad]*[A-MO-Za-mo-z]", _NOT),
    _rule(_NOT, write=_as_clitic),
    _rule(_WORD, _CLITIC),
    _rule(_THING, _CLITIC),
    _rule(_CLITIC, "[^A-Za-z]", write=_as_clitic),
    # Words with an apostrophe inside or outside.
    _rule(f"[yY]{_APOSTROPHE}", _PURE_LETTER),
    _rule(f"[A-HJ-XZn]{_ANY_QUOTE}{_PURE_LETTER}{{2,}}|[dDlLjJ]{_APOSTROPHE}|[oO]{_ANY_QUOTE}[oO]"),
    _rule(f"{_PURE_LETTER}+[aeiouyAEIOUY]{_ANY_QUOTE}[aeiouA-Z]{_PURE_LETTER}*"),
    _rule(f"(?i:dunkin|somethin|ol){_APOSTROPHE}|{_APOSTROPHE}(?i:em|till?|cause|n{_APOSTROPHE}|n|[2-9]0s)"),
    _rule(f"(?i:nor{_APOSTROPHE}easter|c{_APOSTROPHE}mon|e{_APOSTROPHE}er|s{_APOSTROPHE}mores)"),
    _rule(f"(?i:ev{_APOSTROPHE}ry|li{_APOSTROPHE}l|nat{_APOSTROPHE}l|cont{_APOSTROPHE}d\\.)"),
    _rule(f"{_APOSTROPHE}[0-9][0-9]", "[ \n]"),
    # Addresses.
    _rule(rf"(?i:https?)://{_URL_INNER}+{_URL_LAST}", write=str),
    _rule(_HOST, write=str),
    _rule(rf"{_HOST_BEFORE_PATH}/{_URL_PATH_INNER}+{_URL_LAST}", write=str),
    _rule(rf"(?i:&lt;|<)?[A-Za-z0-9]{_MAIL_INNER}*@(?:{_MAIL_HOST}\.)*{_MAIL_HOST}(?i:&gt;|>)?", write=str),
    _rule(rf"@[A-Za-z_][A-Za-z0-9_]*|\#{_LETTER}+", write=str),
    # Words.
    _rule(_WORD),
    _rule(_THING),
    _rule(rf"(?:{_WORD}|{_THING}|{_HYPHENATED}|{_AMPERSAND_WORD})\.", "[,;:\u3001]", _as_ampersand_word),
    _rule(r"(?i:c)\+\+|(?i:c|f)\#"),
    _rule(_AMPERSAND_WORD, write=_as_ampersand_word),
    _rule(r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    _rule("(?i:anti|pro)-"),
    # Numbers.
    _rule(_NUMBER),
    _rule(r"[A-Z]*\$"),
    _rule(r"(?:[0-9]{1,4}[- ])?[0-9]{1,4}(?:\\?/|\u2044)[0-9]{1,4}"),
    _rule(r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _rule("[0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4}"),
    _rule(
        r"(?:\([0-9]{2,3}\) ?|(?:\+\+?)?(?:[0-9]{2,4}[- ])?[0-9]{2,4}[- ])[0-9]{3,4}[- ]?[0-9]{3,5}"
        r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        write=_with_round_brackets,
    ),
    # Abbreviations.
    _rule(rf"{lexicon.COMPANY_BEFORE_LIMITED}\.", " (?i:ltd|lim)"),
    _rule(rf"{lexicon.ABBREVIATIONS}\.", _CAPITAL_AFTER_GAP, reread_stop=True),
    _rule(rf"{lexicon.ABBREVIATIONS}\.", r"[\s\S]{2}"),
    _rule(rf"{lexicon.ABBREVIATIONS}\.", reread_stop=True),
    _rule(rf"{lexicon.TITLES}\."),
    _rule(rf"{lexicon.COUNTED}\.", f"[ \n]?{_DIGIT}"),
    _rule(rf"{_ACRONYM}\.", _NEW_SENTENCE, reread_stop=True),
    _rule(rf"{_ACRONYM}\."),
    _rule(r"[A-Za-z]\.", _NEW_SENTENCE, _without_stop, reread_stop=True),
    _rule(r"[A-Za-z]\."),
    _rule(rf"{_LETTER_OR_DIGIT}+(?:\.{_LETTER_OR_DIGIT}+)*\.{lexicon.FILE_EXTENSIONS}", "[ \n.?!,]", str),
    _rule(_HYPHENATED),
    # Emoticons.
    _rule(r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]", _with_round_brackets),
    _rule(
        r"[\-^x=~<>']_[\-^x=~<>']|\([\-^x=~<>'][_.]?[\-^x=~<>']\)",
        write=_with_round_brackets,
    ),
    # Punctuation.
    _rule(r"\.{3,5}|(?:\. ){2,4}\.", write=_always("...")),
    _rule(r"[!?]+|-{5,}|\*+|\\\*|_+|\#+|@{2,}|<<|>>|(?i:-(?:lrb|rrb|lsb|rsb|lcb|rcb)-)"),
    _rule('"|(?i:&quot;)', "[A-Za-z0-9$]", _always("``")),
    _rule("'", "[A-Za-z][^ \n]", _always("`")),
    _rule(_CLITIC, write=_as_clitic),
    _rule(r"[`\x91-\x94\u2018-\u201f\u00ab\u00bb\u2039\u203a]{1,2}", write=_symbol_by_symbol),
    _rule("''|(?i:&quot;)", write=_always("''")),
    _rule("``", write=_always("``")),
    _rule("(?i:&apos;)", write=_always("'")),
    _rule(f"[{lexicon.SYMBOLS}{lexicon.SOFT_HYPHEN}\n]", write=_symbol_by_symbol),
)
