"""Index a tar that we or somebody else wrote, strictly.

Ordinary readers are lenient in ways that lose data silently: a tar cut at a header reads as a shorter tar, and an
image whose caption was cut off becomes a sample of its own. Here damage to the tar is an error, and a sample
that cannot be used is recorded with a reason.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path

from mhmoe_vl.data.coded_views import CODED_KINDS
from mhmoe_vl.data.coded_views import MEMBER as CODES_MEMBER
from mhmoe_vl.data.decode import IMAGE_EXTENSIONS, captions_of, clean_text, decode_json, decode_text, image_name
from mhmoe_vl.data.shards import KINDS, MAX_MEMBER_BYTES, IndexedSample, Member, ShardIndex, Skip, split_member_name
from mhmoe_vl.errors import DataError

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

# Kind -> list of its JSON file, and the fields that each item of the list must have: an identifier and a text.
_ITEMS = {"vqa": ("questions", "question_id", "question"), "nlvr2": ("examples", "identifier", "sentence")}

# (offset, size) of the files of one sample, by extension.
_Places = dict[str, tuple[int, int]]


class _UnusableSampleError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def scan_shard(shard: Path, *, kind: str | None = None) -> ShardIndex:
    """Read a whole shard and index its usable samples.

    Args:
        kind: one of :data:`KINDS`; guessed from the members if None. img2dataset shards are pairs.

    Returns:
        An index without ``plan``. ``skipped`` tells of every sample that is incomplete, empty, too large, interleaved
        with others, or has the key of an earlier one.

    Raises:
        DataError: not an uncompressed tar, truncated, damaged, or without a usable sample.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"{shard}: unknown kind '{kind}'; known kinds: {', '.join(KINDS)}")
    try:
        with shard.open("rb") as file:
            return _scan(shard, file, kind)
    except OSError as error:
        raise DataError(f"{shard}: cannot read shard: {error.strerror}") from None


def _scan(shard: Path, file: BufferedReader, kind: str | None) -> ShardIndex:
    num_bytes = os.fstat(file.fileno()).st_size
    groups, skipped = _group_members(_tar_entries(shard, file, num_bytes))
    kind = kind or _guess_kind(file.fileno(), groups)
    samples = []
    for key, places in groups.items():
        try:
            samples.append(_index_sample(file.fileno(), kind, key, places))
        except _UnusableSampleError as error:
            skipped.append(Skip(key, error.reason, str(error)))
    if not samples:
        example = f"; first problem: {skipped[0].source}: {skipped[0].reason}: {skipped[0].detail}" if skipped else ""
        raise DataError(f"{shard}: has no usable sample of kind '{kind}'{example}")
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardIndex(shard, kind, num_bytes, sha256, tuple(samples), tuple(skipped))


def _group_members(entries: Iterable[tarfile.TarInfo]) -> tuple[dict[str, _Places], list[Skip]]:
    """Adjacent files with one key make a sample: the WebDataset rule."""
    groups: dict[str, _Places] = {}
    skipped: list[Skip] = []
    current = None
    for entry in entries:
        if entry.isdir():
            continue
        name, parts = entry.name.removeprefix("./"), split_member_name(entry.name)
        if not entry.isreg() or entry.issparse():
            skipped.append(Skip(name, "not_a_file", "links, devices and sparse files are not read"))
            continue
        if parts is None:
            skipped.append(Skip(name, "no_key", "a file must be called KEY.EXTENSION"))
            continue
        key, extension = parts
        if key == current and extension not in groups[key]:
            groups[key][extension] = (entry.offset_data, entry.size)
        elif key not in groups:
            groups[key] = {extension: (entry.offset_data, entry.size)}
            current = key
        elif extension in groups[key]:
            skipped.append(Skip(name, "duplicate_key", "the shard has this file twice; the first is used"))
        else:
            skipped.append(
                Skip(name, "interleaved", "files of one sample must follow each other; sort the tar by name")
            )
    return groups, skipped


def _tar_entries(shard: Path, file: BufferedReader, num_bytes: int) -> list[tarfile.TarInfo]:
    entries: list[tarfile.TarInfo] = []
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (entry := tar.next()) is not None:
                # tarfile believes any size, and one below zero would send it back to where it has been.
                if entry.size < 0 or tar.offset <= end or entry.offset_data > num_bytes:
                    raise tarfile.ReadError(f"impossible size {entry.size} of {entry.name!r}")
                entries.append(entry)
                end = tar.offset
            _check_end(shard, file.fileno(), tar.offset)
    except (DataError, OSError):
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        raise DataError(_explain_damage(shard, " ".join(str(error).split()) or type(error).__name__)) from None
    return entries


