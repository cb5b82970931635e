"""Shards without an index, read from front to back: what a URL allows. Not exactly resumable.

A tar behind a URL has no random access, so the order cannot be a function of the sample's number as it is for indexed
shards. Every reader (a loader worker of a rank) goes through all shards in an order of its own and draws from a
buffer. A run that resumes, or has another number of ranks or workers, sees other samples; nothing else changes.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from braceexpand import braceexpand
from webdataset.gopen import gopen

from mhmoe_vl.data.plan import stable_hash
from mhmoe_vl.data.samples import SampleBuilder
from mhmoe_vl.data.shards import MAX_MEMBER_BYTES, is_url, split_member_name
from mhmoe_vl.errors import ConfigError, DataError

#: Kinds with one item per sample: only these have a share of a step that does not depend on unseen shards.
STREAMED_KINDS = ("image", "text", "pair")

#: Set to 1 to let ``pipe:`` URLs run their command.
ALLOW_PIPE = "MHMOE_VL_ALLOW_PIPE"


class RawSample(NamedTuple):
    """Undecoded sample: the shard it came from, its key, and its files by extension."""

    url: str
    key: str
    members: dict[str, bytes]


class StreamSource:
    """The shards of a source that is streamed.

    Args:
        name: of the source in the configuration.
        urls: of the shards, with braces: whatever ``webdataset`` opens, such as ``https://``, ``gs://`` or ``hf://``.
        builder: makes the examples.
        buffer_size: number of undecoded samples that every reader keeps to draw from.

    Raises:
        ConfigError: local paths among the URLs, or a ``pipe:`` URL without leave.
    """

    def __init__(self, name: str, urls: Sequence[str], builder: SampleBuilder, *, buffer_size: int) -> None:
        self.name, self.builder, self.buffer_size = name, builder, buffer_size
        self.urls = [url for pattern in urls for url in braceexpand(pattern)]
        local = [url for url in self.urls if not is_url(url)]
        if local:
            raise ConfigError(
                f"data.train.{name}.shards: {local[0]} is local and {next(filter(is_url, self.urls))} a URL; make two "
                "sources of them: local shards are indexed, URLs are streamed"
            )
        if any(url.startswith("pipe:") for url in self.urls) and os.environ.get(ALLOW_PIPE) != "1":
            raise ConfigError(
                f"data.train.{name}.shards: 'pipe:' runs a shell command; read it, and set {ALLOW_PIPE}=1 if you "
                "trust it"
            )

    def open(self, key: str) -> SampleStream:
        """A new reader, whose order ``key`` decides."""
        return SampleStream(self.urls, seed=stable_hash(f"{key}/{self.name}"), buffer_size=self.buffer_size)


class SampleStream:
    """Endless iterator over the samples of ``urls``, shuffled: shards anew in each pass, samples in a buffer.

    ``next`` raises :class:`DataError` for a shard that cannot be read to its end, and can be called again: the stream
    goes on with the next shard.
    """

    def __init__(self, urls: Sequence[str], *, seed: int, buffer_size: int) -> None:
        self._items = _shuffled(_passes(urls, np.random.default_rng(seed)), np.random.default_rng(seed), buffer_size)

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> RawSample:
        item = next(self._items)
        if isinstance(item, DataError):
            raise item
        return item


def _passes(urls: Sequence[str], rng: np.random.Generator) -> Iterator[RawSample | DataError | None]:
    """Samples and failures of all shards, again and again; None ends a pass."""
    while True:
        for number in rng.permutation(len(urls)):
            try:
                yield from read_shard(urls[number])
            except DataError as error:
                yield error
        yield None


def _shuffled(
    items: Iterator[RawSample | DataError | None], rng: np.random.Generator, size: int
) -> Iterator[RawSample | DataError]:
    """Draw from a buffer that is filled once, at most with one pass: a small data set is not held many times."""
    buffer: list[RawSample] = []
    for item in items:
        if isinstance(item, DataError):
            yield item
        elif item is None:
            size = min(size, max(1, len(buffer)))
        elif len(buffer) < size:
            buffer.append(item)
        else:
            slot = int(rng.integers(len(buffer)))
            drawn, buffer[slot] = buffer[slot], item
            yield drawn


def read_shard(url: str) -> Iterator[RawSample]:
    """The samples of one shard: neighbouring files with one key, as in an indexed shard.

    Raises:
        DataError: the shard cannot be fetched, is damaged, ends early, or has no sample. Samples before that point
            have been given; the one that was being read has not.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    num_samples = 0
    stream = None
    try:
        with gopen(url, "rb") as stream:
            end = _EndMark(stream)
            with tarfile.open(fileobj=end, mode="r|") as tar:  # type: ignore[call-overload]
                for entry in tar:
                    tar.members = []  # tarfile would remember all of them
                    name = split_member_name(entry.name)
                    if not entry.isreg() or name is None:
                        continue
                    if entry.size > MAX_MEMBER_BYTES:
                        raise DataError(
                            f"{url}: {entry.name} has {entry.size} bytes; at most {MAX_MEMBER_BYTES} are read"
                        )
                    if name[0] != key:
                        if key is not None:
                            num_samples += 1
                            yield RawSample(url, key, members)
                        key, members = name[0], {}
                    file = tar.extractfile(entry)
                    assert file is not None
                    members.setdefault(name[1], file.read())
            end.check(url)
    except tarfile.TarError as error:
        raise DataError(
            f"{url}: damaged or truncated tar after {num_samples} samples ({error}); write it again"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{url}: cannot read shard: {_explain(error, stream)}") from None
    if key is None:
        raise DataError(f"{url}: has no sample")
    yield RawSample(url, key, members)


class _EndMark:
    """Passes a stream on and remembers its last block: ``tarfile`` takes a tar that was cut between files for whole."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._tail = stream, b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._tail = (self._tail + data)[-tarfile.BLOCKSIZE :]
        return data

    def check(self, url: str) -> None:
        if len(self._tail) < tarfile.BLOCKSIZE or any(self._tail):
            raise DataError(f"{url}: truncated tar, no end mark; write it again")


def _explain(error: Exception, stream: Any) -> str:
    status = getattr(stream, "status", None)  # of the program that webdataset fetches with
    if status:
        return f"its download ended with status {status}" + (" (curl: not found or refused)" if status == 22 else "")
    return " ".join(str(error).split()) or type(error).__name__
