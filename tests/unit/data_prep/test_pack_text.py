"""Documents from plain text, tables and JSON lines in many languages."""

from __future__ import annotations

import gzip
import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.pack_text import main
from mhmoe_vl.data.prepare import duplicates, packing
from mhmoe_vl.data.prepare.documents import Reading
from mhmoe_vl.data.prepare.duplicates import find_duplicates
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


def compressed(ending: str, data: bytes) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    # Two frames, as parallel compressors and `cat a.zst b.zst` make them.
    half = len(data) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    rows = [json.dumps({"text": f"row {i} " + "x" * (i % 700)}) for i in range(2000)]
    found = run(tmp_path, compressed(ending, "\n".join(rows).encode()), name="a.jsonl" + ending)
    assert found == [json.loads(row)["text"].strip() for row in rows]
    lines = [f"line {i}" for i in range(50)]
    (tmp_path / f"de.txt{ending}").write_bytes(compressed(ending, "\n".join(lines).encode()))
    out = tmp_path / "named"
    assert main([str(tmp_path / f"de.txt{ending}"), "--language-from-name", "--out", str(out)]) == 0
    assert packed(out) == [(line, {"source": f"de.txt{ending}", "language": "de"}) for line in lines]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: b"not compressed" + data], ids=["cut", "wrong"]
)
def test_damaged_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, damage: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / f"a.txt{ending}"
    file.write_bytes(damage(compressed(ending, b"\n".join(b"line %d" % i for i in range(10_000)))))
    with pytest.raises(SystemExit, match="65"):
        main([str(file), "--out", str(tmp_path / "out")])
    assert f"{file}: damaged or incomplete: " in capsys.readouterr().err


def test_without_zstandard(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"anything")
    with pytest.raises(SystemExit, match="64"):
        main([str(tmp_path / "a.txt.zst"), "--out", str(tmp_path / "out")])
    assert "needs the package zstandard: pip install zstandard" in capsys.readouterr().err


def corpus(folder: Path) -> Path:
    """Two German files in a folder, a French file, and a note."""
    files = {
        "de/a.txt": "eins\nzwei\neins",
        "de/b/c.tsv": "1\tdrei\n2\teins",
        "fr.txt": "un\ndeux\neins",
        "note.md": "x",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_one_data_set_per_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = corpus(tmp_path / "corpus"), tmp_path / "out"
    assert main([str(source), "--per-language", "--deduplicate", "--out", str(out)]) == 0
    # What another language has is no duplicate.
    assert [text for text, _ in packed(out / "fr")] == ["un", "deux", "eins"]
    assert packed(out / "de") == [
        ("eins", {"source": "a.txt", "language": "de"}),
        ("zwei", {"source": "a.txt", "language": "de"}),
        ("drei", {"source": "c.tsv", "language": "de"}),
    ]
    assert sorted(path.name for path in out.iterdir()) == ["de", "fr"]
    assert "left out 2 of 5 documents, which had the text of an earlier one" in capsys.readouterr().out
    manifest = json.loads((out / "de/manifest.json").read_bytes())
    assert (manifest["num_documents"], manifest["num_duplicates"], manifest["num_samples"]) == (5, 2, 3)
    assert main([str(source), "--per-language", "--languages", "fr", "--out", str(tmp_path / "one")]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["fr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--per-language", "--languages", "fr", "den"], "no folder or file of language 'den' (did you mean 'de'?)"),
        (["--languages", "fr"], "chooses among the languages of --per-language"),
    ],
)
def test_languages_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    source = corpus(tmp_path / "corpus")
    with pytest.raises(SystemExit):
        main([str(source), "--out", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["1", "3"])
def test_exact_duplicates(tmp_path: Path, workers: str) -> None:
    """Against a set, over several files, some of them with lines that are not UTF-8; whatever the number of workers."""
    expected: list[str] = []
    for number in range(4):
        lines = [f"document {(i * i + number * 37) % 400}" for i in range(300)]
        expected += [line for line in lines if line not in expected]
        expected = list(dict.fromkeys(expected))
        content = "\n".join(lines).encode()
        (tmp_path / f"{number}.txt").write_bytes(content + b"\n\xff" * (number == 1))
    files = [str(tmp_path / f"{number}.txt") for number in range(4)]
    out = tmp_path / "out"
    assert main([*files, "--deduplicate", "--out", str(out), "--workers", workers, "--samples-per-shard", "50"]) == 0
    assert [text for text, _ in packed(out)] == expected
    assert json.loads((out / "manifest.json").read_bytes())["num_duplicates"] == 1200 - len(expected)
    assert not list(tmp_path.glob(".out*"))


def test_hashes_larger_than_memory_are_sorted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of seven hashes at a time give what one chunk gives."""
    lines = [f"document {i * i % 97}" for i in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    found = {}
    for size in (7, 2**20):
        monkeypatch.setattr(duplicates, "_HASHES_AT_ONCE", size)
        found[size] = find_duplicates([tmp_path / "a.txt"], Reading(), folder=tmp_path / "hashes", num_workers=1)
    seen: set[str] = set()
    expected = [line in seen or bool(seen.add(line)) for line in lines]  # type: ignore[func-returns-value]
    assert np.unpackbits(found[7].bits)[:200].astype(bool).tolist() == expected
    assert (found[7].bits == found[2**20].bits).all()
    assert found[7].number == sum(expected)


def test_the_same_text_is_held_out_whatever_stands_beside_it(tmp_path: Path) -> None:
    """In another order, another file, among other documents; and no text is on both sides."""
    texts = [f"text number {i}" for i in range(400)]
    sides = []
    for name, lines in (("a", texts), ("b", [f"new {i}" for i in range(300)] + texts[::-1] + texts[:50])):
        run(tmp_path, "\n".join(lines).encode(), "--holdout", "0.2", name=f"{name}.txt")
        held_out, kept = ({text for text, _ in packed(tmp_path / folder)} for folder in ("out-val", "out"))
        assert not held_out & kept
        sides.append(held_out & set(texts))
    assert sides[0] == sides[1]
    assert 50 < len(sides[0]) < 110


def test_an_interrupted_packing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after two shards, with duplicates left out: the same bytes as without interruption."""
    (tmp_path / "a.txt").write_text("\n".join(f"document {i * i % 197}" for i in range(400)))
    options = [str(tmp_path / "a.txt"), "--deduplicate", "--samples-per-shard", "20", "--name", "x"]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    write, written = packing.write_shard, []

    def write_two(job: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(job.place.path.name)
        return write(job)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_shard", write_two)
        with pytest.raises(SystemExit):
            main([*options, "--out", str(tmp_path / "broken")])
    assert not (tmp_path / "broken/manifest.json").exists()
    assert main([*options, "--out", str(tmp_path / "broken")]) == 0
    whole, broken = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("whole", "broken")
    )
    assert whole == broken
    assert len(whole) > 10
