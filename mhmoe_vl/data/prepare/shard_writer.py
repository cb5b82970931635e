"""Write one shard: records in, tar and index out, or nothing at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mhmoe_vl.data.files import completed
from mhmoe_vl.data.prepare.images import load_image
from mhmoe_vl.data.prepare.records import Record
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.prepare.tar_writer import TarWriter
from mhmoe_vl.data.shards import (
    INDEX_FORMAT,
    MAX_MEMBER_BYTES,
    ShardIndex,
    Skip,
    encode_json,
    index_path,
    read_index,
    write_index,
)
from mhmoe_vl.errors import DataError, OutputError


@dataclass(frozen=True)
class ShardPlace:
    """Where a shard is written.

    Attributes:
        path: where to write it.
        published: its place in the finished data set, where an earlier packing may have left it.
        replaces: a shard of other records at either place is replaced, and one of an earlier data set never kept.
    """

    path: Path
    published: Path
    replaces: bool


@dataclass(frozen=True)
class ShardJob:
    """One shard to write from records."""

    place: ShardPlace
    kind: str
    records: tuple[Record, ...]
    images: Path | None
    image_size: int | None

    @property
    def plan(self) -> str:
        """Hash of the records and options, stored in the index."""
        digest = hashlib.sha256(f"{INDEX_FORMAT} {self.kind} {self.image_size}".encode())
        for record in self.records:
            digest.update(record.digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardResult:
    """What became of a :class:`ShardJob`; no samples and no file if every record was unusable."""

    name: str
    num_samples: int
    num_items: int
    num_bytes: int
    sha256: str
    skipped: tuple[Skip, ...]


def write_shard(job: ShardJob) -> ShardResult:
    """Write the shard and its index, unless they are there already.

    Raises:
        OutputError: as :func:`write_samples`.
    """
    return write_samples(job.place, job.kind, job.plan, partial(_usable_samples, job))


def write_samples(
    place: ShardPlace, kind: str, plan: str, samples_of: Callable[[list[Skip]], Iterator[dict[str, Any]]]
) -> ShardResult:
    """Write a shard of samples and its index, unless a shard of the same ``plan`` is there already.

    Args:
        plan: hash of everything that decides the samples.
        samples_of: gives the samples as webdataset writes them, and notes in the list what it leaves out.

    Raises:
        OutputError: the shard cannot be written, or the one that is there was packed from other records.
    """
    for path in (place.path,) if place.replaces else (place.path, place.published):
        index = _finished_index(path)
        if index is not None and index.plan == plan:
            return _result(index)
        if index is not None and not place.replaces:
            raise OutputError(
                f"{path}: was packed from other records or options; add --overwrite, or choose another --out"
            )
    skipped: list[Skip] = []
    samples = samples_of(skipped)
    first = next(samples, None)
    if first is None:
        return ShardResult(place.path.name, 0, 0, 0, "", tuple(skipped))
    with completed(place.path) as temporary:
        _write_tar(temporary, chain([first], samples))
        scanned = scan_shard(temporary, kind=kind)
    index = replace(scanned, path=place.path, plan=plan, skipped=(*skipped, *scanned.skipped))
    write_index(index)
    return _result(index)


def _result(index: ShardIndex) -> ShardResult:
    return ShardResult(
        index.path.name, index.num_samples, index.num_items, index.num_bytes, index.sha256, index.skipped
    )


def _finished_index(shard: Path) -> ShardIndex | None:
    if not index_path(shard).exists():
        return None
    try:
        return read_index(shard)
    except DataError:
        return None


def _write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, mode=0o644, user="", group="") as tar:
            for sample in samples:
                tar.write(sample)
        file.flush()
        os.fsync(file.fileno())


def _usable_samples(job: ShardJob, skipped: list[Skip]) -> Iterator[dict[str, Any]]:
    """Samples as webdataset writes them; of each that cannot be used a skip is noted."""
    for record in job.records:
        members = _members(record, job, skipped)
        if members:
            yield {"__key__": record.key, **members}


def _members(record: Record, job: ShardJob, skipped: list[Skip]) -> dict[str, bytes]:
    """The files of one sample; empty, and a skip noted, if it cannot be used."""
    members = {}
    for prefix, relative in record.images.items():
        assert job.images is not None
        try:
            extension, data = load_image(job.images / relative, image_size=job.image_size)
        except OSError as error:
            skipped.append(Skip(relative, "image_unreadable", str(error.strerror)))
            return {}
        except DataError as error:
            skipped.append(Skip(relative, getattr(error, "reason", "broken_image"), str(error)))
            return {}
        members[f"{prefix}.{extension}" if prefix else extension] = data
    if record.text is not None:
        members["txt"] = record.text.encode()
    if record.fields is not None:
        members["json"] = encode_json(record.fields)
    for name, data in members.items():
        # What no reader accepts must not get into a shard.
        if len(data) > MAX_MEMBER_BYTES:
            detail = f"{name} has {len(data)} bytes; at most {MAX_MEMBER_BYTES} are packed"
            skipped.append(Skip(record.key, "too_large", detail))
            return {}
    return members
