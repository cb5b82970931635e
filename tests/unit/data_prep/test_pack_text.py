"""Documents from plain text, tables and JSON lines in many languages."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from data_prep.pack_text import main
from mhmoe_vl.data.shards import ShardReader, find_shards, read_index


def packed(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    documents, reader = [], ShardReader()
    for shard in find_shards(folder):
        index = read_index(shard)
        assert index.kind == "text"
        for sample in index.samples:
            members = reader.read(index, sample)
            documents.append((members["txt"].decode(), json.loads(members["json"])))
    return documents


def run(folder: Path, content: bytes, *options: str, name: str = "a.txt") -> list[str]:
    (folder / name).write_bytes(content)
    out = folder / "out"
    assert main([str(folder / name), "--out", str(out), "--max-skipped", "1", "--overwrite", *options]) == 0
    return [text for text, _ in packed(out)]


def test_parallel_paragraphs_of_twelve_languages(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "text_multi/xquad_contexts").glob("*.txt"))
    assert main([*map(str, files), "--language-from-name", "--out", str(tmp_path / "x"), "--workers", "2"]) == 0
    expected = []
    for file in files:
        for line in file.read_text(encoding="utf-8").split("\n"):
            # One of the Turkish paragraphs has control characters in it.
            line = "".join(" " if unicodedata.category(c) == "Cc" else c for c in line.replace("\ufeff", ""))
            text = unicodedata.normalize("NFC", " ".join(line.split()))
            if text:
                expected.append((text, {"source": file.name, "language": file.stem}))
    assert len({fields["language"] for _, fields in expected}) == len(files) >= 11
    assert packed(tmp_path / "x") == expected


def test_the_last_column_of_tsv(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "text_multi/bible_cc0/eus.tsv"
    assert main([str(file), "--language", "eu", "--out", str(tmp_path / "x")]) == 0
    documents = packed(tmp_path / "x")
    assert len(documents) == 2000
    assert documents[0][0] == "IESVS CHRIST Dauid-en semearen, Abrahamen semearen generationeco Liburuä."
    assert documents[0][1] == {"source": "eus.tsv", "language": "eu"}


def test_paragraphs_keep_their_line_breaks(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "text_en/tinyshakespeare.txt"
    options = ["--documents", "paragraphs", "--limit", "2", "--out", str(tmp_path / "x")]
    assert main([str(file), *options]) == 0
    assert [text for text, _ in packed(tmp_path / "x")] == [
        "First Citizen:\nBefore we proceed any further, hear me speak.",
        "All:\nSpeak, speak.",
    ]


TEXT = b"\xef\xbb\xbfone \r\n  two\x00\r\n\r\n\n cafe\xcc\x81\xe2\x80\xa8x\n\n\n"


@pytest.mark.parametrize(
    ("unit", "documents"),
    [
        ("lines", ["one", "two", "café x"]),
        ("paragraphs", ["one\ntwo", "café x"]),
        ("file", ["one\ntwo\n\n\ncafé x"]),
    ],
)
def test_what_a_document_is(tmp_path: Path, unit: str, documents: list[str]) -> None:
    assert run(tmp_path, TEXT, "--documents", unit) == documents


def test_json_lines(tmp_path: Path) -> None:
    content = b'{"body": "a\\nb"}\n{"body": 3}\n{"body": " "}\n[]\n{"body": "\xff"}\n'
    assert run(tmp_path, content, "--text-field", "body", name="a.jsonl") == ["a\nb"]
    listed = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(skip["source"], skip["reason"]) for skip in listed] == [
        ("a.jsonl:2", "bad_text"),
        ("a.jsonl:4", "bad_json"),
        ("a.jsonl:5", "bad_json"),
    ]


def test_lines_that_are_not_utf8_are_skipped(tmp_path: Path) -> None:
    assert run(tmp_path, b"good\nbad \xff\nfine\n\xc3\n") == ["good", "fine"]
    listed = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(skip["source"], skip["reason"]) for skip in listed] == [("a.txt:2", "not_utf8"), ("a.txt:4", "not_utf8")]
    assert run(tmp_path, b"good\nbad \xff\n\nfine\n", "--documents", "paragraphs") == ["fine"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text".encode("utf-16"), "is UTF-16; convert it first"),
        ("a.txt", b"\n \n", "the source has no entries"),
        ("a.jsonl", b'{"txt": "a"}', "a.jsonl:1: has no 'text' (did you mean 'txt'?); see --text-field"),
        ("b.txt", None, "cannot read: No such file"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match="65"):
        main([str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def test_a_holdout_stays_when_the_text_grows(tmp_path: Path) -> None:
    lines = [f"line {i}\n".encode() for i in range(300)]
    run(tmp_path, b"".join(lines[:200]), "--holdout", "0.1")
    val = [text for text, _ in packed(tmp_path / "out-val")]
    run(tmp_path, b"".join(lines), "--holdout", "0.1")
    assert [text for text, _ in packed(tmp_path / "out-val")][: len(val)] == val
    assert 0 < len(val) < 60
