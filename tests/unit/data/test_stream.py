"""Streams of unindexed shards: every sample of every pass, damage noticed, and the loader's batches."""

from __future__ import annotations

import functools
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mhmoe_vl.data.image import AugmentConfig, ImageTransform
from mhmoe_vl.data.loader import ShardDataset, Source, train_loader
from mhmoe_vl.data.plan import MixturePlan
from mhmoe_vl.data.samples import PairSamples, PatchMasking, TextSamples
from mhmoe_vl.data.stream import ALLOW_PIPE, StreamSource, read_shard
from mhmoe_vl.errors import ConfigError, DataError
from tests.unit.data.builders import pair_sample, word_tokenizer, words, write_shard
from tests.unit.data.files import write_tar

TOKENIZER = word_tokenizer()
TEXTS = TextSamples(TOKENIZER, 12, 0.3)
PAIRS = PairSamples(ImageTransform(16, AugmentConfig()), TOKENIZER, 12, 0.4, PatchMasking(4, 0.4))


def text_shard(path: Path, numbers: range) -> str:
    write_tar(path, [(f"t{number}.txt", words(number, number + 3).encode()) for number in numbers])
    return path.as_uri()


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    """Three shards of four texts."""
    return [text_shard(tmp_path / f"x-{shard}.tar", range(4 * shard, 4 * shard + 4)) for shard in range(3)]


def stream_of(urls: list[str], key: str = "0", buffer_size: int = 5) -> Iterator[Any]:
    return StreamSource("text", urls, TEXTS, buffer_size=buffer_size).open(key)


@pytest.mark.parametrize("buffer_size", [1, 5, 12, 1000])
def test_every_sample_of_a_pass(urls: list[str], buffer_size: int) -> None:
    num_passes = 40
    keys = [sample.key for sample in islice(stream_of(urls, buffer_size=buffer_size), 12 * num_passes)]
    counts = Counter(keys)
    assert set(counts) == {f"t{number}" for number in range(12)}
    # At any time at most a buffer (here never more than a pass) of a sample's copies has not come out.
    assert max(counts.values()) <= num_passes + min(buffer_size, 12)
    if buffer_size == 1:
        assert set(counts.values()) <= {num_passes, num_passes + 1, num_passes - 1}


def test_the_key_decides_the_order(urls: list[str]) -> None:
    orders = [[sample.key for sample in islice(stream_of(urls, key), 24)] for key in ("0", "0", "1")]
    assert orders[0] == orders[1] != orders[2]


def test_samples_are_grouped_as_by_the_index(tmp_path: Path) -> None:
    members = [("./a/k.left.JPG", b"1"), ("a/k.json", b"2"), ("a/k.json", b"3"), ("b/k.json", b"4"), (".hidden", b"5")]
    shard = write_tar(tmp_path / "x.tar", members)
    samples = [(sample.key, sample.members) for sample in read_shard(shard.as_uri())]
    assert samples == [("a/k", {"left.jpg": b"1", "json": b"2"}), ("b/k", {"json": b"4"})]


