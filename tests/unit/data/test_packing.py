"""Packing gives the same bytes for any number of workers and after any interruption, and accounts for every record."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset as wds

from mhmoe_vl.data.prepare.packing import Packing, pack, split_holdout
from mhmoe_vl.data.prepare.processes import map_in_processes
from mhmoe_vl.data.prepare.records import ImageRoot, Record, make_key
from mhmoe_vl.data.shards import ShardReader, Skip, find_shards, read_index
from mhmoe_vl.errors import DataError, OutputError
from tests.unit.data.files import image_bytes, write_images


def records(numbers: range) -> Iterator[Record]:
    for number in numbers:
        fields = {"image_id": number, "captions": [f"caption {number}", "naïve 東京"]}
        yield Record(f"{number:05d}", images={"": f"{number:012d}.jpg"}, text=f"caption {number}", fields=fields)


@pytest.fixture
def packing(tmp_path: Path) -> Packing:
    write_images(tmp_path / "images", range(20))
    return Packing("pair", tmp_path / "out", "x", images=tmp_path / "images", samples_per_shard=6)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_record_can_be_read_back(packing: Packing) -> None:
    report = pack(records(range(20)), packing)
    assert (report.num_shards, report.num_samples, report.num_items, report.skipped) == (4, 20, 20, ())
    found, reader = {}, ShardReader()
    for shard in find_shards(packing.directory):
        index = read_index(shard)
        for sample in index.samples:
            found[sample.key] = reader.read(index, sample)
    assert list(found) == [f"{i:05d}" for i in range(20)]
    for i, members in enumerate(found.values()):
        assert members["jpg"] == image_bytes(i)
        assert members["txt"] == f"caption {i}".encode()
        assert json.loads(members["json"]) == {"image_id": i, "captions": [f"caption {i}", "naïve 東京"]}


def test_webdataset_reads_the_shards_as_open_clip_does(packing: Packing) -> None:
    pack(records(range(20)), packing)
    # The stages of open_clip_train.data.get_wds_dataset for validation.
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(str(packing.directory / "x-{00000..00003}.tar")),
        wds.tarfile_to_samples(),
        wds.select(lambda sample: "txt" in sample and "jpg" in sample),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.to_tuple("image", "text"),
    )
    pairs = list(pipeline)
    assert [text for _, text in pairs] == [f"caption {i}" for i in range(20)]
    assert all(image.size == (24, 16) and image.mode == "RGB" for image, _ in pairs)


def test_tars_tell_nothing_of_the_machine(packing: Packing) -> None:
    pack(records(range(2)), packing)
    with tarfile.open(packing.directory / "x-00000.tar") as tar:
        facts = {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in tar}
    assert facts == {(0, 0, 0, "", "", 0o644)}
    everything = b"".join(contents(packing.directory).values())
    assert str(packing.directory.parent).encode() not in everything


def test_workers_do_not_change_a_byte(packing: Packing) -> None:
    (packing.images / f"{7:012d}.jpg").write_bytes(b"broken")  # type: ignore[operator]
    pack(records(range(20)), packing)
    parallel = replace(packing, directory=packing.directory.with_name("parallel"), num_workers=2)
    pack(records(range(20)), parallel)
    assert contents(parallel.directory) == contents(packing.directory)


def test_images_can_be_made_smaller(packing: Packing) -> None:
    pack(records(range(2)), replace(packing, image_size=8))
    smaller = wds.WebDataset(str(packing.directory / "x-00000.tar"), shardshuffle=False).decode("pil")
    assert [sample["jpg"].size for sample in smaller] == [(12, 8), (12, 8)]
    with pytest.raises(OutputError, match="other image_size"):
        pack(records(range(2)), replace(packing, image_size=9))


def test_unusable_records_are_listed_with_their_reason(packing: Packing) -> None:
    images = packing.images
    assert images is not None
    (images / f"{1:012d}.jpg").write_bytes(image_bytes(1)[:300])
    (images / f"{2:012d}.jpg").write_bytes(b"<html>")
    (images / f"{3:012d}.jpg").unlink()
    (images / f"{4:012d}.jpg").write_bytes(image_bytes(4, format="PNG"))
    source = [Skip("line 3", "bad_json", "detail"), *records(range(8)), *records(range(1))]
    report = pack(source, packing)
    listed = [json.loads(line) for line in (packing.directory / "skipped.jsonl").read_text().splitlines()]
    assert [(skip["source"], skip["reason"]) for skip in listed] == [
        ("line 3", "bad_json"),
        ("00000", "duplicate_key"),
        ("000000000001.jpg", "broken_image"),
        ("000000000002.jpg", "not_an_image"),
        ("000000000003.jpg", "image_unreadable"),
    ]
    assert report.skipped_share == pytest.approx(5 / 10)
    manifest = json.loads((packing.directory / "manifest.json").read_bytes())
    assert manifest["num_skipped"] == dict.fromkeys(
        ["bad_json", "broken_image", "duplicate_key", "image_unreadable", "not_an_image"], 1
    )
    # Planned before skipping: 00006 opens the second shard although the first holds only three samples.
    index = [read_index(shard) for shard in find_shards(packing.directory)]
    assert [[sample.key for sample in i.samples] for i in index] == [["00000", "00004", "00005"], ["00006", "00007"]]
    assert set(index[0].samples[1].members) == {"png", "txt", "json"}
    assert [skip.reason for skip in index[0].skipped] == ["broken_image", "not_an_image", "image_unreadable"]
    assert (manifest["num_samples"], manifest["num_shards"]) == (5, 2)


def test_nothing_usable_is_an_error(packing: Packing) -> None:
    for path in packing.images.iterdir():  # type: ignore[union-attr]
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"20 of 20 entries were skipped as not_an_image, first 000000000000.jpg"):
        pack(records(range(20)), packing)
    assert not list(packing.directory.iterdir())
    with pytest.raises(DataError, match="the source has no entries"):
        pack([], packing)
    assert not list(packing.directory.iterdir())


def test_a_limit(packing: Packing) -> None:
    report = pack(records(range(20)), replace(packing, limit=7))
    assert (report.num_samples, report.num_shards) == (7, 2)


def test_another_data_set_is_not_overwritten(packing: Packing, tmp_path: Path) -> None:
    pack(records(range(20)), packing)
    before = contents(packing.directory)
    for other, message in [
        (replace(packing, samples_per_shard=5), "other samples_per_shard; add --overwrite"),
        (replace(packing, settings={"source": "b.json"}), "other source"),
        (packing, "was packed from other records"),
    ]:
        with pytest.raises(OutputError, match=message):
            pack(records(range(1, 20)), other)
        assert contents(packing.directory) == before
    with pytest.raises(OutputError, match=r"x-00002.tar: is left from an earlier packing"):
        pack(records(range(12)), packing)
    assert contents(packing.directory) == before
    pack(records(range(12)), replace(packing, overwrite=True))
    fresh = replace(packing, directory=tmp_path / "fresh")
    pack(records(range(12)), fresh)
    assert contents(packing.directory) == contents(fresh.directory)


def test_foreign_shards_are_left_alone(packing: Packing) -> None:
    packing.directory.mkdir()
    (packing.directory / "theirs.tar").write_bytes(b"x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not packed here"):
            pack(records(range(2)), replace(packing, overwrite=overwrite))
    assert contents(packing.directory) == {"theirs.tar": b"x"}


def test_a_failed_start_does_not_bind_the_next_run(packing: Packing) -> None:
    with pytest.raises(DataError, match="no such split"):
        pack(failing("no such split"), replace(packing, settings={"split": "tset"}))
    assert pack(records(range(2)), replace(packing, settings={"split": "test"})).num_samples == 2


def failing(message: str = "no such file", num_good: int = 0) -> Iterator[Record]:
    yield from records(range(num_good))
    raise DataError(message)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("num_good", [0, 13])
def test_a_source_that_cannot_be_read_costs_nothing(packing: Packing, overwrite: bool, num_good: int) -> None:
    pack(records(range(20)), packing)
    before = contents(packing.directory)
    with pytest.raises(DataError, match="no such file"):
        pack(failing(num_good=num_good), replace(packing, overwrite=overwrite))
    assert len(find_shards(packing.directory)) == 4
    now = {path.name: path.read_bytes() for path in packing.directory.iterdir() if path.is_file()}
    assert now == before


def test_a_data_set_of_another_name_and_size_is_replaced_as_a_whole(packing: Packing, tmp_path: Path) -> None:
    pack(records(range(20)), replace(packing, files={"answers.json": b"{}"}))
    (packing.directory / "notes.txt").write_text("mine")
    other = replace(packing, name="y", samples_per_shard=9)
    pack(records(range(9)), replace(other, overwrite=True))
    (packing.directory / "notes.txt").unlink()
    pack(records(range(9)), replace(other, directory=tmp_path / "fresh"))
    assert contents(packing.directory) == contents(tmp_path / "fresh")


def test_images_that_were_mended_are_packed_anew_by_overwriting(packing: Packing) -> None:
    image = packing.images / f"{3:012d}.jpg"  # type: ignore[operator]
    sound = image.read_bytes()
    image.write_bytes(b"broken")
    assert pack(records(range(20)), packing).num_samples == 19
    image.write_bytes(sound)
    assert pack(records(range(20)), packing).num_samples == 19
    assert pack(records(range(20)), replace(packing, overwrite=True)).num_samples == 20


def test_an_interrupted_replacement_goes_on_without_saying_so_again(packing: Packing, tmp_path: Path) -> None:
    pack(records(range(20)), packing)
    with pytest.raises(DataError):
        pack(failing(num_good=15), replace(packing, samples_per_shard=7, overwrite=True))
    first = (packing.directory / "unfinished" / "x-00000.tar").stat().st_mtime_ns
    with pytest.raises(OutputError, match="other samples_per_shard"):
        pack(records(range(20)), replace(packing, samples_per_shard=8))
    pack(records(range(20)), replace(packing, samples_per_shard=7))
    assert (packing.directory / "x-00000.tar").stat().st_mtime_ns == first
    pack(records(range(20)), replace(packing, samples_per_shard=7, directory=tmp_path / "fresh"))
    assert contents(packing.directory) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("same_options", [False, True])
def test_a_replacement_is_finished_whenever_it_was_interrupted(
    packing: Packing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_options: bool
) -> None:
    new = replace(packing, samples_per_shard=7, overwrite=True)
    last = new if same_options else replace(new, samples_per_shard=3)
    pack(records(range(20)), replace(last, directory=tmp_path / "fresh"))
    expected = contents(tmp_path / "fresh")
    num_moves = 0
    for steps_before_the_end in range(9):
        out = replace(packing, directory=tmp_path / str(steps_before_the_end))
        pack(records(range(20)), out)
        num_moves = 0

        def rename(source: Path, target: Path, allowed: int = steps_before_the_end) -> Path:
            nonlocal num_moves
            if source.parent.name == "unfinished" and target.parent != source.parent:
                num_moves += 1
                if num_moves > allowed:
                    raise KeyboardInterrupt
            os.rename(source, target)
            return target

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "replace", rename)
            pack(records(range(20)), replace(new, directory=out.directory))
        pack(records(range(20)), replace(last, directory=out.directory, overwrite=not same_options))
        assert contents(out.directory) == expected
    # Three shards with their indexes, and the manifest: the loop went past the last step.
    assert num_moves == 7


def test_a_manifest_cannot_name_files_elsewhere(packing: Packing, tmp_path: Path) -> None:
    pack(records(range(2)), packing)
    precious = tmp_path / "precious.tar"
    precious.touch()
    manifest = json.loads((packing.directory / "manifest.json").read_bytes())
    manifest["shards"].append({"name": "../precious.tar"})
    (packing.directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match=r"manifest.json: not a manifest of shards"):
        pack(records(range(3)), replace(packing, overwrite=True))
    assert precious.exists()


@pytest.mark.parametrize(
    "name", ["../precious.tar", "/precious.tar", "..", "", "a\0b", "\ud800", "x" * 300, 5, None, ["x"]]
)
def test_neither_can_the_state_of_an_interrupted_run(packing: Packing, tmp_path: Path, name: object) -> None:
    precious = tmp_path / "precious.tar"
    precious.touch()
    state = {"settings": {}, "overwrite": True, "replaces": [name]}
    (packing.directory / "unfinished").mkdir(parents=True)
    (packing.directory / "unfinished" / "state.json").write_text(json.dumps(state))
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"state.json: not readable; delete .*unfinished, or choose another"):
            pack(records(range(3)), replace(packing, overwrite=overwrite))
    assert precious.exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"settings": 1, "shards": []}', '{"shards": 3}', '{"shards": [{}]}', '{"shards": [{"name": 5}]}'],
)
def test_a_manifest_of_something_else(packing: Packing, content: str) -> None:
    packing.directory.mkdir()
    (packing.directory / "manifest.json").write_text(content)
    for overwrite in (False, True):
        with pytest.raises(
            OutputError, match=r"manifest.json: not a manifest of shards; delete it .* or choose another --out"
        ):
            pack(records(range(2)), replace(packing, overwrite=overwrite))


def test_what_no_reader_accepts_is_not_packed(packing: Packing, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("shard_writer", "images"):
        monkeypatch.setattr(f"mhmoe_vl.data.prepare.{module}.MAX_MEMBER_BYTES", 2000)
    (packing.images / f"{1:012d}.jpg").write_bytes(image_bytes() + bytes(2000))  # type: ignore[operator]
    huge = Record("huge", images={"": f"{2:012d}.jpg"}, text="x" * 2001, fields={"captions": ["x"]})
    # The first shard holds nothing else.
    source = [*list(records(range(2)))[1:], huge, *records(range(3, 6))]
    report = pack(source, replace(packing, samples_per_shard=2))
    assert report.num_samples == 3
    assert [(skip.source, skip.reason) for skip in report.skipped] == [
        ("000000000001.jpg", "too_large"),
        ("huge", "too_large"),
    ]


def test_a_folder_that_cannot_be_made(packing: Packing) -> None:
    packing.directory.write_bytes(b"a file")
    for directory, message in [(packing.directory, "is not a folder"), (packing.directory / "x", "cannot write")]:
        with pytest.raises(OutputError, match=message):
            pack(records(range(2)), replace(packing, directory=directory))


def test_complete_shards_are_kept_and_others_made_again(packing: Packing) -> None:
    pack(records(range(20)), packing)
    before = contents(packing.directory)
    ages = {path.name: path.stat().st_mtime_ns for path in packing.directory.glob("*.tar")}
    os.truncate(packing.directory / "x-00001.tar", 700)
    (packing.directory / "x-00002.idx.json").unlink()
    (packing.directory / "x-00003.tar").unlink()
    pack(records(range(20)), packing)
    assert contents(packing.directory) == before
    kept = [name for name, age in ages.items() if (packing.directory / name).stat().st_mtime_ns == age]
    assert kept == ["x-00000.tar"]


def test_a_killed_run_is_finished_by_the_next(tmp_path: Path) -> None:
    write_images(tmp_path / "images", range(100))
    command = [sys.executable, "-m", "data_prep.pack_images", "--images", "images", "--samples-per-shard", "5"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    run = subprocess.Popen([*command, "--out", "x"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    out = tmp_path / "x"
    while not (out / "unfinished" / "x-00002.idx.json").exists():
        assert run.poll() is None
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="interrupted"):
        find_shards(out)
    first = (out / "unfinished" / "x-00000.tar").stat().st_mtime_ns
    from data_prep.pack_images import main

    options = ["--images", str(tmp_path / "images"), "--samples-per-shard", "5", "--name", "x"]
    assert main([*options, "--out", str(out)]) == 0
    assert main([*options, "--out", str(tmp_path / "unbroken")]) == 0
    assert contents(out) == contents(tmp_path / "unbroken")
    assert (out / "x-00000.tar").stat().st_mtime_ns == first


def kill_this_process(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(OutputError, match=r"worker process was killed.*run the same command again"):
        list(map_in_processes(kill_this_process, range(3), num_workers=2))


SLEEPING_WORKERS = """
import os, time
from mhmoe_vl.data.prepare.processes import map_in_processes

