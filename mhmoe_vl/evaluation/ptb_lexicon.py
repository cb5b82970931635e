"""Character classes and word lists of the Penn Treebank caption tokenizer, as regular-expression fragments.

They hold what the jar of pycocoevalcap (CoreNLP 3.4.1) does with single characters and words in fixed contexts:
all of the Basic Multilingual Plane was tried for the classes, every string of up to four letters and the
vocabulary of several corpora for the lists.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def _ranges(code_points: Iterable[int]) -> str:
    """Inside of a character class that holds ``code_points``, which must ascend."""
    runs: list[list[int]] = []
    for code in code_points:
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in runs)


def _listed(hex_ranges: str) -> str:
    """Inside of a character class from text such as ``2C2-2C5 375``."""
    pairs = (part.partition("-") for part in hex_ranges.split())
    return "".join(f"\\u{int(first, 16):04x}-\\u{int(last or first, 16):04x}" for first, _, last in pairs)


def _of_category(prefix: str, *, without: str) -> str:
    known = (code for code in range(0x10000) if unicodedata.category(chr(code)).startswith(prefix))
    newer = re.compile(f"[{without}]")
    return _ranges(code for code in known if not newer.match(chr(code)))


def _words(words: str) -> str:
    """Any of ``words`` in any case, the longest first; a capital first letter must stand in the text."""
    entries = sorted(words.split(), key=len, reverse=True)
    return (
        "(?:"
        + "|".join(word[0] + f"(?i:{word[1:]})" if word[0].isupper() else f"(?i:{word})" for word in entries)
        + ")"
    )


SOFT_HYPHEN = "\u00ad"

# Beyond the Basic Multilingual Plane nothing is a letter: the jar sees two surrogates and drops both.
# Letters and digits that Unicode added after version 6.1 are unknown to the jar, which drops them.
LETTERS = _of_category(
    "L",
    without=_listed(
        "37F 528-52F 560 588 5EF 860-86A 870-887 889-88E 8A1 8AD-8C9 978 980 9FC AF9 C34 C5A C5C-C5D C80 CDC-CDD D04 "
        "D54-D56 D5F E86 E89 E8C E8E-E93 E98 EA0 EA8-EA9 EAC 13F5 13F8-13FD 16F1-16F8 170D 171F 1878 191D-191E "
        "19B0-19C0 19C8-19C9 1B4C 1C80-1C8A 1C90-1CBA 1CBD-1CBF 1CF2-1CF3 1CFA 2C2F 2C5F 312E-312F 31BB-31BF "
        "4DB6-4DBF 9FCD-9FFF A698-A69D A78F A794-A79F A7AB-A7DC A7F1-A7F7 A8FD-A8FE A9E0-A9E4 A9E6-A9EF A9FA-A9FE "
        "AA7E-AA7F AB30-AB5A AB5C-AB69 AB70-ABBF"
    ),
) + _listed("1885-1886")
DIGITS = _of_category("Nd", without=_listed("DE6-DEF A9F0-A9F9"))
# Signs that continue a word without being letters: combining marks, vowel signs, modifier letters.
MARKS = SOFT_HYPHEN + _listed(
    "2C2-2C5 2D2-2DF 2E5-2EB 2ED 2EF-36F 375 378-379 384-385 3F6 483-487 55A-55F 591-5BD 5BF 5C1-5C2 5C4-5C5 5C7 "
    "615-61A 64B-65E 670 6D6-6E4 6E7-6ED 6FD-6FE 70F 711 730-74C 7A6-7B0 7EB-7F3 900-903 93C 93E-94E 951-955 "
    "962-963 981-983 9BC 9BE-9C4 9C7-9C8 9CB-9CD 9D7 9E2-9E3 A01-A03 A3C A3E-A4F A81-A83 ABC ABE-ACF B82 BBE-BC2 "
    "BC6-BC8 BCA-BCD C01-C03 C3E-C56 D3E-D44 D46-D48 E31 E34-E3A E47-E4E EB1 EB4-EBC EC8-ECD"
)
# Symbols that are tokens of their own; every symbol that is not here is dropped.
SYMBOLS = r"!-\/:-@\[-`{-~" + _listed(
    "A1-A9 AB-AC AE-B4 B6-B9 BB-BF D7 F7 37E 387 589 5BE 5C0 5C3 5C6 5F3-5F4 600-603 606-60C 614 61B 61E-61F 66A "
    "66D 6D4 700-70D 7F6-7F8 964-965 E3F E4F 1FBD 2013-2023 2026 2030-203B 203E-2042 2044 2070 2074-207E 2080-208E "
    "20A0 20A4 20AC 2100-2101 2103-2106 2108-2109 2114 2116-2118 211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 "
    "214A-214D 214F 2153-215E 2190-2BFF 3001-3002 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1 "
    "FFE5-FFE6 80 91-94 96-97"
)
HYPHENS = "_\\-\u058a\u2010\u2011"

# Single characters that the treebank writes differently.
REWRITTEN = {
    "(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-",
    "\u0080": "$", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$", "\u00a3": "#", "\u00a2": "cents",
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
    "\u0093": "``", "\u201c": "``", "\u00ab": "``",
    "\u0094": "''", "\u201d": "''", "\u00bb": "''", '"': "''",
    "\u0091": "`", "\u2018": "`", "\u201b": "`", "\u2039": "`",
    "\u0092": "'", "\u2019": "'", "\u203a": "'",
    "\u0096": "--", "\u0097": "--", "\u2013": "--", "\u2014": "--", "\u2015": "--",
    "\u2026": "...", SOFT_HYPHEN: "-",
}  # fmt: skip

# Two words in one, and where the treebank cuts.
COMPOUNDS = {"cannot": 3, "gonna": 3, "gotta": 3, "gimme": 3, "lemme": 3, "wanna": 3}

# Keep their full stop wherever they stand.
TITLES = _words(
    "adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft "
    "gen gov govs hon insp invt jos lieut lt maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc ph pres prof "
    "profs pvt rep reps rev sen sens sfc sgt spc st ste supt supts vs wm"
)
# Keep their full stop and also end the sentence when a capitalised word follows. With a capital only
# where the word exists without the full stop.
ABBREVIATIONS = _words(
    "al ala apr ariz Ark assn aug Az bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec Del esq "
    "est etc ext feb fla fri ga Ill inc ind intl jan jr jul jun kan kans ky La ltd mar Mass md mich minn Miss mo "
    "mon mont neb nev nov oct okla Ore Pa penn plc ppte ppty pte ptes pty ptys rd rt sep sept seq sq sr sys tel "
    "tenn Tex thu thurs tue tues univ va vt Wash wed wis wisc wyo ed\\.d ph\\.d"
)
COMPANY_BEFORE_LIMITED = _words("co pte pty")
# Keep their full stop before a number.
COUNTED = _words("art ca fig figs no nos op pp prop")
# After an initial or acronym these show that its full stop ended a sentence.
SENTENCE_STARTERS = _words(
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now "
    "Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet "
    "You Mr\\. Ms\\."
)
FILE_EXTENSIONS = _words(
    "bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps "
    "py sql tar txt wav x xml zip"
)