def test_damage_is_one_line_and_the_stream_goes_on(tmp_path: Path, urls: list[str]) -> None:
    whole = (tmp_path / "x-0.tar").read_bytes()
    for name, content, problem in (
        ("between.tar", whole[: 2 * 1024], "truncated tar"),  # two of four samples: header and content
        ("within.tar", whole[: 2 * 1024 + 700], "truncated tar"),
        ("empty.tar", b"", "empty file"),
        ("none.tar", bytes(10240), "no sample"),
        ("text.tar", b"not a tar" * 100, "damaged"),
        ("gzip.tar", b"\x1f\x8b" + bytes(600), "damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=problem) as raised:
            list(read_shard((tmp_path / name).as_uri()))
        assert "\n" not in str(raised.value)
        assert name in str(raised.value)
    stream = stream_of([*urls, (tmp_path / "none.tar").as_uri(), (tmp_path / "absent.tar").as_uri()], buffer_size=1)
    found, problems = Counter[str](), []
    while sum(found.values()) < 36:
        try:
            found[next(stream).key] += 1
        except DataError as error:
            problems.append(str(error))
    assert len(found) == 12
    assert 4 <= len(problems) <= 8
    assert {problem.split(": ", 1)[1].split(":")[0] for problem in problems} == {"has no sample", "cannot read shard"}


def test_what_is_not_streamed(tmp_path: Path, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="make two sources"):
        stream_of([*urls, str(tmp_path / "x-0.tar")])
    pipe = f"pipe:cat {tmp_path}/x-{{0..2}}.tar"
    with pytest.raises(ConfigError, match=f"{ALLOW_PIPE}=1"):
        stream_of([pipe])
    monkeypatch.setenv(ALLOW_PIPE, "1")
    assert len({sample.key for sample in islice(stream_of([pipe]), 60)}) == 12
    with pytest.raises(DataError, match="ended with status 7"):
        next(stream_of(["pipe:exit 7"]))


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches with curl, which is not installed")
def test_over_http(tmp_path: Path, urls: list[str]) -> None:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *arguments: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert len({sample.key for sample in islice(stream_of([f"{base}/x-{{0..2}}.tar"]), 60)}) == 12
        with pytest.raises(DataError, match="status 22"):
            list(read_shard(f"{base}/absent.tar"))
        server.shutdown()


def loaded(urls: list[str], pairs: Path, *, steps: range = range(6), **changes: Any) -> list[dict[str, Any]]:
    sources = {
        "text": StreamSource("text", urls, TEXTS, buffer_size=3),
        "pair": Source("pair", [pairs], PAIRS),
    }
    dataset = ShardDataset(sources, seed=0, pad_id=TOKENIZER.pad_id)
    plan = MixturePlan(num_items=dataset.num_items(), weights={"pair": 2, "text": 1}, batch_size=7, seed=3)
    options = {"num_micro_batches": 2, "rank": 0, "world_size": 1, "num_workers": 0, "pin_memory": False, **changes}
    return list(train_loader(dataset, plan, steps=steps, **options))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_beside_indexed_shards(tmp_path: Path, urls: list[str], num_workers: int) -> None:
    write_shard(tmp_path / "pairs/x-0.tar", "pair", {f"p{number}": pair_sample(number) for number in range(11)})
    batches = loaded(urls, tmp_path / "pairs", num_workers=num_workers)
    assert len(batches) == 12
    assert sum(len(micro["text"]) for micro in batches) == 14  # a third of 42
    assert sum(len(micro["pair"]) for micro in batches) == 28
    assert not any(batch.problems for micro in batches for batch in micro.values())
    seeds = [int(seed) for micro in batches for seed in micro["text"].seed]
    assert len(set(seeds)) == len(seeds)
    # The indexed source keeps its order, whatever the stream beside it gives.
    ids = [sample_id for micro in loaded(urls[:1], tmp_path / "pairs") for sample_id in micro["pair"].sample_ids]
    assert ids == [sample_id for micro in batches for sample_id in micro["pair"].sample_ids]


def test_broken_samples_of_a_stream(tmp_path: Path) -> None:
    write_shard(tmp_path / "pairs/x-0.tar", "pair", {"p": pair_sample(0)})
    texts = [(f"t{number}.txt", b"" if number % 2 else b"w1 w2") for number in range(8)]
    url = write_tar(tmp_path / "x.tar", texts).as_uri()
    batches = loaded([url], tmp_path / "pairs")
    problems = [problem for micro in batches for problem in micro["text"].problems]
    assert sum(len(micro["text"]) for micro in batches) == 14
    assert problems
    assert all(problem.startswith(f"{url}: t") and problem.endswith("text is empty") for problem in problems)
    with pytest.raises(DataError, match=r"16 samples in a row are broken; the last: .*absent"):
        loaded([(tmp_path / "absent.tar").as_uri()], tmp_path / "pairs")


def test_ranks_and_resumed_runs_read_in_orders_of_their_own(tmp_path: Path, urls: list[str]) -> None:
    write_shard(tmp_path / "pairs/x-0.tar", "pair", {"p": pair_sample(0)})
    of_two = [{"rank": rank, "world_size": 2, "steps": range(12)} for rank in (0, 1)]
    orders = []
    for options in ({}, {"steps": range(2, 8)}, *of_two):
        batches = loaded(urls, tmp_path / "pairs", **options)  # type: ignore[arg-type]
        orders.append([sample_id for micro in batches for sample_id in micro["text"].sample_ids][:4])
    whole, resumed, first_rank, second_rank = orders
    assert whole != resumed
    assert first_rank != second_rank
    assert len(first_rank) == len(second_rank) == 4