def _check_end(shard: Path, descriptor: int, end: int) -> None:
    """``tarfile`` stops in silence at a damaged header: what follows its last entry must be the end mark, zeros."""
    tail = os.pread(descriptor, tarfile.BLOCKSIZE, end)
    if len(tail) < tarfile.BLOCKSIZE:
        raise DataError(f"{shard}: truncated tar: no end mark at byte {end}; copy or write it again")
    if any(tail):
        raise DataError(f"{shard}: damaged tar: bad header at byte {end}; copy or write it again")


def _explain_damage(shard: Path, message: str) -> str:
    with shard.open("rb") as file:
        start = file.read(8)
    if not start:
        return f"{shard}: empty file; copy or write it again"
    for magic, name in _COMPRESSIONS.items():
        if start.startswith(magic):
            return f"{shard}: {name}-compressed; shards are read in any order, so decompress it to a plain tar first"
    if message == "unexpected end of data":
        return f"{shard}: truncated tar; copy or write it again"
    return f"{shard}: not a tar, or a damaged one ({message[:200]}); copy or write it again"


def _guess_kind(descriptor: int, groups: Mapping[str, _Places]) -> str:
    if any(image_name(places, "left") for places in groups.values()):
        return "nlvr2"
    with_image = [places for places in groups.values() if image_name(places)]
    if not with_image:
        return "text"
    if any("txt" in places for places in with_image):
        return "pair"
    described = next((places["json"] for places in with_image if "json" in places), None)
    if described is None:
        return "image"
    try:
        fields = decode_json(os.pread(descriptor, min(described[1], MAX_MEMBER_BYTES), described[0]))
    except DataError:
        return "image"
    if "questions" in fields:
        return "vqa"
    if {"caption", "captions"} & fields.keys():
        return "pair"
    return "class" if isinstance(fields.get("class"), str) else "image"


def _index_sample(descriptor: int, kind: str, key: str, places: _Places) -> IndexedSample:
    names = _wanted_members(kind, places)
    members: dict[str, Member] = {}
    contents: dict[str, bytes] = {}
    for name in names:
        offset, size = places[name]
        if size > MAX_MEMBER_BYTES:
            raise _UnusableSampleError("too_large", f"{name} has {size} bytes; at most {MAX_MEMBER_BYTES} are read")
        contents[name] = os.pread(descriptor, size, offset)
        members[name] = Member(offset, size, zlib.crc32(contents[name]))
    try:
        return IndexedSample(key, _count_items(kind, contents), members)
    except DataError as error:
        raise _UnusableSampleError("malformed", str(error)) from None


def _wanted_members(kind: str, places: _Places) -> list[str]:
    """The members that a sample of this kind is read from; others, such as class labels, are left in the tar."""
    if kind == "nlvr2":
        required = [image_name(places, "left"), image_name(places, "right"), "json" if "json" in places else None]
        wanted = ["left image", "right image", "json"]
    elif kind == "text":
        required, wanted = ["txt" if "txt" in places else None], ["txt"]
    elif kind in ("vqa", "class"):
        required, wanted = [image_name(places), "json" if "json" in places else None], ["image", "json"]
    elif kind == "pair":
        caption = next((name for name in ("txt", "json") if name in places), None)
        required, wanted = [image_name(places), caption], ["image", "caption (txt or json)"]
    else:
        required, wanted = [image_name(places)], ["image"]
    missing = [what for name, what in zip(required, wanted, strict=True) if name is None]
    if missing:
        dotted = [
            name
            for name in places
            if name.rpartition(".")[2] in (*IMAGE_EXTENSIONS, "txt", "json") and "." in name and name != CODES_MEMBER
        ]
        if dotted:
            raise _UnusableSampleError(
                "dot_in_key", f"a key must not contain a dot, so '.{dotted[0]}' is read as the extension"
            )
        raise _UnusableSampleError("incomplete", f"has {', '.join(sorted(places))} and lacks: {', '.join(missing)}")
    optional = {name for name in ("txt", "json") if name in places and kind in ("image", "text", "pair")}
    coded = {CODES_MEMBER} if CODES_MEMBER in places and kind in CODED_KINDS else set()
    return sorted({name for name in required if name is not None} | optional | coded)


def _count_items(kind: str, contents: dict[str, bytes]) -> int:
    if kind in _ITEMS:
        field, identifier, text = _ITEMS[kind]
        items = decode_json(contents["json"]).get(field)
        if not isinstance(items, list) or not items:
            raise _UnusableSampleError("empty", f"json has no '{field}'")
        for item in items:
            if not isinstance(item, dict) or identifier not in item or not isinstance(item.get(text), str):
                raise DataError(f"each of '{field}' must be an object with '{identifier}' and a string '{text}'")
        return len(items)
    if kind == "pair" and not captions_of(contents):
        raise _UnusableSampleError("empty_caption", "no caption with a visible character")
    if kind == "class" and not isinstance(decode_json(contents["json"]).get("class"), str):
        raise DataError("json must have a string 'class'")
    if kind == "text" and not clean_text(decode_text(contents["txt"])):
        raise _UnusableSampleError("empty", "no visible character")
    return 1
