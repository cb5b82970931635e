"""Scanning: what is in a tar is indexed exactly, and nothing is lost without a word."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path

import pytest

from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import ShardIndex
from mhmoe_vl.errors import DataError
from tests.unit.data.files import image_bytes, pair_members, write_tar

IMAGE = image_bytes()


def keys(index: ShardIndex) -> list[str]:
    return [sample.key for sample in index.samples]


def reasons(index: ShardIndex) -> list[tuple[str, str]]:
    return [(skip.source, skip.reason) for skip in index.skipped]


def test_an_img2dataset_shard_as_tarfile_reads_it(shared_data: Path, tmp_path: Path) -> None:
    shard = Path(shutil.copy(shared_data / "format_samples/img2dataset_shard/00000.tar", tmp_path))
    index = scan_shard(shard)
    assert (index.kind, index.num_samples, index.num_items, index.skipped) == ("pair", 11, 11, ())
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        expected = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    found = {
        f"{sample.key}.{name}": content[member.offset : member.offset + member.size]
        for sample in index.samples
        for name, member in sample.members.items()
    }
    assert found == expected
    for sample in index.samples:
        for name, member in sample.members.items():
            assert member.crc32 == zlib.crc32(expected[f"{sample.key}.{name}"])


def test_a_tar_cut_anywhere_is_an_error_or_complete(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [m for i in range(4) for m in pair_members(f"s{i}", seed=i)])
    content = whole.read_bytes()
    complete = scan_shard(whole).samples
    cut = tmp_path / "cut.tar"
    num_errors = 0
    for block in range(0, len(content) + 512, 512):
        for length in {max(0, block - 1), block, block + 1}:
            cut.write_bytes(content[:length])
            try:
                found = scan_shard(cut).samples
            except DataError:
                num_errors += 1
            else:
                assert found == complete
    end_of_data = complete[-1].members["txt"].offset
    assert num_errors >= 3 * end_of_data // 512


def test_a_damaged_header_is_an_error(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [*pair_members("a"), *pair_members("b")])
    content = bytearray(shard.read_bytes())
    header_of_b = content.index(b"b.jpg")
    content[header_of_b] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"damaged tar: bad header at byte {header_of_b}"):
        scan_shard(shard)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"<html>404</html>" * 100, "not a tar"),
        (gzip.compress(bytes(10240), mtime=0), "gzip-compressed"),
        (b"BZh91AY" + bytes(600), "bzip2-compressed"),
        (b"\xfd7zXZ\0" + bytes(600), "xz-compressed"),
        (bytes(10240), "no usable sample"),
    ],
)
def test_what_is_no_shard(tmp_path: Path, content: bytes, message: str) -> None:
    shard = tmp_path / "x.tar"
    shard.write_bytes(content)
    with pytest.raises(DataError, match=message):
        scan_shard(shard)


def test_an_absent_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        scan_shard(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("odd_members", "expected"),
    [
        ([("b.jpg", IMAGE)], [("b", "incomplete")]),
        ([("b.txt", b"text")], [("b", "incomplete")]),
        ([("a.jpg", IMAGE)], [("a.jpg", "duplicate_key")]),
        ([("b.jpg", IMAGE), *pair_members("c"), ("b.txt", b"x")], [("b.txt", "interleaved"), ("b", "incomplete")]),
        ([("my.photo.jpg", IMAGE), ("my.photo.txt", b"x")], [("my", "dot_in_key")]),
        ([("b.jpg", IMAGE), ("b.txt", b" \n")], [("b", "empty_caption")]),
        ([("b.jpg", IMAGE), ("b.txt", b"\xff")], [("b", "malformed")]),
        ([("b.jpg", IMAGE), ("b.json", b"{"), ("b.txt", b"x")], [("b", "malformed")]),
        ([("README", b"x")], [("README", "no_key")]),
        ([("._b.jpg", b"x")], [("._b.jpg", "no_key")]),
    ],
)
def test_unusable_samples_are_recorded(
    tmp_path: Path, odd_members: list[tuple[str, bytes]], expected: list[tuple[str, str]]
) -> None:
    index = scan_shard(write_tar(tmp_path / "x.tar", [*pair_members("a"), *odd_members, *pair_members("z")]))
    assert reasons(index) == expected
    assert set(keys(index)) == {"a", "z"} | ({"c"} if len(odd_members) > 3 else set())


def test_links_are_not_followed(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in pair_members("a"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index = scan_shard(shard)
    assert (keys(index), reasons(index)) == (["a"], [("b.jpg", "not_a_file")])


def test_an_oversized_member_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhmoe_vl.data.prepare.scan.MAX_MEMBER_BYTES", 2000)
    index = scan_shard(write_tar(tmp_path / "x.tar", [*pair_members("a"), ("b.jpg", bytes(2001)), ("b.txt", b"x")]))
    assert (keys(index), reasons(index)) == (["a"], [("b", "too_large")])


def test_a_size_that_lies_is_an_error(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    entry = tarfile.TarInfo("a.jpg")
    entry.size = 8 * 2**30 - 1
    shard.write_bytes(entry.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="truncated"):
        scan_shard(shard)


@pytest.mark.parametrize(
    ("entry_type", "size"),
    [
        (tarfile.REGTYPE, b"\x80\0\0\0" + b"\xff" * 8),  # base 256: 2^64 - 1
        (tarfile.REGTYPE, b"\xff" * 12),  # -1
        (tarfile.REGTYPE, b"\xff" * 10 + b"\xf8\x00"),  # -2048: back to the entry before
        (tarfile.GNUTYPE_LONGNAME, b"\x80\0\0\0" + b"\xff" * 8),
        (tarfile.GNUTYPE_LONGNAME, b"\xff" * 11 + b"\0"),
        (tarfile.XHDTYPE, b"\x80\0\0\0" + b"\x7f" * 8),
    ],
)
def test_sizes_that_no_file_has(tmp_path: Path, entry_type: bytes, size: bytes) -> None:
    shard = write_tar(tmp_path / "x.tar", [*pair_members("a"), *pair_members("b")])
    content = bytearray(shard.read_bytes())
    start = content.index(b"b.txt")
    content[start + 124 : start + 136] = size
    content[start + 156 : start + 157] = entry_type
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"x.tar: .*; copy"):
        scan_shard(shard)


def test_folders_capitals_and_foreign_members(tmp_path: Path) -> None:
    members = [("./train/a.JPG", IMAGE), ("./train/a.txt", b"x"), ("./train/a.cls", b"3"), ("./train/a.pyd", b"evil")]
    index = scan_shard(write_tar(tmp_path / "x.tar", members))
    assert keys(index) == ["train/a"]
    assert set(index.samples[0].members) == {"jpg", "txt"}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(tmp_path: Path, format: int) -> None:  # noqa: A002
    key = "k" * 150
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        for name, content in pair_members(key):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert keys(scan_shard(tmp_path / "x.tar")) == [key]


QUESTIONS = [{"question": "a?", "question_id": 1}, {"question": "b?", "question_id": 2}]
VQA = json.dumps({"questions": QUESTIONS}).encode()
NLVR2 = json.dumps({"examples": [{"sentence": "s", "identifier": "dev-0-0-0"}] * 3}).encode()


@pytest.mark.parametrize(
    ("members", "kind", "num_items"),
    [
        ([("a.png", IMAGE)], "image", 1),
        ([("a.png", IMAGE), ("a.json", b'{"file": "x"}')], "image", 1),
        ([("a.txt", b"text")], "text", 1),
        ([("a.webp", IMAGE), ("a.txt", b"text")], "pair", 1),
        ([("a.jpg", IMAGE), ("a.json", b'{"captions": ["c"]}')], "pair", 1),
        ([("a.jpg", IMAGE), ("a.json", VQA)], "vqa", 2),
        ([("a.left.png", IMAGE), ("a.right.jpg", IMAGE), ("a.json", NLVR2)], "nlvr2", 3),
    ],
)
def test_the_kind_and_the_number_of_items(
    tmp_path: Path, members: list[tuple[str, bytes]], kind: str, num_items: int
) -> None:
    index = scan_shard(write_tar(tmp_path / "x.tar", members))
    assert (index.kind, index.num_items, set(index.samples[0].members)) == (
        kind,
        num_items,
        {name.partition(".")[2] for name, _ in members},
    )


def test_the_kind_can_be_asked_for(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", pair_members("a"))
    assert scan_shard(shard, kind="text").kind == "text"
    with pytest.raises(DataError, match="no usable sample of kind 'vqa'; first problem: a: incomplete"):
        scan_shard(shard, kind="vqa")
    with pytest.raises(DataError, match="unknown kind"):
        scan_shard(shard, kind="audio")


def test_questions_must_be_there(tmp_path: Path) -> None:
    members = [("a.jpg", IMAGE), ("a.json", VQA), ("b.jpg", IMAGE), ("b.json", b'{"questions": []}')]
    assert reasons(scan_shard(write_tar(tmp_path / "x.tar", members), kind="vqa")) == [("b", "empty")]


@pytest.mark.parametrize(
    "items", [[1], [{}], [{"question": 1, "question_id": 1}], [{"question": "a?"}], [*QUESTIONS, None]]
)
def test_questions_must_have_what_training_reads(tmp_path: Path, items: list[object]) -> None:
    malformed = json.dumps({"questions": items}).encode()
    members = [("a.jpg", IMAGE), ("a.json", VQA), ("b.jpg", IMAGE), ("b.json", malformed)]
    assert reasons(scan_shard(write_tar(tmp_path / "x.tar", members), kind="vqa")) == [("b", "malformed")]
