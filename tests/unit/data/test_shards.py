"""Finding shards, reading their indexes, and reading samples by their place."""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import (
    ShardIndex,
    ShardReader,
    Skip,
    find_shards,
    index_path,
    read_index,
    write_index,
)
from mhmoe_vl.errors import DataError
from tests.unit.data.files import pair_members, write_tar


def indexed_shard(path: Path, num_samples: int = 3) -> ShardIndex:
    write_tar(path, [member for i in range(num_samples) for member in pair_members(f"{path.stem}-{i}", seed=i)])
    index = replace(scan_shard(path), plan="p", skipped=(Skip("a\udcff.jpg", "broken_image", "detail"),))
    write_index(index)
    return index


def test_an_index_survives_writing_and_reading(tmp_path: Path) -> None:
    index = indexed_shard(tmp_path / "x-00000.tar")
    assert index_path(index.path).name == "x-00000.idx.json"
    assert read_index(index.path) == index
    assert (index.num_samples, index.num_items) == (3, 3)


def test_an_index_says_what_is_wrong(tmp_path: Path) -> None:
    shard = indexed_shard(tmp_path / "x.tar").path
    good = index_path(shard).read_bytes()
    with shard.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"its index says .*verify_shards --write-index"):
        read_index(shard)
    shard.write_bytes(shard.read_bytes()[:-512])
    assert read_index(shard).num_samples == 3
    for broken in (
        b"",
        good[:100],
        b"[]",
        b"{}",
        good.replace(b"index/1", b"index/9"),
        good.replace(b'"kind":"pair"', b'"kind":"x"'),
        good.replace(b'"num_samples":3', b'"num_samples":4'),
        json.dumps({**json.loads(good), "samples": [{"key": "a"}]}).encode(),
        *(good.replace(b'"num_items":1', b'"num_items":' + value) for value in (b'"1"', b"-1", b"null", b"true")),
        *(good.replace(b'{"jpg":[', b'{"jpg":[' + value) for value in (b"-", b"1e", b"9999999", b'"x",')),
        good.replace(b'"key":"x-0"', b'"key":5'),
    ):
        assert broken != good
        index_path(shard).write_bytes(broken)
        with pytest.raises(DataError, match="malformed index"):
            read_index(shard)
    index_path(shard).unlink()
    with pytest.raises(DataError, match=f"has no index x.idx.json; make one with: .* {tmp_path}"):
        read_index(shard)
    shard.unlink()
    with pytest.raises(DataError, match="cannot read shard: No such file"):
        read_index(shard)