def job(_):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece, whatever PYTHONUNBUFFERED says
    time.sleep(60)

list(map_in_processes(job, range(9), num_workers=3))
"""


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_workers_end_with_a_parent_that_is_killed() -> None:
    command = [sys.executable, "-c", SLEEPING_WORKERS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        workers = [int(run.stdout.readline()) for _ in range(3)]
        assert all(map(is_running, workers))
        run.kill()
        run.wait()
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_workers_take_jobs_as_they_can_do_them() -> None:
    drawn = []

    def jobs() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield -number

    results = map_in_processes(abs, jobs(), num_workers=2)
    assert next(results) == 0
    assert len(drawn) < 10
    assert list(results) == list(range(1, 100))


def test_holdout_is_a_partition_by_key() -> None:
    source = [Skip("a", "b", "c"), *records(range(2000))]
    train = list(split_holdout(source, 0.1, held_out=False))
    val = list(split_holdout(source, 0.1, held_out=True))
    assert len(train) + len(val) == len(source)
    assert train[0] == source[0]
    assert {r.key for r in train if isinstance(r, Record)}.isdisjoint(r.key for r in val if isinstance(r, Record))
    # Four standard deviations of a binomial with n = 2000 and p = 0.1.
    assert abs(len(val) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    assert list(split_holdout(source[:1001], 0.1, held_out=True)) == val[: len([r for r in val if r.key < "01000"])]  # type: ignore[union-attr]


def test_keys() -> None:
    assert make_key("train2017-000_1") == "train2017-000_1"
    odd = ["a/b", "a.b", "a b", "é", "", "x" * 81, "x" * 82, "\udcff", "\udcfe"]
    keys = [make_key(name) for name in odd]
    assert len(set(keys)) == len(odd)
    assert all(0 < len(key) <= 80 and key.replace("-", "").replace("_", "").isalnum() and key.isascii() for key in keys)


def test_image_root(tmp_path: Path) -> None:
    write_images(tmp_path / "root" / "sub", [1])
    write_images(tmp_path, [2])
    root = ImageRoot(tmp_path / "root")
    assert root.has("sub/000000000001.jpg")
    assert root.has("./sub/../sub/000000000001.jpg")
    for outside in (
        "../000000000002.jpg",
        str(tmp_path / "000000000002.jpg"),
        "sub",
        "sub/absent.jpg",
        "",
        "..",
        ".",
        "\0",
        "\ud800/x",
        "\0/x",
        None,
        True,
        5,
        [],
    ):
        assert not root.has(outside)
    with pytest.raises(DataError, match="does not exist"):
        ImageRoot(tmp_path / "absent")
