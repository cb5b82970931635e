"""Write one shard: records in, tar and index out, or nothing at all."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from webdataset.writer import TarWriter

from mhmoe_vl.data.prepare.images import load_image
from mhmoe_vl.data.prepare.records import Record
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import (
    INDEX_FORMAT,
    ShardIndex,
    Skip,
    encode_json,
    index_path,
    read_index,
    write_index,
)
from mhmoe_vl.errors import DataError, OutputError


@dataclass(frozen=True)
class ShardJob:
    """All that decides the bytes of one shard."""

    path: Path
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
        OutputError: the shard cannot be written, or the one that is there was packed from other records.
    """
    plan = job.plan
    index = _finished_index(job.path)
    if index is not None and index.plan != plan:
        raise OutputError(
            f"{job.path}: was packed from other records or options; add --overwrite, or choose another --out"
        )
    if index is None:
        temporary = job.path.with_name(job.path.name + ".tmp")
        try:
            num_samples, skipped = _write_tar(temporary, job)
            if not num_samples:
                temporary.unlink()
                return ShardResult(job.path.name, 0, 0, 0, "", tuple(skipped))
            scanned = scan_shard(temporary, kind=job.kind)
            temporary.replace(job.path)
        except OSError as error:
            raise OutputError(f"{job.path}: cannot write: {error.strerror}") from None
        index = replace(scanned, path=job.path, plan=plan, skipped=(*skipped, *scanned.skipped))
        write_index(index)
    return ShardResult(job.path.name, index.num_samples, index.num_items, index.num_bytes, index.sha256, index.skipped)


def _finished_index(shard: Path) -> ShardIndex | None:
    if not index_path(shard).exists():
        return None
    try:
        return read_index(shard)
    except DataError:
        return None


def _write_tar(path: Path, job: ShardJob) -> tuple[int, list[Skip]]:
    num_samples = 0
    skipped: list[Skip] = []
    with path.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, mode=0o644, user="", group="") as tar:
            for record in job.records:
                members = _members(record, job, skipped)
                if members:
                    tar.write({"__key__": record.key, **members})
                    num_samples += 1
        file.flush()
        os.fsync(file.fileno())
    return num_samples, skipped


def _members(record: Record, job: ShardJob, skipped: list[Skip]) -> dict[str, bytes]:
    """The files of one sample; empty, and a skip noted, if an image cannot be used."""
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
    return members
