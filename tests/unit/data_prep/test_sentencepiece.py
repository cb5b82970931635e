"""SentencePiece models as tokenizers: ids against an exhaustive search for the best segmentation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from data_prep import train_text_tokenizer
from mhmoe_vl.data.prepare.sentencepiece import model_proto, sentencepiece_tokenizer
from mhmoe_vl.data.text import TextTokenizer
from mhmoe_vl.errors import DataError

#: Log probabilities; a piece may hold a space, which SentencePiece writes as a low line.
PIECES = {
    "▁": -3.0, "a": -4.0, "b": -4.5, "c": -5.0, "<": -6.0, "s": -5.5, ">": -6.0, "▁a": -3.5, "ab": -3.75, "▁ab": -3.25,
    "b▁c": -4.25, "bc": -4.0, "▁abc": -6.5, "cc": -5.25,
}  # fmt: skip
IDS = {piece: number for number, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *PIECES])}


def write_model(path: Path, *, first: tuple[str, ...] = ("<unk>", "<s>", "</s>"), model_type: int = 1) -> Path:
    model = model_proto()()
    for piece, score in [*((piece, 0.0) for piece in first), *PIECES.items()]:
        model.pieces.add(piece=piece, score=score)
    model.trainer_spec.model_type = model_type
    path.write_bytes(model.SerializeToString())
    return path


def best_ids(text: str) -> list[int]:
    """Of all ways to cut a text into pieces the likeliest; unknown characters in a row are one <unk>."""
    text = "▁" + " ".join(word for word in text.split(" ") if word).replace(" ", "▁")
    unknown = min(PIECES.values()) - 10
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        ways = []
        for start in range(end):
            piece, (score, ids) = text[start:end], best[start]
            if piece in PIECES:
                ways.append((score + PIECES[piece], [*ids, IDS[piece]]))
            elif end - start == 1:
                ways.append((score + unknown, ids if ids[-1:] == [3] else [*ids, 3]))
        best.append(max(ways, default=(-math.inf, [])))
    return best[-1][1]


@pytest.mark.parametrize(
    "text",
    ["ab", "abc", "a b c", "ab cc bc", "  a   b  ", "abcabcbcab", "xab", "a xyz c", "a<s>b", "a <s> b", "cab bc ab c"],
)
def test_ids_are_those_of_the_best_segmentation(tmp_path: Path, text: str) -> None:
    tokenizer = TextTokenizer(sentencepiece_tokenizer(write_model(tmp_path / "x.spm")))
    assert tokenizer.ordinary_tokens(text) == best_ids(text)
    if 3 not in best_ids(text):
        assert tokenizer.decode(tokenizer.ordinary_tokens(text)) == " ".join(text.split())


def test_special_tokens_are_numbered_as_by_xlm_roberta(tmp_path: Path) -> None:
    """And so those of BEiT-3: 64,000 pieces make 64,002 ids, of which <mask> is the last."""
    tokenizer = TextTokenizer(sentencepiece_tokenizer(write_model(tmp_path / "x.spm")))
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unknown_id) == (0, 1, 2, 3)
    assert tokenizer.mask_id == 4 + len(PIECES) == tokenizer.num_tokens - 1
    assert tokenizer.encode("a", 8) == [0, IDS["▁a"], 2]
    # What spells a special token is text.
    for name in ("<s>", "</s>", "<pad>", "<unk>", "<mask>"):
        ids = tokenizer.ordinary_tokens(f"a {name} b")
        assert not {0, 1, 2, tokenizer.mask_id} & set(ids), name


def test_the_command_writes_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = write_model(tmp_path / "x.spm"), tmp_path / "tokenizer.json"
    (tmp_path / "x.txt").write_text("ab\nxy\n")
    command = ["--sentencepiece", str(model), "--out", str(out), str(tmp_path / "x.txt")]
    assert train_text_tokenizer.main(command) == 0
    assert "2 texts of 1.5 tokens on average, 33.333% of them unknown" in capsys.readouterr().out
    assert TextTokenizer.load(out).ordinary_tokens("ab c") == best_ids("ab c")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.spm"
    with pytest.raises(DataError, match=r"x.spm: cannot be read"):
        sentencepiece_tokenizer(path)
    for content in (b"not one", b"\xff" * 20, b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x.spm: not a (SentencePiece|unigram) model"):
            sentencepiece_tokenizer(path)
    for model in ({"model_type": 2}, {"first": ("<pad>", "<unk>", "<s>")}):
        with pytest.raises(DataError, match="not a unigram model of SentencePiece that begins with <unk> <s> </s>"):
            sentencepiece_tokenizer(write_model(path, **model))  # type: ignore[arg-type]
