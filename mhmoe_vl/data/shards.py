"""Indexed WebDataset shards: find them, index them, read any sample by its place.

A shard is an ordinary uncompressed tar. Beside ``x-00000.tar`` lies ``x-00000.idx.json`` with the key, the members
and the checksums of every usable sample, so that samples are read in any order with one ``pread`` per member, and
a truncated or exchanged shard is noticed before training starts. The format is described in data_prep/README.md.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from mhmoe_vl.data.files import write_atomically
from mhmoe_vl.errors import DataError, suggest

KINDS = ("image", "text", "pair", "vqa", "nlvr2", "class")
INDEX_FORMAT = "mhmoe_vl/index/1"
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"

MAX_MEMBER_BYTES = 64 * 2**20

_MAX_OPEN_FILES = 64
_MAX_NAME_BYTES = 255


class Member(NamedTuple):
    """Where the bytes of one file of a sample lie in the tar; ``crc32`` as of :func:`zlib.crc32`."""

    offset: int
    size: int
    crc32: int


class IndexedSample(NamedTuple):
    """One sample; ``members`` maps an extension such as ``jpg`` or ``left.png`` to its place.

    ``num_items`` is the number of questions (vqa) or of examples (nlvr2), else 1.
    """

    key: str
    num_items: int
    members: dict[str, Member]


class Skip(NamedTuple):
    """Something that was left out: where it came from, one word why, and the details."""

    source: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard. ``plan`` identifies what was packed (empty for shards made elsewhere)."""

    path: Path
    kind: str
    num_bytes: int
    sha256: str
    samples: tuple[IndexedSample, ...]
    skipped: tuple[Skip, ...] = ()
    plan: str = ""

    @property
    def num_samples(self) -> int:
        """Number of usable samples."""
        return len(self.samples)

    @property
    def num_items(self) -> int:
        """Number of training examples in the shard."""
        return sum(sample.num_items for sample in self.samples)


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. ``shards`` has an entry with counts and checksum for each name, ``files`` the
    SHA-256 of each other file."""

    kind: str
    settings: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, str]


def is_url(path: str) -> bool:
    """Whether ``path`` names something that is not in the file system."""
    return "://" in path or path.startswith("pipe:")


def split_member_name(name: str) -> tuple[str, str] | None:
    """``folder/key.left.JPG`` -> ``("folder/key", "left.jpg")``, as WebDataset does; None where one is missing."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else None


def index_path(shard: Path) -> Path:
    """``x-00000.tar`` -> ``x-00000.idx.json``."""
    return shard.with_suffix(".idx.json")


def read_index(shard: Path) -> ShardIndex:
    """Read the index beside ``shard``.

    Raises:
        DataError: shard or index is absent, the index is malformed, or the shard no longer has the indexed size.
    """
    path = index_path(shard)
    remedy = f"python -m data_prep.verify_shards --write-index {shard.parent}"
    try:
        num_bytes = shard.stat().st_size
    except OSError as error:
        raise DataError(f"{shard}: cannot read shard: {error.strerror}") from None
    try:
        index = _parse_index(shard, json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise DataError(f"{shard}: has no index {path.name}; make one with: {remedy}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read index: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: malformed index ({type(error).__name__}: {error}); make a new one with: {remedy}"
        ) from None
    if index.num_bytes != num_bytes:
        raise DataError(
            f"{shard}: has {num_bytes} bytes and its index says {index.num_bytes}: incomplete copy or another "
            f"shard; copy it again, or index what is there with: {remedy}"
        )
    return index


def write_index(index: ShardIndex) -> Path:
    """Write ``index`` beside its shard, replacing an older one in one step.

    Raises:
        OutputError: the folder cannot be written.
    """
    fields = {
        "format": INDEX_FORMAT,
        "shard": index.path.name,
        "kind": index.kind,
        "num_bytes": index.num_bytes,
        "sha256": index.sha256,
        "plan": index.plan,
        "num_samples": index.num_samples,
        "num_items": index.num_items,
        "samples": [sample._asdict() for sample in index.samples],
        "skipped": [skip._asdict() for skip in index.skipped],
    }
    path = index_path(index.path)
    write_atomically(path, encode_json(fields))
    return path


def encode_json(value: Any) -> bytes:
    """``value`` as one line of compact UTF-8 JSON; equal values give equal bytes."""
    # A lone surrogate (an undecodable file name) is not UTF-8, but its backslash escape is valid JSON.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace") + b"\n"


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest of a folder; None if it has none.

    Raises:
        DataError: it cannot be read, is something else, or names files outside of its folder.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        manifest = Manifest(
            kind=content.get("kind", ""),
            settings=dict(content.get("settings", {})),
            shards={entry["name"]: entry for entry in content["shards"]},
            files=dict(content.get("files", {})),
        )
        is_sound = all(is_file_name(name) for name in (*manifest.shards, *manifest.files))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise DataError(f"{path}: not a manifest of shards; delete it or pack again")
    return manifest


def is_file_name(name: Any) -> bool:
    """Whether ``name`` can be that of a file in a folder: no path, which could lead out of it, and nothing else."""
    if not isinstance(name, str) or not name.isprintable() or name in ("", ".", ".."):
        return False
    return os.sep not in name and len(name.encode()) <= _MAX_NAME_BYTES


def find_shards(paths: str | Path | Sequence[str | Path], *, check_manifest: bool = True) -> list[Path]:
    """Local tars named by directories (all their ``*.tar``), brace expressions ``x-{00000..00009}.tar`` and globs.

    Args:
        check_manifest: all shards that a directory's manifest lists must be there.

    Returns:
        Shards in the order given, those of a directory or glob sorted by name.

    Raises:
        DataError: nothing there, a shard that a manifest lists is gone, packing has not finished, or a URL.
    """
    shards: list[Path] = []
    missing: list[str] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        for expanded in _expand_braces(str(path)):
            found = _find(Path(expanded), check_manifest)
            shards += found
            if not found:
                missing.append(expanded)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(f"no shards at {shown}{_nearest_name(Path(missing[0]))}")
    if not shards:
        raise DataError("no shards given")
    twice = [shard for shard, count in Counter(shards).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]}: shard is given twice")
    return shards