def test_finding_shards(tmp_path: Path) -> None:
    shards = [write_tar(tmp_path / "a" / f"x-{i:05d}.tar", pair_members("k")) for i in (2, 0, 1)]
    other = write_tar(tmp_path / "b" / "y.tar", pair_members("k"))
    (tmp_path / "a" / "x-00000.idx.json").touch()
    in_order = sorted(shards)
    assert find_shards(tmp_path / "a") == find_shards(str(tmp_path / "a")) == in_order
    assert find_shards([str(tmp_path / "b"), str(tmp_path / "a")]) == [other, *in_order]
    assert find_shards(str(tmp_path / "a" / "x-{00001..00002}.tar")) == in_order[1:]
    assert find_shards(str(tmp_path / "{b/y,a/x-00001}.tar")) == [other, in_order[1]]
    assert find_shards(str(tmp_path / "a" / "x-*[02].tar")) == [in_order[0], in_order[2]]
    assert find_shards(str(other)) == [other]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("x-{00000..00003}.tar", "no shards at .*x-00001.tar, .*x-00003.tar"),
        ("zzz", "no shards at .*zzz"),
        ("y-00000.tar", r"did you mean 'x-00000.tar'"),
        ("empty", "no shards at .*empty"),
        ("*.tgz", "no shards at"),
        ("x-{00000.tar", "braces do not match"),
        ([], "no shards given"),
        (["x-00000.tar", "x-*.tar"], "given twice"),
    ],
)
def test_shards_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: str | list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(Path("x-00000.tar"), pair_members("k"))
    Path("empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_shards(paths)


@pytest.mark.parametrize("url", ["pipe:cat x.tar", "https://host/x-{0..9}.tar", "s3://bucket/x.tar"])
def test_urls_are_refused(url: str) -> None:
    with pytest.raises(DataError, match=f"{re.escape(url)}: a URL; .* reads local shards"):
        find_shards(url)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x-00000.tar", pair_members("k"))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"shards": [{"name": "x-00000.tar"}, {"name": "x-00001.tar"}]}))
    with pytest.raises(DataError, match=r"1 of 2 shards .* absent, first x-00001.tar"):
        find_shards(tmp_path)
    manifest.write_text("{}")
    with pytest.raises(DataError, match="not a manifest"):
        find_shards(tmp_path)
    manifest.unlink()
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(DataError, match="interrupted"):
        find_shards(tmp_path)
    assert find_shards(shard) == [shard]


def test_reading_in_any_order(tmp_path: Path) -> None:
    index = indexed_shard(tmp_path / "x.tar", num_samples=5)
    reader = ShardReader()
    for i in (4, 0, 2, 2, 1, 3):
        expected = {name.partition(".")[2]: content for name, content in pair_members(f"x-{i}", seed=i)}
        assert reader.read(index, index.samples[i]) == expected


def test_one_wrong_bit_is_noticed(tmp_path: Path) -> None:
    index = indexed_shard(tmp_path / "x.tar")
    content = bytearray(index.path.read_bytes())
    content[index.samples[1].members["jpg"].offset + 40] ^= 1
    index.path.write_bytes(content)
    reader = ShardReader()
    assert reader.read(index, index.samples[0])
    with pytest.raises(DataError, match=rf"{index.path}: x-1.jpg: checksum differs"):
        reader.read(index, index.samples[1])


def test_shards_that_vanish_or_shrink(tmp_path: Path) -> None:
    index = indexed_shard(tmp_path / "x.tar")
    os.truncate(index.path, index.samples[2].members["txt"].offset + 1)
    with pytest.raises(DataError, match=r"x-2.txt: shard ends early, 1 of \d+ bytes"):
        ShardReader().read(index, index.samples[2])
    index.path.unlink()
    with pytest.raises(DataError, match="No such file"):
        ShardReader().read(index, index.samples[0])


def test_a_reader_can_be_pickled_and_closed(tmp_path: Path) -> None:
    index = indexed_shard(tmp_path / "x.tar")
    reader = ShardReader()
    expected = reader.read(index, index.samples[0])
    assert pickle.loads(pickle.dumps(reader)).read(index, index.samples[0]) == expected
    reader.close()
    assert reader.read(index, index.samples[0]) == expected


def test_a_forked_reader_reads_the_same(tmp_path: Path) -> None:
    index = indexed_shard(tmp_path / "x.tar")
    reader = ShardReader()
    expected = [reader.read(index, sample) for sample in index.samples]
    child = os.fork()
    if child == 0:
        same = [reader.read(index, sample) for sample in index.samples] == expected
        reader.close()
        os._exit(0 if same else 1)
    assert [reader.read(index, sample) for sample in index.samples] == expected
    assert os.waitpid(child, 0)[1] == 0
    assert reader.read(index, index.samples[0]) == expected[0]


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhmoe_vl.data.shards._MAX_OPEN_FILES", 3)
    indexes = [indexed_shard(tmp_path / f"x-{i}.tar", num_samples=1) for i in range(5)]
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader()
    for _ in range(2):
        for i, index in enumerate(indexes):
            assert reader.read(index, index.samples[0])["txt"] == f"caption of x-{i}-0".encode()
    assert len(os.listdir("/proc/self/fd")) - before == 3
