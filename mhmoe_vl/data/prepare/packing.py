"""Records to shards: deterministic, in parallel, and restartable after any interruption.

The records decide the bytes: shard ``i`` holds the records from ``i * samples_per_shard`` on, less those that turn out
to be unusable, whatever the number of workers. ``unfinished.json`` marks a folder until its manifest is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhmoe_vl import __version__
from mhmoe_vl.data.prepare.processes import map_in_processes
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.prepare.records import Record
from mhmoe_vl.data.prepare.shard_writer import ShardJob, ShardResult, write_shard
from mhmoe_vl.data.shards import MANIFEST, UNFINISHED, Skip, encode_json, write_atomically
from mhmoe_vl.errors import DataError, OutputError

MANIFEST_FORMAT = "mhmoe_vl/manifest/1"
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Packing:
    """Where and how to pack.

    Attributes:
        kind: one of :data:`mhmoe_vl.data.shards.KINDS`.
        directory: the data set's folder; holds nothing else.
        name: shards are called ``{name}-00000.tar`` and so on.
        images: the folder that the records' image paths are relative to.
        samples_per_shard: records planned for a shard; unusable ones leave it smaller.
        image_size: make images smaller, see :func:`mhmoe_vl.data.prepare.images.load_image`.
        limit: pack only so many records.
        settings: what else decides the output, for the manifest; no path of this machine.
        facts: further entries of the manifest.
        files: further files of the folder, name -> content.
    """

    kind: str
    directory: Path
    name: str
    images: Path | None = None
    samples_per_shard: int = 1000
    image_size: int | None = None
    limit: int | None = None
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


def pack(records: Iterable[Record | Skip], packing: Packing) -> PackingReport:
    """Write a data set folder: shards with indexes, ``skipped.jsonl``, and ``manifest.json`` last.

    Run again after an interruption, it keeps the shards that are complete; both ways give the same bytes.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        DataError: not a single record could be packed.
    """
    _claim_directory(packing)
    skipped_by_reader: list[Skip] = []
    jobs = _plan_shards(records, packing, skipped_by_reader)
    results = list(
        show_progress(
            map_in_processes(write_shard, jobs, num_workers=packing.num_workers),
            label=f"packing {packing.name}",
            amount=lambda result: result.num_samples,
        )
    )
    skipped = (*skipped_by_reader, *(skip for result in results for skip in result.skipped))
    written = [result for result in results if result.num_samples]
    if not written:
        (packing.directory / UNFINISHED).unlink()
        raise DataError(f"{packing.directory}: nothing could be packed{_commonest(skipped)}")
    _check_no_other_shards(packing, written)
    _finish(packing, written, skipped)
    return PackingReport(
        packing.directory,
        len(written),
        sum(result.num_samples for result in written),
        sum(result.num_items for result in written),
        skipped,
    )


def split_holdout(records: Iterable[Record | Skip], fraction: float, *, held_out: bool) -> Iterator[Record | Skip]:
    """The held-out ``fraction`` of records, or the others with all skips.

    The hash of its key decides where a record belongs, so that it stays there when the data set grows.
    """
    for record in records:
        if isinstance(record, Skip):
            if not held_out:
                yield record
        elif (int(hashlib.sha256(record.key.encode()).hexdigest()[:13], 16) / 16**13 < fraction) == held_out:
            yield record


def _plan_shards(records: Iterable[Record | Skip], packing: Packing, skipped: list[Skip]) -> Iterator[ShardJob]:
    keys: set[str] = set()
    chunk: list[Record] = []
    num_shards = 0

    def job() -> ShardJob:
        path = packing.directory / f"{packing.name}-{num_shards:05d}.tar"
        return ShardJob(path, packing.kind, tuple(chunk), packing.images, packing.image_size)

    for record in records:
        if isinstance(record, Skip):
            skipped.append(record)
            continue
        if record.key in keys:
            skipped.append(Skip(record.key, "duplicate_key", "an earlier record has this key"))
            continue
        if packing.limit is not None and len(keys) >= packing.limit:
            break
        keys.add(record.key)
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


def _claim_directory(packing: Packing) -> None:
    """Refuse a folder that holds another data set; mark ours as unfinished."""
    directory = packing.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if packing.overwrite:
            _delete_data_set(packing)
    except OSError as error:
        raise OutputError(f"{directory}: cannot write: {error.strerror}") from None
    settings = json.loads(encode_json(_settings(packing)))
    # A run that failed before its first shard does not bind the next one.
    before = _settings_before(directory) if any(directory.glob("*.tar")) else settings
    if before is None:
        raise OutputError(f"{directory}: holds shards that were not packed here; choose another --out")
    if before != settings:
        different = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        raise OutputError(
            f"{directory}: holds a data set with other {', '.join(different)}; add --overwrite, or choose another --out"
        )
    write_atomically(directory / UNFINISHED, encode_json({"settings": settings}))


def _settings_before(directory: Path) -> dict[str, Any] | None:
    for name in (UNFINISHED, MANIFEST):
        try:
            return json.loads((directory / name).read_bytes())["settings"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(f"{directory / name}: not readable; add --overwrite, or choose another --out") from None
    return None


def _delete_data_set(packing: Packing) -> None:
    shard_file = re.compile(rf"{re.escape(packing.name)}-\d{{5,}}\.(tar|idx\.json)(\.tmp)?")
    for path in packing.directory.iterdir():
        if shard_file.fullmatch(path.name) or path.name in (MANIFEST, UNFINISHED, SKIPPED, *packing.files):
            path.unlink()


def _check_no_other_shards(packing: Packing, written: list[ShardResult]) -> None:
    others = {path.name for path in packing.directory.glob("*.tar")} - {result.name for result in written}
    if others:
        raise OutputError(
            f"{packing.directory / min(others)}: is left from an earlier packing of more records; add --overwrite"
        )


def _finish(packing: Packing, written: list[ShardResult], skipped: tuple[Skip, ...]) -> None:
    directory = packing.directory
    for name, content in packing.files.items():
        write_atomically(directory / name, content)
    write_atomically(directory / SKIPPED, b"".join(encode_json(skip._asdict()) for skip in skipped))
    manifest = {
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
    }
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
    (directory / UNFINISHED).unlink()


def _commonest(skipped: tuple[Skip, ...]) -> str:
    if not skipped:
        return ": the source has no entries"
    reason, count = Counter(skip.reason for skip in skipped).most_common(1)[0]
    example = next(skip for skip in skipped if skip.reason == reason)
    return f": {count} of {len(skipped)} entries were skipped as {reason}, first {example.source}: {example.detail}"
