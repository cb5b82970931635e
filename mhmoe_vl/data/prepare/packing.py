"""Records to shards: deterministic, in parallel, and restartable after any interruption.

The records decide the bytes: shard ``i`` holds the records from ``i * samples_per_shard`` on, less those that turn out
to be unusable, whatever the number of workers. What the folder held before stays until the new data set is complete.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from mhmoe_vl import __version__
from mhmoe_vl.data.prepare.output_folder import OutputFolder
from mhmoe_vl.data.prepare.processes import map_in_processes
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.prepare.records import Record
from mhmoe_vl.data.prepare.shard_writer import ShardJob, ShardResult, write_shard
from mhmoe_vl.data.shards import Skip, encode_json
from mhmoe_vl.errors import DataError

MANIFEST_FORMAT = "mhmoe_vl/manifest/1"
SKIPPED = "skipped.jsonl"

JobT = TypeVar("JobT")


@dataclass(frozen=True)
class Packing:
    """Where and how to pack.

    Attributes:
        kind: one of :data:`mhmoe_vl.data.shards.KINDS`.
        directory: the data set's folder; holds nothing else.
        name: shards are called ``{name}-00000.tar`` and so on.
        images: the folder that the records' image paths are relative to.
        samples_per_shard: records planned for a shard; unusable ones leave it smaller. None where other shards decide.
        image_size: make images smaller, see :func:`mhmoe_vl.data.prepare.images.load_image`.
        limit: pack only so many records.
        keys_ascend: the reader gives every record a larger key than the one before, so that keys need not be remembered
            to find two that are the same: for more records than fit into memory.
        settings: what else decides the output, for the manifest; no path of this machine.
        facts: further entries of the manifest.
        files: further files of the folder, name -> content.
    """

    kind: str
    directory: Path
    name: str
    images: Path | None = None
    samples_per_shard: int | None = 1000
    image_size: int | None = None
    limit: int | None = None
    keys_ascend: bool = False
    num_workers: int = 1
    overwrite: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class PackingReport:
    """Counts of a finished data set; ``num_items`` counts questions and NLVR2 examples, else samples."""

    directory: Path
    num_shards: int
    num_samples: int
    num_items: int
    skipped: tuple[Skip, ...]

    @property
    def skipped_share(self) -> float:
        """Share of source entries that were left out."""
        return len(self.skipped) / max(1, len(self.skipped) + self.num_samples)


class NothingPackedError(DataError):
    """No record could be packed. ``skipped`` tells why; it is empty if there was none to begin with."""

    def __init__(self, directory: Path, skipped: Sequence[Skip]) -> None:
        super().__init__(f"{directory}: nothing could be packed{_commonest(skipped)}")
        self.skipped = skipped


def pack(records: Iterable[Record | Skip], packing: Packing) -> PackingReport:
    """Write a data set folder: shards with indexes, ``skipped.jsonl``, and ``manifest.json`` last.

    Run again after an interruption, it keeps the shards that are complete; both ways give the same bytes. Nothing in
    the folder changes before the first record has been read, and no earlier data set before the new one is complete.

    Args:
        records: a sequence, if it fits into memory, shows in the progress bar how many there are.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        NothingPackedError: not a single record could be packed.
    """
    folder = output_folder(packing)
    skipped_by_reader: list[Skip] = []
    jobs = _plan_shards(records, packing, folder, skipped_by_reader)
    total = _num_expected(records, packing.limit)
    return write_data_set(jobs, write_shard, packing, folder, skipped=skipped_by_reader, total=total)


def write_data_set(
    jobs: Iterator[JobT],
    write: Callable[[JobT], ShardResult],
    packing: Packing,
    folder: OutputFolder,
    *,
    skipped: list[Skip],
    total: int | None = None,
    label: str = "packing",
) -> PackingReport:
    """Write shards in processes, and then publish them with ``skipped.jsonl`` and ``manifest.json``.

    Args:
        write: writes the shard of a job, in a worker process.
        skipped: what was left out before there were jobs; may grow while jobs are made.
        total: samples, if it is known how many there will be.

    Raises:
        OutputError, NothingPackedError: as :func:`pack`.
    """
    first_job = next(jobs, None)
    if first_job is None:
        raise NothingPackedError(packing.directory, skipped)
    folder.begin()
    try:
        results = list(
            show_progress(
                map_in_processes(write, chain([first_job], jobs), num_workers=packing.num_workers),
                label=f"{label} {packing.name}",
                amount=lambda result: result.num_samples + len(result.skipped),
                total=total,
            )
        )
        left_out = (*skipped, *(skip for result in results for skip in result.skipped))
        written = [result for result in results if result.num_samples]
        if not written:
            raise NothingPackedError(packing.directory, left_out)
        files = {**packing.files, SKIPPED: b"".join(encode_json(skip._asdict()) for skip in left_out)}
        folder.publish([result.name for result in written], files, _manifest(packing, written, left_out, files))
    finally:
        folder.discard_if_empty()
    return PackingReport(
        packing.directory,
        len(written),
        sum(result.num_samples for result in written),
        sum(result.num_items for result in written),
        left_out,
    )


def output_folder(packing: Packing) -> OutputFolder:
    """The folder that ``packing`` writes to, checked and not yet touched.

    Raises:
        OutputError: it holds something that must not be replaced.
    """
    return OutputFolder(packing.directory, _settings(packing), overwrite=packing.overwrite)


def key_of(record: Record) -> str:
    """What tells records apart."""
    return record.key


def text_of(record: Record) -> str:
    """What tells documents apart, wherever they stand."""
    return record.text or ""


def split_holdout(
    records: Iterable[Record | Skip], fraction: float, *, held_out: bool, identity: Callable[[Record], str] = key_of
) -> Iterator[Record | Skip]:
    """The held-out ``fraction`` of records, or the others with all skips.

    The hash of its ``identity`` decides where a record belongs, so that it stays there when the data set grows.
    """
    for record in records:
        if isinstance(record, Skip):
            if not held_out:
                yield record
        elif (int(hashlib.sha256(identity(record).encode()).hexdigest()[:13], 16) / 16**13 < fraction) == held_out:
            yield record


def _num_expected(records: Iterable[Record | Skip], limit: int | None) -> int | None:
    if not isinstance(records, Sequence):
        return None
    num_records = len({record.key for record in records if isinstance(record, Record)})
    return num_records if limit is None else min(num_records, limit)


def _plan_shards(
    records: Iterable[Record | Skip], packing: Packing, folder: OutputFolder, skipped: list[Skip]
) -> Iterator[ShardJob]:
    keys: set[str] = set()
    last_key = ""
    chunk: list[Record] = []
    num_shards = num_records = 0

    def job() -> ShardJob:
        name = f"{packing.name}-{num_shards:05d}.tar"
        return ShardJob(folder.place(name), packing.kind, tuple(chunk), packing.images, packing.image_size)

    for record in records:
        if isinstance(record, Skip):
            skipped.append(record)
            continue
        if record.key in keys:
            skipped.append(Skip(record.key, "duplicate_key", "an earlier record has this key"))
            continue
        if packing.limit is not None and num_records >= packing.limit:
            break
        if packing.keys_ascend:
            assert record.key > last_key, f"{record.key} follows {last_key}"
            last_key = record.key
        else:
            keys.add(record.key)
        num_records += 1
        chunk.append(record)
        if len(chunk) == packing.samples_per_shard:
            yield job()
            num_shards, chunk = num_shards + 1, []
    if chunk:
        yield job()


def _settings(packing: Packing) -> dict[str, Any]:
    return {
        "kind": packing.kind,
        "name": packing.name,
        "samples_per_shard": packing.samples_per_shard,
        "image_size": packing.image_size,
        "limit": packing.limit,
        **packing.settings,
    }


def _manifest(
    packing: Packing, written: Sequence[ShardResult], skipped: Sequence[Skip], files: Mapping[str, bytes]
) -> dict[str, Any]:
    return {
        "format": MANIFEST_FORMAT,
        "version": __version__,
        "kind": packing.kind,
        "name": packing.name,
        "settings": _settings(packing),
        "num_shards": len(written),
        "num_samples": sum(result.num_samples for result in written),
        "num_items": sum(result.num_items for result in written),
        "num_skipped": dict(sorted(Counter(skip.reason for skip in skipped).items())),
        **packing.facts,
        "shards": [
            {
                "name": result.name,
                "num_samples": result.num_samples,
                "num_items": result.num_items,
                "num_bytes": result.num_bytes,
                "sha256": result.sha256,
            }
            for result in written
        ],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
    }


def _commonest(skipped: Sequence[Skip]) -> str:
    if not skipped:
        return ": the source has no entries"
    reason, count = Counter(skip.reason for skip in skipped).most_common(1)[0]
    example = next(skip for skip in skipped if skip.reason == reason)
    return f": {count} of {len(skipped)} entries were skipped as {reason}, first {example.source}: {example.detail}"