class ShardReader:
    """Reads samples with ``pread`` on a few cached file descriptors.

    Safe to pickle and to use after a fork: ``pread`` does not move the file position that processes share.
    Not to be shared between threads.
    """

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def read(self, shard_index: ShardIndex, sample: IndexedSample) -> dict[str, bytes]:
        """All members of ``sample``, extension -> bytes.

        Raises:
            DataError: the shard cannot be opened, is too short, or a checksum differs.
        """
        path, members = shard_index.path, {}
        for name, member in sample.members.items():
            where = f"{path}: {sample.key}.{name}"
            try:
                data = os.pread(self._descriptor(path), member.size, member.offset)
            except OSError as error:
                raise DataError(f"{where}: cannot read: {error.strerror}") from None
            if len(data) != member.size:
                raise DataError(f"{where}: shard ends early, {len(data)} of {member.size} bytes; copy it again")
            if zlib.crc32(data) != member.crc32:
                raise DataError(f"{where}: checksum differs from the index, the shard is damaged; copy it again")
            members[name] = data
        return members

    def close(self) -> None:
        """Close all descriptors; the reader can still be used and opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._descriptors = OrderedDict()

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, path: Path) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
            return self._descriptors[path]
        if len(self._descriptors) >= _MAX_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]


def _parse_index(shard: Path, fields: dict[str, Any]) -> ShardIndex:
    if fields["format"] != INDEX_FORMAT:
        raise ValueError(f"format is {fields['format']!r}, expected {INDEX_FORMAT!r}")
    if fields["kind"] not in KINDS:
        raise ValueError(f"kind is {fields['kind']!r}, expected one of {', '.join(KINDS)}")
    if not fields["samples"] or len(fields["samples"]) != fields["num_samples"]:
        raise ValueError(f"{len(fields['samples'])} samples, and num_samples is {fields['num_samples']}")
    return ShardIndex(
        path=shard,
        kind=fields["kind"],
        num_bytes=fields["num_bytes"],
        sha256=fields["sha256"],
        samples=tuple(_parse_sample(sample, fields["num_bytes"]) for sample in fields["samples"]),
        skipped=tuple(Skip(**skip) for skip in fields["skipped"]),
        plan=fields["plan"],
    )


def _parse_sample(fields: dict[str, Any], num_bytes: int) -> IndexedSample:
    sample = IndexedSample(
        fields["key"], fields["num_items"], {name: Member(*place) for name, place in fields["members"].items()}
    )
    numbers = (sample.num_items, *(number for member in sample.members.values() for number in member))
    if not isinstance(sample.key, str) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"sample {str(sample.key)[:80]!r}: key, num_items or a member is of another type")
    for name, member in sample.members.items():
        if member.offset + member.size > num_bytes:
            raise ValueError(f"sample {sample.key!r}: {name} ends behind the shard")
    return sample


def _expand_braces(path: str) -> list[str]:
    if is_url(path):
        raise DataError(
            f"{path}: a URL; only training on images, texts and pairs streams those, all else reads local shards: copy "
            "them to a local or mounted folder"
        )
    try:
        return list(braceexpand(path))
    except ValueError:
        raise DataError(f"{path}: braces do not match; write for example x-{{00000..00009}}.tar") from None


def _find(path: Path, check_manifest: bool) -> list[Path]:
    if path.is_dir():
        _check_finished(path)
        if check_manifest:
            _check_complete(path)
        return sorted(path.glob("*.tar"))
    if path.exists():
        return [path]
    if any(character in path.name for character in "*?["):
        return sorted(path.parent.glob(path.name))
    return []


def _check_finished(directory: Path) -> None:
    # With a manifest, it is the replacement of a data set that has not finished, and this one is as it was.
    if (directory / UNFINISHED).exists() and not (directory / MANIFEST).exists():
        raise DataError(f"{directory}: packing was interrupted; run the same data_prep command again to finish it")


def _check_complete(directory: Path) -> None:
    manifest = read_manifest(directory)
    if manifest is None:
        return
    absent = [name for name in manifest.shards if not (directory / name).is_file()]
    if absent:
        raise DataError(
            f"{directory}: {len(absent)} of {len(manifest.shards)} shards of the manifest are absent, first {absent[0]}"
        )


def _nearest_name(path: Path) -> str:
    return suggest(path.name, sorted(entry.name for entry in path.parent.glob("*"))[:10_000])
