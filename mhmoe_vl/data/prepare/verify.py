"""Check data set folders: tars against their indexes, checksums, images, and keys across shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mhmoe_vl.data.decode import decode_image, image_member
from mhmoe_vl.data.prepare.processes import map_in_processes
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import ShardIndex, ShardReader, Skip, index_path, read_index, write_index
from mhmoe_vl.errors import DataError

_IMAGE_PREFIXES = {"nlvr2": ("left", "right"), "text": ()}


@dataclass(frozen=True)
class ShardCheck:
    """What was found in one shard; ``index`` is of what is in the tar, None if it cannot be read as a tar."""

    path: Path
    index: ShardIndex | None
    problems: tuple[Skip, ...]


@dataclass(frozen=True)
class _Job:
    path: Path
    kind: str | None
    decode: bool
    write_index: bool


def verify_shards(
    shards: Sequence[Path],
    *,
    kind: str | None = None,
    decode: bool = False,
    write_indexes: bool = False,
    num_workers: int = 1,
) -> list[ShardCheck]:
    """Read every byte of ``shards``.

    Args:
        kind: expected kind, guessed for each shard if None.
        decode: also decode every image.
        write_indexes: write an index of the usable samples where a shard has none or an outdated one.

    Returns:
        One check per shard. Problems are unusable samples, a missing or differing index, images that cannot be decoded,
        and keys that an earlier shard has.
    """
    jobs = [_Job(path, kind, decode, write_indexes) for path in shards]
    checks = list(
        show_progress(
            map_in_processes(_check_shard, jobs, num_workers=num_workers),
            label="verifying samples",
            amount=lambda check: check.index.num_samples if check.index else 0,
        )
    )
    return _find_repeated_keys(checks)


def _check_shard(job: _Job) -> ShardCheck:
    name = job.path.name
    try:
        found = scan_shard(job.path, kind=job.kind)
    except DataError as error:
        return ShardCheck(job.path, None, (Skip(name, "broken_shard", str(error)),))
    problems = [Skip(f"{name}: {skip.source}", skip.reason, skip.detail) for skip in found.skipped]
    problems += _undecodable_images(found) if job.decode else []
    difference = _compare_with_index(job.path, found)
    if difference and job.write_index:
        write_index(found)
    elif difference:
        problems.append(Skip(name, *difference))
    return ShardCheck(job.path, found, tuple(problems))


def _compare_with_index(shard: Path, found: ShardIndex) -> tuple[str, str] | None:
    if not index_path(shard).exists():
        return "no_index", "make one with --write-index"
    try:
        indexed = read_index(shard)
    except DataError as error:
        return "bad_index", str(error)
    if indexed.sha256 != found.sha256:
        return "checksum", "the shard's SHA-256 differs from the index: a damaged copy, or an index of another shard"
    if (indexed.kind, indexed.samples) != (found.kind, found.samples):
        return "index_mismatch", "kind or samples differ from those in the index"
    return None


def _undecodable_images(index: ShardIndex) -> list[Skip]:
    problems = []
    reader = ShardReader()
    for sample in index.samples:
        for prefix in _IMAGE_PREFIXES.get(index.kind, ("",)):
            try:
                decode_image(image_member(reader.read(index, sample), prefix))
            except DataError as error:
                reason = getattr(error, "reason", "unreadable")
                problems.append(Skip(f"{index.path.name}: {sample.key}", reason, str(error)))
    return problems


def _find_repeated_keys(checks: Sequence[ShardCheck]) -> list[ShardCheck]:
    """Keys are unique within a data set, which is a folder; two data sets may well share images."""
    owner: dict[tuple[Path, str], str] = {}
    complete = []
    for check in checks:
        name, repeated = check.path.name, []
        for sample in check.index.samples if check.index else ():
            first = owner.setdefault((check.path.parent, sample.key), name)
            if first != name:
                repeated.append(Skip(f"{name}: {sample.key}", "duplicate_key", f"{first} has this key too"))
        complete.append(ShardCheck(check.path, check.index, (*check.problems, *repeated)))
    return complete
