"""Check data set folders: tars against their indexes and the manifest, checksums, images, and keys across shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mhmoe_vl.data.coded_views import MEMBER, CodesOrigin, parse_codes
from mhmoe_vl.data.decode import decode_image, image_member
from mhmoe_vl.data.prepare.processes import map_in_processes
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.prepare.scan import scan_shard
from mhmoe_vl.data.shards import (
    MANIFEST,
    Manifest,
    ShardIndex,
    ShardReader,
    Skip,
    index_path,
    read_index,
    read_manifest,
    write_index,
)
from mhmoe_vl.errors import DataError

_IMAGE_PREFIXES = {"nlvr2": ("left", "right"), "text": ()}


@dataclass(frozen=True)
class ShardCheck:
    """What was found in one file; ``index`` is of what is in the tar, None if it cannot be read as one."""

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
        One check per shard, and one for each other file of a folder with a problem. Problems are unusable samples, a
        missing or differing index, images that cannot be decoded, visual codes that are malformed, made in different
        ways or there for some samples only, keys that an earlier shard has, another kind than the folder's first shard,
        and differences from the folder's manifest.
    """
    jobs = [_Job(path, kind, decode, write_indexes) for path in shards]
    checks = list(
        show_progress(
            map_in_processes(_check_shard, jobs, num_workers=num_workers),
            label="verifying shards",
            amount=lambda _: 1,
            total=len(jobs),
        )
    )
    return _compare_with_manifests(_find_mixed_kinds(_find_repeated_keys(checks)))


def _check_shard(job: _Job) -> ShardCheck:
    name = job.path.name
    try:
        found = scan_shard(job.path, kind=job.kind)
    except DataError as error:
        return ShardCheck(job.path, None, (Skip(name, "broken_shard", str(error)),))
    problems = [Skip(f"{name}: {skip.source}", skip.reason, skip.detail) for skip in found.skipped]
    problems += _undecodable_images(found) if job.decode else []
    problems += _unusable_codes(found)
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


def _unusable_codes(index: ShardIndex) -> list[Skip]:
    """Of shards whose images are tokenized: all samples have codes, all made in the same way."""
    if not any(MEMBER in sample.members for sample in index.samples):
        return []
    problems = []
    reader = ShardReader()
    first: tuple[CodesOrigin, int, int] | None = None
    for sample in index.samples:
        where = f"{index.path.name}: {sample.key}"
        if MEMBER not in sample.members:
            problems.append(Skip(where, "no_codes", f"other samples of the shard have a .{MEMBER} member"))
            continue
        only_codes = sample._replace(members={MEMBER: sample.members[MEMBER]})
        try:
            origin, views = parse_codes(reader.read(index, only_codes)[MEMBER])
        except DataError as error:
            problems.append(Skip(where, "bad_codes", str(error)))
            continue
        made = (origin, len(views), len(views[0].codes))
        first = first or made
        if made != first:
            detail = "another tokenizer, image size, kind of crop, number of views or of codes than the first sample"
            problems.append(Skip(where, "mixed_codes", detail))
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
        complete.append(_add(check, repeated))
    return complete


def _find_mixed_kinds(checks: Sequence[ShardCheck]) -> list[ShardCheck]:
    first: dict[Path, ShardIndex] = {}
    complete = []
    for check in checks:
        problems = []
        if check.index:
            of_folder = first.setdefault(check.path.parent, check.index)
            if check.index.kind != of_folder.kind:
                detail = f"is of kind '{check.index.kind}', and {of_folder.path.name} of kind '{of_folder.kind}'"
                problems.append(Skip(check.path.name, "mixed_kinds", detail))
        complete.append(_add(check, problems))
    return complete


def _compare_with_manifests(checks: Sequence[ShardCheck]) -> list[ShardCheck]:
    complete = []
    for folder in dict.fromkeys(check.path.parent for check in checks):
        of_folder = [check for check in checks if check.path.parent == folder]
        try:
            manifest = read_manifest(folder)
        except DataError as error:
            of_folder.append(ShardCheck(folder / MANIFEST, None, (Skip(MANIFEST, "bad_manifest", str(error)),)))
        else:
            if manifest is not None:
                of_folder = [_add(check, _differences(check, manifest)) for check in of_folder]
                of_folder += _check_files(folder, manifest)
        complete += of_folder
    return complete


def _differences(check: ShardCheck, manifest: Manifest) -> list[Skip]:
    name, listed, found = check.path.name, manifest.shards.get(check.path.name), check.index
    if listed is None:
        return [Skip(name, "not_in_manifest", f"{MANIFEST} does not list it: it belongs to another data set")]
    if found is None:
        return []
    expected = {"kind": manifest.kind, **listed}
    different = [
        field
        for field in ("kind", "num_samples", "num_items", "num_bytes", "sha256")
        if getattr(found, field) != expected.get(field)
    ]
    return [Skip(name, "manifest_mismatch", f"other {', '.join(different)} than in {MANIFEST}")] if different else []


def _check_files(folder: Path, manifest: Manifest) -> list[ShardCheck]:
    """Whether everything is there, and what is not a shard is as it was written."""
    problems = []
    for name in (*manifest.shards, *manifest.files):
        path = folder / name
        if not path.is_file():
            problems.append(Skip(name, "absent", f"{MANIFEST} lists it"))
        elif name in manifest.files and hashlib.sha256(path.read_bytes()).hexdigest() != manifest.files[name]:
            problems.append(Skip(name, "manifest_mismatch", f"other sha256 than in {MANIFEST}"))
    return [ShardCheck(folder / problem.source, None, (problem,)) for problem in problems]


def _add(check: ShardCheck, problems: Sequence[Skip]) -> ShardCheck:
    return replace(check, problems=(*check.problems, *problems))
