"""Exact duplicates among documents that do not fit into memory.

Every document is hashed (BLAKE2b, 128 bits: among 10^10 documents two different ones share a hash with a probability of
10^-19). Hashes go to a folder, sorted into 256 files by their first byte, and one file after the other is sorted in
memory. What is held: one bit per document, and one 256th of the hashes (24 bytes each) at a time; on disk, 40 bytes per
document while it runs.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mhmoe_vl.data.prepare.documents import Reading, read_documents
from mhmoe_vl.data.prepare.processes import map_in_processes
from mhmoe_vl.data.prepare.progress import show_progress
from mhmoe_vl.data.prepare.records import Record, Records
from mhmoe_vl.errors import OutputError

_DIGEST_BYTES = 16
_NUM_BUCKETS = 256
_HASHES_AT_ONCE = 2**20


@dataclass(frozen=True)
class Duplicates:
    """Which documents have the text of an earlier one.

    Attributes:
        num_documents: all that there are.
        bits: a bit per document, in their order, packed as by :func:`numpy.packbits`.
    """

    num_documents: int
    bits: NDArray[np.uint8]

    @property
    def number(self) -> int:
        """How many documents are duplicates."""
        return int(np.bitwise_count(self.bits).sum())

    def without(self, records: Records) -> Records:
        """``records``, in the order in which they were hashed, without the duplicates."""
        position = 0
        for record in records:
            if isinstance(record, Record):
                is_duplicate = self.bits[position >> 3] >> (7 - (position & 7)) & 1
                position += 1
                if is_duplicate:
                    continue
            yield record


def find_duplicates(files: Sequence[Path], reading: Reading, *, folder: Path, num_workers: int) -> Duplicates:
    """Read all documents once and compare them by hash; of those with the same text the first is kept.

    Args:
        folder: for hashes; made, and removed at the end. What a killed run left in it is deleted.
        num_workers: processes that read files; the result is the same.

    Raises:
        DataError: as :func:`read_documents`.
        OutputError: the folder cannot be written.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            num_workers = min(num_workers, len(files))
            jobs = [
                _HashJob(file, reading, folder / f"{number}.hashes", shows_progress=num_workers == 1)
                for number, file in enumerate(files)
            ]
            counts = map_in_processes(_hash_file, jobs, num_workers=num_workers)
            if num_workers > 1:
                counts = show_progress(counts, label="looking for duplicates", amount=int)
            num_documents = sum(counts)
            _sort_into_buckets([job.hashes for job in jobs], folder)
            bits = np.zeros(-(-num_documents // 8), dtype=np.uint8)
            for bucket in range(_NUM_BUCKETS):
                positions = _later_ones(folder / f"bucket{bucket}")
                np.bitwise_or.at(bits, positions >> 3, (128 >> (positions & 7)).astype(np.uint8))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write: {error.strerror or error}") from None
    return Duplicates(num_documents, bits)


@dataclass(frozen=True)
class _HashJob:
    file: Path
    reading: Reading
    hashes: Path
    shows_progress: bool


def _hash_file(job: _HashJob) -> int:
    """Write the hash of every document; returns their number."""
    number = 0
    records: Records = read_documents([job.file], job.reading)
    if job.shows_progress:
        records = show_progress(records, label=f"looking for duplicates in {job.file.name}", amount=lambda _: 1)
    with job.hashes.open("wb") as file:
        for record in records:
            if isinstance(record, Record):
                assert record.text is not None
                file.write(hashlib.blake2b(record.text.encode(), digest_size=_DIGEST_BYTES).digest())
                number += 1
    return number


def _sort_into_buckets(files: Sequence[Path], folder: Path) -> None:
    """Two halves of each hash and the number of its document, as uint64, into the file of the hash's first byte."""
    position = 0
    with ExitStack() as stack:
        buckets = [stack.enter_context((folder / f"bucket{bucket}").open("wb")) for bucket in range(_NUM_BUCKETS)]
        for hashes in _chunks(files):
            positions = np.arange(position, position + len(hashes), dtype=np.uint64)
            position += len(hashes)
            rows = np.column_stack([hashes, positions])
            bucket_of_row = (hashes[:, 0] >> np.uint64(56)).astype(np.int64)
            order = np.argsort(bucket_of_row, kind="stable")
            ends = np.searchsorted(bucket_of_row[order], np.arange(_NUM_BUCKETS), side="right")
            for bucket, part in enumerate(np.split(rows[order], ends[:-1])):
                buckets[bucket].write(part.tobytes())


def _chunks(files: Sequence[Path]) -> Iterator[NDArray[np.uint64]]:
    for path in files:
        with path.open("rb") as file:
            while data := file.read(_DIGEST_BYTES * _HASHES_AT_ONCE):
                yield np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)
        path.unlink()


def _later_ones(bucket: Path) -> NDArray[np.int64]:
    """Positions of all documents of a bucket but the first of each hash."""
    rows = np.fromfile(bucket, dtype=np.uint64).reshape(-1, 3)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    is_same = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
    return rows[1:, 2][is_same].astype(np.int64)
